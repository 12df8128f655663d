// The GPU layers of gdn_kernels.cuh as they are written to be read (make train_gdn_readable
// test_gdn_readable): float throughout, a plain loop for an equation; only what enters or leaves a layer as
// bf16 is rounded. The embedding, the matrix products (cuBLASLt), the optimizer and the initial values are
// the fast ones: they compute nothing differently from a plain loop but for the order of their sums.
#include "../../gdn_kernels.cuh"

#include "../../gdn/kernels/embedding.cuh"
#include "../../gdn/kernels/initial_values.cuh"
#include "../../gdn/kernels/linear.cuh"
#include "../../gdn/kernels/optimizer.cuh"
#include "classifier.cuh"
#include "delta_rule.cuh"
#include "output_norm.cuh"
#include "rmsnorm.cuh"
#include "short_conv.cuh"
#include "swiglu.cuh"

namespace gdn {

void rmsnorm_forward(Cuda& dev, act* h, float* rstd, const act* x, const float* w, int rows,
                            int width) {
  readable::rmsnorm_forward(dev, h, rstd, x, w, rows, width);
}

void residual_rmsnorm_forward(Cuda& dev, act* x_out, act* h, float* rstd, const act* x,
                                     const act* branch, const float* w, int rows, int width) {
  readable::residual_rmsnorm_forward(dev, x_out, h, rstd, x, branch, w, rows, width);
}

void rmsnorm_backward(Cuda& dev, act* dx, float* dw, act* h, const act* dh, const act* x,
                             const float* rstd, const float* w, int rows, int width, void* scratch) {
  readable::rmsnorm_backward(dev, dx, dw, h, dh, x, rstd, w, rows, width, scratch);
}

size_t rmsnorm_backward_scratch_bytes(Cuda& dev, int rows, int width) {
  return readable::rmsnorm_backward_scratch_bytes(dev, rows, width);
}

void short_conv_gates_forward(Cuda& dev, act* qkv, float* rnorm, float* g, float* beta,
                                     const act* proj, const float* taps, const float* A_log,
                                     const float* dt_bias, act* history, const MixerShape& shape,
                                     float beta_max, const int32_t* position) {
  readable::short_conv_gates_forward(dev, qkv, rnorm, g, beta, proj, taps, A_log, dt_bias, history, shape,
                                     beta_max, position);
}

void short_conv_gates_backward(Cuda& dev, act* dproj, float* dtaps, float* dA_log, float* ddt_bias,
                                      act* dqkv, const float* dg, const float* dbeta, const float* rnorm,
                                      const float* g, const float* beta, const act* proj, const float* taps,
                                      const float* A_log, const float* dt_bias, const MixerShape& shape,
                                      float beta_max, void* scratch, const int32_t* position) {
  readable::short_conv_gates_backward(dev, dproj, dtaps, dA_log, ddt_bias, dqkv, dg, dbeta, rnorm, g, beta,
                                      proj, taps, A_log, dt_bias, shape, beta_max, scratch, position);
}

size_t short_conv_gates_backward_scratch_bytes(Cuda& dev, const MixerShape& shape) {
  return readable::short_conv_gates_backward_scratch_bytes(dev, shape);
}

void gated_delta_rule_forward(Cuda& dev, act* o, void* saved, const act* qkv, const float* g,
                                     const float* beta, const MixerShape& shape, float s, void* scratch) {
  readable::gated_delta_rule_forward(dev, o, saved, qkv, g, beta, shape, s, scratch);
}

size_t gated_delta_rule_saved_bytes(Cuda& dev, const MixerShape& shape) {
  return readable::gated_delta_rule_saved_bytes(dev, shape);
}

size_t gated_delta_rule_scratch_bytes(Cuda& dev, const MixerShape& shape) {
  return readable::gated_delta_rule_scratch_bytes(dev, shape);
}

void gated_delta_rule_backward(Cuda& dev, act* dqkv, float* dg, float* dbeta, const act* d_o,
                                      const void* saved, const act* qkv, const float* g, const float* beta,
                                      const MixerShape& shape, float s, void* scratch) {
  readable::gated_delta_rule_backward(dev, dqkv, dg, dbeta, d_o, saved, qkv, g, beta, shape, s, scratch);
}

void gated_delta_rule_recurrent(Cuda& dev, act* o, float* state, const act* qkv, const float* g,
                                       const float* beta, const MixerShape& shape, float s) {
  readable::gated_delta_rule_recurrent(dev, o, state, qkv, g, beta, shape, s);
}

void output_norm_forward(Cuda& dev, act* y, float* rstd, const act* o, const act* proj,
                                const float* w_o, const MixerShape& shape) {
  readable::output_norm_forward(dev, y, rstd, o, proj, w_o, shape);
}

void output_norm_backward(Cuda& dev, act* d_o, act* dproj, float* dw_o, act* y, const act* dy,
                                 const act* o, const float* rstd, const act* proj, const float* w_o,
                                 const MixerShape& shape, void* scratch) {
  readable::output_norm_backward(dev, d_o, dproj, dw_o, y, dy, o, rstd, proj, w_o, shape, scratch);
}

size_t output_norm_backward_scratch_bytes(Cuda& dev, const MixerShape& shape) {
  return readable::output_norm_backward_scratch_bytes(dev, shape);
}

void swiglu_forward(Cuda& dev, act* out, const act* gate_up, int rows, int inner) {
  readable::swiglu_forward(dev, out, gate_up, rows, inner);
}

void swiglu_backward(Cuda& dev, act* dgate_up, act* out, const act* dout, const act* gate_up, int rows,
                            int inner) {
  readable::swiglu_backward(dev, dgate_up, out, dout, gate_up, rows, inner);
}

void softmax_cross_entropy(Cuda& dev, act* logits, float* losses, const int32_t* targets, int rows,
                                  int vocab, int padded, float dlogits_scale) {
  readable::softmax_cross_entropy(dev, logits, losses, targets, rows, vocab, padded, dlogits_scale);
}

void sum_losses(Cuda& dev, double* total, const float* losses, int rows) {
  readable::sum_losses(dev, total, losses, rows);
}

}  // namespace gdn
