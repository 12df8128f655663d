// Gates of the delta rule, for each row and value head, from the columns a and b of proj:
//   g = -e^{A_log} softplus(a + dt_bias)          beta = beta_max sigmoid(b)
//   da = -dg e^{A_log} sigmoid(a + dt_bias)       db = dbeta beta (1 - beta / beta_max)
//   dA_log = sum over rows of dg g                ddt_bias = sum over rows of da
// g is the logarithm of the decay, beta the write strength. They are a few numbers a row, less work than a
// launch: a block of the short convolution's grid (short_conv.cuh) computes those of each tile of rows.
#pragma once

#include "common.cuh"

namespace gdn {

// ln(1 + e^x), also where e^x would overflow
__device__ inline float device_softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(fast_exp2(-kLog2e * fabsf(x)));
}

// What the gates read besides proj, and where a and b stand in its rows.
struct GateInputs {
  const float *A_log, *dt_bias;  // [Hv]
  float beta_max;
  int heads, columns, a, b;  // Hv, P
};

inline GateInputs gates_of(const float* A_log, const float* dt_bias, float beta_max, const MixerShape& s) {
  return {A_log, dt_bias, beta_max, s.heads_v, s.columns(), s.a_column(), s.b_column()};
}

// g and beta [M,Hv] of rows [begin, end), by the whole block: a thread a row and head. position [M] or
// nullptr: where it is 0, g = kDocumentDecay.
__device__ inline void gates_forward_rows(float* __restrict__ g, float* __restrict__ beta,
                                          const act* __restrict__ proj, const int32_t* __restrict__ position,
                                          const GateInputs& at, int begin, int end) {
#pragma unroll 4
  for (int i = begin * at.heads + int(threadIdx.x); i < end * at.heads; i += int(blockDim.x)) {
    const int m = i / at.heads, h = i - m * at.heads;
    const act* row = proj + int64_t(m) * at.columns;
    g[i] = position && position[m] == 0
               ? float(kDocumentDecay)
               : -expf(at.A_log[h]) * device_softplus(__bfloat162float(row[at.a + h]) + at.dt_bias[h]);
    beta[i] = at.beta_max * fast_sigmoid(__bfloat162float(row[at.b + h]));
  }
}

// Columns a, b and the padding (zeros) of dproj, rows [begin, end), by the whole block of kThreads threads.
// sums [2 Hv]: these rows' part of dA_log and of ddt_bias. A thread keeps to one head and neighbouring
// threads have neighbouring heads, so loads are contiguous; a head's threads are added up in order. Where
// position is 0, dg counts as 0.
template <int kThreads>
__device__ void gates_backward_rows(act* __restrict__ dproj, float* __restrict__ sums,
                                    const float* __restrict__ dg, const float* __restrict__ dbeta,
                                    const float* __restrict__ g, const float* __restrict__ beta,
                                    const act* __restrict__ proj, const int32_t* __restrict__ position,
                                    const GateInputs& at, int begin, int end) {
  __shared__ float dA_sums[kThreads], da_sums[kThreads];
  for (int first_head = 0; first_head < at.heads; first_head += kThreads) {
    const int heads = min(at.heads - first_head, kThreads), rows = kThreads / heads;  // at a time
    const int row = int(threadIdx.x) / heads, h = first_head + int(threadIdx.x) - row * heads;
    float dA_sum = 0, da_sum = 0;
    if (row < rows) {
      const float rate = expf(at.A_log[h]), shift = at.dt_bias[h];
#pragma unroll 4
      for (int m = begin + row; m < end; m += rows) {
        const act* from = proj + int64_t(m) * at.columns;
        act* to = dproj + int64_t(m) * at.columns;
        const int64_t i = int64_t(m) * at.heads + h;
        const float dg_i = position && position[m] == 0 ? 0.0f : dg[i];
        const float da = -dg_i * rate * fast_sigmoid(__bfloat162float(from[at.a + h]) + shift);
        to[at.a + h] = __float2bfloat16_rn(da);
        to[at.b + h] = __float2bfloat16_rn(dbeta[i] * beta[i] * (1 - beta[i] / at.beta_max));
        dA_sum += dg_i * g[i];
        da_sum += da;
      }
    }
    __syncthreads();  // the sums of the heads before may still be read
    dA_sums[threadIdx.x] = dA_sum;
    da_sums[threadIdx.x] = da_sum;
    __syncthreads();
    if (row != 0) continue;
    for (int i = 1; i < rows; i++) {
      dA_sum += dA_sums[i * heads + int(threadIdx.x)];
      da_sum += da_sums[i * heads + int(threadIdx.x)];
    }
    sums[h] = dA_sum;
    sums[at.heads + h] = da_sum;
  }
  for (int m = begin + int(threadIdx.x); m < end; m += kThreads)
    for (int c = at.b + at.heads; c < at.columns; c++)
      dproj[int64_t(m) * at.columns + c] = __float2bfloat16_rn(0.0f);
}

}  // namespace gdn
