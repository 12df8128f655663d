// Softmax cross-entropy to be read; equations in gdn/cpu_layers.h. A warp does a row.
#pragma once

#include "common.cuh"

namespace gdn {
namespace readable {

__device__ inline float lane_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

static __global__ void __launch_bounds__(kThreads)
    softmax_cross_entropy_kernel(act* logits, float* losses, const int32_t* targets, int rows, int vocab,
                                 int padded, float dlogits_scale) {
  const int64_t row = warp_number();
  if (row >= rows) return;
  act* line = logits + row * padded;
  const int target = targets[row];
  const float target_logit = target < 0 ? 0.0f : number(line, target);
  float top = -INFINITY, sum = 0;
  for (int c = lane_number(); c < vocab; c += 32) top = fmaxf(top, number(line, c));
  top = lane_max(top);
  for (int c = lane_number(); c < vocab; c += 32) sum += expf(number(line, c) - top);
  sum = lane_sum(sum);
  losses[row] = target < 0 ? 0.0f : logf(sum) - (target_logit - top);
  if (dlogits_scale == 0) return;
  __syncwarp();  // every lane has read its target's logit
  const float scale = target < 0 ? 0.0f : dlogits_scale;
  for (int c = lane_number(); c < padded; c += 32) {
    const float probability = c < vocab ? expf(number(line, c) - top) / sum : 0.0f;
    line[c] = rounded(scale * (probability - (c == target ? 1.0f : 0.0f)));
  }
}

inline void softmax_cross_entropy(Cuda& dev, act* logits, float* losses, const int32_t* targets, int rows,
                                  int vocab, int padded, float dlogits_scale) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(padded, "the padded vocabulary");
  if (rows == 0) return;
  softmax_cross_entropy_kernel<<<blocks_of_warps(rows), kThreads, 0, dev.stream>>>(
      logits, losses, targets, rows, vocab, padded, dlogits_scale);
  launched("softmax_cross_entropy");
}

// One warp adds up the losses in double.
static __global__ void __launch_bounds__(32) sum_losses_kernel(double* total, const float* losses, int rows) {
  double sum = 0;
#pragma unroll 8
  for (int m = lane_number(); m < rows; m += 32) sum += losses[m];
  sum = lane_sum(sum);
  if (lane_number() == 0) *total += sum;
}

inline void sum_losses(Cuda& dev, double* total, const float* losses, int rows) {
  Range<Cuda> range(dev, __func__);
  sum_losses_kernel<<<1, 32, 0, dev.stream>>>(total, losses, rows);
  launched("sum_losses");
}

}  // namespace readable
}  // namespace gdn
