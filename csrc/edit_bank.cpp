#include "edit_bank.h"

#include "edit_kernel.h"
#include "errors.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

namespace personasteer {

edit_bank::edit_bank(int n_embd_, std::vector<int> layers, int n_columns_, const edit_capacity & capacity,
                     bool native_on_cpu_)
    : n_embd(n_embd_), n_columns(n_columns_), edited(std::move(layers)), tables(capacity),
      native_on_cpu(native_on_cpu_), host_tokens(size_t(n_columns_)) {}

size_t edit_bank::bytes() const {
    size_t n = host_tokens.size() * sizeof(token_edit);
    for (const auto & d : devices) {
        n += d->bytes();
    }
    return n;
}

void edit_bank::allocate(const placement & where) {
    std::map<ggml_backend_buffer_type_t, std::vector<int>> by_device;
    std::deque<site> on_cpu;
    for (int il : edited) {
        ggml_backend_buffer_type_t buft = where[size_t(il)];
        if (buft == ggml_backend_cpu_buffer_type() && !native_on_cpu) {
            on_cpu.push_back({this, il});
        } else {
            by_device[buft].push_back(il);
        }
    }
    std::vector<std::unique_ptr<device_edit>> made; // all or none: a failure leaves nothing that looks allocated
    for (auto & [buft, layers] : by_device) {
        made.push_back(std::make_unique<device_edit>(n_embd, std::move(layers), n_columns, tables, buft));
    }
    devices = std::move(made);
    sites = std::move(on_cpu);
    placed = true;
    for (const auto & d : devices) {
        d->set_tokens(host_tokens);
    }
}

void edit_bank::set_tokens(const std::vector<token_edit> & tokens) {
    std::copy(tokens.begin(), tokens.end(), host_tokens.begin());
    std::fill(host_tokens.begin() + std::ptrdiff_t(tokens.size()), host_tokens.end(), token_edit());
    for (const auto & d : devices) {
        d->set_tokens(host_tokens);
    }
}

void edit_bank::read_back(const std::vector<token_edit> & tokens, const std::vector<int> & output_of_token) {
    for (const auto & d : devices) {
        d->read_back(tokens, output_of_token);
    }
}

void edit_bank::no_rows(int il) {
    for (const auto & d : devices) {
        if (position_in(d->layers(), il) >= 0) {
            d->set_cut(il, true);
        }
    }
}

int edit_bank::nodes_per_layer() const {
    const bool all_fused = devices.empty() && placed;
    return all_fused ? 2 : device_edit::nodes_per_layer;
}

static float * row_of(const ggml_tensor * t, int64_t row) {
    return reinterpret_cast<float *>(static_cast<char *>(t->data) + size_t(row) * t->nb[1]);
}

// src[0] is h, or with `sum` src[0] + src[1] is; where the block keeps only the tokens with an output row, the one
// behind says which these are
template <bool sum> void edit_bank::fused(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto * s = static_cast<const site *>(userdata);
    const ggml_tensor * h = dst->src[0];
    const ggml_tensor * out_ids = dst->src[sum ? 2 : 1];
    const bool in_place = dst->data == h->data;
    for (int64_t row = ith; row < dst->ne[1]; row += nth) {
        float * x = row_of(dst, row);
        const float * from = row_of(h, row);
        if (sum) {
            const float * other = row_of(dst->src[1], row);
            for (int64_t i = 0; i < dst->ne[0]; ++i) {
                x[i] = from[i] + other[i];
            }
        } else if (!in_place) {
            std::memcpy(x, from, size_t(dst->ne[0]) * sizeof(float));
        }
        const int64_t column = out_ids ? static_cast<const int32_t *>(out_ids->data)[row] : row;
        const token_edit & t = s->bank->host_tokens[size_t(column)];
        if (t.reads) {
            if (const int at = position_in(t.reads->layers, s->il); at >= 0) {
                const int n = t.reads->n;
                const size_t first = size_t(at) * size_t(n);
                read_token(t.reads->directions.data() + first * size_t(dst->ne[0]), n, int(dst->ne[0]), x,
                           t.readings + first);
            }
        }
        if (t.edit) {
            edit_token(*t.edit, s->il, t.j, x);
        }
    }
}

// h = a + b, row by row, and nobody outside the graph reads it
static bool is_plain_sum(const ggml_tensor * h) {
    if (h->op != GGML_OP_ADD || (h->flags & GGML_TENSOR_FLAG_OUTPUT)) {
        return false;
    }
    return std::all_of(h->src, h->src + 2, [h](const ggml_tensor * part) {
        return part->type == GGML_TYPE_F32 && part->nb[0] == sizeof(float) && ggml_are_same_shape(part, h);
    });
}

ggml_tensor * edit_bank::edit(ggml_context * ctx, int il, ggml_tensor * h, bool in_place, const graph_inputs & in,
                              std::vector<ggml_tensor *> & ends) {
    for (site & s : sites) {
        if (s.il != il) {
            continue;
        }
        const int cut = h->ne[1] != in.n_tokens ? 1 : 0;
        if (in_place && is_plain_sum(h)) { // a node and a meeting of the threads less
            ggml_tensor * args[3] = {h->src[0], h->src[1], in.out_ids};
            return ggml_custom_4d(ctx, GGML_TYPE_F32, h->ne[0], h->ne[1], 1, 1, args, 2 + cut, fused<true>,
                                  GGML_N_TASKS_MAX, &s);
        }
        ggml_tensor * args[2] = {h, in.out_ids};
        if (in_place) {
            return ggml_custom_inplace(ctx, h, args + 1, cut, fused<false>, GGML_N_TASKS_MAX, &s);
        }
        return ggml_custom_4d(ctx, GGML_TYPE_F32, h->ne[0], h->ne[1], 1, 1, args, 1 + cut, fused<false>,
                              GGML_N_TASKS_MAX, &s);
    }
    for (const auto & d : devices) {
        if (position_in(d->layers(), il) >= 0) {
            return d->edit(ctx, il, h, in, ends);
        }
    }
    throw model_error("block " + std::to_string(il) + " has no place in the edit bank");
}

} // namespace personasteer
