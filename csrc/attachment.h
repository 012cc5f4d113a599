#pragma once

#include "edit_bank.h"
#include "graph_edit.h"
#include "mix.h"

#include "llama.h"

#include <memory>
#include <set>
#include <vector>

namespace personasteer {

// The hook in a context that somebody else owns and decodes with. The owner says before each llama_decode what its
// tokens get, and asks after it whether the graph saw them so. The context must outlive the attachment.
class attachment {
  public:
    explicit attachment(llama_context * ctx);
    ~attachment(); // takes the hook out again
    attachment(const attachment &) = delete;
    attachment & operator=(const attachment &) = delete;

    int n_columns() const { return columns; } // tokens in a decode, at most: one ubatch

    struct token {
        llama_token id = 0;
        llama_pos position = 0;
        mix_ptr edit; // null: unsteered
        int j = 0;
        int slot = 0; // sequence
    };
    // Before a decode. Without ids (`embedded`) only the positions are compared afterwards.
    void arm(std::vector<token> tokens, bool embedded, const readout_ptr & reads);
    // After it: (tokens, blocks of the read-out, directions) of what was read. Throws where the steering did not hold.
    std::vector<float> finish();

  private:
    void attach();

    llama_context * ctx;
    const llama_model * mdl;
    int columns;
    std::set<int> wanted_layers;
    edit_capacity wanted_tables;
    std::unique_ptr<edit_bank> bank;
    std::unique_ptr<graph_edit> hook;
    std::vector<token> now; // of the decode under way
    bool now_embedded = false;
    readout_ptr now_reads;
    std::vector<token_edit> edits;
    std::vector<float> readings;
};

} // namespace personasteer
