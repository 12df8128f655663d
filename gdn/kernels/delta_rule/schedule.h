// Schedules of the gated delta rule's kernels, in one place: warps, pipeline stages and shared memory of a
// CTA, by head size and by the shared memory that a CTA may have on the GPU at hand. Plain C++: the plans are
// tested and printed without CUDA (gdn/tests/test_delta_rule_schedule.cpp, dev/delta_rule_plans.cpp).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../shapes.h"

#ifdef __CUDACC__
#define GDN_HOST_DEVICE __host__ __device__
#else
#define GDN_HOST_DEVICE
#endif

namespace gdn {
namespace delta_rule {

// Shared memory of a CTA in bytes: the least on the GPUs that these kernels run on (sm_86, 89, 120: 99 KiB),
// and that of sm_80 and sm_87, and of sm_90.
constexpr int kSharedBytes99 = 99 * 1024, kSharedBytes163 = 163 * 1024, kSharedBytes227 = 227 * 1024;

constexpr int kMatrixStride = kChunk + 8;  // row stride of a [64,64] 16-bit tile in shared memory

constexpr int kGates = 4 * kChunk;  // floats of a chunk's gates

// The compiled size that holds dk.
constexpr int compiled_head_dim(int dk) {
  return dk <= 32 ? 32 : dk <= 64 ? 64 : dk <= 96 ? 96 : dk <= 128 ? 128 : dk <= 192 ? 192 : 256;
}

// CTAs of 8 warps an SM should hold in a pass: a small state leaves registers for two.
GDN_HOST_DEVICE constexpr int pass_blocks(int DK) { return DK <= 64 ? 2 : 1; }

// Shared memory of each of `ctas` CTAs on an SM, which reserves 1 KiB for each.
constexpr int shared_bytes_share(int limit, int ctas) { return (limit + 1024) / ctas - 1024; }

// ---- passes on mma.sync (sm80/passes.cuh)

constexpr int kMaxPassWarps = 8;

// N and P packed into one tile of 64 rows of five 16x16 blocks.
constexpr int kPackedStride = 5 * 16 + 8, kPackedElements = kChunk * kPackedStride;

// A chunk's inputs: q and k, 16 columns of dv a warp, N and P, gates.
GDN_HOST_DEVICE constexpr int pass_stage_bytes(int DK, int warps) {
  return 2 * (2 * kChunk * (DK + 8) + kChunk * (16 * warps + 8) + kPackedElements) + 4 * kGates;
}

// The kernels are compiled for two stages, and for one where two with half of the warps exceed 99 KiB.
constexpr bool has_one_stage_passes(int DK) {
  return 2 * pass_stage_bytes(DK, kMaxPassWarps / 2) > kSharedBytes99;
}

// Schedule of a pass: warps of a CTA, 16 columns of dv each; pipeline stages; shared memory of a CTA.
struct PassPlan {
  int warps, stages, bytes;
  int slices(int dv) const { return (dv / 16 + warps - 1) / warps; }
};

// Many warps, for they share loads, but no more than fit in shared memory and leave every SM a CTA; slices of
// equal size. Two stages, so that a chunk's loads overlap the products of the chunk before; one where two
// leave room for less than half of the warps.
inline PassPlan pass_plan(const MixerShape& shape, int splits, int sm_count, int limit) {
  const int DK = compiled_head_dim(shape.head_dim_k), tiles = shape.head_dim_v / 16;
  const int most = std::min(kMaxPassWarps, tiles);
  const auto slices = [&](int warps) { return (tiles + warps - 1) / warps; };
  const auto fitting = [&](int stages) {
    int warps = most;
    while (warps > 0 && stages * pass_stage_bytes(DK, warps) > limit) warps--;
    return warps;
  };
  int stages = 2, warps = fitting(2);
  if (2 * warps < most && has_one_stage_passes(DK)) stages = 1, warps = fitting(1);
  warps = std::max(warps, 1);  // does not fit: for the error message
  while (warps > (splits > 1 ? 4 : 1) &&
         int64_t(shape.batch) * splits * shape.heads_v * slices(warps) < sm_count)
    warps = (warps + 1) / 2;
  warps = slices(slices(warps));
  return {warps, stages, stages * pass_stage_bytes(DK, warps)};
}

// CTAs of 64 columns of dv an SM holds in a pass.
inline int resident_passes(int dk, int limit) {
  const int DK = compiled_head_dim(dk);
  int ctas = pass_blocks(DK);
  while (ctas > 1 && 2 * pass_stage_bytes(DK, 4) > shared_bytes_share(limit, ctas)) ctas--;
  return ctas;
}

// ---- passes on wgmma (sm90/passes.cuh)

constexpr int kTileRow = 64, kTileBytes = kChunk * 2 * kTileRow;  // a swizzled tile (sm90/tiles.cuh)

// Schedule of a pass on Hopper. One consumer warpgroup for 64 columns of dv; two of a CTA share loads.
//
//   dk        warpgroups  producer  q_with_k  overlap  stages  CTAs an SM
//   32, 64    1           no        yes       yes      2       2
//   32, 64    2           no        no        no       2       2
//   96, 128   1, 2        yes       yes       yes      3       1
//   192, 256  1, 2        no        yes       no       2       1
struct PassSchedule {
  int warpgroups;
  bool producer;       // one more warpgroup loads inputs and stores outputs
  bool fragments_fit;  // registers hold all A fragments of the state beside it
  bool q_with_k;       // and Q S beside K S from the chunk's start on; otherwise Q S is computed after E
  bool overlap;        // and what it takes to store and rescale the state while wgmma run
  int stages, ctas;    // pipeline stages; CTAs an SM
  int consumer_registers, producer_registers;  // by setmaxnreg, where a producer has two consumers

  GDN_HOST_DEVICE constexpr int threads() const { return 128 * (warpgroups + producer); }
};

GDN_HOST_DEVICE constexpr PassSchedule pass_schedule(int DK, int warpgroups) {
  const int ctas = pass_blocks(DK);
  const bool fragments_fit = DK <= 128, producer = ctas == 1 && DK <= 128, q_with_k = warpgroups * ctas < 4;
  return {warpgroups,       producer, fragments_fit, q_with_k, fragments_fit && q_with_k,
          producer ? 3 : 2, ctas,     224,           56};
}

// A stage: q (kWithQ), k; N and P (kWithQ); values with rows of 64 warpgroups + 8; gates.
GDN_HOST_DEVICE constexpr int sm90_stage_bytes(int DK, int warpgroups, bool with_q) {
  return (with_q ? 2 : 1) * ((DK + kTileRow - 1) / kTileRow + 1) * kTileBytes +
         2 * kChunk * (64 * warpgroups + 8) + 4 * kGates;
}

GDN_HOST_DEVICE constexpr int sm90_pass_bytes(int DK, int warpgroups) {
  return pass_schedule(DK, warpgroups).stages * sm90_stage_bytes(DK, warpgroups, true);
}

// ---- gradients on mma.sync (sm80/gradients.cuh)

constexpr int kMaxColumnGroups = 32;  // dv <= 512 in groups of 16 columns

constexpr int kStep = 32;  // columns of dv a step takes

constexpr int kTokenStride = kStep + 8;  // row strides in shared memory

// Warps: four m-tiles of 16 tokens times gradient_n_splits splits of the columns; as few as registers allow.
constexpr int kMaxNSplits = 4;

GDN_HOST_DEVICE constexpr int gradient_n_splits(int PW) { return PW == 128 ? kMaxNSplits : 2; }

GDN_HOST_DEVICE constexpr int gradient_threads(int PW) { return 128 * gradient_n_splits(PW); }

// CTAs that fit in an SM by registers. The compact kernel holds the sums over a group's heads in registers.
GDN_HOST_DEVICE constexpr int gradient_blocks(int PW, bool compact) { return PW > 64 || compact ? 1 : 2; }

// Stages of the pipeline; and copies of q and k, 2 if those of the next chunk are prefetched.
struct GradientBuffers {
  int stages, keys;
};

GDN_HOST_DEVICE constexpr int gradient_stage_bytes(int PW) {
  return 2 * (3 * kChunk * kTokenStride + 2 * kStep * (PW + 8));
}

GDN_HOST_DEVICE constexpr int key_stride(int dk, int PW) { return (dk + PW - 1) / PW * PW + 8; }

constexpr int kScoreGradientsBytes = 2 * 2 * kChunk * kMatrixStride;  // dqk and dkk

// A head tile is one value head's part of a work tile: its gates [4,64] and exponents. With n stages they are
// prefetched up to n head tiles ahead; a ring of a power of two.
constexpr int kHeadTileBytes = 4 * (kGates + 2 * kMaxColumnGroups);

GDN_HOST_DEVICE constexpr int head_tiles(bool compact, GradientBuffers buffers) {
  return compact && buffers.stages == 1 ? 2 : 4;
}

// Floats of DgSums: rows, columns, reads, writes with 4 x 64 each; per warp <S0,dS> and its largest product.
constexpr int kDgSums = (3 * kMaxNSplits + 4 + 1) * kChunk;

GDN_HOST_DEVICE constexpr int gradient_shared_bytes(int dk, int PW, bool compact, bool grouped,
                                                    GradientBuffers buffers) {
  return buffers.stages * gradient_stage_bytes(PW) + buffers.keys * 2 * 2 * kChunk * key_stride(dk, PW) +
         head_tiles(compact, buffers) * kHeadTileBytes + 4 * (kMaxColumnGroups + kDgSums) +
         (compact ? 0 : kScoreGradientsBytes + (grouped ? 2 * kChunk * PW * 4 : 0));
}

constexpr int kCompactColumns = 64;  // columns of dk the compact kernel is compiled for

static_assert(kScoreGradientsBytes <= gradient_stage_bytes(kCompactColumns), "dqk and dkk lie in a stage");

// Schedule of the gradients: columns of dk in a slice; whether by the compact kernel; CTAs an SM should hold;
// buffers; shared memory of a CTA.
struct GradientPlan {
  int columns;
  bool compact;
  int ctas;
  GradientBuffers buffers;
  int bytes;
};

// The most stages and copies of q and k that fit in `limit` bytes; {0, 0} if none do. A third stage would
// reach two work tiles ahead where a tile is one step, and there are q and k of two.
inline GradientBuffers gradient_buffers(const MixerShape& shape, int PW, bool compact, int limit) {
  const int group = shape.heads_v / shape.heads_k, dk = shape.head_dim_k;
  const int steps = group * ((dk + PW - 1) / PW) * ((shape.head_dim_v + kStep - 1) / kStep);
  const GradientBuffers choices[] = {{3, 2}, {3, 1}, {2, 2}, {2, 1}, {1, 1}};
  for (const GradientBuffers buffers : choices)
    if ((compact || buffers.stages > 1) && (steps > 1 || buffers.stages <= 2) &&
        gradient_shared_bytes(dk, PW, compact, group > 1, buffers) <= limit)
      return buffers;
  return {0, 0};
}

// Wide slices of dk, and two CTAs an SM where registers allow it; the compact kernel where those do not fit.
inline GradientPlan gradient_plan(const MixerShape& shape, int limit) {
  const int dk = shape.head_dim_k;
  const bool grouped = shape.heads_v > shape.heads_k;
  const int wide = dk <= 32 ? 32 : dk <= 64 ? 64 : dk <= 96 || (dk > 128 && dk <= 192) ? 96 : 128;
  for (const bool compact : {false, true}) {
    const int PW = compact ? kCompactColumns : wide;
    for (int ctas = gradient_blocks(PW, compact); ctas > 0; ctas--) {
      const GradientBuffers buffers = gradient_buffers(shape, PW, compact, shared_bytes_share(limit, ctas));
      if (buffers.stages > 0)
        return {PW, compact, ctas, buffers, gradient_shared_bytes(dk, PW, compact, grouped, buffers)};
    }
  }
  return {
      kCompactColumns, true, 1, {1, 1}, gradient_shared_bytes(dk, kCompactColumns, true, grouped, {1, 1})};
}

// ---- gradients on wgmma (sm90/gradients.cuh)

constexpr int kGradientConsumerRegisters = 240, kGradientProducerRegisters = 24;

// ---- prepare (solve.cuh)

// A diagonal 16x16 block of L in shared memory, transposed: [16 columns][kBlockStride rows] float.
constexpr int kBlockStride = 20;

constexpr int kDiagonalBlock = 16 * kBlockStride;  // floats

// Places of q, k and N in 16-bit elements: rows ld elements apart or, for wgmma, in swizzled tiles.
template <bool kWgmma>
struct PrepareLayout {
  int ld, tiles;  // elements from row to row; tiles that a row takes (kWgmma)

  GDN_HOST_DEVICE explicit PrepareLayout(int dk)
      : ld((dk > 32 ? dk : 32) + 8), tiles((dk + kTileRow - 1) / kTileRow) {}
  GDN_HOST_DEVICE int row_block() const { return 16 * (kWgmma ? kTileRow : ld); }
  GDN_HOST_DEVICE int k_at() const { return kChunk * (kWgmma ? tiles * kTileRow : ld); }
  // N starts behind the last diagonal block of L.
  GDN_HOST_DEVICE int n_at() const { return 3 * row_block() + 2 * kDiagonalBlock; }
  int bytes() const { return 2 * std::max(2 * k_at(), n_at() + 2 * kChunk * kMatrixStride); }
};

// Dynamic shared memory: gates, 64 floats a warp for multiply_by_decay, tiles.
constexpr int kPrepareFloats = kGates + 4 * kChunk;

template <bool kWgmma>
int prepare_shared_bytes(int dk) {
  return 4 * kPrepareFloats + PrepareLayout<kWgmma>(dk).bytes();
}

}  // namespace delta_rule
}  // namespace gdn
