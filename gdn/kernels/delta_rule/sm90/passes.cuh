// The two sequential kernels on Hopper (wgmma, sm_90a): (F1)-(F4) forward, (B1)-(B3) backward
// (dev/doc/delta_rule.md). Equations, scale factors, operands and results are those of the mma.sync kernels.
//
// A consumer warpgroup owns 64 columns of dv, each of its warps 16: the 64 rows (M) of every wgmma, whose A
// operand is in registers. B operands (K, Q, N, P) are read from shared memory once a warpgroup, not once a
// warp, and asynchronously: meanwhile the warps copy, pack and store.
//
// One copy of K serves both K S, as K-major operand, and the update K^T E, as MN-major operand
// (sm90/tiles.cuh).
//
// Columns of Q and K are permuted within every 32: position 8 j + 2 c + b holds column 8 c + 2 j + b.
// Products over dk do not depend on the order of columns, and a lane then holds 8 contiguous columns of a row
// of the state, which it stores as 16 bytes. The permutation costs nothing: the conversion to fp16 does it by
// the choice of registers.
//
// Lower bound of either at B=32, T=1024, H=6, dk=128, dv=256: 0.63 GB; 52 GFLOP. H200, forward and backward
// pass (dev/results/delta_rule_speed): 0.206 and 0.207 ms; with 16/32 heads of 128, B=8, T=4096, 0.538
// and 0.571. Limit: the critical path of a chunk. By ncu with 16/32 heads and nothing saved: issue slots 41%
// busy, no eligible warp in 57% of the cycles, L1 64%, L2 64%, DRAM 47%; of the consumers' samples 18% are
// between the first wgmma and N's, half of these waiting for shared memory, and 12% wait for wgmma.
#pragma once

#include <type_traits>

#include "../pass_common.cuh"
#include "tiles.cuh"

namespace gdn {
namespace delta_rule {

// One stage of the pipeline: swizzled tiles of q, k (arrive as bf16, converted to fp16 in place), N and P;
// the [64, 64 groups + 8] tile `values` (V or dO, and staging for results); gates [4,64]. Without q (kWithQ
// false): neither q nor P.
template <int DK, int kGroups, bool kWithQ = true>
struct Sm90Stage {
  static_assert(kWithQ || kGroups == 1, "a warpgroup each copies q and k");
  static constexpr int kThreads = 128 * kGroups, kKeyTiles = (DK + kTileRow - 1) / kTileRow;
  static constexpr int kValuesStride = 64 * kGroups + 8, kPairs = kWithQ ? 2 : 1;
  static constexpr int kMatrices = kPairs * kKeyTiles * kTileBytes, kValues = kMatrices + kPairs * kTileBytes;
  static constexpr int kGatesAt = kValues + 2 * kChunk * kValuesStride, kBytes = kGatesAt + 4 * kGates;
  static_assert(kBytes % 1024 == 0, "tiles are aligned to eight rows");
  static_assert(kBytes == sm90_stage_bytes(DK, kGroups, kWithQ), "as schedule.h counts them");

  unsigned char* at;
  int index;

  __device__ Sm90Stage(unsigned char* shared, int i) : at(shared + i * kBytes), index(i) {}
  __device__ unsigned char* keys(int which) const { return at + which * kKeyTiles * kTileBytes; }
  __device__ unsigned char* q() const { return keys(0); }
  __device__ unsigned char* k() const { return keys(kPairs - 1); }
  __device__ unsigned char* n() const { return at + kMatrices; }
  __device__ unsigned char* p() const { return n() + kTileBytes; }
  __device__ act* values() const { return reinterpret_cast<act*>(at + kValues); }
  __device__ float* gates() const { return reinterpret_cast<float*>(at + kGatesAt); }
};

// f(width, which, tile) for each tile of q and k of which this warp loads rows. With one load warpgroup that
// is every tile of both; with two, the tiles of the warpgroup's own (which = 0: q, 1: k). The warp has 16
// rows of the tile, `width` columns (64, or 32 in the last).
template <int DK, int kLoadWarpgroups, bool kWithQ, class F>
__device__ inline void for_each_key_tile_of_warp(int thread, const F& f) {
#pragma unroll
  for (int i = 0; i < (kWithQ ? 2 : 1) / kLoadWarpgroups; i++) {
    const int which = kLoadWarpgroups == 2 ? thread / 128 : i;
#pragma unroll
    for (int tile = 0; tile < DK / 64; tile++) f(std::integral_constant<int, 64>(), which, tile);
    if (DK % 64 != 0) f(std::integral_constant<int, 32>(), which, DK / 64);
  }
}

// kLoadWarpgroups warpgroups, this thread's index among them `thread`, issue cp.async of a chunk's inputs.
template <int DK, int kGroups, bool kWithQ, int kLoadWarpgroups>
__device__ inline void copy_chunk(const Sm90Stage<DK, kGroups, kWithQ>& stage, const PassInputs& in,
                                  const PassBlock& block, const Sizes& size, int chunk,
                                  std::integral_constant<int, kLoadWarpgroups>) {
  using Stage = Sm90Stage<DK, kGroups, kWithQ>;
  const int64_t row = size.first_row(block.b, chunk), number = size.chunk_number(block.b, block.h, chunk);
  const int thread = reload_thread_idx() & (128 * kLoadWarpgroups - 1), lane = thread % 32,
            first = 16 * (thread / 32 % 4), n = size.rows_in(chunk);
  // q and k from this warp's first row on: with two load warpgroups one of the two
  constexpr int kKeys = kWithQ && kLoadWarpgroups == 1 ? 2 : 1;
  const act* keys[kKeys];
  int key_steps[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; i++) {
    const bool of_q = kWithQ && (kLoadWarpgroups == 2 ? thread < 128 : i == 0);
    key_steps[i] = of_q ? in.q.row_stride : in.k.row_stride;
    keys[i] = (of_q ? in.q.head(block.hk) : in.k.head(block.hk)) + (row + first) * key_steps[i];
    keep(keys[i]), keep(key_steps[i]);
  }
  int values_step = in.values.row_stride;
  keep(values_step);
  const auto copy = [&](auto all) {  // 64 rows, or n of them and zeros
    constexpr bool whole = decltype(all)::value;
    for_each_key_tile_of_warp<DK, kLoadWarpgroups, kWithQ>(thread, [&](auto width, int which, int tile) {
      constexpr int kVectors = decltype(width)::value / 8, kRows = 32 / kVectors;
      const int r = lane / kVectors, vector = lane % kVectors, column = 64 * tile + 8 * vector;
      const int step = key_steps[kKeys == 2 ? which : 0];
      const act* from = advance_rows(keys[kKeys == 2 ? which : 0], r, step) + column;
      unsigned char* to = stage.keys(which) + tile * kTileBytes + 2 * kTileRow * first;
      const int at = swizzled(r, vector);
      const bool valid = column < size.dk;
#pragma unroll
      for (int i = 0; i < 16; i += kRows)  // four rows on, the swizzle's third bit is the other
        cp_async_16(to + (at ^ i % 8 * 16) + 2 * kTileRow * i, advance_rows(from, i, step),
                    valid && (whole || first + r + i < n));
    });
    constexpr int kVectors = 8 * kGroups, kRows = 128 * kLoadWarpgroups / kVectors;
    const int r = thread / kVectors, column = 8 * (thread % kVectors);
    const bool valid = column < size.dv - block.first_column;
    const act* from = in.values.head(block.h) + (row + r) * values_step + block.first_column + column;
    act* to = stage.values() + r * Stage::kValuesStride + column;
#pragma unroll
    for (int i = 0; i < kChunk; i += kRows)
      cp_async_16(to + i * Stage::kValuesStride, advance_rows(from, i, values_step),
                  valid && (whole || r + i < n));
  };
  if (n == kChunk)
    copy(std::true_type());
  else
    copy(std::false_type());
  {
    const int r = thread / 8, vector = thread % 8;
    const __half* from = in.matrices + number * 2 * kMatrixElements + r * kChunk + 8 * vector;
    unsigned char* to = stage.n() + swizzled(r, vector);
    keep(from), keep(to);
#pragma unroll
    for (int i = 0; i < kChunk; i += 16 * kLoadWarpgroups) {
      if (vector / 2 > (r + i) / 16) continue;  // above the diagonal, where the tiles stay zero
      cp_async_16(to + 2 * kTileRow * i, from + i * kChunk, true);
      if (kWithQ) cp_async_16(to + 2 * kTileRow * i + kTileBytes, from + i * kChunk + kMatrixElements, true);
    }
  }
  if (thread < kGates / 4)
    cp_async_16(stage.gates() + 4 * thread, in.gates + number * kGates + 4 * thread, true);
  cp_async_commit();
}

// copy_chunk by all warpgroups of a block without a producer.
template <int DK, int kGroups, bool kWithQ>
__device__ inline void copy_chunk(const Sm90Stage<DK, kGroups, kWithQ>& stage, const PassInputs& in,
                                  const PassBlock& block, const Sizes& size, int chunk) {
  copy_chunk(stage, in, block, size, chunk, std::integral_constant<int, kGroups>());
}

// The first row of a chunk of the CTA's value head; computed anew, as above.
template <class T>
__device__ inline T* chunk_of_head(const HeadRows<T>& x, const PassBlock& block, const Sizes& size,
                                   int chunk) {
  int h = block.h, b = block.b, step = x.row_stride;
  keep(h), keep(b), keep(step);
  return x.head(h) + size.first_row(b, chunk) * step;
}

// Converts 32 contiguous columns (four vectors of eight bf16) to fp16 in permuted order.
__device__ inline void permuted_to_fp16(uint4 (&x)[4]) {
  uint32_t w[4][4];
#pragma unroll
  for (int c = 0; c < 4; c++) {
    const uint32_t in[4] = {x[c].x, x[c].y, x[c].z, x[c].w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 y = unpack_bf16(in[j]);
      w[j][c] = pack_fp16(y.x, y.y);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j++) x[j] = make_uint4(w[j][0], w[j][1], w[j][2], w[j][3]);
}

// Converts the rows of q and k that this warp copied to fp16. Visible to the block's wgmma after the next
// barrier.
template <int DK, int kGroups, bool kWithQ, int kLoadWarpgroups>
__device__ inline void convert_chunk(const Sm90Stage<DK, kGroups, kWithQ>& stage,
                                     std::integral_constant<int, kLoadWarpgroups>) {
  __syncwarp();
  const int thread = reload_thread_idx() & (128 * kLoadWarpgroups - 1), lane = thread % 32,
            first = 16 * (thread / 32 % 4);
  for_each_key_tile_of_warp<DK, kLoadWarpgroups, kWithQ>(thread, [&](auto width, int which, int tile) {
    constexpr int kParts = decltype(width)::value / 32;  // of 32 columns
    const int r = lane / kParts, vector = 4 * (lane % kParts);
    if (r >= 16) return;
    unsigned char* tile_at = stage.keys(which) + tile * kTileBytes;
    const int at = swizzled(first + r, vector);
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = *reinterpret_cast<const uint4*>(tile_at + (at ^ 16 * i));
    permuted_to_fp16(x);
#pragma unroll
    for (int i = 0; i < 4; i++) *reinterpret_cast<uint4*>(tile_at + (at ^ 16 * i)) = x[i];
  });
  fence_proxy_async();
}

// Waits for this thread's cp.async of a chunk, then convert_chunk: in a block without a producer, where the
// forward overlaps it with the wgmma that end the previous chunk.
template <int DK, int kGroups, bool kWithQ>
__device__ inline void wait_and_convert_chunk(const Sm90Stage<DK, kGroups, kWithQ>& stage) {
  cp_async_wait_all();
  convert_chunk(stage, std::integral_constant<int, kGroups>());
}

// ---- warp specialization
//
// At dk 96 and 128 (schedule.h) a producer warpgroup prefetches inputs up to two chunks ahead into a ring of
// 3 stages and stores the outputs staged in `values`; the consumer warpgroups do only the chunk's wgmma
// chain, which is the critical path.

// Named barriers. kStageFull + stage, per consumer warpgroup: inputs have arrived. kStageEmpty + stage: the
// stage may be refilled. kRescaleVote + warpgroup: does any warp have to rescale its state?
enum NamedBarrier { kStageFull = 1, kStageEmpty = 7, kRescaleVote = 10 };

// The producer warpgroup. copy(i, stage) issues the loads of the i-th chunk of the pass, write(i, stage)
// stores its results.
template <int DK, int kGroups, class Copy, class Write>
__device__ inline void producer_loop(unsigned char* tiles, int chunks, const Copy& copy, const Write& write) {
  using Stage = Sm90Stage<DK, kGroups>;
  constexpr PassSchedule kSchedule = pass_schedule(DK, kGroups);
  constexpr int kStages = kSchedule.stages, kThreads = kSchedule.threads();
  constexpr auto kLoadWarpgroups = std::integral_constant<int, 1>();
  int now = 0, before = kStages - 1;  // stages
  for (int i = 0; i < chunks + kStages; i++) {
    if (i >= kStages) {
      named_barrier_sync(kStageEmpty + now, kThreads);
      write(i - kStages, Stage(tiles, now));
    }
    if (i < chunks) copy(i, Stage(tiles, now));
    if (i > 0 && i <= chunks) {
      if (i < chunks)
        cp_async_wait_all_but_one();
      else
        cp_async_wait_all();
      convert_chunk(Stage(tiles, before), kLoadWarpgroups);
      for (int group = 0; group < kGroups; group++)
        named_barrier_arrive(kStageFull + kStages * group + before, 256);
    }
    before = now;
    now = now + 1 < kStages ? now + 1 : 0;
  }
}

// Second consumer warpgroup when dv/64 is odd: it has no columns and only arrives at the barriers.
template <int DK, int kGroups>
__device__ inline void idle_consumer(int chunks) {
  constexpr PassSchedule kSchedule = pass_schedule(DK, kGroups);
  constexpr int kStages = kSchedule.stages;
  for (int i = 0, now = 0; i < chunks; i++) {
    named_barrier_sync(kStageFull + kStages * (int(threadIdx.x) / 128) + now, 256);
    named_barrier_arrive(kStageEmpty + now, kSchedule.threads());
    now = now + 1 < kStages ? now + 1 : 0;
  }
}

// The producer stores a chunk's results, staged as rows of tokens: n rows, `columns` columns, to rows of
// `to`.
template <int DK, int kGroups>
__device__ inline void write_results(act* to, int64_t stride, int n, int columns,
                                     const Sm90Stage<DK, kGroups>& stage) {
  constexpr int kVectors = 8 * kGroups, kRows = 128 / kVectors;
  const int thread = reload_thread_idx() & 127, r = thread / kVectors, column = 8 * (thread % kVectors);
  if (column >= columns) return;
  const act* from = stage.values() + r * stage.kValuesStride + column;
  to += r * stride + column;
  const int step = int(stride);
  const auto write = [&](auto all) {
#pragma unroll
    for (int i = 0; i < kChunk; i += kRows)
      if (decltype(all)::value || r + i < n)
        *reinterpret_cast<uint4*>(advance_rows(to, i, step)) =
            *reinterpret_cast<const uint4*>(from + i * stage.kValuesStride);
  };
  if (n == kChunk)
    write(std::true_type());
  else
    write(std::false_type());
}

// Stores the state's A fragments `first` to `end` (both even), in permuted column order, to the warp's rows
// [16 of dv, dk]: a lane 8 columns of each 32.
template <int DK>
__device__ inline void store_state_fragments(__half* to, int dk, const uint32_t (&fragments)[DK / 16][4],
                                             int first, int end) {
  const int lane = threadIdx.x % 32, column = 8 * (lane % 4);
  to += lane / 4 * dk + column;
#pragma unroll
  for (int i = first; i < end; i += 2) {
    if (16 * i + column >= dk) continue;
    const uint32_t(&left)[4] = fragments[i], (&right)[4] = fragments[i + 1];
#pragma unroll
    for (int half = 0; half < 2; half++)
      st_global_v4(advance_rows(to, 8 * half, dk) + 16 * i, left[half], left[half + 2], right[half],
                   right[half + 2]);
  }
}

// The state's A fragments all fit in registers beside the state. Then the largest magnitude is taken from the
// packed fragments, at half the instructions.
__device__ constexpr bool all_fragments_fit(int DK) { return pass_schedule(DK, 1).fragments_fit; }

template <int DK>
__device__ inline void pack_state_fragments(uint32_t (&fragments)[DK / 16][4],
                                            const float (&state)[DK / 8][4]) {
#pragma unroll
  for (int i = 0; i < DK / 16; i++) pack_a_fragment(fragments[i], state[2 * i], state[2 * i + 1]);
}

// Largest magnitude among the state's A fragments `first` to `end`; infinity where one overflowed fp16.
template <int DK>
__device__ inline float largest_of_fragments(const uint32_t (&fragments)[DK / 16][4], int first, int end) {
  __half2 high = __float2half2_rn(0.f), low = high;
#pragma unroll
  for (int i = first; i < end; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const __half2 x = *reinterpret_cast<const __half2*>(&fragments[i][e]);
      high = __hmax2(high, x), low = __hmin2(low, x);
    }
  const float2 largest = __half22float2(__hmax2(high, __hneg2(low)));
  return fmaxf(largest.x, largest.y);
}

// The warp's scale factor may stay as it is, judged by the packed fragments' largest magnitude. False if they
// are all 0.
__device__ inline bool scale_holds(float largest, float largest_value, int exponent) {
  const int e = scale_exponent(fmaxf(power_of_two(exponent) * largest_value, largest), exponent);
  return e == exponent && __any_sync(~0u, largest > 0);
}

// rescale_state and pack_state_fragments; packs first and rescales only if scale_holds says no.
template <int DK>
__device__ inline int rescale_and_pack_state(uint32_t (&fragments)[DK / 16][4], float (&state)[DK / 8][4],
                                             float largest_value, int exponent) {
  pack_state_fragments<DK>(fragments, state);
  const float largest = largest_of_fragments<DK>(fragments, 0, DK / 16);
  if (scale_holds(largest, largest_value, exponent)) return exponent;
  exponent = rescale_state<DK>(state, largest_value, exponent);
  pack_state_fragments<DK>(fragments, state);
  return exponent;
}

// Issues the wgmma that read the state [64 of dv, dk] at a chunk's start:
//   from_k [64,64 tokens] = state K^T      from_q [64,64 tokens] = state Q^T (kWithQ)
// fragments: the state's A fragments (packed here unless kAllFragmentsFit); stored to `to`, the warp's rows
// [16 of dv, dk], unless that is null. from_k is complete after wgmma_wait_group<1> (kWithQ) or <0>; from_q
// after <0>.
template <int DK, bool kWithQ, bool kAllFragmentsFit = all_fragments_fit(DK)>
__device__ inline void start_read_state(float (&from_k)[8][4], float (&from_q)[8][4],
                                        uint32_t (&fragments)[DK / 16][4], const float (&state)[DK / 8][4],
                                        uint64_t k, uint64_t q, __half* to, int dk) {
  constexpr int kAtOnce = kAllFragmentsFit ? DK / 16 : 4;  // else a tile
#pragma unroll
  for (int first = 0; first < DK / 16; first += kAtOnce) {
    const bool last = first + kAtOnce >= DK / 16;
    const int end = last ? DK / 16 : first + kAtOnce;
    if (!kAllFragmentsFit)
#pragma unroll
      for (int i = first; i < end; i++) pack_a_fragment(fragments[i], state[2 * i], state[2 * i + 1]);
    if (to) store_state_fragments<DK>(to, dk, fragments, first, end);
#pragma unroll
    for (int i = first; i < end; i++) wgmma_fence_operand(fragments[i]);
    wgmma_fence();
#pragma unroll
    for (int i = first; i < end; i++) wgmma_64<kMajorK>(from_k, fragments[i], k + columns_16(i), i > 0);
    if (last || !kWithQ) wgmma_commit_group();
    if (kWithQ) {
#pragma unroll
      for (int i = first; i < end; i++) wgmma_64<kMajorK>(from_q, fragments[i], q + columns_16(i), i > 0);
      wgmma_commit_group();
    }
    if (!last) wgmma_wait_group<1>();  // so that at most two tiles' operands take registers
  }
}

// Rescales the state at a chunk's start; packs its A fragments, too, where registers hold them all.
template <int DK>
__device__ inline int rescale_and_pack(uint32_t (&fragments)[DK / 16][4], float (&state)[DK / 8][4],
                                       float largest_value, int exponent) {
  if constexpr (all_fragments_fit(DK))
    return rescale_and_pack_state<DK>(fragments, state, largest_value, exponent);
  else
    return rescale_state<DK>(state, largest_value, exponent);
}

// Rescales the state and issues its reads, storing nothing. The wgmma start before the scale factor is known,
// and are issued once more if a warp of the warpgroup votes to rescale, which is rare after a sequence's
// first chunks. The last kBefore fragments are read for the vote before the wgmma start, the others after.
template <int DK, bool kWithQ, int kBefore = 0>
__device__ inline int start_read_state_rescaled(float (&from_k)[8][4], float (&from_q)[8][4],
                                                uint32_t (&fragments)[DK / 16][4], float (&state)[DK / 8][4],
                                                uint64_t k, uint64_t q, float largest_value, int exponent) {
  float largest = 0.f;
  const auto start = [&](bool first) {
    pack_state_fragments<DK>(fragments, state);
    if (first && kBefore > 0) largest = largest_of_fragments<DK>(fragments, DK / 16 - kBefore, DK / 16);
    start_read_state<DK, kWithQ>(from_k, from_q, fragments, state, k, q, nullptr, 0);
  };
  start(true);
  const float others = largest_of_fragments<DK>(fragments, 0, DK / 16 - kBefore);
  largest = kBefore > 0 ? fmaxf(largest, others) : others;
  const bool stays = scale_holds(largest, largest_value, exponent);
  if (named_barrier_any(kRescaleVote + int(threadIdx.x) / 128, 128, !stays)) {
    wgmma_wait_group<0>();
    wgmma_fence_operand(from_k), wgmma_fence_operand(from_q), wgmma_fence_operand(fragments);
    if (!stays) exponent = rescale_state<DK>(state, largest_value, exponent);
    start(false);
  }
  return exponent;
}

// Issues out [64,64 tokens] = fragments [64, dk] rows [64 tokens, dk]^T.
template <int DK>
__device__ inline void start_fragments_times_rows(float (&out)[8][4], const uint32_t (&fragments)[DK / 16][4],
                                                  uint64_t rows) {
#pragma unroll
  for (int i = 0; i < DK / 16; i++) wgmma_64<kMajorK>(out, fragments[i], rows + columns_16(i), i > 0);
}

// Issues state [64, dk] += kSign a [64, 64 tokens] rows [64 tokens, dk].
template <int DK, int kSign = 1>
__device__ inline void start_update_state(float (&state)[DK / 8][4], const uint32_t (&a)[4][4],
                                          uint64_t rows) {
#pragma unroll
  for (int tile = 0; tile < DK / 64; tile++)
#pragma unroll
    for (int p = 0; p < 4; p++)
      wgmma_64<kMajorMN, kSign>(state + 8 * tile, a[p], rows + tile * kNextTile + p * kRows16, 1);
  if (DK % 64 != 0)
#pragma unroll
    for (int p = 0; p < 4; p++)
      wgmma_32<kMajorMN, kSign>(state + DK / 64 * 8, a[p], rows + DK / 64 * kNextTile + p * kRows16, 1);
}

// Issues c [64, 64 tokens] += kSign a [64, 64 tokens] m^T (kMajorK) or a m (kMajorMN); m [64,64], one tile.
template <Major kMajor, int kSign = 1>
__device__ inline void start_times_matrix(float (&c)[8][4], const uint32_t (&a)[4][4], uint64_t m) {
#pragma unroll
  for (int p = 0; p < 4; p++)
    wgmma_64<kMajor, kSign>(c, a[p], m + p * (kMajor == kMajorK ? kColumns16 : kRows16), 1);
}

// A fragments of x [64, 64 tokens] times factor * gate.
__device__ inline void pack_scaled_a_fragments(uint32_t (&a)[4][4], const float (&x)[8][4], const float* gate,
                                               float factor) {
#pragma unroll
  for (int p = 0; p < 4; p++) pack_scaled_a_fragment(a[p], x[2 * p], x[2 * p + 1], gate, 16 * p, factor);
}

__device__ inline void pack_a_fragments(uint32_t (&a)[4][4], const float (&x)[8][4]) {
#pragma unroll
  for (int p = 0; p < 4; p++) pack_a_fragment(a[p], x[2 * p], x[2 * p + 1]);
}

// Loads the warp's 16 rows [dk] of a fp32 state, row 0 at `from`, into accumulators in permuted column order;
// zeros if `from` is null.
template <int DK>
__device__ inline void load_permuted_state(float (&state)[DK / 8][4], const float* from, int dk) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 8 * (lane % 4);
#pragma unroll
  for (int t = 0; t < DK / 8; t += 2)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int column = 8 * (t / 4 * 4) + c + 2 * (t % 4);  // of tile t; tile t + 1 has the two after
      const bool valid = from && column < dk;
      const float4 x = valid ? *reinterpret_cast<const float4*>(from + (g + 8 * half) * dk + column)
                             : make_float4(0.f, 0.f, 0.f, 0.f);
      state[t][2 * half] = x.x;
      state[t][2 * half + 1] = x.y;
      state[t + 1][2 * half] = x.z;
      state[t + 1][2 * half + 1] = x.w;
    }
}

// f(e, row, column) for the four accumulators of tile t: row of 16, column of dk after undoing the
// permutation.
template <class F>
__device__ inline void for_each_permuted(int t, const F& f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4; e++)
    f(e, lane / 4 + 8 * (e / 2), 32 * (t / 4) + 8 * (lane % 4) + 2 * (t % 4) + e % 2);
}

// Stores factor * state, permuted accumulators, to rows [16, dk] of `to`.
template <int DK>
__device__ inline void store_permuted_state(float* to, const float (&state)[DK / 8][4], float factor,
                                            int dk) {
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
    for_each_permuted(t, [&](int e, int row, int column) {
      if (column < dk) to[row * dk + column] = factor * state[t][e];
    });
}

// Zeroes N's and P's tiles in all stages: above the diagonal nothing is ever copied.
template <class Stage, int kStages = 2>
__device__ inline void clear_matrices(unsigned char* shared) {
  for (int i = 0; i < kStages; i++) clear_shared(Stage(shared, i).n(), Stage::kPairs * kTileBytes);
  __syncthreads();
}

// With kSchedule.overlap the state is stored in two parts, each during a wgmma: stores of all warps at once
// would fill the memory pipe for longer than one wgmma takes. Number of A fragments in the first of them,
// even.
__device__ constexpr int first_half_of_fragments(int DK) { return (DK / 16 + 3) / 4 * 2; }

template <int DK, int kGroups>
__global__ void __launch_bounds__(pass_schedule(DK, kGroups).threads(), pass_schedule(DK, kGroups).ctas)
    forward_pass_sm90_kernel(PassInputs in, HeadRows<act> o, Saved saved, Sizes size, Splits splits,
                             float s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Stage = Sm90Stage<DK, kGroups>;
  extern __shared__ __align__(1024) unsigned char tiles[];
  constexpr PassSchedule kSchedule = pass_schedule(DK, kGroups);
  constexpr int ld = Stage::kValuesStride, kStages = kSchedule.stages;
  constexpr bool kQWithK = kSchedule.q_with_k, kOverlap = kSchedule.overlap,
                 kHasProducer = kSchedule.producer;
  const PassBlock block = pass_block(size, splits, 0, splits.count, 4 * kGroups);
  const int warp = threadIdx.x / 32, column = block.first_column + 16 * warp;
  const bool active = column < size.dv;
  const int64_t stride = size.value_stride();
  clear_matrices<Stage, kStages>(tiles);
  if (kHasProducer && warp >= 4 * kGroups) {
    if (kGroups == 2) warpgroup_reg_dealloc<kSchedule.producer_registers>();
    producer_loop<DK, kGroups>(
        tiles, block.end_chunk - block.first_chunk,
        [&](int i, const Stage& stage) {
          copy_chunk(stage, in, block, size, block.first_chunk + i, std::integral_constant<int, 1>());
        },
        [&](int i, const Stage& stage) {
          const int chunk = block.first_chunk + i;
          write_results(o.head(block.h) + size.first_row(block.b, chunk) * o.row_stride + block.first_column,
                        o.row_stride, size.rows_in(chunk), size.dv - block.first_column, stage);
        });
    return;
  }
  if (kHasProducer && kGroups == 2) {
    if (block.first_column + 64 * (warp / 4) >= size.dv)
      return idle_consumer<DK, kGroups>(block.end_chunk - block.first_chunk);
    warpgroup_reg_alloc<kSchedule.consumer_registers>();
  }
  if (!kHasProducer) {
    copy_chunk(Stage(tiles, 0), in, block, size, block.first_chunk);
    wait_and_convert_chunk(Stage(tiles, 0));
  }

  float state[DK / 8][4] = {};
  if (active)
    if (const float* from = state_before(in, block, size, splits, block.split > 0, column))
      load_permuted_state<DK>(state, from, size.dk);
  int exponent = 0;  // of the state's unit, 2^exponent
  for (int chunk = block.first_chunk, now = 0; chunk < block.end_chunk; chunk++) {
    const Stage stage(tiles, now);
    now = now + 1 < kStages ? now + 1 : 0;  // the next's
    const int64_t number = size.chunk_number(block.b, block.h, chunk), row = size.first_row(block.b, chunk);
    const int64_t out = row * stride + block.h * size.dv + column;
    const int n = active ? size.rows_in(chunk) : 0;
    act* staging = stage.values() + 16 * warp;
    const uint32_t v_columns = lane_address_columns_first(staging, ld);
    if (kHasProducer)
      named_barrier_sync(kStageFull + kStages * (warp / 4) + stage.index, 256);
    else
      __syncthreads();

    uint32_t S[DK / 16][4];
    float E[8][4] = {}, O[8][4] = {};
    const bool saving = active && saved.states;
    __half* state_to = saving ? saved.states + (number * size.dv + column) * size.dk : nullptr;
    constexpr int kHalf = kOverlap ? first_half_of_fragments(DK) : 0;
    const float largest_value = largest_of_values(v_columns, ld);
    const uint64_t k_tiles = make_smem_desc(stage.k()), q_tiles = make_smem_desc(stage.q());
    if constexpr (kOverlap) {
      // Where the vote reads all fragments while wgmma read them, too, ptxas 13 copies two of the eight in
      // this case and issues their wgmma of Q S as a group of their own (C7519): waiting for K S is then
      // waiting for most of Q S.
      constexpr int kBefore = DK == 128 && kGroups == 1 ? 4 : 0;
      exponent = start_read_state_rescaled<DK, kQWithK, kBefore>(E, O, S, state, k_tiles, q_tiles,
                                                                 largest_value, exponent);
    } else {
      exponent = rescale_and_pack<DK>(S, state, largest_value, exponent);
      start_read_state<DK, kQWithK>(E, O, S, state, k_tiles, q_tiles, state_to, size.dk);
    }
    if (kHalf && saving) store_state_fragments<DK>(state_to, size.dk, S, 0, kHalf);
    if (!kHasProducer && chunk + 1 < block.end_chunk)
      copy_chunk(Stage(tiles, now), in, block, size, chunk + 1);
    uint32_t a[4][4], update[4][4];
    wgmma_wait_group<kQWithK ? 1 : 0>();
    wgmma_fence_operand(E), wgmma_fence_operand(state);
    residuals(E, stage.gates(), v_columns, ld, power_of_two(exponent));
    pack_scaled_a_fragments(a, E, stage.gates() + kBeta * kChunk, 1.f);
    wgmma_fence_operand(E), wgmma_fence_operand(a);
    wgmma_fence();
    start_times_matrix<kMajorK, -1>(E, a, make_smem_desc(stage.n()));
    wgmma_commit_group();
    if (kHalf && saving) store_state_fragments<DK>(state_to, size.dk, S, kHalf, DK / 16);
    scale_state<DK>(state, stage.gates()[kDecayFromStart * kChunk + kChunk - 1]);
    if (kOverlap) {  // now, and not when the products are done
      wgmma_fence_operand(state);
      wgmma_wait_group<1>();
      wgmma_fence_operand(O);
      scale_all_tokens(O, stage.gates() + kDecayFromStart * kChunk, s);
      wgmma_fence_operand(O);
    }
    wgmma_wait_group<0>();
    wgmma_fence_operand(E);
    if (kQWithK && !kOverlap) wgmma_fence_operand(O), wgmma_fence_operand(state);
    if (saving) {
      stage_tokens<__half>(staging, ld, E, 1.f);
      if (threadIdx.x % 32 == 0) saved.exponents[(number * size.dv + column) / 16] = exponent;
    }
    scale_all_tokens(E, stage.gates() + kBeta * kChunk, 1.f);
    pack_a_fragments(a, E);
    pack_scaled_a_fragments(update, E, stage.gates() + kDecayToEnd * kChunk, 1.f);
    if (!kQWithK) {  // first what frees registers
      wgmma_fence_operand(state), wgmma_fence_operand(update), wgmma_fence_operand(S);
      wgmma_fence();
      start_update_state<DK>(state, update, make_smem_desc(stage.k()));
      wgmma_commit_group();
      if (saving) write_tokens(saved.E + out, stride, n, staging, ld);
      if (!kHasProducer && chunk + 1 < block.end_chunk) wait_and_convert_chunk(Stage(tiles, now));
      wgmma_wait_group<0>();
      wgmma_fence_operand(state);
      wgmma_fence();
      start_fragments_times_rows<DK>(O, S, make_smem_desc(stage.q()));
      wgmma_commit_group();
      wgmma_wait_group<0>();
      wgmma_fence_operand(O);
    }
    if (!kOverlap) scale_all_tokens(O, stage.gates() + kDecayFromStart * kChunk, s);
    wgmma_fence_operand(O), wgmma_fence_operand(a);
    if (kQWithK) wgmma_fence_operand(state), wgmma_fence_operand(update);
    wgmma_fence();
    start_times_matrix<kMajorK>(O, a, make_smem_desc(stage.p()));
    wgmma_commit_group();
    if (kQWithK) {
      start_update_state<DK>(state, update, make_smem_desc(stage.k()));
      wgmma_commit_group();
      if (saving) write_tokens(saved.E + out, stride, n, staging, ld);
      if (!kHasProducer && chunk + 1 < block.end_chunk) wait_and_convert_chunk(Stage(tiles, now));
    }
    wgmma_wait_group<kQWithK ? 1 : 0>();
    wgmma_fence_operand(O);
    stage_tokens<act>(staging, ld, O, power_of_two(-exponent));
    if (!kHasProducer)
      write_tokens(chunk_of_head(o, block, size, chunk) + column, o.row_stride, n, staging, ld);
    wgmma_wait_group<0>();
    wgmma_fence_operand(state);
    if (kHasProducer) named_barrier_arrive(kStageEmpty + stage.index, kSchedule.threads());
  }
  if (active)
    if (float* to = state_after(in, block, size, block.split < splits.count - 1, column))
      store_permuted_state<DK>(to, state, power_of_two(-exponent), size.dk);
#endif
}

// A fragments of factor * dO, or of factor * gate * dO (kWithGate), from the warp's 16 columns of the bf16
// tile.
template <bool kWithGate>
__device__ inline void output_gradients(uint32_t (&a)[4][4], uint32_t do_columns, int ld, float factor,
                                        const float* gate) {
#pragma unroll
  for (int p = 0; p < 4; p++) {
    float left[4], right[4];
    ldmatrix_transposed(a[p], do_columns + 2 * 16 * p * ld);
    output_gradient(left, right, a[p], factor);
    if (kWithGate) scale_tokens(left, right, gate, 16 * p, 1.f);
    pack_a_fragment(a[p], left, right);
  }
}

// (B1)-(B3). Grid, outputs and kStates as in the mma.sync backward_pass_kernel; a CTA has 64 or 128 columns
// of dv.
template <int DK, int kGroups, bool kStates>
__global__ void __launch_bounds__(pass_schedule(DK, kGroups).threads(), pass_schedule(DK, kGroups).ctas)
    backward_pass_sm90_kernel(PassInputs in, HeadRows<act> dv, Adjoints adjoints, Sizes size, Splits splits,
                              float s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Stage = Sm90Stage<DK, kGroups>;
  extern __shared__ __align__(1024) unsigned char tiles[];
  constexpr PassSchedule kSchedule = pass_schedule(DK, kGroups);
  constexpr int ld = Stage::kValuesStride, kStages = kSchedule.stages;
  constexpr bool kOverlap = kSchedule.overlap, kHasProducer = kSchedule.producer;
  PassBlock block = pass_block(size, splits, kStates, splits.count - kStates, 4 * kGroups);
  if (kStates) backward_state_chunks(in, block, size);
  const int warp = threadIdx.x / 32, column = block.first_column + 16 * warp;
  const bool active = column < size.dv;
  const int64_t stride = size.value_stride();
  clear_matrices<Stage, kStages>(tiles);
  const int last = block.end_chunk - 1;
  if (kHasProducer && warp >= 4 * kGroups) {
    if (kGroups == 2) warpgroup_reg_dealloc<kSchedule.producer_registers>();
    producer_loop<DK, kGroups>(
        tiles, block.end_chunk - block.first_chunk,
        [&](int i, const Stage& stage) {
          copy_chunk(stage, in, block, size, last - i, std::integral_constant<int, 1>());
        },
        [&](int i, const Stage& stage) {
          if (kStates) return;
          const int chunk = last - i;
          write_results(
              dv.head(block.h) + size.first_row(block.b, chunk) * dv.row_stride + block.first_column,
              dv.row_stride, size.rows_in(chunk), size.dv - block.first_column, stage);
        });
    return;
  }
  if (kHasProducer && kGroups == 2) {
    if (block.first_column + 64 * (warp / 4) >= size.dv)
      return idle_consumer<DK, kGroups>(block.end_chunk - block.first_chunk);
    warpgroup_reg_alloc<kSchedule.consumer_registers>();
  }
  if (!kHasProducer) copy_chunk(Stage(tiles, 0), in, block, size, last);

  float state[DK / 8][4] = {};  // dS
  if (!kStates && active)
    if (const float* from = state_before(in, block, size, splits, block.split < splits.count - 1, column))
      load_permuted_state<DK>(state, from, size.dk);
  int exponent = 0;
  for (int chunk = last, now = 0; chunk >= block.first_chunk; chunk--) {
    const Stage stage(tiles, now);
    now = now + 1 < kStages ? now + 1 : 0;  // the next's
    const int64_t number = size.chunk_number(block.b, block.h, chunk), row = size.first_row(block.b, chunk);
    const int64_t out = row * stride + block.h * size.dv + column;
    const int n = active ? size.rows_in(chunk) : 0;
    act* staging = stage.values() + 16 * warp;
    const uint32_t do_columns = lane_address_columns_first(staging, ld);
    const float *gate = stage.gates(), *from_start = gate + kDecayFromStart * kChunk;
    if (kHasProducer) {
      named_barrier_sync(kStageFull + kStages * (warp / 4) + stage.index, 256);
    } else {
      wait_and_convert_chunk(stage);
      __syncthreads();
    }

    uint32_t dS[DK / 16][4];
    float X[8][4] = {};
    __half* state_to =
        active && !kStates ? adjoints.d_states + (number * size.dv + column) * size.dk : nullptr;
    constexpr int kHalf = kOverlap ? first_half_of_fragments(DK) : 0;
    const float largest_value = largest_of_values(do_columns, ld);
    const uint64_t k_tiles = make_smem_desc(stage.k());
    if constexpr (kOverlap) {
      exponent = start_read_state_rescaled<DK, false>(X, X, dS, state, k_tiles, 0, largest_value, exponent);
    } else {
      exponent = rescale_and_pack<DK>(dS, state, largest_value, exponent);
      start_read_state<DK, false>(X, X, dS, state, k_tiles, 0, state_to, size.dk);
    }
    if (kHalf && state_to) store_state_fragments<DK>(state_to, size.dk, dS, 0, kHalf);
    if (active && !kStates && threadIdx.x % 32 == 0)
      adjoints.exponents[(number * size.dv + column) / 16] = exponent;
    if (!kHasProducer && chunk > block.first_chunk) copy_chunk(Stage(tiles, now), in, block, size, chunk - 1);
    uint32_t a[4][4], update[4][4];
    output_gradients<false>(a, do_columns, ld, power_of_two(exponent), nullptr);
    wgmma_wait_group<0>();
    wgmma_fence_operand(X), wgmma_fence_operand(state);
    scale_all_tokens(X, gate + kDecayToEnd * kChunk, 1.f);
    wgmma_fence_operand(X), wgmma_fence_operand(a);
    wgmma_fence();
    start_times_matrix<kMajorMN>(X, a, make_smem_desc(stage.p()));
    wgmma_commit_group();
    scale_state<DK>(state, from_start[kChunk - 1]);
    output_gradients<true>(update, do_columns, ld, s * power_of_two(exponent), from_start);
    if (kOverlap)
      wgmma_fence_operand(state), wgmma_fence_operand(update);  // now, and not when the products are done
    wgmma_wait_group<0>();
    wgmma_fence_operand(X);
    pack_scaled_a_fragments(a, X, gate + kBeta * kChunk, 1.f);
    wgmma_fence_operand(X), wgmma_fence_operand(a), wgmma_fence_operand(state), wgmma_fence_operand(update);
    wgmma_fence();
    start_times_matrix<kMajorMN, -1>(X, a, make_smem_desc(stage.n()));
    wgmma_commit_group();
    start_update_state<DK>(state, update, make_smem_desc(stage.q()));
    wgmma_commit_group();
    if (kHalf && state_to) store_state_fragments<DK>(state_to, size.dk, dS, kHalf, DK / 16);
    wgmma_wait_group<1>();
    wgmma_fence_operand(X);

    if (!kStates) stage_tokens<__half>(staging, ld, X, 1.f);
    scale_all_tokens(X, gate + kBeta * kChunk, 1.f);
    pack_scaled_a_fragments(a, X, from_start, 1.f);
    wgmma_fence_operand(a);
    wgmma_fence();
    start_update_state<DK, -1>(state, a, make_smem_desc(stage.k()));
    wgmma_commit_group();
    if (!kStates) {
      write_tokens(adjoints.x + out, stride, n, staging, ld);
      stage_tokens<act>(staging, ld, X, power_of_two(-exponent));
      if (!kHasProducer)
        write_tokens(chunk_of_head(dv, block, size, chunk) + column, dv.row_stride, n, staging, ld);
    }
    wgmma_wait_group<0>();
    wgmma_fence_operand(state);
    if (kHasProducer) named_barrier_arrive(kStageEmpty + stage.index, kSchedule.threads());
  }
  if (kStates && active)
    store_permuted_state<DK>(splits.boundary(block.b, block.h, block.split - 1, size) + column * size.dk,
                             state, power_of_two(-exponent), size.dk);
  if (!kStates && active)
    if (float* to = state_after(in, block, size, block.split > 0, column))
      store_permuted_state<DK>(to, state, power_of_two(-exponent), size.dk);
#endif
}

// (F1), (F2), (F4) alone, for sequence splits; a CTA has 64 rows of the state or of M^T. The stage has no q:
// at dk = 128 two CTAs fit in an SM.
template <int DK>
__global__ void __launch_bounds__(128, pass_blocks(DK))
    forward_state_sm90_kernel(PassInputs in, Sizes size, Splits splits, int slices_v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Stage = Sm90Stage<DK, 1, false>;
  extern __shared__ __align__(1024) unsigned char tiles[];
  constexpr int ld = Stage::kValuesStride;
  PassBlock block = pass_block(size, splits, 0, splits.count - 1, 4);
  const bool transition = int(blockIdx.x) >= slices_v;
  const int warp = threadIdx.x / 32;
  const int first_row = (int(blockIdx.x) - (transition ? slices_v : 0)) * 64 + 16 * warp;
  if (transition && block.split == 0) return;
  if (transition) block.first_column = size.dv;  // v = 0
  forward_state_chunks(in, block, size, transition);
  const bool any = block.first_chunk < block.end_chunk;
  if (int(blockIdx.x) == slices_v && threadIdx.x == 0)
    splits.remembered(block.b, block.h, size)[block.split] = any ? 1.f : 0.f;
  clear_matrices<Stage>(tiles);
  if (any) {
    copy_chunk(Stage(tiles, block.first_chunk & 1), in, block, size, block.first_chunk);
    wait_and_convert_chunk(Stage(tiles, block.first_chunk & 1));
  }

  float state[DK / 8][4] = {};
  if (transition && any)
#pragma unroll
    for (int t = 0; t < DK / 8; t++)
      for_each_permuted(
          t, [&](int e, int row, int column) { state[t][e] = column == first_row + row ? 1.f : 0.f; });
  int exponent = 0;
  for (int chunk = block.first_chunk; chunk < block.end_chunk; chunk++) {
    const Stage stage(tiles, chunk & 1);
    const uint32_t v_columns = lane_address_columns_first(stage.values() + 16 * warp, ld);
    __syncthreads();

    uint32_t S[DK / 16][4];
    exponent = rescale_state<DK>(state, largest_of_values(v_columns, ld), exponent);
    float E[8][4] = {};
    // tile by tile: where two CTAs share an SM, one's wgmma overlap the other's packing
    start_read_state<DK, false, false>(E, E, S, state, make_smem_desc(stage.k()), 0, nullptr, size.dk);
    if (chunk + 1 < block.end_chunk) copy_chunk(Stage(tiles, (chunk + 1) & 1), in, block, size, chunk + 1);
    uint32_t a[4][4];
    wgmma_wait_group<0>();
    wgmma_fence_operand(E), wgmma_fence_operand(state);
    residuals(E, stage.gates(), v_columns, ld, power_of_two(exponent));
    pack_scaled_a_fragments(a, E, stage.gates() + kBeta * kChunk, 1.f);
    wgmma_fence_operand(E), wgmma_fence_operand(a);
    wgmma_fence();
    start_times_matrix<kMajorK, -1>(E, a, make_smem_desc(stage.n()));
    wgmma_commit_group();
    scale_state<DK>(state, stage.gates()[kDecayFromStart * kChunk + kChunk - 1]);
    wgmma_wait_group<0>();
    wgmma_fence_operand(E);
    scale_all_tokens(E, stage.gates() + kBeta * kChunk, 1.f);
    pack_scaled_a_fragments(a, E, stage.gates() + kDecayToEnd * kChunk, 1.f);
    wgmma_fence_operand(state), wgmma_fence_operand(a);
    wgmma_fence();
    start_update_state<DK>(state, a, make_smem_desc(stage.k()));
    wgmma_commit_group();
    if (chunk + 1 < block.end_chunk) wait_and_convert_chunk(Stage(tiles, (chunk + 1) & 1));
    wgmma_wait_group<0>();
    wgmma_fence_operand(state);
  }
  const float unit = power_of_two(-exponent);
  const int rows = transition ? size.dk : size.dv;
  if (first_row >= rows) return;
  if (!transition) {
    float* to = splits.boundary(block.b, block.h, block.split + 1, size) + first_row * size.dk;
    store_permuted_state<DK>(to, state, unit, size.dk);
    return;
  }
  float* to = splits.transition(block.b, block.h, block.split, size);
  store_permuted_state<DK>(to + first_row * size.dk, state, unit, size.dk);
  to += size.dk * size.dk + first_row;
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
    for_each_permuted(t, [&](int e, int row, int column) {
      if (column < size.dk) to[column * size.dk + row] = unit * state[t][e];
    });
#endif
}

}  // namespace delta_rule
}  // namespace gdn
