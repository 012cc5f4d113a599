#include "errors.h"
#include "log_capture.h"
#include "model.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

namespace py = pybind11;
using namespace py::literals;
using personasteer::model;

// for calls of llama.cpp that Python makes itself
struct kept_log {
    std::unique_ptr<personasteer::log_capture> log;
};

void bind_model(py::module_ & m) {
    py::class_<kept_log>(m, "LogCapture", "Within the block, what llama.cpp logs on this thread is kept.")
        .def(py::init<>())
        .def("__enter__",
             [](kept_log & s) -> kept_log & {
                 s.log.reset(); // captures nest: the older one goes first
                 s.log = std::make_unique<personasteer::log_capture>();
                 return s;
             })
        .def("__exit__", [](kept_log & s, const py::args &) { s.log.reset(); })
        .def("errors", [](const kept_log & s) { return py::bytes(s.log ? s.log->errors() : ""); });

    // freeing a model may wait for a thread of llama.cpp's, whose log messages go to Python
    py::class_<model, std::shared_ptr<model>>(m, "Model", py::release_gil_before_calling_cpp_dtor(),
                                              "A loaded GGUF file.")
        .def(py::init([](const std::string & path, int n_gpu_layers, bool use_mmap, bool use_extra_bufts,
                         const std::vector<std::string> & rpc) {
                 personasteer::model_params p;
                 p.n_gpu_layers = n_gpu_layers;
                 p.use_mmap = use_mmap;
                 p.use_extra_bufts = use_extra_bufts;
                 p.rpc = rpc;
                 const py::gil_scoped_release release;
                 return std::make_shared<model>(path, p);
             }),
             "path"_a, "n_gpu_layers"_a = 0, "use_mmap"_a = true, "use_extra_bufts"_a = true,
             "rpc"_a = std::vector<std::string>())
        .def_static(
            "borrow",
            [](uintptr_t handle) {
                if (handle == 0) {
                    throw personasteer::model_error("there is no model to borrow");
                }
                return std::make_shared<model>(reinterpret_cast<llama_model *>(handle));
            },
            "handle"_a, "A llama_model of somebody else's, who keeps it alive.")
        .def_property_readonly("n_layer", &model::n_layer)
        .def_property_readonly("n_embd", &model::n_embd)
        .def_property_readonly("n_vocab", &model::n_vocab)
        .def_property_readonly("n_params", [](const model & s) { return llama_model_n_params(s.get()); })
        .def_property_readonly("n_bytes", [](const model & s) { return llama_model_size(s.get()); })
        .def_property_readonly("n_ctx_train", &model::n_ctx_train)
        .def_property_readonly("description", [](const model & s) { return py::bytes(s.description()); })
        .def_property_readonly("chat_template", [](const model & s) { return py::bytes(s.chat_template()); })
        .def_property_readonly("metadata",
                               [](const model & s) {
                                   py::dict out;
                                   for (const auto & [k, v] : s.metadata()) {
                                       out[py::bytes(k)] = py::bytes(v);
                                   }
                                   return out;
                               })
        .def(
            "tokenize",
            [](const model & s, const std::string & text, bool add_special, bool parse_special) {
                const py::gil_scoped_release release;
                return s.tokenize(text, add_special, parse_special);
            },
            "text"_a, "add_special"_a, "parse_special"_a)
        .def(
            "piece", [](const model & s, int token, bool special) { return py::bytes(s.piece(token, special)); },
            "token"_a, "special"_a = false, "The bytes of one token; control tokens are empty unless `special`.")
        .def(
            "add_adapter",
            [](model & s, const std::string & path, float scale) {
                const py::gil_scoped_release release;
                s.add_adapter(path, scale);
            },
            "path"_a, "scale"_a, "A LoRA GGUF that every context made afterwards applies.")
        .def("is_end", &model::is_end, "token"_a)
        .def("control_tokens", &model::control_tokens)
        .def_property_readonly("bos", [](const model & s) { return llama_vocab_bos(s.vocab()); })
        .def_property_readonly("eos", [](const model & s) { return llama_vocab_eos(s.vocab()); });
}
