#include "model.h"

#include "errors.h"
#include "log_capture.h"

#include "gguf.h"

#include <memory>

namespace personasteer {

model::model(const std::string & path, const model_params & params) {
    llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = params.n_gpu_layers;
    mp.load_mode = params.use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    mp.use_extra_bufts = params.use_extra_bufts;
    const log_capture log;
    handle = llama_model_load_from_file(path.c_str(), mp);
    if (!handle) {
        const std::string why = log.errors();
        throw model_error(path + ": llama.cpp cannot load this file" + (why.empty() ? "" : " (" + why + ")"));
    }
    offloads = params.n_gpu_layers != 0 && llama_supports_gpu_offload();
    const char * lacks = nullptr;
    if (llama_vocab_type(vocab()) == LLAMA_VOCAB_TYPE_NONE || n_vocab() == 0) {
        lacks = "has no tokenizer";
    } else if (llama_model_has_encoder(handle) || !llama_model_has_decoder(handle)) {
        lacks = "is not a decoder-only language model";
    }
    if (lacks) {
        llama_model_free(handle);
        throw model_error(path + " " + lacks);
    }
}

model::model(llama_model * borrowed) : handle(borrowed), owned(false), offloads(llama_supports_gpu_offload()) {}

model::~model() {
    if (owned) {
        llama_model_free(handle);
    }
}

// llama.cpp takes these types for granted, and ends the process where they are others.
static std::string wrong_type_in_adapter(const std::string & path) {
    gguf_init_params params{};
    params.no_alloc = true;
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> g(gguf_init_from_file(path.c_str(), params), gguf_free);
    if (!g) {
        return "";
    }
    static const std::pair<const char *, gguf_type> expected[] = {{"general.type", GGUF_TYPE_STRING},
                                                                  {"general.architecture", GGUF_TYPE_STRING},
                                                                  {"adapter.type", GGUF_TYPE_STRING},
                                                                  {"adapter.lora.alpha", GGUF_TYPE_FLOAT32}};
    for (const auto & [key, type] : expected) {
        const int64_t id = gguf_find_key(g.get(), key);
        if (id >= 0 && gguf_get_kv_type(g.get(), id) != type) {
            return std::string(key) + " is no " + gguf_type_name(type);
        }
    }
    for (int64_t i = 0; i < gguf_get_n_tensors(g.get()); ++i) {
        const ggml_type type = gguf_get_tensor_type(g.get(), i);
        if (type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && !ggml_is_quantized(type)) {
            return std::string(gguf_get_tensor_name(g.get(), i)) + " is of type " + ggml_type_name(type);
        }
    }
    return "";
}

void model::add_adapter(const std::string & path, float scale) {
    const log_capture log;
    std::string why = wrong_type_in_adapter(path);
    llama_adapter_lora * adapter = why.empty() ? llama_adapter_lora_init(handle, path.c_str()) : nullptr;
    if (!adapter) {
        why = why.empty() ? log.errors() : why;
        throw model_error(path + ": llama.cpp cannot load this LoRA adapter for the model" +
                          (why.empty() ? "" : " (" + why + ")"));
    }
    loras.emplace_back(adapter, scale);
}

std::string model::description() const {
    char buffer[256];
    llama_model_desc(handle, buffer, sizeof buffer);
    return buffer;
}

std::string model::chat_template() const {
    const char * text = llama_model_chat_template(handle, nullptr);
    return text ? text : "";
}

std::vector<std::pair<std::string, std::string>> model::metadata() const {
    std::vector<std::pair<std::string, std::string>> out;
    const auto read = [](auto && get) {
        std::string text(256, '\0');
        int n = get(text.data(), text.size());
        if (n < 0) {
            return std::string();
        }
        if (size_t(n) >= text.size()) {
            text.resize(size_t(n) + 1);
            n = get(text.data(), text.size());
        }
        text.resize(size_t(n));
        return text;
    };
    for (int i = 0; i < llama_model_meta_count(handle); ++i) {
        out.emplace_back(
            read([&](char * buf, size_t size) { return llama_model_meta_key_by_index(handle, i, buf, size); }),
            read([&](char * buf, size_t size) { return llama_model_meta_val_str_by_index(handle, i, buf, size); }));
    }
    return out;
}

std::vector<llama_token> model::tokenize(const std::string & text, bool add_special, bool parse_special) const {
    const log_capture log;
    std::vector<llama_token> tokens(text.size() + 8);
    const int32_t n = llama_tokenize(vocab(), text.data(), int32_t(text.size()), tokens.data(), int32_t(tokens.size()),
                                     add_special, parse_special);
    if (n < 0) {
        throw model_error("text of " + std::to_string(text.size()) + " bytes cannot be tokenized");
    }
    tokens.resize(size_t(n));
    return tokens;
}

std::string model::piece(llama_token token, bool special) const {
    if (token < 0 || token >= n_vocab()) {
        throw model_error("token id " + std::to_string(token) + " out of range");
    }
    std::string text(32, '\0');
    int32_t n = llama_token_to_piece(vocab(), token, text.data(), int32_t(text.size()), 0, special);
    if (n < 0) {
        text.resize(size_t(-n));
        n = llama_token_to_piece(vocab(), token, text.data(), int32_t(text.size()), 0, special);
    }
    text.resize(size_t(n));
    return text;
}

} // namespace personasteer
