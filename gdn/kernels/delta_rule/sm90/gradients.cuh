// Gradients of q, k, beta and g on Hopper (wgmma, TMA; sm_90a): (G1)-(G5) of dev/doc/delta_rule.md, with the
// scale factors of the mma.sync kernel (sm80/gradients.cuh). For dv a multiple of 64 and, where value heads
// share key heads, dk <= 128.
//
// Warp specialization: two consumer warpgroups and one producer warp. One elected producer thread issues TMA
// loads of [64,64] tiles (128-byte swizzle) into a ring of kStages stages with full/empty mbarriers. TMA
// zero-fills rows past the last token and columns past dk.
//
// Both consumers have all 64 tokens and half of dk's columns; besides, warpgroup 0 computes dO E^T, q k^T and
// dqk, warpgroup 1 X E^T, k k^T and dkk. Operands that have to be scaled (dO, X, E) are A operands and pass
// through registers; E of the other tokens, S0 and dS are B operands and are used as they arrive.
//
// Beyond 128 columns of dk the accumulators do not fit: the columns of dk are done in two slices, the second
// of which reads dO, E and X again (and computes its share of dO E^T and X E^T again, for which tensor cores
// have time). dqk and dkk are the first slice's; the sums for dg continue. S0 and dS, read once, are loaded
// with the L2 policy evict_first, so that dO, E and X stay in the L2 cache.
//
// q and k arrive during the last steps of the previous work tile and are converted to fp16 at the tile's
// first epilogue; after its last, dq and dk replace them in shared memory and TMA stores write them out.
#pragma once

#include "../gradient_common.cuh"
#include "tiles.cuh"

namespace gdn {
namespace delta_rule {

// wgmma over a warpgroup's 8 kTiles columns of dk, B MN-major.
template <int kTiles>
__device__ inline void wgmma_columns(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, int add) {
  if constexpr (kTiles == 8)
    wgmma_64<kMajorMN>(d, a, b, add);
  else
    wgmma_32<kMajorMN>(d, a, b, add);
}

template <Major kA, int kTiles>
__device__ inline void wgmma_columns_shared(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  if constexpr (kTiles == 8)
    wgmma_64_shared<kA, kMajorMN>(d, a, b, 1);
  else
    wgmma_32_shared<kA, kMajorMN>(d, a, b, 1);
}

constexpr int kConsumerThreads = 256, kGradientThreads = kConsumerThreads + 128;
constexpr int kConsumersBarrier = 1;

constexpr int kMaxGradientStages = 4;

// TMA descriptors. q, k, dq, dk: (columns, key heads, tokens, sequences); d_o, E, x: (columns, value heads,
// tokens, sequences); states, d_states: (dk, dv, chunk).
struct GradientTensors {
  CUtensorMap q, k, dq, dk, d_o, E, x, states, d_states;
};

struct GradientBarriers {
  uint64_t full[kMaxGradientStages], empty[kMaxGradientStages], head_tile_full[2], head_tile_empty[2],
      keys_full, keys_empty;
};

// Shared-memory buffer of a head tile: a value head's gates and exponents for a chunk.
struct HeadTileBuffer {
  float gates[kGates];
  int exponents[kMaxColumnGroups], d_exponents[kMaxColumnGroups];
};

// Partial sums for dg, as in DgSums; one writer an entry.
struct DgSumsSm90 {
  float rows[2][kChunk], columns[8][kChunk], reads[2][kChunk], writes[2][kChunk];
  float states[8], largest[8];
};

// scale: the power of two that brings the largest entry of dO E^T and X E^T into [8, 16). result: removes it
// and the products' 2^c from a result.
struct SumScales {
  float scale, result;
  __device__ SumScales(const DgSumsSm90& dg_sums, int c) {
    const int bits = int(__reduce_max_sync(~0u, __float_as_uint(dg_sums.largest[threadIdx.x % 8])));
    const int exponent = bits == 0 ? 0 : max(-100, min(100, 3 - ((bits >> 23) - 127)));
    scale = power_of_two(exponent);
    result = small_power_of_two(-c - exponent);
  }
};

// kTiles: number of 64-column tiles of dk, at most two in a slice. kGrouped: value heads share key heads.
template <int kTiles, bool kGrouped>
struct GradientLayout {
  static_assert(kTiles <= 2 || (kTiles == 4 && !kGrouped), "group_sums sums of two passes do not fit");
  static constexpr int kPassTiles = kTiles < 2 ? 1 : 2, kPasses = kTiles / kPassTiles;
  static constexpr int kStages = kPassTiles == 2 ? (kGrouped || kPasses == 2 ? 2 : 3) : (kGrouped ? 3 : 4);
  static constexpr int kStageBytes = (3 + 2 * kPassTiles) * kTileBytes;
  static constexpr int kColumnTiles = 4 * kPassTiles;  // of a warpgroup in a pass
  static constexpr int kKeys = kStages * kStageBytes, kScoreGradients = kKeys + 2 * kTiles * kTileBytes;
  // Sums of dq and dk over the group's value heads: all of a thread's accumulator tiles but one.
  static constexpr int kGroupSums = kScoreGradients + 2 * kTileBytes;
  static constexpr int kHeadTilesAt =
      kGroupSums + (kGrouped ? (2 * kColumnTiles - 1) * kConsumerThreads * int(sizeof(float4)) : 0);
  static constexpr int kSums = kHeadTilesAt + 2 * int(sizeof(HeadTileBuffer));
  static constexpr int kBarriers = kSums + int(sizeof(DgSumsSm90));
  static constexpr int kBytes = kBarriers + int(sizeof(GradientBarriers));
};

static_assert(sizeof(HeadTileBuffer) % 16 == 0 && sizeof(DgSumsSm90) % 16 == 0, "aligned as they lie");

// A work tile: a chunk of a key head of a sequence.
struct WorkTile {
  int chunk, key_head, sequence;
  __device__ WorkTile(int work_tile, const Sizes& size)
      : chunk(work_tile % size.chunks),
        key_head(work_tile / size.chunks % size.heads_k),
        sequence(work_tile / size.chunks / size.heads_k) {}
};

struct GateInputs {
  const float* gates;
  const int *exponents, *d_exponents;
};

// Producer, one thread: issues every load in the consumers' order.
template <int kTiles, bool kGrouped>
__device__ inline void gradients_producer_loop(unsigned char* shared, GradientBarriers& barriers,
                                               HeadTileBuffer* head_tiles, const GradientTensors& tensors,
                                               const GateInputs& in, const Sizes& size, int work_tiles) {
  using Layout = GradientLayout<kTiles, kGrouped>;
  constexpr int kPassTiles = Layout::kPassTiles;
  const int group = size.value_heads_per_key, exponent_bytes = size.dv / 16 * int(sizeof(int));
  const int keys_after =
      min(Layout::kStages * 64, size.dv) - 64;  // the step after which q and k are sent for
  const uint64_t read_once = evict_first_policy();
  int stage = 0, parity = 1, head_tile = 0, keys_parity = 1;
  for (int work_tile = blockIdx.x; work_tile < work_tiles; work_tile += gridDim.x) {
    const WorkTile at(work_tile, size);
    const int token = at.chunk * kChunk;
    for (int head = 0; head < group; head++, head_tile++) {
      const int value_head = at.key_head * group + head;
      const int number = int(size.chunk_number(at.sequence, value_head, at.chunk));
      HeadTileBuffer& to = head_tiles[head_tile % 2];
      uint64_t* full = &barriers.head_tile_full[head_tile % 2];
      mbarrier_wait(&barriers.head_tile_empty[head_tile % 2], head_tile / 2 % 2 ^ 1);
      mbarrier_arrive_expect_tx(full, int(sizeof(to.gates)) + 2 * exponent_bytes);
      tma_load_1d(to.gates, in.gates + int64_t(number) * kGates, sizeof(to.gates), full);
      tma_load_1d(to.exponents, in.exponents + int64_t(number) * (size.dv / 16), exponent_bytes, full);
      tma_load_1d(to.d_exponents, in.d_exponents + int64_t(number) * (size.dv / 16), exponent_bytes, full);
      for (int pass = 0; pass < Layout::kPasses; pass++)
        for (int e = 0; e < size.dv; e += 64) {
          unsigned char* tile = shared + stage * Layout::kStageBytes;
          full = &barriers.full[stage];
          mbarrier_wait(&barriers.empty[stage], parity);
          mbarrier_arrive_expect_tx(full, Layout::kStageBytes);
          tma_load_4d(tile, &tensors.d_o, e, value_head, token, at.sequence, full);
          tma_load_4d(tile + kTileBytes, &tensors.E, e, value_head, token, at.sequence, full);
          tma_load_4d(tile + 2 * kTileBytes, &tensors.x, e, value_head, token, at.sequence, full);
#pragma unroll
          for (int t = 0; t < kPassTiles; t++) {
            unsigned char *state = tile + (3 + t) * kTileBytes, *d_state = state + kPassTiles * kTileBytes;
            const int column = 64 * (pass * kPassTiles + t);
            tma_load_3d(state, &tensors.states, column, e, number, full, read_once);
            tma_load_3d(d_state, &tensors.d_states, column, e, number, full, read_once);
          }
          if (++stage == Layout::kStages) stage = 0, parity ^= 1;
          if (head == 0 && pass == 0 && e == keys_after) {
            mbarrier_wait(&barriers.keys_empty, keys_parity);
            keys_parity ^= 1;
            mbarrier_arrive_expect_tx(&barriers.keys_full, 2 * kTiles * kTileBytes);
#pragma unroll
            for (int t = 0; t < 2 * kTiles; t++)
              tma_load_4d(shared + Layout::kKeys + t * kTileBytes, t < kTiles ? &tensors.q : &tensors.k,
                          t % kTiles * 64, at.key_head, token, at.sequence, &barriers.keys_full);
          }
        }
    }
  }
}

// Named barrier 1 of the two consumer warpgroups.
__device__ inline void consumers_sync() { named_barrier_sync(kConsumersBarrier, kConsumerThreads); }

// Byte offset of this lane's row in the m-tile's 16 rows of a swizzled tile, plus the i-th 16 columns:
// address for ldmatrix of an A fragment, and for stmatrix of a packed one.
struct LaneRow {
  int row, half, swizzle;
  __device__ explicit LaneRow(int m_tile)
      : row(2 * kTileRow * (16 * m_tile + threadIdx.x % 16)),
        half(threadIdx.x % 32 / 16),
        swizzle(threadIdx.x % 8) {}
  __device__ int operator()(int columns_16) const { return row + 16 * ((2 * columns_16 + half) ^ swizzle); }
};

// A consumer thread's accumulators. scores: dO E^T in warpgroup 0, X E^T in warpgroup 1.
template <int kColumnTiles>
struct Sm90GradientSums {
  float scores[8][4], d_oS[kColumnTiles][4], XS[kColumnTiles][4], EdS[kColumnTiles][4];
};

template <int kColumnTiles>
__device__ inline void wgmma_fence_sums(Sm90GradientSums<kColumnTiles>& sums) {
  wgmma_fence_operand(sums.scores), wgmma_fence_operand(sums.d_oS), wgmma_fence_operand(sums.XS),
      wgmma_fence_operand(sums.EdS);
}

// Dot product of two vectors of eight fp16.
__device__ inline float dot_of_vectors(const uint4& x, const uint4& y) {
  return dot_of_fragments({x.x, x.y, x.z, x.w}, {y.x, y.y, y.z, y.w});
}

// The wgmma of one step (64 columns of dv) and this thread's part of <S0, dS>. d_o_unit, x_unit: scale
// factors of column group `lane`, broadcast by shuffles. kTiles: of the slice of dk.
template <int kTiles>
__device__ inline void add_step(Sm90GradientSums<4 * kTiles>& sums, float& states_dot,
                                const unsigned char* stage, const LaneRow& lane_row, int warpgroup,
                                int column_group, float d_o_unit, float x_unit) {
  const uint32_t d_o_at = shared_address(stage);
  const unsigned char* states = stage + 3 * kTileBytes;
  // kTiles 2: a tile per warpgroup; 1: half a tile, four 16-byte vectors
  const uint64_t own = kTiles == 2 ? warpgroup * kNextTile : warpgroup * 4;
  const uint64_t E = make_smem_desc(stage + kTileBytes), s = make_smem_desc(states) + own;
  const uint64_t ds = s + kTiles * kNextTile;
  uint32_t d_o[4][4], x[4][4], e[4][4], score_fragments[4][4];
  float factors[4];
  wgmma_fence_sums(sums);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t at = d_o_at + lane_row(i);
    ldmatrix(d_o[i], at);
    ldmatrix(e[i], at + kTileBytes);
    ldmatrix(x[i], at + 2 * kTileBytes);
    const float d_o_factor = __shfl_sync(~0u, d_o_unit, column_group + i);
    factors[i] = __shfl_sync(~0u, x_unit, column_group + i);
    const __half2 factor = __float2half2_rn(factors[i]);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float2 wide = unpack_bf16(d_o[i][r]);
      d_o[i][r] = pack_fp16(d_o_factor * wide.x, d_o_factor * wide.y);
      const __half2 scaled_x = __hmul2(*reinterpret_cast<__half2*>(&x[i][r]), factor);
      const __half2 scaled_e = __hmul2(*reinterpret_cast<__half2*>(&e[i][r]), factor);
      x[i][r] = *reinterpret_cast<const uint32_t*>(&scaled_x);
      e[i][r] = *reinterpret_cast<const uint32_t*>(&scaled_e);
    }
#pragma unroll
    for (int r = 0; r < 4; r++) score_fragments[i][r] = warpgroup == 0 ? d_o[i][r] : x[i][r];
    wgmma_fence_operand(d_o[i]), wgmma_fence_operand(x[i]), wgmma_fence_operand(e[i]),
        wgmma_fence_operand(score_fragments[i]);
    const int add = column_group + i > 0;
    wgmma_fence();
    wgmma_64<kMajorK>(sums.scores, score_fragments[i], E + i * kColumns16, add);
    wgmma_columns(sums.d_oS, d_o[i], s + i * kRows16, add);
    wgmma_columns(sums.XS, x[i], s + i * kRows16, add);
    wgmma_columns(sums.EdS, e[i], ds + i * kRows16, add);
    wgmma_commit_group();
  }
  // A thread takes vectors kConsumerThreads apart: their rows are in column groups warpgroup and warpgroup +
  // 2.
#pragma unroll
  for (int i = 0; i < 2 * kTiles; i++) {
    const unsigned char* at = states + 16 * (threadIdx.x + i * kConsumerThreads);
    const float dot = dot_of_vectors(*reinterpret_cast<const uint4*>(at),
                                     *reinterpret_cast<const uint4*>(at + kTiles * kTileBytes));
    states_dot += (warpgroup == 0 ? factors[i % 2 * 2] : factors[i % 2 * 2 + 1]) * dot;
  }
  wgmma_wait_group<0>();
  wgmma_fence_sums(sums), wgmma_fence_operand(d_o), wgmma_fence_operand(x), wgmma_fence_operand(e),
      wgmma_fence_operand(score_fragments);
}

// Converts q and k to fp16 in place, each thread a part.
template <int kTiles>
__device__ inline void keys_to_fp16(unsigned char* keys) {
#pragma unroll
  for (int i = 0; i < 2 * kTiles * kTileBytes / 16 / kConsumerThreads; i++)
    to_fp16(keys + 16 * (threadIdx.x + i * kConsumerThreads), 1.f);
  fence_proxy_async();
}

// A warpgroup's columns of q and k, which dq and dk replace at the end, in a slice of dk: a tile, or half of
// one.
template <int kTiles, int kPassTiles>
struct OwnColumns {
  unsigned char *q, *k;  // tiles
  int first_16;          // 16 columns in there
  __device__ OwnColumns(unsigned char* keys, int pass, int warpgroup)
      : q(keys + (kPassTiles == 2 ? 2 * pass + warpgroup : 0) * kTileBytes),
        k(q + kTiles * kTileBytes),
        first_16(kPassTiles == 2 ? 0 : 2 * warpgroup) {}
  __device__ uint64_t descriptor(const unsigned char* tile) const {
    return make_smem_desc(tile) + first_16 * kColumns16;
  }
};

// Gradients through S_0 and dS_C, the first terms of (G3) and (G4): scales d_oS to scale*dq and XS to
// scale*dk in place, and leaves q.dq, k.dk for dg. `more`: adds them to those of an earlier slice of dk.
template <int kTiles, int kPassTiles>
__device__ inline void inter_chunk_gradients(Sm90GradientSums<4 * kPassTiles>& sums, DgSumsSm90& dg_sums,
                                             const OwnColumns<kTiles, kPassTiles>& own,
                                             const LaneRow& lane_row, const HeadChunk& head,
                                             const WarpTile& tile, bool more) {
  const float* gates = head.gates;
  const float s = head.s, scale = head.scale;
  const int m_tile = tile.m_tile, warpgroup = tile.n_split;
  const int lane = threadIdx.x % 32, row = 16 * m_tile + lane / 4;
  float d_o_factor[2], x_factor[2], e_factor[2], reads[2] = {}, writes[2] = {};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float beta = gates[kBeta * kChunk + row + 8 * e];
    const float from_start = scale * gates[kDecayFromStart * kChunk + row + 8 * e];
    d_o_factor[e] = s * from_start;
    x_factor[e] = -beta * from_start;
    e_factor[e] = beta * (scale * gates[kDecayToEnd * kChunk + row + 8 * e]);
  }
#pragma unroll
  for (int t = 0; t < 2 * kPassTiles; t++) {  // 16 columns
    uint32_t q_words[4], k_words[4];
    ldmatrix(q_words, shared_address(own.q) + lane_row(own.first_16 + t));
    ldmatrix(k_words, shared_address(own.k) + lane_row(own.first_16 + t));
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float2 q_i = unpack_fp16(q_words[2 * half + e]), k_i = unpack_fp16(k_words[2 * half + e]);
        float *dq = &sums.d_oS[2 * t + half][2 * e], *dk = &sums.XS[2 * t + half][2 * e];
        const float* end = &sums.EdS[2 * t + half][2 * e];
        const float end_x = e_factor[e] * end[0], end_y = e_factor[e] * end[1];
        dq[0] *= d_o_factor[e];
        dq[1] *= d_o_factor[e];
        dk[0] *= x_factor[e];
        dk[1] *= x_factor[e];
        reads[e] += q_i.x * dq[0] + q_i.y * dq[1] + k_i.x * dk[0] + k_i.y * dk[1];
        writes[e] += k_i.x * end_x + k_i.y * end_y;
        dk[0] += end_x;
        dk[1] += end_y;
      }
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    reads[e] = sum_of_quad(reads[e]);
    writes[e] = sum_of_quad(writes[e]);
    if (lane % 4 == 0) {
      float &read = dg_sums.reads[warpgroup][row + 8 * e], &write = dg_sums.writes[warpgroup][row + 8 * e];
      read = more ? read + reads[e] : reads[e];
      write = more ? write + writes[e] : writes[e];
    }
  }
}

// Halves the number of sums per lane: lanes 2 kHalf apart exchange, each keeps one half of x.
template <int kHalf>
__device__ inline void add_halves(float (&x)[16]) {
  const bool upper = threadIdx.x & (2 * kHalf);
#pragma unroll
  for (int i = 0; i < kHalf; i++) {
    const float low = x[i], high = x[i + kHalf];
    x[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 2 * kHalf);
  }
}

// Sums over the eight lanes 4 g + c of each c: lane 4 g + c returns the sums of x[2 g] and x[2 g + 1].
__device__ inline float2 sums_of_columns(float (&x)[16]) {
  add_halves<8>(x);
  add_halves<4>(x);
  add_halves<2>(x);
  return make_float2(x[0], x[1]);
}

// (G1), (G2) and the sums of M for (G5). Warpgroup 0, from dO E^T and q k^T: scale*dqk. Warpgroup 1, from X
// E^T and k k^T: scale*dkk, dbeta. Stored to score_gradient, blocks on and below the diagonal only. The sums
// of M leave out i = j, where the row's and the column's share of dG cancel.
template <int kColumnTiles>
__device__ inline void intra_chunk_gradients(unsigned char* score_gradient, DgSumsSm90& dg_sums,
                                             const HeadChunk& head,
                                             const Sm90GradientSums<kColumnTiles>& sums,
                                             const float (&products)[8][4], const LaneRow& lane_row,
                                             const WarpTile& tile) {
  const int m_tile = tile.m_tile, warpgroup = tile.n_split, n = head.n;
  const float* gates = head.gates;
  const float s = head.s, scale = head.scale, unit = head.unit;
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4), row = 16 * m_tile + g;
  const float *beta = gates + kBeta * kChunk, *G = gates + kCumulativeLogDecay * kChunk;
  const float G_i[2] = {G[row], G[row + 8]};
  const float coefficient[2] = {warpgroup == 0 ? s : -beta[row], warpgroup == 0 ? s : -beta[row + 8]};
  float row_sum[2] = {}, column_sum[16] = {};
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {  // 16 columns
    if (pair <= m_tile) {
      float x[2][4];
#pragma unroll
      for (int t = 0; t < 2; t++) {
        const int first = 16 * pair + 8 * t + c;
        const float2 beta_j = *reinterpret_cast<const float2*>(beta + first);
        const float2 G_j = *reinterpret_cast<const float2*>(G + first);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int i = row + 8 * (e / 2), j = first + e % 2;
          const float value = sums.scores[2 * pair + t][e];
          const float decay = scale * expf(fminf(G_i[e / 2] - (e % 2 ? G_j.y : G_j.x), 0.f));
          const bool inside = i > j || (i == j && warpgroup == 0);
          x[t][e] = inside ? coefficient[e / 2] * (e % 2 ? beta_j.y : beta_j.x) * decay * value : 0.f;
          if (i == j && warpgroup == 1 && i < n) head.dbeta[int64_t(i) * head.stride] = unit * value;
          const float M = i > j ? x[t][e] * products[2 * pair + t][e] : 0.f;
          row_sum[e / 2] += M;
          column_sum[4 * pair + 2 * t + e % 2] += M;
        }
      }
      uint32_t words[4];
      pack_a_fragment(words, x[0], x[1]);
      stmatrix(shared_address(score_gradient) + lane_row(pair), words);
    }
  }
  *reinterpret_cast<float2*>(&dg_sums.columns[4 * warpgroup + m_tile][8 * g + c]) =
      sums_of_columns(column_sum);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float sum = sum_of_quad(row_sum[e]);
    if (lane % 4 == 0) dg_sums.rows[warpgroup][row + 8 * e] = sum;
  }
}

// Issues the intra-chunk terms of (G3) and (G4), a warpgroup's columns: dq += dqk K, dk += dqk^T Q + (dkk +
// dkk^T) K.
template <int kTiles, int kPassTiles>
__device__ inline void start_intra_chunk_products(Sm90GradientSums<4 * kPassTiles>& sums,
                                                  const unsigned char* score_gradients,
                                                  const OwnColumns<kTiles, kPassTiles>& own) {
  const uint64_t dqk = make_smem_desc(score_gradients), dkk = dqk + kNextTile;
  const uint64_t q = own.descriptor(own.q), k = own.descriptor(own.k);
  wgmma_fence_operand(sums.d_oS), wgmma_fence_operand(sums.XS);
  wgmma_fence();
#pragma unroll
  for (int p = 0; p < 4; p++) {  // 16 tokens to sum over
    wgmma_columns_shared<kMajorK>(sums.d_oS, dqk + p * kColumns16, k + p * kRows16);
    wgmma_columns_shared<kMajorMN>(sums.XS, dqk + p * kRows16, q + p * kRows16);
    wgmma_columns_shared<kMajorK>(sums.XS, dkk + p * kColumns16, k + p * kRows16);
    wgmma_columns_shared<kMajorMN>(sums.XS, dkk + p * kRows16, k + p * kRows16);
  }
  wgmma_commit_group();
}

// (G5) of the sums that the warps left.
__device__ inline void finish_dg(const HeadChunk& head, const DgSumsSm90& dg_sums) {
  const int lane = threadIdx.x % 32;
  const auto both = [&](const float* x) { return *reinterpret_cast<const float2*>(x + 2 * lane); };
  float2 from = both(dg_sums.rows[0]), before = both(dg_sums.writes[0]);
  const auto add = [](float2& sum, float2 x, float sign) { sum.x += sign * x.x, sum.y += sign * x.y; };
  add(from, both(dg_sums.rows[1]), 1.f);
#pragma unroll
  for (int i = 0; i < 8; i++) add(from, both(dg_sums.columns[i]), -1.f);
  add(from, both(dg_sums.reads[0]), 1.f);
  add(from, both(dg_sums.reads[1]), 1.f);
  add(before, both(dg_sums.writes[1]), 1.f);
  float states = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) states += dg_sums.states[i];
  finish_dg(head, from, before, states, false);
}

// x += the group_sums sum, which becomes that, unless this head is the group's last; its last tile is in
// `last_tile`.
template <int kColumnTiles>
__device__ inline void accumulate_over_group(unsigned char* group_sums, float (&last_tile)[4],
                                             Sm90GradientSums<kColumnTiles>& sums, bool first, bool last) {
#pragma unroll
  for (int t = 0; t < 2 * kColumnTiles; t++) {
    float(&x)[4] = t < kColumnTiles ? sums.d_oS[t] : sums.XS[t - kColumnTiles];
    if (t == 2 * kColumnTiles - 1) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (!first) x[e] += last_tile[e];
        last_tile[e] = x[e];
      }
      continue;
    }
    float4* at = reinterpret_cast<float4*>(group_sums) + t * kConsumerThreads + threadIdx.x;
    if (!first) {
      const float4 y = *at;
      x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
    }
    if (!last) *at = make_float4(x[0], x[1], x[2], x[3]);
  }
}

// Writes a warpgroup's columns as bf16 to their tile, from its first_16-th 16 columns on.
template <int kColumnTiles>
__device__ inline void stage_columns(unsigned char* tile, const LaneRow& lane_row, int first_16,
                                     const float (&x)[kColumnTiles][4]) {
#pragma unroll
  for (int t = 0; t < kColumnTiles / 2; t++) {
    const float(&left)[4] = x[2 * t];
    const float(&right)[4] = x[2 * t + 1];
    const uint32_t words[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                               pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
    stmatrix(shared_address(tile) + lane_row(first_16 + t), words);
  }
}

// (G1)-(G5) for work tiles; persistent, a CTA takes tiles gridDim.x apart.
//
// Lower bound: see gradients_kernel. H200 (dev/results/delta_rule_speed): 0.255 ms at B=32, T=1024, H=6,
// (128, 256); 0.968 with 16/32 heads of 128, B=8, T=4096. At (32, 64) a work tile is a single step and its
// epilogue: 0.112 ms.
template <int kTiles, bool kGrouped>
__global__ void __launch_bounds__(kGradientThreads, 1)
    gradients_sm90_kernel(const __grid_constant__ GradientTensors tensors, float* dg, float* dbeta,
                          GateInputs in, Sizes size, int work_tiles, float s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = GradientLayout<kTiles, kGrouped>;
  extern __shared__ __align__(1024) unsigned char tiles[];
  unsigned char *keys = tiles + Layout::kKeys, *score_gradients = tiles + Layout::kScoreGradients;
  unsigned char* group_sums = tiles + Layout::kGroupSums;
  HeadTileBuffer* head_tiles = reinterpret_cast<HeadTileBuffer*>(tiles + Layout::kHeadTilesAt);
  DgSumsSm90& dg_sums = *reinterpret_cast<DgSumsSm90*>(tiles + Layout::kSums);
  GradientBarriers& barriers = *reinterpret_cast<GradientBarriers*>(tiles + Layout::kBarriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::kStages; i++) {
      mbarrier_init(&barriers.full[i], 1);
      mbarrier_init(&barriers.empty[i], kConsumerThreads / 32);
    }
    for (int i = 0; i < 2; i++) {
      mbarrier_init(&barriers.head_tile_full[i], 1);
      mbarrier_init(&barriers.head_tile_empty[i], kConsumerThreads);
    }
    mbarrier_init(&barriers.keys_full, 1);
    mbarrier_init(&barriers.keys_empty, 1);
    fence_mbarrier_init();
  }
  clear_shared(score_gradients, 2 * kTileBytes);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x >= kConsumerThreads) {
    warpgroup_reg_dealloc<kGradientProducerRegisters>();
    if (threadIdx.x == kConsumerThreads)
      gradients_producer_loop<kTiles, kGrouped>(tiles, barriers, head_tiles, tensors, in, size, work_tiles);
  } else {
    warpgroup_reg_alloc<kGradientConsumerRegisters>();

    const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), warpgroup = warp / 4, m_tile = warp % 4;
    const int lane = threadIdx.x % 32, groups = size.dv / 16;
    const int group = kGrouped ? size.value_heads_per_key : 1;
    const LaneRow lane_row(m_tile);
    const WarpTile tile = {m_tile, warpgroup};
    int stage = 0, parity = 0, head_tile_count = 0, keys_parity = 0;
    for (int work_tile = blockIdx.x; work_tile < work_tiles; work_tile += gridDim.x) {
      const WorkTile at(work_tile, size);
      const int n = size.rows_in(at.chunk);
      float last_tile[4] = {};
      for (int head = 0; head < group; head++, head_tile_count++) {
        const HeadTileBuffer& head_tile = head_tiles[head_tile_count % 2];
        mbarrier_wait(&barriers.head_tile_full[head_tile_count % 2], head_tile_count / 2 % 2);
        const int a = lane < groups ? head_tile.exponents[lane] : 0;
        const int both = lane < groups ? a + head_tile.d_exponents[lane] : 1 << 20;
        const int c = __reduce_min_sync(~0u, both);
        const float d_o_unit = small_power_of_two(c - a), x_unit = small_power_of_two(c - both);
        const int value_head = at.key_head * group + head;
        const int64_t head_row = size.first_row(at.sequence, at.chunk) * size.heads_v + value_head;
        float states = 0.f;
        for (int pass = 0; pass < Layout::kPasses; pass++) {
          const bool last_pass = pass == Layout::kPasses - 1;
          const OwnColumns<kTiles, Layout::kPassTiles> own(keys, pass, warpgroup);
          Sm90GradientSums<Layout::kColumnTiles> sums;
          for (int e = 0; e < groups; e += 4) {
            mbarrier_wait(&barriers.full[stage], parity);
            add_step<Layout::kPassTiles>(sums, states, tiles + stage * Layout::kStageBytes, lane_row,
                                         warpgroup, e, d_o_unit, x_unit);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&barriers.empty[stage]);
            if (++stage == Layout::kStages) stage = 0, parity ^= 1;
          }
          if (pass == 0) {
            float largest = 0.f;
#pragma unroll
            for (int t = 0; t < 8; t++) largest = largest_of(sums.scores[t], largest);
            const uint32_t bits =
                __reduce_max_sync(~0u, __float_as_uint((warpgroup == 0 ? 2 * s : 4.f) * largest));
            if (lane == 0) dg_sums.largest[warp] = __uint_as_float(bits);
            if (head == 0) {
              mbarrier_wait(&barriers.keys_full, keys_parity);
              keys_parity ^= 1;
              keys_to_fp16<kTiles>(keys);
            }
            consumers_sync();
          }
          if (last_pass) {
            float sum = states;
#pragma unroll
            for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (lane == 0) dg_sums.states[warp] = sum;
          }
          const SumScales units(dg_sums, c);
          const HeadChunk value_chunk = {n, head_tile.gates, dg + head_row,    dbeta + head_row, size.heads_v,
                                         s, units.scale,     power_of_two(-c), units.result};
          if (pass == 0) {
            float products[8][4];  // q k^T or k k^T
            const uint64_t k = make_smem_desc(keys + kTiles * kTileBytes);
            const uint64_t rows = warpgroup == 0 ? make_smem_desc(keys) : k;
            wgmma_fence_operand(products);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4 * kTiles; i++)
              wgmma_64_shared<kMajorK, kMajorK>(products, rows + columns_16(i), k + columns_16(i), i > 0);
            wgmma_commit_group();
            inter_chunk_gradients(sums, dg_sums, own, lane_row, value_chunk, tile, false);
            wgmma_wait_group<0>();
            wgmma_fence_operand(products);
            intra_chunk_gradients(score_gradients + warpgroup * kTileBytes, dg_sums, value_chunk, sums,
                                  products, lane_row, tile);
            fence_proxy_async();
          } else {
            inter_chunk_gradients(sums, dg_sums, own, lane_row, value_chunk, tile, true);
          }
          consumers_sync();

          start_intra_chunk_products(sums, score_gradients, own);
          if (last_pass) {
            if (warp == 0) finish_dg(value_chunk, dg_sums);
            mbarrier_arrive(&barriers.head_tile_empty[head_tile_count % 2]);
          }
          wgmma_wait_group<0>();
          wgmma_fence_operand(sums.d_oS), wgmma_fence_operand(sums.XS);
          scale_tiles(sums.d_oS, units.result);
          scale_tiles(sums.XS, units.result);
          if (kGrouped) accumulate_over_group(group_sums, last_tile, sums, head == 0, head == group - 1);
          if (head == group - 1) {
            consumers_sync();  // all are done with these columns of q and k
            stage_columns(own.q, lane_row, own.first_16, sums.d_oS);
            stage_columns(own.k, lane_row, own.first_16, sums.XS);
            fence_proxy_async();
          }
        }
        if (head == group - 1) {
          consumers_sync();
          if (threadIdx.x == 0) {
#pragma unroll
            for (int t = 0; t < 2 * kTiles; t++)
              tma_store_4d(t < kTiles ? &tensors.dq : &tensors.dk, t % kTiles * 64, at.key_head,
                           at.chunk * kChunk, at.sequence, keys + t * kTileBytes);
            tma_store_wait_read();
            mbarrier_arrive(&barriers.keys_empty);
          }
        }
      }
    }
  }
#endif
}

}  // namespace delta_rule
}  // namespace gdn
