// The gated delta rule, first kernel: everything of a chunk that does not depend on the state.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../shapes.h"
#include "delta_rule_wgmma.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kSquareStride = kChunk + 8;            // row stride of a [64,64] 16-bit tile in shared memory
constexpr int kSquare = kChunk * kChunk;             // elements of such a tile in global memory
constexpr int kGates = 4 * kChunk;                   // floats of a chunk's gates
enum Gate { kBeta, kFromStart, kToEnd, kLogDecay };  // rows of the gates: beta, e^G, e^{G_C - G}, G

// Sizes of a call. A chunk of a value head has the number ((b Hv + h) chunks + chunk).
struct Sizes {
  int tokens, heads_k, heads_v, dk, dv, chunks, channels, value_heads_per_key;
  __device__ int64_t chunk_number(int b, int h, int chunk) const {
    return (int64_t(b) * heads_v + h) * chunks + chunk;
  }
  __device__ int64_t first_row(int b, int chunk) const { return int64_t(b) * tokens + chunk * kChunk; }
  __device__ int rows_in(int chunk) const { return min(kChunk, tokens - chunk * kChunk); }
  __device__ int q_column(int hk) const { return hk * dk; }
  __device__ int k_column(int hk) const { return (heads_k + hk) * dk; }
  __device__ int v_column(int h) const { return 2 * heads_k * dk + h * dv; }
  // h / value_heads_per_key, for less than 2^20 heads
  __device__ int key_head(int h) const { return int(__fdividef(h + 0.5f, value_heads_per_key)); }
};

// The block's first warp starts copying g and beta of a chunk's n tokens to where chunk_gates looks for them.
__device__ inline void copy_gate_inputs(float* gates, const float* g, const float* beta, int stride, int n) {
  const int i = 2 * threadIdx.x;
  if (threadIdx.x < 32) {
    g += i * stride, beta += i * stride, gates += i;
    if (i < n) copy_4_bytes(gates + kLogDecay * kChunk, g), copy_4_bytes(gates + kBeta * kChunk, beta);
    if (i + 1 < n)
      copy_4_bytes(gates + kLogDecay * kChunk + 1, g + stride),
          copy_4_bytes(gates + kBeta * kChunk + 1, beta + stride);
  }
  copies_issued();
}

// gates [4,64] in shared memory from g and beta, which have arrived; tokens past the end, n, have g = 0, beta
// = 0. The block's first warp does it; the caller synchronises afterwards.
__device__ inline void chunk_gates(float* gates, int n) {
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x, i = 2 * lane;  // this lane's tokens, as it copied them: i, i + 1
  float* own = gates + kLogDecay * kChunk + i;
  const float g0 = i < n ? own[0] : 0.f, g1 = i + 1 < n ? own[1] : 0.f;
  float sum = g0 + g1;  // becomes the sum of all lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  const float total = __shfl_sync(~0u, sum, 31);
  float before = __shfl_up_sync(~0u, sum, 1);
  if (lane == 0) before = 0.f;
  const float G[2] = {before + g0, sum};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    if (i + e >= n) gates[kBeta * kChunk + i + e] = 0.f;
    gates[kFromStart * kChunk + i + e] = expf(G[e]);
    gates[kToEnd * kChunk + i + e] = expf(fminf(total - G[e], 0.f));
    gates[kLogDecay * kChunk + i + e] = G[e];
  }
}

// Blocks of L on the diagonal, each transposed: [16 columns][kBlockStride rows].
constexpr int kBlockStride = 20;
constexpr int kDiagonalBlock = 16 * kBlockStride;  // floats

__device__ inline void store_diagonal_block(float* to, const float (&left)[4], const float (&right)[4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    float* at = to + (c + e % 2) * kBlockStride + g + 8 * (e / 2);
    at[0] = left[e], at[8 * kBlockStride] = right[e];
  }
}

// A column of a 16x16 block of N on the diagonal by forward substitution, in fp32: N_ij = L_ij - sum_{k<i}
// L_ik beta_k N_kj. l: L's block, transposed; beta: the block's 16; to the column's places in N, high and
// low.
__device__ inline void solve_diagonal_column(__half* high, __half* low, const float* l, const float* beta,
                                             int j) {
  float sum[16];
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(l + j * kBlockStride + i);
    sum[i] = x.x, sum[i + 1] = x.y, sum[i + 2] = x.z, sum[i + 3] = x.w;
  }
  float4 four;  // of beta
#pragma unroll
  for (int k = 0; k < 16; k++) {  // sum[k] is done: off the rows below
    if (k % 4 == 0) four = *reinterpret_cast<const float4*>(beta + k);
    const float x = (k % 4 == 0 ? four.x : k % 4 == 1 ? four.y : k % 4 == 2 ? four.z : four.w) * sum[k];
#pragma unroll
    for (int i = k / 4 * 4; i < 16; i += 4) {
      const float4 y = *reinterpret_cast<const float4*>(l + k * kBlockStride + i);
      if (i > k) sum[i] -= y.x * x;
      if (i + 1 > k) sum[i + 1] -= y.y * x;
      if (i + 2 > k) sum[i + 2] -= y.z * x;
      if (i + 3 > k) sum[i + 3] -= y.w * x;
    }
    const __half rounded = __float2half_rn(sum[k]);
    high[k * kSquareStride] = rounded;
    low[k * kSquareStride] = __float2half_rn(sum[k] - __half2float(rounded));
  }
}

// An operand of 16x16 numbers, each fp16 high + low.
struct SplitOperand {
  uint32_t high[4], low[4];
};

// Block (i, j) of a matrix at `tiles`, high and low [2][64, kSquareStride] in shared memory, as the left
// operand of a product or as the right one.
enum Side { kLeft, kRight };
template <Side kSide>
__device__ inline SplitOperand load_block(const __half* tiles, int i, int j) {
  SplitOperand x;
  const uint32_t high = walk_rows(tiles + 16 * (i * kSquareStride + j), kSquareStride);
  const uint32_t low = high + 2 * kChunk * kSquareStride;
  if (kSide == kLeft)
    ldmatrix(x.high, high), ldmatrix(x.low, low);
  else
    ldmatrix_transposed(x.high, high), ldmatrix_transposed(x.low, low);
  return x;
}

// -x diag(beta), of 16 tokens from `token` on, as the left operand; x: two accumulator tiles.
__device__ inline SplitOperand left_operand(const float (&x)[2][4], const float* beta, int token) {
  float scaled[2][4];
#pragma unroll
  for (int e = 0; e < 4; e++) scaled[0][e] = x[0][e], scaled[1][e] = x[1][e];
  scale_tokens(scaled[0], scaled[1], beta, token, -1.f);
  SplitOperand out;
  split(out.high, out.low, scaled[0], scaled[1]);
  return out;
}
// -diag(beta) x, as two words of each tile: rows g and g + 8.
__device__ inline SplitOperand scaled_rows(const float (&x)[2][4], const float* beta, int token) {
  const int g = threadIdx.x % 32 / 4;
  const float scale[2] = {-beta[token + g], -beta[token + g + 8]};
  SplitOperand out;
#pragma unroll
  for (int i = 0; i < 4; i++)
    split(out.high[i], out.low[i], scale[i % 2] * x[i / 2][2 * (i % 2)],
          scale[i % 2] * x[i / 2][2 * (i % 2) + 1]);
  return out;
}
// The same as the right operand.
__device__ inline SplitOperand right_operand(const float (&x)[2][4], const float* beta, int token) {
  SplitOperand out = scaled_rows(x, beta, token);
#pragma unroll
  for (int e = 0; e < 4; e++)
    out.high[e] = transpose_8x8(out.high[e]), out.low[e] = transpose_8x8(out.low[e]);
  return out;
}

__device__ inline void add_product(float (&x)[2][4], const SplitOperand& a, const SplitOperand& b) {
  mma_pair_split(x[0], x[1], a.high, a.low, b.high, b.low);
}

// Block (i, j) of a matrix at `tiles`, from two words of each of its two tiles.
__device__ inline void store_block(__half* tiles, int i, int j, const SplitOperand& x) {
  const int lane = threadIdx.x % 32;
  __half* to = tiles + (16 * i + lane / 4) * kSquareStride + 16 * j + 2 * (lane % 4);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int at = e % 2 * 8 * kSquareStride + e / 2 * 8;
    *reinterpret_cast<uint32_t*>(to + at) = x.high[e];
    *reinterpret_cast<uint32_t*>(to + at + kChunk * kSquareStride) = x.low[e];
  }
}
__device__ inline void store_block(__half* tiles, int i, int j, const float (&x)[2][4]) {
  SplitOperand words;
#pragma unroll
  for (int e = 0; e < 4; e++)
    split(words.high[e], words.low[e], x[e / 2][2 * (e % 2)], x[e / 2][2 * (e % 2) + 1]);
  store_block(tiles, i, j, words);
}

// Meetings of the lower two warps, and of the block where its warps are in different places.
constexpr int kPrepareThreads = 128, kUnderMeeting = 1, kBlockMeeting = 2;
__device__ inline void block_meeting() { meet(kBlockMeeting, kPrepareThreads); }

// What a warp has of L: of row block `warp`, what lies before the diagonal. The block beside it in warps 1
// and 3, and in 2 and 3 those under the first two.
struct LowerRow {
  float beside[2][4], under[2][2][4];
};

// N from L by halves: with the first and the second half of the rows of a block
//   N_11, N_22 first      N_21 = (I - N_22 diag(beta_2)) (L_21 - L_21 diag(beta_1) N_11)
// from blocks of 16, whose N_ii are by substitution, to 32 and to 64. The products on tensor cores, operands
// fp16 high + low, sums fp32. N_ii is there, at `tiles` as in load_block; N comes out there.
//
// To 32: row blocks 1 and 3.
__device__ inline void solve_beside(__half* tiles, LowerRow& x, const float* beta, int warp) {
  const SplitOperand own = load_block<kLeft>(tiles, warp, warp);
  add_product(x.beside, left_operand(x.beside, beta, 16 * (warp - 1)),
              load_block<kRight>(tiles, warp - 1, warp - 1));
  add_product(x.beside, own, right_operand(x.beside, beta, 16 * warp));
  store_block(tiles, warp, warp - 1, x.beside);
}
// To 64: row blocks 2 and 3; warps 0 and 1 meet them where N_10 and N_32 must be there. Of (I - N_22
// diag(beta_2)) T the upper rows of T are warp 2's and lie, for warp 3, above the diagonal.
__device__ inline void solve_under(__half* tiles, LowerRow& x, const float* beta, int warp) {
  const SplitOperand second = left_operand(x.under[1], beta, 16);
  add_product(x.under[0], left_operand(x.under[0], beta, 0), load_block<kRight>(tiles, 0, 0));
  add_product(x.under[1], second, load_block<kRight>(tiles, 1, 1));
  block_meeting();
  add_product(x.under[0], second, load_block<kRight>(tiles, 1, 0));
  if (warp == 2) {
#pragma unroll
    for (int j = 0; j < 2; j++) store_block(tiles, 0, 2 + j, scaled_rows(x.under[j], beta, 32));
  } else {
    const SplitOperand own = load_block<kLeft>(tiles, 3, 3);
#pragma unroll
    for (int j = 0; j < 2; j++) add_product(x.under[j], own, right_operand(x.under[j], beta, 48));
  }
  meet(kUnderMeeting, 64);
  const SplitOperand left = load_block<kLeft>(tiles, warp, 2);
#pragma unroll
  for (int j = 0; j < 2; j++) add_product(x.under[j], left, load_block<kRight>(tiles, 0, 2 + j));
#pragma unroll
  for (int j = 0; j < 2; j++) store_block(tiles, warp, j, x.under[j]);
}

// Row block `block` of N, whose last stores were the warp's own, to memory; n: N's high part.
__device__ inline void write_row_block(__half* to, const __half* n, int block) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 16 * block + 4 * i + lane / 8, column = 8 * (lane % 8);
    if (column >= 16 * (block + 1)) continue;
    *reinterpret_cast<uint4*>(to + row * kChunk + column) =
        *reinterpret_cast<const uint4*>(n + row * kSquareStride + column);
  }
}

// A row block of q.k or k.k, up to 64 columns, as accumulator tiles of 8.
struct RowBlock {
  float (&first)[4][4], (&second)[4][4];
  __device__ float (&tile(int t))[4] { return t < 4 ? first[t] : second[t - 4]; }
};

// e^x of a difference of G, at most 1: off by little more than 1e-7, where the results are rounded to fp16
// or, on the way to N, to twice fp16; below 2^-126 zero.
__device__ inline float decay(float difference) {
  return fast_exp2(fminf(1.4426950408889634f * difference, 0.f));
}

// Row block kBlock of q.k or k.k [16, 16 (kBlock + 1)] times factor * D_ij, D_ij = e^{G_i - G_j}; zeros above
// the diagonal, and on it if kStrict. In blocks before the diagonal's, whose rows start at token r, D_ij is
// e^{G_i - G_r} times e^{G_r - G_j}, both at most 1: an exponential a row and a column in place of one an
// entry. column_decay: this warp's 64 numbers in shared memory.
template <int kBlock, bool kStrict>
__device__ inline void multiply_by_decay(RowBlock x, const float* G, float* column_decay, float factor) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4), first = 16 * kBlock;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < first; j += 32)
    if (j + lane < first) column_decay[j + lane] = decay(G[first] - G[j + lane]);
  __syncwarp();
  const float upper = factor * decay(G[first + g] - G[first]),
              lower = factor * decay(G[first + g + 8] - G[first]);
#pragma unroll
  for (int t = 0; t < 2 * kBlock; t++) {
    const float2 column = *reinterpret_cast<const float2*>(column_decay + 8 * t + c);
    float(&y)[4] = x.tile(t);
    y[0] *= upper * column.x, y[1] *= upper * column.y;
    y[2] *= lower * column.x, y[3] *= lower * column.y;
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int i = g + 8 * (e / 2), j = 8 * half + c + e % 2;
      float& y = x.tile(2 * kBlock + half)[e];
      if (half > e / 2) {  // i < 8 <= j
        y = 0.f;
        continue;
      }
      y *= factor * decay(G[first + i] - G[first + j]);
      if (half == e / 2) y = i > j || (!kStrict && i == j) ? y : 0.f;
    }
}

// Where a chunk's q and k lie in shared memory, and later N. q's row blocks of 16 are in reverse order, so
// that of its rows and of k's warp w of four has those at block w: it makes row block w of L, which is w + 1
// blocks long, and row block 3 - w of P, five in all. Rows are ld apart, or (kWarpgroup) in tiles of 64
// columns (delta_rule_wgmma.cuh).
template <bool kWarpgroup>
struct PrepareTiles {
  act* q;
  int ld, tiles;  // numbers from row to row; tiles that a row takes (kWarpgroup)

  __host__ __device__ PrepareTiles(void* at, int dk)
      : q(static_cast<act*>(at)), ld((dk > 32 ? dk : 32) + 8), tiles((dk + kTileRow - 1) / kTileRow) {}
  __host__ __device__ int row_block() const { return 16 * (kWarpgroup ? kTileRow : ld); }
  __host__ __device__ int k_at() const { return kChunk * (kWarpgroup ? tiles * kTileRow : ld); }
  // Behind the last block of L on the diagonal.
  __host__ __device__ int n_at() const { return 3 * row_block() + 2 * kDiagonalBlock; }
  int bytes() const { return 2 * std::max(2 * k_at(), n_at() + 2 * kChunk * kSquareStride); }
  __device__ const act* k() const { return q + k_at(); }
  __device__ __half* n() const { return reinterpret_cast<__half*>(q + n_at()); }
  // Of L's block on the diagonal, in the place of the warp's rows of q, which no other warp reads.
  __device__ float* diagonal_block(int i) const { return reinterpret_cast<float*>(q + i * row_block()); }
};

// What warp w makes of q.k and k.k: row block 3 - w of q.k and row block w of k.k, of each the first 32
// columns; and the other 32 of the one that is so long, q.k in the upper half's warps, k.k in the lower's.
struct WarpProducts {
  float q[4][4], k[4][4], second[4][4];
};

// As far as the diagonals.
template <int kWarp>
__device__ inline void lower_products(WarpProducts& x, const PrepareTiles<false>& tiles, int dk) {
  constexpr int kRows = 3 - kWarp, kBlocks = (kWarp > kRows ? kWarp : kRows) + 1;
  const int ld = tiles.ld;
  const uint32_t q_rows = walk_rows(tiles.q + 16 * kWarp * ld, ld), k_columns = walk_columns(tiles.k(), ld);
  RowBlock qk = {x.q, x.second}, kk = {x.k, x.second};
#pragma unroll 1
  for (int e = 0; e < dk; e += 16) {
    uint32_t a_q[4], b[kBlocks][4];
    ldmatrix(a_q, q_rows + 2 * e);
#pragma unroll
    for (int t = 0; t < kBlocks; t++) ldmatrix(b[t], k_columns + 2 * (16 * t * ld + e));
    // rows of k as the left operand: the same words in another order
    const uint32_t a_k[4] = {b[kWarp][0], b[kWarp][2], b[kWarp][1], b[kWarp][3]};
#pragma unroll
    for (int t = 0; t < kBlocks; t++) {
      if (t <= kRows) mma_pair_bf16(qk.tile(2 * t), qk.tile(2 * t + 1), a_q, b[t]);
      if (t <= kWarp) mma_pair_bf16(kk.tile(2 * t), kk.tile(2 * t + 1), a_k, b[t]);
    }
  }
}

// All of it, as products of the warpgroup: its 64 rows are the warps' rows of q, of k, and then of the one or
// the other, which are in registers. 16 kSteps columns of q and k, in a tile, from the place that the
// descriptors and longer_rows have.
template <int kSteps>
__device__ inline void add_columns(WarpProducts& x, uint64_t q, uint64_t k, uint32_t longer_rows, int add) {
  uint32_t longer[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; i++) ldmatrix(longer[i], longer_rows ^ 32 * i);
  pin(longer);
  products_begin();
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    const int at = i * kColumns16;
    wgmma_32_bf16_shared(x.k, k + at, k + at, i > 0 || add);
    wgmma_32_bf16(x.second, longer[i], k + at + 2 * kRows16, i > 0 || add);
    wgmma_32_bf16_shared(x.q, q + at, k + at, i > 0 || add);
  }
  products_issued();
  products_done<0>();
  pin(x.q), pin(x.k), pin(x.second);
}
__device__ inline void warpgroup_products(WarpProducts& x, const PrepareTiles<true>& tiles, int dk,
                                          int warp) {
  const int lane = threadIdx.x % 32;
  uint32_t longer_rows = shared_address((warp < 2 ? tiles.q : tiles.k()) + warp * tiles.row_block()) +
                         swizzled(lane & 15, lane >> 4);
  uint64_t q = tile_descriptor(tiles.q), k = tile_descriptor(tiles.k());
  int add = 0;
#pragma unroll 1
  for (; dk > 32; dk -= kTileRow) {
    add_columns<4>(x, q, k, longer_rows, add);
    q += kNextTile, k += kNextTile, longer_rows += kTileBytes, add = 1;
  }
  if (dk > 0) add_columns<2>(x, q, k, longer_rows, add);
}

// Row block kWarp of L from k.k: before the diagonal, and the block on it.
template <int kWarp>
__device__ inline void lower_row(LowerRow& L, float* diagonal_block, RowBlock kk, const float* G,
                                 float* column_decay) {
  multiply_by_decay<kWarp, true>(kk, G, column_decay, 1.f);
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (kWarp % 2) L.beside[t][e] = kk.tile(2 * kWarp - 2 + t)[e];
      if (kWarp >= 2) L.under[0][t][e] = kk.tile(t)[e], L.under[1][t][e] = kk.tile(2 + t)[e];
    }
  store_diagonal_block(diagonal_block, kk.tile(2 * kWarp), kk.tile(2 * kWarp + 1));
}

// Row block kRows of P from q.k, as fp16, to memory; to: P's row 0.
template <int kRows>
__device__ inline void write_row_of_p(__half* to, RowBlock qk, const float* G, float* column_decay, float s) {
  multiply_by_decay<kRows, false>(qk, G, column_decay, s);
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int row = 0; row < 2; row++)
#pragma unroll
    for (int t = 0; t < 2 * kRows + 2; t += 4) {
      uint32_t w[4] = {};
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (t + i < 2 * kRows + 2) w[i] = pack_fp16(qk.tile(t + i)[2 * row], qk.tile(t + i)[2 * row + 1]);
      store_32_columns(to + (16 * kRows + g + 8 * row) * kChunk + 8 * t, w, 16 * (kRows + 1) - 8 * t);
    }
}

// Shared memory: the gates, multiply_by_decay's 64 numbers for each warp, and the tiles.
constexpr int kPrepareFloats = kGates + 4 * kChunk;
template <bool kWarpgroup>
int prepare_shared_bytes(int dk) {
  return 4 * kPrepareFloats + PrepareTiles<kWarpgroup>(nullptr, dk).bytes();
}

// The block starts copying q and k [64, dk] of a chunk, the first n rows, and zeros below; k is to_k numbers
// behind q in memory. For warpgroup_products zeros up to 32 columns, too.
template <bool kWarpgroup>
__device__ inline void copy_q_and_k(const PrepareTiles<kWarpgroup>& tiles, const act* from, int to_k,
                                    int stride, int dk, int n) {
  const int r = threadIdx.x / 8, vector = threadIdx.x % 8, row_block = tiles.row_block();
  static_assert(kPrepareThreads == 8 * 16, "a thread's rows are 16 apart");
  from = rows_on(from, r, stride) + 8 * vector;
  act* to = tiles.q + (kWarpgroup ? swizzled(r, vector) / 2 : r * tiles.ld + 8 * vector);
#pragma unroll 1
  for (int column = 8 * vector; column < (kWarpgroup ? (dk + 31) / 32 * 32 : dk); column += kTileRow) {
    act* k_to = to + tiles.k_at();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool valid = r + 16 * i < n && column < dk;
      copy_16_bytes(to + (3 - i) * row_block, rows_on(from, 16 * i, stride), valid);
      copy_16_bytes(k_to + i * row_block, rows_on(from + to_k, 16 * i, stride), valid);
    }
    from += kTileRow, to += kWarpgroup ? kChunk * kTileRow : kTileRow;
  }
  copies_issued();
}

// For each chunk and value head:
//   L_ij = D_ij (k_i . k_j), i > j        N = (I + L diag(beta))^-1 L, strictly lower
//   P_ij = s D_ij (q_i . k_j), i >= j     gates: beta, e^G, e^{G_C - G}, G
// so that (I + A)^-1 = I - diag(beta) N, and neither the identity nor beta is ever rounded.
// N and P go out as fp16 (no entry of N exceeds 1, none of P s), matrices [chunks][N, P][64,64], of which
// only the 16x16 blocks on and below the diagonal are written; gates [chunks][4,64]. k.k and q.k are exact
// products of bf16; N by halves (solve_beside, solve_under), from the four blocks on the diagonal, of which a
// lane solves a column.
//
// Floor at B=32, T=1024, H=6, dk=128, dv=256: reads q, k 101 MB, writes 35 MB: 0.045 ms at the copy rate; 6.4
// GFLOP on tensor cores (and 0.9 of split products in N), 0.05 GFLOP of substitution in fp32.
// Reached on an H200, whose memory is faster than the copy rate: 0.049 ms, 103% of the floor as
// dev/bench_delta_rule counts it (0.050), and 0.198 (90%) with 16/32 heads of 128. What it waits for there,
// by ncu: L1 82% busy, issue slots 47%, no eligible warp in 52% of the cycles; 21% of the samples are at
// barriers, half of these for the warps that substitute, 19% wait for shared memory, DRAM 41%. Five blocks a
// multiprocessor, by their registers; with six ptxas waits for each product of the warpgroup: 13% slower.
template <bool kWarpgroup>
__device__ inline void prepare_chunk(unsigned char* shared, __half* matrices, float* gates_out,
                                     const act* qkv, const float* g, const float* beta, const Sizes& size,
                                     float s) {
  const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h);
  float* gates = reinterpret_cast<float*>(shared);
  const PrepareTiles<kWarpgroup> tiles(gates + kPrepareFloats, size.dk);
  const int n = size.rows_in(chunk);
  const int64_t row = size.first_row(b, chunk), number = size.chunk_number(b, h, chunk);
  // first what the longest way is made from
  copy_gate_inputs(gates, g + row * size.heads_v + h, beta + row * size.heads_v + h, size.heads_v, n);
  copy_q_and_k(tiles, qkv + row * size.channels + size.q_column(hk), size.k_column(0) - size.q_column(0),
               size.channels, size.dk, n);
  copies_arrived_but_one();
  chunk_gates(gates, n);
  copies_arrived();
  if (kWarpgroup) publish_to_products();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGates; i += kPrepareThreads)
    gates_out[number * kGates + i + threadIdx.x] = gates[i + threadIdx.x];

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same in all lanes, as the compiler now knows
  const float *G = gates + kLogDecay * kChunk, *chunk_beta = gates + kBeta * kChunk;
  float* column_decay = gates + kGates + kChunk * warp;
  __half *n_out = matrices + number * 2 * kSquare, *p_out = n_out + kSquare, *N = tiles.n();
  WarpProducts x = {};
  if constexpr (kWarpgroup) warpgroup_products(x, tiles, size.dk, warp);
  LowerRow L;
  const auto make_row_of_l = [&](auto of_warp) {
    constexpr int kWarp = decltype(of_warp)::value;
    if constexpr (!kWarpgroup) lower_products<kWarp>(x, tiles, size.dk);
    lower_row<kWarp>(L, tiles.diagonal_block(kWarp), {x.k, x.second}, G, column_decay);
  };
  const auto make_row_of_p = [&](auto rows) {
    write_row_of_p<decltype(rows)::value>(p_out, {x.q, x.second}, G, column_decay, s);
  };
  constexpr auto k0 = std::integral_constant<int, 0>();
  constexpr auto k1 = std::integral_constant<int, 1>();
  constexpr auto k2 = std::integral_constant<int, 2>();
  constexpr auto k3 = std::integral_constant<int, 3>();
  // The upper half's warps, which have less of L, make N's blocks on the diagonal while the others make the
  // short rows of P; and the long ones while those go on with N.
  if (warp < 2) {
    warp == 0 ? make_row_of_l(k0) : make_row_of_l(k1);
    block_meeting();  // q and k become N
    const int lane = threadIdx.x % 32, block = 2 * warp + lane / 16, j = lane % 16;
    __half* to = N + 16 * block * (kSquareStride + 1) + j;
    solve_diagonal_column(to, to + kChunk * kSquareStride, tiles.diagonal_block(block),
                          chunk_beta + 16 * block, j);
    block_meeting();  // N_ii
    if (warp == 1) solve_beside(N, L, chunk_beta, warp);
    block_meeting();  // N_10, N_32
    write_row_block(n_out, N, warp);
    warp == 0 ? make_row_of_p(k3) : make_row_of_p(k2);
  } else {
    warp == 2 ? make_row_of_l(k2) : make_row_of_l(k3);
    block_meeting();
    warp == 2 ? make_row_of_p(k1) : make_row_of_p(k0);
    block_meeting();
    if (warp == 3) solve_beside(N, L, chunk_beta, warp);
    solve_under(N, L, chunk_beta, warp);
    write_row_block(n_out, N, warp);
  }
}

static __global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(__half* matrices, float* gates_out, const act* qkv, const float* g, const float* beta,
                   Sizes size, float s) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  prepare_chunk<false>(tiles, matrices, gates_out, qkv, g, beta, size, s);
}

// On Hopper: q.k and k.k as warpgroup products.
static __global__ void __launch_bounds__(kPrepareThreads)
    prepare_warpgroup_kernel(__half* matrices, float* gates_out, const act* qkv, const float* g,
                             const float* beta, Sizes size, float s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char tiles[];
  prepare_chunk<true>(tiles, matrices, gates_out, qkv, g, beta, size, s);
#endif
}

}  // namespace delta_rule
}  // namespace gdn
