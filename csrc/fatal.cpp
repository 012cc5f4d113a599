#include "fatal.h"

#include "log_capture.h"

#include "ggml.h"

#include <atomic>
#include <csignal>
#include <cstddef>

#include <unistd.h>

namespace personasteer {

namespace {

// What a signal handler may do, and nothing else.
[[noreturn]] void end(const char * who, const char * why) {
    static std::atomic_flag said = ATOMIC_FLAG_INIT; // ggml's threads may come here together
    if (!said.test_and_set()) {
        const char * begin = isatty(STDERR_FILENO) ? "\r\x1b[K\x1b[?25h" : ""; // a progress bar hides the cursor
        char line[512] = "";
        size_t n = 0;
        const char * const parts[] = {begin, "personasteer: ", who, why};
        for (const char * part : parts) {
            for (; *part && n + 1 < sizeof line; ++part) {
                line[n++] = *part == '\n' ? ' ' : *part;
            }
        }
        line[n++] = '\n';
        for (const char * at = line; n > 0;) {
            const ssize_t done = write(STDERR_FILENO, at, n);
            if (done <= 0) {
                break;
            }
            at += done;
            n -= size_t(done);
        }
        _exit(1);
    }
    for (;;) {
        pause();
    }
}

// "folder/file.cpp:12: why" -> "file.cpp:12: why"
const char * without_folder(const char * message) {
    const char * begin = message;
    for (const char * c = message; *c && !(c[0] == ':' && c[1] == ' '); ++c) {
        begin = *c == '/' ? c + 1 : begin;
    }
    return begin;
}

} // namespace

void end_in_one_line() {
    log_capture::drop_others();
    struct sigaction act = {};
    act.sa_handler = [](int) { end("", "a file in use was cut short, or cannot be read (SIGBUS)"); };
    sigaction(SIGBUS, &act, nullptr);
    ggml_set_abort_callback([](const char * message) { end("llama.cpp: ", without_folder(message)); });
}

} // namespace personasteer
