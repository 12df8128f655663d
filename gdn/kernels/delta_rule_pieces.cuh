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
// Floor of a pass cut into n pieces, where blocks and not bytes limit it: (1 + dk / dv) / n of the uncut
// pass's time for step 1, which writes nothing, and 1 / n for step 3. Held to float64 by dev/emulate; on a
// GPU not measured yet.
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

constexpr int kJoinRows = 8, kMostJoinThreads = 256;  // at most 256 columns

// The boundary of piece p + 1 += that of p times M_p^T, p = 1, 2, ..., or (kBackward) that of p - 1 += that
// of p times M_p, p = count - 2, ..., 1. A block: 8 rows of dv of a head through all pieces; a thread: a
// column of dk.
template <bool kBackward>
static __global__ void __launch_bounds__(kMostJoinThreads) join_pieces_kernel(Pieces pieces, Sizes size) {
  __shared__ __align__(16) float rows[kJoinRows][kMostJoinThreads];
  const int h = blockIdx.y, b = blockIdx.z, first = blockIdx.x * kJoinRows, column = threadIdx.x;
  const int dk = size.dk, n = min(kJoinRows, size.dv - first);
  const bool active = column < dk;
  for (int step = 1; step < pieces.count - 1; step++) {
    const int piece = kBackward ? pieces.count - 1 - step : step, next = piece + (kBackward ? -1 : 1);
    const float* from = pieces.boundary(b, h, piece, size) + int64_t(first) * dk;
    float* to = pieces.boundary(b, h, next, size) + int64_t(first) * dk;
    const float* m = pieces.transition(b, h, piece, size) + (kBackward ? dk * dk : 0);
    float sum[kJoinRows];
#pragma unroll
    for (int r = 0; r < kJoinRows; r++) {
      if (step == 1) rows[r][column] = active && r < n ? from[r * dk + column] : 0.f;
      sum[r] = active && r < n ? to[r * dk + column] : 0.f;
    }
    __syncthreads();
    if (active)
      for (int i = 0; i < dk; i += 8) {
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = m[(i + j) * dk + column];
#pragma unroll
        for (int r = 0; r < kJoinRows; r++) {
          const float4 left = *reinterpret_cast<const float4*>(&rows[r][i]);
          const float4 right = *reinterpret_cast<const float4*>(&rows[r][i + 4]);
          sum[r] += left.x * x[0] + left.y * x[1] + left.z * x[2] + left.w * x[3];
          sum[r] += right.x * x[4] + right.y * x[5] + right.z * x[6] + right.w * x[7];
        }
      }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kJoinRows; r++) {
      rows[r][column] = sum[r];
      if (active && r < n) to[r * dk + column] = sum[r];
    }
  }
}

}  // namespace delta_rule
}  // namespace gdn
