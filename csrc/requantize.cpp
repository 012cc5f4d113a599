#include "requantize.h"

#include "errors.h"

#include <cfloat>
#include <cmath>
#include <cstring>

namespace personasteer {

ggml_type type_named(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name(ggml_type(i));
        if (known && name == known && ggml_blck_size(ggml_type(i)) > 0) {
            return ggml_type(i);
        }
    }
    throw argument_error("unknown tensor type " + name);
}

std::vector<float> dequantize(ggml_type type, const std::string & data, int64_t n_per_row) {
    const int64_t n_blocks =
        n_per_row > 0 && n_per_row % ggml_blck_size(type) == 0 ? n_per_row / ggml_blck_size(type) : 0;
    if (n_blocks > 0 && data.empty()) {
        return {};
    }
    const size_t most = data.size() / ggml_type_size(type);
    const size_t row = size_t(n_blocks) <= most ? size_t(n_blocks) * ggml_type_size(type) : 0;
    if (row == 0 || data.size() % row != 0) {
        throw argument_error(std::to_string(data.size()) + " bytes are no rows of " + std::to_string(n_per_row) + " " +
                             ggml_type_name(type));
    }
    std::vector<float> out(data.size() / row * size_t(n_per_row));
    if (type == GGML_TYPE_F32) {
        std::memcpy(out.data(), data.data(), data.size());
    } else if (const auto to_float = ggml_get_type_traits(type)->to_float) {
        to_float(data.data(), out.data(), int64_t(out.size()));
    } else {
        throw argument_error(std::string("ggml cannot read ") + ggml_type_name(type) + " as float32");
    }
    return out;
}

// ggml ends the process where it is asked for another
static bool is_written(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32:
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16:
    case GGML_TYPE_Q1_0:
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_Q4_1:
    case GGML_TYPE_Q5_0:
    case GGML_TYPE_Q5_1:
    case GGML_TYPE_Q8_0:
    case GGML_TYPE_MXFP4:
    case GGML_TYPE_NVFP4:
    case GGML_TYPE_Q2_K:
    case GGML_TYPE_Q3_K:
    case GGML_TYPE_Q4_K:
    case GGML_TYPE_Q5_K:
    case GGML_TYPE_Q6_K:
    case GGML_TYPE_TQ1_0:
    case GGML_TYPE_TQ2_0:
    case GGML_TYPE_IQ2_XXS:
    case GGML_TYPE_IQ2_XS:
    case GGML_TYPE_IQ3_XXS:
    case GGML_TYPE_IQ3_S:
    case GGML_TYPE_IQ2_S:
    case GGML_TYPE_IQ1_S:
    case GGML_TYPE_IQ1_M:
    case GGML_TYPE_IQ4_NL:
    case GGML_TYPE_IQ4_XS:
        return true;
    default:
        return false;
    }
}

std::string quantize(ggml_type type, const float * data, int64_t n_rows, int64_t n_per_row,
                     const std::vector<float> & importance) {
    if (!is_written(type)) {
        throw argument_error(std::string("ggml cannot write ") + ggml_type_name(type));
    }
    if (n_per_row <= 0 || n_per_row % ggml_blck_size(type) != 0) {
        throw argument_error("rows of " + std::to_string(n_per_row) + " are no blocks of " + ggml_type_name(type));
    }
    if (!importance.empty() && int64_t(importance.size()) != n_per_row) {
        throw argument_error("an importance for each of " + std::to_string(n_per_row) + " columns is needed, not " +
                             std::to_string(importance.size()));
    }
    if (importance.empty() && ggml_quantize_requires_imatrix(type)) {
        throw argument_error(std::string(ggml_type_name(type)) + " can be written with an importance matrix only");
    }
    // ggml's quantizers erase weights, never end or end the process where importances vanish or overflow
    bool any = importance.empty();
    for (const float x : importance) {
        if (!(x >= 0.0f && x <= 1e30f)) {
            throw argument_error("an importance is negative, not finite or above 1e30");
        }
        any = any || x > 0.0f;
    }
    if (!any) {
        throw argument_error("all importances are 0");
    }
    const float largest = type == GGML_TYPE_F32 ? FLT_MAX : 1e18f;
    for (int64_t i = 0; i < n_rows * n_per_row; ++i) {
        if (!(std::fabs(data[i]) <= largest)) {
            throw argument_error("a weight to quantize is not finite, or too large for " +
                                 std::string(ggml_type_name(type)));
        }
    }
    std::string out(size_t(n_rows) * ggml_row_size(type, n_per_row), '\0');
    ggml_quantize_chunk(type, data, &out[0], 0, n_rows, n_per_row, importance.empty() ? nullptr : importance.data());
    return out;
}

} // namespace personasteer
