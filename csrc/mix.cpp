#include "mix.h"

#include "errors.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace personasteer {

int position_in(const std::vector<int> & layers, int il) {
    const auto it = std::lower_bound(layers.begin(), layers.end(), il);
    return it != layers.end() && *it == il ? int(it - layers.begin()) : -1;
}

float edit_term::fade(int j) const { return half_life > 0.0f ? std::exp2(-float(j) / half_life) : 1.0f; }

mix::mix(uint64_t key, int n_embd, std::vector<int> layers_, std::vector<std::vector<edit_term>> terms_,
         std::vector<float> vectors)
    : fingerprint(key), width(n_embd), edited(std::move(layers_)), terms(std::move(terms_)), data(std::move(vectors)) {
    if (key == 0) {
        throw vector_error("the key of a mix cannot be 0");
    }
    if (edited.empty() || edited.size() != terms.size() || edited.front() < 0 ||
        std::adjacent_find(edited.begin(), edited.end(), [](int a, int b) { return a >= b; }) != edited.end()) {
        throw vector_error("a mix needs ascending blocks, with terms for each");
    }
    if (edited.back() >= max_sites) {
        throw vector_error("block " + std::to_string(edited.back()) + " is beyond what a model has");
    }
    if (n_embd < 1 || data.size() % size_t(n_embd) != 0) {
        throw vector_error("the vectors of a mix have another width than " + std::to_string(n_embd));
    }
    const auto n_rows = int(data.size() / size_t(n_embd));
    index_of_layer.assign(size_t(edited.back()) + 1, -1);
    for (size_t i = 0; i < edited.size(); ++i) {
        index_of_layer[size_t(edited[i])] = int(i);
        if (terms[i].size() > size_t(max_terms)) {
            throw vector_error("block " + std::to_string(edited[i]) + " has " + std::to_string(terms[i].size()) +
                               " terms, " + std::to_string(max_terms) + " fit");
        }
        std::stable_sort(terms[i].begin(), terms[i].end(),
                         [](const edit_term & a, const edit_term & b) { return a.at < b.at; });
        for (const edit_term & t : terms[i]) {
            const bool needs_read = t.at == edit_term::window;
            if (t.at < edit_term::turn || t.at > edit_term::window || t.write < 0 || t.write >= n_rows || t.gate < -1 ||
                t.gate >= n_rows || t.read < (needs_read ? 0 : -1) || t.read >= n_rows) {
                throw vector_error("a term of a mix points outside its vectors");
            }
            fading = fading || t.half_life > 0.0f;
        }
    }
}

uint64_t mix::key_at(int j) const {
    if (!fading) {
        return fingerprint;
    }
    // splitmix64's finalizer over the pair
    uint64_t z = fingerprint + 0x9e3779b97f4a7c15ull * (uint64_t(j) + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    return z | 1;
}

const std::vector<edit_term> * mix::at(int il) const {
    if (il < 0 || size_t(il) >= index_of_layer.size() || index_of_layer[size_t(il)] < 0) {
        return nullptr;
    }
    return &terms[size_t(index_of_layer[size_t(il)])];
}

} // namespace personasteer
