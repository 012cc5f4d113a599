#pragma once

#include "edit_bank.h"
#include "taps.h"

#include "llama.h"

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

namespace personasteer {

// Where the residual stream can be edited, numbered in the terms of a mix: il, the output of block il; n_layer + il,
// the stream between attention and feed-forward of block il; 2 n_layer, the token embeddings.
constexpr int n_sites(int n_layer) { return 2 * n_layer + 1; }

// THE hook: how nodes get into llama.cpp's graph. A sampler with the backend interface, set for a sequence id that is
// never decoded, is called at the end of every graph build with the whole transformer in the graph. It samples
// nothing. One graph_edit serves one attachment: a change of layers or taps needs a new one, because llama.cpp
// rebuilds its graphs when a new chain is set, and a chain can be set once.
class graph_edit {
  public:
    static constexpr llama_seq_id never_decoded = 1 << 30;

    // bank and tap may be null; both must outlive the attachment. n_blocks > 0: later blocks, and the logits, are left
    // out of the graph.
    graph_edit(int n_layer, int n_embd, int n_columns, int n_blocks, edit_bank * bank, taps * tap);
    ~graph_edit();
    graph_edit(const graph_edit &) = delete;
    graph_edit & operator=(const graph_edit &) = delete;

    llama_sampler * chain() const { return sampler_chain; }

    int64_t n_builds() const { return builds; }
    bool failed() const { return failure != nullptr; } // in the last build
    void check() const;                                // throws what went wrong there

    // The order of the tokens as the graph saw them, against the batch: true when they agree.
    void arm_order_check();
    bool order_was(const std::vector<llama_token> & tokens, const std::vector<llama_pos> & positions) const;

  private:
    static void note_order(ggml_tensor * dst, int ith, int nth, void * userdata);
    static void backend_apply(llama_sampler * smpl, ggml_context * ctx, ggml_cgraph * gf, llama_sampler_data * data);
    void apply(ggml_context * ctx, ggml_cgraph * gf);
    void fill_probe(ggml_context * ctx, ggml_cgraph * gf) const;
    int nodes_needed() const;
    void check_room(const ggml_context * ctx, ggml_cgraph * gf, int n_nodes) const;
    int site_of(const char * name) const; // -1: none
    std::string describe(int site) const;
    placement find_placement(ggml_cgraph * gf, const std::vector<int> & output_at) const;

    int n_layer;
    int n_embd;
    int n_columns;
    int n_blocks;
    edit_bank * bank;
    taps * tap;
    llama_sampler_i interface{};
    llama_sampler * sampler_chain = nullptr;
    int64_t builds = 0;                               // graphs of the model built since the attachment
    std::exception_ptr failure;                       // of the last build
    std::vector<int32_t> seen_tokens, seen_positions; // noted by the graph from its own inputs, [n_columns]
    bool notes_positions = false;
};

} // namespace personasteer
