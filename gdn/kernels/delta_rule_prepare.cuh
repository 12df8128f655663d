// The gated delta rule, first kernel: everything of a chunk that does not depend on the state.
#pragma once

#include <algorithm>

#include "../shapes.h"
#include "delta_rule_mma.cuh"

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

// Writes row block `block` of a matrix, packed accumulators, at most kTiles of 8 columns; to: row 0 of the
// matrix.
template <int kTiles>
__device__ inline void store_row_block(__half* to, const uint32_t (&x)[8][2], int block) {
  const int g = (threadIdx.x % 32) / 4;
#pragma unroll
  for (int row = 0; row < 2; row++)
#pragma unroll
    for (int t = 0; t < kTiles; t += 4) {
      uint32_t w[4] = {x[t][row], x[t + 1][row], x[t + 2][row], x[t + 3][row]};
      store_32_columns(to + (16 * block + g + 8 * row) * kChunk + 8 * t, w, 16 * (block + 1) - 8 * t);
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
// L_ik beta_k N_kj. l: L's block, transposed; to the column's places in N, high and low.
__device__ inline void solve_diagonal_column(__half* high, __half* low, const float* l, const float* beta,
                                             int j) {
  float sum[16];
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(l + j * kBlockStride + i);
    sum[i] = x.x, sum[i + 1] = x.y, sum[i + 2] = x.z, sum[i + 3] = x.w;
  }
#pragma unroll
  for (int k = 0; k < 16; k++) {  // sum[k] is done: off the rows below
    const float x = beta[k] * sum[k];
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

// Block (i, j) of a matrix at `tiles`, high and low [2][64, kSquareStride] in shared memory, as the left and
// as the right operand of a product.
__device__ inline SplitOperand left_block(const __half* tiles, int i, int j) {
  SplitOperand x;
  const uint32_t at = walk_rows(tiles + 16 * (i * kSquareStride + j), kSquareStride);
  ldmatrix(x.high, at);
  ldmatrix(x.low, at + 2 * kChunk * kSquareStride);
  return x;
}
__device__ inline SplitOperand right_block(const __half* tiles, int i, int j) {
  SplitOperand x;
  const uint32_t at = walk_rows(tiles + 16 * (i * kSquareStride + j), kSquareStride);
  ldmatrix_transposed(x.high, at);
  ldmatrix_transposed(x.low, at + 2 * kChunk * kSquareStride);
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

// What a warp has of L: of row block `warp`, what lies before the diagonal. The block beside it in warps 1
// and 3, and in 2 and 3 those under the first two.
struct LowerRow {
  float beside[2][4], under[2][2][4];
};

// N from L by halves: with the first and the second half of the rows of a block
//   N_11, N_22 first      N_21 = (I - N_22 diag(beta_2)) (L_21 - L_21 diag(beta_1) N_11)
// from blocks of 16, whose N_ii are by substitution, to 32 and to 64. The products on tensor cores, operands
// fp16 high + low, sums fp32. N_ii is there, at `tiles` as in left_block; N comes out there, and its high
// part in memory. Of the last step's (I - N_22 diag(beta_2)) T, T's upper rows are warp 2's, and lie, for
// warp 3, above the diagonal.
__device__ inline void solve_by_halves(__half* out, __half* tiles, LowerRow& x, const float* beta, int warp) {
  const auto write_out = [&] {
    __syncwarp();
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = 16 * warp + 4 * i + lane / 8, column = 8 * (lane % 8);
      if (column >= 16 * (warp + 1)) continue;
      *reinterpret_cast<uint4*>(out + row * kChunk + column) =
          *reinterpret_cast<const uint4*>(tiles + row * kSquareStride + column);
    }
  };
  __syncthreads();  // N_ii is there
  if (warp % 2) {
    const SplitOperand own = left_block(tiles, warp, warp);
    add_product(x.beside, left_operand(x.beside, beta, 16 * (warp - 1)),
                right_block(tiles, warp - 1, warp - 1));
    add_product(x.beside, own, right_operand(x.beside, beta, 16 * warp));
    store_block(tiles, warp, warp - 1, x.beside);
  }
  SplitOperand second;  // L's block under the second
  if (warp >= 2) {
    second = left_operand(x.under[1], beta, 16);
    add_product(x.under[0], left_operand(x.under[0], beta, 0), right_block(tiles, 0, 0));
    add_product(x.under[1], second, right_block(tiles, 1, 1));
  } else {
    write_out();
  }
  __syncthreads();  // N_10 and N_32
  if (warp >= 2) {
    add_product(x.under[0], second, right_block(tiles, 1, 0));
    if (warp == 2) {
#pragma unroll
      for (int j = 0; j < 2; j++) store_block(tiles, 0, 2 + j, scaled_rows(x.under[j], beta, 32));
    } else {
      const SplitOperand own = left_block(tiles, 3, 3);
#pragma unroll
      for (int j = 0; j < 2; j++) add_product(x.under[j], own, right_operand(x.under[j], beta, 48));
    }
  }
  __syncthreads();  // T's upper rows
  if (warp >= 2) {
    const SplitOperand left = left_block(tiles, warp, 2);
#pragma unroll
    for (int j = 0; j < 2; j++) add_product(x.under[j], left, right_block(tiles, 0, 2 + j));
#pragma unroll
    for (int j = 0; j < 2; j++) store_block(tiles, warp, j, x.under[j]);
    write_out();
  }
}

// Row block kBlock of q.k or k.k [16, 16 (kBlock + 1)] times factor * D_ij, D_ij = e^{G_i - G_j}; zeros above
// the diagonal, and on it if kStrict. In blocks before the diagonal's, whose rows start at token r, D_ij is
// e^{G_i - G_r} times e^{G_r - G_j}, both at most 1: an exponential a row and a column in place of one an
// entry. __expf is off by little more than 1e-7, where the results are rounded to fp16 or, on the way to N,
// to twice fp16. column_decay: this warp's 64 numbers in shared memory.
template <int kBlock, bool kStrict>
__device__ inline void multiply_by_decay(float (&x)[2 * kBlock + 2][4], const float* G, float* column_decay,
                                         float factor) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4), first = 16 * kBlock;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < first; j += 32)
    if (j + lane < first) column_decay[j + lane] = __expf(fminf(G[first] - G[j + lane], 0.f));
  __syncwarp();
  const float upper = factor * __expf(fminf(G[first + g] - G[first], 0.f)),
              lower = factor * __expf(fminf(G[first + g + 8] - G[first], 0.f));
#pragma unroll
  for (int t = 0; t < 2 * kBlock; t++) {
    const float2 column = *reinterpret_cast<const float2*>(column_decay + 8 * t + c);
    x[t][0] *= upper * column.x, x[t][1] *= upper * column.y;
    x[t][2] *= lower * column.x, x[t][3] *= lower * column.y;
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int i = g + 8 * (e / 2), j = 8 * half + c + e % 2;
      const float decay = factor * __expf(fminf(G[first + i] - G[first + j], 0.f));
      float& y = x[2 * kBlock + half][e];
      y = i > j || (!kStrict && i == j) ? decay * y : 0.f;
    }
}

// What warp kWarp of four makes of q.k and k.k: row block kWarp of L, which is kWarp + 1 blocks long, and row
// block 3 - kWarp of P, so that each warp has five blocks. L before the diagonal, P packed as fp16; L's block
// on the diagonal takes the place of the warp's rows of q, which no other warp reads.
template <int kWarp>
__device__ inline void lower_products(LowerRow& L, uint32_t (&P)[8][2], act* q, const act* k, const float* G,
                                      float* column_decay, int ld, int dk, float s) {
  constexpr int kRows = 3 - kWarp, kBlocks = (kWarp > kRows ? kWarp : kRows) + 1;
  act* my_q = q + 16 * kRows * ld;
  const uint32_t q_rows = walk_rows(my_q, ld);
  const uint32_t k_columns = walk_columns(k, ld);
  float qk[2 * kRows + 2][4] = {}, kk[2 * kWarp + 2][4] = {};
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
      if (t <= kRows) mma_pair_bf16(qk[2 * t], qk[2 * t + 1], a_q, b[t]);
      if (t <= kWarp) mma_pair_bf16(kk[2 * t], kk[2 * t + 1], a_k, b[t]);
    }
  }
  multiply_by_decay<kRows, false>(qk, G, column_decay, s);
#pragma unroll
  for (int t = 0; t < 8; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) P[t][e] = t < 2 * kRows + 2 ? pack_fp16(qk[t][2 * e], qk[t][2 * e + 1]) : 0;
  multiply_by_decay<kWarp, true>(kk, G, column_decay, 1.f);
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (kWarp % 2) L.beside[t][e] = kk[2 * kWarp - 2 + t][e];
      if (kWarp >= 2) L.under[0][t][e] = kk[t][e], L.under[1][t][e] = kk[2 + t][e];
    }
  store_diagonal_block(reinterpret_cast<float*>(my_q), kk[2 * kWarp], kk[2 * kWarp + 1]);
}

// Shared memory: the gates, multiply_by_decay's 64 numbers for each warp, q and k, rows ld apart. The first
// of every 16 rows of q become a block on L's diagonal; N comes behind the last of these.
constexpr int kPrepareThreads = 128, kPrepareFloats = kGates + 4 * kChunk;
__host__ __device__ inline int prepare_ld(int dk) { return (dk > 32 ? dk : 32) + 8; }  // 16 rows hold a block
// N behind q's first row, in elements of q.
__host__ __device__ inline int prepare_n_at(int ld) { return 48 * ld + 2 * kDiagonalBlock; }
inline int prepare_shared_bytes(int dk) {
  const int ld = prepare_ld(dk);
  return 4 * kPrepareFloats + 2 * std::max(2 * kChunk * ld, prepare_n_at(ld) + 2 * kChunk * kSquareStride);
}

// The block starts copying q and k [64, dk] of a chunk, the first n rows, and zeros below; k is to_k numbers
// behind q, there and, in rows of ld, here 64 rows.
__device__ inline void copy_q_and_k(act* q, int ld, const act* from, int to_k, int stride, int dk, int n) {
  const int r = threadIdx.x / 8, first = 8 * (threadIdx.x % 8);
  constexpr int kRows = kPrepareThreads / 8;
  from = rows_on(from, r, stride), q += r * ld;
#pragma unroll 1
  for (int column = first; column < dk; column += 64) {
    const act *q_from = from + column, *k_from = q_from + to_k;
    act *q_to = q + column, *k_to = q_to + kChunk * ld;
#pragma unroll
    for (int i = 0; i < kChunk; i += kRows) {
      copy_16_bytes(q_to + i * ld, rows_on(q_from, i, stride), r + i < n);
      copy_16_bytes(k_to + i * ld, rows_on(k_from, i, stride), r + i < n);
    }
  }
  copies_issued();
}

// For each chunk and value head:
//   L_ij = D_ij (k_i . k_j), i > j        N = (I + L diag(beta))^-1 L, strictly lower
//   P_ij = s D_ij (q_i . k_j), i >= j     gates: beta, e^G, e^{G_C - G}, G
// so that (I + A)^-1 = I - diag(beta) N, and neither the identity nor beta is ever rounded.
// N and P go out as fp16 (no entry of N exceeds 1, none of P s), matrices [chunks][N, P][64,64], of which
// only the 16x16 blocks on and below the diagonal are written; gates [chunks][4,64]. k.k and q.k are exact
// products of bf16 (lower_products); N by halves (solve_by_halves), those on the diagonal in two warps, a
// lane for each column of the four, while the two others write the longer rows of P.
//
// Floor at B=32, T=1024, H=6, dk=128, dv=256: reads q, k 101 MB, writes 35 MB: 0.045 ms at the copy rate; 6.4
// GFLOP on tensor cores (and 0.9 of split products in N), 0.05 GFLOP of substitution in fp32.
// Reached on an H200: 0.054 ms, 93% of the floor as dev/bench_delta_rule counts it (0.050), and 0.236 (76%)
// with 16/32 heads of 128. What it waits for there, by ncu: issue slots 45% busy, no eligible warp in 53% of
// the cycles (a quarter of the waiting is at barriers, for the warp whose turn it is in N), six blocks a
// multiprocessor, DRAM 33%. A seventh, with 72 registers, gains nothing.
static __global__ void __launch_bounds__(kPrepareThreads, 6)
    prepare_kernel(__half* matrices, float* gates_out, const act* qkv, const float* g, const float* beta,
                   Sizes size, float s) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h),
            ld = prepare_ld(size.dk);
  float *gates = reinterpret_cast<float*>(shared), *column_decays = gates + kGates;
  act *q = reinterpret_cast<act*>(gates + kPrepareFloats), *k = q + kChunk * ld;
  const int n = size.rows_in(chunk);
  const int64_t row = size.first_row(b, chunk), number = size.chunk_number(b, h, chunk);
  // first what the longest way is made from
  copy_gate_inputs(gates, g + row * size.heads_v + h, beta + row * size.heads_v + h, size.heads_v, n);
  copy_q_and_k(q, ld, qkv + row * size.channels + size.q_column(hk), size.k_column(0) - size.q_column(0),
               size.channels, size.dk, n);
  copies_arrived_but_one();
  chunk_gates(gates, n);
  copies_arrived();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGates; i += kPrepareThreads)
    gates_out[number * kGates + i + threadIdx.x] = gates[i + threadIdx.x];

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same in all lanes, as the compiler now knows
  const float* G = gates + kLogDecay * kChunk;
  float* column_decay = column_decays + kChunk * warp;
  LowerRow L = {};
  uint32_t P[8][2];
  switch (warp) {
    case 0:
      lower_products<0>(L, P, q, k, G, column_decay, ld, size.dk, s);
      break;
    case 1:
      lower_products<1>(L, P, q, k, G, column_decay, ld, size.dk, s);
      break;
    case 2:
      lower_products<2>(L, P, q, k, G, column_decay, ld, size.dk, s);
      break;
    default:
      lower_products<3>(L, P, q, k, G, column_decay, ld, size.dk, s);
  }
  __half *n_out = matrices + number * 2 * kSquare, *p_out = n_out + kSquare;
  __half* N = reinterpret_cast<__half*>(q + prepare_n_at(ld));
  if (warp >= 2) store_row_block<4>(p_out, P, 3 - warp);
  __syncthreads();  // q and k become N
  if (warp >= 2) {
    const int lane = threadIdx.x % 32, block = 2 * (warp - 2) + lane / 16, j = lane % 16;
    __half* to = N + 16 * block * (kSquareStride + 1) + j;
    solve_diagonal_column(to, to + kChunk * kSquareStride,
                          reinterpret_cast<const float*>(q + 16 * (3 - block) * ld),
                          gates + kBeta * kChunk + 16 * block, j);
  } else {
    store_row_block<8>(p_out, P, 3 - warp);
  }
  solve_by_halves(n_out, N, L, gates + kBeta * kChunk, warp);
}

}  // namespace delta_rule
}  // namespace gdn
