#include "version.h"

#ifndef GDN_COMMIT
#define GDN_COMMIT "unknown"
#endif
#ifndef GDN_GPU_CODE
#define GDN_GPU_CODE "none (built without nvcc)"
#endif

namespace gdn {

std::string commit() { return GDN_COMMIT; }

std::string build_text() {
#ifdef GDN_OPENBLAS
  const char* products = "OpenBLAS";
#else
  const char* products = "own loops";
#endif
#ifdef __clang__
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  return compiler + "; matrix products on the CPU: " + products + "; GPU code: " + GDN_GPU_CODE;
}

}  // namespace gdn
