// The mixer's output norm and gate to be read; equations in gdn/cpu_layers.h. A warp does a head of a row.
#pragma once

#include "common.cuh"

namespace gdn {
namespace readable {

// Head `item` of all rows' heads: its z in proj.
struct OutputNormSizes {
  int items, heads, dv, columns, z_column;  // items = M*Hv
  __device__ int64_t z(int64_t item) const { return item / heads * columns + z_column + item % heads * dv; }
};

inline OutputNormSizes output_norm_sizes(const MixerShape& s) {
  require_head_dims(s);
  return {s.rows() * s.heads_v, s.heads_v, s.head_dim_v, s.columns(), s.z_column()};
}

// One expression for both passes, so that they give the same bits.
__device__ inline act output_norm_value(float w, float o, float rstd, float z) {
  return rounded(w * (o * rstd) * silu(z));
}

static __global__ void __launch_bounds__(kThreads)
    output_norm_forward_kernel(act* y, float* rstd, const act* o, const act* proj, const float* w_o,
                               OutputNormSizes size) {
  const int64_t item = warp_number(), o0 = item * size.dv, z0 = size.z(item);
  if (item >= size.items) return;
  float squares = 0;
  for (int c = lane_number(); c < size.dv; c += 32) squares += number(o, o0 + c) * number(o, o0 + c);
  const float r = 1 / sqrtf(lane_sum(squares) / size.dv + float(kNormEps));
  rstd[item] = r;
  for (int c = lane_number(); c < size.dv; c += 32)
    y[o0 + c] = output_norm_value(w_o[c], number(o, o0 + c), r, number(proj, z0 + c));
}

// d_o = rstd (e - n mean(e n)) with n = o rstd, e = w_o silu(z) dy; dz = w_o n dy silu'(z). d_o may be dy.
static __global__ void __launch_bounds__(kThreads)
    output_norm_backward_kernel(act* d_o, act* dproj, act* y, const act* dy, const act* o, const float* rstd,
                                const act* proj, const float* w_o, OutputNormSizes size) {
  const int64_t item = warp_number(), o0 = item * size.dv, z0 = size.z(item);
  if (item >= size.items) return;
  const float r = rstd[item];
  float along = 0;
  for (int c = lane_number(); c < size.dv; c += 32)
    along += w_o[c] * silu(number(proj, z0 + c)) * number(dy, o0 + c) * (number(o, o0 + c) * r);
  const float mean = lane_sum(along) / size.dv;
  for (int c = lane_number(); c < size.dv; c += 32) {
    const float z = number(proj, z0 + c), n = number(o, o0 + c) * r, gradient = number(dy, o0 + c);
    y[o0 + c] = output_norm_value(w_o[c], number(o, o0 + c), r, z);
    d_o[o0 + c] = rounded(r * (w_o[c] * silu(z) * gradient - n * mean));
    dproj[z0 + c] = rounded(w_o[c] * n * gradient * silu_derivative(z));
  }
}

// partials [pieces,dv] = sum of n silu(z) dy over the heads of a piece.
static __global__ void __launch_bounds__(kThreads)
    output_norm_gain_kernel(float* partials, const act* dy, const act* o, const float* rstd, const act* proj,
                            OutputNormSizes size) {
  const int c = int(thread_number()), piece = blockIdx.y;
  if (c >= size.dv) return;
  float sum = 0;
  for (int item = piece * kPieceRows; item < min((piece + 1) * kPieceRows, size.items); item++) {
    const int64_t i = int64_t(item) * size.dv + c;
    sum += number(o, i) * rstd[item] * silu(number(proj, size.z(item) + c)) * number(dy, i);
  }
  partials[int64_t(piece) * size.dv + c] = sum;
}

inline void output_norm_forward(Cuda& dev, act* y, float* rstd, const act* o, const act* proj,
                                const float* w_o, const MixerShape& shape) {
  Range<Cuda> range(dev, __func__);
  const OutputNormSizes size = output_norm_sizes(shape);
  if (size.items == 0) return;
  output_norm_forward_kernel<<<blocks_of_warps(size.items), kThreads, 0, dev.stream>>>(y, rstd, o, proj, w_o,
                                                                                       size);
  launched("output_norm_forward");
}

inline size_t output_norm_backward_scratch_bytes(Cuda&, const MixerShape& shape) {
  return size_t(pieces_of(shape.rows() * shape.heads_v)) * shape.head_dim_v * sizeof(float);
}

inline void output_norm_backward(Cuda& dev, act* d_o, act* dproj, float* dw_o, act* y, const act* dy,
                                 const act* o, const float* rstd, const act* proj, const float* w_o,
                                 const MixerShape& shape, void* scratch) {
  Range<Cuda> range(dev, __func__);
  const OutputNormSizes size = output_norm_sizes(shape);
  if (size.items == 0) return;
  float* partials = static_cast<float*>(scratch);
  output_norm_gain_kernel<<<grid_of_pieces(size.dv, size.items), kThreads, 0, dev.stream>>>(partials, dy, o,
                                                                                            rstd, proj, size);
  launched("output_norm_gain");
  output_norm_backward_kernel<<<blocks_of_warps(size.items), kThreads, 0, dev.stream>>>(
      d_o, dproj, y, dy, o, rstd, proj, w_o, size);
  launched("output_norm_backward");
  add_partials(dev, {{{dw_o, partials, pieces_of(size.items), size.dv, size.dv}}});
}

}  // namespace readable
}  // namespace gdn
