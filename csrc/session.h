#pragma once

#include "edit_bank.h"
#include "graph_edit.h"
#include "model.h"
#include "taps.h"

#include "llama-cpp.h"

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace personasteer {

struct session_params {
    int n_ctx = 2048;   // tokens per request
    int n_parallel = 4; // sequences in one batch
    int n_batch = 512;  // tokens per decode; always one ubatch
    int n_threads = 2;
    int n_outputs = 64; // output rows per decode, at most
    bool hook = true;   // false: plain llama.cpp, no steering, no capture
};

struct sampling_params {
    float temperature = 0.0f; // <= 0: greedy
    int top_k = 40;           // <= 0: off
    float top_p = 0.95f;      // >= 1: off
    float min_p = 0.05f;      // <= 0: off
    float repeat_penalty = 1.0f;
    int repeat_last_n = 64;
    uint32_t seed = 0;
};

// A span of token indices [begin, end) of a request, the tokens it will generate counted in.
struct span {
    int begin = 0;
    int end = 0;
};

struct request {
    std::vector<llama_token> tokens; // given text: prompt, and answer when it is forced
    std::vector<mix_ptr> mixes;      // the distinct mixes of this request
    std::vector<int> mix_of_token;   // per given token: index into mixes, -1 unsteered; empty: all -1
    int mix_of_generated = -1;       // for tokens generated here

    int max_tokens = 0; // 0: only the given text is computed
    sampling_params sampling;
    std::vector<std::string> stop; // the text ends before the first of these
    bool ignore_end = false;       // go on after an end-of-turn token

    span outputs;               // given tokens whose output row is wanted
    bool keep_logits = false;   // the rows themselves
    bool keep_scores = false;   // log p(next given token) of each row
    std::vector<span> pools;    // one pooled sum per span; end < 0: to the end of what is generated
    std::vector<span> raws;     // tokens whose block outputs are kept (one span at most)
    bool keep_readings = false; // projections of every token computed
    bool reuse_prefix = false;  // take over a computed prefix under the same steering
};

struct result {
    int id = -1;
    std::string text;                           // generated, stop string and end-of-turn token left out
    std::vector<llama_token> tokens;            // generated, end-of-turn token left out
    std::string finish;                         // "stop", "length", "given" or "cancelled"
    std::vector<float> logits;                  // [rows][n_vocab]
    std::vector<double> scores;                 // [rows]
    std::vector<std::vector<double>> pool_sums; // per pool [n_pool_layers * n_embd]
    std::vector<std::vector<int>> pool_counts;  // per pool and pool layer: tokens summed
    std::vector<float> raw;      // [n_raw_layers][n_tokens of the span][n_embd], NaN where there is no row
    std::vector<float> readings; // [n_reading_layers][n_tokens given + generated][n_readouts], NaN likewise
    int n_reused = 0;            // tokens taken from the prefix cache
    int n_prompt = 0;
    tap_config taps; // what gives the arrays above their shapes
};

struct token_event {
    int id;
    llama_token token;
    std::string piece;
};

// Many requests over one llama_context: they join and leave the batch between decodes. Every token carries the row of
// its request's mix. All methods lock; step() computes one decode.
class session {
  public:
    session(std::shared_ptr<model> m, const session_params & params);
    ~session();
    session(const session &) = delete;
    session & operator=(const session &) = delete;

    int submit(request r); // throws when the request can never run
    bool cancel(int id);
    bool busy() const;
    // One decode; the tokens that came out of it. `interrupted` is polled while computing.
    std::vector<token_event> step(const std::function<bool()> & interrupted);
    std::vector<result> take_results();
    void reset(); // forget all requests and all cached text

    // These change the graph, and throw while requests are queued or running.
    void set_taps(tap_config config, std::vector<float> readout_directions);
    void add_edit_layers(const std::vector<int> & layers);
    void detach(); // back to plain llama.cpp; the next steered request attaches again

    // Each block's unit edit, one decode: max |change of logits| per block beyond that of an unsteered row.
    static std::vector<float> self_test(const std::shared_ptr<model> & m, int n_threads);

    int64_t n_builds() const; // graph builds under the current attachment
    int64_t n_attachments() const;
    size_t hook_bytes() const; // memory of edit bank and taps
    const session_params & params() const { return cfg; }
    const model & loaded_model() const { return *mdl; }

  private:
    struct slot {
        int id = -1; // request id, -1 when free
        request req;
        result res;
        std::vector<llama_token> tokens; // given + generated
        std::vector<int> token_mix;      // per token, index into req.mixes or -1
        int n_done = 0;                  // tokens in the cache
        int n_given = 0;
        bool closing = false;                                 // last generated token only feeds a pool
        std::vector<std::pair<llama_token, uint64_t>> cached; // what the sequence's cache holds: token, mix key
        llama_sampler_ptr sampler;
    };
    struct batch_item {
        int slot, index, output;
    }; // token `index` of a slot; rank of its output row or -1

    void attach();
    void require_idle(const char * what) const;
    bool any_request() const;
    std::vector<int> checked_layers(std::vector<int> layers) const; // ascending, once each, in range
    void compute(const std::function<bool()> & interrupted, std::vector<token_event> & events);
    void admit();
    int row_for(const mix_ptr & m);
    void build_batch(std::vector<batch_item> & items) const;
    bool wants_output(const slot & s, int index) const;
    void collect(const std::vector<batch_item> & items, std::vector<token_event> & events);
    void take_token(slot & s, int output, std::vector<token_event> & events);
    void finish(slot & s, const char * why);
    uint64_t key_at(const slot & s, size_t index) const;
    void fail_all();

    std::shared_ptr<model> mdl;
    session_params cfg;
    bool one_sequence_per_decode; // recurrent and hybrid models regroup mixed batches
    mutable std::mutex mutex;
    std::set<int> wanted_layers; // blocks that some request edits; only grows
    int mixes_per_request = 4;   // rows kept for each; only grows
    tap_config wanted_taps;
    std::vector<float> readouts; // of wanted_taps
    std::unique_ptr<edit_bank> bank;
    std::unique_ptr<taps> tap;
    std::unique_ptr<graph_edit> hook; // destroyed after ctx, before bank and tap
    llama_context_ptr ctx;
    std::map<uint64_t, int> row_of_key; // mixes in the bank
    std::vector<uint64_t> key_of_row;
    std::vector<int64_t> row_used; // step of last use
    std::vector<slot> slots;
    std::deque<std::pair<int, request>> queue;
    std::vector<result> results;
    const std::function<bool()> * stop_asked = nullptr; // of the step under way
    int next_id = 0;
    int64_t step_count = 0;
    int64_t attachments = 0;
};

} // namespace personasteer
