#include "attachment.h"

#include "errors.h"
#include "log_capture.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <string>

namespace personasteer {

attachment::attachment(llama_context * c) : ctx(c), mdl(llama_get_model(c)) {
    const int n_seq = int(llama_n_seq_max(ctx)), n_ubatch = int(llama_n_ubatch(ctx));
    // llama.cpp sizes its graphs for a token count rounded up to a multiple of the sequences
    columns = (n_ubatch + n_seq - 1) / n_seq * n_seq;
    wanted_tables.n_slots = n_seq;
}

attachment::~attachment() {
    if (hook) {
        const log_capture log;
        llama_synchronize(ctx);
        llama_set_sampler(ctx, graph_edit::never_decoded, nullptr);
    }
}

void attachment::attach() {
    const log_capture log;
    llama_synchronize(ctx);
    const int n_layer = llama_model_n_layer(mdl), n_embd = llama_model_n_embd(mdl);
    auto new_bank = std::make_unique<edit_bank>(n_embd, std::vector<int>(wanted_layers.begin(), wanted_layers.end()),
                                                columns, wanted_tables, false);
    auto new_hook = std::make_unique<graph_edit>(n_layer, n_embd, columns, 0, new_bank.get(), nullptr);
    if (!llama_set_sampler(ctx, graph_edit::never_decoded, new_hook->chain())) {
        throw model_error("llama.cpp refuses the graph hook here (a model split by tensor?)");
    }
    hook = std::move(new_hook); // the old chain and bank are no longer reachable from the context
    bank = std::move(new_bank);
}

void attachment::arm(std::vector<token> tokens, bool embedded, const readout_ptr & reads) {
    if (int(tokens.size()) > int(llama_n_ubatch(ctx))) {
        throw model_error("a decode of " + std::to_string(tokens.size()) + " tokens is more than n_ubatch = " +
                          std::to_string(llama_n_ubatch(ctx)) + ", within which steering finds its tokens");
    }
    for (const token & t : tokens) {
        if (t.slot < 0 || t.slot >= wanted_tables.n_slots) {
            throw vector_error("sequence " + std::to_string(t.slot) + " is none of this context");
        }
        if (t.edit) {
            if (t.edit->n_embd() != llama_model_n_embd(mdl) ||
                t.edit->layers().back() >= n_sites(llama_model_n_layer(mdl))) {
                throw vector_error("a mix does not fit the model");
            }
            wanted_layers.insert(t.edit->layers().begin(), t.edit->layers().end());
            wanted_tables.grow(*t.edit);
        }
    }
    if (reads) {
        const std::vector<int> & layers = reads->layers;
        const bool ascend = std::adjacent_find(layers.begin(), layers.end(), std::greater_equal<>()) == layers.end();
        const bool inside = !layers.empty() && layers.front() >= 0 && layers.back() < llama_model_n_layer(mdl);
        if (!ascend || !inside || reads->n < 1 || reads->n_embd != llama_model_n_embd(mdl)) {
            throw vector_error("read-outs need ascending blocks, and directions of the model's width");
        }
        wanted_layers.insert(reads->layers.begin(), reads->layers.end());
        wanted_tables.grow(*reads);
    }
    if (!wanted_layers.empty() &&
        (!bank || bank->layers().size() != wanted_layers.size() || bank->capacity() != wanted_tables)) {
        attach();
    }
    now = std::move(tokens);
    now_embedded = embedded;
    now_reads = reads;
    if (!hook) {
        return;
    }
    const size_t per_token = reads ? reads->layers.size() * size_t(reads->n) : 0;
    readings.assign(now.size() * per_token, std::numeric_limits<float>::quiet_NaN());
    edits.assign(now.size(), token_edit());
    for (size_t i = 0; i < now.size(); ++i) {
        edits[i].edit = now[i].edit.get();
        edits[i].j = now[i].j;
        edits[i].slot = now[i].slot;
        if (reads) {
            edits[i].reads = reads.get();
            edits[i].readings = readings.data() + i * per_token;
        }
    }
    llama_synchronize(ctx);
    bank->set_tokens(edits);
    hook->arm_order_check();
}

std::vector<float> attachment::finish() {
    if (!hook) {
        return {};
    }
    llama_synchronize(ctx);
    hook->check();
    std::vector<llama_token> ids;
    std::vector<llama_pos> positions;
    std::vector<int> output_of_token(now.size(), -1);
    for (const token & t : now) {
        if (!now_embedded) {
            ids.push_back(t.id);
        }
        positions.push_back(t.position);
    }
    if (!now.empty()) {
        output_of_token.back() = 0; // of blocks cut to the output rows, the last token's is known
    }
    if (!hook->order_was(ids, positions)) {
        throw model_error("llama.cpp computed a batch in another token order than given, so steering cannot be placed");
    }
    bank->read_back(edits, output_of_token);
    std::vector<float> out;
    out.swap(readings);
    bank->set_tokens({}); // nothing points to what is gone, whatever the owner decodes next
    return out;
}

} // namespace personasteer
