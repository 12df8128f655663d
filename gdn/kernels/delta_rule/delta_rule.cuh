// The gated delta rule on tensor cores, in chunks of 64 tokens. dev/doc/delta_rule.md states the algorithm
// with the equation numbers used here. Rearranged so that only small corrections are rounded (never I or
// beta), to fp16 with a power-of-two scale factor per 16 columns, since fp16 has 3 bits more than bf16 but
// little range.
//
// Four kernels, cut where the parallelism changes:
//   kernel                computes   writes          one CTA each                 fla's kernels
//   prepare_kernel        (1)-(3)    N, P, gates     chunk, value head, sequence  kkt, solve_tril
//   forward_pass_kernel   (F1)-(F4)  o, S_0, E       dv slice, head, sequence     fwd_h, fwd_o
//   backward_pass_kernel  (B1)-(B3)  dv, dS_C, X     the same, chunks in reverse  bwd_dv_local, bwd_dhu
//   gradients_kernel      (G1)-(G5)  dq dk dg dbeta  chunk, key head, sequence    bwd_dqkwg, bwd_wy
// On Hopper prepare_sm90_kernel, *_pass_sm90_kernel and, for most head sizes, gradients_sm90_kernel take
// their places (wgmma, TMA); elsewhere all run on mma.sync. Where a pass has fewer CTAs than the GPU holds,
// sequences are split (splits.cuh). The state and its gradient stay in fp32 registers for the whole sequence
// or split. There are no atomics: results have the same bits in every run.
//
// Times in ms on an H200 (dev/bench_delta_rule, dev/results/2026-11-29_h200_third). The forward saves N, P
// and the gates, so the backward is two kernels. (With 16/32 heads the clock falls under load: the single
// kernels, timed after the whole, take longer than it.)
//    B     T  Hk  Hv   dk   dv   prepare  forward pass  backward pass  gradients   forward  backward
//   32  1024   6   6   32   64   0.036    0.063         0.067          0.112       0.093    0.174
//   32  1024   6   6   64  128   0.038    0.113         0.112          0.138       0.149    0.243
//   32  1024   6   6   96  192   0.044    0.180         0.186          0.193       0.222    0.380
//   32  1024   6   6  128  256   0.049    0.206         0.207          0.255       0.247    0.444
//    8  4096  16  32  128  128   0.198    0.538         0.571          0.968       0.712    1.369
//   32  1024   6   6  192  384   0.060    0.449         0.455          0.579       0.478    1.014
//    8  1024   6   6  256  512   0.029    0.202         0.209          0.202       0.229    0.407
//
// Which numbers may be rounded was decided by emulating every rounding in double against the float64
// recurrence, over decay (initial, -0.001, down to -50 a token), beta (near 0, near 1, to 2) and correlated
// keys, dk 32 to 128, T to 1024. Error divided by that of an oracle, the float recurrence rounded to bf16,
// worst regime:
//                                                                        o    dq   dk   dv   dg   dbeta
//   every operand and everything stored in one bf16                     6.1  2.9  3.7  4.7  3.9  4.8
//   operands hi + lo bf16; S_0, dS_C, E, X stored in one bf16           1.0  1.7  1.9  1.0  3    1.4
//   operands hi + lo bf16; S_0 alone stored in one bf16                 1.0  1.4  1.2  1.0  1.6  0.01
//   everything hi + lo bf16                                             1.0  1.0  1.0  1.0  0.01 0.01
// As measured (dev/torch/accuracy.py, 7 regimes of decay and beta, T = 1000, error divided by that of the
// float64 result rounded to bf16; dg and dbeta, which are fp32, as if they were bf16, too):
//   operands and everything stored in fp16 with scale factors (this)    1.08 1.08 1.12 1.06 0.5  0.5
// q, k, v, do are bf16 on input; converted to fp16, q and k lose what lies below 2^-24.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common.cuh"
#include "recurrent.cuh"
#include "sm80/gradients.cuh"
#include "sm80/passes.cuh"
#include "sm90/gradients.cuh"
#include "sm90/passes.cuh"
#include "solve.cuh"

namespace gdn {
namespace delta_rule {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int kProbeThreads = 128;
#else
constexpr int kProbeThreads = 64;
#endif

// Never launched: its launch bound tells which of the build's architectures this GPU runs.
static __global__ void __launch_bounds__(kProbeThreads) arch_probe_kernel() {}

// True if this GPU runs code compiled for sm_90a.
inline bool has_wgmma() {
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, arch_probe_kernel));
  return attributes.maxThreadsPerBlock == 128;
}

inline Sizes sizes(const MixerShape& shape) {
  require_head_dims(shape);
  return {shape.tokens,     shape.heads_k,  shape.heads_v,         shape.head_dim_k,
          shape.head_dim_v, shape.chunks(), shape.conv_channels(), shape.heads_v / shape.heads_k};
}

inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline size_t chunk_count(const MixerShape& shape) {
  return size_t(shape.batch) * shape.heads_v * shape.chunks();
}

inline size_t states_bytes(const MixerShape& shape) {
  return aligned(chunk_count(shape) * shape.head_dim_k * shape.head_dim_v * sizeof(__half));
}

inline size_t values_bytes(const MixerShape& shape) {
  return aligned(size_t(shape.rows()) * shape.value_dim() * sizeof(__half));
}

inline size_t exponents_bytes(const MixerShape& shape) {
  return aligned(chunk_count(shape) * (shape.head_dim_v / 16) * sizeof(int));
}

inline size_t matrices_bytes(const MixerShape& shape) {
  return aligned(chunk_count(shape) * 2 * kMatrixElements * sizeof(__half));
}

inline size_t gates_bytes(const MixerShape& shape) {
  return aligned(chunk_count(shape) * kGates * sizeof(float));
}

inline size_t pass_bytes(const MixerShape& shape) {
  return states_bytes(shape) + values_bytes(shape) + exponents_bytes(shape);
}

inline size_t prepared_bytes(const MixerShape& shape) { return matrices_bytes(shape) + gates_bytes(shape); }

// CTAs of a pass that the GPU holds at once (occupancy x SMs).
inline int resident_ctas(const Cuda& device, const MixerShape& shape) {
  return device.sm_count * pass_blocks(shape.head_dim_k);
}

// Splits of a sequence if CTAs of 64 columns of dv leave SMs idle.
inline Splits choose_splits(const Cuda& device, const MixerShape& shape) {
  const int64_t blocks = int64_t(shape.batch) * shape.heads_v * divide_up(shape.head_dim_v, 64);
  return choose_splits(shape.chunks(), blocks, resident_ctas(device, shape));
}

inline size_t max_splits(const Cuda& device, const MixerShape& shape) {
  const int slices = divide_up(shape.head_dim_v, 64);
  return size_t(max_splits(shape.rows(), shape.heads_v, slices, resident_ctas(device, shape)));
}

inline size_t boundary_states_bytes(const Cuda& device, const MixerShape& shape) {
  return aligned(max_splits(device, shape) * shape.head_dim_k * shape.head_dim_v * sizeof(float));
}

inline size_t transitions_bytes(const Cuda& device, const MixerShape& shape) {
  return aligned(max_splits(device, shape) * 2 * shape.head_dim_k * shape.head_dim_k * sizeof(float));
}

inline size_t saved_bytes(const MixerShape& shape) { return pass_bytes(shape) + prepared_bytes(shape); }

// Scratch in front of the splits' matrices: what the backward pass leaves, or what a forward that saves
// nothing needs.
inline size_t scratch_before_splits(const MixerShape& shape) {
  return std::max(pass_bytes(shape), prepared_bytes(shape));
}

inline Splits splits_at(const Cuda& device, void* scratch, const MixerShape& shape) {
  Splits splits = choose_splits(device, shape);
  char* transitions = static_cast<char*>(scratch) + scratch_before_splits(shape);
  splits.transitions = reinterpret_cast<float*>(transitions);
  splits.boundary_states = reinterpret_cast<float*>(transitions + transitions_bytes(device, shape));
  return splits;
}

// Pointers into what a pass leaves: the forward's in `saved`; the backward's, same layout, in scratch.
inline Saved saved_at(void* saved, const MixerShape& shape) {
  if (!saved) return {};
  char* errors = static_cast<char*>(saved) + states_bytes(shape);
  return {static_cast<__half*>(saved), reinterpret_cast<__half*>(errors),
          reinterpret_cast<int*>(errors + values_bytes(shape))};
}

inline Adjoints adjoints_at(void* scratch, const MixerShape& shape) {
  const Saved at = saved_at(scratch, shape);
  return {at.states, at.E, at.exponents};
}

// Output of prepare_kernel, input of both passes: in `saved` behind the forward's states, in scratch if
// nothing is saved.
struct Prepared {
  __half* matrices;
  float* gates;
};

inline Prepared prepared_at(void* saved, void* scratch, const MixerShape& shape) {
  char* at = saved ? static_cast<char*>(saved) + pass_bytes(shape) : static_cast<char*>(scratch);
  return {reinterpret_cast<__half*>(at), reinterpret_cast<float*>(at + matrices_bytes(shape))};
}

// Calls launch with the smallest compiled size that holds dk.
template <class Launch>
void with_head_dim_k(int dk, const Launch& launch) {
  if (dk <= 32) return launch(std::integral_constant<int, 32>());
  if (dk <= 64) return launch(std::integral_constant<int, 64>());
  if (dk <= 96) return launch(std::integral_constant<int, 96>());
  if (dk <= 128) return launch(std::integral_constant<int, 128>());
  if (dk <= 192) return launch(std::integral_constant<int, 192>());
  launch(std::integral_constant<int, 256>());
}

// Warps of a CTA of the mma.sync passes, 16 columns of dv each: many, for they share loads, but no more than
// fit in shared memory and leave every SM a CTA; slices of equal size.
inline int pass_warps(const Cuda& device, const MixerShape& shape, int DK, int splits) {
  const int tiles = shape.head_dim_v / 16, limit = shared_bytes_limit();
  const auto slices = [&](int warps) { return (tiles + warps - 1) / warps; };
  int warps = std::min(kMaxPassWarps, tiles);
  while (warps > 1 && 2 * pass_stage_bytes(DK, warps) > limit) warps--;
  while (warps > (splits > 1 ? 4 : 1) &&
         shape.batch * splits * shape.heads_v * slices(warps) < device.sm_count)
    warps = (warps + 1) / 2;
  return slices(slices(warps));
}

inline void prepare(Cuda& device, const act* qkv, const float* g, const float* beta, const MixerShape& shape,
                    float s, const Prepared& to) {
  const bool warpgroup = has_wgmma();
  const int dk = shape.head_dim_k,
            bytes = warpgroup ? prepare_shared_bytes<true>(dk) : prepare_shared_bytes<false>(dk);
  const auto kernel = warpgroup ? prepare_sm90_kernel : prepare_kernel;
  allow_shared_bytes(kernel, bytes, "the gated delta rule");
  const dim3 grid(shape.chunks(), shape.heads_v, shape.batch);
  kernel<<<grid, kPrepareThreads, bytes, device.stream>>>(to.matrices, to.gates, qkv, g, beta, sizes(shape),
                                                          s);
  launched("prepare_kernel");
}

// Consumer warpgroups of a CTA of the wgmma passes, 64 columns of dv each. Two share loads, and a CTA of two
// takes 1.5 times as long as one of one, not twice; one, where the larger number of CTAs finishes in fewer
// waves.
inline int pass_groups(const Cuda& device, const MixerShape& shape, int splits) {
  const int slices = divide_up(shape.head_dim_v, 64);
  const int64_t resident = int64_t(device.sm_count) * pass_blocks(shape.head_dim_k);
  const auto waves = [&](int groups) {
    return divide_up<int64_t>(int64_t(shape.batch) * splits * shape.heads_v * divide_up(slices, groups),
                              resident);
  };
  return 2 * waves(1) < 3 * waves(2) ? 1 : 2;
}

// Calls launch with dk's compiled size, the warpgroups of a CTA, and the grid.
template <class Launch>
void with_warpgroups(const Cuda& device, const MixerShape& shape, int splits, const Launch& launch) {
  const int groups = pass_groups(device, shape, splits);
  const dim3 grid(divide_up(shape.head_dim_v, 64 * groups), shape.heads_v, shape.batch * splits);
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    if (groups == 1) return launch(head_dim, std::integral_constant<int, 1>(), grid);
    launch(head_dim, std::integral_constant<int, 2>(), grid);
  });
}

// From M and B of all splits: the states at the splits' starts, or (backward) their gradients at the ends.
inline void merge_splits(Cuda& device, const MixerShape& shape, const Splits& splits, bool backward) {
  if (splits.count < 3) return;
  const dim3 grid(divide_up(shape.head_dim_v, kMergeRows), shape.heads_v, shape.batch);
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    constexpr int kColumns = merge_columns(decltype(head_dim)::value);
    const auto kernel = backward ? merge_splits_kernel<kColumns, true> : merge_splits_kernel<kColumns, false>;
    kernel<<<grid, kMergeThreads, 0, device.stream>>>(splits, sizes(shape));
  });
  launched("merge_splits_kernel");
}

// Transitions M of the splits, and with_end_states also their final states B.
inline void forward_states(Cuda& device, const act* qkv, const MixerShape& shape, const Prepared& prepared,
                           const Splits& splits, bool ends) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    constexpr int DK = decltype(head_dim)::value;
    const auto launch = [&](auto kernel, int warps, int bytes) {
      const int slices_v = ends ? divide_up(shape.head_dim_v, 16 * warps) : 0;
      const int slices_k = divide_up(shape.head_dim_k, 16 * warps);
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      const dim3 grid(slices_v + slices_k, shape.heads_v, shape.batch * (splits.count - 1));
      kernel<<<grid, 32 * warps, bytes, device.stream>>>(qkv, matrices, gates, sizes(shape), splits,
                                                         slices_v);
    };
    if (has_wgmma()) {
      // If all CTAs fit one per SM, request enough shared memory to force that. Otherwise the CTAs of the
      // first split's (unneeded) transition, which exit at once, hold an SM while the last CTAs double up
      // elsewhere.
      const int slices_v = ends ? divide_up(shape.head_dim_v, 64) : 0;
      const int slices_k = divide_up(shape.head_dim_k, 64), ends_count = splits.count - 1;
      const int64_t blocks =
          int64_t(shape.batch) * shape.heads_v * (ends_count * slices_v + (ends_count - 1) * slices_k);
      const int bytes = 2 * Sm90Stage<DK, 1, false>::kBytes, alone = shared_bytes_limit() / 2 + 1;
      return launch(forward_state_sm90_kernel<DK>, 4,
                    blocks <= device.sm_count ? std::max(bytes, alone) : bytes);
    }
    const int warps = pass_warps(device, shape, DK, splits.count);
    launch(forward_state_kernel<DK>, warps, 2 * pass_stage_bytes(DK, warps));
  });
  launched("forward_state_kernel");
}

// dS at the start of all splits but the first, from 0 at their end.
inline void backward_states(Cuda& device, const act* d_o, const act* qkv, const MixerShape& shape, float s,
                            const Prepared& prepared, const Splits& splits) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    constexpr int DK = decltype(head_dim)::value;
    const auto launch = [&](auto kernel, int warps, int threads, int bytes) {
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v,
                      shape.batch * (splits.count - 1));
      kernel<<<grid, threads, bytes, device.stream>>>(nullptr, Adjoints(), d_o, qkv, matrices, gates,
                                                      sizes(shape), splits, s);
    };
    if (has_wgmma())
      return launch(backward_pass_sm90_kernel<DK, 1, true>, 4, pass_threads(DK, 1),
                    pass_stages(DK) * Sm90Stage<DK, 1>::kBytes);
    const int warps = pass_warps(device, shape, DK, splits.count);
    launch(backward_pass_kernel<DK, true>, warps, 32 * warps, 2 * pass_stage_bytes(DK, warps));
  });
  launched("backward_pass_kernel of states");
}

inline void forward_pass(Cuda& device, act* o, const Saved& saved, const act* qkv, const MixerShape& shape,
                         float s, const Prepared& prepared, const Splits& splits) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_wgmma()) {
    with_warpgroups(device, shape, splits.count, [&](auto head_dim, auto warpgroups, dim3 grid) {
      constexpr int DK = decltype(head_dim)::value, kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * Sm90Stage<DK, kGroups>::kBytes;
      const auto kernel = forward_pass_sm90_kernel<DK, kGroups>;
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                        sizes(shape), splits, s);
    });
  } else {
    with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
      constexpr int DK = decltype(head_dim)::value;
      const int warps = pass_warps(device, shape, DK, splits.count), bytes = 2 * pass_stage_bytes(DK, warps);
      allow_shared_bytes(forward_pass_kernel<DK>, bytes, "the gated delta rule");
      const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * splits.count);
      forward_pass_kernel<DK><<<grid, 32 * warps, bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                          sizes(shape), splits, s);
    });
  }
  launched("forward_pass_kernel");
}

inline void backward_pass(Cuda& device, act* dqkv, const act* d_o, const act* qkv, const MixerShape& shape,
                          float s, const Prepared& prepared, const Splits& splits, void* scratch) {
  const Adjoints adjoints = adjoints_at(scratch, shape);
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_wgmma()) {
    with_warpgroups(device, shape, splits.count, [&](auto head_dim, auto warpgroups, dim3 grid) {
      constexpr int DK = decltype(head_dim)::value, kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * Sm90Stage<DK, kGroups>::kBytes;
      const auto kernel = backward_pass_sm90_kernel<DK, kGroups, false>;
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(dqkv, adjoints, d_o, qkv, matrices,
                                                                        gates, sizes(shape), splits, s);
    });
  } else {
    with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
      constexpr int DK = decltype(head_dim)::value;
      const int warps = pass_warps(device, shape, DK, splits.count), bytes = 2 * pass_stage_bytes(DK, warps);
      allow_shared_bytes(backward_pass_kernel<DK, false>, bytes, "the gated delta rule");
      const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * splits.count);
      backward_pass_kernel<DK, false><<<grid, 32 * warps, bytes, device.stream>>>(
          dqkv, adjoints, d_o, qkv, matrices, gates, sizes(shape), splits, s);
    });
  }
  launched("backward_pass_kernel");
}

// The most stages and copies of q and k that fit in `limit` bytes of shared memory; {0, 0} if none do. A
// third stage would reach two work tiles ahead where a tile is one step, and there are q and k of two.
inline GradientBuffers gradient_buffers(const MixerShape& shape, int PW, int limit) {
  const int group = shape.heads_v / shape.heads_k, dk = shape.head_dim_k;
  const int steps = group * ((dk + PW - 1) / PW) * ((shape.head_dim_v + kStep - 1) / kStep);
  for (const GradientBuffers buffers :
       {GradientBuffers{3, 2}, GradientBuffers{3, 1}, GradientBuffers{2, 2}, GradientBuffers{2, 1}})
    if (gradient_shared_bytes(dk, PW, group > 1, buffers) <= limit && (steps > 1 || buffers.stages == 2))
      return buffers;
  return {0, 0};
}

// Shared memory of each of `blocks` CTAs that share an SM, which reserves 1 KiB for each.
inline int shared_bytes_share(int blocks) { return (shared_bytes_limit() + 1024) / blocks - 1024; }

template <int PW>
void launch_gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const GradientInputs& in,
                      const MixerShape& shape, float s) {
  int blocks = gradient_blocks(PW);
  GradientBuffers buffers = gradient_buffers(shape, PW, shared_bytes_share(blocks));
  if (buffers.stages == 0) {
    blocks = 1;
    buffers = gradient_buffers(shape, PW, shared_bytes_limit());
  }
  const int bytes = gradient_shared_bytes(shape.head_dim_k, PW, shape.heads_v > shape.heads_k, buffers);
  allow_shared_bytes(gradients_kernel<PW>, bytes, "the gated delta rule");
  const int work_tiles = shape.chunks() * shape.heads_k * shape.batch;
  const int grid = std::min(work_tiles, blocks * device.sm_count);
  gradients_kernel<PW><<<grid, gradient_threads(PW), bytes, device.stream>>>(
      dqkv, dg, dbeta, in, sizes(shape), work_tiles, buffers, s);
  launched("gradients_kernel");
}

// TMA descriptor of a tensor of 16-bit elements: sizes, columns first; strides, in elements, of all
// dimensions but the columns. Boxes have 64 columns and 64 in dimension `rows`, 128-byte swizzle.
template <int kRank>
CUtensorMap tensor_map(const void* at, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                       int rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                &found));
#else
    cuda_check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "the CUDA driver has no cuTensorMapEncodeTiled; expected a driver of 12.0 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t size[kRank], stride[kRank - 1];
  cuuint32_t box[kRank], step[kRank];
  for (int i = 0; i < kRank; i++) {
    size[i] = sizes[i];
    box[i] = i == 0 || i == rows ? 64 : 1;
    step[i] = 1;
  }
  for (int i = 0; i < kRank - 1; i++) stride[i] = strides[i] * sizeof(__half);
  CUtensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank, const_cast<void*>(at), size,
                                 stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(status)) +
                             " for a tensor of " + std::to_string(sizes[0]) + " columns");
  return map;
}

// True if gradients_sm90_kernel supports these head sizes.
inline bool has_sm90_gradients(const MixerShape& shape) {
  const int widest = shape.heads_v > shape.heads_k ? 128 : 256;
  return shape.head_dim_k <= widest && shape.head_dim_v % 64 == 0;
}

template <int kTiles, bool kGrouped>
void launch_sm90_gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const GradientInputs& in,
                           const MixerShape& shape, const Sizes& size, float s) {
  const int64_t dk = shape.head_dim_k, dv = shape.head_dim_v, T = shape.tokens, B = shape.batch;
  const int64_t C = shape.conv_channels(), values = shape.value_dim();
  const auto keys = [&](const act* at) {
    return tensor_map<4>(at, {dk, 2 * shape.heads_k, T, B}, {dk, C, T * C}, 2);
  };
  const auto value_tensor = [&](const void* at) {
    return tensor_map<4>(at, {dv, shape.heads_v, T, B}, {dv, values, T * values}, 2);
  };
  const auto states = [&](const __half* at) {
    return tensor_map<3>(at, {dk, dv, B * shape.heads_v * shape.chunks()}, {dk, dk * dv}, 1);
  };
  const GradientTensors tensors = {keys(in.qkv),
                                   keys(dqkv),
                                   value_tensor(in.d_o),
                                   value_tensor(in.saved.E),
                                   value_tensor(in.adjoints.x),
                                   states(in.saved.states),
                                   states(in.adjoints.d_states)};
  const GateInputs gates = {in.gates, in.saved.exponents, in.adjoints.exponents};
  constexpr int bytes = GradientLayout<kTiles, kGrouped>::kBytes;
  const auto kernel = gradients_sm90_kernel<kTiles, kGrouped>;
  allow_shared_bytes(kernel, bytes, "the gated delta rule");
  const int work_tiles = shape.chunks() * shape.heads_k * shape.batch;
  kernel<<<std::min(work_tiles, device.sm_count), kGradientThreads, bytes, device.stream>>>(
      tensors, dg, dbeta, gates, size, work_tiles, s);
  launched("gradients_sm90_kernel");
}

// Slices of dk as wide as shared memory allows.
inline void gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o, const Saved& saved,
                      const act* qkv, const MixerShape& shape, float s, const float* gates, void* scratch) {
  const GradientInputs in = {qkv, d_o, saved, adjoints_at(scratch, shape), gates};
  const int dk = shape.head_dim_k;
  if (has_wgmma() && has_sm90_gradients(shape)) {
    const auto launch = [&](auto tiles, auto grouped) {
      launch_sm90_gradients<decltype(tiles)::value, decltype(grouped)::value>(device, dqkv, dg, dbeta, in,
                                                                              shape, sizes(shape), s);
    };
    const auto with_group = [&](auto tiles) {
      if (shape.heads_v > shape.heads_k) return launch(tiles, std::true_type());
      launch(tiles, std::false_type());
    };
    if (dk <= 64) return with_group(std::integral_constant<int, 1>());
    if (dk <= 128) return with_group(std::integral_constant<int, 2>());
    return launch(std::integral_constant<int, 4>(), std::false_type());
  }
  const auto fits = [&](int PW) { return gradient_buffers(shape, PW, shared_bytes_limit()).stages > 0; };
  if (dk <= 32) return launch_gradients<32>(device, dqkv, dg, dbeta, in, shape, s);
  if (dk <= 64 || !fits(96)) return launch_gradients<64>(device, dqkv, dg, dbeta, in, shape, s);
  if (dk <= 96 || (dk > 128 && dk <= 192) || !fits(128))
    return launch_gradients<96>(device, dqkv, dg, dbeta, in, shape, s);
  launch_gradients<128>(device, dqkv, dg, dbeta, in, shape, s);
}

}  // namespace delta_rule

// Layout of `saved`: states at the chunks' starts [B,Hv,chunks,dv,dk] and E [B,T,Hv,dv], fp16, and their
// exponents [B,Hv,chunks,dv/16]; N and P [B,Hv,chunks,2,64,64], fp16, and gates.
inline size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape& shape) {
  return delta_rule::saved_bytes(shape);
}

inline size_t gated_delta_rule_scratch_bytes(Cuda& device, const MixerShape& shape) {
  return delta_rule::scratch_before_splits(shape) + delta_rule::transitions_bytes(device, shape) +
         delta_rule::boundary_states_bytes(device, shape);
}

// o [B,T,Hv,dv] from S_0 = 0. saved may be null when no backward follows.
inline void gated_delta_rule_forward(Cuda& device, act* o, void* saved, const act* qkv, const float* g,
                                     const float* beta, const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const delta_rule::Prepared prepared = delta_rule::prepared_at(saved, scratch, shape);
  const delta_rule::Splits splits = delta_rule::splits_at(device, scratch, shape);
  delta_rule::prepare(device, qkv, g, beta, shape, s, prepared);
  if (splits.count > 1) {
    delta_rule::forward_states(device, qkv, shape, prepared, splits, true);
    delta_rule::merge_splits(device, shape, splits, false);
  }
  delta_rule::forward_pass(device, o, delta_rule::saved_at(saved, shape), qkv, shape, s, prepared, splits);
}

// dqkv [B,T,C], dg, dbeta [B,T,Hv] from d_o [B,T,Hv,dv] and what the forward saved.
inline void gated_delta_rule_backward(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o,
                                      const void* saved, const act* qkv, const float* /*g*/,
                                      const float* /*beta*/, const MixerShape& shape, float s,
                                      void* scratch) {
  Range<Cuda> range(device, __func__);
  delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const delta_rule::Saved forward = delta_rule::saved_at(const_cast<void*>(saved), shape);
  const delta_rule::Prepared prepared = delta_rule::prepared_at(const_cast<void*>(saved), nullptr, shape);
  const delta_rule::Splits splits = delta_rule::splits_at(device, scratch, shape);
  if (splits.count > 1) {  // transitions again: kept, they would take memory in every layer of every model
    delta_rule::forward_states(device, qkv, shape, prepared, splits, false);
    delta_rule::backward_states(device, d_o, qkv, shape, s, prepared, splits);
    delta_rule::merge_splits(device, shape, splits, true);
  }
  delta_rule::backward_pass(device, dqkv, d_o, qkv, shape, s, prepared, splits, scratch);
  delta_rule::gradients(device, dqkv, dg, dbeta, d_o, forward, qkv, shape, s, prepared.gates, scratch);
}

// Token by token from and into state [B,Hv,dk,dv] fp32.
inline void gated_delta_rule_recurrent(Cuda& device, act* o, float* state, const act* qkv, const float* g,
                                       const float* beta, const MixerShape& shape, float s) {
  Range<Cuda> range(device, __func__);
  const delta_rule::Sizes size = delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const dim3 grid((shape.head_dim_v + delta_rule::kRecurrentColumns - 1) / delta_rule::kRecurrentColumns,
                  shape.heads_v, shape.batch);
  delta_rule::recurrent_kernel<<<grid, delta_rule::kRecurrentThreads, 0, device.stream>>>(o, state, qkv, g,
                                                                                          beta, size, s);
  launched("recurrent_kernel");
}

}  // namespace gdn
