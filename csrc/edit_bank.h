#pragma once

#include "device_edit.h"
#include "mix.h"

#include "ggml.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

namespace personasteer {

// The edits and readings of one attachment, and which token takes which. Blocks on the CPU run one fused node that
// follows a pointer from each token to its mix, so nothing is copied, nothing is bounded, and a token costs what its
// own mix costs. Blocks on other devices take their edit from tables (device_edit).
class edit_bank {
  public:
    // layers: the blocks that some request edits or reads, ascending
    edit_bank(int n_embd, std::vector<int> layers, int n_columns, const edit_capacity & capacity, bool native_on_cpu);

    const std::vector<int> & layers() const { return edited; }
    const edit_capacity & capacity() const { return tables; }
    size_t bytes() const; // on all devices

    void allocate(const placement & where); // once, when the devices are known
    bool allocated() const { return placed || edited.empty(); }

    // The tokens of the next decode, in its order. What they point to must outlive the decode.
    void set_tokens(const std::vector<token_edit> & tokens);
    void read_back(const std::vector<token_edit> & tokens, const std::vector<int> & output_of_token);
    void no_rows(int il); // the graph under way leaves this block none

    // nodes an edited block adds, at most
    int nodes_per_layer() const;
    // h' from h, or from what h is the sum of, reading on the way; in_place: h may be overwritten, or not be computed
    // at all. Nodes that h' does not need are left in `ends`.
    ggml_tensor * edit(ggml_context * ctx, int il, ggml_tensor * h, bool in_place, const graph_inputs & in,
                       std::vector<ggml_tensor *> & ends);

  private:
    struct site {
        edit_bank * bank;
        int il;
    };
    template <bool sum> static void fused(ggml_tensor * dst, int ith, int nth, void * userdata);

    int n_embd;
    int n_columns; // tokens in a ubatch, at most
    std::vector<int> edited;
    edit_capacity tables;
    bool native_on_cpu;
    bool placed = false;
    std::vector<token_edit> host_tokens; // [n_columns], of the next decode
    std::deque<site> sites;              // blocks on the CPU; addresses stay
    std::vector<std::unique_ptr<device_edit>> devices;
};

} // namespace personasteer
