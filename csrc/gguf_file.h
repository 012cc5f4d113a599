#pragma once

#include "gguf.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace personasteer {

// What a fingerprint is made of, read without loading weights.
struct gguf_tensor_summary {
    std::string name;
    std::string type; // ggml's name: "q4_1", "f32", ...
    std::array<int64_t, 4> shape;
    uint64_t offset; // of the data, from the start of the file
    uint64_t n_bytes;
};
struct gguf_summary {
    std::string architecture;
    std::string metadata; // canonical bytes of the architecture's and the tokenizer's key-values
    std::vector<gguf_tensor_summary> tensors;
};
gguf_summary summarize_gguf(const std::string & path);

// A key-value as a file holds it: numbers as their bytes, texts as they are.
struct gguf_field {
    std::string key;
    gguf_type type = GGUF_TYPE_STRING;
    gguf_type element = GGUF_TYPE_COUNT; // of an array
    std::string bytes;                   // numbers, or one text
    std::vector<std::string> texts;      // of an array of texts
};
std::vector<gguf_field> read_gguf_fields(const std::string & path);

struct gguf_new_tensor {
    std::string name;
    std::string type; // ggml's name
    std::vector<int64_t> shape;
};

// The header of the file at `path`, up to its data and padded, with other key-values and more tensors behind its own.
// The data of its own tensors stay where they are; `n_data` is their size with the padding after the last one.
struct gguf_header {
    std::string bytes;
    uint64_t data_offset; // of the data in the file at `path`
    uint64_t n_data;
    std::vector<uint64_t> offsets; // of the new tensors, from the start of the data
    uint64_t alignment;
};
gguf_header change_gguf_header(const std::string & path, const std::vector<std::string> & removed,
                               const std::vector<gguf_field> & fields, const std::vector<gguf_new_tensor> & tensors);

// Where llama.cpp would end the process over what a file says, instead of refusing it: throws model_error. A file that
// cannot be read at all is left to llama.cpp's loader to refuse.
void check_model_metadata(const std::string & path);
void check_adapter_metadata(const std::string & path);

} // namespace personasteer
