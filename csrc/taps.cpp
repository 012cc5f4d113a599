#include "taps.h"

#include <algorithm>
#include <map>

namespace personasteer {

static constexpr int pools_at_once = 3; // CUDA multiplies more columns at a time in TF32

taps::taps(int n_embd_, tap_config config, int n_columns_)
    : n_embd(n_embd_), cfg(std::move(config)), n_columns(n_columns_) {}

size_t taps::bytes() const {
    size_t n = 0;
    for (const device & d : devices) {
        n += ggml_backend_buffer_get_size(d.buffer.get());
    }
    return n;
}

int taps::nodes_per_layer() const {
    constexpr int once = 8;
    const bool all_on_cpu =
        !devices.empty() && std::all_of(devices.begin(), devices.end(), [](const device & d) { return d.is_cpu; });
    return all_on_cpu ? once : once + 4 * ((cfg.n_pools + pools_at_once - 1) / pools_at_once);
}

void taps::allocate(const placement & where) {
    std::map<ggml_backend_buffer_type_t, device> by_device;
    for (int il : cfg.pool_layers) {
        by_device[where[size_t(il)]].pool_layers.push_back(il);
    }
    for (int il : cfg.raw_layers) {
        by_device[where[size_t(il)]].raw_layers.push_back(il);
    }
    std::vector<device> made; // all or none: a failure in between leaves nothing that looks allocated
    for (auto & [buft, d] : by_device) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        d.is_cpu = !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
        d.ctx = make_tensor_context(3);
        ggml_context * ctx = d.ctx.get();
        if (const auto n = int64_t(d.pool_layers.size())) {
            d.pool_weights = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, cfg.n_pools, n_columns);
            d.pooled = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd, cfg.n_pools, n);
            d.pooled_host.resize(size_t(n_embd) * size_t(cfg.n_pools) * size_t(n));
        }
        if (const auto n = int64_t(d.raw_layers.size())) {
            d.raw = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd, n_columns, n);
        }
        d.buffer = allocate_tensors(ctx, buft);
        made.push_back(std::move(d));
    }
    devices = std::move(made);
    if (!host_pool_weights.empty()) {
        set_pool_weights(host_pool_weights);
    }
}

void taps::set_pool_weights(const std::vector<float> & weights) {
    if (devices.empty()) {
        host_pool_weights = weights;
    }
    for (const device & d : devices) {
        if (d.pool_weights) {
            ggml_backend_tensor_set(d.pool_weights, weights.data(), 0, weights.size() * sizeof(float));
        }
    }
}

void taps::read_pooled() {
    for (device & d : devices) {
        if (d.pooled) {
            ggml_backend_tensor_get(d.pooled, d.pooled_host.data(), 0, d.pooled_host.size() * sizeof(float));
        }
    }
}

const float * taps::pooled(int il, int column) const {
    for (const device & d : devices) {
        const int at = position_in(d.pool_layers, il);
        if (at >= 0) {
            return d.pooled_host.data() + (size_t(at) * size_t(cfg.n_pools) + size_t(column)) * size_t(n_embd);
        }
    }
    return nullptr;
}

void taps::read_raw(int il, int column, int n, float * dst) const {
    for (const device & d : devices) {
        const int at = position_in(d.raw_layers, il);
        if (at < 0) {
            continue;
        }
        ggml_backend_tensor_get(d.raw, dst, size_t(at) * d.raw->nb[2] + size_t(column) * d.raw->nb[1],
                                size_t(n) * d.raw->nb[1]);
    }
}

void taps::set_cut(int il, bool cut) {
    if (cut) {
        cut_blocks.insert(il);
    } else {
        cut_blocks.erase(il);
    }
}

void taps::new_graph() {
    for (device & d : devices) {
        d.weights_all = d.weights_out = nullptr;
    }
}

// The tokens' weights for the rows of x: [n_pools, rows] on the CPU, transposed elsewhere.
ggml_tensor * taps::pool_weights_for(ggml_context * ctx, device & d, int64_t n_columns_here, const graph_inputs & in) {
    const bool cut = n_columns_here != in.n_tokens;
    ggml_tensor *& cached = cut ? d.weights_out : d.weights_all;
    if (!cached) {
        ggml_tensor * w = ggml_view_2d(ctx, d.pool_weights, cfg.n_pools, in.n_tokens, d.pool_weights->nb[1], 0);
        if (cut) {
            w = ggml_get_rows(ctx, w, in.out_ids);
        }
        cached = d.is_cpu ? w : transposed(ctx, w);
    }
    return cached;
}

// CUDA sums products of odd length in TF32; a zero at the end keeps them float32.
ggml_tensor * taps::transposed(ggml_context * ctx, ggml_tensor * t) {
    t = ggml_cont(ctx, ggml_transpose(ctx, t));
    return t->ne[0] % 2 == 0 ? t : ggml_pad(ctx, t, 1, 0, 0, 0);
}

// The pools of one block: x [n_embd, rows] times the weights of its rows.
void taps::pool(ggml_context * ctx, device & d, int at, ggml_tensor * x, const graph_inputs & in,
                std::vector<ggml_tensor *> & ends) {
    const auto dst = [&](int first, int n) {
        return ggml_view_2d(ctx, d.pooled, n_embd, n, d.pooled->nb[1],
                            size_t(at) * d.pooled->nb[2] + size_t(first) * d.pooled->nb[1]);
    };
    if (keeps_rows(in.n_tokens)) {
        ends.push_back(ggml_cpy(ctx, x, dst(0, int(x->ne[1]))));
        return;
    }
    ggml_tensor * w = pool_weights_for(ctx, d, x->ne[1], in);
    if (d.is_cpu) { // reads the rows where they stand; an op that not every device has
        ends.push_back(ggml_cpy(ctx, ggml_out_prod(ctx, x, w), dst(0, cfg.n_pools)));
        return;
    }
    ggml_tensor * xt = transposed(ctx, x);
    for (int s = 0; s < cfg.n_pools; s += pools_at_once) {
        const int n = std::min(pools_at_once, cfg.n_pools - s);
        ggml_tensor * ws = ggml_view_2d(ctx, w, w->ne[0], n, w->nb[1], size_t(s) * w->nb[1]);
        ends.push_back(ggml_cpy(ctx, ggml_mul_mat(ctx, xt, ws), dst(s, n)));
    }
}

std::vector<ggml_tensor *> taps::tap(ggml_context * ctx, int il, ggml_tensor * x, const graph_inputs & in) {
    if (x->ne[1] != in.n_tokens) {
        set_cut(il, true);
    } else if (in.out_ids && in.out_ids->ne[0] < in.n_tokens) {
        set_cut(il, false);
    }
    std::vector<ggml_tensor *> ends;
    for (device & d : devices) {
        if (const int at = position_in(d.pool_layers, il); at >= 0) {
            pool(ctx, d, at, x, in, ends);
        }
        if (const int at = position_in(d.raw_layers, il); at >= 0) {
            ggml_tensor * dst = ggml_view_2d(ctx, d.raw, n_embd, x->ne[1], d.raw->nb[1], size_t(at) * d.raw->nb[2]);
            ends.push_back(ggml_cpy(ctx, x, dst));
        }
    }
    return ends;
}

} // namespace personasteer
