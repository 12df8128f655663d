// RMSNorm to be read; equations in gdn/cpu_layers.h. A warp does a row.
#pragma once

#include "common.cuh"

namespace gdn {
namespace readable {

// h = w x rstd. Where branch is not nullptr, first x_out = x + branch; the norm is of x_out as rounded.
static __global__ void __launch_bounds__(kThreads)
    rmsnorm_forward_kernel(act* x_out, act* h, float* rstd, const act* x, const act* branch, const float* w,
                           int rows, int width) {
  const int64_t row = warp_number();
  if (row >= rows) return;
  float squares = 0;
  for (int c = lane_number(); c < width; c += 32) {
    const int64_t i = row * width + c;
    if (branch) x_out[i] = rounded(number(x, i) + number(branch, i));
    const float value = number(branch ? x_out : x, i);
    squares += value * value;
  }
  const float r = 1 / sqrtf(lane_sum(squares) / width + float(kNormEps));
  rstd[row] = r;
  for (int c = lane_number(); c < width; c += 32) {
    const int64_t i = row * width + c;
    h[i] = rounded(w[c] * number(branch ? x_out : x, i) * r);
  }
}

// dx += rstd (e - n mean(e n)) with n = x rstd, e = w dh; and h as the forward gave it, which may be dh.
static __global__ void __launch_bounds__(kThreads)
    rmsnorm_backward_kernel(act* dx, act* h, const act* dh, const act* x, const float* rstd, const float* w,
                            int rows, int width) {
  const int64_t row = warp_number();
  if (row >= rows) return;
  const float r = rstd[row];
  float along = 0;
  for (int c = lane_number(); c < width; c += 32) {
    const int64_t i = row * width + c;
    along += w[c] * number(dh, i) * (number(x, i) * r);
  }
  const float mean = lane_sum(along) / width;
  for (int c = lane_number(); c < width; c += 32) {
    const int64_t i = row * width + c;
    const float e = w[c] * number(dh, i), n = number(x, i) * r;
    dx[i] = rounded(number(dx, i) + r * (e - n * mean));
    if (h) h[i] = rounded(w[c] * number(x, i) * r);
  }
}

// partials [pieces,d] = sum of dh n over the rows of a piece.
static __global__ void __launch_bounds__(kThreads)
    rmsnorm_gain_kernel(float* partials, const act* dh, const act* x, const float* rstd, int rows,
                        int width) {
  const int c = int(thread_number()), piece = blockIdx.y;
  if (c >= width) return;
  float sum = 0;
  for (int row = piece * kPieceRows; row < min((piece + 1) * kPieceRows, rows); row++) {
    const int64_t i = int64_t(row) * width + c;
    sum += number(dh, i) * (number(x, i) * rstd[row]);
  }
  partials[int64_t(piece) * width + c] = sum;
}

inline void launch_rmsnorm_forward(Cuda& dev, act* x_out, act* h, float* rstd, const act* x,
                                   const act* branch, const float* w, int rows, int width) {
  require_multiple_of_8(width, "the width of an RMSNorm");
  if (rows == 0) return;
  rmsnorm_forward_kernel<<<blocks_of_warps(rows), kThreads, 0, dev.stream>>>(x_out, h, rstd, x, branch, w,
                                                                             rows, width);
  launched("rmsnorm_forward");
}

inline void rmsnorm_forward(Cuda& dev, act* h, float* rstd, const act* x, const float* w, int rows,
                            int width) {
  Range<Cuda> range(dev, __func__);
  launch_rmsnorm_forward(dev, nullptr, h, rstd, x, nullptr, w, rows, width);
}

inline void residual_rmsnorm_forward(Cuda& dev, act* x_out, act* h, float* rstd, const act* x,
                                     const act* branch, const float* w, int rows, int width) {
  Range<Cuda> range(dev, __func__);
  launch_rmsnorm_forward(dev, x_out, h, rstd, x, branch, w, rows, width);
}

inline size_t rmsnorm_backward_scratch_bytes(Cuda&, int rows, int width) {
  return size_t(pieces_of(rows)) * width * sizeof(float);
}

inline void rmsnorm_backward(Cuda& dev, act* dx, float* dw, act* h, const act* dh, const act* x,
                             const float* rstd, const float* w, int rows, int width, void* scratch) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(width, "the width of an RMSNorm");
  if (rows == 0) return;
  float* partials = static_cast<float*>(scratch);
  rmsnorm_gain_kernel<<<grid_of_pieces(width, rows), kThreads, 0, dev.stream>>>(partials, dh, x, rstd, rows,
                                                                                width);
  launched("rmsnorm_gain");
  rmsnorm_backward_kernel<<<blocks_of_warps(rows), kThreads, 0, dev.stream>>>(dx, h, dh, x, rstd, w, rows,
                                                                              width);
  launched("rmsnorm_backward");
  add_partials(dev, {{{dw, partials, pieces_of(rows), width, width}}});
}

}  // namespace readable
}  // namespace gdn
