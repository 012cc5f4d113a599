#include "log_capture.h"

#include "llama.h"

#include <cstring>

namespace personasteer {

static thread_local log_capture * current = nullptr;
static ggml_log_callback previous = nullptr;
static void * previous_data = nullptr;

void capture_line(int level, const char * text) {
    if (level != GGML_LOG_LEVEL_ERROR) {
        return;
    }
    const char * colon = std::strstr(text, ": "); // "function_name: message"
    std::string line = colon && std::memchr(text, ' ', size_t(colon - text)) == nullptr ? colon + 2 : text;
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) {
        line.pop_back();
    }
    if (line.empty()) {
        return;
    }
    if (!current->lines.empty()) {
        current->lines += "; ";
    }
    current->lines += line;
}

static void on_log(ggml_log_level level, const char * text, void *) {
    if (current) {
        capture_line(level, text);
    } else if (previous) {
        previous(level, text, previous_data);
    }
}

log_capture::log_capture() : outer(current) { current = this; }
log_capture::~log_capture() { current = outer; }
std::string log_capture::errors() const { return lines; }

void log_capture::install() {
    llama_log_get(&previous, &previous_data);
    llama_log_set(on_log, nullptr);
}

} // namespace personasteer
