// The mixer's output: RMSNorm of each head of o, times silu(z).
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gdn {

constexpr int kOutputThreads = 256;

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
      for (int c = 0; c < 8; c++) value[c] *= gain[v][c] * r * z[c] * fast_sigmoid(z[c]);
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

// A team walks over items, kItems at a time, and keeps its sum of dw_o in registers; the block adds up its
// teams in order and leaves the sum in its row of partials [blocks,dv].
// Floor at M = 32768, H = 6, dv = 256: 503 MB (dy, o, z in, d_o, dz out), 0.1188 ms at the copy rate. Reached
// on an H200, with the sum of the partials: 0.1473 ms, 81% of the copy rate.
template <int kVectors>
__global__ void __launch_bounds__(kOutputThreads)
    output_norm_backward_kernel(act* __restrict__ d_o, act* __restrict__ dproj, float* __restrict__ partials,
                                const act* __restrict__ dy, const act* __restrict__ o,
                                const float* __restrict__ rstd, const act* __restrict__ proj,
                                const float* __restrict__ w_o, OutputLayout at) {
  constexpr int kItems = 2 / kVectors;
  __shared__ __align__(16) float team_dw[kOutputThreads * kVectors * 8];  // [teams, kVectors, lanes, 8]
  const int lane = threadIdx.x % at.lanes, team = threadIdx.x / at.lanes, teams = kOutputThreads / at.lanes;
  float gain[kVectors][8] = {}, dw[kVectors][8] = {};
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    const int c = (v * at.lanes + lane) * 8;
    if (c < at.head_dim) load8(gain[v], w_o + c);
  }

  // Bounds are the block's, not the team's: whole warps take part in the sums.
  const int step = gridDim.x * teams * kItems;
  for (int block_first = blockIdx.x * teams * kItems; block_first < at.items; block_first += step) {
    uint4 packed_dy[kItems][kVectors] = {}, packed_o[kItems][kVectors] = {}, packed_z[kItems][kVectors] = {};
    float r[kItems] = {};
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int item = block_first + i * teams + team;
      if (item >= at.items) continue;
      r[i] = rstd[item];
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
        const int c = (v * at.lanes + lane) * 8;
        if (c < at.head_dim) {
          packed_dy[i][v] = load16(dy + int64_t(item) * at.head_dim + c);
          packed_o[i][v] = load16(o + int64_t(item) * at.head_dim + c);
          packed_z[i][v] = load16(proj + z_start(at, item) + c);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; i++) {
      const int item = block_first + i * teams + team;
      float along = 0, e[kVectors][8], normed[kVectors][8], dz[kVectors][8];
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
        float g[8], z[8];
        unpack8(g, packed_dy[i][v]);
        unpack8(normed[v], packed_o[i][v]);
        unpack8(z, packed_z[i][v]);
        for (int c = 0; c < 8; c++) {
          const float s = fast_sigmoid(z[c]), gated = z[c] * s * g[c];
          normed[v][c] *= r[i];
          e[v][c] = gain[v][c] * gated;
          dz[v][c] = gain[v][c] * normed[v][c] * g[c] * s * (1 + z[c] * (1 - s));
          dw[v][c] += normed[v][c] * gated;
          along += e[v][c] * normed[v][c];
        }
      }
      const float mean = lane_sum(along, at.lanes) / at.head_dim;
      if (item >= at.items) continue;
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
        const int c0 = (v * at.lanes + lane) * 8;
        if (c0 >= at.head_dim) continue;
        for (int c = 0; c < 8; c++) e[v][c] = r[i] * (e[v][c] - normed[v][c] * mean);
        store16(d_o + int64_t(item) * at.head_dim + c0, pack8(e[v]));
        store16(dproj + z_start(at, item) + c0, pack8(dz[v]));
      }
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
  return std::min(divide_up(shape.rows() * shape.heads_v, 8), 6 * dev.multiprocessors);
}

inline size_t output_norm_backward_scratch_bytes(Cuda& dev, const MixerShape& shape) {
  return size_t(output_norm_backward_blocks(dev, shape)) * shape.head_dim_v * sizeof(float);
}

inline void output_norm_backward(Cuda& dev, act* d_o, act* dproj, float* dw_o, const act* dy, const act* o,
                                 const float* rstd, const act* proj, const float* w_o,
                                 const MixerShape& shape, void* scratch) {
  Range<Cuda> range(dev, __func__);
  const OutputLayout at = output_layout(shape);
  if (at.items == 0) return;
  const int blocks = output_norm_backward_blocks(dev, shape);
  float* partials = static_cast<float*>(scratch);
  if (at.head_dim > 256)
    output_norm_backward_kernel<2>
        <<<blocks, kOutputThreads, 0, dev.stream>>>(d_o, dproj, partials, dy, o, rstd, proj, w_o, at);
  else
    output_norm_backward_kernel<1>
        <<<blocks, kOutputThreads, 0, dev.stream>>>(d_o, dproj, partials, dy, o, rstd, proj, w_o, at);
  launched("output_norm_backward");
  add_partials(dev, dw_o, partials, blocks, at.head_dim, at.head_dim);
}

}  // namespace gdn
