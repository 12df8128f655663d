// The gated delta rule where sequences x value heads x slices of dv are too few blocks for the GPU: a
// sequence is cut into pieces of chunks, which the passes then take side by side.
//
// Over a piece the state is S_end = M S_start + B, with M [dk,dk], its transition, and B, the end from
// S_start = 0, so that
//   1. forward_state_kernel: B of every piece but the last; M of every piece but the first and the last:
//      the ends of the columns of S_start = I with v = 0
//   2. join_pieces_kernel: the starts of all pieces, one after another
//   3. the pass itself, every piece from its start
// Backward the gradient of the state does the same with M^T: dS_start = M^T dS_end + B. A piece is read
// twice, so it takes three to gain anything. The states are kept as the passes have them, transposed,
// [dv,dk], and so is M, beside M^T: S_end^T = S_start^T M^T.
//
// Where blocks and not bytes limit it, step 3 takes 1 / n of the uncut pass's time, and step 1 as long for
// its ends and dk / dv of that for its transitions, or less, as it writes nothing. Reached on an H200 (one
// sequence of 32768, 6 heads), before steps 1 and 2 were made as they are now (dev/log.md): (128, 256), 5
// pieces, steps 1 to 3 0.204 + 0.033 + 0.319 ms in place of 1.546; (32, 64), 43 pieces, 0.058 + 0.103 + 0.054
// in place of 1.104. The bytes' floor of step 3 is 0.218 and 0.055 ms.
#pragma once

#include "delta_rule_prepare.cuh"

namespace gdn {
namespace delta_rule {

struct Pieces {
  int count, chunks;   // pieces of a sequence, chunks in each (fewer in the last); count 1: not cut
  float* boundaries;   // [B,Hv,count,dv,dk]: states at the pieces' starts, or their gradients at the ends
  float* transitions;  // [B,Hv,count,2,dk,dk]: M^T, M

  __device__ int64_t number(int b, int h, int piece, const Sizes& size) const {
    return (int64_t(b) * size.heads_v + h) * count + piece;
  }
  __device__ float* boundary(int b, int h, int piece, const Sizes& size) const {
    return boundaries + number(b, h, piece, size) * size.dv * size.dk;
  }
  __device__ float* transition(int b, int h, int piece, const Sizes& size) const {
    return transitions + number(b, h, piece, size) * 2 * size.dk * size.dk;
  }
};

constexpr int kLeastPieces = 3, kLeastPieceChunks = 4;

// As many pieces as give each of `slots` a block where one piece gives `blocks`.
inline Pieces cut_into_pieces(int chunks, int64_t blocks, int slots) {
  const int count = std::min(int(slots / std::max<int64_t>(blocks, 1)), chunks / kLeastPieceChunks);
  if (count < kLeastPieces) return {1, chunks, nullptr, nullptr};
  const int each = divide_up(chunks, count);
  return {divide_up(chunks, each), each, nullptr, nullptr};
}

// The most pieces that all heads of a batch of at most so many tokens can have together, whatever its
// sequences' length: what memory must hold, since a model also takes batches smaller than the one it was made
// for. A sequence of c pieces has 4 c chunks, so more than 64 (4 c - 1) tokens, and that is 704 c / 3 or
// more, as c >= 3.
inline int64_t most_pieces(int64_t tokens, int heads, int slices, int slots) {
  return std::min<int64_t>(slots / slices, heads * tokens * 3 / 704);
}

constexpr int kMostHeadDimK = 256;  // require_head_dims
constexpr int kJoinRows = 8, kJoinThreads = 512, kJoinAhead = 32;
constexpr int kJoinTotals = kJoinRows * kMostHeadDimK / kJoinThreads;

// The boundary of piece p + 1 += that of p times M_p^T, p = 1, 2, ..., or (kBackward) that of p - 1 += that
// of p times M_p, p = count - 2, ..., 1. A block: 8 rows of dv of a head through all pieces. A thread: a
// column of dk and a part of the sum over dk; then of the total, a column of some of the rows. What a step
// reads of memory does not wait for the step before: as much of it as registers hold is sent for ahead.
//
// Floor: a chain of count - 2 steps, each a multiprocessor's 16 dk^2 FLOP and two barriers; the matrices,
// read from the L2 cache by each block, are a few MB. With loads one after another 2.5 us a step on an H200
// at dk = 32; not measured as it is now (dev/log.md).
template <bool kBackward>
__global__ void __launch_bounds__(kJoinThreads) join_pieces_kernel(Pieces pieces, Sizes size) {
  __shared__ __align__(16) float rows[kJoinRows][kMostHeadDimK];
  __shared__ float partial[kJoinRows][kJoinThreads];
  const int h = blockIdx.y, b = blockIdx.z, first = blockIdx.x * kJoinRows, dk = size.dk;
  const int columns = (dk + 31) / 32 * 32, parts = kJoinThreads / columns;
  const int each = ((dk + parts - 1) / parts + 3) / 4 * 4;  // of a part's rows of the matrix
  const int part = threadIdx.x / columns, column = threadIdx.x % columns;
  const int begin = part * each, end = part < parts && column < dk ? min(begin + each, dk) : begin;
  const int64_t offset = int64_t(first) * dk;
  const auto piece_at = [&](int step) { return kBackward ? pieces.count - 1 - step : step; };
  // the matrix of a step, from row i on
  const auto read_matrix = [&](float(&x)[kJoinAhead], int step, int i) {
    const float* m = pieces.transition(b, h, piece_at(step), size) + (kBackward ? dk * dk : 0) + column;
#pragma unroll
    for (int j = 0; j < kJoinAhead; j++) x[j] = i + j < end ? m[(i + j) * dk] : 0.f;
  };
  // f(r, c, at, k) of this thread's k-th row and column of the total, at `at` from the block's first row
  const auto for_my_totals = [&](const auto& f) {
#pragma unroll
    for (int k = 0; k < kJoinTotals; k++) {
      const int index = threadIdx.x + k * kJoinThreads, r = index / columns, c = index % columns;
      if (r < kJoinRows && c < dk && first + r < size.dv) f(r, c, r * dk + c, k);
    }
  };

  for (int i = threadIdx.x; i < kJoinRows * kMostHeadDimK; i += kJoinThreads) (&rows[0][0])[i] = 0.f;
  __syncthreads();
  const float* start = pieces.boundary(b, h, piece_at(1), size) + offset;
  for_my_totals([&](int r, int c, int at, int) { rows[r][c] = start[at]; });
  float x[kJoinAhead];
  read_matrix(x, 1, begin);
  __syncthreads();
  for (int step = 1; step < pieces.count - 1; step++) {
    float* to = pieces.boundary(b, h, piece_at(step + 1), size) + offset;
    float total[kJoinTotals], sum[kJoinRows] = {};
    for_my_totals([&](int, int, int at, int k) { total[k] = to[at]; });
    for (int i = begin; i < end; i += kJoinAhead) {
      if (i > begin) read_matrix(x, step, i);
#pragma unroll
      for (int j = 0; j < kJoinAhead; j += 4) {
        if (i + j >= end) break;
#pragma unroll
        for (int r = 0; r < kJoinRows; r++) {
          const float4 y = *reinterpret_cast<const float4*>(&rows[r][i + j]);
          sum[r] += y.x * x[j] + y.y * x[j + 1] + y.z * x[j + 2] + y.w * x[j + 3];
        }
      }
    }
    if (step + 1 < pieces.count - 1) read_matrix(x, step + 1, begin);
#pragma unroll
    for (int r = 0; r < kJoinRows; r++) partial[r][threadIdx.x] = sum[r];
    __syncthreads();
    for_my_totals([&](int r, int c, int at, int k) {
      for (int p = 0; p < parts; p++) total[k] += partial[r][p * columns + c];
      rows[r][c] = total[k];
      to[at] = total[k];
    });
    __syncthreads();
  }
}

}  // namespace delta_rule
}  // namespace gdn
