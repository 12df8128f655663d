// Sequence splits (context parallelism within one GPU): where sequences x value heads x dv slices are fewer
// CTAs than the GPU holds, each sequence is split into runs of chunks that the passes process concurrently.
//
// Over a split the state is S_end = M S_start + B (dev/doc/delta_rule.md, splits): M [dk,dk] is the
// transition matrix, B the final state for S_start = 0.
//   1. forward_state_kernel: B of every split but the last; M of every split but the first and the last,
//      as the final state for S_start = I and v = 0
//   2. merge_splits_kernel: the initial states of all splits, one after another
//   3. the pass itself, each split from its initial state
// In the backward, dS_start = M^T dS_end + B. Each split is processed twice, so at least three splits are
// needed for a gain. States are stored as the passes hold them, transposed, [dv,dk], and so is M, with M^T
// beside it: S_end^T = S_start^T M^T.
//
// Step 1 reads only the chunks that its results depend on to 2^-40 (split_memory): in a head that forgets, the
// last few of a split, and no M at all; in one that remembers, the whole split.
//
// Where the number of CTAs and not bytes is the limit, step 3 takes 1 / n of the unsplit pass's time, and
// step 1 as long for B and dk / dv of that for M, or less, as it writes nothing. H200, one sequence of 32768,
// 6 heads, (128, 256), 5 splits that remember all: steps 1 to 3 take 0.168 + 0.026 + 0.249 ms, the unsplit
// pass 1.212; 16/32 heads of 128, 8 splits: 0.232 + 0.032 + 0.536, unsplit 1.2 to 1.3
// (dev/results/delta_rule_speed).
#pragma once

#include <algorithm>

#include "sizes.cuh"

namespace gdn {
namespace delta_rule {

struct Splits {
  int count, chunks;       // splits of a sequence, chunks in each (fewer in the last); count 1: not cut
  float* boundary_states;  // [B,Hv,count,dv,dk]: states at the splits' starts, or their gradients at the ends
  float* transitions;      // [B,Hv,count,2,dk,dk]: M^T, M; in the place of the first split's, remembered()

  __device__ int64_t number(int b, int h, int split, const Sizes& size) const {
    return (int64_t(b) * size.heads_v + h) * count + split;
  }
  __device__ float* boundary(int b, int h, int split, const Sizes& size) const {
    return boundary_states + number(b, h, split, size) * size.dv * size.dk;
  }
  __device__ float* transition(int b, int h, int split, const Sizes& size) const {
    return transitions + number(b, h, split, size) * 2 * size.dk * size.dk;
  }
  // [count]: 0 where M of a split is 0, else 1
  __device__ float* remembered(int b, int h, const Sizes& size) const { return transition(b, h, 0, size); }
};

constexpr int kMinSplits = 3, kMinSplitChunks = 4;
constexpr int kMaxSplits = 2 * 16 * 16;  // so many floats the least M has
// Of the second kind of splits below.
constexpr int kSplitsInWaves = 8, kMinChunksInWaves = 16 * kSplitsInWaves;
constexpr double kLargestShareInWaves = 0.55;

// Splits of a sequence, where an unsplit pass has `blocks` CTAs and the GPU holds `resident` of them.
//   * As many as let all their CTAs run at once, if these are three or more.
//   * Else, where about half of the GPU would be idle and sequences are long: 8, whose CTAs run in several
//     waves that leave less of it idle (32 heads of dv = 128 on 132 SMs: 64 CTAs in one wave, or 512, of an
//     eighth of the chunks, in four).
inline Splits choose_splits(int chunks, int64_t blocks, int resident) {
  const auto splits = [&](int count) {
    const int each = divide_up(chunks, count);
    return Splits{divide_up(chunks, each), each, nullptr, nullptr};
  };
  const int at_once =
      std::min({int(resident / std::max<int64_t>(blocks, 1)), chunks / kMinSplitChunks, kMaxSplits});
  if (at_once >= kMinSplits) return splits(at_once);
  const int64_t waves = divide_up<int64_t>(blocks * kSplitsInWaves, resident);
  if (chunks >= kMinChunksInWaves && double(waves) <= kLargestShareInWaves * kSplitsInWaves)
    return splits(kSplitsInWaves);
  return splits(1);
}

// Upper bound on the splits of all heads together, for a batch of at most `tokens` tokens with sequences of
// any length: sizes the buffers, since a model also runs smaller batches than the one it was made for. Of the
// first kind, a sequence of c splits has at least 4 c chunks, so more than 64 (4 c - 1) tokens, which is >=
// 704 c / 3 as c >= 3; of the second, c <= 8 and more than 64 * 127 tokens, >= 1016 c.
inline int64_t max_splits(int64_t tokens, int heads, int slices, int resident) {
  const auto most = [&](double ctas, double of_tokens) {
    return int64_t(std::min(ctas / slices, double(heads) * double(tokens) * of_tokens));
  };
  return std::max(most(resident, 3. / 704),
                  most(kLargestShareInWaves * kSplitsInWaves * resident, 1. / 1016));
}

// The logarithm of the decay over a chunk, G_C.
__device__ inline const float* chunk_log_decay(const float* gates, const Sizes& size, int b, int h,
                                               int chunk) {
  return gates + size.chunk_number(b, h, chunk) * kGates + kCumulativeLogDecay * kChunk + kChunk - 1;
}

// How many of a split's chunks its end state depends on (or, in the backward, its start's gradient): the
// fewest, counted from that end, over which the state decays to less than 2^-40. For keys of length 1 and
// beta <= 2 no factor I - beta k k^T makes a vector longer, so what came before them is below 2^-40 of the
// state it was: far below fp32's rounding, and dropped. `all` where the split as a whole decays by less.
struct Memory {
  int chunks;
  bool all;
};

constexpr float kForgotten = -27.726f;  // ln 2^-40

// Memory of `count` chunks from that of `log_decay` on, in direction step = 1 or -1. Each warp counts for
// itself: a lane a chunk, prefix sums by shuffles.
__device__ inline Memory split_memory(const float* log_decay, int step, int count) {
  const int lane = threadIdx.x % 32;
  float before = 0.f;
  for (int i = lane; i - lane < count; i += 32) {
    float sum = i < count ? log_decay[int64_t(i) * step * kGates] : 0.f;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const float x = __shfl_up_sync(~0u, sum, by);
      if (lane >= by) sum += x;
    }
    sum += before;
    const unsigned forgotten = __ballot_sync(~0u, i < count && sum < kForgotten);
    if (forgotten) return {i - lane + __ffs(int(forgotten)), false};
    before = __shfl_sync(~0u, sum, 31);
  }
  return {count, true};
}

constexpr int kMergeRows = 8, kMergeThreads = 512;

// Columns of dk that merge_splits_kernel is compiled for: a power of two.
constexpr int merge_columns(int DK) { return DK == 96 ? 128 : DK == 192 ? 256 : DK; }

// Forward: state[p + 1] += state[p] M_p^T for p = 1, 2, ...; backward: state[p - 1] += state[p] M_p for p =
// count - 2, ..., 1. A CTA does 8 rows of dv of a head over all splits. A thread has one column of dk (of
// kColumns) and one k-split of the sum over dk; after the reduction it has that column in some of the rows.
// Global loads are prefetched kSteps steps ahead into registers (kAhead matrix entries and the addends a
// step), so that they do not wait for the previous step.
//
// Where M is 0, nothing is read or summed.
//
// Bound by latency: count - 2 dependent steps, each 16 dk^2 FLOP of one SM and two barriers; the matrices, a
// few MB, come from the L2 cache. H200: 0.5 us a step at dk = 32 (dev/results/delta_rule_speed).
template <int kColumns, bool kBackward>
__global__ void __launch_bounds__(kMergeThreads, kColumns < 128 ? 2 : 1)
    merge_splits_kernel(Splits splits, Sizes size) {
  constexpr int kParts = kMergeThreads / kColumns, kEach = kColumns / kParts;
  constexpr int kAhead = kEach < 32 ? kEach : 32, kSteps = kAhead < 8 ? 4 : kAhead < 32 ? 2 : 1;
  constexpr int kVector = kEach < 4 ? kEach : 4, kTotals = (kMergeRows + kParts - 1) / kParts;
  struct __align__(4 * kVector) Vector {
    float x[kVector];
  };
  static __shared__ __align__(16) float rows[kMergeRows][kColumns];
  static __shared__ float partial[kMergeRows][kMergeThreads], remembered[kMaxSplits];
  const int h = blockIdx.y, b = blockIdx.z, first = blockIdx.x * kMergeRows, dk = size.dk;
  const int part = threadIdx.x / kColumns, column = threadIdx.x % kColumns, begin = part * kEach;
  const int64_t offset = int64_t(first) * dk + column;
  const auto split_at = [&](int step) { return kBackward ? splits.count - 1 - step : step; };
  // a step's matrix, kAhead rows from begin + i on
  const auto read_matrix = [&](float(&x)[kAhead], int step, int i) {
    if (step > splits.count - 2 || remembered[split_at(step)] == 0.f) return;
    const float* m =
        splits.transition(b, h, split_at(step), size) + (kBackward ? dk * dk : 0) + (begin + i) * dk + column;
#pragma unroll
    for (int j = 0; j < kAhead; j++) x[j] = column < dk && begin + i + j < dk ? m[j * dk] : 0.f;
  };
  // f(r, k) for each row r in which this thread holds the total
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
  for (int i = threadIdx.x; i < splits.count; i += kMergeThreads)
    remembered[i] = splits.remembered(b, h, size)[i];
  __syncthreads();
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
      if (remembered[split_at(step)] == 0.f) {  // the next state is what is there
        for_each_row_of_thread([&](int r, int k) { rows[r][column] = added[s][k]; });
        read_matrix(matrix[s], step + kSteps, 0);
        read_boundary(added[s], step + 1 + kSteps);
        __syncthreads();
        continue;
      }
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
