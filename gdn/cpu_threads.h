// Threads of the CPU's layers that wait for each other.
#pragma once

#include <unistd.h>

#include <cstdlib>

namespace gdn {

// Lets OpenMP's threads sleep soon where they wait: by default they spin for milliseconds, which on cores
// that others use takes the time that the thread waited for needs. OpenMP reads its settings before main()
// begins, so the program starts itself again with them, once. Where the caller chose a setting, that stays.
inline void sleep_while_waiting(char** argv) {
  for (const char* chosen : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"})
    if (std::getenv(chosen)) return;
  if (setenv("GOMP_SPINCOUNT", "1000", 1) == 0) execv("/proc/self/exe", argv);  // goes on where that fails
}

}  // namespace gdn
