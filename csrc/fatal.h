#pragma once

namespace personasteer {

// From now on the process ends with a line on stderr and exit code 1 where it would end by a signal through no fault of
// the program: a mapped file is cut short (SIGBUS), or llama.cpp gives up (ggml_abort). For a process of our own, a
// command; whoever imports the library keeps its signals.
void end_in_one_line();

} // namespace personasteer
