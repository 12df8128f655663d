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

template <int DK>
void Passes<DK>::merge_splits(Cuda& device, const MixerShape& shape, const Splits& splits, bool backward) {
  const dim3 grid(divide_up(shape.head_dim_v, kMergeRows), shape.heads_v, shape.batch);
  constexpr int kColumns = merge_columns(DK);
  const auto kernel = backward ? merge_splits_kernel<kColumns, true> : merge_splits_kernel<kColumns, false>;
  kernel<<<grid, kMergeThreads, 0, device.stream>>>(splits, sizes(shape));
  launched("merge_splits_kernel");
}

template <int DK>
void Passes<DK>::forward_states(Cuda& device, const act* qkv, const MixerShape& shape, const Prepared& prepared,
                                const Splits& splits, bool ends) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  const auto launch = [&](auto kernel, int warps, int bytes) {
    const int slices_v = ends ? divide_up(shape.head_dim_v, 16 * warps) : 0;
    const int slices_k = divide_up(shape.head_dim_k, 16 * warps);
    allow_shared_bytes(kernel, bytes, "the gated delta rule");
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
    const int bytes = 2 * Sm90Stage<DK, 1, false>::kBytes, alone = shared_bytes_limit() / 2 + 1;
    return launch(forward_state_sm90_kernel<DK>, 4,
                  blocks <= device.sm_count ? std::max(bytes, alone) : bytes);
  }
  const int warps = pass_warps(device, shape, DK, splits.count);
  launch(forward_state_kernel<DK>, warps, 2 * pass_stage_bytes(DK, warps));
}

template <int DK>
void Passes<DK>::backward_states(Cuda& device, const act* d_o, const act* qkv, const MixerShape& shape, float s,
                                 const Prepared& prepared, const Splits& splits) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  const auto launch = [&](auto kernel, int warps, int threads, int bytes) {
    allow_shared_bytes(kernel, bytes, "the gated delta rule");
    const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * (splits.count - 1));
    kernel<<<grid, threads, bytes, device.stream>>>(nullptr, Adjoints(), d_o, qkv, matrices, gates, sizes(shape),
                                                    splits, s);
    launched("backward_pass_kernel of states");
  };
  if (has_wgmma())
    return launch(backward_pass_sm90_kernel<DK, 1, true>, 4, pass_threads(DK, 1),
                  pass_stages(DK) * Sm90Stage<DK, 1>::kBytes);
  const int warps = pass_warps(device, shape, DK, splits.count);
  launch(backward_pass_kernel<DK, true>, warps, 32 * warps, 2 * pass_stage_bytes(DK, warps));
}

template <int DK>
void Passes<DK>::forward_pass(Cuda& device, act* o, const Saved& saved, const act* qkv, const MixerShape& shape,
                              float s, const Prepared& prepared, const Splits& splits) {
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_wgmma()) {
    with_warpgroups(device, shape, splits.count, [&](auto warpgroups, dim3 grid) {
      constexpr int kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * Sm90Stage<DK, kGroups>::kBytes;
      const auto kernel = forward_pass_sm90_kernel<DK, kGroups>;
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                        sizes(shape), splits, s);
    });
  } else {
    const int warps = pass_warps(device, shape, DK, splits.count), bytes = 2 * pass_stage_bytes(DK, warps);
    allow_shared_bytes(forward_pass_kernel<DK>, bytes, "the gated delta rule");
    const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * splits.count);
    forward_pass_kernel<DK><<<grid, 32 * warps, bytes, device.stream>>>(o, saved, qkv, matrices, gates,
                                                                        sizes(shape), splits, s);
  }
  launched("forward_pass_kernel");
}

template <int DK>
void Passes<DK>::backward_pass(Cuda& device, act* dqkv, const act* d_o, const act* qkv, const MixerShape& shape,
                               float s, const Prepared& prepared, const Splits& splits, void* scratch) {
  const Adjoints adjoints = adjoints_at(scratch, shape);
  const __half* matrices = prepared.matrices;
  const float* gates = prepared.gates;
  if (has_wgmma()) {
    with_warpgroups(device, shape, splits.count, [&](auto warpgroups, dim3 grid) {
      constexpr int kGroups = decltype(warpgroups)::value;
      constexpr int bytes = pass_stages(DK) * Sm90Stage<DK, kGroups>::kBytes;
      const auto kernel = backward_pass_sm90_kernel<DK, kGroups, false>;
      allow_shared_bytes(kernel, bytes, "the gated delta rule");
      kernel<<<grid, pass_threads(DK, kGroups), bytes, device.stream>>>(
          dqkv, adjoints, d_o, qkv, matrices, gates, sizes(shape), splits, s);
    });
  } else {
    const int warps = pass_warps(device, shape, DK, splits.count), bytes = 2 * pass_stage_bytes(DK, warps);
    allow_shared_bytes(backward_pass_kernel<DK, false>, bytes, "the gated delta rule");
    const dim3 grid(divide_up(shape.head_dim_v, 16 * warps), shape.heads_v, shape.batch * splits.count);
    backward_pass_kernel<DK, false><<<grid, 32 * warps, bytes, device.stream>>>(
        dqkv, adjoints, d_o, qkv, matrices, gates, sizes(shape), splits, s);
  }
  launched("backward_pass_kernel");
}

template struct Passes<GDN_HEAD_DIM_K>;

}  // namespace delta_rule
}  // namespace gdn
