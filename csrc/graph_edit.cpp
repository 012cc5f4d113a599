#include "graph_edit.h"

#include "errors.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <unordered_map>
#include <unordered_set>

namespace personasteer {

// the order check, and the nodes that a device's blocks share
static constexpr int nodes_shared = 64;

// ("l_out-12", "l_out-") -> 12; anything else, "l_out-12 (view)" included -> -1
static int block_of(const char * name, const char * prefix) {
    const size_t length = std::strlen(prefix);
    if (std::strncmp(name, prefix, length) != 0) {
        return -1;
    }
    char * end = nullptr;
    const char * digits = name + length;
    const long il = std::strtol(digits, &end, 10);
    return end != digits && *end == '\0' && il >= 0 && il < 1 << 16 ? int(il) : -1;
}

int graph_edit::site_of(const char * name) const {
    if (const int il = block_of(name, "l_out-"); il >= 0 && il < n_layer) {
        return il;
    }
    if (const int il = block_of(name, "ffn_inp-"); il >= 0 && il < n_layer) {
        return n_layer + il;
    }
    // some architectures scale what the token table gives
    return std::strcmp(name, "embd") == 0 || std::strcmp(name, "inp_scaled") == 0 ? 2 * n_layer : -1;
}

std::string graph_edit::describe(int site) const {
    if (site < n_layer) {
        return "the output of block " + std::to_string(site) + " (l_out-" + std::to_string(site) + ")";
    }
    const std::string il = std::to_string(site - n_layer);
    return site < 2 * n_layer ? "the stream after the attention of block " + il + " (ffn_inp-" + il + ")"
                              : "the token embeddings (embd)";
}

graph_edit::graph_edit(int n_layer_, int n_embd_, int n_columns_, int n_blocks_, edit_bank * bank_, taps * tap_)
    : n_layer(n_layer_), n_embd(n_embd_), n_columns(n_columns_), n_blocks(n_blocks_ > 0 ? n_blocks_ : n_layer_),
      bank(bank_), tap(tap_), seen_tokens(size_t(n_columns)), seen_positions(size_t(n_columns)) {
    interface.name = [](const llama_sampler *) { return "personasteer"; };
    interface.apply = [](llama_sampler *, llama_token_data_array *) {};
    interface.backend_init = [](llama_sampler *, ggml_backend_buffer_type_t, uint32_t) { return true; };
    interface.backend_apply = backend_apply;
    sampler_chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(sampler_chain, llama_sampler_init(&interface, this));
}

graph_edit::~graph_edit() { llama_sampler_free(sampler_chain); }

void graph_edit::check() const {
    if (failure) {
        std::rethrow_exception(failure);
    }
}

int graph_edit::nodes_needed() const {
    size_t n = nodes_shared;
    if (bank) {
        n += bank->layers().size() * size_t(bank->nodes_per_layer());
    }
    if (tap) {
        n += (tap->config().pool_layers.size() + tap->config().raw_layers.size()) * size_t(tap->nodes_per_layer());
    }
    return int(std::min(n, size_t(2000)));
}

// ggml ends the process where a graph has no room for a node. llama.cpp leaves plenty, but not for everything.
void graph_edit::check_room(const ggml_context * ctx, ggml_cgraph * gf, int n_nodes) const {
    const size_t bytes = ggml_get_mem_size(ctx) - ggml_used_mem(ctx);
    if (ggml_graph_size(gf) - ggml_graph_n_nodes(gf) < n_nodes || bytes / ggml_tensor_overhead() < size_t(n_nodes)) {
        throw model_error("llama.cpp's graph has no room for so many edits and readings at once: take fewer blocks");
    }
}

// llama.cpp counts our nodes on an empty graph of 2048 before it sizes the real one.
void graph_edit::fill_probe(ggml_context * ctx, ggml_cgraph * gf) const {
    ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
    for (int i = 0, n = nodes_needed(); i < n; ++i) {
        t = ggml_scale(ctx, t, 1.0f);
    }
    ggml_build_forward_expand(gf, t);
}

// A block runs where its norm weights live (big matrices may sit in a repacked CPU buffer of another type).
placement graph_edit::find_placement(ggml_cgraph * gf, const std::vector<int> & output_at) const {
    placement where(output_at.size(), nullptr);
    ggml_tensor ** nodes = ggml_graph_nodes(gf);
    int begin = 0;
    for (int il = 0; il < n_layer; ++il) {
        const int end = output_at[size_t(il)];
        for (int i = begin; i < end; ++i) {
            for (const ggml_tensor * src : nodes[i]->src) {
                if (!src || src->op != GGML_OP_NONE || !src->buffer || src->ne[1] != 1) {
                    continue;
                }
                if (std::strncmp(src->name, "blk.", 4) != 0 || std::strtol(src->name + 4, nullptr, 10) != il) {
                    continue;
                }
                // pinned host memory belongs to a GPU by name, but the block runs on the CPU
                ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(src->buffer);
                ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
                if (dev && !ggml_backend_buft_is_host(buft)) {
                    where[size_t(il)] = ggml_backend_dev_buffer_type(dev);
                }
            }
        }
        if (!where[size_t(il)]) {
            where[size_t(il)] = ggml_backend_cpu_buffer_type();
        }
        where[size_t(n_layer) + size_t(il)] = where[size_t(il)];
        begin = std::max(begin, end);
    }
    where.back() = ggml_backend_cpu_buffer_type(); // llama.cpp looks tokens up on the CPU
    return where;
}

void graph_edit::apply(ggml_context * ctx, ggml_cgraph * gf) {
    const int n_before = ggml_graph_n_nodes(gf);
    if (n_before == 0) {
        fill_probe(ctx, gf);
        return;
    }
    ++builds;
    failure = nullptr;

    ggml_tensor ** nodes = ggml_graph_nodes(gf);
    std::vector<int> output_at(size_t(n_sites(n_layer)), -1); // node index of each site
    for (int i = 0; i < n_before; ++i) {
        if (const int site = site_of(nodes[i]->name); site >= 0) {
            output_at[size_t(site)] = i;
        }
    }
    graph_inputs in;
    ggml_tensor * tokens = ggml_graph_get_tensor(gf, "inp_tokens");
    in.out_ids = ggml_graph_get_tensor(gf, "out_ids");
    if (!tokens) {
        throw model_error("the graph has no leaf inp_tokens");
    }
    in.n_tokens = tokens->ne[0];
    if (in.n_tokens > n_columns) {
        throw model_error("more tokens in a graph than n_ubatch");
    }

    if ((bank && !bank->allocated()) || (tap && !tap->allocated())) {
        const placement where = find_placement(gf, output_at);
        if (bank && !bank->allocated()) {
            bank->allocate(where);
        }
        if (tap && !tap->allocated()) {
            tap->allocate(where);
        }
    }
    if (tap) {
        tap->new_graph();
    }

    // The inputs that no node reads must stay leaves of the graph: llama.cpp writes to them.
    std::vector<ggml_tensor *> leaves;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->op == GGML_OP_NONE && (t->flags & GGML_TENSOR_FLAG_INPUT) && ggml_graph_get_tensor(gf, t->name) == t) {
            leaves.push_back(t);
        }
    }

    std::vector<ggml_tensor *> before(nodes, nodes + n_before);
    std::unordered_set<const ggml_tensor *> viewed; // other tensors share their memory
    for (const ggml_tensor * node : before) {
        viewed.insert(node->view_src);
    }
    std::unordered_map<const ggml_tensor *, ggml_tensor *> edited;       // a site -> what replaces it
    std::unordered_map<const ggml_tensor *, std::pair<int, int>> behind; // -> its new nodes [begin, end)
    for (int il = 0; il < n_sites(n_layer); ++il) {
        const bool wants_edit = bank && position_in(bank->layers(), il) >= 0;
        const bool wants_tap =
            tap && (position_in(tap->config().pool_layers, il) >= 0 || position_in(tap->config().raw_layers, il) >= 0);
        if (!wants_edit && !wants_tap) {
            continue;
        }
        if (output_at[size_t(il)] < 0) {
            throw model_error("this architecture does not name " + describe(il) +
                              ", so it cannot be steered or captured");
        }
        ggml_tensor * h = before[size_t(output_at[size_t(il)])];
        if (h->type != GGML_TYPE_F32 || h->ne[0] != n_embd || h->ne[2] != 1 || h->ne[3] != 1) {
            throw model_error(describe(il) + " is no plain residual stream");
        }
        if (h->ne[1] == 0) { // a decode without outputs leaves the last block no rows
            if (wants_edit) {
                bank->no_rows(il);
            }
            if (tap) {
                tap->set_cut(il, true);
            }
            continue;
        }
        if (h->ne[1] != in.n_tokens && (!in.out_ids || in.out_ids->ne[0] != h->ne[1])) {
            throw model_error(describe(il) + " has an unknown set of rows");
        }
        check_room(ctx, gf,
                   nodes_shared + (wants_edit ? bank->nodes_per_layer() : 0) +
                       (wants_tap ? tap->nodes_per_layer() : 0));
        const int begin = ggml_graph_n_nodes(gf);
        ggml_tensor * x = h;
        if (wants_edit) {
            std::vector<ggml_tensor *> ends;
            x = bank->edit(ctx, il, h, !h->view_src && viewed.count(h) == 0, in, ends);
            for (ggml_tensor * end : ends) {
                ggml_build_forward_expand(gf, end);
            }
            ggml_format_name(x, "steered-%d", il);
            ggml_build_forward_expand(gf, x);
            edited[h] = x;
        }
        if (wants_tap) {
            for (ggml_tensor * end : tap->tap(ctx, il, x, in)) {
                ggml_build_forward_expand(gf, end);
            }
        }
        behind[h] = {begin, ggml_graph_n_nodes(gf)};
    }

    check_room(ctx, gf, nodes_shared);
    ggml_tensor * order[2] = {tokens, ggml_graph_get_tensor(gf, "inp_pos")};
    notes_positions = order[1] && order[1]->ne[0] == in.n_tokens && order[1]->type == GGML_TYPE_I32;
    // one task: copies by ggml wake all threads, which costs milliseconds where devices or other processes compute
    ggml_tensor * check =
        ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1, order, notes_positions ? 2 : 1, note_order, 1, this);
    ggml_build_forward_expand(gf, check);

    // Later readers of a block's output read the edit instead; so does an edit that stands for a sum with it.
    const std::vector<ggml_tensor *> all(ggml_graph_nodes(gf), ggml_graph_nodes(gf) + ggml_graph_n_nodes(gf));
    for (const ggml_tensor * h : before) {
        const auto at = behind.find(h);
        const auto [begin, end] = at == behind.end() ? std::pair(0, 0) : at->second;
        for (int i = begin; i < end; ++i) {
            for (ggml_tensor *& src : all[size_t(i)]->src) {
                if (const auto it = edited.find(src); src && src != h && it != edited.end()) {
                    src = it->second;
                }
            }
        }
    }
    for (ggml_tensor * node : before) {
        for (ggml_tensor *& src : node->src) {
            if (const auto it = edited.find(src); src && it != edited.end()) {
                src = it->second;
            }
        }
        if (const auto it = edited.find(node->view_src); node->view_src && it != edited.end()) {
            node->view_src = it->second->view_src ? it->second->view_src : it->second; // a view has no views
        }
    }

    std::unordered_set<const ggml_tensor *> read; // a block's output that only its edit stands for is not computed
    for (const ggml_tensor * node : all) {
        read.insert(std::begin(node->src), std::end(node->src));
    }

    // Every new node right behind its block: the buffer of a block's output is free again soon after. Expanding anew
    // gives right use counts, on which the devices' fusion relies; the order variant leaves the compute flags alone.
    ggml_graph_clear(gf);
    for (ggml_tensor * leaf : leaves) {
        ggml_build_forward_order(gf, leaf);
    }
    // the order check comes first, with the lookup of the tokens: at the end it would be one more split for the CPU
    ggml_build_forward_order(gf, check);
    const int last = n_blocks < n_layer ? output_at[size_t(n_blocks) - 1] : -1; // nothing is read behind it
    for (ggml_tensor * node : before) {
        if (read.count(node) > 0 || edited.count(node) == 0) {
            ggml_build_forward_order(gf, node);
        }
        if (const auto it = behind.find(node); it != behind.end()) {
            for (int i = it->second.first; i < it->second.second; ++i) {
                ggml_build_forward_order(gf, all[size_t(i)]);
            }
        }
        if (last >= 0 && node == before[size_t(last)]) {
            break;
        }
    }
}

void graph_edit::backend_apply(llama_sampler * smpl, ggml_context * ctx, ggml_cgraph * gf, llama_sampler_data * data) {
    auto * self = static_cast<graph_edit *>(smpl->ctx);
    *data = {}; // nothing is offered: this is no sampler
    try {       // no exception may cross llama.cpp's frames that expect none; the session asks after the decode
        self->apply(ctx, gf);
    } catch (...) {
        self->failure = std::current_exception();
    }
}

// src[0]: the tokens as the graph has them; src[1]: their positions
void graph_edit::note_order(ggml_tensor * dst, int ith, int, void * userdata) {
    if (ith != 0) {
        return;
    }
    auto * self = static_cast<graph_edit *>(userdata);
    const auto note = [](const ggml_tensor * src, std::vector<int32_t> & into) {
        if (src) {
            std::memcpy(into.data(), src->data, size_t(src->ne[0]) * sizeof(int32_t));
        }
    };
    note(dst->src[0], self->seen_tokens);
    note(dst->src[1], self->seen_positions);
}

void graph_edit::arm_order_check() {
    std::fill(seen_tokens.begin(), seen_tokens.end(), -1);
    std::fill(seen_positions.begin(), seen_positions.end(), -1);
}

bool graph_edit::order_was(const std::vector<llama_token> & tokens, const std::vector<llama_pos> & positions) const {
    return std::equal(tokens.begin(), tokens.end(), seen_tokens.begin()) &&
           (!notes_positions || std::equal(positions.begin(), positions.end(), seen_positions.begin()));
}

} // namespace personasteer
