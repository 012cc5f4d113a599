#include "token_sampler.h"

#include "errors.h"
#include "log_capture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace personasteer {

// log sum exp(logits), NaN where one is. exp in float keeps the loop vectorizable, the sum is double.
static double log_sum(const float * logits, int n) {
    const float top = *std::max_element(logits, logits + n);
    constexpr int block = 256;
    double sum = 0.0;
    int n_nan = 0;
    for (int i = 0; i < n; i += block) {
        float partial = 0.0f;
        for (int j = i, end = std::min(n, i + block); j < end; ++j) {
            // 2^x by splitting off the integer part; degree-5 polynomial, relative error below 3e-7
            const float exponent = (logits[j] - top) * 1.44269504f;
            n_nan += std::isnan(exponent);
            const float x = std::max(-126.0f, exponent); // a number, even of a NaN
            const auto whole = int32_t(x - 0.5f);
            const float f = x - float(whole);
            const float p =
                1.0f +
                f * (0.69314718f +
                     f * (0.24022651f + f * (0.05550411f + f * (0.00961812f + f * (0.00133336f + f * 0.00015403f)))));
            const int32_t bits = (whole + 127) * (1 << 23);
            float scale;
            std::memcpy(&scale, &bits, sizeof scale);
            partial += p * scale;
        }
        sum += double(partial);
    }
    return n_nan > 0 ? std::numeric_limits<double>::quiet_NaN() : double(top) + std::log(sum);
}

static llama_sampler_ptr make_chain(const sampling_params & p, int n_vocab) {
    llama_sampler_chain_params cp = llama_sampler_chain_default_params();
    cp.no_perf = true;
    llama_sampler_ptr chain(llama_sampler_chain_init(cp));
    if (!p.logit_bias.empty()) {
        std::vector<llama_logit_bias> biases;
        for (const auto & [token, bias] : p.logit_bias) {
            biases.push_back({token, bias});
        }
        llama_sampler_chain_add(chain.get(),
                                llama_sampler_init_logit_bias(n_vocab, int32_t(biases.size()), biases.data()));
    }
    if (p.repeat_penalty != 1.0f || p.frequency_penalty != 0.0f || p.presence_penalty != 0.0f) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_penalties(n_vocab, p.repeat_last_n, p.repeat_penalty,
                                                                          p.frequency_penalty, p.presence_penalty));
    }
    if (p.temperature <= 0.0f) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_greedy());
        return chain;
    }
    if (p.top_k > 0) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_top_k(p.top_k));
    }
    if (p.top_p < 1.0f) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_top_p(p.top_p, 1));
    }
    if (p.min_p > 0.0f) {
        llama_sampler_chain_add(chain.get(), llama_sampler_init_min_p(p.min_p, 1));
    }
    llama_sampler_chain_add(chain.get(), llama_sampler_init_temp(p.temperature));
    llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(p.seed));
    return chain;
}

token_sampler::token_sampler(const llama_vocab * v, const sampling_params & params)
    : vocab(v), chain(make_chain(params, llama_vocab_n_tokens(v))) {
    if (!params.grammar.empty()) {
        const log_capture log;
        stderr_capture printed;
        grammar.reset(llama_sampler_init_grammar(vocab, params.grammar.c_str(), "root"));
        if (!grammar) {
            std::string why = printed.first_line();
            if (why.empty()) {
                why = log.errors();
            }
            throw argument_error("the grammar does not parse" + (why.empty() ? "" : " (" + why + ")"));
        }
    }
}

void token_sampler::accept_prompt(llama_token token) { llama_sampler_accept(chain.get(), token); }

void token_sampler::fill(const float * logits) {
    candidates.resize(size_t(llama_vocab_n_tokens(vocab)));
    for (size_t i = 0; i < candidates.size(); ++i) {
        candidates[i] = {llama_token(i), logits[i], 0.0f};
    }
}

llama_token token_sampler::draw(bool by_grammar) {
    llama_token_data_array all = {candidates.data(), candidates.size(), -1, false};
    if (by_grammar) {
        llama_sampler_apply(grammar.get(), &all);
        const auto allowed = [](const llama_token_data & c) { return c.logit > -INFINITY; };
        if (std::none_of(all.data, all.data + all.size, allowed)) {
            return -1;
        }
    }
    llama_sampler_apply(chain.get(), &all);
    return all.data[all.selected].id;
}

llama_token token_sampler::sample(llama_context * ctx, int output) {
    if (!grammar) {
        return llama_sampler_sample(chain.get(), ctx, output);
    }
    // Testing all tokens against a grammar is slow: first the one that is drawn without it.
    const float * logits = llama_get_logits_ith(ctx, output);
    fill(logits);
    llama_token token = draw(false);
    llama_token_data one = {token, 1.0f, 0.0f};
    llama_token_data_array only = {&one, 1, -1, false};
    llama_sampler_apply(grammar.get(), &only);
    if (!(one.logit > -INFINITY)) {
        fill(logits);
        token = draw(true);
    }
    if (token >= 0) {
        llama_sampler_accept(grammar.get(), token);
        llama_sampler_accept(chain.get(), token);
    }
    return token;
}

double log_prob(const float * logits, int n, llama_token token) { return double(logits[token]) - log_sum(logits, n); }

double log_probs(const float * logits, int n_vocab, llama_token chosen, int n,
                 std::vector<std::pair<llama_token, double>> & top) {
    const double total = log_sum(logits, n_vocab);
    std::vector<llama_token> order(size_t(std::min(n, n_vocab) > 0 ? n_vocab : 0));
    for (size_t i = 0; i < order.size(); ++i) {
        order[i] = llama_token(i);
    }
    n = std::min(n, int(order.size()));
    std::partial_sort(order.begin(), order.begin() + n, order.end(), [logits](llama_token a, llama_token b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    for (int i = 0; i < n; ++i) {
        top.emplace_back(order[size_t(i)], double(logits[order[size_t(i)]]) - total);
    }
    return double(logits[chosen]) - total;
}

} // namespace personasteer
