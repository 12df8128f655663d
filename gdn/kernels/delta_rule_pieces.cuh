// The gated delta rule where sequences x value heads x slices of dv are too few blocks for the GPU: a
// sequence is cut into splits of chunks, which the passes then take side by side.
//
// Over a split the state is S_end = M S_start + B, with M [dk,dk], its transition, and B, the end from
// S_start = 0, so that
//   1. forward_state_kernel: B of every split but the last; M of every split but the first and the last:
//      the ends of the columns of S_start = I with v = 0
//   2. merge_splits_kernel: the starts of all splits, one after another
//   3. the pass itself, every split from its start
// Backward the gradient of the state does the same with M^T: dS_start = M^T dS_end + B. A split is read
// twice, so it takes three to gain anything. The states are kept as the passes have them, transposed,
// [dv,dk], and so is M, beside M^T: S_end^T = S_start^T M^T.
//
// Where blocks and not bytes limit it, step 3 takes 1 / n of the uncut pass's time, and step 1 as long for
// its ends and dk / dv of that for its transitions, or less, as it writes nothing. Reached on an H200 (one
// sequence of 32768, 6 heads): (128, 256), 5 splits, steps 1 to 3 0.168 + 0.026 + 0.249 ms in place of 1.212;
// (32, 64), 43 splits, 0.046 + 0.023 + 0.054 in place of 1.163. Step 3's floor is 0.218 and 0.055.
#pragma once

#include "delta_rule_prepare.cuh"

namespace gdn {
namespace delta_rule {

struct Splits {
  int count, chunks;       // splits of a sequence, chunks in each (fewer in the last); count 1: not cut
  float* boundary_states;  // [B,Hv,count,dv,dk]: states at the splits' starts, or their gradients at the ends
  float* transitions;      // [B,Hv,count,2,dk,dk]: M^T, M

  __device__ int64_t number(int b, int h, int split, const Sizes& size) const {
    return (int64_t(b) * size.heads_v + h) * count + split;
  }
  __device__ float* boundary(int b, int h, int split, const Sizes& size) const {
    return boundary_states + number(b, h, split, size) * size.dv * size.dk;
  }
  __device__ float* transition(int b, int h, int split, const Sizes& size) const {
    return transitions + number(b, h, split, size) * 2 * size.dk * size.dk;
  }
};

constexpr int kMinSplits = 3, kMinSplitChunks = 4;

// As many splits as give each of `resident` a block where one split gives `blocks`.
inline Splits choose_splits(int chunks, int64_t blocks, int resident) {
  const int count = std::min(int(resident / std::max<int64_t>(blocks, 1)), chunks / kMinSplitChunks);
  if (count < kMinSplits) return {1, chunks, nullptr, nullptr};
  const int each = divide_up(chunks, count);
  return {divide_up(chunks, each), each, nullptr, nullptr};
}

// The most splits that all heads of a batch of at most so many tokens can have together, whatever its
// sequences' length: what memory must hold, since a model also takes batches smaller than the one it was made
// for. A sequence of c splits has 4 c chunks, so more than 64 (4 c - 1) tokens, and that is 704 c / 3 or
// more, as c >= 3.
inline int64_t max_splits(int64_t tokens, int heads, int slices, int resident) {
  return std::min<int64_t>(resident / slices, heads * tokens * 3 / 704);
}

constexpr int kMergeRows = 8, kMergeThreads = 512;
// Columns of dk that merge_splits_kernel is compiled for, a power of two.
constexpr int merge_columns(int DK) { return DK == 96 ? 128 : DK == 192 ? 256 : DK; }

// The boundary of split p + 1 += that of p times M_p^T, p = 1, 2, ..., or (kBackward) that of p - 1 += that
// of p times M_p, p = count - 2, ..., 1. A block: 8 rows of dv of a head through all splits. A thread: a
// column of dk (of kColumns compiled ones) and a part of the sum over dk; then of the total, the column
// in some of the rows. What a step reads of memory does not wait for the step before: registers hold, of each
// of the next kSteps steps, kAhead numbers of the thread's part of the matrix, and what the totals add to.
//
// Floor: a chain of count - 2 steps, each an SM's 16 dk^2 FLOP and two barriers; the matrices,
// read from the L2 cache by each block, are a few MB. Reached on an H200: 0.5 us a step at dk = 32.
template <int kColumns, bool kBackward>
__global__ void __launch_bounds__(kMergeThreads, kColumns < 128 ? 2 : 1)
    merge_splits_kernel(Splits splits, Sizes size) {
  constexpr int kParts = kMergeThreads / kColumns, kEach = kColumns / kParts;
  constexpr int kAhead = kEach < 32 ? kEach : 32, kSteps = kAhead < 8 ? 4 : kAhead < 32 ? 2 : 1;
  constexpr int kVector = kEach < 4 ? kEach : 4, kTotals = (kMergeRows + kParts - 1) / kParts;
  struct __align__(4 * kVector) Vector {
    float x[kVector];
  };
  __shared__ __align__(16) float rows[kMergeRows][kColumns];
  __shared__ float partial[kMergeRows][kMergeThreads];
  const int h = blockIdx.y, b = blockIdx.z, first = blockIdx.x * kMergeRows, dk = size.dk;
  const int part = threadIdx.x / kColumns, column = threadIdx.x % kColumns, begin = part * kEach;
  const int64_t offset = int64_t(first) * dk + column;
  const auto split_at = [&](int step) { return kBackward ? splits.count - 1 - step : step; };
  // of a step's matrix, rows begin + i on
  const auto read_matrix = [&](float(&x)[kAhead], int step, int i) {
    if (step > splits.count - 2) return;
    const float* m =
        splits.transition(b, h, split_at(step), size) + (kBackward ? dk * dk : 0) + (begin + i) * dk + column;
#pragma unroll
    for (int j = 0; j < kAhead; j++) x[j] = column < dk && begin + i + j < dk ? m[j * dk] : 0.f;
  };
  // f(r, k) for each row of this thread's totals
  const auto for_each_row_of_thread = [&](const auto& f) {
#pragma unroll
    for (int k = 0; k < kTotals; k++) {
      const int r = part + k * kParts;
      if (r < kMergeRows && column < dk && first + r < size.dv) f(r, k);
    }
  };
  const auto boundary = [&](int step) { return splits.boundary(b, h, split_at(step), size) + offset; };
  const auto read_boundary = [&](float(&x)[kTotals], int step) {
    if (step > splits.count - 1) return;
    const float* from = boundary(step);
    for_each_row_of_thread([&](int r, int k) { x[k] = from[r * dk]; });
  };

  for (int i = threadIdx.x; i < kMergeRows * kColumns; i += kMergeThreads) (&rows[0][0])[i] = 0.f;
  float total[kTotals], matrix[kSteps][kAhead], added[kSteps][kTotals];
  read_boundary(total, 1);
#pragma unroll
  for (int s = 0; s < kSteps; s++) read_matrix(matrix[s], 1 + s, 0), read_boundary(added[s], 2 + s);
  __syncthreads();
  for_each_row_of_thread([&](int r, int k) { rows[r][column] = total[k]; });
  __syncthreads();
  for (int next = 1; next < splits.count - 1; next += kSteps) {
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const int step = next + s;
      if (step > splits.count - 2) break;
      float sum[kMergeRows] = {};
#pragma unroll
      for (int i = 0; i < kEach; i += kAhead) {
        if (i > 0) read_matrix(matrix[s], step, i);
#pragma unroll
        for (int j = 0; j < kAhead; j += kVector)
#pragma unroll
          for (int r = 0; r < kMergeRows; r++) {
            const Vector y = *reinterpret_cast<const Vector*>(&rows[r][begin + i + j]);
#pragma unroll
            for (int e = 0; e < kVector; e++) sum[r] += y.x[e] * matrix[s][j + e];
          }
      }
      read_matrix(matrix[s], step + kSteps, 0);
#pragma unroll
      for (int r = 0; r < kMergeRows; r++) partial[r][threadIdx.x] = sum[r];
      __syncthreads();
      float* to = boundary(step + 1);
      for_each_row_of_thread([&](int r, int k) {
        float x = added[s][k];
#pragma unroll
        for (int p = 0; p < kParts; p++) x += partial[r][p * kColumns + column];
        rows[r][column] = x;
        to[r * dk] = x;
      });
      read_boundary(added[s], step + 1 + kSteps);
      __syncthreads();
    }
  }
}

}  // namespace delta_rule
}  // namespace gdn
