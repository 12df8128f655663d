// Threads of the CPU's layers that wait for each other.
#pragma once

#include <limits.h>
#include <unistd.h>

#include <cstdlib>

namespace gdn {

// Lets OpenMP's threads sleep where they wait: by default they spin for milliseconds, which on cores that others
// use takes the time that the thread waited for needs (dev/log.md, "Threads that spin"). OpenMP reads its
// settings before main() begins, so the program starts itself again with them, once, by its path, so that it
// keeps its name in lists of processes. Where the caller chose a setting, that stays; where starting again
// fails, the program goes on.
inline void sleep_while_waiting(char** argv) {
  for (const char* chosen : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"})
    if (std::getenv(chosen)) return;
  if (setenv("OMP_WAIT_POLICY", "passive", 1) != 0) return;
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  if (length <= 0) return;
  path[length] = 0;
  execv(path, argv);
  execv("/proc/self/exe", argv);  // of a program that was deleted or replaced since it began
}

}  // namespace gdn
