// Shared by the gradients kernels of both architectures.
#pragma once

#include "pass_common.cuh"

namespace gdn {
namespace delta_rule {

struct GradientInputs {
  const act *qkv, *d_o;
  Saved saved;
  Adjoints adjoints;
  const float* gates;
};

template <int Tiles>
__device__ inline void scale_tiles(float (&x)[Tiles][4], float factor) {
#pragma unroll
  for (int t = 0; t < Tiles; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[t][e] *= factor;
}

}  // namespace delta_rule
}  // namespace gdn
