#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace personasteer {

// The buffer type of the device that each block runs on, by block index.
using placement = std::vector<ggml_backend_buffer_type_t>;

// The leaves of one graph build that an edit may need.
struct graph_inputs {
    int64_t n_tokens = 0;
    ggml_tensor * out_ids = nullptr; // I32 [n_outputs]: which tokens have an output row
};

// A ggml context for n tensors without data.
ggml_context_ptr make_tensor_context(size_t n);

// Gives the context's tensors memory on a device, zeroed, outside the scheduler's reach. Throws when there is none.
ggml_backend_buffer_ptr allocate_tensors(ggml_context * ctx, ggml_backend_buffer_type_t buft);

} // namespace personasteer
