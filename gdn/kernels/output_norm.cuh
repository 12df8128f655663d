// The mixer's output, for each head of each row (an item), o and z of dv channels:
//   rstd = 1 / sqrt(mean(o^2) + eps)                           n = o rstd
//   y = w_o * n * silu(z)                                      dw_o += sum over items of n * silu(z) * dy
//   d_o = rstd (e - n mean(e * n)),  e = w_o * silu(z) * dy    dz = w_o * n * dy * silu'(z)
//
// Times: NVIDIA H100, dev/results/layer_speed/h100_d1024.txt; %: of the rate of a copy of as many bytes.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gdn {

constexpr int kOutputThreads = 256;
// Blocks an SM in the backward, as many as there are registers for.
__host__ __device__ constexpr int output_backward_blocks(int vectors) { return vectors == 1 ? 3 : 2; }

// An item belongs to a team: an aligned group of `lanes` lanes of a warp (a power of two), each with kVectors
// times eight channels, 1 up to dv = 256, 2 up to 512.
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

// y of one channel, silu = silu(z): one expression for both passes, so that they give the same bits.
__device__ inline float output_value(float normed, float gain, float silu) { return normed * gain * silu; }

// A team computes kItems items, all their loads in flight together.
//
// M = 32768, H = 6, dv = 256: 302 MB (o, z in, y out), 0.1005 ms at the copy rate; measured 0.1052 ms, 95%.
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
      for (int c = 0; c < 8; c++)
        value[c] = output_value(value[c] * r, gain[v][c], z[c] * fast_sigmoid(z[c]));
      store16(y + int64_t(item) * at.head_dim + c0, pack8(value));
    }
  }
}

void output_norm_forward(Cuda& dev, act* y, float* rstd, const act* o, const act* proj, const float* w_o,
                         const MixerShape& shape) {
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

// Where a team is: its item, that item's head, and how far its z is from the first z of proj, in vectors of
// eight channels (an int then reaches through 32 GB). It goes on by steps, without a division.
struct OutputPlace {
  int item, head, z;
  __device__ void advance(const OutputPlace& step, const OutputLayout& at) {
    item += step.item, head += step.head, z += step.z;
    if (head >= at.heads) head -= at.heads, z += at.columns / 8 - at.heads * (at.head_dim / 8);
  }
};

__device__ inline OutputPlace output_place(int item, const OutputLayout& at) {
  const int row = item / at.heads, head = item - row * at.heads;
  return {item, head, row * (at.columns / 8) + head * (at.head_dim / 8)};
}

// The thread's place in its team, at.lanes being a power of two.
__device__ inline int output_lane(const OutputLayout& at) { return int(threadIdx.x) & (at.lanes - 1); }

// The lane's vector v of an item in o and arrays of its shape, and in proj.
__device__ inline int64_t in_o(const OutputLayout& at, const OutputPlace& place, int v) {
  return int64_t(place.item * (at.head_dim / 8) + v * at.lanes + output_lane(at)) * 8;
}
__device__ inline int64_t in_proj(const OutputLayout& at, const OutputPlace& place, int v) {
  return int64_t(at.z_column / 8 + place.z + v * at.lanes + output_lane(at)) * 8;
}

// What a team reads of an item.
template <int kVectors>
struct OutputItem {
  uint4 dy[kVectors], o[kVectors], z[kVectors];
  float r;
};

template <int kVectors>
__device__ OutputItem<kVectors> load_item(const act* dy, const act* o, const act* proj, const float* rstd,
                                          const OutputLayout& at, const OutputPlace& place) {
  OutputItem<kVectors> x = {};
  if (place.item >= at.items) return x;
  x.r = rstd[place.item];
#pragma unroll
  for (int v = 0; v < kVectors; v++) {
    if ((v * at.lanes + output_lane(at)) * 8 >= at.head_dim) continue;
    x.dy[v] = load16(dy + in_o(at, place, v));
    x.o[v] = load16(o + in_o(at, place, v));
    x.z[v] = load16(proj + in_proj(at, place, v));
  }
  return x;
}

// Persistent blocks, as many as are resident at once. A team walks over items, the next item's loads in
// flight while it computes, and keeps its sum of dw_o in registers; the block adds up its teams in order and
// writes the sum to its row of partials [blocks,dv], which add_partials sums. d_o may be dy: a team reads its
// item before it writes there.
//
// M = 32768, H = 6, dv = 256: 604 MB (dy, o, z in, d_o, dz, y out), 0.2010 ms at the copy rate; measured
// 0.2337 ms, 86%, add_partials included.
template <int kVectors>
__global__ void __launch_bounds__(kOutputThreads, output_backward_blocks(kVectors))
    output_norm_backward_kernel(act* d_o, act* __restrict__ dproj, float* __restrict__ partials,
                                act* __restrict__ y, const act* dy, const act* __restrict__ o,
                                const float* __restrict__ rstd, const act* __restrict__ proj,
                                const float* __restrict__ w_o, OutputLayout at) {
  __shared__ __align__(16) float team_dw[kOutputThreads * kVectors * 8];  // [teams, kVectors, lanes, 8]
  // w_o in shared memory: loads through L1 would queue behind the items' loads.
  __shared__ float4 gains[2][kVectors * 32];  // channels 0 to 3 and 4 to 7 of each vector
  const int lane = output_lane(at), team = threadIdx.x / at.lanes, teams = kOutputThreads / at.lanes;
  const int head_vectors = at.head_dim / 8;
  const float per_channel = 1.0f / float(at.head_dim);
  float dw[kVectors][8] = {};

  // Bounds are the warp's first team's: whole warps take part in the sums.
  const int team_in_warp = threadIdx.x % 32 / at.lanes;
  const OutputPlace step = output_place(int(gridDim.x) * teams, at);
  OutputPlace place = output_place(int(blockIdx.x) * teams + team, at);
  OutputItem<kVectors> next = load_item<kVectors>(dy, o, proj, rstd, at, place);
  for (int i = threadIdx.x; i < at.head_dim / 4; i += kOutputThreads)
    gains[i % 2][i / 2] = reinterpret_cast<const float4*>(w_o)[i];
  __syncthreads();
  while (place.item - team_in_warp < at.items) {
    const OutputPlace here = place;
    const OutputItem<kVectors> now = next;
    place.advance(step, at);
    next = load_item<kVectors>(dy, o, proj, rstd, at, place);
    float along = 0, e[kVectors][8];
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const int vector = v * at.lanes + lane;
      float gain[8] = {}, g[8], x[8], z[8], again[8], dz[8];
      if (vector < head_vectors) load8(gain, gains[0][vector], gains[1][vector]);
      unpack8(g, now.dy[v]);
      unpack8(x, now.o[v]);
      unpack8(z, now.z[v]);
      for (int c = 0; c < 8; c++) {  // silu'(z) = s + silu(z) (1 - s)
        const float s = fast_sigmoid(z[c]), silu = z[c] * s, normed = x[c] * now.r, gated = g[c] * silu;
        const float dsilu = normed * gain[c] * g[c];
        again[c] = output_value(normed, gain[c], silu);
        dz[c] = dsilu * (s + silu * (1 - s));
        e[v][c] = gain[c] * gated;
        dw[v][c] += normed * gated;
        along += dsilu * silu;
      }
      if (here.item >= at.items || vector >= head_vectors) continue;
      store16(y + in_o(at, here, v), pack8(again));
      store16(dproj + in_proj(at, here, v), pack8(dz));
    }
    const float mean = lane_sum(along, at.lanes) * per_channel, back = now.r * now.r * mean;
    if (here.item >= at.items) continue;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      if (v * at.lanes + lane >= head_vectors) continue;
      float x[8];
      unpack8(x, now.o[v]);
      for (int c = 0; c < 8; c++) e[v][c] = now.r * e[v][c] - back * x[c];
      store16(d_o + in_o(at, here, v), pack8(e[v]));
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
  const int at_once = output_backward_blocks(shape.head_dim_v > 256 ? 2 : 1) * dev.sm_count;
  return std::min(divide_up(shape.rows() * shape.heads_v, 8), at_once);
}

size_t output_norm_backward_scratch_bytes(Cuda& dev, const MixerShape& shape) {
  return size_t(output_norm_backward_blocks(dev, shape)) * shape.head_dim_v * sizeof(float);
}

void output_norm_backward(Cuda& dev, act* d_o, act* dproj, float* dw_o, act* y, const act* dy, const act* o,
                          const float* rstd, const act* proj, const float* w_o, const MixerShape& shape,
                          void* scratch) {
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
