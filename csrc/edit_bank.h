#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace personasteer {

// The buffer type of the device that each block runs on, by block index.
using placement = std::vector<ggml_backend_buffer_type_t>;

// What is added to the residual stream for one kind of token: a row of n_embd floats for each of some blocks.
struct mix {
    uint64_t key = 0;        // steering fingerprint; 0 means unsteered
    std::vector<int> layers; // ascending block indices
    std::vector<float> data; // [layers.size()][n_embd]
};
using mix_ptr = std::shared_ptr<const mix>;

// The leaves of one graph build that an edit may need.
struct graph_inputs {
    int64_t n_tokens = 0;
    ggml_tensor * out_ids = nullptr; // I32 [n_outputs]: which tokens have an output row
};

// The additive edit on the device: a table of mixes and, per token, the row that it takes. Row 0 is all zeros, so a
// token with row 0 gets h + 0 = h exactly. The cost does not depend on how many vectors are in a mix, and changing a
// strength rewrites one row.
//
//     h'_t = h_t + rows[index_t]
class edit_bank {
  public:
    edit_bank(int n_embd, std::vector<int> layers, int n_rows, int n_columns);

    const std::vector<int> & layers() const { return edited; }
    int n_rows() const { return rows_max; }
    size_t bytes() const; // on all devices

    void allocate(const placement & where); // once, when the devices are known
    bool allocated() const { return !devices.empty() || edited.empty(); }

    void set_row(int row, const mix & m); // blocks of the bank that m lacks get zeros
    void set_index(const std::vector<int32_t> & row_of_token);

    // nodes an edited block adds, at most
    static constexpr int nodes_per_layer = 7;
    ggml_tensor * edit(ggml_context * ctx, int il, ggml_tensor * h, const graph_inputs & in) const;

  private:
    struct device {
        std::vector<int> layers; // ascending
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buffer;
        ggml_tensor * rows = nullptr;  // F32 [n_embd, layers.size(), n_rows]
        ggml_tensor * index = nullptr; // I32 [n_columns]
    };
    void upload_row(const device & d, int row) const;

    int n_embd;
    int rows_max;
    int n_columns;           // tokens in a ubatch, at most
    std::vector<int> edited; // ascending
    std::vector<device> devices;
    std::vector<float> host_rows;    // [n_rows][edited.size()][n_embd], what the devices hold or will hold
    std::vector<int32_t> host_index; // [n_columns]
};

// Where il stands in an ascending list, or -1.
int position_in(const std::vector<int> & layers, int il);

// A ggml context for n tensors without data.
ggml_context_ptr make_tensor_context(size_t n);

// Gives the context's tensors memory on a device, zeroed, outside the scheduler's reach. Throws when there is none.
ggml_backend_buffer_ptr allocate_tensors(ggml_context * ctx, ggml_backend_buffer_type_t buft);

} // namespace personasteer
