#pragma once

#include <stdexcept>
#include <string>

namespace personasteer {

// Carries the name of the Python class (personasteer.errors) that it becomes.
struct error : std::runtime_error {
    error(const char * class_name, const std::string & message) : std::runtime_error(message), name(class_name) {}
    const char * name;
};

inline error model_error(const std::string & message) { return {"ModelError", message}; }
inline error context_error(const std::string & message) { return {"ContextError", message}; }
inline error argument_error(const std::string & message) { return {"ArgumentError", message}; }
inline error vector_error(const std::string & message) { return {"VectorError", message}; }

} // namespace personasteer
