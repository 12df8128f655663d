// SwiGLU to be read; equations in gdn/cpu_layers.h. A thread does a number of out.
#pragma once

#include "common.cuh"

namespace gdn {
namespace readable {

static __global__ void __launch_bounds__(kThreads)
    swiglu_forward_kernel(act* out, const act* gate_up, int64_t n, int inner) {
  const int64_t i = thread_number();
  if (i >= n) return;
  const int64_t gate = i / inner * 2 * inner + i % inner, up = gate + inner;
  out[i] = rounded(silu(number(gate_up, gate)) * number(gate_up, up));
}

// out may be dout.
static __global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(act* dgate_up, act* out, const act* dout, const act* gate_up, int64_t n,
                           int inner) {
  const int64_t i = thread_number();
  if (i >= n) return;
  const int64_t gate = i / inner * 2 * inner + i % inner, up = gate + inner;
  const float x = number(gate_up, gate), y = number(gate_up, up), dy = number(dout, i);
  dgate_up[gate] = rounded(dy * y * silu_derivative(x));
  dgate_up[up] = rounded(dy * silu(x));
  out[i] = rounded(silu(x) * y);
}

inline void swiglu_forward(Cuda& dev, act* out, const act* gate_up, int rows, int inner) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(inner, "the inner size of the SwiGLU");
  const int64_t n = int64_t(rows) * inner;
  if (n == 0) return;
  swiglu_forward_kernel<<<blocks_of_threads(n), kThreads, 0, dev.stream>>>(out, gate_up, n, inner);
  launched("swiglu_forward");
}

inline void swiglu_backward(Cuda& dev, act* dgate_up, act* out, const act* dout, const act* gate_up, int rows,
                            int inner) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(inner, "the inner size of the SwiGLU");
  const int64_t n = int64_t(rows) * inner;
  if (n == 0) return;
  swiglu_backward_kernel<<<blocks_of_threads(n), kThreads, 0, dev.stream>>>(dgate_up, out, dout, gate_up, n,
                                                                            inner);
  launched("swiglu_backward");
}

}  // namespace readable
}  // namespace gdn
