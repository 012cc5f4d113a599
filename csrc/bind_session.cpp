#include "arrays.h"
#include "errors.h"
#include "session.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <map>
#include <optional>
#include <tuple>

namespace py = pybind11;
using namespace py::literals;
using namespace personasteer;

// Ctrl-C while computing: signals are looked at a few times a second. What a handler raises is kept in `raised`.
using raised_ptr = std::unique_ptr<py::error_already_set>;
static std::function<bool()> signal_check(raised_ptr & raised) {
    auto last = std::make_shared<std::chrono::steady_clock::time_point>(std::chrono::steady_clock::now());
    return [last, &raised] {
        const auto now = std::chrono::steady_clock::now();
        if (raised || now - *last < std::chrono::milliseconds(100)) {
            return raised != nullptr;
        }
        *last = now;
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) {
            raised = std::make_unique<py::error_already_set>();
        }
        return raised != nullptr;
    };
}

// (tokens, blocks, directions)
static py::array readings_array(std::vector<float> && readings, const readout * reads) {
    const auto n_layers = reads ? py::ssize_t(reads->layers.size()) : 0;
    const py::ssize_t n = reads ? reads->n : 0;
    const auto n_tokens = n_layers * n > 0 ? py::ssize_t(readings.size()) / (n_layers * n) : 0;
    return to_array(std::move(readings), {n_tokens, n_layers, n});
}

using mix_list = std::vector<std::shared_ptr<mix>>;
using phase_list = std::vector<std::tuple<int, int, int>>; // (begin, mix, mix while thinking)

static steering to_steering(const mix_list & mixes, std::vector<int> mix_of_token, const phase_list & generated) {
    steering s;
    s.mixes.assign(mixes.begin(), mixes.end());
    s.mix_of_token = std::move(mix_of_token);
    for (const auto & [begin, plain, thinking] : generated) {
        s.generated.push_back({begin, plain, thinking});
    }
    return s;
}

static py::dict to_dict(result && r, const model & m) {
    const tap_config & taps = r.taps;
    py::dict d;
    d["id"] = r.id;
    d["text"] = py::bytes(r.text);
    d["tokens"] = r.tokens;
    d["finish"] = r.finish;
    d["n_prompt"] = r.n_prompt;
    d["n_reused"] = r.n_reused;
    const py::ssize_t n_embd = m.n_embd();
    const auto n_pool_layers = py::ssize_t(taps.pool_layers.size());
    py::list sums, counts;
    for (auto & sum : r.pool_sums) {
        sums.append(to_array(std::move(sum), {n_pool_layers, n_embd}));
    }
    for (auto & count : r.pool_counts) {
        counts.append(to_array(std::move(count), {n_pool_layers}));
    }
    d["pool_sums"] = sums;
    d["pool_counts"] = counts;
    const py::ssize_t n_vocab = m.n_vocab();
    const auto n_rows = py::ssize_t(r.logits.size()) / n_vocab;
    d["logits"] = to_array(std::move(r.logits), {n_rows, n_vocab});
    const auto n_scores = py::ssize_t(r.scores.size());
    d["scores"] = to_array(std::move(r.scores), {n_scores});
    const auto n_raw_layers = py::ssize_t(taps.raw_layers.size());
    const auto n_raw = n_raw_layers ? py::ssize_t(r.raw.size()) / (n_raw_layers * n_embd) : 0;
    d["raw"] = to_array(std::move(r.raw), {n_raw_layers, n_raw, n_embd});
    d["readings"] = readings_array(std::move(r.readings), r.reads.get());
    d["error"] = r.error;
    d["logprobs"] = r.logprobs;
    d["top_logprobs"] = r.top_logprobs;
    return d;
}

void bind_session(py::module_ & m) {
    using int_array = py::array_t<int, py::array::c_style | py::array::forcecast>;
    py::class_<mix, std::shared_ptr<mix>>(m, "Mix", "What is done to one kind of token; see csrc/mix.h.")
        .def(py::init([](uint64_t key, std::vector<int> layers, const float_array & data) {
                 if (data.ndim() != 2 || size_t(data.shape(0)) != layers.size()) {
                     throw vector_error("a mix needs one row for each of its blocks");
                 }
                 std::vector<std::vector<edit_term>> terms(layers.size(), std::vector<edit_term>(1));
                 for (size_t i = 0; i < terms.size(); ++i) {
                     terms[i][0].write = int(i);
                 }
                 return std::make_shared<mix>(key, int(data.shape(1)), std::move(layers), std::move(terms),
                                              to_vector(data));
             }),
             "key"_a, "layers"_a, "data"_a, "Additions: row i (n_embd,) is added at layers[i].")
        .def(
            py::init(
                [](uint64_t key, const int_array & terms, const float_array & numbers, const float_array & vectors) {
                    if (terms.ndim() != 2 || terms.shape(1) != 5 || numbers.ndim() != 2 || numbers.shape(1) != 6 ||
                        numbers.shape(0) != terms.shape(0) || vectors.ndim() != 2) {
                        throw vector_error("the terms of a mix have other shapes");
                    }
                    std::map<int, std::vector<edit_term>> by_layer;
                    for (py::ssize_t i = 0; i < terms.shape(0); ++i) {
                        edit_term t;
                        t.at = terms.at(i, 1);
                        t.gate = terms.at(i, 2);
                        t.read = terms.at(i, 3);
                        t.write = terms.at(i, 4);
                        t.gate_at = numbers.at(i, 0);
                        t.gate_sign = numbers.at(i, 1);
                        t.lo = numbers.at(i, 2);
                        t.hi = numbers.at(i, 3);
                        t.share = numbers.at(i, 4);
                        t.half_life = numbers.at(i, 5);
                        by_layer[terms.at(i, 0)].push_back(t);
                    }
                    std::vector<int> layers;
                    std::vector<std::vector<edit_term>> all;
                    for (auto & [il, of_layer] : by_layer) {
                        layers.push_back(il);
                        all.push_back(std::move(of_layer));
                    }
                    return std::make_shared<mix>(key, int(vectors.shape(1)), std::move(layers), std::move(all),
                                                 to_vector(vectors));
                }),
            "key"_a, "terms"_a, "numbers"_a, "vectors"_a,
            "terms (n, 5): block, stage, rows of gate, read, write (-1: none); numbers (n, 6): gate_at, gate_sign, lo, "
            "hi, share, half_life; vectors (rows, n_embd).")
        .def_property_readonly("key", &mix::key)
        .def("key_at", &mix::key_at, "j"_a)
        .def_property_readonly("layers", &mix::layers);
    py::class_<readout, std::shared_ptr<readout>>(m, "Readout", "Directions to project on, (n_layers, n, n_embd).")
        .def(py::init([](std::vector<int> layers, const float_array & directions) {
                 static std::atomic<uint64_t> count{0};
                 if (directions.ndim() != 3 || size_t(directions.shape(0)) != layers.size()) {
                     throw vector_error("read-outs need directions of the shape (n_layers, n, n_embd)");
                 }
                 auto out = std::make_shared<readout>();
                 out->id = ++count;
                 out->layers = std::move(layers);
                 out->n = int(directions.shape(1));
                 out->n_embd = int(directions.shape(2));
                 out->directions = to_vector(directions);
                 return out;
             }),
             "layers"_a, "directions"_a);

    // Every call lets go of the GIL before it takes the session's lock: a step under way may need the GIL for signals.
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<session>(m, "Session", py::release_gil_before_calling_cpp_dtor(),
                        "Many requests over one llama.cpp context.")
        .def(py::init([](std::shared_ptr<model> mdl, int n_ctx, int n_parallel, int n_batch, int n_threads,
                         int n_outputs, bool hook, bool native_on_cpu, int n_cells, int n_blocks) {
                 session_params p;
                 p.n_ctx = n_ctx;
                 p.n_parallel = n_parallel;
                 p.n_batch = n_batch;
                 p.n_threads = n_threads;
                 p.n_outputs = n_outputs;
                 p.hook = hook;
                 p.native_on_cpu = native_on_cpu;
                 p.n_cells = n_cells;
                 p.n_blocks = n_blocks;
                 const py::gil_scoped_release release;
                 return std::make_unique<session>(std::move(mdl), p);
             }),
             "model"_a.none(false), "n_ctx"_a, "n_parallel"_a, "n_batch"_a, "n_threads"_a, "n_outputs"_a,
             "hook"_a = true, "native_on_cpu"_a = false, "n_cells"_a = 0, "n_blocks"_a = 0)
        .def(
            "submit",
            [](session & s, std::vector<llama_token> tokens, const mix_list & mixes, std::vector<int> mix_of_token,
               const phase_list & generated, int response_begin, const std::shared_ptr<readout> & reads, int reads_from,
               bool decides, int max_tokens, float temperature, int top_k, float top_p, float min_p,
               float repeat_penalty, float frequency_penalty, float presence_penalty,
               std::vector<std::pair<llama_token, float>> logit_bias, uint32_t seed, const std::string & grammar,
               const std::vector<py::bytes> & stop, int n_logprobs,
               const std::pair<std::string, std::string> & think_marks, bool thinking, std::pair<int, int> outputs,
               bool keep_logits, bool keep_scores, const std::vector<std::pair<int, int>> & pools,
               const std::vector<std::pair<int, int>> & raws, bool reuse_prefix, bool ignore_end) {
                request r;
                r.tokens = std::move(tokens);
                r.steer = to_steering(mixes, std::move(mix_of_token), generated);
                r.response_begin = response_begin;
                r.reads = reads;
                r.reads_from = reads_from;
                r.decides = decides;
                r.max_tokens = max_tokens;
                r.sampling.temperature = temperature;
                r.sampling.top_k = top_k;
                r.sampling.top_p = top_p;
                r.sampling.min_p = min_p;
                r.sampling.repeat_penalty = repeat_penalty;
                r.sampling.frequency_penalty = frequency_penalty;
                r.sampling.presence_penalty = presence_penalty;
                r.sampling.logit_bias = std::move(logit_bias);
                r.sampling.seed = seed;
                r.sampling.grammar = grammar;
                for (const py::bytes & text : stop) {
                    r.stop.push_back(text);
                }
                r.n_logprobs = n_logprobs;
                r.think_marks = think_marks;
                r.thinking = thinking;
                r.outputs = {outputs.first, outputs.second};
                r.keep_logits = keep_logits;
                r.keep_scores = keep_scores;
                for (const auto & [begin, end] : pools) {
                    r.pools.push_back({begin, end});
                }
                for (const auto & [begin, end] : raws) {
                    r.raws.push_back({begin, end});
                }
                r.reuse_prefix = reuse_prefix;
                r.ignore_end = ignore_end;
                const py::gil_scoped_release release;
                return s.submit(std::move(r));
            },
            py::kw_only(), "tokens"_a, "mixes"_a = py::list(), "mix_of_token"_a = py::list(),
            "generated"_a = py::list(), "response_begin"_a = -1, "reads"_a = py::none(), "reads_from"_a = 0,
            "decides"_a = false, "max_tokens"_a = 0, "temperature"_a = 0.0f, "top_k"_a = 40, "top_p"_a = 0.95f,
            "min_p"_a = 0.05f, "repeat_penalty"_a = 1.0f, "frequency_penalty"_a = 0.0f, "presence_penalty"_a = 0.0f,
            "logit_bias"_a = py::list(), "seed"_a = 0, "grammar"_a = "", "stop"_a = py::list(), "n_logprobs"_a = -1,
            "think_marks"_a = std::pair<std::string, std::string>(), "thinking"_a = false,
            "outputs"_a = std::pair<int, int>(0, 0), "keep_logits"_a = false, "keep_scores"_a = false,
            "pools"_a = py::list(), "raws"_a = py::list(), "reuse_prefix"_a = false, "ignore_end"_a = false)
        .def(
            "steer",
            [](session & s, int id, const mix_list & mixes, std::vector<int> mix_of_token,
               const phase_list & generated) {
                steering st = to_steering(mixes, std::move(mix_of_token), generated);
                const py::gil_scoped_release release;
                return s.steer(id, std::move(st));
            },
            "id"_a, "mixes"_a, "mix_of_token"_a, "generated"_a,
            "Other steering for a request from its next token on; False when there is no such request.")
        .def(
            "readings_of",
            [](session & s, int id, size_t first) {
                std::vector<float> readings;
                {
                    const py::gil_scoped_release release;
                    readings = s.readings_of(id, first);
                }
                const auto n = py::ssize_t(readings.size());
                return to_array(std::move(readings), {n});
            },
            "id"_a, "first"_a)
        .def(
            "set_control_vector",
            [](session & s, const float_array & directions) {
                const std::vector<float> data = to_vector(directions);
                const py::gil_scoped_release release;
                s.set_control_vector(data);
            },
            "directions"_a)
        .def("cancel", &session::cancel, "id"_a, no_gil)
        .def_property_readonly("busy", py::cpp_function(&session::busy, no_gil))
        .def(
            "step",
            [](session & s, const py::object & decide) {
                raised_ptr raised;
                std::vector<token_event> events;
                session::decide_fn ask;
                if (!decide.is_none()) {
                    ask = [&](const result & r) -> std::optional<steering> {
                        const py::gil_scoped_acquire acquire;
                        try {
                            const py::object answer =
                                decide(r.id, readings_array(std::vector<float>(r.readings), r.reads.get()));
                            if (answer.is_none()) {
                                return std::nullopt;
                            }
                            const auto parts = answer.cast<std::tuple<mix_list, std::vector<int>, phase_list>>();
                            return to_steering(std::get<0>(parts), std::get<1>(parts), std::get<2>(parts));
                        } catch (py::error_already_set & e) {
                            raised = std::make_unique<py::error_already_set>(e);
                            throw model_error("the decision on a prompt failed");
                        }
                    };
                }
                try {
                    const py::gil_scoped_release release;
                    events = s.step(signal_check(raised), ask);
                } catch (const std::exception &) {
                    if (!raised) {
                        throw;
                    }
                }
                if (raised) {
                    throw py::error_already_set(*raised);
                }
                py::list out;
                for (const token_event & e : events) {
                    out.append(py::make_tuple(e.id, e.token, py::bytes(e.piece), e.logprob, e.top_logprobs));
                }
                return out;
            },
            "decide"_a = py::none(),
            "One decode; [(request id, token, bytes, log p or NaN, [(token, log p)])] sampled by it. "
            "decide(id, readings) is asked once the prompt of a request that `decides` is read: None, or "
            "(mixes, mix_of_token, generated) for its response.")
        .def("take_results",
             [](session & s) {
                 std::vector<result> results;
                 {
                     const py::gil_scoped_release release;
                     results = s.take_results();
                 }
                 py::list out;
                 for (result & r : results) {
                     out.append(to_dict(std::move(r), s.loaded_model()));
                 }
                 return out;
             })
        .def("reset", &session::reset, no_gil)
        .def("keep_prefix", &session::keep_prefix, "n"_a, no_gil,
             "Forget all texts but the first n tokens of the first sequence; False: all is forgotten.")
        .def("detach", &session::detach, no_gil)
        .def(
            "set_taps",
            [](session & s, std::vector<int> pool_layers, int n_pools_per_request, std::vector<int> raw_layers) {
                tap_config c;
                c.pool_layers = std::move(pool_layers);
                const int most = tap_config::max_pools / s.params().n_parallel;
                if (n_pools_per_request > most) {
                    throw vector_error(std::to_string(n_pools_per_request) + " pools of a request are too many, " +
                                       std::to_string(most) + " fit");
                }
                c.n_pools = c.pool_layers.empty() ? 0 : std::max(n_pools_per_request, -1) * s.params().n_parallel;
                c.raw_layers = std::move(raw_layers);
                const py::gil_scoped_release release;
                s.set_taps(std::move(c));
            },
            py::kw_only(), "pool_layers"_a = py::list(), "n_pools_per_request"_a = 1, "raw_layers"_a = py::list())
        .def("add_edit_layers", &session::add_edit_layers, "layers"_a, no_gil)
        .def_property_readonly("n_builds", py::cpp_function(&session::n_builds, no_gil))
        .def_property_readonly("n_attachments", py::cpp_function(&session::n_attachments, no_gil))
        .def_property_readonly("hook_bytes", py::cpp_function(&session::hook_bytes, no_gil))
        .def_static("self_test", &session::self_test, "model"_a.none(false), "n_threads"_a, no_gil,
                    "max |change of logits| that a unit edit at each block makes.");
}
