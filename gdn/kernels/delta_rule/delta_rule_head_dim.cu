// The passes of the gated delta rule for one compiled head size: make compiles this file once for each, with
// GDN_HEAD_DIM_K.
#include "delta_rule.cuh"

namespace gdn {
namespace delta_rule {

// Calls launch with the warpgroups of a CTA, and the grid.
template <class Launch>
void with_warpgroups(const Cuda& device, const MixerShape& shape, int splits, const Launch& launch) {
  const int groups = pass_groups(device, shape, splits);
  const dim3 grid(divide_up(shape.head_dim_v, 64 * groups), shape.heads_v, shape.batch * splits);
  if (groups == 1) return launch(std::integral_constant<int, 1>(), grid);
  launch(std::integral_constant<int, 2>(), grid);
}

// Calls launch with the plan's stages.
template <int DK, class Launch>
void with_stages(const PassPlan& plan, const Launch& launch) {
  if constexpr (has_one_stage_passes(DK))
    if (plan.stages == 1) return launch(std::integral_constant<int, 1>());
  launch(std::integral_constant<int, 2>());
}

template <int DK>
void Passes<DK>::merge_splits(Cuda& device, const MixerShape& shape, const Splits& splits, bool backward) {
  const dim3 grid(divide_up(shape.head_dim_v, kMergeRows), shape.heads_v, shape.batch);
  constexpr int kColumns = merge_columns(DK);
  const auto kernel = backward ? merge_splits_kernel<kColumns, true> : merge_splits_kernel<kColumns, false>;
  kernel<<<grid, kMergeThreads, 0, device.stream>>>(splits, sizes(shape));
  launched("merge_splits_kernel");
}

template <int DK>
void Passes<DK>::forward_states(Cuda& device, const act* qkv, const MixerShape& shape,
                                const Prepared& prepared, const Splits& splits, bool ends) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  const auto launch = [&](auto kernel, int warps, int bytes) {
    const int slices_v = ends ? divide_up(shape.head_dim_v, 16 * warps) : 0;
    const int slices_k = divide_up(shape.head_dim_k, 16 * warps);
    allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
    const dim3 grid(slices_v + slices_k, shape.heads_v, shape.batch * (splits.count - 1));
    kernel<<<grid, 32 * warps, bytes, device.stream>>>(qkv, matrices, gates, sizes(shape), splits, slices_v);
    launched("forward_state_kernel");
  };
  if (has_wgmma()) {
    // If all CTAs fit one per SM, request enough shared memory to force that. Otherwise the CTAs of the
    // first split's (unneeded) transition, which exit at once, hold an SM while the last CTAs double up
    // elsewhere.
    const int slices_v = ends ? divide_up(shape.head_dim_v, 64) : 0;
    const int slices_k = divide_up(shape.head_dim_k, 64), ends_count = splits.count - 1;
    const int64_t blocks =
        int64_t(shape.batch) * shape.heads_v * (ends_count * slices_v + (ends_count - 1) * slices_k);
    const int bytes = 2 * Sm90Stage<DK, 1, false>::kBytes, alone = device.shared_bytes / 2 + 1;
    return launch(forward_state_sm90_kernel<DK>, 4,
                  blocks <= device.sm_count ? std::max(bytes, alone) : bytes);
  }
  const PassPlan plan = pass_plan(shape, splits.count, device.sm_count, device.shared_bytes);
  with_stages<DK>(plan, [&](auto stages) {
    launch(forward_state_kernel<DK, decltype(stages)::value>, plan.warps, plan.bytes);
  });
}

template <int DK>
void Passes<DK>::backward_states(Cuda& device, const act* d_o, const act* qkv, const MixerShape& shape,
                                 float s, const Prepared& prepared, const Splits& splits) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  const auto launch = [&](auto kernel, int warps, int threads, int bytes) {
    allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
    const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * (splits.count - 1));
    kernel<<<grid, threads, bytes, device.stream>>>(nullptr, Adjoints(), d_o, qkv, matrices, gates,
                                                    sizes(shape), splits, s);
    launched("backward_pass_kernel of states");
  };
  if (has_wgmma())
    return launch(backward_pass_sm90_kernel<DK, 1, true>, 4, pass_threads(DK, 1),
                  pass_stages(DK) * Sm90Stage<DK, 1>::kBytes);
  const PassPlan plan = pass_plan(shape, splits.count, device.sm_count, device.shared_bytes);
  with_stages<DK>(plan, [&](auto stages) {
    launch(backward_pass_kernel<DK, decltype(stages)::value, true>, plan.warps, 32 * plan.warps, plan.bytes);
  });
}

template <int DK>
void Passes<DK>::forward_pass(Cuda& device, act* o, const Saved& saved, const act* qkv,
                              const MixerShape& shape, float s, const Prepared& prepared,
                              const Splits& splits) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_wgmma()) {
    with_warpgroups(device, shape, splits.count, [&](auto warpgroups, dim3 grid) {
      constexpr int kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * Sm90Stage<DK, kGroups>::kBytes;
      const auto kernel = forward_pass_sm90_kernel<DK, kGroups>;
      allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                        sizes(shape), splits, s);
    });
  } else {
    const PassPlan plan = pass_plan(shape, splits.count, device.sm_count, device.shared_bytes);
    const dim3 grid(plan.slices(shape.head_dim_v), shape.heads_v, shape.batch * splits.count);
    with_stages<DK>(plan, [&](auto stages) {
      const auto kernel = forward_pass_kernel<DK, decltype(stages)::value>;
      allow_shared_bytes(device, kernel, plan.bytes, "the gated delta rule");
      kernel<<<grid, 32 * plan.warps, plan.bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                   sizes(shape), splits, s);
    });
  }
  launched("forward_pass_kernel");
}

template <int DK>
void Passes<DK>::backward_pass(Cuda& device, act* dqkv, const act* d_o, const act* qkv,
                               const MixerShape& shape, float s, const Prepared& prepared,
                               const Splits& splits, void* scratch) {
  const Adjoints adjoints = adjoints_at(scratch, shape);
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_wgmma()) {
    with_warpgroups(device, shape, splits.count, [&](auto warpgroups, dim3 grid) {
      constexpr int kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * Sm90Stage<DK, kGroups>::kBytes;
      const auto kernel = backward_pass_sm90_kernel<DK, kGroups, false>;
      allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(dqkv, adjoints, d_o, qkv, matrices,
                                                                        gates, sizes(shape), splits, s);
    });
  } else {
    const PassPlan plan = pass_plan(shape, splits.count, device.sm_count, device.shared_bytes);
    const dim3 grid(plan.slices(shape.head_dim_v), shape.heads_v, shape.batch * splits.count);
    with_stages<DK>(plan, [&](auto stages) {
      const auto kernel = backward_pass_kernel<DK, decltype(stages)::value, false>;
      allow_shared_bytes(device, kernel, plan.bytes, "the gated delta rule");
      kernel<<<grid, 32 * plan.warps, plan.bytes, device.stream>>>(dqkv, adjoints, d_o, qkv, matrices, gates,
                                                                   sizes(shape), splits, s);
    });
  }
  launched("backward_pass_kernel");
}

template struct Passes<GDN_HEAD_DIM_K>;

}  // namespace delta_rule
}  // namespace gdn
