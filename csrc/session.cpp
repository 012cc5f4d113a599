#include "session.h"

#include "errors.h"
#include "log_capture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace personasteer {

namespace {

constexpr float nan32 = std::numeric_limits<float>::quiet_NaN();

// log p of one token: logit - log sum exp(logits). exp in float keeps the loop vectorizable, the sum is double.
double log_prob(const float * logits, int n, llama_token token) {
    const float top = *std::max_element(logits, logits + n);
    constexpr int block = 256;
    double sum = 0.0;
    for (int i = 0; i < n; i += block) {
        float partial = 0.0f;
        for (int j = i, end = std::min(n, i + block); j < end; ++j) {
            // 2^x by splitting off the integer part; degree-5 polynomial, relative error below 3e-7
            const float x = std::max((logits[j] - top) * 1.44269504f, -126.0f);
            const auto whole = int32_t(x - 0.5f);
            const float f = x - float(whole);
            const float p =
                1.0f +
                f * (0.69314718f +
                     f * (0.24022651f + f * (0.05550411f + f * (0.00961812f + f * (0.00133336f + f * 0.00015403f)))));
            const int32_t bits = (whole + 127) * (1 << 23);
            float scale;
            std::memcpy(&scale, &bits, sizeof scale);
            partial += p * scale;
        }
        sum += double(partial);
    }
    return double(logits[token]) - double(top) - std::log(sum);
}

llama_sampler_ptr make_sampler(const sampling_params & p, int n_vocab) {
    llama_sampler_chain_params cp = llama_sampler_chain_default_params();
    cp.no_perf = true;
    llama_sampler_ptr chain(llama_sampler_chain_init(cp));
    if (p.repeat_penalty != 1.0f) {
        llama_sampler_chain_add(chain.get(),
                                llama_sampler_init_penalties(n_vocab, p.repeat_last_n, p.repeat_penalty, 0.0f, 0.0f));
    }
    if (p.temperature <= 0.0f) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_greedy());
        return chain;
    }
    if (p.top_k > 0) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_top_k(p.top_k));
    }
    if (p.top_p < 1.0f) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_top_p(p.top_p, 1));
    }
    if (p.min_p > 0.0f) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_min_p(p.min_p, 1));
    }
    llama_sampler_chain_add(chain.get(), llama_sampler_init_temp(p.temperature));
    llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(p.seed));
    return chain;
}

bool in(const span & s, int index) { return index >= s.begin && (s.end < 0 || index < s.end); }

llama_context_params context_params(const session_params & p) {
    llama_context_params cp = llama_context_default_params();
    if (p.n_ctx < 1 || p.n_parallel < 1 || p.n_batch < p.n_parallel || p.n_threads < 1 || p.n_outputs < 1) {
        throw context_error("a session needs positive sizes, and n_batch of at least n_parallel");
    }
    if (int64_t(p.n_ctx) * p.n_parallel > std::numeric_limits<int32_t>::max()) {
        throw context_error(std::to_string(p.n_parallel) + " requests of " + std::to_string(p.n_ctx) +
                            " tokens are more than llama.cpp can count");
    }
    cp.n_ctx = uint32_t(p.n_ctx * p.n_parallel);
    cp.n_batch = cp.n_ubatch = std::min(uint32_t(p.n_batch), cp.n_ctx);
    cp.n_seq_max = uint32_t(p.n_parallel);
    cp.n_outputs_max = uint32_t(std::max(p.n_outputs, p.n_parallel));
    cp.n_outputs_max_per_seq = 1;
    cp.n_threads = cp.n_threads_batch = p.n_threads;
    cp.kv_unified = true; // sequences may share a prefix
    cp.swa_full = true;   // ... also on sliding-window models
    cp.no_perf = true;
    return cp;
}

llama_context_ptr make_context(const model & m, const llama_context_params & cp) {
    const log_capture log;
    llama_context_ptr ctx(llama_init_from_model(m.get(), cp));
    if (!ctx) {
        const std::string why = log.errors();
        throw model_error("llama.cpp cannot make a context of " + std::to_string(cp.n_ctx) + " tokens" +
                          (why.empty() ? "" : " (" + why + ")"));
    }
    return ctx;
}

} // namespace

session::session(std::shared_ptr<model> m, const session_params & params)
    : mdl(std::move(m)), cfg(params),
      one_sequence_per_decode(llama_model_is_recurrent(mdl->get()) || llama_model_is_hybrid(mdl->get())),
      slots(size_t(std::max(params.n_parallel, 1))) {
    const llama_context_params cp = context_params(cfg);
    cfg.n_batch = int(cp.n_batch);
    ctx = make_context(*mdl, cp);
    const log_capture log;
    // Polled by the leader of the compute threads, which is the thread that called step().
    llama_set_abort_callback(
        ctx.get(),
        [](void * self) {
            const auto * asked = static_cast<session *>(self)->stop_asked;
            return asked && (*asked)();
        },
        this);
}

session::~session() {
    const log_capture log;
    ctx.reset(); // reads the chain and the bank until it is gone
}

int64_t session::n_builds() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return hook ? hook->n_builds() : 0;
}

int64_t session::n_attachments() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return attachments;
}

size_t session::hook_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return (bank ? bank->bytes() : 0) + (tap ? tap->bytes() : 0);
}

bool session::any_request() const {
    return !queue.empty() || std::any_of(slots.begin(), slots.end(), [](const slot & s) { return s.id >= 0; });
}

bool session::busy() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return any_request();
}

void session::require_idle(const char * what) const {
    if (!cfg.hook) {
        throw model_error("this session runs without the hook");
    }
    if (any_request()) {
        throw model_error(std::string(what) + " while requests are running is not possible");
    }
}

std::vector<int> session::checked_layers(std::vector<int> layers) const {
    std::sort(layers.begin(), layers.end());
    layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
    if (!layers.empty() && (layers.front() < 0 || layers.back() >= mdl->n_layer())) {
        const int il = layers.front() < 0 ? layers.front() : layers.back();
        throw vector_error("block " + std::to_string(il) + " out of range 0.." + std::to_string(mdl->n_layer() - 1));
    }
    return layers;
}

void session::detach() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!hook) {
        return;
    }
    require_idle("detaching");
    const log_capture log;
    llama_synchronize(ctx.get());
    llama_set_sampler(ctx.get(), graph_edit::never_decoded, nullptr);
    hook.reset();
    bank.reset();
    tap.reset();
    row_of_key.clear();
    wanted_layers.clear();
    wanted_taps = {};
    readouts.clear();
}

// A new attachment for the layers and taps wanted now. llama.cpp rebuilds its graphs when the chain changes.
void session::attach() {
    const log_capture log;
    llama_synchronize(ctx.get());
    const std::vector<int> layers(wanted_layers.begin(), wanted_layers.end());
    const int n_rows = 1 + mixes_per_request * cfg.n_parallel; // the zero row, and room for all in one decode
    // llama.cpp sizes its graphs for a token count rounded up to a multiple of the sequences
    const int n_columns = (cfg.n_batch + cfg.n_parallel - 1) / cfg.n_parallel * cfg.n_parallel;
    std::unique_ptr<edit_bank> new_bank;
    std::unique_ptr<taps> new_tap;
    if (!layers.empty()) {
        new_bank = std::make_unique<edit_bank>(mdl->n_embd(), layers, n_rows, n_columns);
    }
    if (!wanted_taps.empty()) {
        new_tap = std::make_unique<taps>(mdl->n_embd(), wanted_taps, n_columns);
    }
    auto new_hook =
        std::make_unique<graph_edit>(mdl->n_layer(), mdl->n_embd(), n_columns, new_bank.get(), new_tap.get());
    if (!llama_set_sampler(ctx.get(), graph_edit::never_decoded, new_hook->chain())) {
        throw model_error("llama.cpp refuses the graph hook here (a model split by tensor?)");
    }
    hook = std::move(new_hook); // the old chain, bank and taps are no longer reachable from the context
    bank = std::move(new_bank);
    tap = std::move(new_tap);
    if (tap && !readouts.empty()) {
        tap->set_readouts(readouts);
    }
    row_of_key.clear();
    key_of_row.assign(size_t(n_rows), 0);
    row_used.assign(size_t(n_rows), -1);
    ++attachments;
}

void session::set_taps(tap_config config, std::vector<float> readout_directions) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (config.empty() && wanted_taps.empty()) {
        return;
    }
    require_idle("changing what is captured");
    config.pool_layers = checked_layers(std::move(config.pool_layers));
    config.raw_layers = checked_layers(std::move(config.raw_layers));
    const size_t n_given = config.reading_layers.size();
    if (!std::is_sorted(config.reading_layers.begin(), config.reading_layers.end())) {
        throw vector_error("the blocks to read out must ascend");
    }
    config.reading_layers = checked_layers(std::move(config.reading_layers));
    if (config.reading_layers.size() != n_given) {
        throw vector_error("a block is read out twice");
    }
    if (config.n_pools < 0 || (config.n_pools == 0) != config.pool_layers.empty()) {
        throw vector_error("blocks to pool and pools come together");
    }
    const size_t n = n_given * size_t(config.n_readouts) * size_t(mdl->n_embd());
    if (readout_directions.size() != n) {
        throw vector_error("read-outs need " + std::to_string(n) + " numbers");
    }
    const bool same = config == wanted_taps;
    std::swap(wanted_taps, config);
    std::swap(readouts, readout_directions);
    if (!same) {
        try {
            attach();
        } catch (...) {
            std::swap(wanted_taps, config);
            std::swap(readouts, readout_directions);
            throw;
        }
    } else if (tap && !readouts.empty()) {
        llama_synchronize(ctx.get());
        tap->set_readouts(readouts);
    }
}

void session::add_edit_layers(const std::vector<int> & layers) {
    const std::lock_guard<std::mutex> lock(mutex);
    require_idle("attaching");
    const size_t before = wanted_layers.size();
    const std::vector<int> checked = checked_layers(layers);
    wanted_layers.insert(checked.begin(), checked.end());
    if (wanted_layers.size() != before || !hook) {
        attach();
    }
}

int session::submit(request r) {
    const std::lock_guard<std::mutex> lock(mutex);
    const int n = int(r.tokens.size());
    if (n == 0) {
        throw context_error("the prompt is empty: it has no token");
    }
    if (r.max_tokens < 0) {
        throw context_error("max_tokens is negative");
    }
    if (n + (r.max_tokens > 0 ? 1 : 0) > cfg.n_ctx) {
        throw context_error("the prompt has " + std::to_string(n) + " tokens, but a request has room for " +
                            std::to_string(cfg.n_ctx) + "; shorten it or raise n_ctx");
    }
    for (llama_token t : r.tokens) {
        if (t < 0 || t >= mdl->n_vocab()) {
            throw model_error("token id " + std::to_string(t) + " out of range");
        }
    }
    if (!r.mix_of_token.empty() && int(r.mix_of_token.size()) != n) {
        throw vector_error("mix_of_token has another length than tokens");
    }
    const int n_mixes = int(r.mixes.size());
    for (int m : r.mix_of_token) {
        if (m < -1 || m >= n_mixes) {
            throw vector_error("mix_of_token names mix " + std::to_string(m));
        }
    }
    if (r.mix_of_generated < -1 || r.mix_of_generated >= n_mixes) {
        throw vector_error("mix_of_generated names mix " + std::to_string(r.mix_of_generated));
    }
    if (n_mixes > 256) {
        throw vector_error("a request has " + std::to_string(n_mixes) + " distinct mixes, 256 fit");
    }
    const int64_t n_all = int64_t(n) + r.max_tokens;
    const auto inside = [](const span & s, int64_t limit) {
        return 0 <= s.begin && s.begin <= s.end && s.end <= limit;
    };
    if (!inside(r.outputs, n)) {
        throw context_error("the span of outputs is outside the given tokens");
    }
    if (r.raws.size() > 1 || (r.raws.size() == 1 && !inside(r.raws[0], n_all))) {
        throw context_error("the span of raw rows is outside the request's tokens");
    }
    for (const span & p : r.pools) {
        if (!inside(p, n_all) && !(p.begin >= 0 && p.end < 0)) {
            throw context_error("a pool's span is not one");
        }
    }
    if (!cfg.hook && !(r.mixes.empty() && r.pools.empty() && r.raws.empty())) {
        throw model_error("this session runs without the hook");
    }
    if (r.pools.size() * slots.size() > size_t(wanted_taps.n_pools)) {
        throw context_error("a request has more pools than the taps keep");
    }
    for (const mix_ptr & m : r.mixes) {
        if (m->layers.empty() || m->key == 0) {
            throw vector_error("a mix needs blocks, and a key that is not 0");
        }
        for (int il : m->layers) {
            if (il < 0 || il >= mdl->n_layer()) {
                throw vector_error("block " + std::to_string(il) + " out of range 0.." +
                                   std::to_string(mdl->n_layer() - 1));
            }
        }
        if (m->data.size() != m->layers.size() * size_t(mdl->n_embd())) {
            throw vector_error("a mix has another width than the model");
        }
    }
    // what the next decode must find attached
    while (mixes_per_request < n_mixes) {
        mixes_per_request *= 2;
    }
    for (const mix_ptr & m : r.mixes) {
        wanted_layers.insert(m->layers.begin(), m->layers.end());
    }
    queue.emplace_back(next_id, std::move(r));
    return next_id++;
}

bool session::cancel(int id) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (slot & s : slots) {
        if (s.id == id) {
            finish(s, "cancelled");
            return true;
        }
    }
    const auto it = std::find_if(queue.begin(), queue.end(), [&](const auto & q) { return q.first == id; });
    if (it == queue.end()) {
        return false;
    }
    queue.erase(it);
    return true;
}

void session::reset() {
    const std::lock_guard<std::mutex> lock(mutex);
    fail_all();
}

void session::fail_all() {
    llama_synchronize(ctx.get());
    llama_memory_clear(llama_get_memory(ctx.get()), false);
    for (slot & s : slots) {
        s = slot();
    }
    queue.clear();
    results.clear();
}

std::vector<result> session::take_results() {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<result> out;
    out.swap(results);
    return out;
}

uint64_t session::key_at(const slot & s, size_t index) const {
    const int at = s.token_mix[index];
    return at < 0 ? 0 : s.req.mixes[size_t(at)]->key;
}

int session::row_for(const mix_ptr & m) {
    int row;
    if (const auto it = row_of_key.find(m->key); it != row_of_key.end()) {
        row = it->second;
    } else {
        row = int(std::min_element(row_used.begin() + 1, row_used.end()) - row_used.begin());
        if (row_used[size_t(row)] == step_count) {
            throw model_error("more mixes in one decode than rows");
        }
        if (row_used[size_t(row)] >= 0) {
            row_of_key.erase(key_of_row[size_t(row)]);
        }
        bank->set_row(row, *m);
        row_of_key[m->key] = row;
        key_of_row[size_t(row)] = m->key;
    }
    row_used[size_t(row)] = step_count;
    return row;
}

// Free slots take queued requests, in order. A request that reuses prefixes waits while another is still computing a
// longer shared prefix than any that is ready.
void session::admit() {
    const auto mem = llama_get_memory(ctx.get());
    for (auto it = queue.begin(); it != queue.end();) {
        const auto free_slot = std::find_if(slots.begin(), slots.end(), [](const slot & s) { return s.id < 0; });
        if (free_slot == slots.end()) {
            return;
        }
        const request & r = it->second;
        const auto key_of = [&](size_t i) -> uint64_t {
            if (r.mix_of_token.empty() || r.mix_of_token[i] < 0) {
                return 0;
            }
            return r.mixes[size_t(r.mix_of_token[i])]->key;
        };
        int target = int(free_slot - slots.begin());
        int source = -1, n_reuse = 0;
        if (r.reuse_prefix && !one_sequence_per_decode) {
            int limit = int(r.tokens.size()) - 1; // tokens from here on must be computed
            if (r.outputs.end > r.outputs.begin) {
                limit = std::min(limit, r.outputs.begin);
            }
            for (const span & p : r.pools) {
                limit = std::min(limit, p.begin);
            }
            for (const span & p : r.raws) {
                limit = std::min(limit, p.begin);
            }
            if (r.keep_readings) {
                limit = 0;
            }
            const auto shared = [&](const slot & s, bool promised) {
                const size_t n = promised ? size_t(s.n_given) : s.cached.size();
                int i = 0;
                for (; i < limit && size_t(i) < n; ++i) {
                    const auto at = size_t(i);
                    const llama_token token = promised ? s.tokens[at] : s.cached[at].first;
                    const uint64_t key = promised ? key_at(s, at) : s.cached[at].second;
                    if (token != r.tokens[at] || key != key_of(at)) {
                        break;
                    }
                }
                return i;
            };
            int promised = 0;
            for (size_t q = 0; q < slots.size(); ++q) {
                // a sliding-window cache may have dropped the start of a sequence to make room for another
                const bool whole = llama_memory_seq_pos_min(mem, llama_seq_id(q)) == 0;
                const int ready = whole ? shared(slots[q], false) : 0;
                // at equal length an idle slot's own text is continued in place
                const bool idle_instead =
                    ready == n_reuse && ready > 0 && slots[q].id < 0 && slots[size_t(source)].id >= 0;
                if (ready > n_reuse || idle_instead) {
                    n_reuse = ready;
                    source = int(q);
                }
                if (slots[q].id >= 0 && (whole || slots[q].n_done == 0)) {
                    promised = std::max(promised, shared(slots[q], true));
                }
            }
            if (promised >= n_reuse + 8) {
                ++it;
                continue;
            }
            if (source >= 0 && slots[size_t(source)].id < 0) {
                target = source;
            } else if (source >= 0) { // keep the idle slot with the least text
                for (size_t q = 0; q < slots.size(); ++q) {
                    if (slots[q].id < 0 && slots[q].cached.size() < slots[size_t(target)].cached.size()) {
                        target = int(q);
                    }
                }
            }
        }
        slot & s = slots[size_t(target)];
        if (target == source) {
            if (!llama_memory_seq_rm(mem, target, n_reuse, -1)) {
                n_reuse = 0;
            }
        }
        if (target != source || n_reuse == 0) {
            llama_memory_seq_rm(mem, target, -1, -1);
            if (n_reuse > 0) {
                llama_memory_seq_cp(mem, source, target, 0, n_reuse);
            }
        }
        auto kept = n_reuse > 0
                        ? std::vector<std::pair<llama_token, uint64_t>>(slots[size_t(source)].cached.begin(),
                                                                        slots[size_t(source)].cached.begin() + n_reuse)
                        : std::vector<std::pair<llama_token, uint64_t>>();
        s = slot();
        s.cached = std::move(kept);
        s.id = s.res.id = it->first;
        s.req = std::move(it->second);
        s.tokens = s.req.tokens;
        s.token_mix = s.req.mix_of_token;
        s.token_mix.resize(s.tokens.size(), -1);
        s.n_given = s.res.n_prompt = int(s.tokens.size());
        s.n_done = s.res.n_reused = n_reuse;
        s.res.taps = wanted_taps;
        s.res.pool_sums.assign(s.req.pools.size(),
                               std::vector<double>(wanted_taps.pool_layers.size() * size_t(mdl->n_embd())));
        s.res.pool_counts.assign(s.req.pools.size(), std::vector<int>(wanted_taps.pool_layers.size()));
        if (!s.req.raws.empty()) {
            const auto n = size_t(s.req.raws[0].end - s.req.raws[0].begin);
            s.res.raw.assign(wanted_taps.raw_layers.size() * n * size_t(mdl->n_embd()), nan32);
        }
        if (s.req.keep_logits) {
            s.res.logits.reserve(size_t(s.req.outputs.end - s.req.outputs.begin) * size_t(mdl->n_vocab()));
        }
        if (s.req.max_tokens > 0) {
            s.sampler = make_sampler(s.req.sampling, mdl->n_vocab());
            for (llama_token t : s.tokens) {
                llama_sampler_accept(s.sampler.get(), t);
            }
        }
        it = queue.erase(it);
    }
}

bool session::wants_output(const slot & s, int index) const {
    if (index >= s.n_given) {
        return true;
    } // to sample from, and for the last block's pools
    if (index == s.n_given - 1 && s.req.max_tokens > 0) {
        return true;
    }
    return in(s.req.outputs, index) && s.req.outputs.end > s.req.outputs.begin;
}

// Contiguous by sequence, ascending; generating sequences first get their token, prompts share what room is left.
void session::build_batch(std::vector<batch_item> & items) const {
    int tokens_left = cfg.n_batch, outputs_left = std::max(cfg.n_outputs, cfg.n_parallel);
    std::vector<int> share(slots.size(), 0);
    for (size_t q = 0; q < slots.size(); ++q) {
        const slot & s = slots[q];
        if (s.id < 0 || s.n_done < s.n_given) {
            continue;
        }
        share[q] = 1;
        --tokens_left;
        --outputs_left;
        if (one_sequence_per_decode) {
            break;
        }
    }
    const bool generating = tokens_left < cfg.n_batch;
    for (size_t q = 0; q < slots.size() && !(one_sequence_per_decode && generating); ++q) {
        const slot & s = slots[q];
        if (s.id < 0 || s.n_done >= s.n_given) {
            continue;
        }
        while (s.n_done + share[q] < s.n_given && tokens_left > 0) {
            const bool output = wants_output(s, s.n_done + share[q]);
            if (output && outputs_left == 0) {
                break;
            }
            outputs_left -= output;
            --tokens_left;
            ++share[q];
        }
        if (one_sequence_per_decode && share[q] > 0) {
            break;
        }
    }
    int rank = 0;
    for (size_t q = 0; q < slots.size(); ++q) {
        for (int i = 0; i < share[q]; ++i) {
            const int index = slots[q].n_done + i;
            items.push_back({int(q), index, wants_output(slots[q], index) ? rank++ : -1});
        }
    }
}

std::vector<token_event> session::step(const std::function<bool()> & interrupted) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<token_event> events;
    try {
        compute(interrupted, events);
    } catch (...) { // no request is left half done: all are dropped, and the session can be used again
        stop_asked = nullptr;
        fail_all();
        throw;
    }
    return events;
}

void session::compute(const std::function<bool()> & interrupted, std::vector<token_event> & events) {
    ++step_count;
    // a request that edits blocks outside the attached set, or needs more rows, has brought a new attachment
    if (!wanted_layers.empty() && (!bank || bank->layers().size() != wanted_layers.size() ||
                                   bank->n_rows() != 1 + mixes_per_request * cfg.n_parallel)) {
        attach();
    }

    admit();
    std::vector<batch_item> items;
    build_batch(items);
    if (items.empty()) {
        return;
    }

    const auto n = items.size();
    std::vector<llama_token> tokens(n);
    std::vector<llama_pos> positions(n);
    std::vector<int32_t> n_seq_id(n, 1), rows(n, 0);
    std::vector<llama_seq_id> seq(n);
    std::vector<llama_seq_id *> seq_ids(n);
    std::vector<int8_t> outputs(n);
    const auto n_pools = size_t(wanted_taps.n_pools);
    std::vector<float> pool_weights(tap ? n * n_pools : 0);
    const size_t pools_per_slot = n_pools / slots.size();
    bool pools_used = false;
    for (size_t i = 0; i < n; ++i) {
        const slot & s = slots[size_t(items[i].slot)];
        const auto index = size_t(items[i].index);
        tokens[i] = s.tokens[index];
        positions[i] = items[i].index;
        seq[i] = items[i].slot;
        seq_ids[i] = &seq[i];
        outputs[i] = items[i].output >= 0;
        const int m = s.token_mix[index];
        if (m >= 0) {
            rows[i] = row_for(s.req.mixes[size_t(m)]);
        }
        for (size_t p = 0; p < s.req.pools.size() && p < pools_per_slot; ++p) {
            if (!in(s.req.pools[p], items[i].index)) {
                continue;
            }
            pool_weights[i * n_pools + size_t(items[i].slot) * pools_per_slot + p] = 1.0f;
            pools_used = true;
        }
    }
    if (hook) {
        llama_synchronize(ctx.get());
        if (bank) {
            bank->set_index(rows);
        }
        if (tap && n_pools > 0) {
            tap->set_pool_weights(pool_weights);
        }
        hook->arm_order_check();
    }

    llama_batch batch{};
    batch.n_tokens = int32_t(n);
    batch.token = tokens.data();
    batch.pos = positions.data();
    batch.n_seq_id = n_seq_id.data();
    batch.seq_id = seq_ids.data();
    batch.logits = outputs.data();

    const log_capture log;
    stop_asked = &interrupted;
    const int rc = llama_decode(ctx.get(), batch);
    llama_synchronize(ctx.get());
    stop_asked = nullptr;
    std::string why;
    if (rc == 2) {
        why = "interrupted";
    } else if (rc == 1) {
        why = "the KV cache is full";
    } else if (rc != 0) {
        why = "llama.cpp cannot decode this batch (code " + std::to_string(rc) + ") " + log.errors();
    } else if (hook && !hook->problem().empty()) {
        why = hook->problem();
    } else if (hook && !hook->order_was(tokens, positions)) {
        why = "llama.cpp computed this batch in another token order than given, so steering cannot be placed";
    }
    if (!why.empty()) {
        throw model_error(why);
    }

    if (tap && pools_used) {
        tap->read_pooled();
    }
    for (const batch_item & item : items) {
        slot & s = slots[size_t(item.slot)];
        s.cached.emplace_back(s.tokens[size_t(item.index)], key_at(s, size_t(item.index)));
        s.n_done = item.index + 1;
    }
    collect(items, events);
}

void session::collect(const std::vector<batch_item> & items, std::vector<token_event> & events) {
    const auto n_embd = size_t(mdl->n_embd());
    const auto n_vocab = size_t(mdl->n_vocab());
    const size_t pools_per_slot = size_t(wanted_taps.n_pools) / slots.size();
    const bool rows_kept = tap && tap->keeps_rows(int64_t(items.size()));
    // where block il's row of an item stands in the buffers, or -1
    const auto column_of = [&](size_t i, int il) { return tap->is_cut(il) ? items[i].output : int(i); };
    // f(first item, column, count) for the rows of items [i, end), as runs of neighbours
    const auto for_each_run = [&](size_t i, size_t end, int il, const auto & f) {
        while (i < end) {
            const int column = column_of(i, il);
            size_t n = 1;
            while (column >= 0 && i + n < end && column_of(i + n, il) == column + int(n)) {
                ++n;
            }
            if (column >= 0) {
                f(i, column, int(n));
            }
            i += n;
        }
    };
    for (size_t begin = 0; begin < items.size();) {
        size_t end = begin;
        while (end < items.size() && items[end].slot == items[begin].slot) {
            ++end;
        }
        const int q = items[begin].slot;
        slot & s = slots[size_t(q)];

        for (size_t p = 0; p < s.req.pools.size() && p < pools_per_slot; ++p) {
            int n_all = 0, n_out = 0;
            for (size_t i = begin; i < end; ++i) {
                if (in(s.req.pools[p], items[i].index)) {
                    ++n_all, n_out += items[i].output >= 0;
                }
            }
            for (size_t l = 0; l < wanted_taps.pool_layers.size(); ++l) {
                const int il = wanted_taps.pool_layers[l];
                const int counted = tap->is_cut(il) ? n_out : n_all;
                if (counted == 0) {
                    continue;
                }
                double * into = s.res.pool_sums[p].data() + l * n_embd;
                const auto add = [&](int column) {
                    const float * from = tap->pooled(il, column);
                    for (size_t k = 0; k < n_embd; ++k) {
                        into[k] += double(from[k]);
                    }
                };
                if (!rows_kept) {
                    add(int(size_t(q) * pools_per_slot + p));
                }
                for (size_t i = begin; i < end && rows_kept; ++i) {
                    const int column = column_of(i, il);
                    if (column >= 0 && in(s.req.pools[p], items[i].index)) {
                        add(column);
                    }
                }
                s.res.pool_counts[p][l] += counted;
            }
        }
        if (!s.req.raws.empty()) {
            const span & want = s.req.raws[0];
            const auto n_rows = size_t(want.end - want.begin);
            size_t first = begin, last = end; // the items inside the span
            while (first < last && items[first].index < want.begin) {
                ++first;
            }
            while (last > first && items[last - 1].index >= want.end) {
                --last;
            }
            for (size_t l = 0; l < wanted_taps.raw_layers.size(); ++l) {
                const int il = wanted_taps.raw_layers[l];
                for_each_run(first, last, il, [&](size_t i, int column, int n) {
                    const auto row = size_t(items[i].index - want.begin);
                    tap->read_raw(il, column, n, s.res.raw.data() + (l * n_rows + row) * n_embd);
                });
            }
        }
        if (s.req.keep_readings && wanted_taps.n_readouts > 0) {
            const auto n_read = size_t(wanted_taps.n_readouts);
            const size_t n_layers = wanted_taps.reading_layers.size();
            const size_t at = s.res.readings.size();
            s.res.readings.resize(at + (end - begin) * n_layers * n_read, nan32); // [token][block][read-out]
            std::vector<float> run((end - begin) * n_read);
            for (size_t l = 0; l < n_layers; ++l) {
                const int il = wanted_taps.reading_layers[l];
                for_each_run(begin, end, il, [&](size_t i, int column, int n) {
                    tap->read_readings(il, column, n, run.data());
                    for (size_t t = 0; t < size_t(n); ++t) {
                        std::copy_n(run.data() + t * n_read, n_read,
                                    s.res.readings.data() + at + ((i - begin + t) * n_layers + l) * n_read);
                    }
                });
            }
        }
        int sampled_from = -1;
        for (size_t i = begin; i < end; ++i) {
            if (items[i].output < 0) {
                continue;
            }
            const int index = items[i].index;
            if (index < s.n_given && in(s.req.outputs, index)) {
                const float * row = llama_get_logits_ith(ctx.get(), int32_t(i));
                if (s.req.keep_logits) {
                    s.res.logits.insert(s.res.logits.end(), row, row + n_vocab);
                }
                if (s.req.keep_scores) {
                    s.res.scores.push_back(index + 1 < s.n_given
                                               ? log_prob(row, int(n_vocab), s.tokens[size_t(index) + 1])
                                               : std::numeric_limits<double>::quiet_NaN());
                }
            }
            if (index >= s.n_given - 1) {
                sampled_from = int(i);
            }
        }
        if (s.closing) {
            finish(s, "length");
        } else if (s.n_done >= s.n_given && s.req.max_tokens == 0) {
            finish(s, "given");
        } else if (sampled_from >= 0 && s.req.max_tokens > 0) {
            take_token(s, sampled_from, events);
        }
        begin = end;
    }
}

void session::take_token(slot & s, int output, std::vector<token_event> & events) {
    const llama_token token = llama_sampler_sample(s.sampler.get(), ctx.get(), output);
    if (mdl->is_end(token) && !s.req.ignore_end) {
        finish(s, "stop");
        return;
    }
    s.res.tokens.push_back(token);
    const std::string piece = mdl->piece(token, false);
    s.res.text += piece;
    events.push_back({s.id, token, piece});
    size_t cut = std::string::npos; // where the first stop string begins
    for (const std::string & stop : s.req.stop) {
        cut = std::min(cut, s.res.text.find(stop));
    }
    if (cut != std::string::npos) {
        s.res.text.resize(cut);
        finish(s, "stop");
        return;
    }
    s.tokens.push_back(token);
    s.token_mix.push_back(s.req.mix_of_generated);
    const bool full = int(s.res.tokens.size()) >= s.req.max_tokens || int(s.tokens.size()) >= cfg.n_ctx;
    if (full && (!s.req.pools.empty() || s.req.keep_readings) && int(s.tokens.size()) <= cfg.n_ctx) {
        s.closing = true; // the last token's own activations still count
    } else if (full) {
        finish(s, "length");
    }
}

// The slot is free again; its cached text stays for later requests with the same prefix.
void session::finish(slot & s, const char * why) {
    s.res.finish = why;
    results.push_back(std::move(s.res));
    auto cached = std::move(s.cached);
    s = slot();
    s.cached = std::move(cached);
}

std::vector<float> session::self_test(const std::shared_ptr<model> & m, int n_threads) {
    constexpr int plain = -1, plain_again = -2; // rows of one decode may differ by rounding: how much, the second says
    const int n_layer = m->n_layer();
    session_params p;
    p.n_parallel = std::min(n_layer + 2, 64); // llama.cpp takes 256; more blocks than that go in several decodes
    p.n_ctx = 64;
    p.n_batch = p.n_parallel;
    p.n_outputs = p.n_parallel;
    p.n_threads = n_threads;
    session s(m, p);
    std::vector<float> change(size_t(n_layer), 0.0f);
    const llama_token token = llama_vocab_bos(m->vocab()) >= 0 ? llama_vocab_bos(m->vocab()) : 0;
    for (int first = 0; first < n_layer; first += p.n_parallel - 2) {
        const int last = std::min(n_layer, first + p.n_parallel - 2);
        std::vector<int> rows(1, plain);
        for (int il = first; il < last; ++il) {
            rows.push_back(il);
        }
        rows.push_back(plain_again);
        s.reset();
        std::map<int, int> row_of_id;
        for (int il : rows) {
            request r;
            r.tokens = {token};
            r.outputs = {0, 1};
            r.keep_logits = true;
            if (il >= 0) {
                auto unit = std::make_shared<mix>();
                unit->key = uint64_t(il) + 1;
                unit->layers = {il};
                for (int k = 0; k < m->n_embd(); ++k) {
                    unit->data.push_back(k % 3 == 0 ? 1.0f : -1.0f);
                }
                r.mixes = {unit};
                r.mix_of_token = {0};
            }
            row_of_id[s.submit(std::move(r))] = il;
        }
        while (s.busy()) {
            s.step([] { return false; });
        }
        std::map<int, std::vector<float>> logits;
        for (result & r : s.take_results()) {
            logits[row_of_id[r.id]] = std::move(r.logits);
        }
        const auto difference = [&](int row) { // 0 where it is not finite
            float d = 0.0f;
            for (size_t k = 0; k < logits[plain].size(); ++k) {
                const float x = std::fabs(logits[row][k] - logits[plain][k]);
                if (!std::isfinite(x)) {
                    return 0.0f;
                }
                d = std::max(d, x);
            }
            return d;
        };
        const float rounding = difference(plain_again);
        for (int il = first; il < last; ++il) {
            change[size_t(il)] = std::max(0.0f, difference(il) - rounding);
        }
    }
    return change;
}

} // namespace personasteer
