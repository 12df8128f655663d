// Gates of the delta rule: the logarithm g of the decay, and the writing strength beta.
#pragma once

#include "common.cuh"

namespace gdn {

constexpr int kGateThreads = 256, kGateWarps = kGateThreads / 32;

// ln(1 + e^x), also where e^x would overflow
__device__ inline float device_softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(fast_exp2(-kLog2e * fabsf(x)));
}

// Where a and b stand in a row of proj.
struct GateColumns {
  int heads, columns, a, b;
};

inline GateColumns gate_columns(const MixerShape& s) {
  return {s.heads_v, s.columns(), s.a_column(), s.b_column()};
}

// One thread a row and head.
// Floor at M = 32768, H = 6: 2.4 MB (a, b in, g and beta out), so the latency of one launch. Reached on an
// H200: 0.0074 ms, 8% of the copy rate.
static __global__ void __launch_bounds__(kGateThreads)
    gates_forward_kernel(float* __restrict__ g, float* __restrict__ beta, const act* __restrict__ proj,
                         const float* __restrict__ A_log, const float* __restrict__ dt_bias, GateColumns at,
                         int rows, float beta_max) {
  const int i = blockIdx.x * kGateThreads + threadIdx.x;
  if (i >= rows * at.heads) return;
  const int m = i / at.heads, h = i - m * at.heads;
  const act* row = proj + int64_t(m) * at.columns;
  g[i] = -expf(A_log[h]) * device_softplus(__bfloat162float(row[at.a + h]) + dt_bias[h]);
  beta[i] = beta_max * fast_sigmoid(__bfloat162float(row[at.b + h]));
}

inline void gates_forward(Cuda& dev, float* g, float* beta, const act* proj, const float* A_log,
                          const float* dt_bias, const MixerShape& shape, float beta_max) {
  Range<Cuda> range(dev, __func__);
  const int items = shape.rows() * shape.heads_v;
  if (items == 0) return;
  gates_forward_kernel<<<divide_up(items, kGateThreads), kGateThreads, 0, dev.stream>>>(
      g, beta, proj, A_log, dt_bias, gate_columns(shape), shape.rows(), beta_max);
  launched("gates_forward");
}

// One lane a row; a warp sums its 32 rows of dA_log and ddt_bias into its row of partials [warps, 2 Hv].
// Floor at M = 32768, H = 6: 4.7 MB (dg, dbeta, g, beta, a, b in, da, db out), so the latency of three
// launches. Reached on an H200, with the two sums of partials: 0.0242 ms, 5% of the copy rate.
static __global__ void __launch_bounds__(kGateThreads)
    gates_backward_kernel(act* __restrict__ dproj, float* __restrict__ partials, const float* __restrict__ dg,
                          const float* __restrict__ dbeta, const float* __restrict__ g,
                          const float* __restrict__ beta, const act* __restrict__ proj,
                          const float* __restrict__ A_log, const float* __restrict__ dt_bias, GateColumns at,
                          int rows, float beta_max) {
  const int m = blockIdx.x * kGateThreads + threadIdx.x;
  const bool active = m < rows;
  const act* row = proj + int64_t(m) * at.columns;
  act* drow = dproj + int64_t(m) * at.columns;
  float* partial = partials + (int64_t(blockIdx.x) * kGateWarps + threadIdx.x / 32) * 2 * at.heads;
  for (int h = 0; h < at.heads; h++) {
    const int64_t i = int64_t(m) * at.heads + h;
    float dA = 0, da = 0;
    if (active) {
      dA = dg[i] * g[i];
      da = -dg[i] * expf(A_log[h]) * fast_sigmoid(__bfloat162float(row[at.a + h]) + dt_bias[h]);
      drow[at.a + h] = __float2bfloat16_rn(da);
      drow[at.b + h] = __float2bfloat16_rn(dbeta[i] * beta[i] * (1 - beta[i] / beta_max));
    }
    dA = lane_sum(dA);
    da = lane_sum(da);
    if (threadIdx.x % 32 == 0) {
      partial[h] = dA;
      partial[at.heads + h] = da;
    }
  }
  if (active)
    for (int c = at.b + at.heads; c < at.columns; c++) drow[c] = __float2bfloat16_rn(0.0f);
}

inline size_t gates_backward_scratch_bytes(Cuda&, const MixerShape& shape) {
  return size_t(divide_up(shape.rows(), kGateThreads)) * kGateWarps * 2 * shape.heads_v * sizeof(float);
}

inline void gates_backward(Cuda& dev, act* dproj, float* dA_log, float* ddt_bias, const float* dg,
                           const float* dbeta, const float* g, const float* beta, const act* proj,
                           const float* A_log, const float* dt_bias, const MixerShape& shape, float beta_max,
                           void* scratch) {
  Range<Cuda> range(dev, __func__);
  if (shape.rows() == 0) return;
  const int H = shape.heads_v, blocks = divide_up(shape.rows(), kGateThreads);
  float* partials = static_cast<float*>(scratch);
  gates_backward_kernel<<<blocks, kGateThreads, 0, dev.stream>>>(
      dproj, partials, dg, dbeta, g, beta, proj, A_log, dt_bias, gate_columns(shape), shape.rows(), beta_max);
  launched("gates_backward");
  add_partials(dev, dA_log, partials, blocks * kGateWarps, H, 2 * H);
  add_partials(dev, ddt_bias, partials + H, blocks * kGateWarps, H, 2 * H);
}

}  // namespace gdn
