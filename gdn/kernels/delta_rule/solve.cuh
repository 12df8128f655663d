// Computes (1)-(3) of dev/doc/delta_rule.md, all chunks at once: everything that does not depend on the
// state.
#pragma once

#include <algorithm>
#include <type_traits>

#include "scale.cuh"
#include "sm90/tiles.cuh"

namespace gdn {
namespace delta_rule {

// The block's first warp issues cp.async of g and beta of a chunk's n tokens, two tokens a lane, to the
// places in `gates` where chunk_gates reads them.
__device__ inline void copy_gate_inputs(float* gates, const float* g, const float* beta, int stride, int n) {
  const int i = 2 * threadIdx.x;
  if (threadIdx.x < 32) {
    g += i * stride, beta += i * stride, gates += i;
    if (i < n) cp_async_4(gates + kCumulativeLogDecay * kChunk, g), cp_async_4(gates + kBeta * kChunk, beta);
    if (i + 1 < n)
      cp_async_4(gates + kCumulativeLogDecay * kChunk + 1, g + stride),
          cp_async_4(gates + kBeta * kChunk + 1, beta + stride);
  }
  cp_async_commit();
}

// Computes gates [4,64] in shared memory, by the block's first warp, from g and beta (already arrived):
// tokens from n on get g = 0, beta = 0. The caller synchronises the block afterwards.
__device__ inline void chunk_gates(float* gates, int n) {
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x, i = 2 * lane;  // this lane's tokens, as it copied them: i, i + 1
  float* own = gates + kCumulativeLogDecay * kChunk + i;
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
    gates[kDecayFromStart * kChunk + i + e] = expf(G[e]);
    gates[kDecayToEnd * kChunk + i + e] = expf(fminf(total - G[e], 0.f));
    gates[kCumulativeLogDecay * kChunk + i + e] = G[e];
  }
}

__device__ inline void store_diagonal_block(float* to, const float (&left)[4], const float (&right)[4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    float* at = to + (c + e % 2) * kBlockStride + g + 8 * (e / 2);
    at[0] = left[e], at[8 * kBlockStride] = right[e];
  }
}

// Solves one column j of a diagonal 16x16 block of N by forward substitution in fp32, N_ij = L_ij - sum_{k<i}
// L_ik beta_k N_kj. l: the block of L, transposed; beta: its 16 entries; high, low: where column j of N goes,
// as hi and lo fp16.
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
    high[k * kMatrixStride] = rounded;
    low[k * kMatrixStride] = __float2half_rn(sum[k] - __half2float(rounded));
  }
}

// Fragment of a 16x16 block, hi and lo fp16.
struct HiLoFragment {
  uint32_t high[4], low[4];
};

// Loads block (i, j) of a matrix stored as hi and lo fp16, [2][64, kMatrixStride] in shared memory, as an A
// fragment (kLeft) or a B fragment (kRight).
enum Side { kLeft, kRight };

template <Side kSide>
__device__ inline HiLoFragment load_block(const __half* tiles, int i, int j) {
  HiLoFragment x;
  const uint32_t high = lane_address_rows_first(tiles + 16 * (i * kMatrixStride + j), kMatrixStride);
  const uint32_t low = high + 2 * kChunk * kMatrixStride;
  if (kSide == kLeft)
    ldmatrix(x.high, high), ldmatrix(x.low, low);
  else
    ldmatrix_transposed(x.high, high), ldmatrix_transposed(x.low, low);
  return x;
}

// -x diag(beta) as an A fragment; x: 16x16 accumulators whose columns are the 16 tokens from `token` on.
__device__ inline HiLoFragment scaled_a_fragment(const float (&x)[2][4], const float* beta, int token) {
  float scaled[2][4];
#pragma unroll
  for (int e = 0; e < 4; e++) scaled[0][e] = x[0][e], scaled[1][e] = x[1][e];
  scale_tokens(scaled[0], scaled[1], beta, token, -1.f);
  HiLoFragment out;
  split_hi_lo(out.high, out.low, scaled[0], scaled[1]);
  return out;
}

// -diag(beta) x as hi + lo fp16; per 8x8 tile two registers, rows g and g+8 of the fragment.
__device__ inline HiLoFragment scaled_row_fragment(const float (&x)[2][4], const float* beta, int token) {
  const int g = threadIdx.x % 32 / 4;
  const float scale[2] = {-beta[token + g], -beta[token + g + 8]};
  HiLoFragment out;
#pragma unroll
  for (int i = 0; i < 4; i++)
    split_hi_lo(out.high[i], out.low[i], scale[i % 2] * x[i / 2][2 * (i % 2)],
                scale[i % 2] * x[i / 2][2 * (i % 2) + 1]);
  return out;
}

// -diag(beta) x as a B fragment, hi + lo fp16.
__device__ inline HiLoFragment scaled_b_fragment(const float (&x)[2][4], const float* beta, int token) {
  HiLoFragment out = scaled_row_fragment(x, beta, token);
#pragma unroll
  for (int e = 0; e < 4; e++)
    out.high[e] = transpose_8x8(out.high[e]), out.low[e] = transpose_8x8(out.low[e]);
  return out;
}

__device__ inline void add_product(float (&x)[2][4], const HiLoFragment& a, const HiLoFragment& b) {
  mma_pair_hi_lo(x[0], x[1], a.high, a.low, b.high, b.low);
}

// Stores block (i, j), hi and lo, to a matrix in shared memory; x as scaled_row_fragment returns it.
__device__ inline void store_block(__half* tiles, int i, int j, const HiLoFragment& x) {
  const int lane = threadIdx.x % 32;
  __half* to = tiles + (16 * i + lane / 4) * kMatrixStride + 16 * j + 2 * (lane % 4);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int at = e % 2 * 8 * kMatrixStride + e / 2 * 8;
    *reinterpret_cast<uint32_t*>(to + at) = x.high[e];
    *reinterpret_cast<uint32_t*>(to + at + kChunk * kMatrixStride) = x.low[e];
  }
}

__device__ inline void store_block(__half* tiles, int i, int j, const float (&x)[2][4]) {
  HiLoFragment words;
#pragma unroll
  for (int e = 0; e < 4; e++)
    split_hi_lo(words.high[e], words.low[e], x[e / 2][2 * (e % 2)], x[e / 2][2 * (e % 2) + 1]);
  store_block(tiles, i, j, words);
}

// Named barriers of prepare_kernel: warps 2 and 3 (kLowerWarpsBarrier); and the whole block from divergent
// code (kBlockBarrier, an id of its own, since compute-sanitizer synccheck objects to barrier 0 at two
// program points).
constexpr int kPrepareThreads = 128, kLowerWarpsBarrier = 1, kBlockBarrier = 2;

__device__ inline void block_barrier() { named_barrier_sync(kBlockBarrier, kPrepareThreads); }

// Off-diagonal 16x16 blocks of L that warp w owns: `beside` = L[w][w-1] (w = 1, 3), `under` = L[w][0..1] (w =
// 2, 3).
struct LowerRow {
  float beside[2][4], under[2][2][4];
};

// N from L by block recursion; subscripts 1, 2 are the first and second half of a block's rows:
//   N_21 = (I - N_22 diag(beta_2)) (L_21 - L_21 diag(beta_1) N_11)
// The four diagonal 16x16 blocks come from solve_diagonal_column; then 16 -> 32 and 32 -> 64 on tensor cores,
// operands hi + lo fp16, fp32 accumulation. `tiles` holds N as load_block reads it.
//
// 16 -> 32: warps 1 and 3 compute N_10 and N_32.
__device__ inline void solve_beside(__half* tiles, LowerRow& x, const float* beta, int warp) {
  const HiLoFragment own = load_block<kLeft>(tiles, warp, warp);
  add_product(x.beside, scaled_a_fragment(x.beside, beta, 16 * (warp - 1)),
              load_block<kRight>(tiles, warp - 1, warp - 1));
  add_product(x.beside, own, scaled_b_fragment(x.beside, beta, 16 * warp));
  store_block(tiles, warp, warp - 1, x.beside);
}

// 32 -> 64: warps 2 and 3 compute N_21 = (I - N_22 diag(beta_2)) T. The block barrier makes N_10 and N_32
// visible. Warp 2 passes its rows of T to warp 3 through the unused upper triangle.
__device__ inline void solve_under(__half* tiles, LowerRow& x, const float* beta, int warp) {
  const HiLoFragment second = scaled_a_fragment(x.under[1], beta, 16);
  add_product(x.under[0], scaled_a_fragment(x.under[0], beta, 0), load_block<kRight>(tiles, 0, 0));
  add_product(x.under[1], second, load_block<kRight>(tiles, 1, 1));
  block_barrier();
  add_product(x.under[0], second, load_block<kRight>(tiles, 1, 0));
  if (warp == 2) {
#pragma unroll
    for (int j = 0; j < 2; j++) store_block(tiles, 0, 2 + j, scaled_row_fragment(x.under[j], beta, 32));
  } else {
    const HiLoFragment own = load_block<kLeft>(tiles, 3, 3);
#pragma unroll
    for (int j = 0; j < 2; j++) add_product(x.under[j], own, scaled_b_fragment(x.under[j], beta, 48));
  }
  named_barrier_sync(kLowerWarpsBarrier, 64);
  const HiLoFragment left = load_block<kLeft>(tiles, warp, 2);
#pragma unroll
  for (int j = 0; j < 2; j++) add_product(x.under[j], left, load_block<kRight>(tiles, 0, 2 + j));
#pragma unroll
  for (int j = 0; j < 2; j++) store_block(tiles, warp, j, x.under[j]);
}

// Writes row block `block` of N (hi part, n) to global memory; this warp stored it to shared memory last.
__device__ inline void write_row_block(__half* to, const __half* n, int block) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 16 * block + 4 * i + lane / 8, column = 8 * (lane % 8);
    if (column >= 16 * (block + 1)) continue;
    *reinterpret_cast<uint4*>(to + row * kChunk + column) =
        *reinterpret_cast<const uint4*>(n + row * kMatrixStride + column);
  }
}

// A 16-row block of q k^T or k k^T, up to 64 columns, as accumulator tiles of 8 columns.
struct RowBlock {
  float (&first)[4][4], (&second)[4][4];
  __device__ float (&tile(int t))[4] { return t < 4 ? first[t] : second[t - 4]; }
};

// e^difference for a difference of cumulative log decays, clamped to 1. Relative error about 1e-7, while the
// result is rounded to fp16, or to hi + lo fp16 on the way to N; 0 below 2^-126.
__device__ inline float decay(float difference) {
  return fast_exp2(fminf(1.4426950408889634f * difference, 0.f));
}

// Multiplies row block kBlock of q k^T or k k^T [16, 16 (kBlock + 1)] by factor * D_ij, D_ij = e^{G_i - G_j};
// zeros above the diagonal, and on it if kStrict. Left of the diagonal block, whose first row is r, D_ij =
// e^{G_i - G_r} e^{G_r - G_j}, both at most 1: one exponential per row and per column instead of one per
// entry. column_decay: 64 floats of shared memory owned by this warp.
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

// Shared-memory layout of a chunk's q and k, whose space N takes over later. q's 16-row blocks are stored in
// reverse order, so that warp w reads block w of both: it computes row block w of L (w + 1 blocks long) and
// row block 3 - w of P, five blocks in all, whatever w. Rows are ld elements apart, or (kWgmma) in swizzled
// tiles of 64 columns (sm90/tiles.cuh).
template <bool kWgmma>
struct PrepareTiles : PrepareLayout<kWgmma> {
  act* q;

  __device__ PrepareTiles(void* at, int dk) : PrepareLayout<kWgmma>(dk), q(static_cast<act*>(at)) {}
  __device__ const act* k() const { return q + this->k_at(); }
  __device__ __half* n() const { return reinterpret_cast<__half*>(q + this->n_at()); }
  // Diagonal block i of L overwrites warp i's rows of q, which no other warp reads.
  __device__ float* diagonal_block(int i) const {
    return reinterpret_cast<float*>(q + i * this->row_block());
  }
};

// Accumulators of warp w: row block 3 - w of q k^T and row block w of k k^T, the first 32 columns of each;
// and columns 32 to 63 of the longer one, q k^T in warps 0 and 1, k k^T in warps 2 and 3.
struct WarpProducts {
  float q[4][4], k[4][4], second[4][4];
};

// q k^T and k k^T by mma.sync, only the blocks on and below the diagonal.
template <int kWarp>
__device__ inline void lower_products(WarpProducts& x, const PrepareTiles<false>& tiles, int dk) {
  constexpr int kRows = 3 - kWarp, kBlocks = (kWarp > kRows ? kWarp : kRows) + 1;
  const int ld = tiles.ld;
  const uint32_t q_rows = lane_address_rows_first(tiles.q + 16 * kWarp * ld, ld),
                 k_columns = lane_address_columns_first(tiles.k(), ld);
  RowBlock qk = {x.q, x.second}, kk = {x.k, x.second};
#pragma unroll 1
  for (int e = 0; e < dk; e += 16) {
    uint32_t a_q[4], b[kBlocks][4];
    ldmatrix(a_q, q_rows + 2 * e);
#pragma unroll
    for (int t = 0; t < kBlocks; t++) ldmatrix(b[t], k_columns + 2 * (16 * t * ld + e));
    // A fragment of k's rows: the registers of its B fragment in another order.
    const uint32_t a_k[4] = {b[kWarp][0], b[kWarp][2], b[kWarp][1], b[kWarp][3]};
#pragma unroll
    for (int t = 0; t < kBlocks; t++) {
      if (t <= kRows) mma_pair_bf16(qk.tile(2 * t), qk.tile(2 * t + 1), a_q, b[t]);
      if (t <= kWarp) mma_pair_bf16(kk.tile(2 * t), kk.tile(2 * t + 1), a_k, b[t]);
    }
  }
}

// q k^T and k k^T by wgmma, all 64 x 64: the M dimension is the four warps' row blocks of q, then of k, then
// of the longer one (from registers). One step covers 16 kSteps columns of q and k within a tile, at the
// descriptors' and longer_rows' position.
template <int kSteps>
__device__ inline void add_columns(WarpProducts& x, uint64_t q, uint64_t k, uint32_t longer_rows, int add) {
  uint32_t longer[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; i++) ldmatrix(longer[i], longer_rows ^ 32 * i);
  wgmma_fence_operand(longer);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    const int at = i * kColumns16;
    wgmma_32_bf16_shared(x.k, k + at, k + at, i > 0 || add);
    wgmma_32_bf16(x.second, longer[i], k + at + 2 * kRows16, i > 0 || add);
    wgmma_32_bf16_shared(x.q, q + at, k + at, i > 0 || add);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_fence_operand(x.q), wgmma_fence_operand(x.k), wgmma_fence_operand(x.second);
}

__device__ inline void wgmma_products(WarpProducts& x, const PrepareTiles<true>& tiles, int dk, int warp) {
  const int lane = threadIdx.x % 32;
  uint32_t longer_rows = shared_address((warp < 2 ? tiles.q : tiles.k()) + warp * tiles.row_block()) +
                         swizzled(lane & 15, lane >> 4);
  uint64_t q = make_smem_desc(tiles.q), k = make_smem_desc(tiles.k());
  int add = 0;
#pragma unroll 1
  for (; dk > 32; dk -= kTileRow) {
    add_columns<4>(x, q, k, longer_rows, add);
    q += kNextTile, k += kNextTile, longer_rows += kTileBytes, add = 1;
  }
  if (dk > 0) add_columns<2>(x, q, k, longer_rows, add);
}

// Row block kWarp of L from k k^T: the blocks left of the diagonal to `L`, the diagonal block to shared
// memory.
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

// Row block kRows of P from q k^T, as fp16, to global memory; to: row 0 of P.
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

// The block issues cp.async of q and k [64, dk] of a chunk, n rows from row `first` of key head hk, zero-fill
// below, and (kWgmma) up to a multiple of 32 columns.
template <bool kWgmma>
__device__ inline void copy_q_and_k(const PrepareTiles<kWgmma>& tiles, const HeadRows<const act>& q,
                                    const HeadRows<const act>& k, int hk, int64_t first, int dk, int n) {
  const int r = threadIdx.x / 8, vector = threadIdx.x % 8, row_block = tiles.row_block();
  static_assert(kPrepareThreads == 8 * 16, "a thread's rows are 16 apart");
  const int q_stride = q.row_stride, k_stride = k.row_stride;
  const act* q_from = q.head(hk) + (first + r) * q_stride + 8 * vector;
  const act* k_from = k.head(hk) + (first + r) * k_stride + 8 * vector;
  act* to = tiles.q + (kWgmma ? swizzled(r, vector) / 2 : r * tiles.ld + 8 * vector);
#pragma unroll 1
  for (int column = 8 * vector; column < (kWgmma ? (dk + 31) / 32 * 32 : dk); column += kTileRow) {
    act* k_to = to + tiles.k_at();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool valid = r + 16 * i < n && column < dk;
      cp_async_16(to + (3 - i) * row_block, advance_rows(q_from, 16 * i, q_stride), valid);
      cp_async_16(k_to + i * row_block, advance_rows(k_from, 16 * i, k_stride), valid);
    }
    q_from += kTileRow, k_from += kTileRow, to += kWgmma ? kChunk * kTileRow : kTileRow;
  }
  cp_async_commit();
}

// (1)-(3) for one chunk of one value head: N and P, fp16, matrices [chunks][N, P][64,64], of which only the
// 16x16 blocks on and below the diagonal are written (no entry exceeds 1); gates [chunks][4,64]. q k^T and k
// k^T are exact products of bf16. Neither the identity nor beta is part of a rounded matrix.
//
// Lower bound at B=32, T=1024, H=6, dk=128, dv=256: reads q, k 101 MB, writes 35 MB; 6.4 GFLOP on tensor
// cores (and 0.9 of hi/lo products for N), 0.05 GFLOP of substitution in fp32. H200
// (dev/results/delta_rule_speed): 0.049 ms, and 0.198 ms with 16/32 heads of 128, B=8, T=4096. There, by
// ncu: L1 82% busy, issue slots 47%, no eligible warp in 52% of the cycles; 21% of the samples wait at
// barriers, half of these for the warps that substitute, 19% for shared memory; DRAM 41%. Registers allow
// five CTAs an SM; with six, ptxas serialises the wgmma: 13% slower.
template <bool kWgmma>
__device__ inline void prepare_chunk(unsigned char* shared, const Prepared& to, const PrepareInputs& in,
                                     const Sizes& size, float s) {
  const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h);
  float* gates = reinterpret_cast<float*>(shared);
  const PrepareTiles<kWgmma> tiles(gates + kPrepareFloats, size.dk);
  const int n = size.rows_in(chunk);
  const int64_t row = size.first_row(b, chunk), number = size.chunk_number(b, h, chunk);
  // issue the loads on the critical path first: g, beta -> gates -> L
  copy_gate_inputs(gates, in.g + row * size.heads_v + h, in.beta + row * size.heads_v + h, size.heads_v, n);
  copy_q_and_k(tiles, in.q, in.k, hk, row, size.dk, n);
  cp_async_wait_all_but_one();
  chunk_gates(gates, n);
  cp_async_wait_all();
  if (kWgmma) fence_proxy_async();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGates; i += kPrepareThreads)
    to.gates[number * kGates + i + threadIdx.x] = gates[i + threadIdx.x];

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same in all lanes, as the compiler now knows
  const float *G = gates + kCumulativeLogDecay * kChunk, *chunk_beta = gates + kBeta * kChunk;
  float* column_decay = gates + kGates + kChunk * warp;
  __half *n_out = to.matrices + number * 2 * kMatrixElements, *p_out = n_out + kMatrixElements,
         *N = tiles.n();
  WarpProducts x = {};
  if constexpr (kWgmma) wgmma_products(x, tiles, size.dk, warp);
  LowerRow L;
  const auto make_row_of_l = [&](auto of_warp) {
    constexpr int kWarp = decltype(of_warp)::value;
    if constexpr (!kWgmma) lower_products<kWarp>(x, tiles, size.dk);
    lower_row<kWarp>(L, tiles.diagonal_block(kWarp), {x.k, x.second}, G, column_decay);
  };
  const auto make_row_of_p = [&](auto rows) {
    write_row_of_p<decltype(rows)::value>(p_out, {x.q, x.second}, G, column_decay, s);
  };
  constexpr auto k0 = std::integral_constant<int, 0>();
  constexpr auto k1 = std::integral_constant<int, 1>();
  constexpr auto k2 = std::integral_constant<int, 2>();
  constexpr auto k3 = std::integral_constant<int, 3>();
  // Warps 0 and 1, which have less of L, solve N's diagonal blocks while warps 2 and 3 compute the short row
  // blocks of P; then warps 0 and 1 compute the long row blocks of P while the others finish N.
  if (warp < 2) {
    warp == 0 ? make_row_of_l(k0) : make_row_of_l(k1);
    block_barrier();  // q and k become N
    const int lane = threadIdx.x % 32, block = 2 * warp + lane / 16, j = lane % 16;
    __half* to = N + 16 * block * (kMatrixStride + 1) + j;
    solve_diagonal_column(to, to + kChunk * kMatrixStride, tiles.diagonal_block(block),
                          chunk_beta + 16 * block, j);
    block_barrier();  // N_ii
    if (warp == 1) solve_beside(N, L, chunk_beta, warp);
    block_barrier();  // N_10, N_32
    write_row_block(n_out, N, warp);
    warp == 0 ? make_row_of_p(k3) : make_row_of_p(k2);
  } else {
    warp == 2 ? make_row_of_l(k2) : make_row_of_l(k3);
    block_barrier();
    warp == 2 ? make_row_of_p(k1) : make_row_of_p(k0);
    block_barrier();
    if (warp == 3) solve_beside(N, L, chunk_beta, warp);
    solve_under(N, L, chunk_beta, warp);
    write_row_block(n_out, N, warp);
  }
}

static __global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(Prepared to, PrepareInputs in, Sizes size, float s) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(GDN_EMULATED)
  extern __shared__ __align__(1024) unsigned char tiles[];
  prepare_chunk<false>(tiles, to, in, size, s);
#endif
}

// q k^T and k k^T on wgmma.
static __global__ void __launch_bounds__(kPrepareThreads)
    prepare_sm90_kernel(Prepared to, PrepareInputs in, Sizes size, float s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char tiles[];
  prepare_chunk<true>(tiles, to, in, size, s);
#endif
}

}  // namespace delta_rule
}  // namespace gdn
