// The gated delta rule, first kernel: everything of a chunk that does not depend on the state.
#pragma once

#include "../shapes.h"
#include "delta_rule_mma.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kSquareStride = kChunk + 8;            // row stride of a [64,64] bf16 tile in shared memory
constexpr int kSquare = kChunk * kChunk;             // elements of such a tile in global memory
constexpr int kGates = 4 * kChunk;                   // floats of a chunk's gates
enum Gate { kBeta, kFromStart, kToEnd, kLogDecay };  // rows of the gates: beta, e^G, e^{G_C - G}, G

// Sizes of a call. A chunk of a value head has the number ((b Hv + h) chunks + chunk).
struct Sizes {
  int tokens, heads_k, heads_v, dk, dv, chunks, channels;
  __device__ int64_t chunk_number(int b, int h, int chunk) const {
    return (int64_t(b) * heads_v + h) * chunks + chunk;
  }
  __device__ int64_t first_row(int b, int chunk) const { return int64_t(b) * tokens + chunk * kChunk; }
  __device__ int rows_in(int chunk) const { return min(kChunk, tokens - chunk * kChunk); }
  __device__ int q_column(int hk) const { return hk * dk; }
  __device__ int k_column(int hk) const { return (heads_k + hk) * dk; }
  __device__ int v_column(int h) const { return 2 * heads_k * dk + h * dv; }
  __device__ int key_head(int h) const { return h / (heads_v / heads_k); }
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

// Column j of N = L - L diag(beta) N by forward substitution, in fp32: N_ij = L_ij - sum_{k<i} L_ik beta_k
// N_kj. L [64, ld] strictly lower; writes N as bf16 high + low [64,64].
__device__ inline void solve_column(act* high, act* low, const float* L, int ld, const float* beta, int j) {
  float x[kChunk];  // beta_k N_kj
#pragma unroll
  for (int i = 0; i < kChunk; i += 4) {
    float sum[4];
#pragma unroll
    for (int r = 0; r < 4; r++) sum[r] = L[(i + r) * ld + j];
#pragma unroll
    for (int k = 0; k < i; k += 4)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float4 l = *reinterpret_cast<const float4*>(L + (i + r) * ld + k);
        sum[r] -= l.x * x[k];
        sum[r] -= l.y * x[k + 1];
        sum[r] -= l.z * x[k + 2];
        sum[r] -= l.w * x[k + 3];
      }
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int k = 0; k < r; k++) sum[r] -= L[(i + r) * ld + i + k] * x[i + k];
      x[i + r] = beta[i + r] * sum[r];
      const act h = __float2bfloat16_rn(sum[r]);
      high[(i + r) * kChunk + j] = h;
      low[(i + r) * kChunk + j] = __float2bfloat16_rn(sum[r] - __bfloat162float(h));
    }
  }
}

// Writes rows [16,64] of a bf16 high + low matrix from accumulators; row g of the tile at `high`, `low`.
__device__ inline void store_square_rows(act* high, act* low, const float (&x)[8][4]) {
  const int g = (threadIdx.x % 32) / 4;
#pragma unroll
  for (int row = 0; row < 2; row++)
#pragma unroll
    for (int t = 0; t < 8; t += 4) {
      uint32_t h[4], l[4];
#pragma unroll
      for (int e = 0; e < 4; e++) split(h[e], l[e], x[t + e][2 * row], x[t + e][2 * row + 1]);
      store_32_columns(high + (g + 8 * row) * kChunk + 8 * t, h, 32);
      store_32_columns(low + (g + 8 * row) * kChunk + 8 * t, l, 32);
    }
}

constexpr int kPrepareThreads = 128, kLStride = kChunk + 4;

inline int prepare_shared_bytes(int dk) {
  return 2 * kChunk * (dk + 8) * 2 + kChunk * kLStride * 4 + kGates * 4;
}

// For each chunk and value head:
//   L_ij = D_ij (k_i . k_j), i > j        N = (I + L diag(beta))^-1 L, strictly lower
//   P_ij = s D_ij (q_i . k_j), i >= j     gates: beta, e^G, e^{G_C - G}, G
// so that (I + A)^-1 = I - diag(beta) N, and neither the identity nor beta is ever rounded to bf16.
// N and P go out as bf16 high + low, matrices [chunks][N high, N low, P high, P low][64,64]; gates
// [chunks][4,64]. k.k and q.k are exact products of bf16; the substitution is fp32, one column a thread, in
// registers.
//
// Floor at B=32, T=1024, H=6, dk=128, dv=256: reads q, k 101 MB, writes 104 MB: 0.048 ms at the copy
// rate; 6.4 GFLOP on tensor cores, 0.3 GFLOP of substitution in fp32 (0.8 done). Reached on an H200: 0.114
// ms, 42% of the copy rate.
static __global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(act* matrices, float* gates_out, const act* qkv, const float* g, const float* beta,
                   Sizes size, float s) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int chunk = blockIdx.x, h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h), ld = size.dk + 8;
  act *q = reinterpret_cast<act*>(shared), *k = q + kChunk * ld;
  float *L = reinterpret_cast<float*>(k + kChunk * ld), *gates = L + kChunk * kLStride;
  const int n = size.rows_in(chunk);
  const int64_t row = size.first_row(b, chunk), number = size.chunk_number(b, h, chunk);
  const act* inputs = qkv + row * size.channels;
  copy_tile(q, ld, inputs + size.q_column(hk), size.channels, kChunk, size.dk, n, size.dk);
  copy_tile(k, ld, inputs + size.k_column(hk), size.channels, kChunk, size.dk, n, size.dk);
  copies_issued();
  chunk_gates(gates, g + row * size.heads_v + h, beta + row * size.heads_v + h, size.heads_v, n);
  copies_arrived();
  __syncthreads();
  for (int i = threadIdx.x; i < kGates; i += kPrepareThreads) gates_out[number * kGates + i] = gates[i];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = 16 * warp;  // this warp's rows
  float qk[8][4] = {}, kk[8][4] = {};
  const uint32_t q_rows = walk_rows(q + first * ld, ld), k_rows = walk_rows(k + first * ld, ld);
  const uint32_t k_columns = walk_columns(k, ld);
  for (int e = 0; e < size.dk; e += 16) {
    uint32_t a_q[4], a_k[4], b_k[4];
    ldmatrix(a_q, q_rows + 2 * e);
    ldmatrix(a_k, k_rows + 2 * e);
#pragma unroll
    for (int t = 0; t < 4; t++) {
      if (t > warp) continue;
      ldmatrix(b_k, k_columns + 2 * (16 * t * ld + e));
      mma_pair(qk[2 * t], qk[2 * t + 1], a_q, b_k);
      mma_pair(kk[2 * t], kk[2 * t + 1], a_k, b_k);
    }
  }
  const float* G = gates + kLogDecay * kChunk;
#pragma unroll
  for (int t = 0; t < 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int i = first + lane / 4 + 8 * (e / 2), j = 8 * t + 2 * (lane % 4) + e % 2;
      const float decay = i >= j ? expf(fminf(G[i] - G[j], 0.f)) : 0.f;
      L[i * kLStride + j] = i > j ? decay * kk[t][e] : 0.f;
      qk[t][e] = i >= j ? s * decay * qk[t][e] : 0.f;
    }
  act* out = matrices + number * 4 * kSquare;
  store_square_rows(out + 2 * kSquare + first * kChunk, out + 3 * kSquare + first * kChunk, qk);
  __syncthreads();
  if (threadIdx.x < kChunk)
    solve_column(out, out + kSquare, L, kLStride, gates + kBeta * kChunk, threadIdx.x);
}

}  // namespace delta_rule
}  // namespace gdn
