// TEST_CASE("..." * needs_gpu()): a test of doctest's suite "gpu", which test_gdn.cu skips by name where there
// is no GPU that this build can use. (Asking for one here, before main, would be too early for CUDA.)
#pragma once

#include <doctest/doctest.h>

namespace gdn_tests {

constexpr const char* kGpuSuite = "gpu";

inline doctest::test_suite needs_gpu() { return kGpuSuite; }

}  // namespace gdn_tests
