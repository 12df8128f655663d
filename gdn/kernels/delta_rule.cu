// The gated delta rule of gdn_kernels.cuh.
#include "../../gdn_kernels.cuh"

#include "delta_rule.cuh"

namespace gdn {

// What the forward keeps for the backward: the states at the chunks' starts [B,Hv,chunks,dv,dk] and E
// [B,T,Hv,dv], fp16, and their exponents [B,Hv,chunks,dv/16]; N and P [B,Hv,chunks,2,64,64], fp16, and gates.
size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape& shape) {
  return delta_rule::saved_bytes(shape);
}

size_t gated_delta_rule_scratch_bytes(Cuda& device, const MixerShape& shape) {
  return delta_rule::scratch_before_pieces(shape) + delta_rule::transitions_bytes(device, shape) +
         delta_rule::boundaries_bytes(device, shape);
}

// o [B,T,Hv,dv] from S_0 = 0. saved may be null when no backward follows.
void gated_delta_rule_forward(Cuda& device, act* o, void* saved, const act* qkv, const float* g,
                                     const float* beta, const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const delta_rule::Prepared prepared = delta_rule::prepared_at(saved, scratch, shape);
  const delta_rule::Pieces pieces = delta_rule::pieces_at(device, scratch, shape);
  delta_rule::prepare(device, qkv, g, beta, shape, s, prepared);
  if (pieces.count > 1) {
    delta_rule::forward_states(device, qkv, shape, prepared, pieces, true);
    delta_rule::join_pieces(device, shape, pieces, false);
  }
  delta_rule::forward_pass(device, o, delta_rule::saved_at(saved, shape), qkv, shape, s, prepared, pieces);
}

// dqkv [B,T,C], dg, dbeta [B,T,Hv] from d_o [B,T,Hv,dv] and what the forward saved.
void gated_delta_rule_backward(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o,
                                      const void* saved, const act* qkv, const float* /*g*/, const float* /*beta*/,
                                      const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const delta_rule::Saved forward = delta_rule::saved_at(const_cast<void*>(saved), shape);
  const delta_rule::Prepared prepared = delta_rule::prepared_at(const_cast<void*>(saved), nullptr, shape);
  const delta_rule::Pieces pieces = delta_rule::pieces_at(device, scratch, shape);
  if (pieces.count > 1) {  // transitions again: kept, they would take memory in every layer of every model
    delta_rule::forward_states(device, qkv, shape, prepared, pieces, false);
    delta_rule::backward_states(device, d_o, qkv, shape, s, prepared, pieces);
    delta_rule::join_pieces(device, shape, pieces, true);
  }
  delta_rule::backward_pass(device, dqkv, d_o, qkv, shape, s, prepared, pieces, scratch);
  delta_rule::gradients(device, dqkv, dg, dbeta, d_o, forward, qkv, shape, s, prepared.gates, scratch);
}

// Token by token from and into state [B,Hv,dk,dv] fp32.
void gated_delta_rule_recurrent(Cuda& device, act* o, float* state, const act* qkv, const float* g,
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
