// The GPU layers of gdn_kernels.cuh as they are written to be read (make train_gdn_readable
// test_gdn_readable): where a fast layer's arithmetic is not that of its equations in float, the one of this
// folder takes its place.
#pragma once

#include "../../gdn/kernels/classifier.cuh"
#include "../../gdn/kernels/embedding.cuh"
#include "../../gdn/kernels/initial_values.cuh"
#include "../../gdn/kernels/linear.cuh"
#include "../../gdn/kernels/optimizer.cuh"
#include "../../gdn/kernels/output_norm.cuh"
#include "../../gdn/kernels/rmsnorm.cuh"
#include "../../gdn/kernels/short_conv.cuh"
#include "../../gdn/kernels/swiglu.cuh"
#include "delta_rule.cuh"

namespace gdn {

inline void gated_delta_rule_forward(Cuda& device, act* o, void* saved, const act* qkv, const float* g,
                                     const float* beta, const MixerShape& shape, float s, void* scratch) {
  readable::gated_delta_rule_forward(device, o, saved, qkv, g, beta, shape, s, scratch);
}

inline size_t gated_delta_rule_saved_bytes(Cuda& device, const MixerShape& shape) {
  return readable::gated_delta_rule_saved_bytes(device, shape);
}

inline size_t gated_delta_rule_scratch_bytes(Cuda& device, const MixerShape& shape) {
  return readable::gated_delta_rule_scratch_bytes(device, shape);
}

inline void gated_delta_rule_backward(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o,
                                      const void* saved, const act* qkv, const float* g, const float* beta,
                                      const MixerShape& shape, float s, void* scratch) {
  readable::gated_delta_rule_backward(device, dqkv, dg, dbeta, d_o, saved, qkv, g, beta, shape, s, scratch);
}

inline void gated_delta_rule_recurrent(Cuda& device, act* o, float* state, const act* qkv, const float* g,
                                       const float* beta, const MixerShape& shape, float s) {
  readable::gated_delta_rule_recurrent(device, o, state, qkv, g, beta, shape, s);
}

}  // namespace gdn
