// The gated delta rule, the two sequential kernels: the state forward over the chunks, its gradient backward.
//
// Each warp owns 16 columns of the state and keeps them transposed, [16 of dv, dk], in fp32 accumulators for
// the whole sequence. Transposed, every product of a chunk has the state, or the result of the product before
// it, as its A operand, which registers hold already (split into bf16 high + low, so that operands keep 16
// bits); B operands are q, k, N, P as they lie in shared memory. Warps exchange nothing; a block's warps
// share the loads.
#pragma once

#include "delta_rule_prepare.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kMaxPassWarps = 8;

// N and P in a stage: two tiles, high and low, each 64 rows of five 16x16 blocks. N_ij lies at (i, j); P_ij
// at (3 - i, 4 - i + j), in what N's lower triangle leaves.
constexpr int kTrianglesStride = 5 * 16 + 8, kTriangles = kChunk * kTrianglesStride;
__device__ constexpr int block_of_n(int i, int j) { return 16 * (i * kTrianglesStride + j); }
__device__ constexpr int block_of_p(int i, int j) { return 16 * ((3 - i) * kTrianglesStride + 4 - i + j); }

// What a pass needs of one chunk, in shared memory. `values` is v forward and do backward; its tile also
// stages what a warp writes to global memory, each warp in its own 16 columns.
struct PassStage {
  act *q, *k;    // [64, DK + 8], zeros from column dk on
  act* values;   // [64, 16 warps + 8]
  act* squares;  // N and P, high and low: [2][64, kTrianglesStride]
  float* gates;  // [4, 64]
};

__host__ __device__ constexpr int pass_stage_bytes(int DK, int warps) {
  return 2 * (2 * kChunk * (DK + 8) + kChunk * (16 * warps + 8) + 2 * kTriangles) + 4 * kGates;
}

template <int DK>
__device__ inline PassStage pass_stage(unsigned char* shared, int index, int warps) {
  PassStage stage;
  stage.q = reinterpret_cast<act*>(shared + index * pass_stage_bytes(DK, warps));
  stage.k = stage.q + kChunk * (DK + 8);
  stage.values = stage.k + kChunk * (DK + 8);
  stage.squares = stage.values + kChunk * (16 * warps + 8);
  stage.gates = reinterpret_cast<float*>(stage.squares + 2 * kTriangles);
  return stage;
}

// A block of a pass: warps of one sequence and value head, a slice of dv.
struct PassBlock {
  int b, h, hk, warps, first_column;
};

// The block starts copying N and P, high and low: their 16x16 blocks on and below the diagonal, the only ones
// there are.
__device__ inline void copy_lower_blocks(act* to, const act* from) {
  for (int i = threadIdx.x; i < 4 * kChunk * kChunk / 8; i += blockDim.x) {
    const int tile = i / (kSquare / 8), row = i / (kChunk / 8) % kChunk, column = 8 * (i % (kChunk / 8));
    const int block_row = row / 16, block = tile < 2 ? block_of_n(block_row, 0) : block_of_p(block_row, 0);
    if (column / 16 <= block_row)
      copy_16_bytes(to + tile % 2 * kTriangles + block + row % 16 * kTrianglesStride + column, from + 8 * i,
                    true);
  }
}

// The block starts copying a chunk's inputs; values [B,T,..] with the given row stride, at the head's first
// column.
template <int DK>
__device__ inline void copy_chunk(const PassStage& stage, const PassBlock& block, const Sizes& size,
                                  int chunk, const act* qkv, const act* values, int64_t values_stride,
                                  const act* matrices, const float* gates) {
  const int64_t row = size.first_row(block.b, chunk), number = size.chunk_number(block.b, block.h, chunk);
  const act* inputs = qkv + row * size.channels;
  const int n = size.rows_in(chunk), columns = 16 * block.warps;
  copy_tile(stage.q, DK + 8, inputs + size.q_column(block.hk), size.channels, kChunk, size.dk, n, size.dk);
  copy_tile(stage.k, DK + 8, inputs + size.k_column(block.hk), size.channels, kChunk, size.dk, n, size.dk);
  copy_tile(stage.values, columns + 8, values + row * values_stride + block.first_column, values_stride,
            kChunk, columns, n, size.dv - block.first_column);
  copy_lower_blocks(stage.squares, matrices + number * 4 * kSquare);
  for (int i = threadIdx.x; i < kGates / 4; i += blockDim.x)
    copy_16_bytes(stage.gates + 4 * i, gates + number * kGates + 4 * i, true);
  copies_issued();
}

// c [16,64] += a b^T for 16 columns of dk; a as bf16 high + low, b: walk_columns at rows [64,dk] in shared
// memory
__device__ inline void add_times_rows(float (&c)[8][4], const uint32_t (&high)[4], const uint32_t (&low)[4],
                                      uint32_t address, int ld) {
  uint32_t b[4][4];
#pragma unroll
  for (int t = 0; t < 4; t++) ldmatrix(b[t], address + 2 * 16 * t * ld);
#pragma unroll
  for (int t = 0; t < 4; t++) mma_pair(c[2 * t], c[2 * t + 1], high, b[t]);
#pragma unroll
  for (int t = 0; t < 4; t++) mma_pair(c[2 * t], c[2 * t + 1], low, b[t]);
}

// Writes 32 columns of the warp's state, held as two A operands, to rows [16 of dv, dk] of `to`.
__device__ inline void store_32_of_state(act* to, int dk, int column, const uint32_t (&left)[4],
                                         const uint32_t (&right)[4]) {
  act* row = to + (threadIdx.x % 32) / 4 * dk + column;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t w[4] = {left[half], left[half + 2], right[half], right[half + 2]};
    store_32_columns(row + 8 * half * dk, w, dk - column);
  }
}

// Everything that reads the state [16 of dv, dk], in one walk over it, so that it is split once:
//   from_k [16,64] += state K^T      from_q [16,64] += state Q^T (kWithQ)
//   its bf16 parts written to high_to, low_to, rows [16 of dv, dk], where these are not null
template <int DK, bool kWithQ>
__device__ inline void read_state(float (&from_k)[8][4], float (&from_q)[8][4],
                                  const float (&state)[DK / 8][4], const act* k, const act* q, act* high_to,
                                  act* low_to, int dk) {
  const uint32_t k_columns = walk_columns(k, DK + 8), q_columns = walk_columns(q, DK + 8);
#pragma unroll
  for (int e = 0; e < DK / 32; e++) {
    uint32_t high[2][4], low[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = 2 * e + half;
      split(high[half], low[half], state[2 * at], state[2 * at + 1]);
      add_times_rows(from_k, high[half], low[half], k_columns + 2 * 16 * at, DK + 8);
      if (kWithQ) add_times_rows(from_q, high[half], low[half], q_columns + 2 * 16 * at, DK + 8);
    }
    if (high_to) store_32_of_state(high_to, dk, 32 * e, high[0], high[1]);
    if (low_to) store_32_of_state(low_to, dk, 32 * e, low[0], low[1]);
  }
}

// state [16,dk] += a [16, 16 tokens] rows [16 tokens, dk]; address: walk_rows at the first of the 16 rows
template <int DK>
__device__ inline void add_16_rows(float (&state)[DK / 8][4], const uint32_t (&high)[4],
                                   const uint32_t (&low)[4], uint32_t address) {
#pragma unroll
  for (int e = 0; e < DK / 16; e++) {
    uint32_t b[4];
    ldmatrix_transposed(b, address + 2 * 16 * e);
    mma_pair(state[2 * e], state[2 * e + 1], high, b);
    mma_pair(state[2 * e], state[2 * e + 1], low, b);
  }
}

enum Part { kHigh, kLow };

// Writes x [16 of dv, 64 tokens], its bf16 rounding or what that lost, to rows [tokens, 16] of `to`, the
// first n. `staging`: the warp's own 16 columns of a shared tile with row stride ld.
template <Part part>
__device__ inline void store_tokens(act* to, int64_t stride, int n, act* staging, int ld,
                                    const float (&x)[8][4]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < 8; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t word = pack(x[t][2 * half], x[t][2 * half + 1]);
      if (part == kLow) word = pack_low(x[t][2 * half], x[t][2 * half + 1], word);
      act* at = staging + (8 * t + lane / 4) * ld + 8 * half + 2 * (lane % 4);
      *reinterpret_cast<uint32_t*>(at) = transpose_8x8(word);
    }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 16 * i + lane / 2, column = 8 * (lane % 2);
    const uint4 word = *reinterpret_cast<const uint4*>(staging + row * ld + column);
    if (row < n) *reinterpret_cast<uint4*>(to + row * stride + column) = word;
  }
  __syncwarp();
}

__device__ inline PassBlock pass_block(const Sizes& size) {
  PassBlock block;
  block.b = blockIdx.z;
  block.h = blockIdx.y;
  block.hk = size.key_head(block.h);
  block.warps = blockDim.x / 32;
  block.first_column = blockIdx.x * 16 * block.warps;
  return block;
}

// What the backward needs from the forward: states at the chunks' starts [chunks,dv,dk], E [B,T,Hv,dv] high
// and low.
struct Saved {
  act *states, *e_high, *e_low;  // null: nothing is saved
};

// E = R - N (beta R), R = V - e^G (K S): in place from c = K S. All [16 of dv, 64 tokens]
__device__ inline void errors_of_chunk(float (&c)[8][4], const PassStage& stage, int ld, int warp) {
  const uint32_t v_columns = walk_columns(stage.values + 16 * warp, ld);
#pragma unroll
  for (int t = 0; t < 4; t++) {
    scale_tokens(c[2 * t], c[2 * t + 1], stage.gates + kFromStart * kChunk, 16 * t, -1.f);
    uint32_t v[4];
    ldmatrix_transposed(v, v_columns + 2 * 16 * t * ld);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 x = unpack(v[e]);
      float(&tile)[4] = c[2 * t + e / 2];
      tile[2 * (e % 2)] += x.x;
      tile[2 * (e % 2) + 1] += x.y;
    }
  }
  // The last 16 tokens first: a block of tokens is read before what comes earlier is taken off it.
  const uint32_t n_high = walk_columns(stage.squares, kTrianglesStride), n_low = n_high + 2 * kTriangles;
#pragma unroll
  for (int p = 3; p >= 0; p--) {
    uint32_t high[4], low[4];
    scaled_operand(high, low, c[2 * p], c[2 * p + 1], stage.gates + kBeta * kChunk, 16 * p, -1.f);
#pragma unroll
    for (int t = p; t < 4; t++) {
      uint32_t b_high[4], b_low[4];
      const uint32_t at = 2 * block_of_n(t, p);
      ldmatrix(b_high, n_high + at);
      ldmatrix(b_low, n_low + at);
      mma_pair_split(c[2 * t], c[2 * t + 1], high, low, b_high, b_low);
    }
  }
}

// out [16 of dv, 64 tokens] += (beta E) P^T
__device__ inline void add_within_chunk(float (&out)[8][4], const float (&E)[8][4], const PassStage& stage) {
  const uint32_t p_high = walk_columns(stage.squares, kTrianglesStride), p_low = p_high + 2 * kTriangles;
#pragma unroll
  for (int p = 0; p < 4; p++) {
    uint32_t high[4], low[4];
    scaled_operand(high, low, E[2 * p], E[2 * p + 1], stage.gates + kBeta * kChunk, 16 * p, 1.f);
#pragma unroll
    for (int t = p; t < 4; t++) {
      uint32_t b_high[4], b_low[4];
      const uint32_t at = 2 * block_of_p(t, p);
      ldmatrix(b_high, p_high + at);
      ldmatrix(b_low, p_low + at);
      mma_pair_split(out[2 * t], out[2 * t + 1], high, low, b_high, b_low);
    }
  }
}

template <int DK>
__device__ inline void decay_state(float (&state)[DK / 8][4], float decay) {
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) state[t][e] *= decay;
}

// One block: a sequence, a value head, a slice of dv; chunk after chunk, the next one's inputs arriving
// meanwhile.
//   E = R - N (beta R), R = V - e^G K S            (E_i = v_i - S~_i^T k_i, the error that token i writes)
//   O = s e^G Q S + P (beta E)                     S <- e^{G_C} S + K^T (e^{G_C - G} beta E)
// Writes o and what Saved names.
//
// Floor at B=32, T=1024, H=6, dk=128, dv=256: reads q, k, v, N, P 0.27 GB, writes o, states, E 0.50 GB: 0.183
// ms at the copy rate; 52 GFLOP, each product counted once (101 done: split operands). Reached on
// an H200: 0.449 ms, 41%.
template <int DK>
__global__ void __launch_bounds__(32 * kMaxPassWarps, 1)
    forward_pass_kernel(act* o, Saved saved, const act* qkv, const act* matrices, const float* gates,
                        Sizes size, float s) {
  extern __shared__ __align__(16) unsigned char shared[];
  const PassBlock block = pass_block(size);
  const int warp = threadIdx.x / 32, ld = 16 * block.warps + 8, column = block.first_column + 16 * warp;
  const bool active = column < size.dv;
  const act* values = qkv + size.v_column(block.h);
  clear_shared(shared, 2 * pass_stage_bytes(DK, block.warps));
  __syncthreads();
  copy_chunk<DK>(pass_stage<DK>(shared, 0, block.warps), block, size, 0, qkv, values, size.channels, matrices,
                 gates);

  float state[DK / 8][4] = {};
  for (int chunk = 0; chunk < size.chunks; chunk++) {
    copies_arrived();
    __syncthreads();
    if (chunk + 1 < size.chunks)
      copy_chunk<DK>(pass_stage<DK>(shared, (chunk + 1) & 1, block.warps), block, size, chunk + 1, qkv,
                     values, size.channels, matrices, gates);
    if (!active) continue;
    const PassStage stage = pass_stage<DK>(shared, chunk & 1, block.warps);
    const int64_t number = size.chunk_number(block.b, block.h, chunk), row = size.first_row(block.b, chunk);
    const int64_t stride = int64_t(size.heads_v) * size.dv, out = row * stride + block.h * size.dv + column;
    const int n = size.rows_in(chunk);
    act* staging = stage.values + 16 * warp;

    float E[8][4] = {}, O[8][4] = {};
    act* state_to = saved.states ? saved.states + (number * size.dv + column) * size.dk : nullptr;
    read_state<DK, true>(E, O, state, stage.k, stage.q, state_to, nullptr, size.dk);
    errors_of_chunk(E, stage, ld, warp);
    if (saved.states) {
      store_tokens<kHigh>(saved.e_high + out, stride, n, staging, ld, E);
      store_tokens<kLow>(saved.e_low + out, stride, n, staging, ld, E);
    }
#pragma unroll
    for (int t = 0; t < 4; t++)
      scale_tokens(O[2 * t], O[2 * t + 1], stage.gates + kFromStart * kChunk, 16 * t, s);
    add_within_chunk(O, E, stage);
    store_tokens<kHigh>(o + out, stride, n, staging, ld, O);

    decay_state<DK>(state, stage.gates[kFromStart * kChunk + kChunk - 1]);
    const uint32_t k_rows = walk_rows(stage.k, DK + 8);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      uint32_t high[4], low[4];
      scale_tokens(E[2 * p], E[2 * p + 1], stage.gates + kBeta * kChunk, 16 * p, 1.f);
      scaled_operand(high, low, E[2 * p], E[2 * p + 1], stage.gates + kToEnd * kChunk, 16 * p, 1.f);
      add_16_rows<DK>(state, high, low, k_rows + 2 * 16 * p * (DK + 8));
    }
  }
}

// What the backward pass leaves for gradients_kernel: dS at the chunks' ends [chunks,dv,dk], X [B,T,Hv,dv].
struct Adjoints {
  act *ds_high, *ds_low, *x_high, *x_low;
};

// x [16 of dv, 64 tokens] += do^T P for the 16 rows of P from 16 p on; d_o those tokens' A operand
__device__ inline void add_within_chunk_backward(float (&x)[8][4], const uint32_t (&d_o)[4],
                                                 const PassStage& stage, int p) {
  const uint32_t p_high = walk_rows(stage.squares, kTrianglesStride), p_low = p_high + 2 * kTriangles;
#pragma unroll
  for (int t = 0; t < 4; t++) {
    if (t > p) continue;
    uint32_t b_high[4], b_low[4];
    const uint32_t at = 2 * block_of_p(p, t);
    ldmatrix_transposed(b_high, p_high + at);
    ldmatrix_transposed(b_low, p_low + at);
    mma_pair(x[2 * t], x[2 * t + 1], d_o, b_high);
    mma_pair(x[2 * t], x[2 * t + 1], d_o, b_low);
  }
}

// X = dVn - N^T (beta dVn), in place. The first 16 tokens first.
__device__ inline void solve_backward(float (&x)[8][4], const PassStage& stage) {
  const uint32_t n_high = walk_rows(stage.squares, kTrianglesStride), n_low = n_high + 2 * kTriangles;
#pragma unroll
  for (int p = 0; p < 4; p++) {
    uint32_t high[4], low[4];
    scaled_operand(high, low, x[2 * p], x[2 * p + 1], stage.gates + kBeta * kChunk, 16 * p, -1.f);
#pragma unroll
    for (int t = 0; t <= p; t++) {
      uint32_t b_high[4], b_low[4];
      const uint32_t at = 2 * block_of_n(p, t);
      ldmatrix_transposed(b_high, n_high + at);
      ldmatrix_transposed(b_low, n_low + at);
      mma_pair_split(x[2 * t], x[2 * t + 1], high, low, b_high, b_low);
    }
  }
}

// s e^G do for 16 tokens, as bf16 high + low
__device__ inline void scaled_output_gradient(uint32_t (&high)[4], uint32_t (&low)[4],
                                              const uint32_t (&d_o)[4], const float* from_start, int token,
                                              float s) {
  float x[2][4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const float2 y = unpack(d_o[e]);
    x[e / 2][2 * (e % 2)] = y.x;
    x[e / 2][2 * (e % 2) + 1] = y.y;
  }
  scaled_operand(high, low, x[0], x[1], from_start, token, s);
}

// One block: a sequence, a value head, a slice of dv; from the last chunk to the first.
//   dVn = P^T dO + e^{G_C - G} K dS      X = dVn - N^T (beta dVn)      dV = beta X       (P contains s)
//   dS <- e^{G_C} dS + Q^T (s e^G dO) - K^T (beta e^G X)
// Writes dv into dqkv and, for gradients_kernel, X and each chunk's dS before the update.
//
// Floor at B=32, T=1024, H=6, dk=128, dv=256: reads q, k, do, N, P 0.27 GB, writes dv, X, dS 0.70 GB: 0.230
// ms at the copy rate; 52 GFLOP counted once (97 done). Reached on an H200: 0.520 ms, 44%.
template <int DK>
__global__ void __launch_bounds__(32 * kMaxPassWarps, 1)
    backward_pass_kernel(act* dqkv, Adjoints adjoints, const act* d_o, const act* qkv, const act* matrices,
                         const float* gates, Sizes size, float s) {
  extern __shared__ __align__(16) unsigned char shared[];
  const PassBlock block = pass_block(size);
  const int warp = threadIdx.x / 32, ld = 16 * block.warps + 8, column = block.first_column + 16 * warp;
  const bool active = column < size.dv;
  const int64_t stride = int64_t(size.heads_v) * size.dv;
  const act* values = d_o + block.h * size.dv;
  clear_shared(shared, 2 * pass_stage_bytes(DK, block.warps));
  __syncthreads();
  copy_chunk<DK>(pass_stage<DK>(shared, (size.chunks - 1) & 1, block.warps), block, size, size.chunks - 1,
                 qkv, values, stride, matrices, gates);

  float state[DK / 8][4] = {};  // dS
  for (int chunk = size.chunks - 1; chunk >= 0; chunk--) {
    copies_arrived();
    __syncthreads();
    if (chunk > 0)
      copy_chunk<DK>(pass_stage<DK>(shared, (chunk - 1) & 1, block.warps), block, size, chunk - 1, qkv,
                     values, stride, matrices, gates);
    if (!active) continue;
    const PassStage stage = pass_stage<DK>(shared, chunk & 1, block.warps);
    const int64_t number = size.chunk_number(block.b, block.h, chunk), row = size.first_row(block.b, chunk);
    const int64_t out = row * stride + block.h * size.dv + column;
    const int n = size.rows_in(chunk);
    act* staging = stage.values + 16 * warp;
    const float* from_start = stage.gates + kFromStart * kChunk;

    const int64_t state_at = (number * size.dv + column) * size.dk;
    float X[8][4] = {};
    read_state<DK, false>(X, X, state, stage.k, stage.q, adjoints.ds_high + state_at,
                          adjoints.ds_low + state_at, size.dk);
#pragma unroll
    for (int t = 0; t < 4; t++)
      scale_tokens(X[2 * t], X[2 * t + 1], stage.gates + kToEnd * kChunk, 16 * t, 1.f);
    decay_state<DK>(state, from_start[kChunk - 1]);
    const uint32_t do_columns = walk_columns(staging, ld), q_rows = walk_rows(stage.q, DK + 8);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      uint32_t out_gradient[4], high[4], low[4];
      ldmatrix_transposed(out_gradient, do_columns + 2 * 16 * p * ld);
      add_within_chunk_backward(X, out_gradient, stage, p);
      scaled_output_gradient(high, low, out_gradient, from_start, 16 * p, s);
      add_16_rows<DK>(state, high, low, q_rows + 2 * 16 * p * (DK + 8));
    }
    solve_backward(X, stage);
    store_tokens<kHigh>(adjoints.x_high + out, stride, n, staging, ld, X);
    store_tokens<kLow>(adjoints.x_low + out, stride, n, staging, ld, X);
#pragma unroll
    for (int t = 0; t < 4; t++)
      scale_tokens(X[2 * t], X[2 * t + 1], stage.gates + kBeta * kChunk, 16 * t, 1.f);
    store_tokens<kHigh>(dqkv + row * size.channels + size.v_column(block.h) + column, size.channels, n,
                        staging, ld, X);

    const uint32_t k_rows = walk_rows(stage.k, DK + 8);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      uint32_t high[4], low[4];
      scaled_operand(high, low, X[2 * p], X[2 * p + 1], from_start, 16 * p, -1.f);
      add_16_rows<DK>(state, high, low, k_rows + 2 * 16 * p * (DK + 8));
    }
  }
}

}  // namespace delta_rule
}  // namespace gdn
