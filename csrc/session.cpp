#include "session.h"

#include "errors.h"
#include "log_capture.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace personasteer {

namespace {

constexpr float nan32 = std::numeric_limits<float>::quiet_NaN();

bool in(const span & s, int index) { return index >= s.begin && (s.end < 0 || index < s.end); }

llama_context_params context_params(const session_params & p) {
    llama_context_params cp = llama_context_default_params();
    if (p.n_ctx < 1 || p.n_parallel < 1 || p.n_batch < p.n_parallel || p.n_threads < 1 || p.n_outputs < 1) {
        throw context_error("a session needs positive sizes, and n_batch of at least n_parallel");
    }
    const int64_t n_cells = p.n_cells > 0 ? p.n_cells : int64_t(p.n_ctx) * p.n_parallel;
    if (n_cells > std::numeric_limits<int32_t>::max()) {
        throw context_error(std::to_string(p.n_parallel) + " requests of " + std::to_string(p.n_ctx) +
                            " tokens are more than llama.cpp can count");
    }
    if (n_cells < p.n_ctx) {
        throw context_error("a cache of " + std::to_string(n_cells) + " tokens has no room for a request of " +
                            std::to_string(p.n_ctx));
    }
    cp.n_ctx = uint32_t(n_cells);
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
      regroups(llama_model_is_recurrent(mdl->get()) || llama_model_is_hybrid(mdl->get())) {
    const llama_context_params cp = context_params(cfg);
    cfg.n_batch = int(cp.n_batch);
    wanted_tables.n_slots = cfg.n_parallel;
    ctx = make_context(*mdl, cp);
    slots.resize(size_t(cfg.n_parallel)); // as many as llama.cpp takes
    const log_capture log;
    std::vector<llama_adapter_lora *> adapters;
    std::vector<float> scales;
    for (const auto & [adapter, scale] : mdl->adapters()) {
        adapters.push_back(adapter);
        scales.push_back(scale);
    }
    if (!adapters.empty() && llama_set_adapters_lora(ctx.get(), adapters.data(), adapters.size(), scales.data()) != 0) {
        throw model_error("llama.cpp does not take the LoRA adapters");
    }
    // Polled by the leader of the compute threads, which is the thread that called step().
    llama_set_abort_callback(
        ctx.get(),
        [](void * self) {
            const auto * asked = static_cast<session *>(self)->stop_asked;
            try {
                return asked && (*asked)();
            } catch (...) { // no exception may cross llama.cpp's frames: the decode ends as an interrupted one
                return true;
            }
        },
        this);
}

session::~session() {
    const log_capture log;
    ctx.reset(); // reads the chain and the bank until it is gone
}

std::unique_lock<std::mutex> session::locked() const {
    if (stepping == std::this_thread::get_id()) {
        throw model_error("a session cannot be used from within its own step");
    }
    return std::unique_lock<std::mutex>(mutex);
}

int64_t session::n_builds() const {
    const auto lock = locked();
    return hook ? hook->n_builds() : 0;
}

int64_t session::n_attachments() const {
    const auto lock = locked();
    return attachments;
}

size_t session::hook_bytes() const {
    const auto lock = locked();
    return (bank ? bank->bytes() : 0) + (tap ? tap->bytes() : 0);
}

bool session::any_request() const {
    return !queue.empty() || std::any_of(slots.begin(), slots.end(), [](const slot & s) { return s.id >= 0; });
}

bool session::busy() const {
    const auto lock = locked();
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

void session::check_computed(const std::vector<int> & layers) const {
    if (cfg.n_blocks > 0 && !layers.empty() && layers.back() >= cfg.n_blocks) {
        throw vector_error("block " + std::to_string(layers.back()) + " is not computed here, only " +
                           std::to_string(cfg.n_blocks) + " blocks are");
    }
}

void session::detach() {
    const auto lock = locked();
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
    wanted_layers.clear();
    wanted_taps = {};
}

// A new attachment for the layers and taps wanted now. llama.cpp rebuilds its graphs when the chain changes.
void session::attach() {
    const log_capture log;
    llama_synchronize(ctx.get());
    const std::vector<int> layers(wanted_layers.begin(), wanted_layers.end());
    // llama.cpp sizes its graphs for a token count rounded up to a multiple of the sequences
    const int n_columns = (cfg.n_batch + cfg.n_parallel - 1) / cfg.n_parallel * cfg.n_parallel;
    std::unique_ptr<edit_bank> new_bank;
    std::unique_ptr<taps> new_tap;
    if (!layers.empty()) {
        new_bank = std::make_unique<edit_bank>(mdl->n_embd(), layers, n_columns, wanted_tables, cfg.native_on_cpu);
    }
    if (!wanted_taps.empty()) {
        new_tap = std::make_unique<taps>(mdl->n_embd(), wanted_taps, n_columns);
    }
    auto new_hook = std::make_unique<graph_edit>(mdl->n_layer(), mdl->n_embd(), n_columns, cfg.n_blocks, new_bank.get(),
                                                 new_tap.get());
    if (!llama_set_sampler(ctx.get(), graph_edit::never_decoded, new_hook->chain())) {
        throw model_error("llama.cpp refuses the graph hook here (a model split by tensor?)");
    }
    hook = std::move(new_hook); // the old chain, bank and taps are no longer reachable from the context
    bank = std::move(new_bank);
    tap = std::move(new_tap);
    ++attachments;
}

void session::set_taps(tap_config config) {
    const auto lock = locked();
    if (config.empty() && wanted_taps.empty()) {
        return;
    }
    require_idle("changing what is captured");
    config.pool_layers = checked_layers(std::move(config.pool_layers));
    config.raw_layers = checked_layers(std::move(config.raw_layers));
    check_computed(config.pool_layers);
    check_computed(config.raw_layers);
    if (config.n_pools < 0 || (config.n_pools == 0) != config.pool_layers.empty()) {
        throw vector_error("blocks to pool and pools come together");
    }
    if (config == wanted_taps) {
        return;
    }
    std::swap(wanted_taps, config);
    try {
        attach();
    } catch (...) {
        std::swap(wanted_taps, config);
        throw;
    }
}

void session::set_control_vector(const std::vector<float> & directions) {
    const auto lock = locked();
    if (cfg.hook) {
        throw model_error("a control vector is for sessions without the hook");
    }
    if (any_request()) {
        throw model_error("changing the control vector while requests are running is not possible");
    }
    const int n_embd = mdl->n_embd(), n_layer = mdl->n_layer();
    const bool none = directions.empty();
    if (!none && directions.size() != size_t(n_embd) * size_t(n_layer - 1)) {
        throw vector_error("a control vector needs a row for every block but the first");
    }
    const log_capture log;
    if (llama_set_adapter_cvec(ctx.get(), none ? nullptr : directions.data(), directions.size(), n_embd, 1,
                               n_layer - 1) != 0) {
        throw model_error("llama.cpp does not take the control vector");
    }
    fail_all(); // nothing computed under another one may be reused
}

void session::add_edit_layers(const std::vector<int> & layers) {
    const auto lock = locked();
    require_idle("attaching");
    const size_t before = wanted_layers.size();
    const std::vector<int> checked = checked_layers(layers);
    wanted_layers.insert(checked.begin(), checked.end());
    if (wanted_layers.size() != before || !hook) {
        attach();
    }
}

int session::submit(request r) {
    const auto lock = locked();
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
    check_steering(r.steer, n);
    if (r.response_begin >= n) {
        throw context_error("the response begins after the given tokens");
    }
    const int64_t n_all = int64_t(n) + r.max_tokens;
    const auto inside = [](const span & s, int64_t limit) {
        return 0 <= s.begin && s.begin <= s.end && s.end <= limit;
    };
    if (!inside(r.outputs, n)) {
        throw context_error("the span of outputs is outside the given tokens");
    }
    if (cfg.n_blocks > 0 && (r.max_tokens > 0 || r.outputs.end > r.outputs.begin || !r.steer.mixes.empty())) {
        throw context_error("this session computes " + std::to_string(cfg.n_blocks) +
                            " blocks, no outputs and no edits");
    }
    if (r.raws.size() > 1 || (r.raws.size() == 1 && !inside(r.raws[0], n_all))) {
        throw context_error("the span of raw rows is outside the request's tokens");
    }
    for (const span & p : r.pools) {
        if (!inside(p, n_all) && !(p.begin >= 0 && p.end < 0)) {
            throw context_error("a pool's span is not one");
        }
    }
    if (!cfg.hook && !(r.steer.mixes.empty() && r.pools.empty() && r.raws.empty() && !r.reads && !r.decides)) {
        throw model_error("this session runs without the hook");
    }
    if (r.pools.size() * slots.size() > size_t(wanted_taps.n_pools)) {
        throw context_error("a request has more pools than the taps keep");
    }
    if (r.reads_from < 0) {
        throw context_error("the first token to read is negative");
    }
    if (r.reads) {
        const readout & o = *r.reads;
        if (o.n < 1 || o.layers != checked_layers(o.layers) || o.n_embd != mdl->n_embd() ||
            o.directions.size() != o.layers.size() * size_t(o.n) * size_t(o.n_embd)) {
            throw vector_error("read-outs need ascending blocks, and directions of the model's width");
        }
        check_computed(o.layers);
    }
    if (r.max_tokens > 0) { // a grammar that does not parse is this request's own error
        const token_sampler parsed(mdl->vocab(), r.sampling);
    }
    make_room(r.steer, r.reads.get());
    queue.emplace_back(next_id, std::move(r));
    return next_id++;
}

void session::check_steering(const steering & s, int n_given) const {
    if (!s.mix_of_token.empty() && int(s.mix_of_token.size()) != n_given) {
        throw vector_error("mix_of_token has another length than tokens");
    }
    const int n_mixes = int(s.mixes.size());
    const auto check = [n_mixes](int m) {
        if (m < -1 || m >= n_mixes) {
            throw vector_error("mix " + std::to_string(m) + " is named, of " + std::to_string(n_mixes));
        }
    };
    std::for_each(s.mix_of_token.begin(), s.mix_of_token.end(), check);
    for (size_t i = 0; i < s.generated.size(); ++i) {
        check(s.generated[i].mix);
        check(s.generated[i].thinking);
        if (i > 0 && s.generated[i].begin <= s.generated[i - 1].begin) {
            throw vector_error("the phases of a steering must ascend");
        }
    }
    for (const mix_ptr & m : s.mixes) {
        if (!m) {
            throw vector_error("a mix of a steering is missing");
        }
        if (m->layers().back() >= n_sites(mdl->n_layer())) {
            throw vector_error("site " + std::to_string(m->layers().back()) + " out of range 0.." +
                               std::to_string(n_sites(mdl->n_layer()) - 1));
        }
        if (m->n_embd() != mdl->n_embd()) {
            throw vector_error("a mix has another width than the model");
        }
    }
}

void session::make_room(const steering & s, const readout * reads) {
    for (const mix_ptr & m : s.mixes) {
        wanted_layers.insert(m->layers().begin(), m->layers().end());
        wanted_tables.grow(*m);
    }
    if (reads) {
        wanted_layers.insert(reads->layers.begin(), reads->layers.end());
        wanted_tables.grow(*reads);
    }
}

bool session::steer(int id, steering st) {
    const auto lock = locked();
    for (slot & s : slots) {
        if (s.id == id) {
            check_steering(st, s.n_given);
            make_room(st, nullptr);
            set_steering(s, std::move(st), s.n_done);
            return true;
        }
    }
    for (auto & [queued, r] : queue) {
        if (queued == id) {
            check_steering(st, int(r.tokens.size()));
            make_room(st, nullptr);
            r.steer = std::move(st);
            return true;
        }
    }
    return false;
}

std::vector<float> session::readings_of(int id, size_t from) const {
    const auto lock = locked();
    for (const slot & s : slots) {
        if (s.id == id && s.req.reads) {
            const size_t per_token = s.req.reads->layers.size() * size_t(s.req.reads->n);
            const size_t begin = std::min(from, size_t(s.n_done)) * per_token;
            return {s.res.readings.begin() + std::ptrdiff_t(begin),
                    s.res.readings.begin() + std::ptrdiff_t(size_t(s.n_done) * per_token)};
        }
    }
    return {};
}

bool session::cancel(int id) {
    const auto lock = locked();
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
    result r;
    r.id = id;
    r.finish = "cancelled";
    r.n_prompt = int(it->second.tokens.size());
    r.reads = it->second.reads;
    results.push_back(std::move(r));
    queue.erase(it);
    return true;
}

void session::reset() {
    const auto lock = locked();
    fail_all();
}

bool session::keep_prefix(int n) {
    const auto lock = locked();
    require_idle("forgetting texts");
    llama_synchronize(ctx.get());
    const auto mem = llama_get_memory(ctx.get());
    slot & first = slots[0];
    if (n <= 0 || first.cached.size() < size_t(n) || llama_memory_seq_pos_min(mem, 0) != 0) {
        fail_all();
        return false;
    }
    for (size_t q = 1; q < slots.size(); ++q) {
        llama_memory_seq_rm(mem, llama_seq_id(q), -1, -1);
        slots[q].cached.clear();
    }
    if (!llama_memory_seq_rm(mem, 0, n, -1)) { // a recurrent state cannot go back
        fail_all();
        return false;
    }
    first.cached.resize(size_t(n));
    return true;
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

// No request is left: what one of them wanted in vain is not asked for again.
void session::want_what_is_attached() {
    renew = hook && hook->failed();
    wanted_layers.clear();
    wanted_tables = edit_capacity();
    wanted_tables.n_slots = cfg.n_parallel;
    if (bank && !renew) {
        wanted_layers.insert(bank->layers().begin(), bank->layers().end());
        wanted_tables = bank->capacity();
    }
}

std::vector<result> session::take_results() {
    const auto lock = locked();
    std::vector<result> out;
    out.swap(results);
    return out;
}

int session::response_index(const slot & s, int index) const {
    const int begin = s.req.response_begin >= 0 ? s.req.response_begin : s.n_given - 1;
    return std::max(0, index - begin);
}

uint64_t session::key_at(const slot & s, size_t index) {
    const mix_ptr & m = s.token_mix[index];
    const int begin = s.req.response_begin >= 0 ? s.req.response_begin : s.n_given - 1;
    return m ? m->key_at(std::max(0, int(index) - begin)) : 0;
}

mix_ptr session::mix_of_next(const slot & s, bool thinking) const {
    const int j = response_index(s, int(s.token_mix.size()));
    const phase * now = nullptr;
    for (const phase & p : s.req.steer.generated) {
        if (p.begin <= j) {
            now = &p;
        }
    }
    const int m = !now ? -1 : thinking ? now->thinking : now->mix;
    return m < 0 ? nullptr : s.req.steer.mixes[size_t(m)];
}

// Steering for the tokens [from, ...): given ones by their table, the one sampled last by its phase.
void session::set_steering(slot & s, steering steer, int from) {
    s.req.steer = std::move(steer);
    const steering & st = s.req.steer;
    const auto n = s.tokens.size();
    s.token_mix.resize(size_t(from));
    while (s.token_mix.size() < n) {
        const size_t index = s.token_mix.size();
        if (int(index) < s.n_given) {
            const int m = st.mix_of_token.empty() ? -1 : st.mix_of_token[index];
            s.token_mix.push_back(m < 0 ? nullptr : st.mixes[size_t(m)]);
        } else {
            s.token_mix.push_back(mix_of_next(s, s.last_thinks));
        }
    }
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
            const int m = r.steer.mix_of_token.empty() ? -1 : r.steer.mix_of_token[i];
            const int begin = r.response_begin >= 0 ? r.response_begin : int(r.tokens.size()) - 1;
            return m < 0 ? 0 : r.steer.mixes[size_t(m)]->key_at(std::max(0, int(i) - begin));
        };
        int target = int(free_slot - slots.begin());
        int source = -1, n_reuse = 0;
        if (r.reuse_prefix && !regroups) {
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
            if (r.reads) {
                limit = std::min(limit, r.reads_from);
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
            for (size_t q = 0; q < slots.size(); ++q) { // the idle slot with the least text
                if (slots[q].id < 0 && slots[q].cached.size() < slots[size_t(target)].cached.size()) {
                    target = int(q);
                }
            }
            // a text is continued in place, unless it goes on otherwise and an empty slot lets both stay
            if (source >= 0 && slots[size_t(source)].id < 0 &&
                (slots[size_t(source)].cached.size() == size_t(n_reuse) || !slots[size_t(target)].cached.empty())) {
                target = source;
            }
        }
        slot & s = slots[size_t(target)];
        if (target == source && !llama_memory_seq_rm(mem, target, n_reuse, -1)) {
            n_reuse = 0;
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
        s.thinking = s.req.thinking;
        s.n_given = s.res.n_prompt = int(s.tokens.size());
        s.n_done = s.res.n_reused = n_reuse;
        set_steering(s, std::move(s.req.steer), 0);
        s.res.taps = wanted_taps;
        s.res.reads = s.req.reads;
        if (s.req.reads) {
            const size_t n_tokens = std::min(size_t(s.n_given) + size_t(s.req.max_tokens), size_t(cfg.n_ctx));
            s.res.readings.assign(n_tokens * s.req.reads->layers.size() * size_t(s.req.reads->n), nan32);
        }
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
            s.sampler = std::make_unique<token_sampler>(mdl->vocab(), s.req.sampling);
            for (llama_token t : s.tokens) {
                s.sampler->accept_prompt(t);
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
// one_slot: only the first sequence that has something to compute.
void session::build_batch(std::vector<batch_item> & items, bool one_slot) {
    int tokens_left = cfg.n_batch, outputs_left = std::max(cfg.n_outputs, cfg.n_parallel);
    const size_t n_slots = slots.size();
    std::vector<int> share(n_slots, 0);
    const auto pending = [&](size_t q) { return slots[q].id >= 0 && slots[q].n_done < int(slots[q].tokens.size()); };
    const auto generating = [&](size_t q) { return pending(q) && slots[q].n_done >= slots[q].n_given; };
    std::vector<size_t> takes_part;
    if (regroups || one_slot) {
        // one prompt, or neighbours that generate one token each: llama.cpp keeps the order of these
        size_t q = 0;
        while (q < n_slots && !pending((next_slot + q) % n_slots)) {
            ++q;
        }
        if (q < n_slots) {
            q = (next_slot + q) % n_slots;
            takes_part.push_back(q);
            while (!one_slot && generating(q) && q + 1 < n_slots && generating(q + 1)) {
                takes_part.push_back(++q);
            }
            next_slot = (q + 1) % n_slots;
        }
    } else {
        for (size_t q = 0; q < n_slots; ++q) {
            takes_part.push_back(q);
        }
    }
    for (size_t q : takes_part) {
        if (generating(q)) {
            share[q] = 1;
            --tokens_left;
            --outputs_left;
        }
    }
    const bool tables = mdl->may_offload() || cfg.native_on_cpu; // these hold a few mixes of a request at a time
    for (size_t q : takes_part) {
        const slot & s = slots[q];
        std::set<uint64_t> mixes;
        while (pending(q) && s.n_done + share[q] < s.n_given && tokens_left > 0) {
            const int index = s.n_done + share[q];
            const bool output = wants_output(s, index);
            if (output && outputs_left == 0) {
                break;
            }
            if (tables && s.token_mix[size_t(index)]) {
                mixes.insert(key_at(s, size_t(index)));
                if (mixes.size() > size_t(edit_capacity::mixes_per_slot)) {
                    break;
                }
            }
            outputs_left -= output;
            --tokens_left;
            ++share[q];
        }
    }
    int rank = 0;
    for (size_t q = 0; q < n_slots; ++q) {
        for (int i = 0; i < share[q]; ++i) {
            const int index = slots[q].n_done + i;
            items.push_back({int(q), index, wants_output(slots[q], index) ? rank++ : -1});
        }
    }
}

std::vector<token_event> session::step(const std::function<bool()> & interrupted, const decide_fn & decide) {
    const auto lock = locked();
    std::vector<token_event> events;
    stepping = std::this_thread::get_id();
    try {
        compute(interrupted, decide, events);
    } catch (...) { // no request is left half done: all are dropped, and the session can be used again
        stepping = std::thread::id();
        stop_asked = nullptr;
        fail_all();
        want_what_is_attached();
        throw;
    }
    stepping = std::thread::id();
    return events;
}

void session::compute(const std::function<bool()> & interrupted, const decide_fn & decide,
                      std::vector<token_event> & events) {
    // a request that touches blocks outside the attached set, or needs larger tables, has brought a new attachment
    const bool tables = mdl->may_offload() || cfg.native_on_cpu;
    if (renew || (!wanted_layers.empty() && (!bank || bank->layers().size() != wanted_layers.size() ||
                                             (tables && bank->capacity() != wanted_tables)))) {
        attach();
        renew = false;
    }
    admit();
    std::vector<batch_item> items;
    build_batch(items, false);
    if (items.empty()) {
        return;
    }
    if (!decode(items, interrupted)) {
        // llama.cpp has computed the tokens in another order than given (a cache too full to keep them together):
        // nothing of it counts, and one sequence alone has no other order
        for (const batch_item & item : items) {
            const int q = item.slot;
            if (!llama_memory_seq_rm(llama_get_memory(ctx.get()), q, slots[size_t(q)].n_done, -1)) {
                throw model_error("llama.cpp computed this batch in another token order than given, and the model "
                                  "cannot go back");
            }
        }
        items.clear();
        build_batch(items, true);
        if (!decode(items, interrupted)) {
            throw model_error(
                "llama.cpp computed this batch in another token order than given, so steering cannot be placed");
        }
    }
    for (const batch_item & item : items) {
        slot & s = slots[size_t(item.slot)];
        s.cached.emplace_back(s.tokens[size_t(item.index)], key_at(s, size_t(item.index)));
        s.n_done = item.index + 1;
    }
    collect(items, decide, events);
}

// One llama_decode with its steering and taps. False when the graph saw the tokens in another order; `items` is emptied
// when the cache had no room, after making some.
bool session::decode(std::vector<batch_item> & items, const std::function<bool()> & interrupted) {
    const auto n = items.size();
    std::vector<llama_token> tokens(n);
    std::vector<llama_pos> positions(n);
    std::vector<int32_t> n_seq_id(n, 1);
    std::vector<llama_seq_id> seq(n);
    std::vector<llama_seq_id *> seq_ids(n);
    std::vector<int8_t> outputs(n);
    std::vector<token_edit> edits(n);
    const auto n_pools = size_t(wanted_taps.n_pools);
    std::vector<float> pool_weights(tap ? n * n_pools : 0);
    const size_t pools_per_slot = n_pools / slots.size();
    bool pools_used = false;
    for (size_t i = 0; i < n; ++i) {
        slot & s = slots[size_t(items[i].slot)];
        const auto index = size_t(items[i].index);
        tokens[i] = s.tokens[index];
        positions[i] = items[i].index;
        seq[i] = items[i].slot;
        seq_ids[i] = &seq[i];
        outputs[i] = items[i].output >= 0;
        edits[i].edit = s.token_mix[index].get();
        edits[i].j = response_index(s, items[i].index);
        edits[i].slot = items[i].slot;
        if (const readout * reads = s.req.reads.get()) {
            edits[i].reads = reads;
            edits[i].readings = s.res.readings.data() + index * reads->layers.size() * size_t(reads->n);
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
            bank->set_tokens(edits);
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
    if (rc == 1) {
        make_cells_free(items);
        items.clear();
        return true;
    }
    if (rc == 2) {
        throw model_error("interrupted");
    }
    if (rc != 0) {
        throw model_error("llama.cpp cannot decode this batch (code " + std::to_string(rc) + ") " + log.errors());
    }
    if (hook) {
        hook->check();
    }
    if (hook && !hook->order_was(tokens, positions)) {
        return false;
    }
    if (bank) {
        std::vector<int> output_of_token;
        for (const batch_item & item : items) {
            output_of_token.push_back(item.output);
        }
        bank->read_back(edits, output_of_token);
    }
    if (tap && pools_used) {
        tap->read_pooled();
    }
    return true;
}

// The cache has no cells for a decode: first the texts of idle slots go, then the longest request, with an error of its
// own. The others go on.
void session::make_cells_free(const std::vector<batch_item> & items) {
    const auto mem = llama_get_memory(ctx.get());
    bool freed = false;
    for (size_t q = 0; q < slots.size(); ++q) {
        if (slots[q].id < 0 && !slots[q].cached.empty()) {
            llama_memory_seq_rm(mem, llama_seq_id(q), -1, -1);
            slots[q].cached.clear();
            freed = true;
        }
    }
    if (freed) {
        return;
    }
    int longest = items[0].slot;
    for (const batch_item & item : items) {
        if (slots[size_t(item.slot)].n_done > slots[size_t(longest)].n_done) {
            longest = item.slot;
        }
    }
    llama_memory_seq_rm(mem, longest, -1, -1);
    slots[size_t(longest)].cached.clear();
    finish(slots[size_t(longest)], "error", "the KV cache is full");
}

// f(first item, column, count) for the rows of items [begin, end) at block il that have one, as runs of neighbours.
// Where the block keeps the output rows only, a row's column is the rank of its output.
template <typename Items, typename F>
static void for_each_run(const Items & items, size_t begin, size_t end, bool cut, const F & f) {
    const auto column_of = [&](size_t i) { return cut ? items[i].output : int(i); };
    for (size_t i = begin; i < end;) {
        const int column = column_of(i);
        size_t n = 1;
        while (column >= 0 && i + n < end && column_of(i + n) == column + int(n)) {
            ++n;
        }
        if (column >= 0) {
            f(i, column, int(n));
        }
        i += n;
    }
}

void session::collect_pools(slot & s, const std::vector<batch_item> & items, size_t begin, size_t end) {
    const auto n_embd = size_t(mdl->n_embd());
    const size_t pools_per_slot = size_t(wanted_taps.n_pools) / slots.size();
    const bool rows_kept = tap && tap->keeps_rows(int64_t(items.size()));
    for (size_t p = 0; p < s.req.pools.size() && p < pools_per_slot; ++p) {
        int n_all = 0, n_out = 0;
        for (size_t i = begin; i < end; ++i) {
            if (in(s.req.pools[p], items[i].index)) {
                ++n_all, n_out += items[i].output >= 0;
            }
        }
        for (size_t l = 0; l < wanted_taps.pool_layers.size(); ++l) {
            const int il = wanted_taps.pool_layers[l];
            const bool cut = tap->is_cut(il);
            const int counted = cut ? n_out : n_all;
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
                add(int(size_t(items[begin].slot) * pools_per_slot + p));
            }
            for (size_t i = begin; i < end && rows_kept; ++i) {
                const int column = cut ? items[i].output : int(i);
                if (column >= 0 && in(s.req.pools[p], items[i].index)) {
                    add(column);
                }
            }
            s.res.pool_counts[p][l] += counted;
        }
    }
}

void session::collect_raws(slot & s, const std::vector<batch_item> & items, size_t begin, size_t end) {
    if (s.req.raws.empty()) {
        return;
    }
    const auto n_embd = size_t(mdl->n_embd());
    const span & want = s.req.raws[0];
    const auto n_rows = size_t(want.end - want.begin);
    while (begin < end && items[begin].index < want.begin) { // the items inside the span
        ++begin;
    }
    while (end > begin && items[end - 1].index >= want.end) {
        --end;
    }
    for (size_t l = 0; l < wanted_taps.raw_layers.size(); ++l) {
        const int il = wanted_taps.raw_layers[l];
        for_each_run(items, begin, end, tap->is_cut(il), [&](size_t i, int column, int n) {
            const auto row = size_t(items[i].index - want.begin);
            tap->read_raw(il, column, n, s.res.raw.data() + (l * n_rows + row) * n_embd);
        });
    }
}

// The prompt of a request that decides is read: what does its response get? Where it is steered anew, the tokens from
// the response's first on do not count and are computed once more; `end` then leaves them out. False: no token follows.
bool session::decide_now(slot & s, const std::vector<batch_item> & items, size_t begin, size_t & end,
                         const decide_fn & decide) {
    const int first = s.req.response_begin;
    if (!s.req.decides || first < 0 || items[begin].index > first || items[end - 1].index < first) {
        return true;
    }
    s.req.decides = false;
    std::optional<steering> st = decide ? decide(s.res) : std::nullopt;
    if (!st) {
        return true;
    }
    check_steering(*st, s.n_given);
    make_room(*st, nullptr);
    const int q = items[begin].slot;
    const int back_to = s.req.pools.empty() ? first : items[begin].index; // the pools of this decode are sums already
    if (!llama_memory_seq_rm(llama_get_memory(ctx.get()), q, back_to, -1)) {
        set_steering(s, std::move(*st), s.n_done); // a recurrent state cannot go back: from the next token on
        return true;
    }
    s.n_done = back_to;
    s.cached.resize(size_t(back_to));
    set_steering(s, std::move(*st), first);
    while (end > begin && items[end - 1].index >= back_to) {
        --end;
    }
    return false;
}

void session::collect(const std::vector<batch_item> & items, const decide_fn & decide,
                      std::vector<token_event> & events) {
    const auto n_vocab = size_t(mdl->n_vocab());
    for (size_t begin = 0; begin < items.size();) {
        size_t next = begin;
        while (next < items.size() && items[next].slot == items[begin].slot) {
            ++next;
        }
        slot & s = slots[size_t(items[begin].slot)];
        size_t end = next;
        const bool goes_on = decide_now(s, items, begin, end, decide);
        collect_pools(s, items, begin, end);
        collect_raws(s, items, begin, end);
        int sampled_from = -1;
        for (size_t i = begin; i < end; ++i) {
            if (items[i].output < 0) {
                continue;
            }
            const int index = items[i].index;
            if (index < s.n_given && in(s.req.outputs, index)) {
                const float * row = output_row(int(i));
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
        if (!goes_on) {
            // the response is computed in the next decode
        } else if (s.closing) {
            finish(s, "length");
        } else if (s.n_done >= s.n_given && s.req.max_tokens == 0) {
            finish(s, "given");
        } else if (sampled_from >= 0 && s.req.max_tokens > 0) {
            take_token(s, sampled_from, events);
        }
        begin = next;
    }
}

const float * session::output_row(int item) const {
    const float * row = llama_get_logits_ith(ctx.get(), item);
    if (!row) {
        throw model_error("llama.cpp has no output row for a token of this batch");
    }
    return row;
}

// Whether the text is inside a thinking block after one more piece.
static bool thinks_after(const std::pair<std::string, std::string> & marks, std::string & seen,
                         const std::string & piece, bool thinking) {
    seen += piece;
    for (;;) {
        const std::string & mark = thinking ? marks.second : marks.first;
        const size_t at = seen.find(mark);
        if (at == std::string::npos) {
            break;
        }
        seen.erase(0, at + mark.size());
        thinking = !thinking;
    }
    const size_t longest = std::max(marks.first.size(), marks.second.size());
    if (seen.size() > longest) {
        seen.erase(0, seen.size() - longest);
    }
    return thinking;
}

void session::take_token(slot & s, int output, std::vector<token_event> & events) {
    llama_token token = -1;
    try {
        token = s.sampler->sample(ctx.get(), output);
    } catch (const std::exception & e) { // llama.cpp's grammar
        finish(s, "error", std::string("sampling failed: ") + e.what());
        return;
    }
    if (token < 0) {
        finish(s, "error", "the grammar allows no token here");
        return;
    }
    if (mdl->is_end(token) && !s.req.ignore_end) {
        finish(s, "stop");
        return;
    }
    double logprob = std::numeric_limits<double>::quiet_NaN();
    if (s.req.n_logprobs >= 0) {
        const float * row = output_row(output);
        s.res.top_logprobs.emplace_back();
        logprob = log_probs(row, mdl->n_vocab(), token, s.req.n_logprobs, s.res.top_logprobs.back());
        s.res.logprobs.push_back(logprob);
    }
    s.res.tokens.push_back(token);
    const std::string piece = mdl->piece(token, false);
    s.res.text += piece;
    events.push_back({s.id, token, piece, logprob, {}});
    if (!s.res.top_logprobs.empty()) {
        events.back().top_logprobs = s.res.top_logprobs.back();
    }
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
    s.last_thinks = s.thinking; // the marker that closes belongs to the block
    s.token_mix.push_back(mix_of_next(s, s.last_thinks));
    if (!s.req.think_marks.first.empty()) {
        s.thinking = thinks_after(s.req.think_marks, s.marks_seen, mdl->piece(token, true), s.thinking);
    }
    const bool full = int(s.res.tokens.size()) >= s.req.max_tokens || int(s.tokens.size()) >= cfg.n_ctx;
    if (full && (!s.req.pools.empty() || s.req.reads) && int(s.tokens.size()) <= cfg.n_ctx) {
        s.closing = true; // the last token's own activations still count
    } else if (full) {
        finish(s, "length");
    }
}

// The slot is free again; its cached text stays for later requests with the same prefix.
void session::finish(slot & s, const char * why, const std::string & error) {
    s.res.finish = why;
    s.res.error = error;
    if (s.req.reads) {
        s.res.readings.resize(size_t(s.n_done) * s.req.reads->layers.size() * size_t(s.req.reads->n));
    }
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
                std::vector<float> unit;
                for (int k = 0; k < m->n_embd(); ++k) {
                    unit.push_back(k % 3 == 0 ? 1.0f : -1.0f);
                }
                edit_term plus;
                plus.write = 0;
                r.steer.mixes = {std::make_shared<mix>(uint64_t(il) + 1, m->n_embd(), std::vector<int>{il},
                                                       std::vector<std::vector<edit_term>>{{plus}}, unit)};
                r.steer.mix_of_token = {0};
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
