// Initial values drawn from a normal distribution, as a function of key and index alone (random.h).
#pragma once

#include "../random.h"
#include "common.cuh"

namespace gdn {

constexpr int kNormalThreads = 256;

// Two numbers a thread. About 100 operations in double a pair: it runs once, at the start of a run.
static __global__ void __launch_bounds__(kNormalThreads)
    random_normals_kernel(float* __restrict__ x, size_t n, uint64_t key, double standard_deviation) {
  const size_t pair = size_t(blockIdx.x) * kNormalThreads + threadIdx.x;
  if (2 * pair >= n) return;
  double normal[2];
  random_normal_pair(key, pair, normal);
  x[2 * pair] = float(standard_deviation * normal[0]);
  if (2 * pair + 1 < n) x[2 * pair + 1] = float(standard_deviation * normal[1]);
}

void random_normals(Cuda& dev, float* x, size_t n, uint64_t key, double standard_deviation) {
  Range<Cuda> range(dev, __func__);
  if (n == 0) return;
  const unsigned blocks = unsigned(divide_up(divide_up(n, size_t(2)), size_t(kNormalThreads)));
  random_normals_kernel<<<blocks, kNormalThreads, 0, dev.stream>>>(x, n, key, standard_deviation);
  launched("random_normals");
}

}  // namespace gdn
