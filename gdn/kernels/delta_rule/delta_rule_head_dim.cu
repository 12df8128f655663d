// The passes of the gated delta rule for one compiled head size: make compiles this file once for each, with
// GDN_HEAD_DIM_K.
#include "delta_rule.cuh"

namespace gdn {
namespace delta_rule {

// kernel<<<grid, threads, bytes>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(Cuda& device, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int bytes,
            const Arguments&... arguments) {
  allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
  kernel<<<grid, threads, bytes, device.stream>>>(arguments...);
  launched(name);
}

// Calls f with the consumer warpgroups of a CTA of the wgmma passes, and the grid.
template <class F>
void with_warpgroups(const Cuda& device, const DeltaRulePlan& plan, const F& f) {
  const MixerShape& shape = plan.shape;
  const int groups = pass_groups(device, shape, plan.splits.count);
  const dim3 grid(divide_up(shape.head_dim_v, 64 * groups), shape.heads_v, shape.batch * plan.splits.count);
  if (groups == 1) return f(std::integral_constant<int, 1>(), grid);
  f(std::integral_constant<int, 2>(), grid);
}

// Calls f with the stages of the mma.sync passes.
template <int DK, class F>
void with_stages(const DeltaRulePlan& plan, const F& f) {
  if constexpr (has_one_stage_passes(DK))
    if (plan.pass.stages == 1) return f(std::integral_constant<int, 1>());
  f(std::integral_constant<int, 2>());
}

// Grid of the mma.sync passes over `splits` splits of each sequence.
inline dim3 pass_grid(const DeltaRulePlan& plan, int splits) {
  return dim3(plan.pass.slices(plan.size.dv), plan.size.heads_v, plan.shape.batch * splits);
}

inline PassInputs pass_inputs(const DeltaRulePlan& plan, const Qkv<const act>& qkv,
                              const HeadRows<const act>& values) {
  return {qkv.q, qkv.k, values, plan.prepared.matrices, plan.prepared.gates, {}};
}

template <int DK>
void Passes<DK>::merge_splits(Cuda& device, const DeltaRulePlan& plan, bool backward) {
  constexpr int kColumns = merge_columns(DK);
  const dim3 grid(divide_up(plan.size.dv, kMergeRows), plan.size.heads_v, plan.shape.batch);
  launch(device, "merge_splits_kernel",
         backward ? merge_splits_kernel<kColumns, true> : merge_splits_kernel<kColumns, false>, grid,
         kMergeThreads, 0, plan.splits, plan.size);
}

template <int DK>
void Passes<DK>::forward_states(Cuda& device, const DeltaRulePlan& plan, const Qkv<const act>& qkv,
                                bool ends) {
  const PassInputs in = pass_inputs(plan, qkv, qkv.v);
  const int ends_count = plan.splits.count - 1;
  const auto run = [&](auto kernel, int warps, int bytes) {
    const int slices_v = ends ? divide_up(plan.size.dv, 16 * warps) : 0;
    const int slices_k = divide_up(plan.size.dk, 16 * warps);
    const dim3 grid(slices_v + slices_k, plan.size.heads_v, plan.shape.batch * ends_count);
    launch(device, "forward_state_kernel", kernel, grid, 32 * warps, bytes, in, plan.size, plan.splits,
           slices_v);
  };
  if (plan.wgmma) {
    // If all CTAs fit one per SM, request enough shared memory to force that. Otherwise the CTAs of the
    // first split's (unneeded) transition, which exit at once, hold an SM while the last CTAs double up
    // elsewhere.
    const int slices_v = ends ? divide_up(plan.size.dv, 64) : 0, slices_k = divide_up(plan.size.dk, 64);
    const int64_t blocks =
        int64_t(plan.shape.batch) * plan.size.heads_v * (ends_count * slices_v + (ends_count - 1) * slices_k);
    const int bytes = 2 * Sm90Stage<DK, 1, false>::kBytes, alone = device.shared_bytes / 2 + 1;
    return run(forward_state_sm90_kernel<DK>, 4, blocks <= device.sm_count ? std::max(bytes, alone) : bytes);
  }
  with_stages<DK>(plan, [&](auto stages) {
    run(forward_state_kernel<DK, decltype(stages)::value>, plan.pass.warps, plan.pass.bytes);
  });
}

template <int DK>
void Passes<DK>::backward_states(Cuda& device, const DeltaRulePlan& plan, const Qkv<const act>& qkv,
                                 const HeadRows<const act>& d_o) {
  const PassInputs in = pass_inputs(plan, qkv, d_o);
  const int splits = plan.splits.count - 1;
  const auto run = [&](auto kernel, dim3 grid, int threads, int bytes) {
    launch(device, "backward_pass_kernel of states", kernel, grid, threads, bytes, in, HeadRows<act>(),
           Adjoints(), plan.size, plan.splits, plan.s);
  };
  if (plan.wgmma) {
    const dim3 grid(divide_up(plan.size.dv, 64), plan.size.heads_v, plan.shape.batch * splits);
    return run(backward_pass_sm90_kernel<DK, 1, true>, grid, pass_schedule(DK, 1).threads(),
               sm90_pass_bytes(DK, 1));
  }
  with_stages<DK>(plan, [&](auto stages) {
    run(backward_pass_kernel<DK, decltype(stages)::value, true>, pass_grid(plan, splits),
        32 * plan.pass.warps, plan.pass.bytes);
  });
}

template <int DK>
void Passes<DK>::forward_pass(Cuda& device, const DeltaRulePlan& plan, const HeadRows<act>& o,
                              const Saved& saved, const Qkv<const act>& qkv, const CallStates& states) {
  PassInputs in = pass_inputs(plan, qkv, qkv.v);
  in.states = states;
  const auto run = [&](auto kernel, dim3 grid, int threads, int bytes) {
    launch(device, "forward_pass_kernel", kernel, grid, threads, bytes, in, o, saved, plan.size, plan.splits,
           plan.s);
  };
  if (plan.wgmma)
    return with_warpgroups(device, plan, [&](auto groups, dim3 grid) {
      constexpr int kGroups = decltype(groups)::value;
      run(forward_pass_sm90_kernel<DK, kGroups>, grid, pass_schedule(DK, kGroups).threads(),
          sm90_pass_bytes(DK, kGroups));
    });
  with_stages<DK>(plan, [&](auto stages) {
    run(forward_pass_kernel<DK, decltype(stages)::value>, pass_grid(plan, plan.splits.count),
        32 * plan.pass.warps, plan.pass.bytes);
  });
}

template <int DK>
void Passes<DK>::backward_pass(Cuda& device, const DeltaRulePlan& plan, const HeadRows<act>& dv,
                               const Adjoints& adjoints, const Qkv<const act>& qkv,
                               const HeadRows<const act>& d_o, const CallStates& states) {
  PassInputs in = pass_inputs(plan, qkv, d_o);
  in.states = states;
  const auto run = [&](auto kernel, dim3 grid, int threads, int bytes) {
    launch(device, "backward_pass_kernel", kernel, grid, threads, bytes, in, dv, adjoints, plan.size,
           plan.splits, plan.s);
  };
  if (plan.wgmma)
    return with_warpgroups(device, plan, [&](auto groups, dim3 grid) {
      constexpr int kGroups = decltype(groups)::value;
      run(backward_pass_sm90_kernel<DK, kGroups, false>, grid, pass_schedule(DK, kGroups).threads(),
          sm90_pass_bytes(DK, kGroups));
    });
  with_stages<DK>(plan, [&](auto stages) {
    run(backward_pass_kernel<DK, decltype(stages)::value, false>, pass_grid(plan, plan.splits.count),
        32 * plan.pass.warps, plan.pass.bytes);
  });
}

template struct Passes<GDN_HEAD_DIM_K>;

}  // namespace delta_rule
}  // namespace gdn
