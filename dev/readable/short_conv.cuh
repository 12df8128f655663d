// The short convolution, silu, L2 norm of q and k, and the gates to be read; equations in gdn/cpu_layers.h. A
// kernel for each of them; what a later one needs of an earlier one before it is rounded is computed again.
#pragma once

#include "common.cuh"

namespace gdn {
namespace readable {

// What all kernels here read. proj [M,P], taps [C,4], A_log, dt_bias [Hv]; history [B,3,C] and position [M]
// or nullptr.
struct ConvInputs {
  const act *proj, *history;
  const float *taps, *A_log, *dt_bias;
  const int32_t* position;
  float beta_max;
  int rows, tokens, channels, columns;                 // M, T, C, P
  int key_heads, dk, value_heads, a_column, b_column;  // key_heads: of q and of k, 2 Hk

  __device__ int key_channels() const { return key_heads * dk; }
  // Whether the input `distance` steps before row m is of m's document.
  __device__ bool same_document(int64_t m, int distance) const {
    return !position || distance <= position[m];
  }
  // x_{t-distance} of channel c, t the step of row m.
  __device__ float input(int64_t m, int distance, int c) const {
    const int64_t t = m % tokens, slot = m / tokens * (kConvTaps - 1) + t - distance + kConvTaps - 1;
    if (!same_document(m, distance)) return 0;
    if (distance <= t) return number(proj, (m - distance) * columns + c);
    return history ? number(history, slot * channels + c) : 0.0f;
  }
  // u = sum_j taps[j] x_{t-3+j}
  __device__ float convolved(int64_t m, int c) const {
    float u = 0;
    for (int j = 0; j < kConvTaps; j++) u += taps[c * kConvTaps + j] * input(m, kConvTaps - 1 - j, c);
    return u;
  }
  // A document's first token has a constant decay.
  __device__ bool masks_decay(int64_t m) const { return position && position[m] == 0; }
};

inline ConvInputs conv_inputs(const act* proj, const act* history, const float* taps, const float* A_log,
                              const float* dt_bias, const int32_t* position, float beta_max,
                              const MixerShape& s) {
  require_head_dims(s);
  return {proj,         history,           taps,         A_log,
          dt_bias,      position,          beta_max,     s.rows(),
          s.tokens,     s.conv_channels(), s.columns(),  2 * s.heads_k,
          s.head_dim_k, s.heads_v,         s.a_column(), s.b_column()};
}

// The columns of q and k of qkv [M,C], and rnorm [M,2 Hk]. A warp does a head of a row.
static __global__ void __launch_bounds__(kThreads) conv_keys_kernel(act* qkv, float* rnorm, ConvInputs in) {
  const int64_t item = warp_number(), m = item / in.key_heads;
  if (m >= in.rows) return;
  const int first = int(item % in.key_heads) * in.dk;
  float squares = 0;
  for (int c = first + lane_number(); c < first + in.dk; c += 32) {
    const float p = silu(in.convolved(m, c));
    squares += p * p;
  }
  const float r = 1 / sqrtf(lane_sum(squares) + float(kNormEps));
  rnorm[item] = r;
  for (int c = first + lane_number(); c < first + in.dk; c += 32)
    qkv[m * in.channels + c] = rounded(silu(in.convolved(m, c)) * r);
}

// The columns of v. A thread does a number.
static __global__ void __launch_bounds__(kThreads) conv_values_kernel(act* qkv, ConvInputs in) {
  const int values = in.channels - in.key_channels();
  const int64_t m = thread_number() / values;
  const int c = in.key_channels() + int(thread_number() % values);
  if (m < in.rows) qkv[m * in.channels + c] = rounded(silu(in.convolved(m, c)));
}

// g and beta [M,Hv]. A thread does one of each.
static __global__ void __launch_bounds__(kThreads) gates_kernel(float* g, float* beta, ConvInputs in) {
  const int64_t i = thread_number(), m = i / in.value_heads;
  const int h = int(i % in.value_heads);
  if (m >= in.rows) return;
  const float a = number(in.proj, m * in.columns + in.a_column + h);
  const float b = number(in.proj, m * in.columns + in.b_column + h);
  g[i] = in.masks_decay(m) ? float(kDocumentDecay) : -expf(in.A_log[h]) * softplus(a + in.dt_bias[h]);
  beta[i] = in.beta_max * sigmoid(b);
}

// history = the last three inputs. A thread does a channel; in ascending order it reads only slots that it
// has not yet written.
static __global__ void __launch_bounds__(kThreads) conv_history_kernel(act* history, ConvInputs in) {
  const int64_t b = thread_number() / in.channels, last = (b + 1) * in.tokens - 1;
  const int c = int(thread_number() % in.channels);
  if (last >= in.rows) return;
  for (int j = 0; j < kConvTaps - 1; j++) {
    const int back = kConvTaps - 2 - j;  // steps from the last input
    const int64_t slot = b * (kConvTaps - 1) + j;
    history[slot * in.channels + c] = back < in.tokens ? in.proj[(last - back) * in.columns + c]
                                                       : history[(slot + in.tokens) * in.channels + c];
  }
}

inline void short_conv_gates_forward(Cuda& dev, act* qkv, float* rnorm, float* g, float* beta,
                                     const act* proj, const float* taps, const float* A_log,
                                     const float* dt_bias, act* history, const MixerShape& shape,
                                     float beta_max, const int32_t* position) {
  Range<Cuda> range(dev, __func__);
  const ConvInputs in = conv_inputs(proj, history, taps, A_log, dt_bias, position, beta_max, shape);
  const int64_t M = shape.rows();
  if (M == 0) return;
  conv_keys_kernel<<<blocks_of_warps(M * in.key_heads), kThreads, 0, dev.stream>>>(qkv, rnorm, in);
  launched("conv_keys");
  conv_values_kernel<<<blocks_of_threads(M * shape.value_dim()), kThreads, 0, dev.stream>>>(qkv, in);
  launched("conv_values");
  gates_kernel<<<blocks_of_threads(M * shape.heads_v), kThreads, 0, dev.stream>>>(g, beta, in);
  launched("gates");
  if (!history) return;
  conv_history_kernel<<<blocks_of_threads(int64_t(shape.batch) * in.channels), kThreads, 0, dev.stream>>>(
      history, in);
  launched("conv_history");
}

// The columns of q and k of du [M,C] float: dp = rnorm (dq - q (q . dq)), du = dp silu'(u).
static __global__ void __launch_bounds__(kThreads)
    conv_keys_backward_kernel(float* du, const act* dqkv, const float* rnorm, ConvInputs in) {
  const int64_t item = warp_number(), m = item / in.key_heads;
  if (m >= in.rows) return;
  const int first = int(item % in.key_heads) * in.dk;
  const float r = rnorm[item];
  float along = 0;
  for (int c = first + lane_number(); c < first + in.dk; c += 32)
    along += silu(in.convolved(m, c)) * r * number(dqkv, m * in.channels + c);
  along = lane_sum(along);
  for (int c = first + lane_number(); c < first + in.dk; c += 32) {
    const float u = in.convolved(m, c), q = silu(u) * r;
    du[m * in.channels + c] = r * (number(dqkv, m * in.channels + c) - q * along) * silu_derivative(u);
  }
}

// The columns of v of du.
static __global__ void __launch_bounds__(kThreads)
    conv_values_backward_kernel(float* du, const act* dqkv, ConvInputs in) {
  const int values = in.channels - in.key_channels();
  const int64_t m = thread_number() / values;
  const int c = in.key_channels() + int(thread_number() % values);
  if (m >= in.rows) return;
  const int64_t i = m * in.channels + c;
  du[i] = number(dqkv, i) * silu_derivative(in.convolved(m, c));
}

// Columns [0,C) of dproj: dx_t = sum_j taps[j] du_{t+3-j}.
static __global__ void __launch_bounds__(kThreads)
    conv_input_kernel(act* dproj, const float* du, ConvInputs in) {
  const int64_t m = thread_number() / in.channels;
  const int c = int(thread_number() % in.channels);
  if (m >= in.rows) return;
  float dx = 0;
  for (int j = 0; j < kConvTaps; j++) {
    const int later = kConvTaps - 1 - j;
    if (m % in.tokens + later < in.tokens && in.same_document(m + later, later))
      dx += in.taps[c * kConvTaps + j] * du[(m + later) * in.channels + c];
  }
  dproj[m * in.columns + c] = rounded(dx);
}

// partials [pieces,stride], columns [0,4C): dtaps[j] = sum_t du_t x_{t-3+j} over the rows of a piece.
static __global__ void __launch_bounds__(kThreads)
    conv_taps_kernel(float* partials, int stride, const float* du, ConvInputs in) {
  const int c = int(thread_number()), piece = blockIdx.y;
  if (c >= in.channels) return;
  float sum[kConvTaps] = {};
  for (int m = piece * kPieceRows; m < min((piece + 1) * kPieceRows, in.rows); m++)
    for (int j = 0; j < kConvTaps; j++)
      sum[j] += du[int64_t(m) * in.channels + c] * in.input(m, kConvTaps - 1 - j, c);
  for (int j = 0; j < kConvTaps; j++) partials[int64_t(piece) * stride + c * kConvTaps + j] = sum[j];
}

// Columns a and b of dproj, zeros after them; and columns [4C,4C+2Hv) of partials: what the rows of a piece
// add to dA_log and ddt_bias.
static __global__ void __launch_bounds__(kThreads)
    gates_backward_kernel(act* dproj, float* partials, int stride, const float* dg, const float* dbeta,
                          const float* g, const float* beta, ConvInputs in) {
  const int h = int(thread_number()), piece = blockIdx.y;
  if (h >= in.value_heads) return;
  float dA_log = 0, ddt_bias = 0;
  for (int m = piece * kPieceRows; m < min((piece + 1) * kPieceRows, in.rows); m++) {
    const int64_t i = int64_t(m) * in.value_heads + h, row = int64_t(m) * in.columns;
    const float a = number(in.proj, row + in.a_column + h), dg_i = in.masks_decay(m) ? 0.0f : dg[i];
    const float da = -dg_i * expf(in.A_log[h]) * sigmoid(a + in.dt_bias[h]);
    dproj[row + in.a_column + h] = rounded(da);
    dproj[row + in.b_column + h] = rounded(dbeta[i] * beta[i] * (1 - beta[i] / in.beta_max));
    for (int c = in.b_column + in.value_heads + h; c < in.columns; c += in.value_heads)
      dproj[row + c] = rounded(0.0f);
    dA_log += dg_i * g[i];
    ddt_bias += da;
  }
  float* mine = partials + int64_t(piece) * stride + in.channels * kConvTaps;
  mine[h] = dA_log;
  mine[in.value_heads + h] = ddt_bias;
}

// Numbers in a piece's row of partials.
inline int conv_partials_stride(const MixerShape& shape) {
  return shape.conv_channels() * kConvTaps + 2 * shape.heads_v;
}

// du, then the partials.
inline size_t short_conv_gates_backward_scratch_bytes(Cuda&, const MixerShape& shape) {
  const size_t partials = size_t(pieces_of(shape.rows())) * conv_partials_stride(shape);
  return (size_t(shape.rows()) * shape.conv_channels() + partials) * sizeof(float);
}

inline void short_conv_gates_backward(Cuda& dev, act* dproj, float* dtaps, float* dA_log, float* ddt_bias,
                                      act* dqkv, const float* dg, const float* dbeta, const float* rnorm,
                                      const float* g, const float* beta, const act* proj, const float* taps,
                                      const float* A_log, const float* dt_bias, const MixerShape& shape,
                                      float beta_max, void* scratch, const int32_t* position) {
  Range<Cuda> range(dev, __func__);
  const ConvInputs in = conv_inputs(proj, nullptr, taps, A_log, dt_bias, position, beta_max, shape);
  const int rows = shape.rows(), C = in.channels, H = shape.heads_v;
  const int stride = conv_partials_stride(shape), pieces = pieces_of(rows);
  if (rows == 0) return;
  const int64_t M = rows;
  float *du = static_cast<float*>(scratch), *partials = du + M * C, *of_gates = partials + C * kConvTaps;
  conv_keys_backward_kernel<<<blocks_of_warps(M * in.key_heads), kThreads, 0, dev.stream>>>(du, dqkv, rnorm,
                                                                                            in);
  launched("conv_keys_backward");
  conv_values_backward_kernel<<<blocks_of_threads(M * shape.value_dim()), kThreads, 0, dev.stream>>>(du, dqkv,
                                                                                                     in);
  launched("conv_values_backward");
  conv_input_kernel<<<blocks_of_threads(M * C), kThreads, 0, dev.stream>>>(dproj, du, in);
  launched("conv_input");
  conv_taps_kernel<<<grid_of_pieces(C, rows), kThreads, 0, dev.stream>>>(partials, stride, du, in);
  launched("conv_taps");
  gates_backward_kernel<<<grid_of_pieces(H, rows), kThreads, 0, dev.stream>>>(dproj, partials, stride, dg,
                                                                              dbeta, g, beta, in);
  launched("gates_backward");
  add_partials(dev, {{{dtaps, partials, pieces, C * kConvTaps, stride},
                      {dA_log, of_gates, pieces, H, stride},
                      {ddt_bias, of_gates + H, pieces, H, stride}}});
}

}  // namespace readable
}  // namespace gdn
