#pragma once

#include "device_memory.h"
#include "mix.h"

#include <cstddef>
#include <memory>
#include <set>
#include <vector>

namespace personasteer {

struct tap_config {
    std::vector<int> pool_layers; // ascending; blocks whose output is pooled inside the graph
    int n_pools = 0;              // pools filled by one decode: weighted sums over its tokens
    std::vector<int> raw_layers;  // ascending; blocks whose output is kept for every token

    static constexpr int max_pools = 1 << 20;
    bool empty() const { return pool_layers.empty() && raw_layers.empty(); }
    bool operator==(const tap_config & o) const {
        return pool_layers == o.pool_layers && n_pools == o.n_pools && raw_layers == o.raw_layers;
    }
};

// Copies of block outputs, pooled or raw, made on the device inside the graph, right behind the block: the output as
// the next block sees it, after the edit. A pool is a weighted sum over all tokens of a decode: a sequence whose
// activations are not finite spoils the pools of the others.
class taps {
  public:
    taps(int n_embd, tap_config config, int n_columns);

    const tap_config & config() const { return cfg; }
    size_t bytes() const;
    void allocate(const placement & where);
    bool allocated() const { return !devices.empty() || cfg.empty(); }
    int nodes_per_layer() const; // nodes a block adds, at most

    // weights[t * n_pools + s]: the share of token t in pool s, for the tokens of the next decode
    void set_pool_weights(const std::vector<float> & weights);

    // Whether the model computes block il for the output rows only (most do so at the last one). Known from the graphs
    // built so far; where every token has an output row it makes no difference.
    bool is_cut(int il) const { return cut_blocks.count(il) > 0; }
    void set_cut(int il, bool cut);

    // Whether a decode of so many tokens leaves their rows where its pools would be: no more data, and less work.
    bool keeps_rows(int64_t n_tokens) const { return n_tokens <= cfg.n_pools; }

    // After a decode. For a block cut down to the output rows, a column is the rank of the output row.
    const float * pooled(int il, int column) const; // [n_embd] of a pool or a row, valid until the next read_pooled
    void read_pooled();
    void read_raw(int il, int column, int n, float * dst) const; // n columns of n_embd

    // the tensors whose computation fills the buffers for this block, whose output is x
    std::vector<ggml_tensor *> tap(ggml_context * ctx, int il, ggml_tensor * x, const graph_inputs & in);
    void new_graph(); // forget the nodes shared by the blocks of the last graph

  private:
    struct device {
        bool is_cpu = false;
        std::vector<int> pool_layers, raw_layers; // ascending, the part on this device
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buffer;
        ggml_tensor * pool_weights = nullptr; // F32 [n_pools, n_columns]
        ggml_tensor * pooled = nullptr;       // F32 [n_embd, n_pools, pool_layers.size()]
        ggml_tensor * raw = nullptr;          // F32 [n_embd, n_columns, raw_layers.size()]
        ggml_tensor * weights_all = nullptr;  // node of the graph being built, for all tokens
        ggml_tensor * weights_out = nullptr;  // the same for the output rows
        std::vector<float> pooled_host;       // copy of `pooled`
    };
    static ggml_tensor * transposed(ggml_context * ctx, ggml_tensor * t);
    void pool(ggml_context * ctx, device & d, int at, ggml_tensor * x, const graph_inputs & in,
              std::vector<ggml_tensor *> & ends);
    ggml_tensor * pool_weights_for(ggml_context * ctx, device & d, int64_t n_columns_here, const graph_inputs & in);

    int n_embd;
    tap_config cfg;
    int n_columns;
    std::vector<device> devices;
    std::set<int> cut_blocks;
    std::vector<float> host_pool_weights; // set before the devices were known
};

} // namespace personasteer
