// Softmax cross-entropy. For a row x of logits, over the columns of the vocabulary, and its target t:
//   loss = log(sum_c e^{x_c}) - x_t        dx_c = dlogits_scale (e^{x_c} / sum e^x - [c = t])
// The gradient replaces the logits in place; columns beyond the vocabulary count as -infinity and get 0.
//
// Times: NVIDIA H100, dev/results/layer_speed/h100_d1024.txt; %: of the rate of a copy of as many bytes.
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>

#include "common.cuh"

namespace gdn {

constexpr int kClassifierThreads = 512;
constexpr int kSmallVocab = 2048;           // up to here a warp does a row, beyond a block
constexpr int kStagedColumns = 110 * 1024;  // at most, of a row in shared memory at a time: 220 KB
constexpr int kSumBytes = 2 * kClassifierThreads / 32 * sizeof(float);  // shared_max, shared_sum

template <int kThreads>
__device__ float row_max(float x, float* shared) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  if constexpr (kThreads > 32) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < kThreads / 32 ? shared[lane] : -INFINITY;
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
}

template <int kThreads>
__device__ float row_sum(float x, [[maybe_unused]] float* shared) {
  if constexpr (kThreads == 32)
    return lane_sum(x);
  else
    return block_sum<kThreads / 32>(x, shared);
}

// Eight logits, -infinity in columns that are not of the vocabulary.
__device__ inline void unpack_logits(float (&x)[8], uint4 packed, int column, int vocab) {
  unpack8(x, packed);
  if (column + 8 <= vocab) return;
#pragma unroll
  for (int c = 0; c < 8; c++)
    if (column + c >= vocab) x[c] = -INFINITY;
}

// A row belongs to kThreads threads: a warp up to kSmallVocab columns, else a block. The row is copied to
// shared memory by cp.async; a thread reads back only what it copied itself, so only the maximum and the sum
// over the row need barriers, and logits cross global memory once in each direction. A row longer than
// `staged` columns is processed in parts, and all parts but the last are read a second time.
//
// n = 32768, V = 50304: 6.6 GB (logits in, gradient out), 2.194 ms at the copy rate, measured 2.258 ms, 97%;
// the loss alone 3.3 GB, 1.097 ms, measured 1.121 ms, 98%. V = 256: 0.0226 ms, 49%; the loss alone 0.0177 ms,
// 32%.
template <int kThreads>
__global__ void __launch_bounds__(kClassifierThreads)
    softmax_cross_entropy_kernel(act* logits, float* __restrict__ losses, const int32_t* __restrict__ targets,
                                 int rows, int vocab, int padded, int staged, float dlogits_scale) {
  extern __shared__ uint4 stage[];
  __shared__ float shared_max[kClassifierThreads / 32], shared_sum[kClassifierThreads / 32];
  const int row_in_block = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
  const int row = blockIdx.x * (kClassifierThreads / kThreads) + row_in_block;
  if (row >= rows) return;  // a whole warp, or no one
  act* line = logits + int64_t(row) * padded;
  uint4* mine = stage + row_in_block * (staged / 8);
  const int target = targets[row];
  const float target_logit = target < 0 ? 0.0f : __bfloat162float(line[target]);

  float top = -INFINITY, sum = 0;  // of this thread: the largest logit, and the sum of e^(logit - top)
  int first = 0;                   // column where the piece in shared memory begins
  for (int begin = 0; begin < padded; begin += staged) {
    first = begin;
    const int columns = min(staged, padded - begin);
    for (int c = thread * 8; c < columns; c += kThreads * 8)
      __pipeline_memcpy_async(mine + c / 8, line + begin + c, 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    const float old_top = top;
    for (int c = thread * 8; c < columns; c += kThreads * 8) {
      float x[8];
      unpack_logits(x, mine[c / 8], begin + c, vocab);
#pragma unroll
      for (int i = 0; i < 8; i++) top = fmaxf(top, x[i]);
    }
    if (top == -INFINITY) continue;  // no column of the vocabulary yet
    sum *= fast_exp2(kLog2e * (old_top - top));
    for (int c = thread * 8; c < columns; c += kThreads * 8) {
      float x[8];
      unpack_logits(x, mine[c / 8], begin + c, vocab);
#pragma unroll
      for (int i = 0; i < 8; i++) sum += fast_exp2(kLog2e * (x[i] - top));
    }
  }
  const float row_top = row_max<kThreads>(top, shared_max);
  const float total =
      row_sum<kThreads>(top == -INFINITY ? 0.0f : sum * fast_exp2(kLog2e * (top - row_top)), shared_sum);
  if (thread == 0) losses[row] = target < 0 ? 0.0f : logf(total) - (target_logit - row_top);
  if (dlogits_scale == 0) return;
  if constexpr (kThreads == 32) __syncwarp();  // every lane has read its target's logit

  const float scale = target < 0 ? 0.0f : dlogits_scale, factor = scale / total;
  for (int begin = first; begin >= 0; begin -= staged) {  // the last piece is still in shared memory
    const int columns = min(staged, padded - begin);
    if (begin != first) {
      for (int c = thread * 8; c < columns; c += kThreads * 8)
        __pipeline_memcpy_async(mine + c / 8, line + begin + c, 16);
      __pipeline_commit();
      __pipeline_wait_prior(0);
    }
    for (int c = thread * 8; c < columns; c += kThreads * 8) {
      float x[8];
      unpack_logits(x, mine[c / 8], begin + c, vocab);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        x[i] = factor * fast_exp2(kLog2e * (x[i] - row_top));
        if (begin + c + i == target) x[i] -= scale;
      }
      store16(line + begin + c, pack8(x));
    }
  }
}

template <int kThreads>
void launch_softmax_cross_entropy(Cuda& dev, act* logits, float* losses, const int32_t* targets, int rows,
                                  int vocab, int padded, float dlogits_scale) {
  constexpr int kRows = kClassifierThreads / kThreads;
  const int room = (dev.shared_bytes - kSumBytes) / (kRows * int(sizeof(act))) / 8 * 8;
  const int staged = std::min({padded, kStagedColumns, room});
  const int shared_bytes = kRows * staged * int(sizeof(act));
  allow_shared_bytes(dev, softmax_cross_entropy_kernel<kThreads>, shared_bytes, "the classifier");
  softmax_cross_entropy_kernel<kThreads>
      <<<divide_up(rows, kRows), kClassifierThreads, shared_bytes, dev.stream>>>(
          logits, losses, targets, rows, vocab, padded, staged, dlogits_scale);
  launched("softmax_cross_entropy");
}

void softmax_cross_entropy(Cuda& dev, act* logits, float* losses, const int32_t* targets, int rows, int vocab,
                           int padded, float dlogits_scale) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(padded, "the padded vocabulary");
  if (rows == 0) return;
  if (padded <= kSmallVocab)
    launch_softmax_cross_entropy<32>(dev, logits, losses, targets, rows, vocab, padded, dlogits_scale);
  else
    launch_softmax_cross_entropy<kClassifierThreads>(dev, logits, losses, targets, rows, vocab, padded,
                                                     dlogits_scale);
}

// One block; thread i adds losses i, i + 1024, ... in double. n = 32768: 131 KB, so the latency of one
// launch; measured 0.0057 ms.
static __global__ void __launch_bounds__(1024)
    sum_losses_kernel(double* __restrict__ total, const float* __restrict__ losses, int rows) {
  __shared__ double shared[32];
  double sum = 0;
#pragma unroll 8
  for (int m = threadIdx.x; m < rows; m += 1024) sum += losses[m];
  sum = block_sum<32>(sum, shared);
  if (threadIdx.x == 0) *total += sum;
}

void sum_losses(Cuda& dev, double* total, const float* losses, int rows) {
  Range<Cuda> range(dev, __func__);
  sum_losses_kernel<<<1, 1024, 0, dev.stream>>>(total, losses, rows);
  launched("sum_losses");
}

}  // namespace gdn
