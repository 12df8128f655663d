// Gradients of q, k, beta and g, all chunks at once, on mma.sync: (G1)-(G5) of dev/doc/delta_rule.md, from
// the state at a chunk's start (S0), the gradient of the state at its end (dS), E and X.
//
// Scale factors. For columns j of dv, in groups of 16, S0 and E are stored times 2^a_j, dS and X times 2^b_j.
// With c = min_j (a_j + b_j), dO is scaled by 2^(c - a_j), X and E dS^T by 2^(c - a_j - b_j): then every
// product that sums over dv carries 2^c, and no operand grows. The chunk's [64,64] matrices dqk and dkk carry
// one more power of two, `scale`, which keeps their entries, fp16 operands, below 16.
#pragma once

#include "../gradient_common.cuh"
#include "passes.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kTokenThreads = kChunk * kStep / 8;

// One stage of the cp.async pipeline: kStep columns of dv.
struct GradientStage {
  act* d_o;                   // [64, kTokenStride]; arrives as bf16 and becomes fp16, in the units above
  __half *E, *x;              // the same shape; x arrives times 2^b_j
  __half *states, *d_states;  // [kStep, PW + 8]
};

template <int PW>
__device__ inline GradientStage gradient_stage(unsigned char* shared, int index) {
  GradientStage stage;
  stage.d_o = reinterpret_cast<act*>(shared + index * gradient_stage_bytes(PW));
  stage.E = reinterpret_cast<__half*>(stage.d_o + kChunk * kTokenStride);
  stage.x = stage.E + kChunk * kTokenStride;
  stage.states = stage.x + kChunk * kTokenStride;
  stage.d_states = stage.states + kStep * (PW + 8);
  return stage;
}

struct HeadTile {
  float* gates;                  // [4,64]
  int *exponents, *d_exponents;  // a_j, b_j
};

// The `index`-th head tile of the CTA, in a ring of 2 or 4.
__device__ inline HeadTile head_tile_at(unsigned char* head_tiles, int ring, int index) {
  HeadTile head_tile;
  head_tile.gates =
      reinterpret_cast<float*>(head_tiles + (ring == 2 ? index % 2 : index % 4) * kHeadTileBytes);
  head_tile.exponents = reinterpret_cast<int*>(head_tile.gates + kGates);
  head_tile.d_exponents = head_tile.exponents + kMaxColumnGroups;
  return head_tile;
}

// Position of a CTA in its work. A work tile is a chunk of a key head of a sequence; the CTA takes tiles
// gridDim.x apart. Loop order in a tile: dk in slices of PW columns, value heads that share the key head, dv
// in steps.
struct GradientCursor {
  int work_tile, tiles_before, head_tile;  // head_tile: how many came before
  int column, head, e;                     // of dk, in the group, of dv
  int chunk, key_head, sequence;           // of the work_tile

  __device__ void start(int first_work_tile, const Sizes& size) {
    work_tile = first_work_tile;
    tiles_before = head_tile = column = head = e = 0;
    locate(size);
  }
  __device__ void locate(const Sizes& size) {
    chunk = work_tile % size.chunks;
    key_head = work_tile / size.chunks % size.heads_k;
    sequence = work_tile / (size.chunks * size.heads_k);
  }

  // True at a work tile's first step, where q and k change.
  __device__ bool starts_work_tile() const { return column == 0 && head == 0 && e == 0; }
  __device__ bool ends_head_tile(const Sizes& size) const { return e + kStep >= size.dv; }

  template <int PW>
  __device__ void advance(const Sizes& size) {
    e += kStep;
    if (e < size.dv) return;
    e = 0;
    head_tile++;
    if (++head < size.value_heads_per_key) return;
    head = 0;
    column += PW;
    if (column < size.dk) return;
    column = 0;
    tiles_before++;
    work_tile += gridDim.x;
    locate(size);
  }

  __device__ int value_head(const Sizes& size) const { return key_head * size.value_heads_per_key + head; }
  __device__ int64_t row(const Sizes& size) const { return size.first_row(sequence, chunk); }
  __device__ int64_t number(const Sizes& size) const {
    return size.chunk_number(sequence, value_head(size), chunk);
  }
};

// The CTA issues cp.async of q and k, [64, ld] each.
__device__ inline void copy_keys(act* q, int ld, const GradientInputs& in, const Sizes& size,
                                 const GradientCursor& at) {
  const int64_t row = at.row(size);
  const int n = size.rows_in(at.chunk), hk = at.key_head, q_stride = in.q.row_stride,
            k_stride = in.k.row_stride;
  copy_tile(q, ld, in.q.head(hk) + row * q_stride, q_stride, ld, n, size.dk);
  copy_tile(q + kChunk * ld, ld, in.k.head(hk) + row * k_stride, k_stride, ld, n, size.dk);
}

__device__ inline void copy_head_tile(const HeadTile& head_tile, const GradientInputs& in, const Sizes& size,
                                      const GradientCursor& at) {
  const int64_t number = at.number(size), first = number * (size.dv / 16);
  for (int i = threadIdx.x; i < kGates / 4; i += blockDim.x)
    cp_async_16(head_tile.gates + 4 * i, in.gates + number * kGates + 4 * i, true);
  for (int i = threadIdx.x; i < size.dv / 16; i += blockDim.x) {
    cp_async_4(head_tile.exponents + i, in.saved.exponents + first + i);
    cp_async_4(head_tile.d_exponents + i, in.adjoints.exponents + first + i);
  }
}

// The eight elements of a step's [64, kStep] tiles that this thread loads. With two threads per vector the
// first takes dO and E (first), the second X (last).
struct TokenVector {
  int row, column;
  bool first, last;
};

template <int PW>
__device__ inline TokenVector token_vector() {
  constexpr int kHalves = gradient_threads(PW) / kTokenThreads;
  const int thread = threadIdx.x % kTokenThreads, half = threadIdx.x / kTokenThreads;
  return {thread / (kStep / 8), 8 * (thread % (kStep / 8)), half == 0, half == kHalves - 1};
}

// The CTA issues cp.async of one step: columns [e, e + kStep) of dv, columns of dk from the cursor's on.
template <int PW>
__device__ inline void copy_step(const GradientStage& stage, const GradientInputs& in, const Sizes& size,
                                 const GradientCursor& at) {
  const TokenVector vector = token_vector<PW>();
  const bool valid = vector.row < size.rows_in(at.chunk) && at.e + vector.column < size.dv;
  const int column = at.e + vector.column, to = vector.row * kTokenStride + vector.column;
  const int64_t row = at.row(size) + vector.row;
  const int64_t from = valid ? (row * size.heads_v + at.value_head(size)) * size.dv + column : 0;
  if (vector.first) {
    const act* d_o = in.d_o.head(at.value_head(size)) + row * in.d_o.row_stride + column;
    cp_async_16(stage.d_o + to, valid ? d_o : in.d_o.at, valid);
    cp_async_16(stage.E + to, in.saved.E + from, valid);
  }
  if (vector.last) cp_async_16(stage.x + to, in.adjoints.x + from, valid);

  constexpr int kVectors = PW / 8, kThreads = gradient_threads(PW);
  const int64_t state_at = (at.number(size) * size.dv + at.e) * size.dk + at.column;
  const __half *states = in.saved.states + state_at, *d_states = in.adjoints.d_states + state_at;
#pragma unroll
  for (int first = 0; first < kStep * kVectors; first += kThreads) {
    const int i = first + threadIdx.x, row = i / kVectors, column = 8 * (i % kVectors);
    if (kStep * kVectors % kThreads != 0 && i >= kStep * kVectors) break;
    const bool inside = at.e + row < size.dv && at.column + column < size.dk;
    const int offset = inside ? row * size.dk + column : 0;
    cp_async_16(stage.states + row * (PW + 8) + column, states + offset, inside);
    cp_async_16(stage.d_states + row * (PW + 8) + column, d_states + offset, inside);
  }
}

// Scales a step's dO and X in shared memory, each thread the elements that it copied; c as in the file's
// comment.
template <int PW>
__device__ inline void scale_step(const GradientStage& stage, const HeadTile& head_tile, const Sizes& size,
                                  int e, int c) {
  const TokenVector vector = token_vector<PW>();
  const int column = e + vector.column, to = vector.row * kTokenStride + vector.column;
  if (column >= size.dv) return;  // zeros
  const int a = head_tile.exponents[column / 16];
  if (vector.first) to_fp16(stage.d_o + to, small_power_of_two(c - a));
  if (vector.last) {
    const __half2 factor = __float2half2_rn(small_power_of_two(c - a - head_tile.d_exponents[column / 16]));
    __half2 x[4];
    *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(stage.x + to);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __hmul2(x[i], factor);
    *reinterpret_cast<uint4*>(stage.x + to) = *reinterpret_cast<const uint4*>(x);
  }
}

// A warp's accumulators: 16 tokens (rows) by kTokens tokens, and by kColumns columns of dk.
template <int PW>
struct Sm80GradientSums {
  static constexpr int kTokens = kChunk / gradient_n_splits(PW), kColumns = PW / gradient_n_splits(PW);
  static constexpr int kTokenTiles = kTokens / 8, kColumnTiles = kColumns / 8;
  float d_oE[kTokenTiles][4], XE[kTokenTiles][4];                          // dO E^T, X E^T
  float d_oS[kColumnTiles][4], XS[kColumnTiles][4], EdS[kColumnTiles][4];  // dO S0^T, X S0^T, E dS^T
};

// The products of one step, K = kStep columns of dv; and states_dot += this thread's part of <S0, dS>, whose
// blocks are divided among the m-tiles. factors: 2^(c - a_j - b_j) from the step's first column on.
template <int PW>
__device__ inline void add_step(Sm80GradientSums<PW>& sums, float& states_dot, const GradientStage& stage,
                                const float* factors, const WarpTile& tile) {
  using Sums = Sm80GradientSums<PW>;
  const int m_tile = tile.m_tile, n_split = tile.n_split;
  constexpr uint32_t kTile = 2 * kChunk * kTokenStride, kState = 2 * kStep * (PW + 8);
  const uint32_t a = lane_address_rows_first(stage.d_o + 16 * m_tile * kTokenStride, kTokenStride);
  const uint32_t b =
      lane_address_columns_first(stage.E + Sums::kTokens * n_split * kTokenStride, kTokenStride);
  const uint32_t states = lane_address_rows_first(stage.states + n_split * Sums::kColumns, PW + 8);
#pragma unroll
  for (int e = 0; e < kStep; e += 16) {
    uint32_t d_o[4], x[4], E[4];
    ldmatrix(d_o, a + 2 * e);
    ldmatrix(E, a + kTile + 2 * e);
    ldmatrix(x, a + 2 * kTile + 2 * e);
    if (Sums::kTokens * n_split < 16 * (m_tile + 1)) {  // else all above the diagonal
#pragma unroll
      for (int t = 0; t < Sums::kTokens / 16; t++) {
        uint32_t other[4];
        ldmatrix(other, b + 2 * (16 * t * kTokenStride + e));
        mma_pair(sums.d_oE[2 * t], sums.d_oE[2 * t + 1], d_o, other);
        mma_pair(sums.XE[2 * t], sums.XE[2 * t + 1], x, other);
      }
    }
    const float factor = factors[e / 16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const __half2 scaled = __hmul2(*reinterpret_cast<__half2*>(&E[i]), __float2half2_rn(factor));
      E[i] = *reinterpret_cast<const uint32_t*>(&scaled);
    }
#pragma unroll
    for (int t = 0; t < Sums::kColumns / 16; t++) {
      uint32_t s[4], ds[4];
      ldmatrix_transposed(s, states + 2 * (e * (PW + 8) + 16 * t));
      ldmatrix_transposed(ds, states + kState + 2 * (e * (PW + 8) + 16 * t));
      mma_pair(sums.d_oS[2 * t], sums.d_oS[2 * t + 1], d_o, s);
      mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], x, s);
      mma_pair(sums.EdS[2 * t], sums.EdS[2 * t + 1], E, ds);
      if ((2 * t + e / 16) % 4 == m_tile) states_dot += factor * dot_of_fragments(s, ds);
    }
  }
}

// Partial sums of one value head for dg, in shared memory, one writer an entry; rows to writes carry `scale`.
struct DgSums {
  float* rows;     // sums over j of M_ij (intra_chunk_gradients), [parts][64]
  float* columns;  // sums over i, [4][64] by m_tile
  float* reads;    // q . dq + k . dk where S0 is read, [parts][64]
  float* writes;   // k . dk where it enters S_C, [parts][64]
  float* states;   // <S0, dS> [warps]
  float* largest;  // bounds of dqk and dkk [warps]
};

__device__ inline DgSums dg_sums_at(float* at) {
  constexpr int kNSplits = kMaxNSplits * kChunk, kMTiles = 4 * kChunk, kWarps = 4 * kMaxNSplits;
  float* states = at + 3 * kNSplits + kMTiles;
  return {at, at + kNSplits, at + kNSplits + kMTiles, at + 2 * kNSplits + kMTiles, states, states + kWarps};
}

// Each warp leaves an upper bound on its entries of dqk and dkk (beta <= 2) for scale_exponent_of_block, the
// exponent of the block's power of two that brings the largest of them into [8, 16).
template <int PW>
__device__ inline void leave_largest(const DgSums& dg_sums, const Sm80GradientSums<PW>& sums, float s) {
  float d_oE = 0.f, XE = 0.f;
#pragma unroll
  for (int t = 0; t < Sm80GradientSums<PW>::kTokenTiles; t++) {
    d_oE = largest_of(sums.d_oE[t], d_oE);
    XE = largest_of(sums.XE[t], XE);
  }
  const uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(fmaxf(2 * s * d_oE, 4 * XE)));
  if (threadIdx.x % 32 == 0) dg_sums.largest[threadIdx.x / 32] = __uint_as_float(bits);
}

__device__ inline int scale_exponent_of_block(const DgSums& dg_sums) {
  const float mine = dg_sums.largest[threadIdx.x % (blockDim.x / 32)];
  const int bits = int(__reduce_max_sync(~0u, __float_as_uint(mine)));
  return bits == 0 ? 0 : max(-100, min(100, 3 - ((bits >> 23) - 127)));
}

// q and k of a chunk in shared memory, fp16, rows ld apart.
struct ChunkKeys {
  const act *q, *k;
  int ld;
  __device__ ChunkKeys from(int column) const { return {q + column, k + column, ld}; }
};

// (G2) and the sums of M for (G5): from dO E^T and X E^T, dqk and dkk times scale as fp16 [2][64,
// kMatrixStride] into score_gradients; row and column sums of M into dg_sums; (G1) dbeta_i = X_i . E_i if
// with_dbeta.
template <int PW>
__device__ inline void intra_chunk_gradients(__half* score_gradients, const DgSums& dg_sums,
                                             const HeadChunk& head, bool with_dbeta,
                                             const Sm80GradientSums<PW>& sums, const ChunkKeys& keys, int dk,
                                             const WarpTile& tile) {
  const int m_tile = tile.m_tile, n_split = tile.n_split, ld = keys.ld, n = head.n;
  const act *q = keys.q, *k = keys.k;
  const float* gates = head.gates;
  const float s = head.s, scale = head.scale, unit = head.unit;
  float* dbeta = with_dbeta ? head.dbeta : nullptr;
  constexpr int kTokens = Sm80GradientSums<PW>::kTokens;
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
  const float *beta = gates + kBeta * kChunk, *G = gates + kCumulativeLogDecay * kChunk;
  float row_sum[2] = {};
#pragma unroll
  for (int pair = 0; pair < kTokens / 16; pair++) {  // 16 columns
    float qk[2][4] = {}, kk[2][4] = {};
    const int first = kTokens * n_split + 16 * pair;
    if (first <= 16 * m_tile) {
      const uint32_t q_rows = lane_address_rows_first(q + 16 * m_tile * ld, ld),
                     k_rows = lane_address_rows_first(k + 16 * m_tile * ld, ld);
      const uint32_t k_columns = lane_address_columns_first(k + first * ld, ld);
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
        const int i = 16 * m_tile + g + 8 * (e / 2), j = first + 8 * t + c + e % 2;
        const float decay = i >= j ? scale * expf(fminf(G[i] - G[j], 0.f)) : 0.f;
        dqk[e] = i >= j ? s * beta[j] * decay * d_oE[e] : 0.f;
        dkk[e] = i > j ? -beta[i] * beta[j] * decay * XE[e] : 0.f;
        if (i == j && i < n && dbeta) dbeta[int64_t(i) * head.stride] = unit * XE[e];
        const float M = i > j ? dqk[e] * qk[t][e] + dkk[e] * kk[t][e] : 0.f;
        row_sum[e / 2] += M;
        column_sum[e % 2] += M;
      }
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float sum = sum_of_column(column_sum[e]);
        if (g == 0) dg_sums.columns[m_tile * kChunk + first + 8 * t + c + e] = sum;
        uint32_t* at = reinterpret_cast<uint32_t*>(
            score_gradients + (16 * m_tile + g + 8 * e) * kMatrixStride + first + 8 * t + c);
        at[0] = pack_fp16(dqk[2 * e], dqk[2 * e + 1]);
        at[kChunk * kMatrixStride / 2] = pack_fp16(dkk[2 * e], dkk[2 * e + 1]);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float sum = sum_of_quad(row_sum[e]);
    if (lane % 4 == 0) dg_sums.rows[n_split * kChunk + 16 * m_tile + g + 8 * e] = sum;
  }
}

// Gradients through S_0 and dS_C, the first terms of (G3) and (G4): scales d_oS to scale*dq and XS to
// scale*dk in place, and leaves q.dq, k.dk for dg. keys: from the slice's first column of dk on.
template <int PW>
__device__ inline void inter_chunk_gradients(Sm80GradientSums<PW>& sums, const DgSums& dg_sums,
                                             const HeadChunk& head, const ChunkKeys& keys,
                                             const WarpTile& tile) {
  const int lane = threadIdx.x % 32, m_tile = tile.m_tile, n_split = tile.n_split, ld = keys.ld;
  const act *q = keys.q, *k = keys.k;
  const float* gates = head.gates;
  const float s = head.s, scale = head.scale;
#pragma unroll
  for (int e = 0; e < 2; e++) {  // row g, row g + 8
    const int i = 16 * m_tile + lane / 4 + 8 * e;
    const float beta = gates[kBeta * kChunk + i], from_start = scale * gates[kDecayFromStart * kChunk + i];
    const float to_end = scale * gates[kDecayToEnd * kChunk + i];
    float reads = 0.f, writes = 0.f;
#pragma unroll
    for (int t = 0; t < Sm80GradientSums<PW>::kColumnTiles; t++) {
      const int at = i * ld + n_split * Sm80GradientSums<PW>::kColumns + 8 * t + 2 * (lane % 4);
      const float2 q_i = unpack_fp16(*reinterpret_cast<const uint32_t*>(q + at));
      const float2 k_i = unpack_fp16(*reinterpret_cast<const uint32_t*>(k + at));
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
      dg_sums.reads[n_split * kChunk + i] = reads;
      dg_sums.writes[n_split * kChunk + i] = writes;
    }
  }
}

// Intra-chunk terms of (G3) and (G4): dq += dqk K, dk += dqk^T Q + (dkk + dkk^T) K; keys as above.
template <int PW>
__device__ inline void add_intra_chunk_products(Sm80GradientSums<PW>& sums, const __half* score_gradients,
                                                const ChunkKeys& keys, const WarpTile& tile) {
  const int m_tile = tile.m_tile, n_split = tile.n_split, ld = keys.ld;
  const act *q = keys.q, *k = keys.k;
  constexpr uint32_t kMatrixBytes = 2 * kChunk * kMatrixStride;
  constexpr int kColumns = Sm80GradientSums<PW>::kColumns;
  const uint32_t rows = lane_address_rows_first(score_gradients + 16 * m_tile * kMatrixStride, kMatrixStride);
  const uint32_t columns = lane_address_columns_first(score_gradients + 16 * m_tile, kMatrixStride);
  const uint32_t q_rows = lane_address_rows_first(q + n_split * kColumns, ld),
                 k_rows = lane_address_rows_first(k + n_split * kColumns, ld);
#pragma unroll
  for (int p = 0; p < 4; p++) {  // 16 tokens to sum over
    const uint32_t from_rows = rows + 2 * 16 * p, from_columns = columns + 2 * 16 * p * kMatrixStride;
    uint32_t dqk[4], dkk[4], b[4];
    if (p <= m_tile) {
      ldmatrix(dqk, from_rows);
      ldmatrix(dkk, from_rows + kMatrixBytes);
#pragma unroll
      for (int t = 0; t < kColumns / 16; t++) {
        ldmatrix_transposed(b, k_rows + 2 * (16 * p * ld + 16 * t));
        mma_pair(sums.d_oS[2 * t], sums.d_oS[2 * t + 1], dqk, b);
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dkk, b);
      }
    }
    if (p >= m_tile) {
      ldmatrix_transposed(dqk, from_columns);
      ldmatrix_transposed(dkk, from_columns + kMatrixBytes);
#pragma unroll
      for (int t = 0; t < kColumns / 16; t++) {
        ldmatrix_transposed(b, q_rows + 2 * (16 * p * ld + 16 * t));
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dqk, b);
        ldmatrix_transposed(b, k_rows + 2 * (16 * p * ld + 16 * t));
        mma_pair(sums.XS[2 * t], sums.XS[2 * t + 1], dkk, b);
      }
    }
  }
}

// This lane's two tokens' part of a sum for dg that several warps left.
__device__ inline float2 sum_of_parts(const float* parts, int count) {
  float2 sum = make_float2(0.f, 0.f);
  for (int i = 0; i < count; i++) {
    const float2 x = *reinterpret_cast<const float2*>(parts + i * kChunk + 2 * (threadIdx.x % 32));
    sum.x += x.x, sum.y += x.y;
  }
  return sum;
}

// (G5) of the sums that the warps left. `more`: those of a later slice of dk, without M.
template <int PW>
__device__ inline void finish_dg(const HeadChunk& head, const DgSums& dg_sums, bool more) {
  constexpr int kNSplits = gradient_n_splits(PW);
  float2 from = sum_of_parts(dg_sums.reads, kNSplits);
  if (!more) {
    const float2 rows = sum_of_parts(dg_sums.rows, kNSplits), columns = sum_of_parts(dg_sums.columns, 4);
    from.x += rows.x - columns.x, from.y += rows.y - columns.y;
  }
  float states = 0.f;
  for (int warp = 0; warp < 4 * kNSplits; warp++) states += dg_sums.states[warp];
  finish_dg(head, from, sum_of_parts(dg_sums.writes, kNSplits), states, more);
}

// Adds x to group_sums [tiles][4][threads], the sums over the value heads of a group (or starts them with x),
// and returns the sum in x.
template <int Tiles>
__device__ inline void accumulate_over_group(float* group_sums, float (&x)[Tiles][4], bool first) {
#pragma unroll
  for (int t = 0; t < Tiles; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float* at = group_sums + (4 * t + e) * blockDim.x + threadIdx.x;
      if (!first) x[t][e] += *at;
      *at = x[t][e];
    }
}

// The same with the sums in registers.
template <int Tiles>
__device__ inline void accumulate_over_group(float (&group_sums)[Tiles][4], float (&x)[Tiles][4],
                                             bool first) {
#pragma unroll
  for (int t = 0; t < Tiles; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (!first) x[t][e] += group_sums[t][e];
      group_sums[t][e] = x[t][e];
    }
}

// Stores a warp's rows [16 tokens, 8 Tiles] as bf16 to `to`, row g at the m-tile's first token.
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
        *reinterpret_cast<uint32_t*>(to + row * stride + column) = pack_bf16(x[t][2 * e], x[t][2 * e + 1]);
    }
}

// (G1)-(G5) for work tiles, a chunk of a key head of a sequence each. Persistent: a CTA takes tiles gridDim.x
// apart; loads of the next steps cross the boundaries of head tiles and work tiles.
//
// kCompact: for GPUs with less shared memory. dqk and dkk lie in the stage whose step was the last, the sums
// over a group's value heads in registers, and there may be one stage, filled between the steps.
//
// Lower bound at B=32, T=1024, H=6, dk=128, dv=256: reads q, k, do, E, X 0.40 GB, S0, dS 0.40 GB, writes 0.10
// GB; 71 GFLOP. H100: 0.509 ms (dev/results/delta_rule_speed): issue slots 43%, a quarter of the instructions
// after a work tile's last step. On Hopper it runs where gradients_sm90_kernel does not: dv no multiple of
// 64, or shared key heads with dk > 128.
template <int PW, bool kCompact>
__global__ void __launch_bounds__(gradient_threads(PW), gradient_blocks(PW, kCompact))
    gradients_kernel(GradientOutputs out, GradientInputs in, Sizes size, int work_tiles,
                     GradientBuffers buffers, float s) {
  if (kCompact && kHopperCode) return;  // Hopper has room for the other
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / 32, n_split = warp / 4, ld = key_stride(size.dk, PW);
  const WarpTile tile = {(warp + 3 * n_split) % 4,
                         n_split};  // the four schedulers get m-tiles of all lengths
  act* keys = reinterpret_cast<act*>(shared + buffers.stages * gradient_stage_bytes(PW));
  __half* score_gradients = reinterpret_cast<__half*>(keys + buffers.keys * 2 * kChunk * ld);
  unsigned char* head_tiles =
      reinterpret_cast<unsigned char*>(score_gradients) + (kCompact ? 0 : kScoreGradientsBytes);
  const int ring = delta_rule::head_tiles(kCompact, buffers);
  float* factors = reinterpret_cast<float*>(head_tiles + ring * kHeadTileBytes);
  const DgSums dg_sums = dg_sums_at(factors + kMaxColumnGroups);
  float* group_sums = factors + kMaxColumnGroups + kDgSums;  // dq, then dk

  GradientCursor now, next;
  now.start(blockIdx.x, size);
  next = now;
  int now_stage = 0, next_stage = 0;
  const auto keys_of = [&](const GradientCursor& at) {
    return keys + (buffers.keys == 2 ? at.tiles_before % 2 : 0) * 2 * kChunk * ld;
  };
  const auto copy_next = [&] {
    if (next.work_tile < work_tiles) {
      if (buffers.keys == 2 && next.starts_work_tile()) copy_keys(keys_of(next), ld, in, size, next);
      copy_step<PW>(gradient_stage<PW>(shared, next_stage), in, size, next);
      const bool last = next.ends_head_tile(size);
      next.advance<PW>(size);
      if (last && next.work_tile < work_tiles)
        copy_head_tile(head_tile_at(head_tiles, ring, next.head_tile), in, size, next);
      if (++next_stage == buffers.stages) next_stage = 0;
    }
    cp_async_commit();
  };
  copy_head_tile(head_tile_at(head_tiles, ring, 0), in, size, now);
  cp_async_commit();
  cp_async_wait_all();
  __syncthreads();
  for (int i = 1; i < buffers.stages; i++) copy_next();

  using Sums = Sm80GradientSums<PW>;
  float group_d_oS[kCompact ? Sums::kColumnTiles : 1][4], group_XS[kCompact ? Sums::kColumnTiles : 1][4];
  while (now.work_tile < work_tiles) {
    const HeadTile head_tile = head_tile_at(head_tiles, ring, now.head_tile);
    act *q = keys_of(now), *k = q + kChunk * ld;
    if (now.starts_work_tile()) {
      if (buffers.keys == 1) {
        __syncthreads();  // the work_tile before is done
        copy_keys(q, ld, in, size, now);
        cp_async_commit();
      }
      cp_async_wait_all();
      convert_own_copies_to_fp16(q, ld, ld);
      convert_own_copies_to_fp16(k, ld, ld);
    }
    const int lane = threadIdx.x % 32, groups = size.dv / 16;
    const int both = lane < groups ? head_tile.exponents[lane] + head_tile.d_exponents[lane] : 1 << 20;
    const int c = __reduce_min_sync(~0u, both);
    if (warp == 0 && lane < kMaxColumnGroups)
      factors[lane] = lane < groups ? small_power_of_two(c - both) : 0.f;
    Sums sums = {};
    float states = 0.f;
    for (int e = 0; e < size.dv; e += kStep) {
      if (kCompact && buffers.stages == 1) {
        __syncthreads();  // all are done with the stage
        copy_next();
      }
      if (buffers.stages == 3)
        cp_async_wait_all_but_one();
      else
        cp_async_wait_all();
      const GradientStage stage = gradient_stage<PW>(shared, now_stage);
      scale_step<PW>(stage, head_tile, size, e, c);
      __syncthreads();
      if (!kCompact || buffers.stages > 1) copy_next();
      add_step<PW>(sums, states, stage, factors + e / 16, tile);
      if (++now_stage == buffers.stages) now_stage = 0;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) states += __shfl_xor_sync(~0u, states, step);
    if (lane == 0) dg_sums.states[warp] = states;
    leave_largest<PW>(dg_sums, sums, s);
    __syncthreads();
    if (kCompact)  // this tile's last stage: refilled only when all are past the next barrier of the loop
      score_gradients = reinterpret_cast<__half*>(
          shared + (now_stage == 0 ? buffers.stages - 1 : now_stage - 1) * gradient_stage_bytes(PW));
    const int hk = now.key_head, n = size.rows_in(now.chunk);
    const int64_t row = now.row(size), head_row = row * size.heads_v + now.value_head(size);
    const int scale_exponent = scale_exponent_of_block(dg_sums);
    const HeadChunk head = {n,
                            head_tile.gates,
                            out.dg + head_row,
                            out.dbeta + head_row,
                            size.heads_v,
                            s,
                            power_of_two(scale_exponent),
                            power_of_two(-c),
                            small_power_of_two(-c - scale_exponent)};
    const ChunkKeys all_keys = {q, k, ld}, slice_keys = all_keys.from(now.column);
    inter_chunk_gradients<PW>(sums, dg_sums, head, slice_keys, tile);
    intra_chunk_gradients<PW>(score_gradients, dg_sums, head, now.column == 0, sums, all_keys, size.dk, tile);
    __syncthreads();
    add_intra_chunk_products<PW>(sums, score_gradients, slice_keys, tile);
    scale_tiles(sums.d_oS, head.result_unit);
    scale_tiles(sums.XS, head.result_unit);
    const int group = size.value_heads_per_key;
    if constexpr (kCompact) {
      accumulate_over_group(group_d_oS, sums.d_oS, now.head == 0);
      accumulate_over_group(group_XS, sums.XS, now.head == 0);
    } else if (group > 1) {
      accumulate_over_group(group_sums, sums.d_oS, now.head == 0);
      accumulate_over_group(group_sums + kChunk * PW, sums.XS, now.head == 0);
    }
    if (now.head == group - 1) {
      const int first = now.column + tile.n_split * Sums::kColumns;
      const int rows = n - 16 * tile.m_tile, columns = size.dk - first;
      const auto store = [&](const HeadRows<act>& to, const float(&x)[Sums::kColumnTiles][4]) {
        store_rows(to.head(hk) + (row + 16 * tile.m_tile) * to.row_stride + first, to.row_stride, rows,
                   columns, x);
      };
      store(out.dq, sums.d_oS);
      store(out.dk, sums.XS);
    }
    if (warp == 0) finish_dg<PW>(head, dg_sums, now.column > 0);
    now.e = (size.dv - 1) / kStep * kStep;
    now.advance<PW>(size);
  }
}

}  // namespace delta_rule
}  // namespace gdn
