// The gated delta rule, last kernel of the backward: the gradients of q, k, beta and g of a chunk, once the
// passes have left the state at its start (S0), the gradient of the state at its end (dS), E and X.
#pragma once

#include "delta_rule_passes.cuh"

namespace gdn {
namespace delta_rule {

// Warps: four strips of 16 tokens times so many parts of the columns; as few as registers allow.
__host__ __device__ constexpr int gradient_parts(int PW) { return PW == 128 ? 4 : 2; }
__host__ __device__ constexpr int gradient_threads(int PW) { return 128 * gradient_parts(PW); }
// Blocks a multiprocessor has room for.
__host__ __device__ constexpr int gradient_blocks(int PW) { return PW <= 64 ? 2 : 1; }
constexpr int kMaxGradientParts = 4;
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
// Floats of SmallSums: rows, columns, reads, writes 4 times 64 tokens each, and <S0,dS> of the warps.
constexpr int kSmallSums = (3 * kMaxGradientParts + 4 + 1) * kChunk;
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

// A warp's accumulators: 16 tokens (rows) against kTokens tokens, or against kColumns columns of dk.
template <int PW>
struct GradientSums {
  static constexpr int kTokens = kChunk / gradient_parts(PW), kColumns = PW / gradient_parts(PW);
  static constexpr int kTokenTiles = kTokens / 8, kColumnTiles = kColumns / 8;
  float d_oE[kTokenTiles][4], XE[kTokenTiles][4];                          // dO E^T, X E^T
  float d_oS[kColumnTiles][4], XS[kColumnTiles][4], EdS[kColumnTiles][4];  // dO S0^T, X S0^T, E dS^T
};

// Sum of x (high + low) over a lane's share of a 16x16 block.
__device__ inline float dot_of_fragments(const uint32_t (&x)[4], const uint32_t (&high)[4],
                                         const uint32_t (&low)[4]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 a = unpack(x[i]), b = unpack(high[i]), c = unpack(low[i]);
    sum += a.x * (b.x + c.x);
    sum += a.y * (b.y + c.y);
  }
  return sum;
}

// One step's products, k = kStep columns of dv; and into states_dot this thread's share of <S0, dS>: of the
// blocks that all strips read, each takes some.
template <int PW>
__device__ inline void add_step(GradientSums<PW>& sums, float& states_dot, const GradientStage& stage,
                                int strip, int part) {
  using Sums = GradientSums<PW>;
  const act* rows = stage.tokens + 16 * strip * kTokenStride;
  constexpr uint32_t kTile = 2 * kChunk * kTokenStride, kState = 2 * kStep * (PW + 8);
  const uint32_t a = walk_rows(rows, kTokenStride);
  const uint32_t b =
      walk_columns(stage.tokens + kChunk * kTokenStride + Sums::kTokens * part * kTokenStride, kTokenStride);
  const uint32_t states = walk_rows(stage.states + part * Sums::kColumns, PW + 8);
#pragma unroll 1
  for (int e = 0; e < kStep; e += 16) {
    uint32_t d_o[4], high[4], low[4];  // of X, then of E
    ldmatrix(d_o, a + 2 * e);
    ldmatrix(high, a + 3 * kTile + 2 * e);
    ldmatrix(low, a + 4 * kTile + 2 * e);
    if (Sums::kTokens * part < 16 * (strip + 1)) {  // else all above the diagonal
#pragma unroll
      for (int t = 0; t < Sums::kTokens / 16; t++) {
        uint32_t b_high[4], b_low[4];
        ldmatrix(b_high, b + 2 * (16 * t * kTokenStride + e));
        ldmatrix(b_low, b + kTile + 2 * (16 * t * kTokenStride + e));
        mma_pair(sums.d_oE[2 * t], sums.d_oE[2 * t + 1], d_o, b_high);
        mma_pair_split(sums.XE[2 * t], sums.XE[2 * t + 1], high, low, b_high, b_low);
        mma_pair(sums.d_oE[2 * t], sums.d_oE[2 * t + 1], d_o, b_low);
      }
    }
#pragma unroll
    for (int t = 0; t < Sums::kColumns / 16; t++) {
      uint32_t s[4];
      ldmatrix_transposed(s, states + 2 * (e * (PW + 8) + 16 * t));
      mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], high, s);
      mma_pair(sums.d_oS[2 * t], sums.d_oS[2 * t + 1], d_o, s);
      mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], low, s);
    }
    ldmatrix(high, a + kTile + 2 * e);
    ldmatrix(low, a + 2 * kTile + 2 * e);
#pragma unroll
    for (int t = 0; t < Sums::kColumns / 16; t++) {
      uint32_t ds_high[4], ds_low[4];
      const uint32_t at = states + 2 * (e * (PW + 8) + 16 * t);
      ldmatrix_transposed(ds_high, at + kState);
      ldmatrix_transposed(ds_low, at + 2 * kState);
      mma_pair_split(sums.EdS[2 * t], sums.EdS[2 * t + 1], high, low, ds_high, ds_low);
      if ((2 * t + e / 16) % 4 == strip) {
        uint32_t s[4];
        ldmatrix_transposed(s, at);
        states_dot += dot_of_fragments(s, ds_high, ds_low);
      }
    }
  }
}

// Sums of one value head that become dg, in shared memory; each entry has one writer.
struct SmallSums {
  float* rows;     // sums over j of M_ij (gradients_within_chunk), [parts][64]
  float* columns;  // sums over i, [4][64] by strip
  float* reads;    // q . dq + k . dk where S0 is read, [parts][64]
  float* writes;   // k . dk where it enters S_C, [parts][64]
  float* states;   // <S0, dS> [warps]
};

__device__ inline SmallSums small_sums(float* at) {
  constexpr int kParts = kMaxGradientParts * kChunk, kStrips = 4 * kChunk;
  return {at, at + kParts, at + kParts + kStrips, at + 2 * kParts + kStrips, at + 3 * kParts + kStrips};
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
template <int PW>
__device__ inline void gradients_within_chunk(act* squares, const SmallSums& small, float* dbeta,
                                              int dbeta_stride, int n, const GradientSums<PW>& sums,
                                              const act* q, const act* k, int ld, int dk, const float* gates,
                                              float s, int strip, int part) {
  constexpr int kTokens = GradientSums<PW>::kTokens;
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
  const float *beta = gates + kBeta * kChunk, *G = gates + kLogDecay * kChunk;
  float row_sum[2] = {};
#pragma unroll
  for (int pair = 0; pair < kTokens / 16; pair++) {  // 16 columns
    float qk[2][4] = {}, kk[2][4] = {};
    const int first = kTokens * part + 16 * pair;
    if (first <= 16 * strip) {
      const uint32_t q_rows = walk_rows(q + 16 * strip * ld, ld), k_rows = walk_rows(k + 16 * strip * ld, ld);
      const uint32_t k_columns = walk_columns(k + first * ld, ld);
      for (int e = 0; e < dk; e += 16) {
        uint32_t a_q[4], a_k[4], b[4];
        ldmatrix(a_q, q_rows + 2 * e);
        ldmatrix(a_k, k_rows + 2 * e);
        ldmatrix(b, k_columns + 2 * e);
        mma_pair(qk[0], qk[1], a_q, b);
        mma_pair(kk[0], kk[1], a_k, b);
      }
    }
#pragma unroll
    for (int t = 0; t < 2; t++) {
      const float(&d_oE)[4] = sums.d_oE[2 * pair + t];
      const float(&XE)[4] = sums.XE[2 * pair + t];
      float column_sum[2] = {}, dqk[4], dkk[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = 16 * strip + g + 8 * (e / 2), j = first + 8 * t + c + e % 2;
        const float decay = i >= j ? expf(fminf(G[i] - G[j], 0.f)) : 0.f;
        dqk[e] = i >= j ? s * beta[j] * decay * d_oE[e] : 0.f;
        dkk[e] = i > j ? -beta[i] * beta[j] * decay * XE[e] : 0.f;
        if (i == j && i < n && dbeta) dbeta[int64_t(i) * dbeta_stride] = XE[e];
        const float M = dqk[e] * qk[t][e] + dkk[e] * kk[t][e];
        row_sum[e / 2] += M;
        column_sum[e % 2] += M;
      }
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float sum = sum_of_column(column_sum[e]);
        if (g == 0) small.columns[strip * kChunk + first + 8 * t + c + e] = sum;
        uint32_t high, low;
        uint32_t* at = reinterpret_cast<uint32_t*>(squares + (16 * strip + g + 8 * e) * kSquareStride +
                                                   first + 8 * t + c);
        constexpr int kWords = kChunk * kSquareStride / 2;
        split(high, low, dqk[2 * e], dqk[2 * e + 1]);
        at[0] = high;
        at[kWords] = low;
        split(high, low, dkk[2 * e], dkk[2 * e + 1]);
        at[2 * kWords] = high;
        at[3 * kWords] = low;
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float sum = sum_of_quad(row_sum[e]);
    if (lane % 4 == 0) small.rows[part * kChunk + 16 * strip + g + 8 * e] = sum;
  }
}

// Scales the products with the states by their gates: dq into d_oS, dk into XS; and their dots with q and k.
// q, k: at the pass's first column.
template <int PW>
__device__ inline void gradients_through_states(GradientSums<PW>& sums, const SmallSums& small, const act* q,
                                                const act* k, int ld, const float* gates, float s, int strip,
                                                int part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 2; e++) {  // row g, row g + 8
    const int i = 16 * strip + lane / 4 + 8 * e;
    const float beta = gates[kBeta * kChunk + i], from_start = gates[kFromStart * kChunk + i];
    const float to_end = gates[kToEnd * kChunk + i];
    float reads = 0.f, writes = 0.f;
#pragma unroll
    for (int t = 0; t < GradientSums<PW>::kColumnTiles; t++) {
      const int at = i * ld + part * GradientSums<PW>::kColumns + 8 * t + 2 * (lane % 4);
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
      small.reads[part * kChunk + i] = reads;
      small.writes[part * kChunk + i] = writes;
    }
  }
}

// dq += dqk K      dk += dqk^T Q + (dkk + dkk^T) K;  q, k at the pass's first column
template <int PW>
__device__ inline void add_products_within_chunk(GradientSums<PW>& sums, const act* squares, const act* q,
                                                 const act* k, int ld, int strip, int part) {
  constexpr uint32_t kSquareBytes = 2 * kChunk * kSquareStride;
  constexpr int kColumns = GradientSums<PW>::kColumns;
  const uint32_t rows = walk_rows(squares + 16 * strip * kSquareStride, kSquareStride);
  const uint32_t columns = walk_columns(squares + 16 * strip, kSquareStride);
  const uint32_t q_rows = walk_rows(q + part * kColumns, ld), k_rows = walk_rows(k + part * kColumns, ld);
  for (int p = 0; p < 4; p++) {  // 16 tokens to sum over
    const uint32_t from_rows = rows + 2 * 16 * p, from_columns = columns + 2 * 16 * p * kSquareStride;
    if (p <= strip) {
      uint32_t dqk_high[4], dqk_low[4], dkk_high[4], dkk_low[4], b[4];
      ldmatrix(dqk_high, from_rows);
      ldmatrix(dqk_low, from_rows + kSquareBytes);
      ldmatrix(dkk_high, from_rows + 2 * kSquareBytes);
      ldmatrix(dkk_low, from_rows + 3 * kSquareBytes);
#pragma unroll
      for (int t = 0; t < kColumns / 16; t++) {
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
      for (int t = 0; t < kColumns / 16; t++) {
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
template <int PW>
__device__ inline void finish_dg(float* dg, int stride, int n, const SmallSums& small, float end_decay,
                                 bool add) {
  const int lane = threadIdx.x % 32;
  float dG[2], writes = 0.f;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int i = 2 * lane + e;
    float row = 0.f, read = 0.f, write = 0.f;
    for (int part = 0; part < gradient_parts(PW); part++) {
      row += small.rows[part * kChunk + i];
      read += small.reads[part * kChunk + i];
      write += small.writes[part * kChunk + i];
    }
    for (int strip = 0; strip < 4; strip++) row -= small.columns[strip * kChunk + i];
    dG[e] = (add ? 0.f : row) + read - write;
    writes += write;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) writes += __shfl_xor_sync(~0u, writes, step);
  float states = 0.f;
  for (int warp = 0; warp < 4 * gradient_parts(PW); warp++) states += small.states[warp];
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
      float* at = running + (4 * t + e) * blockDim.x + threadIdx.x;
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
// 0.309 ms at the copy rate; 71 GFLOP counted once (125 done). Reached on an H200: 0.621 ms,
// 50%.
template <int PW>
__global__ void __launch_bounds__(gradient_threads(PW), gradient_blocks(PW))
    gradients_kernel(act* dqkv, float* dg, float* dbeta, GradientInputs in, Sizes size, float s) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int chunk = blockIdx.x, hk = blockIdx.y, b = blockIdx.z, group = size.heads_v / size.heads_k;
  const int warp = threadIdx.x / 32, part = warp / 4, ld = key_stride(size.dk, PW);
  const int strip = (warp + 3 * part) % 4;  // the four schedulers get strips of different lengths
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
      for (int i = threadIdx.x; i < kGates / 4; i += blockDim.x)
        copy_16_bytes(gates + 4 * i, in.gates + number * kGates + 4 * i, true);
      copy_step<PW>(gradient_stage<PW>(shared, 0), in, size, b, h, chunk, 0, column);
      GradientSums<PW> sums = {};
      float states = 0.f;
      for (int e = 0, stage = 0; e < size.dv; e += kStep, stage ^= 1) {
        copies_arrived();
        __syncthreads();
        if (e + kStep < size.dv)
          copy_step<PW>(gradient_stage<PW>(shared, stage ^ 1), in, size, b, h, chunk, e + kStep, column);
        add_step<PW>(sums, states, gradient_stage<PW>(shared, stage), strip, part);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) states += __shfl_xor_sync(~0u, states, step);
      if (threadIdx.x % 32 == 0) small.states[warp] = states;
      gradients_through_states<PW>(sums, small, q + column, k + column, ld, gates, s, strip, part);
      __syncthreads();  // the stages become the squares
      gradients_within_chunk<PW>(squares, small, column == 0 ? dbeta + head_row : nullptr, size.heads_v, n,
                                 sums, q, k, ld, size.dk, gates, s, strip, part);
      __syncthreads();
      add_products_within_chunk<PW>(sums, squares, q + column, k + column, ld, strip, part);
      if (group > 1) {
        accumulate(running, sums.d_oS, h == hk * group);
        accumulate(running + kChunk * PW, sums.XS, h == hk * group);
      }
      if (h == (hk + 1) * group - 1) {
        const int first = column + part * GradientSums<PW>::kColumns;
        act* out = dqkv + (row + 16 * strip) * size.channels + first;
        store_rows(out + size.q_column(hk), size.channels, n - 16 * strip, size.dk - first, sums.d_oS);
        store_rows(out + size.k_column(hk), size.channels, n - 16 * strip, size.dk - first, sums.XS);
      }
      if (warp == 0)
        finish_dg<PW>(dg + head_row, size.heads_v, n, small, gates[kFromStart * kChunk + kChunk - 1],
                      column > 0);
      __syncthreads();  // before the next head's copies
    }
}

}  // namespace delta_rule
}  // namespace gdn
