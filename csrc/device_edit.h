#pragma once

#include "device_memory.h"
#include "mix.h"

#include <array>
#include <cstdint>
#include <vector>

namespace personasteer {

// What the tables of a device have room for: per mix and block, in steps; only grows.
struct edit_capacity {
    static constexpr int mixes_per_slot = 2; // resident at a time: usually the prompt's and the response's
    int n_slots = 1;
    bool turns = false;
    std::array<int, 3> terms{}; // by stage: gated turns, gated additions, windows
    bool gated_windows = false;
    int readouts = 0;

    bool operator!=(const edit_capacity & o) const {
        return turns != o.turns || terms != o.terms || gated_windows != o.gated_windows || readouts != o.readouts;
    }
    // Makes room; true when something had to grow.
    bool grow(const mix & m);
    bool grow(const readout & r);
};

// The edit in operations that every ggml device has, from tables of the resident mixes. A token names its mix's row:
//
//     rows      what the ungated terms add:  x = h + rows[index]
//     stages    per resident mix a segment of columns (read, write, gate); numbers[index] opens the token's own
//               columns and closes all others, whose share of the sum is exactly 0
//
// Products are the device's own: on NVIDIA beyond three tokens in TF32, 2e-3 relative.
class device_edit {
  public:
    device_edit(int n_embd, std::vector<int> layers, int n_columns, const edit_capacity & capacity,
                ggml_backend_buffer_type_t buft);

    const std::vector<int> & layers() const { return edited; }
    size_t bytes() const { return ggml_backend_buffer_get_size(buffer.get()); }
    void set_tokens(const std::vector<token_edit> & tokens);
    void read_back(const std::vector<token_edit> & tokens, const std::vector<int> & output_of_token) const;

    // Whether a block keeps only the output rows, as the graphs show: its readings stand by output rank then.
    void set_cut(int il, bool cut);

    static constexpr int nodes_per_layer = 80; // at most: with all stages, gated and cut, 76
    // h' from h; nodes that fill the readings are left in `ends`
    ggml_tensor * edit(ggml_context * ctx, int il, ggml_tensor * h, const graph_inputs & in,
                       std::vector<ggml_tensor *> & ends);

  private:
    enum number { share, gate_at, gate_sign, lo, hi, n_numbers };
    struct stage {
        int per_mix = 0;                  // columns of one mix
        int n_all = 0;                    // columns of all resident mixes
        bool gated = false;               //
        ggml_tensor * reads = nullptr;    // F32 [n_embd, n_all, layers]
        ggml_tensor * gates = nullptr;    // F32 [n_embd, n_all, layers]
        ggml_tensor * writes = nullptr;   // F32 [n_all, n_embd, layers]
        ggml_tensor * numbers = nullptr;  // F32 [n_numbers * n_all, layers, n_rows]
        std::vector<float> writes_mirror; // `writes`, of which a mix holds scattered parts
    };
    struct resident {
        uint64_t key = 0; // of the mix and j in this row, 0: none
        int64_t used = -1;
    };
    int row_for(const token_edit & t);
    void upload(int row, const mix & m, int j);
    ggml_tensor * gate(ggml_context * ctx, const stage & s, int at, ggml_tensor * h, ggml_tensor * numbers) const;
    ggml_tensor * numbers_of(ggml_context * ctx, const stage & s, int at, ggml_tensor * index) const;
    ggml_tensor * written(ggml_context * ctx, const stage & s, int at, ggml_tensor * amounts) const;

    int n_embd;
    int n_columns;
    int n_rows; // 1 + resident mixes; row 0 does nothing
    std::vector<int> edited;
    edit_capacity cap;
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor * index = nullptr;      // I32 [n_columns]
    ggml_tensor * rows = nullptr;       // F32 [n_embd, layers, n_rows]: additions
    ggml_tensor * turn_rows = nullptr;  // F32 the same: norm-preserving additions
    ggml_tensor * directions = nullptr; // F32 [n_embd, readouts * n_slots, layers]
    ggml_tensor * readings = nullptr;   // F32 [readouts * n_slots, n_columns, layers]
    std::array<stage, 3> stages;
    std::vector<resident> residents;  // by row
    std::vector<uint64_t> slot_reads; // by slot: the read-out that `directions` holds
    std::vector<int> cut_layers;      // ascending; blocks that keep only the output rows, seen in graphs
    int64_t decode = 0;
};

} // namespace personasteer
