// A device for the tests: the CPU with the rounding of the GPU.
#pragma once

#ifdef GDN_CUDA

#include <cstdint>

#include "../cpu_layers.h"
#include "../../gdn_kernels.cuh"

namespace gdn_tests {

using namespace gdn;

// The CPU's layers in float with every activation and activation gradient rounded to bf16 where the GPU
// stores one: how far a model of bf16 activations is from the exact one, whoever computes it. The yardstick
// for the GPU's.
struct Rounded : Cpu<float> {};

inline void round_all(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = __bfloat162float(__float2bfloat16(x[i]));
}

inline void rmsnorm_forward(Rounded& dev, float* h, float* rstd, const float* x, const float* w, int rows,
                            int width) {
  rmsnorm_forward(static_cast<Cpu<float>&>(dev), h, rstd, x, w, rows, width);
  round_all(h, int64_t(rows) * width);
}
inline void residual_rmsnorm_forward(Rounded& dev, float* x_out, float* h, float* rstd, const float* x,
                                     const float* branch, const float* w, int rows, int width) {
  for (int64_t i = 0; i < int64_t(rows) * width; i++) x_out[i] = x[i] + branch[i];
  round_all(x_out, int64_t(rows) * width);
  rmsnorm_forward(dev, h, rstd, x_out, w, rows, width);
}
inline void rmsnorm_backward(Rounded& dev, float* dx, float* dw, float* h, const float* dh, const float* x,
                             const float* rstd, const float* w, int rows, int width, void* scratch) {
  rmsnorm_backward(static_cast<Cpu<float>&>(dev), dx, dw, h, dh, x, rstd, w, rows, width, scratch);
  round_all(dx, int64_t(rows) * width);
  if (h) round_all(h, int64_t(rows) * width);
}
inline void linear_forward(Rounded& dev, float* y, const float* x, const float* w, int rows, int out, int in,
                           float scale = 1) {
  linear_forward(static_cast<Cpu<float>&>(dev), y, x, w, rows, out, in, scale);
  round_all(y, int64_t(rows) * out);
}
inline void linear_backward_input(Rounded& dev, float* dx, const float* dy, const float* w, int rows, int out,
                                  int in, float scale = 1) {
  linear_backward_input(static_cast<Cpu<float>&>(dev), dx, dy, w, rows, out, in, scale);
  round_all(dx, int64_t(rows) * in);
}
inline void short_conv_gates_forward(Rounded& dev, float* qkv, float* rnorm, float* g, float* beta,
                                     const float* proj, const float* taps, const float* A_log,
                                     const float* dt_bias, float* history, const MixerShape& shape,
                                     float beta_max, const int32_t* position) {
  short_conv_gates_forward(static_cast<Cpu<float>&>(dev), qkv, rnorm, g, beta, proj, taps, A_log, dt_bias,
                           history, shape, beta_max, position);
  round_all(qkv, int64_t(shape.rows()) * shape.conv_channels());
}
inline void short_conv_gates_backward(Rounded& dev, float* dproj, float* dtaps, float* dA_log,
                                      float* ddt_bias, float* dqkv, const float* dg, const float* dbeta,
                                      const float* rnorm, const float* g, const float* beta,
                                      const float* proj, const float* taps, const float* A_log,
                                      const float* dt_bias, const MixerShape& shape, float beta_max,
                                      void* scratch, const int32_t* position) {
  short_conv_gates_backward(static_cast<Cpu<float>&>(dev), dproj, dtaps, dA_log, ddt_bias, dqkv, dg, dbeta,
                            rnorm, g, beta, proj, taps, A_log, dt_bias, shape, beta_max, scratch, position);
  round_all(dproj, int64_t(shape.rows()) * shape.columns());  // all of dproj is filled by now
}
inline void gated_delta_rule_forward(Rounded& dev, float* o, void* saved, const float* qkv, const float* g,
                                     const float* beta, const MixerShape& shape, float s, void* scratch) {
  gated_delta_rule_forward(static_cast<Cpu<float>&>(dev), o, saved, qkv, g, beta, shape, s, scratch);
  round_all(o, int64_t(shape.rows()) * shape.value_dim());
}
inline void gated_delta_rule_backward(Rounded& dev, float* dqkv, float* dg, float* dbeta, const float* d_o,
                                      const void* saved, const float* qkv, const float* g, const float* beta,
                                      const MixerShape& shape, float s, void* scratch) {
  gated_delta_rule_backward(static_cast<Cpu<float>&>(dev), dqkv, dg, dbeta, d_o, saved, qkv, g, beta, shape,
                            s, scratch);
  round_all(dqkv, int64_t(shape.rows()) * shape.conv_channels());
}
inline void output_norm_forward(Rounded& dev, float* y, float* rstd, const float* o, const float* proj,
                                const float* w_o, const MixerShape& shape) {
  output_norm_forward(static_cast<Cpu<float>&>(dev), y, rstd, o, proj, w_o, shape);
  round_all(y, int64_t(shape.rows()) * shape.value_dim());
}
inline void output_norm_backward(Rounded& dev, float* d_o, float* dproj, float* dw_o, float* y,
                                 const float* dy, const float* o, const float* rstd, const float* proj,
                                 const float* w_o, const MixerShape& shape, void* scratch) {
  output_norm_backward(static_cast<Cpu<float>&>(dev), d_o, dproj, dw_o, y, dy, o, rstd, proj, w_o, shape,
                       scratch);
  round_all(y, int64_t(shape.rows()) * shape.value_dim());
  round_all(d_o, int64_t(shape.rows()) * shape.value_dim());
}
inline void swiglu_forward(Rounded& dev, float* out, const float* gate_up, int rows, int inner) {
  swiglu_forward(static_cast<Cpu<float>&>(dev), out, gate_up, rows, inner);
  round_all(out, int64_t(rows) * inner);
}
inline void swiglu_backward(Rounded& dev, float* dgate_up, float* out, const float* dout,
                            const float* gate_up, int rows, int inner) {
  swiglu_backward(static_cast<Cpu<float>&>(dev), dgate_up, out, dout, gate_up, rows, inner);
  round_all(out, int64_t(rows) * inner);
  round_all(dgate_up, int64_t(rows) * 2 * inner);
}
inline void softmax_cross_entropy(Rounded& dev, float* logits, float* losses, const int32_t* targets,
                                  int rows, int vocab, int padded, float dlogits_scale) {
  softmax_cross_entropy(static_cast<Cpu<float>&>(dev), logits, losses, targets, rows, vocab, padded,
                        dlogits_scale);
  round_all(logits, int64_t(rows) * padded);
}

}  // namespace gdn_tests

#endif
