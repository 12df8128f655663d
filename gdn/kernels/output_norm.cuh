// The mixer's output: RMSNorm of each head of o, times silu(z).
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gdn {

constexpr int kOutputThreads = 256;
// Blocks of a multiprocessor in the backward, as many as there are registers for.
__host__ __device__ constexpr int output_backward_blocks(int vectors) { return vectors == 1 ? 3 : 2; }

// A head of one row belongs to a team of `lanes` lanes of a warp (a power of two), each with kVectors vectors
// of eight channels: 1 up to dv = 256, 2 up to 512.
struct OutputLayout {
  int heads, head_dim, columns, z_column;  // of a row of proj
  int lanes;
  int items;  // rows * heads
};

inline OutputLayout output_layout(const MixerShape& s) {
  require_head_dims(s);
  return {s.heads_v,           s.head_dim_v, s.columns(), s.z_column(), lanes_for(s.head_dim_v / 8),
          s.rows() * s.heads_v};
}

// Where z of an item (row, head) begins in proj.
__device__ inline int64_t z_start(const OutputLayout& at, int item) {
  const int row = item / at.heads;
  return int64_t(row) * at.columns + at.z_column + (item - row * at.heads) * at.head_dim;
}

// What o is multiplied by, s = sigmoid(z): one expression for both passes, so that they give the same bits.
__device__ inline float output_factor(float gain, float r, float z, float s) { return gain * r * z * s; }

// A team does kItems items, its loads all in flight together.
// Floor at M = 32768, H = 6, dv = 256: 302 MB (o, z in, y out), 0.0713 ms at the copy rate. Reached on an
// H200: 0.0821 ms, 87% of the copy rate.
template <int kVectors>
__global__ void __launch_bounds__(kOutputThreads, 3)
    output_norm_forward_kernel(act* __restrict__ y, float* __restrict__ rstd, const act* __restrict__ o,
                               const act* __restrict__ proj, const float* __restrict__ w_o, OutputLayout at) {
  constexpr int kItems = 4 / kVectors;
  const int lane = threadIdx.x % at.lanes, teams = kOutputThreads / at.lanes;
  const int first = blockIdx.x * teams * kItems + threadIdx.x / at.lanes;
  uint4 packed_o[kItems][kVectors] = {}, packed_z[kItems][kVectors] = {};
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int item = first + i * teams;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const int c = (v * at.lanes + lane) * 8;
      if (item < at.items && c < at.head_dim) {
        packed_o[i][v] = load16(o + int64_t(item) * at.head_dim + c);
        packed_z[i][v] = load16(proj + z_start(at, item) + c);
      }
    }
  }
  float gain[kVectors][8] = {};
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    const int c = (v * at.lanes + lane) * 8;
    if (c < at.head_dim) load8(gain[v], w_o + c);
  }
#pragma unroll
  for (int i = 0; i < kItems; i++) {
    const int item = first + i * teams;
    float squares = 0;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      float value[8];
      unpack8(value, packed_o[i][v]);
      for (int c = 0; c < 8; c++) squares += value[c] * value[c];
    }
    const float r = rsqrtf(lane_sum(squares, at.lanes) / at.head_dim + float(kNormEps));
    if (item >= at.items) continue;
    if (lane == 0) rstd[item] = r;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const int c0 = (v * at.lanes + lane) * 8;
      if (c0 >= at.head_dim) continue;
      float value[8], z[8];
      unpack8(value, packed_o[i][v]);
      unpack8(z, packed_z[i][v]);
      for (int c = 0; c < 8; c++) value[c] *= output_factor(gain[v][c], r, z[c], fast_sigmoid(z[c]));
      store16(y + int64_t(item) * at.head_dim + c0, pack8(value));
    }
  }
}

inline void output_norm_forward(Cuda& dev, act* y, float* rstd, const act* o, const act* proj,
                                const float* w_o, const MixerShape& shape) {
  Range<Cuda> range(dev, __func__);
  const OutputLayout at = output_layout(shape);
  if (at.items == 0) return;
  const bool two_vectors = at.head_dim > 256;
  const int block_items = kOutputThreads / at.lanes * (two_vectors ? 2 : 4);
  const int blocks = divide_up(at.items, block_items);
  if (two_vectors)
    output_norm_forward_kernel<2><<<blocks, kOutputThreads, 0, dev.stream>>>(y, rstd, o, proj, w_o, at);
  else
    output_norm_forward_kernel<1><<<blocks, kOutputThreads, 0, dev.stream>>>(y, rstd, o, proj, w_o, at);
  launched("output_norm_forward");
}

// What a team reads of an item.
template <int kVectors>
struct OutputItem {
  uint4 dy[kVectors], o[kVectors], z[kVectors];
  float r;
};

template <int kVectors>
__device__ OutputItem<kVectors> load_item(const act* dy, const act* o, const act* proj, const float* rstd,
                                          const OutputLayout& at, int item) {
  OutputItem<kVectors> x = {};
  if (item >= at.items) return x;
  const int lane = threadIdx.x % at.lanes;
  x.r = rstd[item];
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    const int c = (v * at.lanes + lane) * 8;
    if (c >= at.head_dim) continue;
    x.dy[v] = load16(dy + int64_t(item) * at.head_dim + c);
    x.o[v] = load16(o + int64_t(item) * at.head_dim + c);
    x.z[v] = load16(proj + z_start(at, item) + c);
  }
  return x;
}

// A team walks over items, one item's loads ahead of its sums, and keeps its sum of dw_o in registers; the
// block adds up its teams in order and leaves the sum in its row of partials [blocks,dv]. As many blocks as
// run at once. d_o may be dy: a team reads its item before it writes there. Floor at M = 32768, H = 6, dv =
// 256: 604 MB (dy, o, z in, d_o, dz, y out), 0.1425 ms at the copy rate. Without y and without loading ahead,
// 503 MB, an H200 reached 81% of the copy rate, the sum of the partials included.
template <int kVectors>
__global__ void __launch_bounds__(kOutputThreads, output_backward_blocks(kVectors))
    output_norm_backward_kernel(act* d_o, act* __restrict__ dproj, float* __restrict__ partials,
                                act* __restrict__ y, const act* dy, const act* __restrict__ o,
                                const float* __restrict__ rstd, const act* __restrict__ proj,
                                const float* __restrict__ w_o, OutputLayout at) {
  __shared__ __align__(16) float team_dw[kOutputThreads * kVectors * 8];  // [teams, kVectors, lanes, 8]
  const int lane = threadIdx.x % at.lanes, team = threadIdx.x / at.lanes, teams = kOutputThreads / at.lanes;
  float dw[kVectors][8] = {};

  // Bounds are the warp's first team's: whole warps take part in the sums.
  const int step = gridDim.x * teams, team_in_warp = threadIdx.x % 32 / at.lanes;
  int item = blockIdx.x * teams + team;
  OutputItem<kVectors> next = load_item<kVectors>(dy, o, proj, rstd, at, item);
  for (; item - team_in_warp < at.items; item += step) {
    const OutputItem<kVectors> now = next;
    next = load_item<kVectors>(dy, o, proj, rstd, at, item + step);
    const float r = now.r;
    float along = 0, e[kVectors][8];
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const int c0 = (v * at.lanes + lane) * 8;
      float gain[8] = {}, g[8], x[8], z[8], again[8], dz[8];
      if (c0 < at.head_dim) load8(gain, w_o + c0);  // from the L1 cache: registers are short
      unpack8(g, now.dy[v]);
      unpack8(x, now.o[v]);
      unpack8(z, now.z[v]);
      for (int c = 0; c < 8; c++) {
        const float s = fast_sigmoid(z[c]), gated = z[c] * s * g[c], normed = x[c] * r;
        again[c] = x[c] * output_factor(gain[c], r, z[c], s);
        e[v][c] = gain[c] * gated;
        dz[c] = gain[c] * normed * g[c] * s * (1 + z[c] * (1 - s));
        dw[v][c] += normed * gated;
        along += e[v][c] * normed;
      }
      if (item >= at.items || c0 >= at.head_dim) continue;
      store16(y + int64_t(item) * at.head_dim + c0, pack8(again));
      store16(dproj + z_start(at, item) + c0, pack8(dz));
    }
    const float mean = lane_sum(along, at.lanes) / at.head_dim;
    if (item >= at.items) continue;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const int c0 = (v * at.lanes + lane) * 8;
      if (c0 >= at.head_dim) continue;
      float x[8];
      unpack8(x, now.o[v]);
      for (int c = 0; c < 8; c++) e[v][c] = r * (e[v][c] - x[c] * r * mean);
      store16(d_o + int64_t(item) * at.head_dim + c0, pack8(e[v]));
    }
  }

  const int team_columns = kVectors * at.lanes * 8;
#pragma unroll
  for (int v = 0; v < kVectors; v++) store8(team_dw + team * team_columns + (v * at.lanes + lane) * 8, dw[v]);
  __syncthreads();
  for (int c = threadIdx.x; c < at.head_dim; c += kOutputThreads) {
    float sum = 0;
    for (int t = 0; t < teams; t++) sum += team_dw[t * team_columns + c];
    partials[int64_t(blockIdx.x) * at.head_dim + c] = sum;
  }
}

inline int output_norm_backward_blocks(const Cuda& dev, const MixerShape& shape) {
  const int at_once = output_backward_blocks(shape.head_dim_v > 256 ? 2 : 1) * dev.multiprocessors;
  return std::min(divide_up(shape.rows() * shape.heads_v, 8), at_once);
}

inline size_t output_norm_backward_scratch_bytes(Cuda& dev, const MixerShape& shape) {
  return size_t(output_norm_backward_blocks(dev, shape)) * shape.head_dim_v * sizeof(float);
}

inline void output_norm_backward(Cuda& dev, act* d_o, act* dproj, float* dw_o, act* y, const act* dy,
                                 const act* o, const float* rstd, const act* proj, const float* w_o,
                                 const MixerShape& shape, void* scratch) {
  Range<Cuda> range(dev, __func__);
  const OutputLayout at = output_layout(shape);
  if (at.items == 0) return;
  const int blocks = output_norm_backward_blocks(dev, shape);
  float* partials = static_cast<float*>(scratch);
  if (at.head_dim > 256)
    output_norm_backward_kernel<2>
        <<<blocks, kOutputThreads, 0, dev.stream>>>(d_o, dproj, partials, y, dy, o, rstd, proj, w_o, at);
  else
    output_norm_backward_kernel<1>
        <<<blocks, kOutputThreads, 0, dev.stream>>>(d_o, dproj, partials, y, dy, o, rstd, proj, w_o, at);
  launched("output_norm_backward");
  add_partials(dev, {{{dw_o, partials, blocks, at.head_dim, at.head_dim}}});
}

}  // namespace gdn
