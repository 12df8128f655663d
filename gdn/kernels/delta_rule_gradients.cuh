// The gated delta rule, last kernel of the backward: the gradients of q, k, beta and g of a chunk, once the
// passes have left the state at its start (S0), the gradient of the state at its end (dS), E and X.
#pragma once

#include "delta_rule_passes.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kGradientWarps = 8, kGradientThreads = 32 * kGradientWarps;
constexpr int kStep = 32;                // columns of dv a step takes
constexpr int kTokenStride = kStep + 8;  // row strides in shared memory
constexpr int kGradientTiles = 5;        // do, E high, E low, X high, X low

// Shared memory: two stages of a step's operands (afterwards the four [64,64] matrices), q, k, gates, small
// sums, and where value heads share a key head the running sums of dq and dk.
struct GradientStage {
  act* tokens;  // [5][64, kTokenStride]
  act* states;  // S0, dS high, dS low: [3][kStep, PW + 8]
};

__host__ __device__ constexpr int gradient_stage_bytes(int PW) {
  return 2 * (kGradientTiles * kChunk * kTokenStride + 3 * kStep * (PW + 8));
}
__host__ __device__ constexpr int gradient_stages_bytes(int PW) {
  const int squares = 4 * 2 * kChunk * kSquareStride, stages = 2 * gradient_stage_bytes(PW);
  return stages > squares ? stages : squares;
}
__host__ __device__ constexpr int key_stride(int dk, int PW) { return (dk + PW - 1) / PW * PW + 8; }
// Floats of SmallSums: rows 2, columns 4, reads 2, writes 2 times 64 tokens, and <S0,dS> of the warps.
constexpr int kSmallSums = 12 * kChunk;
__host__ __device__ constexpr int gradient_shared_bytes(int dk, int PW, bool grouped) {
  return gradient_stages_bytes(PW) + 2 * 2 * kChunk * key_stride(dk, PW) + 4 * (kGates + kSmallSums) +
         (grouped ? 2 * kChunk * PW * 4 : 0);
}

struct GradientInputs {
  const act *qkv, *d_o;
  Saved saved;
  Adjoints adjoints;
  const float* gates;
};

template <int PW>
__device__ inline GradientStage gradient_stage(unsigned char* shared, int index) {
  GradientStage stage;
  stage.tokens = reinterpret_cast<act*>(shared + index * gradient_stage_bytes(PW));
  stage.states = stage.tokens + kGradientTiles * kChunk * kTokenStride;
  return stage;
}

// The block starts copying columns [e, e + kStep) of dv, and of dk those from `column` on.
template <int PW>
__device__ inline void copy_step(const GradientStage& stage, const GradientInputs& in, const Sizes& size,
                                 int b, int h, int chunk, int e, int column) {
  const int64_t number = size.chunk_number(b, h, chunk), stride = int64_t(size.heads_v) * size.dv;
  const int64_t at = size.first_row(b, chunk) * stride + h * size.dv + e;
  const int64_t state_at = (number * size.dv + e) * size.dk + column;
  const int n = size.rows_in(chunk);
  const act* tokens[kGradientTiles] = {in.d_o, in.saved.e_high, in.saved.e_low, in.adjoints.x_high,
                                       in.adjoints.x_low};
  const act* states[3] = {in.saved.states, in.adjoints.ds_high, in.adjoints.ds_low};
#pragma unroll
  for (int i = 0; i < kGradientTiles; i++)
    copy_tile(stage.tokens + i * kChunk * kTokenStride, kTokenStride, tokens[i] + at, stride, kChunk, kStep,
              n, size.dv - e);
#pragma unroll
  for (int i = 0; i < 3; i++)
    copy_tile(stage.states + i * kStep * (PW + 8), PW + 8, states[i] + state_at, size.dk, kStep, PW,
              size.dv - e, size.dk - column);
  copies_issued();
}

// A warp's accumulators: 16 tokens (rows) against 32 tokens, or against PW/2 columns of dk.
template <int PW>
struct GradientSums {
  float d_oE[4][4], XE[4][4];                               // dO E^T, X E^T
  float d_oS[PW / 16][4], XS[PW / 16][4], EdS[PW / 16][4];  // dO S0^T, X S0^T, E dS^T
};

// One step's products, k = kStep columns of dv.
template <int PW>
__device__ inline void add_step(GradientSums<PW>& sums, const GradientStage& stage, int strip, int half) {
  const act* rows = stage.tokens + 16 * strip * kTokenStride;
  constexpr uint32_t kTile = 2 * kChunk * kTokenStride, kState = 2 * kStep * (PW + 8);
  const uint32_t a = walk_rows(rows, kTokenStride);
  const uint32_t b =
      walk_columns(stage.tokens + kChunk * kTokenStride + 32 * half * kTokenStride, kTokenStride);
  const uint32_t states = walk_rows(stage.states + half * (PW / 2), PW + 8);
#pragma unroll
  for (int e = 0; e < kStep; e += 16) {
    uint32_t d_o[4], e_high[4], e_low[4], x_high[4], x_low[4];
    ldmatrix(d_o, a + 2 * e);
    ldmatrix(e_high, a + kTile + 2 * e);
    ldmatrix(e_low, a + 2 * kTile + 2 * e);
    ldmatrix(x_high, a + 3 * kTile + 2 * e);
    ldmatrix(x_low, a + 4 * kTile + 2 * e);
    if (32 * half < 16 * (strip + 1)) {  // else all above the diagonal
#pragma unroll
      for (int t = 0; t < 2; t++) {
        uint32_t b_high[4], b_low[4];
        ldmatrix(b_high, b + 2 * (16 * t * kTokenStride + e));
        ldmatrix(b_low, b + kTile + 2 * (16 * t * kTokenStride + e));
        mma_pair(sums.d_oE[2 * t], sums.d_oE[2 * t + 1], d_o, b_high);
        mma_pair(sums.d_oE[2 * t], sums.d_oE[2 * t + 1], d_o, b_low);
        mma_pair_split(sums.XE[2 * t], sums.XE[2 * t + 1], x_high, x_low, b_high, b_low);
      }
    }
#pragma unroll
    for (int t = 0; t < PW / 32; t++) {
      uint32_t s[4], ds_high[4], ds_low[4];
      const uint32_t at = states + 2 * (e * (PW + 8) + 16 * t);
      ldmatrix_transposed(s, at);
      ldmatrix_transposed(ds_high, at + kState);
      ldmatrix_transposed(ds_low, at + 2 * kState);
      mma_pair(sums.d_oS[2 * t], sums.d_oS[2 * t + 1], d_o, s);
      mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], x_high, s);
      mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], x_low, s);
      mma_pair_split(sums.EdS[2 * t], sums.EdS[2 * t + 1], e_high, e_low, ds_high, ds_low);
    }
  }
}

// This thread's share of <S0, dS> over the step's tile.
template <int PW>
__device__ inline float state_product(const GradientStage& stage) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < kStep * PW / 2; i += kGradientThreads) {
    const act* at = stage.states + i / (PW / 2) * (PW + 8) + 2 * (i % (PW / 2));
    const auto word = [&](int tile) {
      return unpack(*reinterpret_cast<const uint32_t*>(at + tile * kStep * (PW + 8)));
    };
    const float2 s = word(0), high = word(1), low = word(2);
    sum += s.x * (high.x + low.x);
    sum += s.y * (high.y + low.y);
  }
  return sum;
}

// Sums of one value head that become dg, in shared memory; each entry has one writer.
struct SmallSums {
  float* rows;     // sums over j of M_ij (gradients_within_chunk), [2][64] by half
  float* columns;  // sums over i, [4][64] by strip
  float* reads;    // q . dq + k . dk where S0 is read, [2][64] by half
  float* writes;   // k . dk where it enters S_C, [2][64] by half
  float* states;   // <S0, dS> [warps]
};

__device__ inline SmallSums small_sums(float* at) {
  return {at, at + 2 * kChunk, at + 6 * kChunk, at + 8 * kChunk, at + 10 * kChunk};
}

__device__ inline float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float sum_of_column(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// From dO E^T and X E^T the gradients of q.k and k.k within the chunk, into `squares`: dqk high, low, dkk
// high, low [4][64, kSquareStride]; the row and column sums of M; dbeta_i = X_i . E_i (null: not wanted).
//   dqk_ij = s beta_j D_ij (dO_i . E_j), i >= j      dkk_ij = -beta_i beta_j D_ij (X_i . E_j), i > j
//   M_ij = dqk_ij (q_i . k_j) + dkk_ij (k_i . k_j)
__device__ inline void gradients_within_chunk(act* squares, const SmallSums& small, float* dbeta,
                                              int dbeta_stride, int n, const float (&d_oE)[4][4],
                                              const float (&XE)[4][4], const act* q, const act* k, int ld,
                                              int dk, const float* gates, float s, int strip, int half) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
  float qk[4][4] = {}, kk[4][4] = {};
  if (32 * half < 16 * (strip + 1)) {
    const uint32_t q_rows = walk_rows(q + 16 * strip * ld, ld), k_rows = walk_rows(k + 16 * strip * ld, ld);
    const uint32_t k_columns = walk_columns(k + 32 * half * ld, ld);
    for (int e = 0; e < dk; e += 16) {
      uint32_t a_q[4], a_k[4], b[4];
      ldmatrix(a_q, q_rows + 2 * e);
      ldmatrix(a_k, k_rows + 2 * e);
#pragma unroll
      for (int t = 0; t < 2; t++) {
        ldmatrix(b, k_columns + 2 * (16 * t * ld + e));
        mma_pair(qk[2 * t], qk[2 * t + 1], a_q, b);
        mma_pair(kk[2 * t], kk[2 * t + 1], a_k, b);
      }
    }
  }
  const float *beta = gates + kBeta * kChunk, *G = gates + kLogDecay * kChunk;
  float row_sum[2] = {};
#pragma unroll
  for (int t = 0; t < 4; t++) {
    float column_sum[2] = {}, dqk[4], dkk[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int i = 16 * strip + g + 8 * (e / 2), j = 32 * half + 8 * t + c + e % 2;
      const float decay = i >= j ? expf(fminf(G[i] - G[j], 0.f)) : 0.f;
      dqk[e] = i >= j ? s * beta[j] * decay * d_oE[t][e] : 0.f;
      dkk[e] = i > j ? -beta[i] * beta[j] * decay * XE[t][e] : 0.f;
      if (i == j && i < n && dbeta) dbeta[int64_t(i) * dbeta_stride] = XE[t][e];
      const float M = dqk[e] * qk[t][e] + dkk[e] * kk[t][e];
      row_sum[e / 2] += M;
      column_sum[e % 2] += M;
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float sum = sum_of_column(column_sum[e]);
      if (g == 0) small.columns[strip * kChunk + 32 * half + 8 * t + c + e] = sum;
      uint32_t high, low;
      uint32_t* at = reinterpret_cast<uint32_t*>(squares + (16 * strip + g + 8 * e) * kSquareStride +
                                                 32 * half + 8 * t + c);
      constexpr int kWords = kChunk * kSquareStride / 2;
      split(high, low, dqk[2 * e], dqk[2 * e + 1]);
      at[0] = high;
      at[kWords] = low;
      split(high, low, dkk[2 * e], dkk[2 * e + 1]);
      at[2 * kWords] = high;
      at[3 * kWords] = low;
    }
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float sum = sum_of_quad(row_sum[e]);
    if (lane % 4 == 0) small.rows[half * kChunk + 16 * strip + g + 8 * e] = sum;
  }
}

// Scales the products with the states by their gates: dq into d_oS, dk into XS; and their dots with q and k.
// q, k: at the pass's first column.
template <int PW>
__device__ inline void gradients_through_states(GradientSums<PW>& sums, const SmallSums& small, const act* q,
                                                const act* k, int ld, const float* gates, float s, int strip,
                                                int half) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 2; e++) {  // row g, row g + 8
    const int i = 16 * strip + lane / 4 + 8 * e;
    const float beta = gates[kBeta * kChunk + i], from_start = gates[kFromStart * kChunk + i];
    const float to_end = gates[kToEnd * kChunk + i];
    float reads = 0.f, writes = 0.f;
#pragma unroll
    for (int t = 0; t < PW / 16; t++) {
      const int at = i * ld + half * (PW / 2) + 8 * t + 2 * (lane % 4);
      const float2 q_i = unpack(*reinterpret_cast<const uint32_t*>(q + at));
      const float2 k_i = unpack(*reinterpret_cast<const uint32_t*>(k + at));
      float *dq = &sums.d_oS[t][2 * e], *dk = &sums.XS[t][2 * e];
      const float end_x = beta * to_end * sums.EdS[t][2 * e], end_y = beta * to_end * sums.EdS[t][2 * e + 1];
      dq[0] *= s * from_start;
      dq[1] *= s * from_start;
      dk[0] *= -beta * from_start;
      dk[1] *= -beta * from_start;
      reads += q_i.x * dq[0] + q_i.y * dq[1] + k_i.x * dk[0] + k_i.y * dk[1];
      writes += k_i.x * end_x + k_i.y * end_y;
      dk[0] += end_x;
      dk[1] += end_y;
    }
    reads = sum_of_quad(reads);
    writes = sum_of_quad(writes);
    if (lane % 4 == 0) {
      small.reads[half * kChunk + i] = reads;
      small.writes[half * kChunk + i] = writes;
    }
  }
}

// dq += dqk K      dk += dqk^T Q + (dkk + dkk^T) K;  q, k at the pass's first column
template <int PW>
__device__ inline void add_products_within_chunk(GradientSums<PW>& sums, const act* squares, const act* q,
                                                 const act* k, int ld, int strip, int half) {
  constexpr uint32_t kSquareBytes = 2 * kChunk * kSquareStride;
  const uint32_t rows = walk_rows(squares + 16 * strip * kSquareStride, kSquareStride);
  const uint32_t columns = walk_columns(squares + 16 * strip, kSquareStride);
  const uint32_t q_rows = walk_rows(q + half * (PW / 2), ld), k_rows = walk_rows(k + half * (PW / 2), ld);
  for (int p = 0; p < 4; p++) {  // 16 tokens to sum over
    const uint32_t from_rows = rows + 2 * 16 * p, from_columns = columns + 2 * 16 * p * kSquareStride;
    if (p <= strip) {
      uint32_t dqk_high[4], dqk_low[4], dkk_high[4], dkk_low[4], b[4];
      ldmatrix(dqk_high, from_rows);
      ldmatrix(dqk_low, from_rows + kSquareBytes);
      ldmatrix(dkk_high, from_rows + 2 * kSquareBytes);
      ldmatrix(dkk_low, from_rows + 3 * kSquareBytes);
#pragma unroll
      for (int t = 0; t < PW / 32; t++) {
        ldmatrix_transposed(b, k_rows + 2 * (16 * p * ld + 16 * t));
        mma_pair(sums.d_oS[2 * t], sums.d_oS[2 * t + 1], dqk_high, b);
        mma_pair(sums.d_oS[2 * t], sums.d_oS[2 * t + 1], dqk_low, b);
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dkk_high, b);
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dkk_low, b);
      }
    }
    if (p >= strip) {
      uint32_t dqk_high[4], dqk_low[4], dkk_high[4], dkk_low[4], b[4];
      ldmatrix_transposed(dqk_high, from_columns);
      ldmatrix_transposed(dqk_low, from_columns + kSquareBytes);
      ldmatrix_transposed(dkk_high, from_columns + 2 * kSquareBytes);
      ldmatrix_transposed(dkk_low, from_columns + 3 * kSquareBytes);
#pragma unroll
      for (int t = 0; t < PW / 32; t++) {
        ldmatrix_transposed(b, q_rows + 2 * (16 * p * ld + 16 * t));
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dqk_high, b);
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dqk_low, b);
        ldmatrix_transposed(b, k_rows + 2 * (16 * p * ld + 16 * t));
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dkk_high, b);
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dkk_low, b);
      }
    }
  }
}

// dg_t = sum_{i >= t} dG_i, dG_i = rows_i - columns_i + reads_i - writes_i, and at the chunk's end all writes
// and e^{G_C} <S0, dS>. One warp, two tokens a lane; `add`: onto an earlier pass's columns of dk.
__device__ inline void finish_dg(float* dg, int stride, int n, const SmallSums& small, float end_decay,
                                 bool add) {
  const int lane = threadIdx.x % 32;
  float dG[2], writes = 0.f;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int i = 2 * lane + e;
    const float write = small.writes[i] + small.writes[kChunk + i];
    dG[e] = small.rows[i] + small.rows[kChunk + i] + small.reads[i] + small.reads[kChunk + i] - write;
    for (int strip = 0; strip < 4; strip++) dG[e] -= small.columns[strip * kChunk + i];
    if (add) dG[e] = small.reads[i] + small.reads[kChunk + i] - write;
    writes += write;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) writes += __shfl_xor_sync(~0u, writes, step);
  float states = 0.f;
  for (int warp = 0; warp < kGradientWarps; warp++) states += small.states[warp];
  if (lane == 31) dG[1] += writes + end_decay * states;
  float sum = dG[0] + dG[1];  // becomes the sum from this lane's tokens to the chunk's end
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float after = __shfl_down_sync(~0u, sum, step);
    if (lane + step < 32) sum += after;
  }
  const float result[2] = {sum, sum - dG[0]};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int i = 2 * lane + e;
    if (i < n) dg[int64_t(i) * stride] = result[e] + (add ? dg[int64_t(i) * stride] : 0.f);
  }
}

// running [tiles][4][threads] = or += x, and x becomes the sum
template <int Tiles>
__device__ inline void accumulate(float* running, float (&x)[Tiles][4], bool first) {
#pragma unroll
  for (int t = 0; t < Tiles; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float* at = running + (4 * t + e) * kGradientThreads + threadIdx.x;
      if (!first) x[t][e] += *at;
      *at = x[t][e];
    }
}

// Writes a warp's rows [16 tokens, 8 Tiles] to `to`, row g at the strip's first token.
template <int Tiles>
__device__ inline void store_rows(act* to, int64_t stride, int valid_rows, int valid_columns,
                                  const float (&x)[Tiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < Tiles; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = lane / 4 + 8 * e, column = 8 * t + 2 * (lane % 4);
      if (row < valid_rows && column < valid_columns)
        *reinterpret_cast<uint32_t*>(to + row * stride + column) = pack(x[t][2 * e], x[t][2 * e + 1]);
    }
}

// One block: a chunk, a key head, a sequence; the value heads that share the key head in order. dk in passes
// of PW columns. With X, E, S0, dS as the passes left them:
//   dqk = s (dO E^T) diag(beta) . D      dkk = -diag(beta) (X E^T) diag(beta) . D, strictly lower
//   dq = s e^G dO S0^T + dqk K
//   dk = -beta e^G X S0^T + e^{G_C - G} beta E dS^T + dqk^T Q + (dkk + dkk^T) K
//   dbeta_i = X_i . E_i                                   dg: finish_dg
//
// Floor at B=32, T=1024, H=6, dk=128, dv=256: reads q, k, do, E, X 0.60 GB, S0, dS 0.60 GB, writes 0.10 GB:
// 0.309 ms at the copy rate; 71 GFLOP counted once (128 done). Reached on an H200: 0.662 ms, 47% of the copy
// rate.
template <int PW>
__global__ void __launch_bounds__(kGradientThreads, 1)
    gradients_kernel(act* dqkv, float* dg, float* dbeta, GradientInputs in, Sizes size, float s) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int chunk = blockIdx.x, hk = blockIdx.y, b = blockIdx.z, group = size.heads_v / size.heads_k;
  const int warp = threadIdx.x / 32, strip = warp % 4, half = warp / 4, ld = key_stride(size.dk, PW);
  const int n = size.rows_in(chunk);
  const int64_t row = size.first_row(b, chunk);
  act *q = reinterpret_cast<act*>(shared + gradient_stages_bytes(PW)), *k = q + kChunk * ld;
  float* gates = reinterpret_cast<float*>(k + kChunk * ld);
  const SmallSums small = small_sums(gates + kGates);
  float* running = gates + kGates + kSmallSums;  // dq, then dk
  act* squares = reinterpret_cast<act*>(shared);
  const act* inputs = in.qkv + row * size.channels;
  copy_tile(q, ld, inputs + size.q_column(hk), size.channels, kChunk, ld, n, size.dk);
  copy_tile(k, ld, inputs + size.k_column(hk), size.channels, kChunk, ld, n, size.dk);

  for (int column = 0; column < size.dk; column += PW)
    for (int h = hk * group; h < (hk + 1) * group; h++) {
      const int64_t number = size.chunk_number(b, h, chunk), head_row = row * size.heads_v + h;
      for (int i = threadIdx.x; i < kGates / 4; i += kGradientThreads)
        copy_16_bytes(gates + 4 * i, in.gates + number * kGates + 4 * i, true);
      copy_step<PW>(gradient_stage<PW>(shared, 0), in, size, b, h, chunk, 0, column);
      GradientSums<PW> sums = {};
      float states = 0.f;
      for (int e = 0, stage = 0; e < size.dv; e += kStep, stage ^= 1) {
        copies_arrived();
        __syncthreads();
        if (e + kStep < size.dv)
          copy_step<PW>(gradient_stage<PW>(shared, stage ^ 1), in, size, b, h, chunk, e + kStep, column);
        add_step<PW>(sums, gradient_stage<PW>(shared, stage), strip, half);
        states += state_product<PW>(gradient_stage<PW>(shared, stage));
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) states += __shfl_xor_sync(~0u, states, step);
      if (threadIdx.x % 32 == 0) small.states[warp] = states;
      __syncthreads();  // the stages become the squares
      gradients_within_chunk(squares, small, column == 0 ? dbeta + head_row : nullptr, size.heads_v, n,
                             sums.d_oE, sums.XE, q, k, ld, size.dk, gates, s, strip, half);
      gradients_through_states<PW>(sums, small, q + column, k + column, ld, gates, s, strip, half);
      __syncthreads();
      add_products_within_chunk<PW>(sums, squares, q + column, k + column, ld, strip, half);
      if (group > 1) {
        accumulate(running, sums.d_oS, h == hk * group);
        accumulate(running + kChunk * PW, sums.XS, h == hk * group);
      }
      if (h == (hk + 1) * group - 1) {
        const int first = column + half * (PW / 2);
        act* out = dqkv + (row + 16 * strip) * size.channels + first;
        store_rows(out + size.q_column(hk), size.channels, n - 16 * strip, size.dk - first, sums.d_oS);
        store_rows(out + size.k_column(hk), size.channels, n - 16 * strip, size.dk - first, sums.XS);
      }
      if (warp == 0)
        finish_dg(dg + head_row, size.heads_v, n, small, gates[kFromStart * kChunk + kChunk - 1], column > 0);
      __syncthreads();  // before the next head's copies
    }
}

}  // namespace delta_rule
}  // namespace gdn
