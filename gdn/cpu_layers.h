// Every layer of a Gated Delta Network on the CPU, forward and backward, in plain loops: the copy to read,
// and what the GPU's layers (gdn_kernels.cuh: same names, same arguments) are tested against.
//
// Equations: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), with the readout scale and
// the conventions of Liu, Gu, arXiv 2606.04048. All arrays are row-major and dense unless a row stride is
// named.
//
// Conventions of every function
//   M = B*T rows (tokens of all sequences, T consecutive rows a sequence); d width; `act` and `real` as in
//   device.h dx is the gradient of the loss with respect to x. Activation gradients are overwritten unless
//   the comment says
//   "+=". Gradients of parameters are always added to (+=), so that micro-batches accumulate.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu_gemm.h"
#include "device.h"
#include "random.h"
#include "shapes.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
// glibc has vector forms of exp (libmvec, within 4 units in the last place), which its headers offer only
// under -ffast-math; loops over silu and softmax are several times faster with them.
extern "C" {
__attribute__((simd("notinbranch"))) float expf(float) noexcept(true);
__attribute__((simd("notinbranch"))) double exp(double) noexcept(true);
}
#endif

namespace gdn {

template <class Real>
Real sigmoid(Real x) {
  return 1 / (1 + std::exp(-x));  // e^-x may overflow to infinity: the quotient is then 0
}

template <class Real>
Real silu(Real x) {
  return x * sigmoid(x);
}

template <class Real>
Real silu_derivative(Real x) {
  const Real s = sigmoid(x);
  return s * (1 + x * (1 - s));
}

// ln(1 + e^x), also where e^x would overflow
template <class Real>
Real softplus(Real x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <class Real>
Real dot(const Real* a, const Real* b, int n) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// ---- embedding --------------------------------------------------------------------------------------------

// x [M,d] = rows `tokens` [M] of w_emb [V,d]
template <class Real>
void embedding_forward(Cpu<Real>&, Real* x, const Real* w_emb, const int32_t* tokens, int rows, int width) {
#pragma omp parallel for schedule(static)
  for (int m = 0; m < rows; m++)
    std::copy_n(w_emb + int64_t(tokens[m]) * width, width, x + int64_t(m) * width);
}

// dw_emb [V,d] += the rows of dx [M,d] at their tokens. `order` [M] lists the rows sorted by token, ties in
// ascending order: one token's rows are summed in an order that depends on the tokens alone.
// Here and below the last argument `scratch` is work space of as many bytes as the function
// NAME_scratch_bytes says (none on the CPU).
template <class Real>
void embedding_backward(Cpu<Real>&, Real* dw_emb, const Real* dx, const int32_t* tokens, const int32_t* order,
                        int rows, int width, void*) {
#pragma omp parallel for schedule(static)
  for (int c0 = 0; c0 < width; c0 += 16)
    for (int i = 0; i < rows; i++) {
      Real* to = dw_emb + int64_t(tokens[order[i]]) * width;
      const Real* from = dx + int64_t(order[i]) * width;
      for (int c = c0; c < std::min(c0 + 16, width); c++) to[c] += from[c];
    }
}

template <class Real>
size_t embedding_backward_scratch_bytes(Cpu<Real>&, int, int) {
  return 0;
}

// ---- RMSNorm ----------------------------------------------------------------------------------------------

// h [M,d] = w * x * rstd,  rstd [M] = 1 / sqrt(mean(x^2) + eps)
template <class Real>
void rmsnorm_forward(Cpu<Real>&, Real* h, Real* rstd, const Real* x, const Real* w, int rows, int width) {
#pragma omp parallel for schedule(static)
  for (int m = 0; m < rows; m++) {
    const Real* xm = x + int64_t(m) * width;
    Real* hm = h + int64_t(m) * width;
    rstd[m] = 1 / std::sqrt(dot(xm, xm, width) / width + Real(kNormEps));
    for (int c = 0; c < width; c++) hm[c] = w[c] * xm[c] * rstd[m];
  }
}

// x_out [M,d] = x + branch (the residual stream), then h and rstd as rmsnorm_forward of x_out. x_out may be
// x or branch.
template <class Real>
void residual_rmsnorm_forward(Cpu<Real>& dev, Real* x_out, Real* h, Real* rstd, const Real* x,
                              const Real* branch, const Real* w, int rows, int width) {
  const int64_t n = int64_t(rows) * width;
#pragma omp parallel for simd schedule(static)
  for (int64_t i = 0; i < n; i++) x_out[i] = x[i] + branch[i];
  rmsnorm_forward(dev, h, rstd, x_out, w, rows, width);
}

// dx [M,d] += gradient through the norm (dx already holds the gradient of the residual stream past it),
// dw [d] += sum over rows. With n = x * rstd and e = w * dh:  dx += rstd * (e - n * mean(e * n)).
// h [M,d] (nullptr: not wanted) = what the forward gave, to the bit, for the weight gradient of the Linear
// that read it; h may be dh.
template <class Real>
void rmsnorm_backward(Cpu<Real>&, Real* dx, Real* dw, Real* h, const Real* dh, const Real* x,
                      const Real* rstd, const Real* w, int rows, int width, void*) {
#pragma omp parallel for schedule(static)
  for (int c0 = 0; c0 < width; c0 += 16)
    for (int m = 0; m < rows; m++)
      for (int c = c0; c < std::min(c0 + 16, width); c++)
        dw[c] += dh[int64_t(m) * width + c] * x[int64_t(m) * width + c] * rstd[m];
#pragma omp parallel for schedule(static)
  for (int m = 0; m < rows; m++) {
    const Real* xm = x + int64_t(m) * width;
    const Real* dhm = dh + int64_t(m) * width;
    Real* dxm = dx + int64_t(m) * width;
    Real mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int c = 0; c < width; c++) mean += w[c] * dhm[c] * xm[c];
    mean *= rstd[m] / width;
    for (int c = 0; c < width; c++) dxm[c] += rstd[m] * (w[c] * dhm[c] - xm[c] * rstd[m] * mean);
    if (!h) continue;
    for (int c = 0; c < width; c++) h[int64_t(m) * width + c] = w[c] * xm[c] * rstd[m];
  }
}

template <class Real>
size_t rmsnorm_backward_scratch_bytes(Cpu<Real>&, int, int) {
  return 0;
}

// ---- Linear -----------------------------------------------------------------------------------------------

// y [M,out] = scale * x [M,in] w^T,  w [out,in] as in PyTorch, no bias
template <class Real>
void linear_forward(Cpu<Real>&, Real* y, const Real* x, const Real* w, int rows, int out, int in,
                    Real scale = 1) {
  cpu_gemm(false, true, rows, out, in, scale, x, in, w, in, Real(0), y, out);
}

// dx [M,in] = scale * dy w
template <class Real>
void linear_backward_input(Cpu<Real>&, Real* dx, const Real* dy, const Real* w, int rows, int out, int in,
                           Real scale = 1) {
  cpu_gemm(false, false, rows, in, out, scale, dy, out, w, in, Real(0), dx, in);
}

// dw [out,in] += scale * dy^T x
template <class Real>
void linear_backward_weight(Cpu<Real>&, Real* dw, const Real* dy, const Real* x, int rows, int out, int in,
                            Real scale = 1) {
  cpu_gemm(true, false, out, in, rows, scale, dy, out, x, in, Real(1), dw, in);
}

// ---- short convolution, silu, L2 norm of q and k ----------------------------------------------------------

// One row of a depthwise convolution: out [C] = sum_j taps[c][j] * inputs[j][c], taps [C,kConvTaps]; a null input
// counts as zeros.
template <class Real>
void short_conv_row(Real* out, const Real* const (&inputs)[kConvTaps], const Real* taps, int C) {
  std::fill_n(out, C, Real(0));
  for (int j = 0; j < kConvTaps; j++)
    if (const Real* x = inputs[j])
      for (int c = 0; c < C; c++) out[c] += taps[c * kConvTaps + j] * x[c];
}

// Depthwise, causal, kConvTaps taps, no bias, over the first C = conv_channels columns of proj, then silu,
// then each head of q and k divided by its length:
//   u_t = sum_{j=0..3} taps[j] * x_{t-3+j}      p = silu(u)      q = p_q * rnorm,  rnorm = 1/sqrt(|p_q|^2 +
//   eps)
// qkv [M,C]; rnorm [M,2 Hk] (q heads, then k heads); taps [C,4].
// history [B,3,C]: the three inputs before t = 0 (nullptr: zeros); overwritten with the last three of this
// call, so that a sequence can be fed in pieces. position [M] (same_document): inputs of another document
// count as zeros; nullptr: all are of one.
template <class Real>
void short_conv_forward(Cpu<Real>&, Real* qkv, Real* rnorm, const Real* proj, const Real* taps, Real* history,
                        const MixerShape& shape, const int32_t* position = nullptr) {
  const int C = shape.conv_channels(), P = shape.columns(), T = shape.tokens, K = kConvTaps;
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < shape.batch; b++)
    for (int t = 0; t < T; t++) {
      const int64_t m = int64_t(b) * T + t;
      Real* out = qkv + m * C;
      const Real* inputs[kConvTaps];
      for (int j = 0; j < K; j++) {
        const int from = t - (K - 1) + j;
        inputs[j] = !same_document(position, m, K - 1 - j) ? nullptr
                    : from >= 0                            ? proj + (m - (K - 1) + j) * P
                    : history ? history + (int64_t(b) * (K - 1) + from + K - 1) * C
                              : nullptr;
      }
      short_conv_row(out, inputs, taps, C);
#pragma omp simd
      for (int c = 0; c < C; c++) out[c] = silu(out[c]);
      for (int h = 0; h < 2 * shape.heads_k; h++) {
        Real* p = out + h * shape.head_dim_k;
        const Real r = 1 / std::sqrt(dot(p, p, shape.head_dim_k) + Real(kNormEps));
        rnorm[m * 2 * shape.heads_k + h] = r;
        for (int c = 0; c < shape.head_dim_k; c++) p[c] *= r;
      }
    }
  if (history)
    for (int b = 0; b < shape.batch; b++)
      for (int j = 0; j < K - 1;
           j++) {  // slot j holds time T - 3 + j; ascending j reads only slots not yet written
        const int from = T - (K - 1) + j;
        const Real* x = from >= 0 ? proj + (int64_t(b) * T + from) * P
                                  : history + (int64_t(b) * (K - 1) + from + K - 1) * C;
        std::copy_n(x, C, history + (int64_t(b) * (K - 1) + j) * C);
      }
}

// Columns [0,C) of dproj [M,P] = gradient of proj, dtaps [C,4] +=; dqkv [M,C] is overwritten as work space
// (on return it holds the gradient of u). u, p and q are computed again from proj. No history: training
// starts at t = 0.
//   dp = rnorm * (dq - q (q . dq))    du = dp * silu'(u)    dx_t = sum_j taps[j] du_{t+3-j}    dtaps[j] =
//   sum_t du_t x_{t-3+j}
template <class Real>
void short_conv_backward(Cpu<Real>&, Real* dproj, Real* dtaps, Real* dqkv, const Real* rnorm,
                         const Real* proj, const Real* taps, const MixerShape& shape, void*,
                         const int32_t* position = nullptr) {
  const int C = shape.conv_channels(), P = shape.columns(), T = shape.tokens, K = kConvTaps;
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < shape.batch; b++)
    for (int t = 0; t < T; t++) {
      const int64_t m = int64_t(b) * T + t;
      Real* du = dqkv + m * C;
      std::vector<Real> u(C), q(2 * shape.key_dim());
      const Real* inputs[kConvTaps];
      for (int j = 0; j < K; j++)
        inputs[j] =
            t >= K - 1 - j && same_document(position, m, K - 1 - j) ? proj + (m - (K - 1) + j) * P : nullptr;
      short_conv_row(u.data(), inputs, taps, C);
#pragma omp simd
      for (int c = 0; c < 2 * shape.key_dim(); c++) q[c] = silu(u[c]);
      for (int h = 0; h < 2 * shape.heads_k; h++) {
        const int n = shape.head_dim_k;
        Real *dq = du + h * n, *qh = q.data() + h * n;
        const Real r = rnorm[m * 2 * shape.heads_k + h];
        for (int c = 0; c < n; c++) qh[c] *= r;
        const Real along = dot(qh, dq, n);
        for (int c = 0; c < n; c++) dq[c] = r * (dq[c] - qh[c] * along);
      }
#pragma omp simd
      for (int c = 0; c < C; c++) du[c] *= silu_derivative(u[c]);
    }
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < shape.batch; b++)
    for (int t = 0; t < T; t++) {
      const int64_t m = int64_t(b) * T + t;
      const Real* readers[kConvTaps];  // gradients of the rows that read this one
      for (int j = 0; j < K; j++)
        readers[j] = t + K - 1 - j < T && same_document(position, m + K - 1 - j, K - 1 - j)
                         ? dqkv + (m + K - 1 - j) * C
                         : nullptr;
      short_conv_row(dproj + m * P, readers, taps, C);
    }
#pragma omp parallel for schedule(static)
  for (int c0 = 0; c0 < C; c0 += 16)
    for (int b = 0; b < shape.batch; b++)
      for (int t = 0; t < T; t++) {
        const int64_t m = int64_t(b) * T + t;
        for (int c = c0; c < std::min(c0 + 16, C); c++)
          for (int j = std::max(0, K - 1 - t); j < K; j++)
            if (same_document(position, m, K - 1 - j))
              dtaps[c * K + j] += dqkv[m * C + c] * proj[(m - (K - 1) + j) * P + c];
      }
}

// ---- gates ------------------------------------------------------------------------------------------------

// g [M,Hv] = -exp(A_log) * softplus(a + dt_bias) <= 0, the logarithm of the decay alpha;
// beta [M,Hv] = beta_max * sigmoid(b), beta_max = 1, or 2 where negative eigenvalues are allowed. Where
// position [M] is 0, a document's first token, g = kDocumentDecay instead.
template <class Real>
void gates_forward(Cpu<Real>&, Real* g, Real* beta, const Real* proj, const Real* A_log, const Real* dt_bias,
                   const MixerShape& shape, Real beta_max, const int32_t* position = nullptr) {
  const int H = shape.heads_v;
#pragma omp parallel for schedule(static)
  for (int m = 0; m < shape.rows(); m++) {
    const Real* row = proj + int64_t(m) * shape.columns();
    for (int h = 0; h < H; h++) {
      g[int64_t(m) * H + h] = position && position[m] == 0
                                  ? Real(kDocumentDecay)
                                  : -std::exp(A_log[h]) * softplus(row[shape.a_column() + h] + dt_bias[h]);
      beta[int64_t(m) * H + h] = beta_max * sigmoid(row[shape.b_column() + h]);
    }
  }
}

// Columns a, b and the padding (zeros) of dproj; dA_log [Hv], ddt_bias [Hv] +=.
//   da = -dg exp(A_log) sigmoid(a + dt_bias)    db = dbeta beta (1 - beta/beta_max)    dA_log = sum dg g
//   ddt_bias = sum da
// Where position [M] is 0, g is a constant: dg counts as 0.
template <class Real>
void gates_backward(Cpu<Real>&, Real* dproj, Real* dA_log, Real* ddt_bias, const Real* dg, const Real* dbeta,
                    const Real* g, const Real* beta, const Real* proj, const Real* A_log, const Real* dt_bias,
                    const MixerShape& shape, Real beta_max, void*, const int32_t* position = nullptr) {
  const int H = shape.heads_v, P = shape.columns();
  const auto dg_of = [&](int m, int h) {
    return position && position[m] == 0 ? Real(0) : dg[int64_t(m) * H + h];
  };
#pragma omp parallel for schedule(static)
  for (int m = 0; m < shape.rows(); m++) {
    const Real* row = proj + int64_t(m) * P;
    Real* drow = dproj + int64_t(m) * P;
    for (int h = 0; h < H; h++) {
      const int64_t i = int64_t(m) * H + h;
      drow[shape.a_column() + h] =
          -dg_of(m, h) * std::exp(A_log[h]) * sigmoid(row[shape.a_column() + h] + dt_bias[h]);
      drow[shape.b_column() + h] = dbeta[i] * beta[i] * (1 - beta[i] / beta_max);
    }
    std::fill(drow + shape.b_column() + H, drow + P, Real(0));
  }
  for (int m = 0; m < shape.rows(); m++)
    for (int h = 0; h < H; h++) {
      const int64_t i = int64_t(m) * H + h;
      dA_log[h] += dg_of(m, h) * g[i];
      ddt_bias[h] += dproj[int64_t(m) * P + shape.a_column() + h];
    }
}

// ---- short convolution and gates --------------------------------------------------------------------------

// The two layers above in one call, as the GPU has them: all that the delta rule reads.
template <class Real>
void short_conv_gates_forward(Cpu<Real>& dev, Real* qkv, Real* rnorm, Real* g, Real* beta, const Real* proj,
                              const Real* taps, const Real* A_log, const Real* dt_bias, Real* history,
                              const MixerShape& shape, Real beta_max, const int32_t* position = nullptr) {
  short_conv_forward(dev, qkv, rnorm, proj, taps, history, shape, position);
  gates_forward(dev, g, beta, proj, A_log, dt_bias, shape, beta_max, position);
}

// Every column of dproj but those of z; dqkv is work space, as in short_conv_backward.
template <class Real>
void short_conv_gates_backward(Cpu<Real>& dev, Real* dproj, Real* dtaps, Real* dA_log, Real* ddt_bias,
                               Real* dqkv, const Real* dg, const Real* dbeta, const Real* rnorm,
                               const Real* g, const Real* beta, const Real* proj, const Real* taps,
                               const Real* A_log, const Real* dt_bias, const MixerShape& shape, Real beta_max,
                               void* scratch, const int32_t* position = nullptr) {
  short_conv_backward(dev, dproj, dtaps, dqkv, rnorm, proj, taps, shape, scratch, position);
  gates_backward(dev, dproj, dA_log, ddt_bias, dg, dbeta, g, beta, proj, A_log, dt_bias, shape, beta_max,
                 scratch, position);
}

template <class Real>
size_t short_conv_gates_backward_scratch_bytes(Cpu<Real>&, const MixerShape&) {
  return 0;
}

}  // namespace gdn

#include "cpu_delta_rule.h"

namespace gdn {

// ---- output norm and gate ---------------------------------------------------------------------------------

// One head of one row: y [n] = w_o * o * rstd * silu(z)
template <class Real>
void output_norm_head(Real* y, const Real* o, const Real* z, const Real* w_o, Real rstd, int n) {
#pragma omp simd
  for (int c = 0; c < n; c++) y[c] = w_o[c] * o[c] * rstd * silu(z[c]);
}

// One head of one row, backward (output_norm_backward).
template <class Real>
void output_norm_head_backward(Real* d_o, Real* dz, const Real* dy, const Real* o, const Real* z,
                               const Real* w_o, Real r, int n) {
  Real mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int c = 0; c < n; c++) mean += w_o[c] * silu(z[c]) * dy[c] * o[c] * r;
  mean /= n;
#pragma omp simd
  for (int c = 0; c < n; c++) {
    const Real zc = z[c], normed = o[c] * r, gradient = dy[c];
    d_o[c] = r * (w_o[c] * silu(zc) * gradient - normed * mean);
    dz[c] = w_o[c] * normed * gradient * silu_derivative(zc);
  }
}

// y [M,Hv*dv] = w_o * o * rstd * silu(z), per head: rstd [M,Hv] = 1/sqrt(mean(o^2) + eps), w_o [dv] shared by
// heads, z the columns of proj.
template <class Real>
void output_norm_forward(Cpu<Real>&, Real* y, Real* rstd, const Real* o, const Real* proj, const Real* w_o,
                         const MixerShape& shape) {
  const int H = shape.heads_v, n = shape.head_dim_v;
#pragma omp parallel for schedule(static)
  for (int m = 0; m < shape.rows(); m++)
    for (int h = 0; h < H; h++) {
      const Real* om = o + (int64_t(m) * H + h) * n;
      const Real* z = proj + int64_t(m) * shape.columns() + shape.z_column() + h * n;
      const Real r = 1 / std::sqrt(dot(om, om, n) / n + Real(kNormEps));
      rstd[int64_t(m) * H + h] = r;
      output_norm_head(y + (int64_t(m) * H + h) * n, om, z, w_o, r, n);
    }
}

// d_o [M,Hv*dv], the z columns of dproj, dw_o [dv] +=. With n = o rstd and e = w_o silu(z) dy:
//   d_o = rstd (e - n mean(e n))    dz = w_o n dy silu'(z)    dw_o = sum over rows and heads of n silu(z) dy
// y [M,Hv*dv] = what the forward gave, to the bit, for the weight gradient of the Linear that read it. d_o
// may be dy.
template <class Real>
void output_norm_backward(Cpu<Real>&, Real* d_o, Real* dproj, Real* dw_o, Real* y, const Real* dy,
                          const Real* o, const Real* rstd, const Real* proj, const Real* w_o,
                          const MixerShape& shape, void*) {
  const int H = shape.heads_v, n = shape.head_dim_v, P = shape.columns();
#pragma omp parallel for schedule(static)
  for (int c = 0; c < n; c++) {
    Real sum = 0;
    for (int m = 0; m < shape.rows(); m++)
      for (int h = 0; h < H; h++) {
        const int64_t i = (int64_t(m) * H + h) * n + c;
        sum += o[i] * rstd[int64_t(m) * H + h] * dy[i] *
               silu(proj[int64_t(m) * P + shape.z_column() + h * n + c]);
      }
    dw_o[c] += sum;
  }
#pragma omp parallel for schedule(static)
  for (int m = 0; m < shape.rows(); m++)
    for (int h = 0; h < H; h++) {
      const int64_t row = (int64_t(m) * H + h) * n, column = int64_t(m) * P + shape.z_column() + h * n;
      const Real r = rstd[int64_t(m) * H + h];
      output_norm_head(y + row, o + row, proj + column, w_o, r, n);
      output_norm_head_backward(d_o + row, dproj + column, dy + row, o + row, proj + column, w_o, r, n);
    }
}

template <class Real>
size_t output_norm_backward_scratch_bytes(Cpu<Real>&, const MixerShape&) {
  return 0;
}

// ---- SwiGLU -----------------------------------------------------------------------------------------------

// One row: out [I] = silu(gate) * up
template <class Real>
void swiglu_row(Real* out, const Real* gate, const Real* up, int inner) {
#pragma omp simd
  for (int c = 0; c < inner; c++) out[c] = silu(gate[c]) * up[c];
}

// out [M,I] = silu(gate) * up, gate_up [M,2I]: gate in the first I columns, up in the last
template <class Real>
void swiglu_forward(Cpu<Real>&, Real* out, const Real* gate_up, int rows, int inner) {
#pragma omp parallel for schedule(static)
  for (int m = 0; m < rows; m++) {
    const Real *gate = gate_up + int64_t(m) * 2 * inner, *up = gate + inner;
    swiglu_row(out + int64_t(m) * inner, gate, up, inner);
  }
}

// dgate_up [M,2I] from dout [M,I]; out [M,I] = what the forward gave, to the bit, for the weight gradient of
// the Linear that read it. out may be dout.
template <class Real>
void swiglu_backward(Cpu<Real>&, Real* dgate_up, Real* out, const Real* dout, const Real* gate_up, int rows,
                     int inner) {
#pragma omp parallel for schedule(static)
  for (int m = 0; m < rows; m++) {
    const Real *gate = gate_up + int64_t(m) * 2 * inner, *up = gate + inner;
    Real *dgate = dgate_up + int64_t(m) * 2 * inner, *dup = dgate + inner;
#pragma omp simd
    for (int c = 0; c < inner; c++) {
      const Real dy = dout[int64_t(m) * inner + c];
      dgate[c] = dy * up[c] * silu_derivative(gate[c]);
      dup[c] = dy * silu(gate[c]);
    }
    swiglu_row(out + int64_t(m) * inner, gate, up, inner);
  }
}

// ---- classifier -------------------------------------------------------------------------------------------

// losses [n] = -log softmax(logits)[target] over the first `vocab` of `padded` columns, in nats; a target < 0
// is ignored (loss 0, gradient 0). With dlogits_scale != 0 the logits [n,padded] are overwritten with their
// gradient times dlogits_scale, zeros in the padding; with 0 they are left as they are.
template <class Real>
void softmax_cross_entropy(Cpu<Real>&, Real* logits, Real* losses, const int32_t* targets, int rows,
                           int vocab, int padded, Real dlogits_scale) {
#pragma omp parallel for schedule(static)
  for (int m = 0; m < rows; m++) {
    Real* row = logits + int64_t(m) * padded;
    const int target = targets[m];
    const Real top = *std::max_element(row, row + vocab);
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < vocab; c++) sum += std::exp(row[c] - top);
    losses[m] = target < 0 ? Real(0) : std::log(sum) - (row[target] - top);
    if (dlogits_scale == 0) continue;
    const Real scale = target < 0 ? Real(0) : dlogits_scale;
#pragma omp simd
    for (int c = 0; c < vocab; c++) row[c] = scale * std::exp(row[c] - top) / sum;
    if (target >= 0) row[target] -= scale;
    std::fill(row + vocab, row + padded, Real(0));
  }
}

// *total += sum of losses [n], always in the same order
template <class Real>
void sum_losses(Cpu<Real>&, double* total, const Real* losses, int rows) {
  double sum = 0;
  for (int m = 0; m < rows; m++) sum += losses[m];
  *total += sum;
}

// ---- optimizer --------------------------------------------------------------------------------------------

// sum [n] += x [n] and *loss_sum += *loss: two partial sums over micro-batches become one.
template <class Real>
void add_gradients(Cpu<Real>&, Real* sum, const Real* x, size_t n, double* loss_sum, const double* loss) {
#pragma omp parallel for simd schedule(static)
  for (size_t i = 0; i < n; i++) sum[i] += x[i];
  *loss_sum += *loss;
}

// *nanoseconds = the time, of a clock that goes on steadily.
template <class Real>
void time_stamp(Cpu<Real>&, int64_t* nanoseconds) {
  *nanoseconds = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// sum: of `pieces` pieces of `piece` numbers, each `stride` numbers behind the last; x has as many, one behind the
// other, and is added.
template <class Real>
void add_pieces(Cpu<Real>&, Real* sum, const Real* x, int pieces, size_t piece, size_t stride) {
  for (int p = 0; p < pieces; p++) {
    Real* const to = sum + size_t(p) * stride;
    const Real* const from = x + size_t(p) * piece;
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < piece; i++) to[i] += from[i];
  }
}

// *sum = the sum of x [n], n a power of two, in the order of a binary tree.
template <class Real>
void sum_tree(Cpu<Real>&, double* sum, const double* x, int n) {
  std::vector<double> sums(x, x + n);
  for (n /= 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
  *sum = sums[0];
}

// sums[k] = sum over `spans` [count] of norm_weight * sum of squares of their gradients in block k of the arena
// (kArenaBlock numbers each), for the blocks of `range`, always in the same order. gradients is the arena.
template <class Real>
void sum_of_squares(Cpu<Real>&, double* sums, const Real* gradients, const ArenaRange& range,
                    const ParameterSpan* spans, int count) {
#pragma omp parallel for schedule(static)
  for (size_t begin = range.begin; begin < range.end; begin += kArenaBlock) {
    const size_t end = begin + kArenaBlock;
    const ParameterSpan* s = std::partition_point(
        spans, spans + count, [&](const ParameterSpan& span) { return span.offset + span.size <= begin; });
    double total = 0;
    for (; s != spans + count && s->offset < end; s++) {
      double sum = 0;
      for (size_t i = std::max(s->offset, begin); i < std::min(s->offset + s->size, end); i++)
        sum += double(gradients[i]) * double(gradients[i]);
      total += double(s->norm_weight) * sum;
    }
    sums[begin / kArenaBlock] = total;
  }
}

// *norm = sqrt(sum of the blocks' sums), block by block through the groups [count] of the arena: zeros at their
// ends change nothing.
template <class Real>
void norm_of_sums(Cpu<Real>&, Real* norm, const double* sums, const ArenaRange* groups, int count) {
  double sum = 0;
  for (int g = 0; g < count; g++)
    for (size_t i = groups[g].begin; i < groups[g].end; i += kArenaBlock) sum += sums[i / kArenaBlock];
  *norm = Real(std::sqrt(sum));
}

// *norm = NaN where *loss is not finite: the update then changes nothing.
template <class Real>
void check_loss(Cpu<Real>&, Real* norm, const double* loss) {
  if (!std::isfinite(*loss)) *norm = std::numeric_limits<Real>::quiet_NaN();
}

// min(1, clip / norm), or 1 where clip is 0
template <class Real>
Real clip_factor(Real norm, Real clip) {
  return clip > 0 && norm > clip ? clip / norm : Real(1);
}

// What of a tensor lies in a range of the arena, counted from the range's beginning; end <= begin where nothing
// does.
inline ArenaRange within(const ParameterSpan& span, const ArenaRange& range) {
  return {std::max(span.offset, range.begin) - range.begin,
          std::max(std::min(span.offset + span.size, range.end), range.begin) - range.begin};
}

// One AdamW step (Loshchilov, Hutter, arXiv 1711.05101, decay coupled to the learning rate as in PyTorch)
// over `spans` [count] of the arenas: master, gradient, m, v; `weights` receives the rounded copy that enters
// matrix products (on the CPU the same array as master). Of the arenas it does the numbers of `range`, where all
// five arrays begin. Nothing changes when *norm is not finite.
//   p -= lr wd p;   m = b1 m + (1-b1) g;   v = b2 v + (1-b2) g^2;   p -= lr (m / (1-b1^t)) / (sqrt(v /
//   (1-b2^t)) + eps)
template <class Real>
void adamw_update(Cpu<Real>&, Real* master, Real* weights, Real* moment1, Real* moment2,
                  const Real* gradients, const ArenaRange& range, const ParameterSpan* spans, int count,
                  const Real* norm, const AdamwStep* step) {
  if (!std::isfinite(*norm)) return;
  const Real clip = clip_factor(*norm, Real(step->clip)), b1 = step->beta1, b2 = step->beta2;
  const Real correction1 = Real(step->correction1), correction2 = Real(step->correction2);
  for (int s = 0; s < count; s++) {
    const Real lr = Real(step->learning_rate) * spans[s].learning_rate_scale,
               decay = 1 - lr * spans[s].weight_decay, epsilon = Real(step->epsilon) * spans[s].epsilon_scale;
    const ArenaRange mine = within(spans[s], range);
#pragma omp parallel for simd schedule(static)
    for (size_t i = mine.begin; i < mine.end; i++) {
      const Real g = clip * gradients[i];
      moment1[i] = b1 * moment1[i] + (1 - b1) * g;
      moment2[i] = b2 * moment2[i] + (1 - b2) * g * g;
      master[i] = decay * master[i] -
                  lr * (moment1[i] / correction1) / (std::sqrt(moment2[i] / correction2) + epsilon);
      weights[i] = master[i];
    }
  }
}

// One step of SGD with Nesterov momentum, as PyTorch's (Sutskever et al. 2013), decay added to the gradient:
//   g = clip * gradient + wd p;   m = mom m + g;   p -= lr (g + mom m)
template <class Real>
void sgd_update(Cpu<Real>&, Real* master, Real* weights, Real* moment, const Real* gradients,
                const ArenaRange& range, const ParameterSpan* spans, int count, const Real* norm,
                const SgdStep* step) {
  if (!std::isfinite(*norm)) return;
  const Real clip = clip_factor(*norm, Real(step->clip)), momentum = step->momentum;
  for (int s = 0; s < count; s++) {
    const Real lr = Real(step->learning_rate) * spans[s].learning_rate_scale, decay = spans[s].weight_decay;
    const ArenaRange mine = within(spans[s], range);
#pragma omp parallel for simd schedule(static)
    for (size_t i = mine.begin; i < mine.end; i++) {
      const Real g = clip * gradients[i] + decay * master[i];
      moment[i] = momentum * moment[i] + g;
      master[i] -= lr * (g + momentum * moment[i]);
      weights[i] = master[i];
    }
  }
}

// weights [n] = master [n] rounded to the device's matrix-product type; nothing where they are the same
// array.
template <class Real>
void round_weights(Cpu<Real>&, Real* weights, const Real* master, size_t n) {
  if (weights != master) std::copy_n(master, n, weights);
}

// ---- initial values ---------------------------------------------------------------------------------------

// x [n] = standard_deviation * the normals 0 to n - 1 of the stream `key` (random.h), rounded to float: the
// same bits on every device.
template <class Real>
void random_normals(Cpu<Real>&, Real* x, size_t n, uint64_t key, double standard_deviation) {
#pragma omp parallel for schedule(static)
  for (size_t i = 0; i < n; i += 2) {
    double normal[2];
    random_normal_pair(key, i / 2, normal);
    for (size_t j = 0; j < 2 && i + j < n; j++) x[i + j] = float(standard_deviation * normal[j]);
  }
}

}  // namespace gdn
