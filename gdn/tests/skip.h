// Tests that cannot run on this machine are skipped by name, and counted.
#pragma once

#include <cstdio>

namespace gdn_tests {

inline int skipped_tests = 0;

inline void skip(const char* reason, const char* test_name) {
  std::printf("skipped (%s): %s\n", reason, test_name);
  skipped_tests++;
}

// True, with a line that says so, where the test cannot run for want of a GPU (or of a build with nvcc).
inline bool skip_without_gpu(const char* test_name) {
#ifdef __CUDACC__
  if (gdn::Cuda::available()) return false;
  skip("no GPU", test_name);
#else
  skip("built without nvcc", test_name);
#endif
  return true;
}

}  // namespace gdn_tests
