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
// sequences are split (splits.cuh). Warps, stages and slices by head size and by the GPU's shared memory:
// schedule.h, dev/doc/delta_rule_plans.md. The state and its gradient stay in fp32 registers for the whole
// sequence or split. There are no atomics: results have the same bits in every run.
//
// Times in ms on an H200 (dev/bench_delta_rule, dev/results/delta_rule_speed). The forward saves N, P
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
#include "gradient_common.cuh"
#include "sm80/passes.cuh"
#include "sm90/passes.cuh"

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
// In such code prepare_kernel and the passes on mma.sync are empty: they are never launched where this is
// true.
inline bool has_wgmma() {
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, arch_probe_kernel));
  return attributes.maxThreadsPerBlock == 128;
}

inline Sizes sizes(const MixerShape& shape) {
  require_head_dims(shape);
  return {shape.tokens,
          shape.heads_k,
          shape.heads_v,
          shape.head_dim_k,
          shape.head_dim_v,
          shape.chunks(),
          shape.heads_v / shape.heads_k};
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
  return device.sm_count * resident_passes(shape.head_dim_k, device.shared_bytes);
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

// What prepare_kernel leaves: in `saved` behind the forward's states, in scratch if nothing is saved.
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

// What the launches of a call share: sizes, schedules, and where prepare_kernel's outputs and the splits'
// states lie.
struct DeltaRulePlan {
  MixerShape shape;
  Sizes size;
  float s;     // scale of the readout
  bool wgmma;  // the kernels for Hopper; else those on mma.sync, by `pass` and `gradients`
  Prepared prepared;
  Splits splits;
  PassPlan pass;
  GradientPlan gradients;
};

inline DeltaRulePlan make_plan(const Cuda& device, const MixerShape& shape, float s, const Prepared& prepared,
                               const Splits& splits) {
  return {shape,
          sizes(shape),
          s,
          has_wgmma(),
          prepared,
          splits,
          pass_plan(shape, splits.count, device.sm_count, device.shared_bytes),
          gradient_plan(shape, device.shared_bytes)};
}

// The kernels' launches, in objects of their own. Those of one compiled dk (delta_rule_head_dim.cu):
template <int DK>
struct Passes {
  static void merge_splits(Cuda&, const DeltaRulePlan&, bool backward);
  static void forward_states(Cuda&, const DeltaRulePlan&, const Qkv<const act>&, bool ends);
  static void backward_states(Cuda&, const DeltaRulePlan&, const Qkv<const act>&,
                              const HeadRows<const act>& d_o);
  static void forward_pass(Cuda&, const DeltaRulePlan&, const HeadRows<act>& o, const Saved&,
                           const Qkv<const act>&, const CallStates&);
  static void backward_pass(Cuda&, const DeltaRulePlan&, const HeadRows<act>& dv, const Adjoints&,
                            const Qkv<const act>&, const HeadRows<const act>& d_o, const CallStates&);
};
extern template struct Passes<32>;
extern template struct Passes<64>;
extern template struct Passes<96>;
extern template struct Passes<128>;
extern template struct Passes<192>;
extern template struct Passes<256>;

// Those of every dk (delta_rule.cu):
void prepare(Cuda&, const DeltaRulePlan&, const PrepareInputs&);
void gradients(Cuda&, const DeltaRulePlan&, const GradientOutputs&, const GradientInputs&);

// From M and B of all splits: the states at the splits' starts, or (backward) their gradients at the ends.
inline void merge_splits(Cuda& device, const DeltaRulePlan& plan, bool backward) {
  if (plan.splits.count < 3) return;
  with_head_dim_k(plan.size.dk, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::merge_splits(device, plan, backward);
  });
}

// Transitions M of the splits, and with `ends` also their final states B.
inline void forward_states(Cuda& device, const DeltaRulePlan& plan, const Qkv<const act>& qkv, bool ends) {
  with_head_dim_k(plan.size.dk, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::forward_states(device, plan, qkv, ends);
  });
}

// dS at the start of all splits but the first, from 0 at their end.
inline void backward_states(Cuda& device, const DeltaRulePlan& plan, const Qkv<const act>& qkv,
                            const HeadRows<const act>& d_o) {
  with_head_dim_k(plan.size.dk, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::backward_states(device, plan, qkv, d_o);
  });
}

inline void forward_pass(Cuda& device, const DeltaRulePlan& plan, const HeadRows<act>& o, const Saved& saved,
                         const Qkv<const act>& qkv, const CallStates& states = {}) {
  with_head_dim_k(plan.size.dk, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::forward_pass(device, plan, o, saved, qkv, states);
  });
}

inline void backward_pass(Cuda& device, const DeltaRulePlan& plan, const HeadRows<act>& dv,
                          const Adjoints& adjoints, const Qkv<const act>& qkv, const HeadRows<const act>& d_o,
                          const CallStates& states = {}) {
  with_head_dim_k(plan.size.dk, [&](auto head_dim) {
    Passes<decltype(head_dim)::value>::backward_pass(device, plan, dv, adjoints, qkv, d_o, states);
  });
}

}  // namespace delta_rule
}  // namespace gdn
