#pragma once

#include "edit_bank.h"
#include "graph_edit.h"
#include "model.h"
#include "taps.h"
#include "token_sampler.h"

#include "llama-cpp.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace personasteer {

struct session_params {
    int n_ctx = 2048;   // tokens per request
    int n_parallel = 4; // sequences in one batch
    int n_batch = 512;  // tokens per decode; always one ubatch
    int n_threads = 2;
    int n_outputs = 64;         // output rows per decode, at most
    bool hook = true;           // false: plain llama.cpp, no steering, no capture
    bool native_on_cpu = false; // blocks on the CPU take the operations of other devices, too
    int n_cells = 0;            // tokens of all requests in the cache together; 0: n_ctx for each of n_parallel
    int n_blocks = 0;           // only these are computed: readings and captures, no output rows; 0: all
};

// A span of token indices [begin, end) of a request, the tokens it will generate counted in.
struct span {
    int begin = 0;
    int end = 0;
};

// From the begin-th token of the response on, its first being the last of the prompt.
struct phase {
    int begin = 0;
    int mix = -1;      // index into steering::mixes, -1: unsteered
    int thinking = -1; // the same, inside a thinking block
};

struct steering {
    std::vector<mix_ptr> mixes;    // the distinct mixes of this request
    std::vector<int> mix_of_token; // per given token: index into mixes, -1 unsteered; empty: all -1
    std::vector<phase> generated;  // ascending; empty: unsteered
};

struct request {
    std::vector<llama_token> tokens; // given text: prompt, and answer when it is forced
    steering steer;
    int response_begin = -1; // where fading and phases count from; -1: the last given token
    readout_ptr reads;       // directions to project every token on
    int reads_from = 0;      // tokens before it may come from a computed prefix, without readings
    bool decides = false;    // once the prompt is read, the steering of the response is asked for

    int max_tokens = 0; // 0: only the given text is computed
    sampling_params sampling;
    std::vector<std::string> stop;                   // the text ends before the first of these
    bool ignore_end = false;                         // go on after an end-of-turn token
    int n_logprobs = -1;                             // >= 0: log p of each generated token, and of so many top ones
    std::pair<std::string, std::string> think_marks; // what opens and closes a thinking block
    bool thinking = false;                           // the given text ends inside one

    span outputs;              // given tokens whose output row is wanted
    bool keep_logits = false;  // the rows themselves
    bool keep_scores = false;  // log p(next given token) of each row
    std::vector<span> pools;   // one pooled sum per span; end < 0: to the end of what is generated
    std::vector<span> raws;    // tokens whose block outputs are kept (one span at most)
    bool reuse_prefix = false; // take over a computed prefix under the same steering
};

struct result {
    int id = -1;
    std::string text;                // generated, stop string and end-of-turn token left out
    std::vector<llama_token> tokens; // generated, end-of-turn token left out
    std::string finish;              // "stop", "length", "given", "cancelled" or "error"
    std::string error;               // what went wrong with this request alone
    std::vector<float> logits;       // [rows][n_vocab]
    std::vector<double> scores;      // [rows]
    std::vector<double> logprobs;    // of the generated tokens
    std::vector<std::vector<std::pair<llama_token, double>>> top_logprobs;
    std::vector<std::vector<double>> pool_sums; // per pool [n_pool_layers * n_embd]
    std::vector<std::vector<int>> pool_counts;  // per pool and pool layer: tokens summed
    std::vector<float> raw;      // [n_raw_layers][n_tokens of the span][n_embd], NaN where there is no row
    std::vector<float> readings; // [n_tokens given + generated][reads->layers][reads->n], NaN likewise
    int n_reused = 0;            // tokens taken from the prefix cache
    int n_prompt = 0;
    tap_config taps; // these two give the arrays above their shapes
    readout_ptr reads;
};

struct token_event {
    int id;
    llama_token token;
    std::string piece;
    double logprob; // NaN unless asked for
    std::vector<std::pair<llama_token, double>> top_logprobs;
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
    // Asked once for a request that `decides`, when its prompt is read: how to steer the response, or nothing new.
    using decide_fn = std::function<std::optional<steering>(const result &)>;
    // One decode; the tokens that came out of it. `interrupted` is polled while computing.
    std::vector<token_event> step(const std::function<bool()> & interrupted, const decide_fn & decide = {});
    // Other steering for a request from its next token on; computed ones keep what they had. False: no such request.
    bool steer(int id, steering s);
    std::vector<float> readings_of(int id, size_t from) const; // of a running request, from a token on
    std::vector<result> take_results();
    void reset(); // forget all requests and all cached text
    // Forget all cached text but the first n tokens of the first sequence. False: it has not so many, and all is gone.
    bool keep_prefix(int n);

    // These change the graph, and throw while requests are queued or running.
    void set_taps(tap_config config);
    void add_edit_layers(const std::vector<int> & layers);
    // llama.cpp's own control vector for all requests, [n_layer - 1][n_embd] from block 1 on; for contexts without hook
    void set_control_vector(const std::vector<float> & directions);
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
        std::vector<mix_ptr> token_mix;  // per token; null: unsteered
        int n_done = 0;                  // tokens in the cache
        int n_given = 0;
        bool closing = false;                                 // last generated token only feeds a pool or a reading
        bool thinking = false;                                // the next token is inside a thinking block
        bool last_thinks = false;                             // the last one is, its closing marker included
        std::string marks_seen;                               // the end of the text, where a marker may be growing
        std::vector<std::pair<llama_token, uint64_t>> cached; // what the sequence's cache holds: token, mix key
        std::unique_ptr<token_sampler> sampler;
    };
    struct batch_item {
        int slot, index, output;
    }; // token `index` of a slot; rank of its output row or -1

    std::unique_lock<std::mutex> locked() const;
    void attach();
    void require_idle(const char * what) const;
    bool any_request() const;
    std::vector<int> checked_layers(std::vector<int> layers) const; // ascending, once each, in range
    void check_computed(const std::vector<int> & layers) const;     // ascending ones
    void check_steering(const steering & s, int n_given) const;
    void make_room(const steering & s, const readout * reads); // what the next decode must find attached
    void compute(const std::function<bool()> & interrupted, const decide_fn & decide,
                 std::vector<token_event> & events);
    bool decode(std::vector<batch_item> & items, const std::function<bool()> & interrupted);
    void make_cells_free(const std::vector<batch_item> & items);
    void admit();
    void build_batch(std::vector<batch_item> & items, bool one_slot);
    bool wants_output(const slot & s, int index) const;
    int response_index(const slot & s, int index) const;      // j of mix and phase
    mix_ptr mix_of_next(const slot & s, bool thinking) const; // for the token after the last
    void set_steering(slot & s, steering steer, int from);
    bool decide_now(slot & s, const std::vector<batch_item> & items, size_t begin, size_t & end,
                    const decide_fn & decide);
    void collect(const std::vector<batch_item> & items, const decide_fn & decide, std::vector<token_event> & events);
    void collect_pools(slot & s, const std::vector<batch_item> & items, size_t begin, size_t end);
    void collect_raws(slot & s, const std::vector<batch_item> & items, size_t begin, size_t end);
    const float * output_row(int item) const; // of the last decode
    void take_token(slot & s, int output, std::vector<token_event> & events);
    void finish(slot & s, const char * why, const std::string & error = "");
    static uint64_t key_at(const slot & s, size_t index);
    void fail_all();
    void want_what_is_attached();

    std::shared_ptr<model> mdl;
    session_params cfg;
    bool regroups; // recurrent and hybrid models compute mixed batches in an order of their own
    mutable std::mutex mutex;
    std::atomic<std::thread::id> stepping{std::thread::id()}; // who computes, if any, and must not wait for itself
    // These only grow, but where a step fails and drops all requests.
    std::set<int> wanted_layers; // blocks that some request edits or reads
    edit_capacity wanted_tables; // of devices other than the CPU
    tap_config wanted_taps;
    std::unique_ptr<edit_bank> bank;
    std::unique_ptr<taps> tap;
    std::unique_ptr<graph_edit> hook; // destroyed after ctx, before bank and tap
    llama_context_ptr ctx;
    size_t next_slot = 0; // whose turn it is, where not all fit
    std::vector<slot> slots;
    std::deque<std::pair<int, request>> queue;
    std::vector<result> results;
    const std::function<bool()> * stop_asked = nullptr; // of the step under way
    int next_id = 0;
    int64_t attachments = 0;
    bool renew = false; // the hook could not do what was asked for: a new one before the next decode
};

} // namespace personasteer
