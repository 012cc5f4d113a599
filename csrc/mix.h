#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace personasteer {

// One term of what is done to a token at one block. With the block's output h, n = j-th token of the response:
//
//     strength = share * 2^(-j / half_life) * [gate_sign * (<gate, h> - gate_at) > 0]
//
// where a term without half-life or gate lacks that factor. Then, in this order,
//
//     turn    x = (h + b) ||h|| / ||h + b||,        b = sum of strength * write
//     add     x = x + sum of strength * write
//     window  x = x + sum of strength * (max(lo - p, 0) - max(p - hi, 0)) * write,    p = <read, x>
//
// Windows read x as the additions left it, all of them before any writes.
struct edit_term {
    enum stage : int { turn = 0, add = 1, window = 2 };
    int at = add;   // stage
    int gate = -1;  // rows of the mix's vectors; -1: none
    int read = -1;  //
    int write = -1; //
    float gate_at = 0.0f;
    float gate_sign = 1.0f;
    float lo = 0.0f;
    float hi = 0.0f;
    float share = 1.0f;
    float half_life = 0.0f; // in tokens; 0: no fading

    float fade(int j) const; // 2^(-j / half_life)
};

// What is done to the residual stream for one kind of token: terms at some blocks, and the vectors they share.
// Unchangeable once made, so that many tokens and threads may point to it.
class mix {
  public:
    static constexpr int max_terms = 256;     // per block
    static constexpr int max_sites = 1 << 16; // more than any model has

    // terms[i] belong to layers[i]; layers ascend. Throws when an index or a size is wrong.
    mix(uint64_t key, int n_embd, std::vector<int> layers, std::vector<std::vector<edit_term>> terms,
        std::vector<float> vectors);

    uint64_t key() const { return fingerprint; } // steering fingerprint, never 0: 0 means unsteered
    uint64_t key_at(int j) const;                // of the j-th token of the response: a fading mix has one each
    bool fades() const { return fading; }
    int n_embd() const { return width; }
    const std::vector<int> & layers() const { return edited; }
    // the terms at block il, by stage; null when it has none
    const std::vector<edit_term> * at(int il) const;
    const float * vector(int row) const { return data.data() + size_t(row) * size_t(width); }

  private:
    uint64_t fingerprint;
    int width;
    std::vector<int> edited; // ascending
    std::vector<std::vector<edit_term>> terms;
    std::vector<int> index_of_layer; // by block: index into terms, or -1
    std::vector<float> data;         // [rows][n_embd]
    bool fading = false;
};
using mix_ptr = std::shared_ptr<const mix>;

// Directions that a request wants <h, u> of, before the edits of that block.
struct readout {
    uint64_t id = 0;         // unlike every other's in this process
    std::vector<int> layers; // ascending
    int n = 0;               // directions per block
    int n_embd = 0;
    std::vector<float> directions; // [layers.size()][n][n_embd]
};
using readout_ptr = std::shared_ptr<const readout>;

// What happens to one token of a decode.
struct token_edit {
    const mix * edit = nullptr;      // null: nothing
    int j = 0;                       // which token of the response, for fading
    const readout * reads = nullptr; // null: nothing
    float * readings = nullptr;      // [reads->layers.size()][reads->n]
    int slot = 0;                    // sequence
};

// Where il stands in an ascending list, or -1.
int position_in(const std::vector<int> & layers, int il);

} // namespace personasteer
