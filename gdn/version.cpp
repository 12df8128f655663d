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
#ifdef __clang__
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  return compiler + "; GPU code: " + GDN_GPU_CODE;
}

}  // namespace gdn
