#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <utility>
#include <vector>

namespace personasteer {

// Hands a vector over to NumPy without a copy.
template <typename T> pybind11::array_t<T> to_array(std::vector<T> && data, std::vector<pybind11::ssize_t> shape) {
    auto owned = std::make_unique<std::vector<T>>(std::move(data));
    const T * numbers = owned->data();
    const pybind11::capsule free(owned.get(), [](void * p) { delete static_cast<std::vector<T> *>(p); });
    owned.release(); // the capsule's now
    return pybind11::array_t<T>(std::move(shape), numbers, free);
}

using float_array = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;

inline std::vector<float> to_vector(const float_array & a) { return {a.data(), a.data() + a.size()}; }

} // namespace personasteer
