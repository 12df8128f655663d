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

// The kernels' launches, in objects of their own (delta_rule_launch.cuh): those of one compiled dk,
template <int DK>
struct Passes {
  static void join_pieces(Cuda&, const MixerShape&, const Pieces&, bool backward);
  static void forward_states(Cuda&, const act* qkv, const MixerShape&, const Prepared&, const Pieces&, bool ends);
  static void backward_states(Cuda&, const act* d_o, const act* qkv, const MixerShape&, float s, const Prepared&,
                              const Pieces&);
  static void forward_pass(Cuda&, act* o, const Saved&, const act* qkv, const MixerShape&, float s,
                           const Prepared&, const Pieces&);
  static void backward_pass(Cuda&, act* dqkv, const act* d_o, const act* qkv, const MixerShape&, float s,
                            const Prepared&, const Pieces&, void* scratch);
};
extern template struct Passes<32>;
extern template struct Passes<64>;
extern template struct Passes<96>;
extern template struct Passes<128>;
extern template struct Passes<192>;
extern template struct Passes<256>;

// and those of every dk.
void prepare(Cuda&, const act* qkv, const float* g, const float* beta, const MixerShape&, float s,
             const Prepared& to);
void gradients(Cuda&, act* dqkv, float* dg, float* dbeta, const act* d_o, const Saved&, const act* qkv,
               const MixerShape&, float s, const float* gates, void* scratch);

// From transitions and ends from zero: the states at all pieces' starts, or (backward) their gradients at the
// ends.
inline void join_pieces(Cuda& device, const MixerShape& shape, const Pieces& pieces, bool backward) {
  if (pieces.count < 3) return;
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::join_pieces(device, shape, pieces, backward);
  });
}

// Transitions, and with `ends` the ends from zero.
inline void forward_states(Cuda& device, const act* qkv, const MixerShape& shape, const Prepared& prepared,
                           const Pieces& pieces, bool ends) {
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::forward_states(device, qkv, shape, prepared, pieces, ends);
  });
}

// Of all pieces but the first, dS at the start from 0 at the end.
inline void backward_states(Cuda& device, const act* d_o, const act* qkv, const MixerShape& shape, float s,
                            const Prepared& prepared, const Pieces& pieces) {
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::backward_states(device, d_o, qkv, shape, s, prepared, pieces);
  });
}

inline void forward_pass(Cuda& device, act* o, const Saved& saved, const act* qkv, const MixerShape& shape,
                         float s, const Prepared& prepared, const Pieces& pieces) {
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::forward_pass(device, o, saved, qkv, shape, s, prepared, pieces);
  });
}

inline void backward_pass(Cuda& device, act* dqkv, const act* d_o, const act* qkv, const MixerShape& shape,
                          float s, const Prepared& prepared, const Pieces& pieces, void* scratch) {
  with_head_dim_k(shape.head_dim_k, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::backward_pass(device, dqkv, d_o, qkv, shape, s, prepared, pieces, scratch);
  });
}

}  // namespace delta_rule
}  // namespace gdn
