#pragma once

#include "ggml.h"

#include <string>
#include <vector>

namespace personasteer {

ggml_type type_named(const std::string & name); // ggml's own names: "q4_K", "f16", ...

// Whole rows of a tensor, from any type that ggml reads to float32 and back to any that it writes.
std::vector<float> dequantize(ggml_type type, const std::string & data, int64_t n_per_row);
// importance: [n_per_row] weights of the columns, or empty. Throws where the type cannot be written, needs
// importances, or a number is not finite.
std::string quantize(ggml_type type, const float * data, int64_t n_rows, int64_t n_per_row,
                     const std::vector<float> & importance);

} // namespace personasteer
