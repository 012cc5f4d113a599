#include "edit_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// One source, compiled for several instruction sets and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) &&                           \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PERSONASTEER_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PERSONASTEER_CLONES
#endif
#define PERSONASTEER_INLINE inline __attribute__((always_inline))

namespace personasteer {

namespace {

constexpr int n_lanes = 16;
using lanes __attribute__((vector_size(size_t(n_lanes) * sizeof(float)), aligned(4), may_alias)) = float;

PERSONASTEER_INLINE float sum_of(const lanes & v) {
    float s[n_lanes];
    std::memcpy(s, &v, sizeof s);
    for (int half = n_lanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
            s[i] += s[i + half];
        }
    }
    return s[0];
}

// N products at once: x is read once for all of them
template <int N> PERSONASTEER_INLINE void dots(const float * const * u, const float * x, int n_embd, float * out) {
    lanes sum[size_t(N)];
    for (int k = 0; k < N; ++k) {
        sum[k] = lanes{};
    }
    int i = 0;
    for (; i + n_lanes <= n_embd; i += n_lanes) {
        const lanes at = *reinterpret_cast<const lanes *>(x + i);
        for (int k = 0; k < N; ++k) {
            sum[k] += *reinterpret_cast<const lanes *>(u[k] + i) * at;
        }
    }
    for (int k = 0; k < N; ++k) {
        float rest = 0.0f;
        for (int r = i; r < n_embd; ++r) {
            rest += u[k][r] * x[r];
        }
        out[k] = sum_of(sum[k]) + rest;
    }
}

// x += d_0 w_0 + ... + d_(N-1) w_(N-1) (+ what an earlier part of the sum left in `part`), summed before it is added,
// for the columns [begin, end); part[0] is that of `begin`
template <int N>
PERSONASTEER_INLINE void write(const float * const * w, const float * d, float * part, bool first, bool last, float * x,
                               int begin, int end) {
    int i = begin;
    for (; i + n_lanes <= end; i += n_lanes) {
        auto * so_far = reinterpret_cast<lanes *>(part + (i - begin));
        lanes sum = *reinterpret_cast<const lanes *>(w[0] + i) * d[0];
        if (!first) {
            sum = *so_far + sum;
        }
        for (int k = 1; k < N; ++k) {
            sum += *reinterpret_cast<const lanes *>(w[k] + i) * d[k];
        }
        if (last) {
            *reinterpret_cast<lanes *>(x + i) += sum;
        } else {
            *so_far = sum;
        }
    }
    for (; i < end; ++i) {
        float sum = w[0][i] * d[0];
        if (!first) {
            sum = part[i - begin] + sum;
        }
        for (int k = 1; k < N; ++k) {
            sum += w[k][i] * d[k];
        }
        if (last) {
            x[i] += sum;
        } else {
            part[i - begin] = sum;
        }
    }
}

PERSONASTEER_CLONES void dots_all(const float * const * u, int n, const float * x, int n_embd, float * out) {
    int k = 0;
    for (; k + 4 <= n; k += 4) {
        dots<4>(u + k, x, n_embd, out + k);
    }
    for (; k < n; ++k) {
        dots<1>(u + k, x, n_embd, out + k);
    }
}

PERSONASTEER_CLONES void write_all(const float * const * w, const float * d, int n, float * x, int n_embd) {
    constexpr int block = 32 * n_lanes;
    float part[block]; // on the stack: no exception may leave ggml's threads
    for (int begin = 0; begin < n_embd; begin += block) {
        const int end = std::min(n_embd, begin + block);
        int k = 0;
        for (; k + 4 <= n; k += 4) {
            write<4>(w + k, d + k, part, k == 0, k + 4 == n, x, begin, end);
        }
        for (; k < n; ++k) {
            write<1>(w + k, d + k, part, k == 0, k + 1 == n, x, begin, end);
        }
    }
}

// The terms of a stage that have something to write.
struct writes {
    const float * w[mix::max_terms];
    float d[mix::max_terms];
    int n = 0;

    void push(const float * row, float amount) {
        if (amount != 0.0f) {
            w[n] = row;
            d[n++] = amount;
        }
    }
    void add_to(float * x, int n_embd) const {
        if (n > 0) {
            write_all(w, d, n, x, n_embd);
        }
    }
};

} // namespace

void read_token(const float * directions, int n, int n_embd, const float * h, float * out) {
    constexpr int step = 64;
    const float * u[step];
    for (int k = 0; k < n; k += step) {
        const int count = std::min(step, n - k);
        for (int i = 0; i < count; ++i) {
            u[i] = directions + size_t(k + i) * size_t(n_embd);
        }
        dots_all(u, count, h, n_embd, out + k);
    }
}

void edit_token(const mix & m, int il, int j, float * x) {
    const std::vector<edit_term> * terms = m.at(il);
    if (!terms) {
        return;
    }
    const int n = int(terms->size()), n_embd = m.n_embd();
    const edit_term * t = terms->data();
    float strength[mix::max_terms]; // the gates read h, so all of them are settled first
    for (int i = 0; i < n; ++i) {
        strength[i] = t[i].share * t[i].fade(j);
        if (t[i].gate >= 0) {
            const float * gate = m.vector(t[i].gate);
            float reading;
            dots_all(&gate, 1, x, n_embd, &reading);
            if (!(t[i].gate_sign * (reading - t[i].gate_at) > 0.0f)) {
                strength[i] = 0.0f;
            }
        }
    }
    int i = 0;
    writes sum;
    for (; i < n && t[i].at == edit_term::turn; ++i) {
        sum.push(m.vector(t[i].write), strength[i]);
    }
    if (sum.n > 0) {
        float before, after;
        dots_all(const_cast<const float **>(&x), 1, x, n_embd, &before);
        sum.add_to(x, n_embd);
        dots_all(const_cast<const float **>(&x), 1, x, n_embd, &after);
        const float scale = after > 0.0f ? std::sqrt(before / after) : 1.0f;
        for (int k = 0; k < n_embd; ++k) {
            x[k] *= scale;
        }
    }
    sum.n = 0;
    for (; i < n && t[i].at == edit_term::add; ++i) {
        sum.push(m.vector(t[i].write), strength[i]);
    }
    sum.add_to(x, n_embd);
    const float * reads[mix::max_terms];
    int n_windows = 0;
    for (int k = i; k < n; ++k) {
        if (strength[k] != 0.0f) {
            reads[n_windows++] = m.vector(t[k].read);
        }
    }
    if (n_windows == 0) {
        return;
    }
    float p[mix::max_terms];
    dots_all(reads, n_windows, x, n_embd, p);
    sum.n = 0;
    n_windows = 0;
    for (; i < n; ++i) {
        if (strength[i] != 0.0f) {
            const float reading = p[n_windows++];
            const float moved = std::max(t[i].lo - reading, 0.0f) - std::max(reading - t[i].hi, 0.0f);
            sum.push(m.vector(t[i].write), strength[i] * moved);
        }
    }
    sum.add_to(x, n_embd);
}

} // namespace personasteer
