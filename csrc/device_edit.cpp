#include "device_edit.h"

#include "errors.h"

#include <algorithm>
#include <cfloat>

namespace personasteer {

static int step_for(int n) {
    int step = n > 0 ? 1 : 0;
    while (step < n) {
        step *= 2;
    }
    return step;
}

// Gated terms take columns; ungated additions are summed on the host into one row.
static bool takes_column(const edit_term & t) { return t.at == edit_term::window || t.gate >= 0; }

bool edit_capacity::grow(const mix & m) {
    const edit_capacity before = *this;
    for (int il : m.layers()) {
        std::array<int, 3> n{};
        for (const edit_term & t : *m.at(il)) {
            turns = turns || t.at == edit_term::turn;
            gated_windows = gated_windows || (t.at == edit_term::window && t.gate >= 0);
            n[size_t(t.at)] += takes_column(t);
        }
        for (size_t s = 0; s < n.size(); ++s) {
            terms[s] = std::max(terms[s], step_for(n[s]));
        }
    }
    return turns != before.turns || terms != before.terms || gated_windows != before.gated_windows;
}

bool edit_capacity::grow(const readout & r) {
    const int before = readouts;
    readouts = std::max(readouts, step_for(r.n));
    return readouts != before;
}

device_edit::device_edit(int n_embd_, std::vector<int> layers, int n_columns_, const edit_capacity & capacity,
                         ggml_backend_buffer_type_t buft)
    : n_embd(n_embd_), n_columns(n_columns_), n_rows(1 + edit_capacity::mixes_per_slot * capacity.n_slots),
      edited(std::move(layers)), cap(capacity), residents(size_t(n_rows)), slot_reads(size_t(cap.n_slots)) {
    const auto n_layers = int64_t(edited.size());
    ctx = make_tensor_context(5 + 4 * stages.size());
    ggml_context * c = ctx.get();
    index = ggml_new_tensor_1d(c, GGML_TYPE_I32, n_columns);
    rows = ggml_new_tensor_3d(c, GGML_TYPE_F32, n_embd, n_layers, n_rows);
    if (cap.turns) {
        turn_rows = ggml_new_tensor_3d(c, GGML_TYPE_F32, n_embd, n_layers, n_rows);
    }
    for (size_t i = 0; i < stages.size(); ++i) {
        stage & s = stages[i];
        s.per_mix = cap.terms[i];
        s.n_all = s.per_mix * (n_rows - 1);
        s.gated = i != edit_term::window || cap.gated_windows;
        if (s.n_all == 0) {
            continue;
        }
        s.writes = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.n_all, n_embd, n_layers);
        s.writes_mirror.resize(size_t(ggml_nelements(s.writes)));
        s.numbers = ggml_new_tensor_3d(c, GGML_TYPE_F32, int64_t(n_numbers) * s.n_all, n_layers, n_rows);
        if (i == edit_term::window) {
            s.reads = ggml_new_tensor_3d(c, GGML_TYPE_F32, n_embd, s.n_all, n_layers);
        }
        if (s.gated) {
            s.gates = ggml_new_tensor_3d(c, GGML_TYPE_F32, n_embd, s.n_all, n_layers);
        }
    }
    if (cap.readouts > 0) {
        const int n = cap.readouts * cap.n_slots;
        directions = ggml_new_tensor_3d(c, GGML_TYPE_F32, n_embd, n, n_layers);
        readings = ggml_new_tensor_3d(c, GGML_TYPE_F32, n, n_columns, n_layers);
    }
    buffer = allocate_tensors(c, buft);
}

void device_edit::upload(int row, const mix & m, int j) {
    const auto width = size_t(n_embd);
    std::vector<float> sum(edited.size() * width), turned(sum.size());
    std::array<std::vector<float>, 3> numbers;
    for (size_t i = 0; i < stages.size(); ++i) {
        const stage & s = stages[i];
        const auto n_all = size_t(s.n_all);
        numbers[i].assign(edited.size() * n_numbers * n_all, 0.0f); // share 0: closed
        for (size_t at = 0; at < edited.size(); ++at) {
            float * of_layer = numbers[i].data() + at * n_numbers * n_all;
            std::fill_n(of_layer + lo * n_all, n_all, -FLT_MAX);
            std::fill_n(of_layer + hi * n_all, n_all, FLT_MAX);
        }
    }
    for (size_t at = 0; at < edited.size(); ++at) {
        const std::vector<edit_term> * terms = m.at(edited[at]);
        if (!terms) {
            continue;
        }
        std::array<int, 3> n_used{};
        for (const edit_term & t : *terms) {
            const float strength = t.share * t.fade(j);
            const float * w = m.vector(t.write);
            if (!takes_column(t)) {
                float * into = (t.at == edit_term::turn ? turned : sum).data() + at * width;
                for (size_t k = 0; k < width; ++k) {
                    into[k] += strength * w[k];
                }
                continue;
            }
            stage & s = stages[size_t(t.at)];
            const auto n_all = size_t(s.n_all);
            const size_t column = size_t(row - 1) * size_t(s.per_mix) + size_t(n_used[size_t(t.at)]++);
            float * of_layer = numbers[size_t(t.at)].data() + at * n_numbers * n_all;
            of_layer[share * n_all + column] = strength;
            // an ungated column reads 0 from a gate of zeros, which is above -1
            of_layer[gate_at * n_all + column] = t.gate >= 0 ? t.gate_at : -1.0f;
            of_layer[gate_sign * n_all + column] = t.gate >= 0 ? t.gate_sign : 1.0f;
            float * writes = s.writes_mirror.data() + at * width * n_all;
            for (size_t k = 0; k < width; ++k) {
                writes[k * n_all + column] = w[k];
            }
            const auto set = [&](ggml_tensor * to, const float * vector) {
                ggml_backend_tensor_set(to, vector, at * to->nb[2] + column * to->nb[1], width * sizeof(float));
            };
            if (t.at == edit_term::window) {
                of_layer[lo * n_all + column] = t.lo;
                of_layer[hi * n_all + column] = t.hi;
                set(s.reads, m.vector(t.read));
            }
            if (s.gated) {
                const std::vector<float> none(t.gate >= 0 ? 0 : width);
                set(s.gates, t.gate >= 0 ? m.vector(t.gate) : none.data());
            }
        }
    }
    ggml_backend_tensor_set(rows, sum.data(), size_t(row) * rows->nb[2], rows->nb[2]);
    if (turn_rows) {
        ggml_backend_tensor_set(turn_rows, turned.data(), size_t(row) * turn_rows->nb[2], turn_rows->nb[2]);
    }
    for (size_t i = 0; i < stages.size(); ++i) {
        if (stages[i].numbers) {
            ggml_tensor * to = stages[i].numbers;
            ggml_backend_tensor_set(to, numbers[i].data(), size_t(row) * to->nb[2], to->nb[2]);
            ggml_backend_tensor_set(stages[i].writes, stages[i].writes_mirror.data(), 0, ggml_nbytes(stages[i].writes));
        }
    }
}

int device_edit::row_for(const token_edit & t) {
    if (!t.edit) {
        return 0;
    }
    const uint64_t key = t.edit->key_at(t.j);
    const int first = 1 + t.slot * edit_capacity::mixes_per_slot;
    int oldest = first;
    for (int row = first; row < first + edit_capacity::mixes_per_slot; ++row) {
        if (residents[size_t(row)].key == key) {
            residents[size_t(row)].used = decode;
            return row;
        }
        if (residents[size_t(row)].used < residents[size_t(oldest)].used) {
            oldest = row;
        }
    }
    if (residents[size_t(oldest)].used == decode) {
        throw model_error("more mixes of one request in a decode than its device holds");
    }
    upload(oldest, *t.edit, t.j);
    residents[size_t(oldest)] = {key, decode};
    return oldest;
}

void device_edit::set_tokens(const std::vector<token_edit> & tokens) {
    ++decode;
    std::vector<int32_t> row_of_token(size_t(n_columns), 0);
    for (size_t i = 0; i < tokens.size(); ++i) {
        const token_edit & t = tokens[i];
        row_of_token[i] = row_for(t);
        if (!t.reads || !directions || slot_reads[size_t(t.slot)] == t.reads->id) {
            continue;
        }
        slot_reads[size_t(t.slot)] = t.reads->id;
        for (size_t at = 0; at < edited.size(); ++at) {
            const int from = position_in(t.reads->layers, edited[at]);
            if (from >= 0) {
                const auto n = size_t(t.reads->n) * size_t(n_embd);
                ggml_backend_tensor_set(directions, t.reads->directions.data() + size_t(from) * n,
                                        at * directions->nb[2] + size_t(t.slot * cap.readouts) * directions->nb[1],
                                        n * sizeof(float));
            }
        }
    }
    ggml_backend_tensor_set(index, row_of_token.data(), 0, row_of_token.size() * sizeof(int32_t));
}

void device_edit::read_back(const std::vector<token_edit> & tokens, const std::vector<int> & output_of_token) const {
    if (!readings || std::none_of(tokens.begin(), tokens.end(), [](const token_edit & t) { return t.reads; })) {
        return;
    }
    for (size_t at = 0; at < edited.size(); ++at) {
        for (size_t i = 0; i < tokens.size(); ++i) {
            const token_edit & t = tokens[i];
            const int from = t.reads ? position_in(t.reads->layers, edited[at]) : -1;
            const bool cut = position_in(cut_layers, edited[at]) >= 0;
            const int column = cut ? output_of_token[i] : int(i);
            if (from >= 0 && column >= 0) {
                const auto n = size_t(t.reads->n);
                ggml_backend_tensor_get(readings, t.readings + size_t(from) * n,
                                        at * readings->nb[2] + size_t(column) * readings->nb[1] +
                                            size_t(t.slot * cap.readouts) * sizeof(float),
                                        n * sizeof(float));
            }
        }
    }
}

// [n_numbers * n_all, tokens]: the numbers of the row that each token names
ggml_tensor * device_edit::numbers_of(ggml_context * c, const stage & s, int at, ggml_tensor * of) const {
    ggml_tensor * table =
        ggml_view_2d(c, s.numbers, s.numbers->ne[0], n_rows, s.numbers->nb[2], size_t(at) * s.numbers->nb[1]);
    return ggml_get_rows(c, table, ggml_reshape_1d(c, of, ggml_nelements(of)));
}

static ggml_tensor * part(ggml_context * c, ggml_tensor * numbers, int which, int n) {
    return ggml_view_2d(c, numbers, n, numbers->ne[1], numbers->nb[1], size_t(which) * size_t(n) * sizeof(float));
}

static ggml_tensor * of_layer(ggml_context * c, ggml_tensor * t, int at) {
    return ggml_view_2d(c, t, t->ne[0], t->ne[1], t->nb[1], size_t(at) * t->nb[2]);
}

// 1 where a column is open for a token, else 0
ggml_tensor * device_edit::gate(ggml_context * c, const stage & s, int at, ggml_tensor * h,
                                ggml_tensor * numbers) const {
    ggml_tensor * reading = ggml_mul_mat(c, of_layer(c, s.gates, at), h);
    ggml_tensor * above = ggml_sub(c, reading, part(c, numbers, gate_at, s.n_all));
    return ggml_step(c, ggml_mul(c, above, part(c, numbers, gate_sign, s.n_all)));
}

ggml_tensor * device_edit::written(ggml_context * c, const stage & s, int at, ggml_tensor * amounts) const {
    return ggml_mul_mat(c, of_layer(c, s.writes, at), amounts);
}

void device_edit::set_cut(int il, bool cut) {
    const int known = position_in(cut_layers, il);
    if (cut && known < 0) {
        cut_layers.insert(std::upper_bound(cut_layers.begin(), cut_layers.end(), il), il);
    } else if (!cut && known >= 0) {
        cut_layers.erase(cut_layers.begin() + known);
    }
}

ggml_tensor * device_edit::edit(ggml_context * c, int il, ggml_tensor * h, const graph_inputs & in,
                                std::vector<ggml_tensor *> & ends) {
    const int at = position_in(edited, il);
    const int64_t n = h->ne[1];
    ggml_tensor * of = ggml_view_2d(c, index, 1, in.n_tokens, index->nb[0], 0); // I32 [1, tokens]: the row of each
    if (n != in.n_tokens) { // the last block keeps only the tokens with outputs
        of = ggml_get_rows(c, of, in.out_ids);
        set_cut(il, true);
    } else if (in.out_ids && in.out_ids->ne[0] < n) {
        set_cut(il, false);
    }
    // made for the biases of experts: each token, with one expert, adds the row that its index names
    const auto add_row = [&](ggml_tensor * x, ggml_tensor * table) {
        ggml_tensor * from = ggml_view_2d(c, table, n_embd, n_rows, table->nb[2], size_t(at) * table->nb[1]);
        ggml_tensor * tokens = ggml_view_3d(c, x, n_embd, 1, n, x->nb[1], x->nb[1], 0);
        return ggml_reshape_2d(c, ggml_add_id(c, tokens, from, of), n_embd, n);
    };
    const auto add_gated = [&](ggml_tensor * x, const stage & s) {
        if (!s.numbers) {
            return x;
        }
        ggml_tensor * numbers = numbers_of(c, s, at, of);
        ggml_tensor * open = gate(c, s, at, h, numbers);
        return ggml_add(c, x, written(c, s, at, ggml_mul(c, open, part(c, numbers, share, s.n_all))));
    };
    if (readings) {
        ggml_tensor * dst =
            ggml_view_2d(c, readings, readings->ne[0], n, readings->nb[1], size_t(at) * readings->nb[2]);
        ends.push_back(ggml_cpy(c, ggml_mul_mat(c, of_layer(c, directions, at), h), dst));
    }
    ggml_tensor * x = h;
    if (turn_rows) {
        x = add_gated(add_row(h, turn_rows), stages[edit_term::turn]);
        const auto squared = [&](ggml_tensor * t) { return ggml_sum_rows(c, ggml_sqr(c, t)); };
        x = ggml_mul(c, x, ggml_sqrt(c, ggml_div(c, squared(h), squared(x))));
    }
    x = add_gated(add_row(x, rows), stages[edit_term::add]);
    if (const stage & s = stages[edit_term::window]; s.numbers) {
        ggml_tensor * numbers = numbers_of(c, s, at, of);
        ggml_tensor * p = ggml_mul_mat(c, of_layer(c, s.reads, at), x);
        ggml_tensor * below = ggml_relu(c, ggml_sub(c, part(c, numbers, lo, s.n_all), p));
        ggml_tensor * above = ggml_relu(c, ggml_sub(c, p, part(c, numbers, hi, s.n_all)));
        ggml_tensor * moved = ggml_mul(c, ggml_sub(c, below, above), part(c, numbers, share, s.n_all));
        if (s.gated) {
            moved = ggml_mul(c, moved, gate(c, s, at, h, numbers));
        }
        x = ggml_add(c, x, written(c, s, at, moved));
    }
    return x;
}

} // namespace personasteer
