#pragma once

#include "llama.h"

#include <string>
#include <utility>
#include <vector>

namespace personasteer {

struct model_params {
    int n_gpu_layers = 0; // -1: all
    bool use_mmap = true;
    bool use_extra_bufts = true;  // repacked CPU weights; off where ggml's AMX kernels were built wrong
    std::vector<std::string> rpc; // host:port of llama.cpp's RPC workers that hold blocks
};

// Owns a llama_model. Thread-safe once loaded: llama.cpp's model is read-only.
class model {
  public:
    model(const std::string & path, const model_params & params);
    explicit model(llama_model * borrowed); // somebody else's, who keeps it alive and frees it
    ~model();
    model(const model &) = delete;
    model & operator=(const model &) = delete;

    llama_model * get() const { return handle; }
    const llama_vocab * vocab() const { return llama_model_get_vocab(handle); }

    int n_layer() const { return llama_model_n_layer(handle); }
    int n_embd() const { return llama_model_n_embd(handle); }
    int n_vocab() const { return llama_vocab_n_tokens(vocab()); }
    int n_ctx_train() const { return llama_model_n_ctx_train(handle); }
    std::string description() const;
    std::string chat_template() const; // "" when the file has none
    std::vector<std::pair<std::string, std::string>> metadata() const;

    std::vector<llama_token> tokenize(const std::string & text, bool add_special, bool parse_special) const;
    std::string piece(llama_token token, bool special) const;
    bool is_end(llama_token token) const { return llama_vocab_is_eog(vocab(), token); }
    std::vector<llama_token> control_tokens() const; // whose names stand for them only where they are parsed

    // A LoRA GGUF that every context made afterwards applies. Throws when it does not load or fit.
    void add_adapter(const std::string & path, float scale);
    const std::vector<std::pair<llama_adapter_lora *, float>> & adapters() const { return loras; }
    // whether blocks may run on a device other than the CPU
    bool may_offload() const { return offloads; }

  private:
    llama_model * handle = nullptr;
    bool owned = true;
    bool offloads = false;
    std::vector<std::pair<llama_adapter_lora *, float>> loras; // llama.cpp frees them with the model
};

} // namespace personasteer
