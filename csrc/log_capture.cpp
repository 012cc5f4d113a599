#include "log_capture.h"

#include "llama.h"

#include <cstring>
#include <mutex>

#include <unistd.h>

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
    for (char & c : line) { // may quote the file
        c = static_cast<unsigned char>(c) < ' ' || c == '\x7f' ? ' ' : c;
    }
    while (!line.empty() && line.back() == ' ') {
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
        try { // no exception may cross llama.cpp's frames
            capture_line(level, text);
        } catch (...) {
            return; // no memory for the line: it is left out
        }
    } else if (previous) {
        previous(level, text, previous_data);
    }
}

log_capture::log_capture() : outer(current) { current = this; }
log_capture::~log_capture() { current = outer; }
std::string log_capture::errors() const { return lines; }

static std::mutex & one_capture() {
    static std::mutex mutex;
    return mutex;
}

stderr_capture::stderr_capture() {
    one_capture().lock();
    std::fflush(stderr);
    file = std::tmpfile();
    saved = file ? dup(STDERR_FILENO) : -1;
    if (saved >= 0) {
        dup2(fileno(file), STDERR_FILENO);
    }
}

stderr_capture::~stderr_capture() {
    std::fflush(stderr);
    if (saved >= 0) {
        dup2(saved, STDERR_FILENO);
        close(saved);
    }
    if (file) {
        std::fclose(file);
    }
    one_capture().unlock();
}

std::string stderr_capture::first_line() {
    std::fflush(stderr);
    char line[256] = "";
    if (!file || std::fseek(file, 0, SEEK_SET) != 0 || !std::fgets(line, sizeof line, file)) {
        line[0] = '\0';
    }
    line[std::strcspn(line, "\n")] = '\0';
    return line;
}

void log_capture::install() {
    llama_log_get(&previous, &previous_data);
    llama_log_set(on_log, nullptr);
}

void log_capture::drop_others() { previous = nullptr; }

} // namespace personasteer
