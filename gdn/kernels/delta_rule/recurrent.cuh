// The gated delta rule token by token, for sampling.
#pragma once

#include "fragments.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kRecurrentParts = 8, kRecurrentThreads = 128;

constexpr int kRecurrentColumns = kRecurrentThreads / kRecurrentParts, kRecurrentRows = 256 / kRecurrentParts;

// Sum over the eight lanes that share a column of the state.
__device__ inline float sum_of_parts(float x) {
  x = sum_of_quad(x);
  return x + __shfl_xor_sync(~0u, x, 4);
}

// The recurrence of gdn/cpu_delta_rule.h, token by token; state [B,Hv,dk,dv] fp32 in and out. One CTA: 16
// columns of dv of a value head. Eight lanes share a column of the state, each with every eighth row in
// registers.
//
// Lower bound for one token (B=32, H=6, dk=128, dv=256): the state, read and written, 50 MB. H200: 0.035 ms
// (dev/results/2026-11-29_h200_third).
static __global__ void __launch_bounds__(kRecurrentThreads)
    recurrent_kernel(act* o, float* state, const act* qkv, const float* g, const float* beta, Sizes size,
                     float s) {
  constexpr int kParts = kRecurrentParts, kRows = kRecurrentRows;
  __shared__ float q[kParts * kRows], k[kParts * kRows];
  const int h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h), part = threadIdx.x % kParts;
  const int column = blockIdx.x * kRecurrentColumns + threadIdx.x / kParts;
  const bool active = column < size.dv;
  float* column_state = state + (int64_t(b) * size.heads_v + h) * size.dk * size.dv + column;
  float S[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++)
    S[i] = active && kParts * i + part < size.dk ? column_state[int64_t(kParts * i + part) * size.dv] : 0.f;
  for (int t = 0; t < size.tokens; t++) {
    const int64_t row = int64_t(b) * size.tokens + t, gate = row * size.heads_v + h;
    const act* inputs = qkv + row * size.channels;
    __syncthreads();
    for (int i = threadIdx.x; i < kParts * kRows; i += kRecurrentThreads) {
      q[i] = i < size.dk ? __bfloat162float(inputs[size.q_column(hk) + i]) : 0.f;
      k[i] = i < size.dk ? __bfloat162float(inputs[size.k_column(hk) + i]) : 0.f;
    }
    __syncthreads();
    const float decay = expf(g[gate]), v = active ? __bfloat162float(inputs[size.v_column(h) + column]) : 0.f;
    float predicted = 0.f, out = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      S[i] *= decay;
      predicted += S[i] * k[kParts * i + part];
    }
    const float u = beta[gate] * (v - sum_of_parts(predicted));
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      S[i] += k[kParts * i + part] * u;
      out += S[i] * q[kParts * i + part];
    }
    out = s * sum_of_parts(out);
    if (active && part == 0) o[gate * size.dv + column] = __float2bfloat16_rn(out);
  }
#pragma unroll
  for (int i = 0; i < kRows; i++)
    if (active && kParts * i + part < size.dk) column_state[int64_t(kParts * i + part) * size.dv] = S[i];
}

}  // namespace delta_rule
}  // namespace gdn
