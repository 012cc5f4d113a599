#include "errors.h"
#include "session.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

namespace py = pybind11;
using namespace py::literals;
using namespace personasteer;

// Hands a vector over to NumPy without a copy.
template <typename T> static py::array_t<T> to_array(std::vector<T> && data, std::vector<py::ssize_t> shape) {
    auto * owned = new std::vector<T>(std::move(data));
    const py::capsule free(owned, [](void * p) { delete static_cast<std::vector<T> *>(p); });
    return py::array_t<T>(std::move(shape), owned->data(), free);
}

using float_array = py::array_t<float, py::array::c_style | py::array::forcecast>;

static std::vector<float> to_vector(const float_array & a) { return {a.data(), a.data() + a.size()}; }

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
    const auto n_reading_layers = py::ssize_t(taps.reading_layers.size());
    const auto per_token = n_reading_layers * taps.n_readouts;
    const auto n_read = per_token ? py::ssize_t(r.readings.size()) / per_token : 0;
    d["readings"] = to_array(std::move(r.readings), {n_read, n_reading_layers, taps.n_readouts});
    return d;
}

void bind_session(py::module_ & m) {
    py::class_<mix, std::shared_ptr<mix>>(m, "Mix", "Rows added to the residual stream: (n_layers, n_embd) float32.")
        .def(py::init([](uint64_t key, std::vector<int> layers, const float_array & data) {
                 auto out = std::make_shared<mix>();
                 out->key = key;
                 out->layers = std::move(layers);
                 out->data = to_vector(data);
                 return out;
             }),
             "key"_a, "layers"_a, "data"_a)
        .def_readonly("key", &mix::key)
        .def_readonly("layers", &mix::layers);

    // Every call lets go of the GIL before it takes the session's lock: a step under way may need the GIL for signals.
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<session>(m, "Session", "Many requests over one llama.cpp context.")
        .def(py::init([](std::shared_ptr<model> mdl, int n_ctx, int n_parallel, int n_batch, int n_threads,
                         int n_outputs, bool hook) {
                 session_params p;
                 p.n_ctx = n_ctx;
                 p.n_parallel = n_parallel;
                 p.n_batch = n_batch;
                 p.n_threads = n_threads;
                 p.n_outputs = n_outputs;
                 p.hook = hook;
                 const py::gil_scoped_release release;
                 return std::make_unique<session>(std::move(mdl), p);
             }),
             "model"_a, "n_ctx"_a, "n_parallel"_a, "n_batch"_a, "n_threads"_a, "n_outputs"_a, "hook"_a = true)
        .def(
            "submit",
            [](session & s, std::vector<llama_token> tokens, const std::vector<std::shared_ptr<mix>> & mixes,
               std::vector<int> mix_of_token, int mix_of_generated, int max_tokens, float temperature, int top_k,
               float top_p, float min_p, float repeat_penalty, uint32_t seed, const std::vector<py::bytes> & stop,
               std::pair<int, int> outputs, bool keep_logits, bool keep_scores,
               const std::vector<std::pair<int, int>> & pools, const std::vector<std::pair<int, int>> & raws,
               bool keep_readings, bool reuse_prefix, bool ignore_end) {
                request r;
                r.tokens = std::move(tokens);
                r.mixes.assign(mixes.begin(), mixes.end());
                r.mix_of_token = std::move(mix_of_token);
                r.mix_of_generated = mix_of_generated;
                r.max_tokens = max_tokens;
                r.sampling.temperature = temperature;
                r.sampling.top_k = top_k;
                r.sampling.top_p = top_p;
                r.sampling.min_p = min_p;
                r.sampling.repeat_penalty = repeat_penalty;
                r.sampling.seed = seed;
                for (const py::bytes & text : stop) {
                    r.stop.push_back(text);
                }
                r.outputs = {outputs.first, outputs.second};
                r.keep_logits = keep_logits;
                r.keep_scores = keep_scores;
                for (const auto & [begin, end] : pools) {
                    r.pools.push_back({begin, end});
                }
                for (const auto & [begin, end] : raws) {
                    r.raws.push_back({begin, end});
                }
                r.keep_readings = keep_readings;
                r.reuse_prefix = reuse_prefix;
                r.ignore_end = ignore_end;
                const py::gil_scoped_release release;
                return s.submit(std::move(r));
            },
            py::kw_only(), "tokens"_a, "mixes"_a = py::list(), "mix_of_token"_a = py::list(), "mix_of_generated"_a = -1,
            "max_tokens"_a = 0, "temperature"_a = 0.0f, "top_k"_a = 40, "top_p"_a = 0.95f, "min_p"_a = 0.05f,
            "repeat_penalty"_a = 1.0f, "seed"_a = 0, "stop"_a = py::list(), "outputs"_a = std::pair<int, int>(0, 0),
            "keep_logits"_a = false, "keep_scores"_a = false, "pools"_a = py::list(), "raws"_a = py::list(),
            "keep_readings"_a = false, "reuse_prefix"_a = false, "ignore_end"_a = false)
        .def("cancel", &session::cancel, "id"_a, no_gil)
        .def_property_readonly("busy", py::cpp_function(&session::busy, no_gil))
        .def(
            "step",
            [](session & s) {
                raised_ptr raised;
                std::vector<token_event> events;
                try {
                    const py::gil_scoped_release release;
                    events = s.step(signal_check(raised));
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
                    out.append(py::make_tuple(e.id, e.token, py::bytes(e.piece)));
                }
                return out;
            },
            "One decode; [(request id, token, bytes)] sampled by it.")
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
        .def("detach", &session::detach, no_gil)
        .def(
            "set_taps",
            [](session & s, std::vector<int> pool_layers, int n_pools_per_request, std::vector<int> raw_layers,
               std::vector<int> reading_layers, const py::object & readouts) {
                tap_config c;
                c.pool_layers = std::move(pool_layers);
                c.n_pools = c.pool_layers.empty() ? 0 : n_pools_per_request * s.params().n_parallel;
                c.raw_layers = std::move(raw_layers);
                c.reading_layers = std::move(reading_layers);
                std::vector<float> directions;
                if (!readouts.is_none()) {
                    const auto array = float_array::ensure(readouts); // (n_reading_layers, n_readouts, n_embd)
                    if (!array || array.ndim() != 3) {
                        throw vector_error("readouts must have three dimensions");
                    }
                    c.n_readouts = int(array.shape(1));
                    directions = to_vector(array);
                }
                const py::gil_scoped_release release;
                s.set_taps(std::move(c), std::move(directions));
            },
            py::kw_only(), "pool_layers"_a = py::list(), "n_pools_per_request"_a = 1, "raw_layers"_a = py::list(),
            "reading_layers"_a = py::list(), "readouts"_a = py::none())
        .def("add_edit_layers", &session::add_edit_layers, "layers"_a, no_gil)
        .def_property_readonly("n_builds", py::cpp_function(&session::n_builds, no_gil))
        .def_property_readonly("n_attachments", py::cpp_function(&session::n_attachments, no_gil))
        .def_property_readonly("hook_bytes", py::cpp_function(&session::hook_bytes, no_gil))
        .def_static("self_test", &session::self_test, "model"_a, "n_threads"_a, no_gil,
                    "max |change of logits| that a unit edit at each block makes.");
}
