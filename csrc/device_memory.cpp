#include "device_memory.h"

#include "errors.h"

#include "ggml-alloc.h"

#include <string>

namespace personasteer {

ggml_context_ptr make_tensor_context(size_t n) {
    ggml_init_params params{};
    params.mem_size = n * ggml_tensor_overhead();
    params.no_alloc = true;
    return ggml_context_ptr(ggml_init(params));
}

ggml_backend_buffer_ptr allocate_tensors(ggml_context * ctx, ggml_backend_buffer_type_t buft) {
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
    if (!buffer) {
        throw model_error("not enough memory on " + std::string(ggml_backend_buft_name(buft)) + " for " +
                          std::to_string(ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, buft) >> 20) +
                          " MiB of steering and capture buffers");
    }
    // WEIGHTS keeps the scheduler from copying or reusing it and pulls the ops that read it to this device.
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(buffer.get(), 0);
    return buffer;
}

} // namespace personasteer
