#include "arrays.h"
#include "attachment.h"
#include "errors.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace py::literals;
using namespace personasteer;

void bind_attachment(py::module_ & m) {
    py::class_<attachment>(m, "Attachment", py::release_gil_before_calling_cpp_dtor(),
                           "The hook in a llama.cpp context of somebody else's.")
        .def(py::init([](uintptr_t ctx) {
                 if (ctx == 0) {
                     throw model_error("there is no context to attach to");
                 }
                 return std::make_unique<attachment>(reinterpret_cast<llama_context *>(ctx));
             }),
             "context"_a)
        .def(
            "arm",
            [](attachment & s, const std::vector<int> & tokens, const std::vector<int> & positions,
               const std::vector<int> & slots, const std::vector<std::shared_ptr<mix>> & mixes,
               const std::vector<int> & mix_of_token, const std::vector<int> & j,
               const std::shared_ptr<readout> & reads) {
                const size_t n = positions.size();
                if ((!tokens.empty() && tokens.size() != n) || slots.size() != n || mix_of_token.size() != n ||
                    j.size() != n) {
                    throw vector_error("arm needs one entry for each token");
                }
                std::vector<attachment::token> all(n);
                for (size_t i = 0; i < n; ++i) {
                    all[i].id = tokens.empty() ? 0 : tokens[i];
                    all[i].position = positions[i];
                    all[i].slot = slots[i];
                    all[i].j = j[i];
                    if (mix_of_token[i] >= 0) {
                        all[i].edit = mixes.at(size_t(mix_of_token[i]));
                    }
                }
                const py::gil_scoped_release release;
                s.arm(std::move(all), tokens.empty(), reads);
            },
            py::kw_only(), "tokens"_a, "positions"_a, "slots"_a, "mixes"_a, "mix_of_token"_a, "j"_a,
            "reads"_a = py::none(), "Before a decode: what its tokens get. No tokens: embeddings were given.")
        .def(
            "finish",
            [](attachment & s) {
                std::vector<float> readings;
                {
                    const py::gil_scoped_release release;
                    readings = s.finish();
                }
                const auto n = py::ssize_t(readings.size());
                return to_array(std::move(readings), {n});
            },
            "After a decode: what was read, flat (tokens, layers, directions).");
}
