#include "gguf_file.h"

#include "errors.h"
#include "log_capture.h"
#include "requantize.h"

#include "ggml.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

namespace personasteer {

using gguf_context_ptr = std::unique_ptr<gguf_context, decltype(&gguf_free)>;
using ggml_context_owner = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

// The metadata of a file, and its tensors without their data.
static std::pair<gguf_context_ptr, ggml_context_owner> open_gguf(const std::string & path) {
    const log_capture log;
    ggml_context * meta = nullptr;
    gguf_init_params params{};
    params.no_alloc = true;
    params.ctx = &meta;
    gguf_context_ptr g(gguf_init_from_file(path.c_str(), params), gguf_free);
    if (!g) {
        const std::string why = log.errors();
        throw model_error(path + ": not a readable GGUF file" + (why.empty() ? "" : " (" + why + ")"));
    }
    return {std::move(g), ggml_context_owner(meta, ggml_free)};
}

static constexpr size_t number_sizes[GGUF_TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static gguf_field read_field(const gguf_context * g, int64_t id) {
    gguf_field f;
    f.key = gguf_get_key(g, id);
    f.type = gguf_get_kv_type(g, id);
    if (f.type == GGUF_TYPE_STRING) {
        f.bytes = gguf_get_val_str(g, id);
    } else if (f.type == GGUF_TYPE_ARRAY) {
        const size_t n = gguf_get_arr_n(g, id);
        f.element = gguf_get_arr_type(g, id);
        if (f.element == GGUF_TYPE_STRING) {
            for (size_t i = 0; i < n; ++i) {
                f.texts.emplace_back(gguf_get_arr_str(g, id, i));
            }
        } else if (f.element != GGUF_TYPE_ARRAY) {
            f.bytes.assign(static_cast<const char *>(gguf_get_arr_data(g, id)), n * number_sizes[f.element]);
        }
    } else {
        f.bytes.assign(static_cast<const char *>(gguf_get_val_data(g, id)), number_sizes[f.type]);
    }
    return f;
}

static void append_value(std::string & out, const gguf_context * g, int64_t id) {
    const gguf_field f = read_field(g, id);
    if (f.type == GGUF_TYPE_ARRAY) {
        out += std::to_string(gguf_get_arr_n(g, id));
    }
    out += f.bytes;
    for (const std::string & text : f.texts) {
        (out += '\0') += text;
    }
}

std::vector<gguf_field> read_gguf_fields(const std::string & path) {
    const auto [g, meta] = open_gguf(path);
    std::vector<gguf_field> fields;
    for (int64_t i = 0; i < gguf_get_n_kv(g.get()); ++i) {
        fields.push_back(read_field(g.get(), i));
    }
    return fields;
}

gguf_summary summarize_gguf(const std::string & path) {
    const auto [g, meta] = open_gguf(path);

    gguf_summary s;
    const int64_t arch = gguf_find_key(g.get(), "general.architecture");
    if (arch >= 0 && gguf_get_kv_type(g.get(), arch) == GGUF_TYPE_STRING) {
        s.architecture = gguf_get_val_str(g.get(), arch);
    }
    for (int64_t i = 0; i < gguf_get_n_kv(g.get()); ++i) {
        const std::string key = gguf_get_key(g.get(), i);
        if (key.rfind("tokenizer.", 0) != 0 && key.rfind(s.architecture + ".", 0) != 0) {
            continue;
        }
        (s.metadata += key) += '\0';
        append_value(s.metadata, g.get(), i);
        s.metadata += '\0';
    }
    const uint64_t data = gguf_get_data_offset(g.get());
    for (int64_t i = 0; i < gguf_get_n_tensors(g.get()); ++i) {
        gguf_tensor_summary t;
        t.name = gguf_get_tensor_name(g.get(), i);
        t.type = ggml_type_name(gguf_get_tensor_type(g.get(), i));
        const ggml_tensor * tensor = ggml_get_tensor(meta.get(), t.name.c_str());
        for (int d = 0; d < 4; ++d) {
            t.shape[size_t(d)] = tensor->ne[d];
        }
        t.offset = data + gguf_get_tensor_offset(g.get(), i);
        t.n_bytes = gguf_get_tensor_size(g.get(), i);
        s.tensors.push_back(std::move(t));
    }
    return s;
}

template <typename T> static T number(const gguf_field & f) {
    T value;
    if (f.bytes.size() != sizeof value) {
        throw argument_error("key-value " + f.key + " has " + std::to_string(f.bytes.size()) + " bytes");
    }
    std::memcpy(&value, f.bytes.data(), sizeof value);
    return value;
}

static void check_changes(const std::string & key) {
    if (key == "general.alignment") {
        throw argument_error("the alignment of a file cannot change");
    }
}

static void set_field(gguf_context * g, const gguf_field & f) {
    const char * key = f.key.c_str();
    check_changes(f.key);
    if (f.type == GGUF_TYPE_STRING) {
        gguf_set_val_str(g, key, f.bytes.c_str());
    } else if (f.type == GGUF_TYPE_BOOL) {
        gguf_set_val_bool(g, key, number<int8_t>(f) != 0);
    } else if (f.type == GGUF_TYPE_UINT8) {
        gguf_set_val_u8(g, key, number<uint8_t>(f));
    } else if (f.type == GGUF_TYPE_INT8) {
        gguf_set_val_i8(g, key, number<int8_t>(f));
    } else if (f.type == GGUF_TYPE_UINT16) {
        gguf_set_val_u16(g, key, number<uint16_t>(f));
    } else if (f.type == GGUF_TYPE_INT16) {
        gguf_set_val_i16(g, key, number<int16_t>(f));
    } else if (f.type == GGUF_TYPE_UINT64) {
        gguf_set_val_u64(g, key, number<uint64_t>(f));
    } else if (f.type == GGUF_TYPE_INT64) {
        gguf_set_val_i64(g, key, number<int64_t>(f));
    } else if (f.type == GGUF_TYPE_UINT32) {
        gguf_set_val_u32(g, key, number<uint32_t>(f));
    } else if (f.type == GGUF_TYPE_INT32) {
        gguf_set_val_i32(g, key, number<int32_t>(f));
    } else if (f.type == GGUF_TYPE_FLOAT32) {
        gguf_set_val_f32(g, key, number<float>(f));
    } else if (f.type == GGUF_TYPE_FLOAT64) {
        gguf_set_val_f64(g, key, number<double>(f));
    } else if (f.type == GGUF_TYPE_ARRAY && f.element == GGUF_TYPE_STRING) {
        std::vector<const char *> texts;
        for (const std::string & text : f.texts) {
            texts.push_back(text.c_str());
        }
        gguf_set_arr_str(g, key, texts.data(), texts.size());
    } else if (f.type == GGUF_TYPE_ARRAY && f.element < GGUF_TYPE_COUNT && number_sizes[f.element] > 0 &&
               f.bytes.size() % number_sizes[f.element] == 0) {
        gguf_set_arr_data(g, key, f.element, f.bytes.data(), f.bytes.size() / number_sizes[f.element]);
    } else {
        throw argument_error("key-value " + f.key + " is of a type that is not written");
    }
}

// ggml ends the process, or counts wrong, where it is asked for another
static void check_shape(const gguf_new_tensor & t, ggml_type type) {
    bool fits = !t.shape.empty() && t.shape.size() <= GGML_MAX_DIMS && t.shape[0] % ggml_blck_size(type) == 0;
    int64_t room = std::numeric_limits<int64_t>::max() / int64_t(ggml_type_size(type)); // for elements
    for (const int64_t n : t.shape) {
        fits = fits && n > 0 && n <= room;
        room = fits ? room / n : 0;
    }
    if (!fits) {
        throw argument_error("tensor " + t.name + " has a shape that is none of " + ggml_type_name(type));
    }
}

gguf_header change_gguf_header(const std::string & path, const std::vector<std::string> & removed,
                               const std::vector<gguf_field> & fields, const std::vector<gguf_new_tensor> & tensors) {
    const auto [g, meta] = open_gguf(path);
    gguf_header out;
    out.data_offset = gguf_get_data_offset(g.get());
    out.alignment = gguf_get_alignment(g.get());
    out.n_data = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(g.get()); ++i) { // the file's own follow each other
        const uint64_t end = gguf_get_tensor_offset(g.get(), i) + gguf_get_tensor_size(g.get(), i);
        out.n_data = std::max<uint64_t>(out.n_data, GGML_PAD(end, out.alignment));
    }
    for (const std::string & key : removed) {
        check_changes(key);
        gguf_remove_key(g.get(), key.c_str());
    }
    for (const gguf_field & f : fields) {
        set_field(g.get(), f);
    }
    const ggml_init_params params{(tensors.size() + 1) * ggml_tensor_overhead(), nullptr, true};
    const ggml_context_owner shapes(ggml_init(params), ggml_free);
    for (const gguf_new_tensor & t : tensors) {
        if (gguf_find_tensor(g.get(), t.name.c_str()) >= 0 || t.name.size() >= GGML_MAX_NAME) {
            throw argument_error("tensor " + t.name + " is there already, or its name is too long");
        }
        const ggml_type type = type_named(t.type);
        check_shape(t, type);
        ggml_tensor * tensor = ggml_new_tensor(shapes.get(), type, int(t.shape.size()), t.shape.data());
        ggml_set_name(tensor, t.name.c_str());
        gguf_add_tensor(g.get(), tensor);
        out.offsets.push_back(gguf_get_tensor_offset(g.get(), gguf_get_n_tensors(g.get()) - 1));
    }
    out.bytes.resize(gguf_get_meta_size(g.get()));
    gguf_get_meta_data(g.get(), &out.bytes[0]);
    return out;
}

static gguf_context_ptr open_if_readable(const std::string & path) {
    const log_capture log;
    gguf_init_params params{};
    params.no_alloc = true;
    return {gguf_init_from_file(path.c_str(), params), gguf_free};
}

static double as_float(const gguf_context * g, int64_t id) {
    switch (gguf_get_kv_type(g, id)) {
    case GGUF_TYPE_FLOAT32:
        return gguf_get_val_f32(g, id);
    case GGUF_TYPE_FLOAT64:
        return gguf_get_val_f64(g, id);
    default:
        return 0.0;
    }
}

static bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

void check_model_metadata(const std::string & path) {
    constexpr uint32_t max_layers = 512; // LLAMA_MAX_LAYERS
    const gguf_context_ptr g = open_if_readable(path);
    if (!g) {
        return;
    }
    for (int64_t i = 0; i < gguf_get_n_kv(g.get()); ++i) {
        const std::string key = gguf_get_key(g.get(), i);
        const double value = as_float(g.get(), i);
        if (ends_with(key, "_epsilon") && !(value >= 0.0 && std::isfinite(value))) {
            throw model_error(path + ": " + key + " must be a finite number that is not negative");
        }
        if (!ends_with(key, ".block_count") || gguf_get_kv_type(g.get(), i) != GGUF_TYPE_UINT32) {
            continue; // another type is refused by the loader itself
        }
        const uint32_t n = gguf_get_val_u32(g.get(), i);
        if (n < 1 || n > max_layers) {
            throw model_error(path + ": " + key + " is " + std::to_string(n) + "; llama.cpp takes 1 to " +
                              std::to_string(max_layers));
        }
    }
}

void check_adapter_metadata(const std::string & path) {
    static constexpr std::pair<const char *, gguf_type> expected[] = {{"general.type", GGUF_TYPE_STRING},
                                                                      {"general.architecture", GGUF_TYPE_STRING},
                                                                      {"adapter.type", GGUF_TYPE_STRING},
                                                                      {"adapter.lora.alpha", GGUF_TYPE_FLOAT32}};
    const gguf_context_ptr g = open_if_readable(path);
    if (!g) {
        return;
    }
    const auto refuse = [&](const std::string & why) {
        throw model_error(path + ": llama.cpp cannot load this LoRA adapter (" + why + ")");
    };
    for (const auto & [key, type] : expected) {
        const int64_t id = gguf_find_key(g.get(), key);
        if (id >= 0 && gguf_get_kv_type(g.get(), id) != type) {
            refuse(std::string(key) + " is no " + gguf_type_name(type));
        }
    }
    for (int64_t i = 0; i < gguf_get_n_tensors(g.get()); ++i) {
        const ggml_type type = gguf_get_tensor_type(g.get(), i);
        if (type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && !ggml_is_quantized(type)) {
            refuse(std::string(gguf_get_tensor_name(g.get(), i)) + " is of type " + ggml_type_name(type));
        }
    }
}

} // namespace personasteer
