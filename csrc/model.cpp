#include "model.h"

#include "errors.h"
#include "gguf_file.h"
#include "log_capture.h"

#include <limits>

namespace personasteer {

namespace {

// The workers' devices, then this machine's GPUs, ended by a null pointer; empty without workers: llama.cpp's choice.
std::vector<ggml_backend_dev_t> devices_of(const std::vector<std::string> & workers) {
    std::vector<ggml_backend_dev_t> out;
    if (workers.empty()) {
        return out;
    }
    using add_server = ggml_backend_reg_t (*)(const char *);
    const ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    const auto add =
        rpc ? reinterpret_cast<add_server>(ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server"))
            : nullptr;
    if (!add) {
        throw model_error("this build of llama.cpp has no RPC");
    }
    for (const std::string & worker : workers) {
        const ggml_backend_reg_t server = add(worker.c_str());
        if (!server) {
            throw model_error("the RPC worker at " + worker + " has no device");
        }
        for (size_t i = 0; i < ggml_backend_reg_dev_count(server); ++i) {
            out.push_back(ggml_backend_reg_dev_get(server, i));
        }
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_GPU) {
            out.push_back(device);
        }
    }
    out.push_back(nullptr);
    return out;
}

} // namespace

model::model(const std::string & path, const model_params & params) {
    llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = params.n_gpu_layers;
    mp.load_mode = params.use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    mp.use_extra_bufts = params.use_extra_bufts;
    check_model_metadata(path);
    const log_capture log;
    std::vector<ggml_backend_dev_t> devices = devices_of(params.rpc);
    if (!devices.empty()) {
        mp.devices = devices.data();
    }
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
        const log_capture log;
        llama_model_free(handle);
    }
}

void model::add_adapter(const std::string & path, float scale) {
    check_adapter_metadata(path);
    const log_capture log;
    llama_adapter_lora * adapter = llama_adapter_lora_init(handle, path.c_str());
    if (!adapter) {
        const std::string why = log.errors();
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
    std::vector<llama_token> tokens;
    int32_t n = std::numeric_limits<int32_t>::min(); // what llama.cpp says to more than it can count
    std::string why;
    if (text.size() < size_t(std::numeric_limits<int32_t>::max()) - 8) {
        tokens.resize(text.size() + 8);
        const auto fill = [&] {
            return llama_tokenize(vocab(), text.data(), int32_t(text.size()), tokens.data(), int32_t(tokens.size()),
                                  add_special, parse_special);
        };
        try {
            n = fill();
            if (n < 0 && n != std::numeric_limits<int32_t>::min()) { // a space may be three tokens
                tokens.resize(size_t(-n));
                n = fill();
            }
        } catch (const std::exception & e) { // a vocabulary without a token for some byte
            n = -1;
            why = std::string(" (") + e.what() + ")";
        }
    }
    if (n < 0) {
        throw model_error("text of " + std::to_string(text.size()) + " bytes cannot be tokenized" + why);
    }
    tokens.resize(size_t(n));
    return tokens;
}

std::vector<llama_token> model::control_tokens() const {
    std::vector<llama_token> out;
    for (llama_token t = 0; t < n_vocab(); ++t) {
        if (llama_vocab_get_attr(vocab(), t) & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN)) {
            out.push_back(t);
        }
    }
    return out;
}

std::string model::piece(llama_token token, bool special) const {
    if (token < 0 || token >= n_vocab()) {
        throw model_error("token id " + std::to_string(token) + " out of range");
    }
    std::string text(32, '\0');
    try {
        int32_t n = llama_token_to_piece(vocab(), token, text.data(), int32_t(text.size()), 0, special);
        if (n < 0) {
            text.resize(size_t(-n));
            n = llama_token_to_piece(vocab(), token, text.data(), int32_t(text.size()), 0, special);
        }
        text.resize(size_t(n));
    } catch (const std::exception & e) {
        throw model_error("token " + std::to_string(token) + " has no text (" + e.what() + ")");
    }
    return text;
}

} // namespace personasteer
