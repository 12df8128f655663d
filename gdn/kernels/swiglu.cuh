// SwiGLU: out = silu(gate) * up, silu(x) = x s(x), s the sigmoid; gate_up [M,2I]: gate, then up.
//   dgate = dout * up * s(gate) (1 + gate (1 - s(gate)))        dup = dout * silu(gate)
// A thread computes kSwigluVectors times eight columns, all loads in flight before the first is used.
//
// Times: NVIDIA H100, dev/results/layer_speed/h100_d1024.txt; %: of the rate of a copy of as many bytes.
#pragma once

#include "common.cuh"

namespace gdn {

constexpr int kSwigluThreads = 256, kSwigluVectors = 2;  // a thread's vectors of eight columns, a block apart

// The vector of eight that a thread handles: its row and column; rows * inner / 8 fits in 32 bits (checked).
__device__ inline uint32_t swiglu_vector(int i) {
  return (blockIdx.x * kSwigluVectors + i) * kSwigluThreads + threadIdx.x;
}

// M = 32768, I = 2816: 554 MB (gate, up in, out out), 0.1842 ms at the copy rate; measured 0.1842 ms, 100%.
static __global__ void __launch_bounds__(kSwigluThreads)
    swiglu_forward_kernel(act* __restrict__ out, const act* __restrict__ gate_up, uint32_t vectors,
                          uint32_t row_vectors) {
  uint4 gate[kSwigluVectors], up[kSwigluVectors];
#pragma unroll
  for (int i = 0; i < kSwigluVectors; i++) {
    const uint32_t v = swiglu_vector(i);
    if (v >= vectors) break;
    const act* from =
        gate_up + (int64_t(v) + v / row_vectors * row_vectors) * 8;  // a row of gate_up is two of out
    gate[i] = load16(from);
    up[i] = load16(from + row_vectors * 8);
  }
#pragma unroll
  for (int i = 0; i < kSwigluVectors; i++) {
    const uint32_t v = swiglu_vector(i);
    if (v >= vectors) break;
    float x[8], y[8];
    unpack8(x, gate[i]);
    unpack8(y, up[i]);
    for (int c = 0; c < 8; c++) y[c] *= x[c] * fast_sigmoid(x[c]);
    store16(out + int64_t(v) * 8, pack8(y));
  }
}

// out may be dout: a thread reads its part of dout before it writes there.
//
// M = 32768, I = 2816: 1107 MB (dout, gate, up in, dgate, dup, out out), 0.3685 ms at the copy rate; measured
// 0.3719 ms, 99%.
static __global__ void __launch_bounds__(kSwigluThreads)
    swiglu_backward_kernel(act* __restrict__ dgate_up, act* out, const act* dout,
                           const act* __restrict__ gate_up, uint32_t vectors, uint32_t row_vectors) {
  uint4 dy[kSwigluVectors], gate[kSwigluVectors], up[kSwigluVectors];
#pragma unroll
  for (int i = 0; i < kSwigluVectors; i++) {
    const uint32_t v = swiglu_vector(i);
    if (v >= vectors) break;
    const act* from = gate_up + (int64_t(v) + v / row_vectors * row_vectors) * 8;
    dy[i] = load16(dout + int64_t(v) * 8);
    gate[i] = load16(from);
    up[i] = load16(from + row_vectors * 8);
  }
#pragma unroll
  for (int i = 0; i < kSwigluVectors; i++) {
    const uint32_t v = swiglu_vector(i);
    if (v >= vectors) break;
    float d[8], x[8], y[8], dgate[8], dup[8];
    unpack8(d, dy[i]);
    unpack8(x, gate[i]);
    unpack8(y, up[i]);
    for (int c = 0; c < 8; c++) {
      const float s = fast_sigmoid(x[c]);
      dgate[c] = d[c] * y[c] * s * (1 + x[c] * (1 - s));
      dup[c] = d[c] * x[c] * s;
      y[c] *= x[c] * s;
    }
    act* to = dgate_up + (int64_t(v) + v / row_vectors * row_vectors) * 8;
    store16(to, pack8(dgate));
    store16(to + row_vectors * 8, pack8(dup));
    store16(out + int64_t(v) * 8, pack8(y));
  }
}

inline uint32_t swiglu_vectors(int rows, int inner) {
  require_multiple_of_8(inner, "the inner size of the SwiGLU");
  const int64_t vectors = int64_t(rows) * inner / 8;
  if (vectors > INT32_MAX)
    throw std::runtime_error("a SwiGLU of " + std::to_string(rows) + " rows of " + std::to_string(inner) +
                             " is too large for one call; lower -b (sequences a micro-batch)");
  return uint32_t(vectors);
}

void swiglu_forward(Cuda& dev, act* out, const act* gate_up, int rows, int inner) {
  Range<Cuda> range(dev, __func__);
  const uint32_t vectors = swiglu_vectors(rows, inner);
  if (vectors == 0) return;
  const uint32_t blocks = divide_up<uint32_t>(vectors, kSwigluThreads * kSwigluVectors);
  swiglu_forward_kernel<<<blocks, kSwigluThreads, 0, dev.stream>>>(out, gate_up, vectors,
                                                                   uint32_t(inner / 8));
  launched("swiglu_forward");
}

void swiglu_backward(Cuda& dev, act* dgate_up, act* out, const act* dout, const act* gate_up, int rows,
                     int inner) {
  Range<Cuda> range(dev, __func__);
  const uint32_t vectors = swiglu_vectors(rows, inner);
  if (vectors == 0) return;
  const uint32_t blocks = divide_up<uint32_t>(vectors, kSwigluThreads * kSwigluVectors);
  swiglu_backward_kernel<<<blocks, kSwigluThreads, 0, dev.stream>>>(dgate_up, out, dout, gate_up, vectors,
                                                                    uint32_t(inner / 8));
  launched("swiglu_backward");
}

}  // namespace gdn
