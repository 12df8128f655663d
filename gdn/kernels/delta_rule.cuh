// The gated delta rule on tensor cores, in chunks of 64 tokens: the equations of gdn/cpu_delta_rule.h,
// rearranged so that what is rounded is only ever a correction, and to fp16 (11 bits), not bf16 (8): numbers
// that fp16's range does not hold go times a power of two (delta_rule_mma.cuh: range_exponent).
//
//   L_ij = D_ij (k_i . k_j), i > j      N = (I + L diag(beta))^-1 L      P_ij = s D_ij (q_i . k_j), i >= j
// Then (I + A)^-1 = I - diag(beta) N, with A = diag(beta) L: neither the identity nor beta is inside a
// rounded matrix, and nothing is divided by beta. With E the error each token writes (Vn = diag(beta) E):
//   R = V - e^G K S_0                        E = R - N (beta R)
//   O = s e^G Q S_0 + P (beta E)             S_C = e^{G_C} S_0 + K^T (e^{G_C - G} beta E)
//   dVn = P^T dO + e^{G_C - G} K dS_C        X = dVn - N^T (beta dVn)            dV = beta X
//   dS_0 = e^{G_C} dS_C + Q^T (s e^G dO) - K^T (beta e^G X)                      dbeta_i = X_i . E_i
// and dq, dk, dg from dO E^T, X E^T, dO S_0^T, X S_0^T, E dS_C^T (gradients_kernel).
//
// Four kernels, cut where the parallelism changes:
//   prepare_kernel        N, P, gates          chunks x value heads x sequences     delta_rule_prepare.cuh
//   forward_pass_kernel   o, S_0, E            sequences x value heads x dv slices  delta_rule_passes.cuh
//   backward_pass_kernel  dv, dS_C, X          the same, chunks in reverse          delta_rule_passes.cuh
//   gradients_kernel      dq, dk, dg, dbeta    chunks x key heads x sequences       delta_rule_gradients.cuh
// Where the passes would leave multiprocessors without a block, they take pieces of a sequence side by side
// (delta_rule_pieces.cuh).
//
// The state and its gradient live in fp32 registers through a whole sequence. No atomics: the same bits every
// run.
//
// On Hopper prepare_kernel's q.k and k.k, the passes (delta_rule_passes_wgmma.cuh) and, where dk is at most 128
// or value heads have key heads of their own, the gradients (delta_rule_gradients_wgmma.cuh) are warpgroup
// products.
//
// Reached on an H200 (dev/bench_delta_rule.cu, dev/results/2026-11-29_h200_third), in ms; in brackets the
// percent of the floor at an H100's copy rate, which the H200's memory exceeds. The forward saves N, P and the
// gates, with which the backward is two kernels. (With 16/32 heads the clock falls under the load: the kernels,
// timed after the whole, take longer than it.)
//    B     T  Hk  Hv   dk   dv   prepare     forward pass  backward pass  gradients   forward  backward
//   32  1024   6   6   32   64   0.036 (70)  0.063 (87)    0.067 (81)     0.112 (45)    0.093     0.174
//   32  1024   6   6   64  128   0.038 (87)  0.113 (89)    0.112 (90)     0.138 (85)    0.149     0.243
//   32  1024   6   6   96  192   0.044 (95)  0.180 (86)    0.186 (83)     0.193 (104)   0.222     0.380
//   32  1024   6   6  128  256   0.049 (103) 0.206 (106)   0.207 (106)    0.255 (119)   0.247     0.444
//    8  4096  16  32  128  128   0.198 (90)  0.538 (116)   0.571 (110)    0.968 (83)    0.712     1.369
//   32  1024   6   6  192  384   0.060 (111) 0.449 (82)    0.455 (81)     0.579 (96)    0.478     1.014
//    8  1024   6   6  256  512   0.029 (72)  0.202 (68)    0.209 (66)     0.202 (108)   0.229     0.407
//
// What has to be kept was decided by emulating every rounding in double against the float64 recurrence, over
// decay (initial, -0.001, down to -50 a token), beta (near 0, near 1, to 2) and correlated keys, dk 32 to
// 128, T to 1024. Error over that of an oracle, the float recurrence rounded to bf16, in the worst regime:
//                                                                        o    dq   dk   dv   dg   dbeta
//   every operand and everything stored in one bf16                     6.1  2.9  3.7  4.7  3.9  4.8
//   operands high + low bf16; S_0, dS_C, E, X stored in one bf16        1.0  1.7  1.9  1.0  3    1.4
//   operands high + low bf16; S_0 alone stored in one bf16              1.0  1.4  1.2  1.0  1.6  0.01
//   everything high + low bf16                                          1.0  1.0  1.0  1.0  0.01 0.01
// Measured (dev/torch/accuracy.py, 7 regimes of decay and beta, T = 1000, error over that of the float64
// result rounded to bf16; dg and dbeta, which come out in fp32, as if they were bf16 too):
//   operands and everything stored fp16 times powers of two (this)      1.08 1.08 1.12 1.06 0.5  0.5
// q, k, v, do are bf16 already; in fp16 q and k lose what lies below 2^-24.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "delta_rule_gradients.cuh"
#include "delta_rule_gradients_wgmma.cuh"
#include "delta_rule_passes_wgmma.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kRecurrentParts = 8, kRecurrentThreads = 128;
constexpr int kRecurrentColumns = kRecurrentThreads / kRecurrentParts, kRecurrentRows = 256 / kRecurrentParts;

// Over the eight lanes that share a column.
__device__ inline float sum_of_parts(float x) {
  x = sum_of_quad(x);
  return x + __shfl_xor_sync(~0u, x, 4);
}

// Token by token; o_t, u_t, S_t as in gdn/cpu_delta_rule.h, state [B,Hv,dk,dv] fp32 in and out. One block: 16
// columns of dv of a value head. Eight lanes share a column of the state, each with every eighth row in
// registers.
//
// Floor for one token (B=32, H=6, dk=128, dv=256): the state, read and written, 50 MB: 0.017 ms at the copy
// rate. Reached: 0.035 ms, 48% of floor (H100, dev/results/2026-11-28_h100).
static __global__ void __launch_bounds__(kRecurrentThreads)
    recurrent_kernel(act* o, float* state, const act* qkv, const float* g, const float* beta, Sizes size,
                     float s) {
  constexpr int kParts = kRecurrentParts, kRows = kRecurrentRows;
  __shared__ float q[kParts * kRows], k[kParts * kRows];
  const int h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h), part = threadIdx.x % kParts;
  const int column = blockIdx.x * kRecurrentColumns + threadIdx.x / kParts;
  const bool active = column < size.dv;
  float* column_state = state + (int64_t(b) * size.heads_v + h) * size.dk * size.dv + column;
  float S[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++)
    S[i] = active && kParts * i + part < size.dk ? column_state[int64_t(kParts * i + part) * size.dv] : 0.f;
  for (int t = 0; t < size.tokens; t++) {
    const int64_t row = int64_t(b) * size.tokens + t, gate = row * size.heads_v + h;
    const act* inputs = qkv + row * size.channels;
    __syncthreads();
    for (int i = threadIdx.x; i < kParts * kRows; i += kRecurrentThreads) {
      q[i] = i < size.dk ? __bfloat162float(inputs[size.q_column(hk) + i]) : 0.f;
      k[i] = i < size.dk ? __bfloat162float(inputs[size.k_column(hk) + i]) : 0.f;
    }
    __syncthreads();
    const float decay = expf(g[gate]), v = active ? __bfloat162float(inputs[size.v_column(h) + column]) : 0.f;
    float predicted = 0.f, out = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      S[i] *= decay;
      predicted += S[i] * k[kParts * i + part];
    }
    const float u = beta[gate] * (v - sum_of_parts(predicted));
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      S[i] += k[kParts * i + part] * u;
      out += S[i] * q[kParts * i + part];
    }
    out = s * sum_of_parts(out);
    if (active && part == 0) o[gate * size.dv + column] = __float2bfloat16_rn(out);
  }
#pragma unroll
  for (int i = 0; i < kRows; i++)
    if (active && kParts * i + part < size.dk) column_state[int64_t(kParts * i + part) * size.dv] = S[i];
}

// ---- launching

inline Sizes sizes(const MixerShape& shape) {
  require_head_dims(shape);
  return {shape.tokens,     shape.heads_k,  shape.heads_v,        shape.head_dim_k,
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
  return aligned(chunk_count(shape) * 2 * kSquare * sizeof(__half));
}
inline size_t gates_bytes(const MixerShape& shape) {
  return aligned(chunk_count(shape) * kGates * sizeof(float));
}
inline size_t pass_bytes(const MixerShape& shape) {
  return states_bytes(shape) + values_bytes(shape) + exponents_bytes(shape);
}
inline size_t prepared_bytes(const MixerShape& shape) { return matrices_bytes(shape) + gates_bytes(shape); }

// Blocks of a pass that the GPU holds at once.
inline int pass_slots(const Cuda& device, const MixerShape& shape) {
  return device.multiprocessors * pass_blocks(shape.head_dim_k);
}
// How the passes cut a sequence where blocks of 64 columns of dv leave multiprocessors without one.
inline Pieces cut(const Cuda& device, const MixerShape& shape) {
  const int64_t blocks = int64_t(shape.batch) * shape.heads_v * divide_up(shape.head_dim_v, 64);
  return cut_into_pieces(shape.chunks(), blocks, pass_slots(device, shape));
}
inline size_t most_pieces(const Cuda& device, const MixerShape& shape) {
  const int slices = divide_up(shape.head_dim_v, 64);
  return size_t(most_pieces(shape.rows(), shape.heads_v, slices, pass_slots(device, shape)));
}
inline size_t boundaries_bytes(const Cuda& device, const MixerShape& shape) {
  return aligned(most_pieces(device, shape) * shape.head_dim_k * shape.head_dim_v * sizeof(float));
}
inline size_t transitions_bytes(const Cuda& device, const MixerShape& shape) {
  return aligned(most_pieces(device, shape) * 2 * shape.head_dim_k * shape.head_dim_k * sizeof(float));
}

inline size_t saved_bytes(const MixerShape& shape) { return pass_bytes(shape) + prepared_bytes(shape); }
// In front of the pieces' matrices: what the backward pass leaves, or what a forward that saves nothing
// needs.
inline size_t scratch_before_pieces(const MixerShape& shape) {
  return std::max(pass_bytes(shape), prepared_bytes(shape));
}
inline Pieces pieces_at(const Cuda& device, void* scratch, const MixerShape& shape) {
  Pieces pieces = cut(device, shape);
  char* transitions = static_cast<char*>(scratch) + scratch_before_pieces(shape);
  pieces.transitions = reinterpret_cast<float*>(transitions);
  pieces.boundaries = reinterpret_cast<float*>(transitions + transitions_bytes(device, shape));
  return pieces;
}

// What a pass leaves: the forward's in `saved`, the backward's, laid out alike, in scratch.
inline Saved saved_at(void* saved, const MixerShape& shape) {
  if (!saved) return {};
  char* errors = static_cast<char*>(saved) + states_bytes(shape);
  return {static_cast<__half*>(saved), reinterpret_cast<__half*>(errors),
          reinterpret_cast<int*>(errors + values_bytes(shape))};
}
inline Adjoints adjoints_at(void* scratch, const MixerShape& shape) {
  const Saved at = saved_at(scratch, shape);
  return {at.states, at.errors, at.exponents};
}

// What prepare_kernel leaves for both passes: behind the forward's states in `saved`, in scratch where nothing
// is saved.
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

// Warps of a pass's block, 16 columns of dv each: many, for they share loads, but as few as it takes to fit
// shared memory and to give every multiprocessor a block; and slices of equal size.
inline int pass_warps(const Cuda& device, const MixerShape& shape, int DK, int pieces) {
  const int tiles = shape.head_dim_v / 16, limit = shared_bytes_limit();
  const auto slices = [&](int warps) { return (tiles + warps - 1) / warps; };
  int warps = std::min(kMaxPassWarps, tiles);
  while (warps > 1 && 2 * pass_stage_bytes(DK, warps) > limit) warps--;
  while (warps > (pieces > 1 ? 4 : 1) &&
         shape.batch * pieces * shape.heads_v * slices(warps) < device.multiprocessors)
    warps = (warps + 1) / 2;
  return slices(slices(warps));
}

inline void prepare(Cuda& device, const act* qkv, const float* g, const float* beta, const MixerShape& shape,
                    float s, const Prepared& to) {
  const bool warpgroup = has_warpgroup_products();
  const int dk = shape.head_dim_k,
            bytes = warpgroup ? prepare_shared_bytes<true>(dk) : prepare_shared_bytes<false>(dk);
  const auto kernel = warpgroup ? prepare_warpgroup_kernel : prepare_kernel;
  allow_shared_bytes(kernel, bytes, "the gated delta rule");
  const dim3 grid(shape.chunks(), shape.heads_v, shape.batch);
  kernel<<<grid, kPrepareThreads, bytes, device.stream>>>(to.matrices, to.gates, qkv, g, beta,
                                                          sizes(shape), s);
  launched("prepare_kernel");
}

// Warpgroups of a pass's block where there are warpgroup products, 64 columns of dv each: two, for they share
// loads and a block of two takes 1.5 times as long as one of one, not twice; or one, where that leaves so many
// more blocks to share the work that it ends earlier.
inline int pass_groups(const Cuda& device, const MixerShape& shape, int pieces) {
  const int slices = divide_up(shape.head_dim_v, 64);
  const int64_t slots = int64_t(device.multiprocessors) * pass_blocks(shape.head_dim_k);
  const auto rounds = [&](int groups) {
    return divide_up<int64_t>(int64_t(shape.batch) * pieces * shape.heads_v * divide_up(slices, groups), slots);
  };
  return 2 * rounds(1) < 3 * rounds(2) ? 1 : 2;
}

// Calls launch with dk's compiled size, a pass's warpgroups, and the grid.
template <class Launch>
void with_warpgroups(const Cuda& device, const MixerShape& shape, int pieces, const Launch& launch) {
  const int groups = pass_groups(device, shape, pieces);
  const dim3 grid(divide_up(shape.head_dim_v, 64 * groups), shape.heads_v, shape.batch * pieces);
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    if (groups == 1) return launch(head_dim, std::integral_constant<int, 1>(), grid);
    launch(head_dim, std::integral_constant<int, 2>(), grid);
  });
}

// From transitions and ends from zero: the states at all pieces' starts, or (backward) their gradients at the
// ends.
inline void join_pieces(Cuda& device, const MixerShape& shape, const Pieces& pieces, bool backward) {
  if (pieces.count < 3) return;
  const dim3 grid(divide_up(shape.head_dim_v, kJoinRows), shape.heads_v, shape.batch);
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    constexpr int kColumns = join_columns(decltype(head_dim)::value);
    const auto kernel = backward ? join_pieces_kernel<kColumns, true> : join_pieces_kernel<kColumns, false>;
    kernel<<<grid, kJoinThreads, 0, device.stream>>>(pieces, sizes(shape));
  });
  launched("join_pieces_kernel");
}

// Transitions, and with `ends` the ends from zero.
inline void forward_states(Cuda& device, const act* qkv, const MixerShape& shape, const Prepared& prepared,
                           const Pieces& pieces, bool ends) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    constexpr int DK = decltype(head_dim)::value;
    const auto launch = [&](auto kernel, int warps, int bytes) {
      const int slices_v = ends ? divide_up(shape.head_dim_v, 16 * warps) : 0;
      const int slices_k = divide_up(shape.head_dim_k, 16 * warps);
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      const dim3 grid(slices_v + slices_k, shape.heads_v, shape.batch * (pieces.count - 1));
      kernel<<<grid, 32 * warps, bytes, device.stream>>>(qkv, matrices, gates, sizes(shape), pieces,
                                                         slices_v);
    };
    if (has_warpgroup_products()) {
      // Where each block can have a multiprocessor of its own it asks for so much shared memory that none
      // takes a second. Else some would: the first piece's transitions, which nobody needs, are blocks that
      // end at once, but have a multiprocessor when the last blocks look for one.
      const int slices_v = ends ? divide_up(shape.head_dim_v, 64) : 0;
      const int slices_k = divide_up(shape.head_dim_k, 64), ends_count = pieces.count - 1;
      const int64_t blocks =
          int64_t(shape.batch) * shape.heads_v * (ends_count * slices_v + (ends_count - 1) * slices_k);
      const int bytes = 2 * WarpgroupStage<DK, 1, false>::kBytes, alone = shared_bytes_limit() / 2 + 1;
      return launch(forward_state_warpgroup_kernel<DK>, 4,
                    blocks <= device.multiprocessors ? std::max(bytes, alone) : bytes);
    }
    const int warps = pass_warps(device, shape, DK, pieces.count);
    launch(forward_state_kernel<DK>, warps, 2 * pass_stage_bytes(DK, warps));
  });
  launched("forward_state_kernel");
}

// Of all pieces but the first, dS at the start from 0 at the end.
inline void backward_states(Cuda& device, const act* d_o, const act* qkv, const MixerShape& shape, float s,
                            const Prepared& prepared, const Pieces& pieces) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    constexpr int DK = decltype(head_dim)::value;
    const auto launch = [&](auto kernel, int warps, int threads, int bytes) {
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v,
                      shape.batch * (pieces.count - 1));
      kernel<<<grid, threads, bytes, device.stream>>>(nullptr, Adjoints(), d_o, qkv, matrices, gates,
                                                         sizes(shape), pieces, s);
    };
    if (has_warpgroup_products())
      return launch(backward_pass_warpgroup_kernel<DK, 1, true>, 4, pass_threads(DK, 1),
                    pass_stages(DK) * WarpgroupStage<DK, 1>::kBytes);
    const int warps = pass_warps(device, shape, DK, pieces.count);
    launch(backward_pass_kernel<DK, true>, warps, 32 * warps, 2 * pass_stage_bytes(DK, warps));
  });
  launched("backward_pass_kernel of states");
}

inline void forward_pass(Cuda& device, act* o, const Saved& saved, const act* qkv, const MixerShape& shape,
                         float s, const Prepared& prepared, const Pieces& pieces) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_warpgroup_products()) {
    with_warpgroups(device, shape, pieces.count, [&](auto head_dim, auto warpgroups, dim3 grid) {
      constexpr int DK = decltype(head_dim)::value, kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * WarpgroupStage<DK, kGroups>::kBytes;
      const auto kernel = forward_pass_warpgroup_kernel<DK, kGroups>;
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                        sizes(shape), pieces, s);
    });
  } else {
    with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
      constexpr int DK = decltype(head_dim)::value;
      const int warps = pass_warps(device, shape, DK, pieces.count), bytes = 2 * pass_stage_bytes(DK, warps);
      allow_shared_bytes(forward_pass_kernel<DK>, bytes, "the gated delta rule");
      const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * pieces.count);
      forward_pass_kernel<DK><<<grid, 32 * warps, bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                          sizes(shape), pieces, s);
    });
  }
  launched("forward_pass_kernel");
}

inline void backward_pass(Cuda& device, act* dqkv, const act* d_o, const act* qkv, const MixerShape& shape,
                          float s, const Prepared& prepared, const Pieces& pieces, void* scratch) {
  const Adjoints adjoints = adjoints_at(scratch, shape);
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_warpgroup_products()) {
    with_warpgroups(device, shape, pieces.count, [&](auto head_dim, auto warpgroups, dim3 grid) {
      constexpr int DK = decltype(head_dim)::value, kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * WarpgroupStage<DK, kGroups>::kBytes;
      const auto kernel = backward_pass_warpgroup_kernel<DK, kGroups, false>;
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(
          dqkv, adjoints, d_o, qkv, matrices, gates, sizes(shape), pieces, s);
    });
  } else {
    with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
      constexpr int DK = decltype(head_dim)::value;
      const int warps = pass_warps(device, shape, DK, pieces.count), bytes = 2 * pass_stage_bytes(DK, warps);
      allow_shared_bytes(backward_pass_kernel<DK, false>, bytes, "the gated delta rule");
      const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * pieces.count);
      backward_pass_kernel<DK, false><<<grid, 32 * warps, bytes, device.stream>>>(
          dqkv, adjoints, d_o, qkv, matrices, gates, sizes(shape), pieces, s);
    });
  }
  launched("backward_pass_kernel");
}

// The most buffers that fit `limit` bytes of shared memory, or no stages. A third stage would reach two items
// ahead where an item is one step, and there are q and k of two.
inline GradientBuffers gradient_buffers(const MixerShape& shape, int PW, int limit) {
  const int group = shape.heads_v / shape.heads_k, dk = shape.head_dim_k;
  const int steps = group * ((dk + PW - 1) / PW) * ((shape.head_dim_v + kStep - 1) / kStep);
  for (const GradientBuffers buffers : {GradientBuffers{3, 2}, GradientBuffers{3, 1}, GradientBuffers{2, 2},
                                        GradientBuffers{2, 1}})
    if (gradient_shared_bytes(dk, PW, group > 1, buffers) <= limit && (steps > 1 || buffers.stages == 2))
      return buffers;
  return {0, 0};
}

// The shared memory a block may have where `blocks` are to share a multiprocessor, which keeps 1 KiB for each.
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
  const int items = shape.chunks() * shape.heads_k * shape.batch;
  const int grid = std::min(items, blocks * device.multiprocessors);
  gradients_kernel<PW><<<grid, gradient_threads(PW), bytes, device.stream>>>(dqkv, dg, dbeta, in, sizes(shape),
                                                                            items, buffers, s);
  launched("gradients_kernel");
}

// Passes over dk as wide as shared memory allows.
inline void gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o, const Saved& saved,
                      const act* qkv, const MixerShape& shape, float s, const float* gates, void* scratch) {
  const GradientInputs in = {qkv, d_o, saved, adjoints_at(scratch, shape), gates};
  const int dk = shape.head_dim_k;
  if (has_warpgroup_products() && takes_warpgroup_gradients(shape)) {
    const auto launch = [&](auto tiles, auto grouped) {
      launch_warpgroup_gradients<decltype(tiles)::value, decltype(grouped)::value>(device, dqkv, dg, dbeta, in,
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
}  // namespace gdn
