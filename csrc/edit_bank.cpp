#include "edit_bank.h"

#include "errors.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <map>
#include <string>

namespace personasteer {

int position_in(const std::vector<int> & layers, int il) {
    const auto it = std::lower_bound(layers.begin(), layers.end(), il);
    return it != layers.end() && *it == il ? int(it - layers.begin()) : -1;
}

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

edit_bank::edit_bank(int n_embd_, std::vector<int> layers, int n_rows, int n_columns_)
    : n_embd(n_embd_), rows_max(n_rows), n_columns(n_columns_), edited(std::move(layers)),
      host_rows(size_t(n_rows) * edited.size() * size_t(n_embd_)), host_index(size_t(n_columns_)) {}

size_t edit_bank::bytes() const {
    size_t n = 0;
    for (const device & d : devices) {
        n += ggml_backend_buffer_get_size(d.buffer.get());
    }
    return n;
}

void edit_bank::allocate(const placement & where) {
    std::map<ggml_backend_buffer_type_t, std::vector<int>> by_device;
    for (int il : edited) {
        by_device[where[size_t(il)]].push_back(il);
    }
    std::vector<device> made; // all or none: a failure in between leaves nothing that looks allocated
    for (auto & [buft, layers] : by_device) {
        device d;
        d.layers = std::move(layers);
        d.ctx = make_tensor_context(2);
        d.rows = ggml_new_tensor_3d(d.ctx.get(), GGML_TYPE_F32, n_embd, int64_t(d.layers.size()), rows_max);
        d.index = ggml_new_tensor_1d(d.ctx.get(), GGML_TYPE_I32, n_columns);
        ggml_set_name(d.rows, "persona_rows");
        ggml_set_name(d.index, "persona_index");
        d.buffer = allocate_tensors(d.ctx.get(), buft);
        made.push_back(std::move(d));
    }
    devices = std::move(made);
    for (const device & d : devices) {
        for (int row = 1; row < rows_max; ++row) {
            upload_row(d, row);
        }
        ggml_backend_tensor_set(d.index, host_index.data(), 0, host_index.size() * sizeof(int32_t));
    }
}

void edit_bank::upload_row(const device & d, int row) const {
    const float * src = host_rows.data() + size_t(row) * edited.size() * size_t(n_embd);
    std::vector<float> gathered;
    if (d.layers.size() != edited.size()) { // the device holds some of the blocks only
        for (int il : d.layers) {
            const float * at = src + size_t(position_in(edited, il)) * size_t(n_embd);
            gathered.insert(gathered.end(), at, at + n_embd);
        }
        src = gathered.data();
    }
    ggml_backend_tensor_set(d.rows, src, size_t(row) * d.rows->nb[2], d.rows->nb[2]);
}

void edit_bank::set_row(int row, const mix & m) {
    float * dst = host_rows.data() + size_t(row) * edited.size() * size_t(n_embd);
    std::fill(dst, dst + edited.size() * size_t(n_embd), 0.0f);
    for (size_t i = 0; i < m.layers.size(); ++i) {
        const int at = position_in(edited, m.layers[i]);
        if (at < 0) {
            throw vector_error("block " + std::to_string(m.layers[i]) + " is not in the edited set");
        }
        std::copy_n(m.data.data() + i * size_t(n_embd), n_embd, dst + size_t(at) * size_t(n_embd));
    }
    for (const device & d : devices) {
        upload_row(d, row);
    }
}

void edit_bank::set_index(const std::vector<int32_t> & row_of_token) {
    std::copy(row_of_token.begin(), row_of_token.end(), host_index.begin());
    for (const device & d : devices) {
        ggml_backend_tensor_set(d.index, row_of_token.data(), 0, row_of_token.size() * sizeof(int32_t));
    }
}

ggml_tensor * edit_bank::edit(ggml_context * ctx, int il, ggml_tensor * h, const graph_inputs & in) const {
    for (const device & d : devices) {
        const int at = position_in(d.layers, il);
        if (at < 0) {
            continue;
        }
        ggml_tensor * rows = ggml_view_2d(ctx, d.rows, n_embd, rows_max, d.rows->nb[2], size_t(at) * d.rows->nb[1]);
        ggml_tensor * index = ggml_view_2d(ctx, d.index, 1, in.n_tokens, d.index->nb[0], 0);
        if (h->ne[1] != in.n_tokens) { // the last block keeps only the tokens with outputs
            index = ggml_get_rows(ctx, index, in.out_ids);
        }
        // made for the biases of experts: each token, with one expert, adds the row that its index names
        ggml_tensor * tokens = ggml_view_3d(ctx, h, n_embd, 1, h->ne[1], h->nb[1], h->nb[1], 0);
        return ggml_reshape_2d(ctx, ggml_add_id(ctx, tokens, rows, index), n_embd, h->ne[1]);
    }
    throw model_error("block " + std::to_string(il) + " has no place in the edit bank");
}

} // namespace personasteer
