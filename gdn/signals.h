// Signals that end a run: SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (a batch
// system's warning). While there is nothing to lose the first one ends the program. In a training it lets the
// step finish, saves and leaves; a second one changes nothing but that a validation or a sample on the way is
// given up at once anyway; a third one ends the program without saving. The exit code is 128 + the signal's
// number.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <string>

namespace gdn {
namespace signals {

inline volatile std::sig_atomic_t received = 0, count = 0, work_to_save = 0;
// One of several ranks, all of which may be sent a signal, says nothing.
inline volatile std::sig_atomic_t silent = 0;

inline void on_signal(int signal) {
  constexpr char kFirst[] = "\ntrain_gdn: finishing this step and saving; twice more ends without saving\n";
  constexpr char kSecond[] =
      "\ntrain_gdn: still finishing this step and saving; once more ends without saving\n";
  received = signal;
  count = count + 1;
  if (!work_to_save || count >= 3) _exit(128 + signal);
  if (silent) return;
  const char* line = count == 1 ? kFirst : kSecond;
  if (write(STDERR_FILENO, line, std::strlen(line)) < 0) {
  }  // nobody may be there to read it
}

inline void install() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGUSR1}) {
    struct sigaction before = {};
    sigaction(signal, nullptr, &before);
    const bool nohup = signal == SIGHUP && before.sa_handler == SIG_IGN;
    if (!nohup) sigaction(signal, &action, nullptr);
  }
  // A file at its size limit (ulimit -f) is then an error of write(), as a full disk is.
  signal(SIGXFSZ, SIG_IGN);
}

// From here on signals save. A terminal or pipe that is gone ends no training.
inline void begin_training() {
  signal(SIGPIPE, SIG_IGN);
  work_to_save = 1;
}

inline bool stop() { return received != 0; }
inline int exit_code() { return 128 + int(received); }
inline std::string text() {
  return "signal " + std::to_string(int(received)) + " (" + strsignal(int(received)) + ")";
}

}  // namespace signals
}  // namespace gdn
