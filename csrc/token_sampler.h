#pragma once

#include "llama-cpp.h"
#include "llama.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace personasteer {

struct sampling_params {
    float temperature = 0.0f; // <= 0: greedy
    int top_k = 40;           // <= 0: off
    float top_p = 0.95f;      // >= 1: off
    float min_p = 0.05f;      // <= 0: off
    float repeat_penalty = 1.0f;
    float frequency_penalty = 0.0f; // off the logit for each time a token stands in the last ones
    float presence_penalty = 0.0f;  // and once for being there
    std::vector<std::pair<llama_token, float>> logit_bias;
    int repeat_last_n = 64;
    uint32_t seed = 0;
    std::string grammar; // GBNF with the start symbol `root`; "": none
};

// How one request draws its next token: llama.cpp's samplers, and its grammar.
class token_sampler {
  public:
    // Throws where the grammar does not parse.
    token_sampler(const llama_vocab * vocab, const sampling_params & params);

    void accept_prompt(llama_token token); // counts for the repetition penalty, not for the grammar
    // The next token from a decode's output row; -1 where the grammar allows none.
    llama_token sample(llama_context * ctx, int output);

  private:
    llama_token draw(bool by_grammar);
    void fill(const float * logits);

    const llama_vocab * vocab;
    llama_sampler_ptr chain;
    llama_sampler_ptr grammar;
    std::vector<llama_token_data> candidates; // of the draw under way
};

// log p of one token: logit - log sum exp(logits)
double log_prob(const float * logits, int n, llama_token token);

// log p of the chosen token, and the n most probable ones, best first
double log_probs(const float * logits, int n_vocab, llama_token chosen, int n,
                 std::vector<std::pair<llama_token, double>> & top);

} // namespace personasteer
