// What the readable layers share: a number of an array, the functions of gdn/cpu_layers.h in float, and how
// rows are shared out.
#pragma once

#include "../../gdn/kernels/common.cuh"

namespace gdn {
namespace readable {

constexpr int kThreads = 128;          // of a block where a thread does one number
constexpr int kWarps = kThreads / 32;  // of a block where a warp does one row, or one head of a row
constexpr int kPieceRows = 64;         // rows that one thread sums up, of a sum over all rows

// Zero where the thread is not active: x is then not read.
__device__ inline float number(const act* x, int64_t at, bool active = true) {
  return active ? __bfloat162float(x[at]) : 0.0f;
}
__device__ inline act rounded(float x) { return __float2bfloat16_rn(x); }

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline float silu_derivative(float x) {
  const float s = sigmoid(x);
  return s * (1 + x * (1 - s));
}
__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// The number this thread does, and the row (or head of a row) this warp does.
__device__ inline int64_t thread_number() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t warp_number() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; }
__device__ inline int lane_number() { return threadIdx.x % 32; }

inline unsigned blocks_of_threads(int64_t n) { return unsigned(divide_up(n, int64_t(kThreads))); }
inline unsigned blocks_of_warps(int64_t n) { return unsigned(divide_up(n, int64_t(kWarps))); }

// A sum over rows has two stages: a thread (x: column) sums up one piece (y) of rows, add_partials the
// pieces.
inline int pieces_of(int rows) { return divide_up(rows, kPieceRows); }
inline dim3 grid_of_pieces(int columns, int rows) {
  return dim3(divide_up(columns, kThreads), pieces_of(rows));
}

}  // namespace readable
}  // namespace gdn
