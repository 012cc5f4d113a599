#include <pybind11/pybind11.h>

#include "errors.h"
#include "fatal.h"
#include "log_capture.h"

#include "ggml-rpc.h"
#include "llama.h"

#include <utility>

namespace py = pybind11;

void bind_gguf(py::module_ & m);
void bind_model(py::module_ & m);
void bind_session(py::module_ & m);
void bind_attachment(py::module_ & m);

PYBIND11_MODULE(_core, m) {
    m.doc() = "Steering and capture inside llama.cpp's compute graph; used through the Python layer.";
    m.attr("HAS_RPC") = llama_supports_rpc();
    m.attr("RPC_VERSION") = py::make_tuple(RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION);
    m.attr("LLAMA_CPP_PYTHON") = PERSONASTEER_LLAMA_CPP_PYTHON; // the version that this was built against

    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) {
                std::rethrow_exception(std::move(p));
            }
        } catch (const personasteer::error & e) {
            // the text may quote the file, whose bytes need not be UTF-8
            const auto text = py::bytes(e.what()).attr("decode")("utf-8", "replace");
            PyErr_SetObject(py::module_::import("personasteer.errors").attr(e.name).ptr(), text.ptr());
        }
    });
    m.def("end_in_one_line", &personasteer::end_in_one_line,
          "End with a line and exit code 1 where a mapped file is cut short or llama.cpp gives up.");
    llama_backend_init();
    personasteer::log_capture::install();
    bind_gguf(m);
    bind_model(m);
    bind_session(m);
    bind_attachment(m);
}
