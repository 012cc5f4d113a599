#pragma once

#include <cstdio>
#include <string>

namespace personasteer {

// While one lives, what llama.cpp logs on this thread is kept here; other threads' lines go where they went before.
class log_capture {
  public:
    log_capture();
    ~log_capture();
    log_capture(const log_capture &) = delete;
    log_capture & operator=(const log_capture &) = delete;

    // the error lines, joined; "" when llama.cpp reported none
    std::string errors() const;

    // call once, after llama_cpp has set its own callback
    static void install();
    // from now on other lines go nowhere: a command says its one line itself
    static void drop_others();

  private:
    friend void capture_line(int level, const char * text);
    std::string lines;   // error lines, each without its function prefix
    log_capture * outer; // captures nest
};

// While one lives, what the process writes to stderr is kept here: llama.cpp's grammar parser prints there. One at a
// time; others wait.
class stderr_capture {
  public:
    stderr_capture();
    ~stderr_capture();
    stderr_capture(const stderr_capture &) = delete;
    stderr_capture & operator=(const stderr_capture &) = delete;

    std::string first_line(); // what was written so far

  private:
    FILE * file = nullptr;
    int saved = -1; // what stderr was
};

} // namespace personasteer
