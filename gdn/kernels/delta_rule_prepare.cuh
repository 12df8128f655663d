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
  __device__ int key_head(int h) const { return h / value_heads_per_key; }
};

// gates [4,64] in shared memory from g and beta of one chunk; tokens past the end have g = 0, beta = 0. The
// block's first warp does it; the caller synchronises afterwards.
__device__ inline void chunk_gates(float* gates, const float* g, const float* beta, int stride, int n) {
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x, i = 2 * lane;  // this lane's tokens: i, i + 1
  const float g0 = i < n ? g[int64_t(i) * stride] : 0.f, g1 = i + 1 < n ? g[int64_t(i + 1) * stride] : 0.f;
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
    gates[kBeta * kChunk + i + e] = i + e < n ? beta[int64_t(i + e) * stride] : 0.f;
    gates[kFromStart * kChunk + i + e] = expf(G[e]);
    gates[kToEnd * kChunk + i + e] = expf(fminf(total - G[e], 0.f));
    gates[kLogDecay * kChunk + i + e] = G[e];
  }
}

// Writes a warp's rows [16, 16 (warp + 1)] of a matrix from accumulators as fp16; to: the tile's row 0.
__device__ inline void store_lower_blocks(__half* to, const float (&x)[8][4], int warp) {
  const int g = (threadIdx.x % 32) / 4;
#pragma unroll
  for (int row = 0; row < 2; row++)
#pragma unroll
    for (int t = 0; t < 8; t += 4) {
      if (t / 2 > warp) continue;
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; e++) w[e] = pack_fp16(x[t + e][2 * row], x[t + e][2 * row + 1]);
      store_32_columns(to + (16 * warp + g + 8 * row) * kChunk + 8 * t, w, 16 * (warp + 1) - 8 * t);
    }
}

// Blocks of L on the diagonal, each transposed: [16 columns][kBlockStride rows].
constexpr int kBlockStride = 20;
constexpr int kDiagonalBlock = 16 * kBlockStride;  // floats

// Row block `warp` of L, its block on the diagonal.
__device__ inline void store_diagonal_block(float* diagonals, const float (&x)[8][4], int warp) {
  float* to = diagonals + warp * kDiagonalBlock;
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int t = 0; t < 8; t++)
    if (t / 2 == warp)
#pragma unroll
      for (int e = 0; e < 4; e++) to[(8 * (t % 2) + c + e % 2) * kBlockStride + g + 8 * (e / 2)] = x[t][e];
}

// A column of a 16x16 block of N on the diagonal by forward substitution, in fp32: N_ij = L_ij - sum_{k<i} L_ik
// beta_k N_kj. l: L's block, transposed; to the column's places in N's three forms.
__device__ inline void solve_diagonal_column(__half* fp16, act* high, act* low, const float* l,
                                             const float* beta, int j) {
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
    const act rounded = __float2bfloat16_rn(sum[k]);
    high[k * kSquareStride] = rounded;
    low[k * kSquareStride] = __float2bfloat16_rn(sum[k] - __bfloat162float(rounded));
    fp16[k * kSquareStride] = __float2half_rn(sum[k]);
  }
}

// N from L by blocks of 16, x being row block `warp` of L and what is left of it:
//   N_ii by substitution        N_ij = (I - N_ii diag(beta_i)) (L_ij - sum_{k=j}^{i-1} L_ik diag(beta_k)
//   N_kj)
// The products on tensor cores, operands bf16 high + low, sums fp32; the substitution in the two warps that have
// the fewest products, a lane for each column of the four blocks. N comes out in shared memory, fp16, bf16
// high and bf16 low [3][64, kSquareStride] at `tiles`, and as fp16 in memory.
__device__ inline void solve_by_blocks(__half* out, act* tiles, const float* diagonals, float (&x)[8][4],
                                       const float* beta, int warp) {
  __half* fp16 = reinterpret_cast<__half*>(tiles);
  act *high = tiles + kChunk * kSquareStride, *low = high + kChunk * kSquareStride;
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4), first = 16 * warp;
  const auto write_out = [&] {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = first + 4 * i + lane / 8, column = 8 * (lane % 8);
      if (column >= first + 16) continue;
      *reinterpret_cast<uint4*>(out + row * kChunk + column) =
          *reinterpret_cast<const uint4*>(fp16 + row * kSquareStride + column);
    }
  };
  const act *diagonal_high = high + first * kSquareStride + first,
            *diagonal_low = low + first * kSquareStride + first;
  if (warp < 2) {
    const int block = 2 * warp + lane / 16, j = lane % 16, at = 16 * block * kSquareStride + 16 * block + j;
    solve_diagonal_column(fp16 + at, high + at, low + at, diagonals + block * kDiagonalBlock,
                          beta + 16 * block, j);
  }
  if (warp == 0) write_out();
#pragma unroll
  for (int k = 0; k < 3; k++) {
    __syncthreads();  // row block k of N is there
    if (warp <= k) continue;
    uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
    float scaled[2][4];
#pragma unroll
    for (int e = 0; e < 4; e++) scaled[0][e] = x[2 * k][e], scaled[1][e] = x[2 * k + 1][e];
    scale_tokens(scaled[0], scaled[1], beta, 16 * k, -1.f);
    split(a_high, a_low, scaled[0], scaled[1]);
#pragma unroll
    for (int j = 0; j <= k; j++) {
      ldmatrix_transposed(b_high, walk_rows(high + 16 * k * kSquareStride + 16 * j, kSquareStride));
      ldmatrix_transposed(b_low, walk_rows(low + 16 * k * kSquareStride + 16 * j, kSquareStride));
      mma_pair_split(x[2 * j], x[2 * j + 1], a_high, a_low, b_high, b_low);
    }
    if (warp > k + 1) continue;
    ldmatrix(a_high, walk_rows(diagonal_high, kSquareStride));
    ldmatrix(a_low, walk_rows(diagonal_low, kSquareStride));
    const float upper = -beta[first + g], lower = -beta[first + g + 8];
#pragma unroll
    for (int j = 0; j <= k; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float(&tile)[4] = x[2 * j + half];
        split(b_high[2 * half], b_low[2 * half], upper * tile[0], upper * tile[1]);
        split(b_high[2 * half + 1], b_low[2 * half + 1], lower * tile[2], lower * tile[3]);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) b_high[e] = transpose_8x8(b_high[e]), b_low[e] = transpose_8x8(b_low[e]);
      mma_pair_split(x[2 * j], x[2 * j + 1], a_high, a_low, b_high, b_low);
    }
#pragma unroll
    for (int t = 0; t < 2 * (k + 1); t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        uint32_t h, l;
        split(h, l, x[t][2 * e], x[t][2 * e + 1]);
        const int at = (first + g + 8 * e) * kSquareStride + 8 * t + c;
        *reinterpret_cast<uint32_t*>(high + at) = h;
        *reinterpret_cast<uint32_t*>(low + at) = l;
        *reinterpret_cast<uint32_t*>(fp16 + at) = pack_fp16(x[t][2 * e], x[t][2 * e + 1]);
      }
    write_out();
  }
}

// kk and qk, a warp's rows of k.k and q.k, become L and P: times D_ij = e^{G_i - G_j} and s D_ij, zeros above
// the diagonal. In blocks before the diagonal's, whose rows start at token r, D_ij is e^{G_i - G_r} times
// e^{G_r - G_j}, both at most 1: an exponential a row and a column in place of one an entry. __expf is off by
// little more than 1e-7, where the results are rounded to fp16 or, on the way to N, to twice bf16.
// column_decay: this warp's 64 numbers in shared memory.
__device__ inline void multiply_by_decay(float (&kk)[8][4], float (&qk)[8][4], const float* G,
                                         float* column_decay, float s, int warp) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4), first = 16 * warp;
  for (int j = lane; j < first; j += 32) column_decay[j] = __expf(fminf(G[first] - G[j], 0.f));
  const float upper = __expf(fminf(G[first + g] - G[first], 0.f)),
              lower = __expf(fminf(G[first + g + 8] - G[first], 0.f));
  __syncwarp();
#pragma unroll
  for (int t = 0; t < 8; t++) {
    if (t / 2 > warp) continue;
    if (t / 2 < warp) {
      const float2 column = *reinterpret_cast<const float2*>(column_decay + 8 * t + c);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float decay = (e < 2 ? upper : lower) * (e % 2 ? column.y : column.x);
        kk[t][e] *= decay;
        qk[t][e] *= s * decay;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = g + 8 * (e / 2), j = 8 * (t % 2) + c + e % 2;
        const float decay = i >= j ? __expf(fminf(G[first + i] - G[first + j], 0.f)) : 0.f;
        kk[t][e] = i > j ? decay * kk[t][e] : 0.f;
        qk[t][e] = i >= j ? s * decay * qk[t][e] : 0.f;
      }
    }
  }
}

constexpr int kPrepareThreads = 128;

// q and k, afterwards N.
inline int prepare_tiles_bytes(int dk) {
  return std::max(2 * kChunk * (dk + 8) * 2, 3 * kChunk * kSquareStride * 2);
}
// The gates, multiply_by_decay's 64 numbers for each warp, and the blocks on L's diagonal.
constexpr int kDecayAt = kGates, kDiagonalsAt = kDecayAt + 4 * kChunk;
constexpr int kPrepareFloats = kDiagonalsAt + 4 * kDiagonalBlock;
inline int prepare_shared_bytes(int dk) { return 4 * kPrepareFloats + prepare_tiles_bytes(dk); }

// qk, kk [16 rows, 16 kBlocks columns] += a warp's rows of q and k times the first rows of k.
template <int kBlocks>
__device__ inline void add_lower_products(float (&qk)[8][4], float (&kk)[8][4], uint32_t q_rows, uint32_t k_rows,
                                          uint32_t k_columns, int ld, int dk) {
#pragma unroll 1
  for (int e = 0; e < dk; e += 16) {
    uint32_t a_q[4], a_k[4], b_k[kBlocks][4];
    ldmatrix(a_q, q_rows + 2 * e);
    ldmatrix(a_k, k_rows + 2 * e);
#pragma unroll
    for (int t = 0; t < kBlocks; t++) ldmatrix(b_k[t], k_columns + 2 * (16 * t * ld + e));
#pragma unroll
    for (int t = 0; t < kBlocks; t++) {
      mma_pair_bf16(qk[2 * t], qk[2 * t + 1], a_q, b_k[t]);
      mma_pair_bf16(kk[2 * t], kk[2 * t + 1], a_k, b_k[t]);
    }
  }
}

// For each chunk and value head:
//   L_ij = D_ij (k_i . k_j), i > j        N = (I + L diag(beta))^-1 L, strictly lower
//   P_ij = s D_ij (q_i . k_j), i >= j     gates: beta, e^G, e^{G_C - G}, G
// so that (I + A)^-1 = I - diag(beta) N, and neither the identity nor beta is ever rounded.
// N and P go out as fp16 (no entry of N exceeds 1, none of P s), matrices [chunks][N, P][64,64], of which only
// the 16x16 blocks on and below the diagonal are written; gates [chunks][4,64]. k.k and q.k are exact
// products of bf16; N by blocks (solve_by_blocks). Each warp 16 rows.
//
// Floor at B=32, T=1024, H=6, dk=128, dv=256: reads q, k 101 MB, writes 35 MB: 0.045 ms at the copy rate; 6.4
// GFLOP on tensor cores (and 0.9 of split products in N), 0.05 GFLOP of substitution in fp32.
// Reached on an H200: 0.067 ms, 75% of the floor as dev/bench_delta_rule counts it, and 0.285 (63%) with 16/32
// heads of 128. What it waits for there, by ncu on an earlier version (0.312 ms): issue slots 57% busy, no
// eligible warp in 42% of the cycles, occupancy 29% by registers and shared memory, DRAM 24%.
static __global__ void __launch_bounds__(kPrepareThreads, 5)
    prepare_kernel(__half* matrices, float* gates_out, const act* qkv, const float* g, const float* beta,
                   Sizes size, float s) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h), ld = size.dk + 8;
  float* gates = reinterpret_cast<float*>(shared);
  float *column_decay = gates + kDecayAt, *diagonals = gates + kDiagonalsAt;
  act *q = reinterpret_cast<act*>(gates + kPrepareFloats), *k = q + kChunk * ld;
  const int n = size.rows_in(chunk);
  const int64_t row = size.first_row(b, chunk), number = size.chunk_number(b, h, chunk);
  const act* inputs = qkv + row * size.channels + size.q_column(hk);
  const int q_to_k = size.k_column(0) - size.q_column(0);
  for_my_vectors(size.dk, kPrepareThreads, [&](int i, int vector) {
    const act* from = inputs + i * size.channels + 8 * vector;
    act* to = q + i * ld + 8 * vector;
    copy_16_bytes(to, from, i < n);
    copy_16_bytes(to + kChunk * ld, from + q_to_k, i < n);
  });
  copies_issued();
  chunk_gates(gates, g + row * size.heads_v + h, beta + row * size.heads_v + h, size.heads_v, n);
  copies_arrived();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGates; i += kPrepareThreads)
    gates_out[number * kGates + i + threadIdx.x] = gates[i + threadIdx.x];

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), first = 16 * warp;  // its rows; known to be the warp's
  float qk[8][4] = {}, kk[8][4] = {};
  const uint32_t q_rows = walk_rows(q + first * ld, ld), k_rows = walk_rows(k + first * ld, ld);
  const uint32_t k_columns = walk_columns(k, ld);
  switch (warp) {
    case 0: add_lower_products<1>(qk, kk, q_rows, k_rows, k_columns, ld, size.dk); break;
    case 1: add_lower_products<2>(qk, kk, q_rows, k_rows, k_columns, ld, size.dk); break;
    case 2: add_lower_products<3>(qk, kk, q_rows, k_rows, k_columns, ld, size.dk); break;
    default: add_lower_products<4>(qk, kk, q_rows, k_rows, k_columns, ld, size.dk);
  }
  multiply_by_decay(kk, qk, gates + kLogDecay * kChunk, column_decay + kChunk * warp, s, warp);
  store_diagonal_block(diagonals, kk, warp);
  __half* out = matrices + number * 2 * kSquare;
  store_lower_blocks(out + kSquare, qk, warp);
  __syncthreads();  // q and k become N
  solve_by_blocks(out, q, diagonals, kk, gates + kBeta * kChunk, warp);
}

}  // namespace delta_rule
}  // namespace gdn
