// The mixer's short convolution, silu and the L2 norm of q and k, fused: proj is read once and qkv written
// once.
//
// A thread owns eight channels and walks along time, the inputs of the last steps in registers. The channels
// of one head of q or k lie side by side in a power of two of lanes (the last ones idle when dk / 8 is none),
// so that its norm is a sum over lanes; the channels of v follow densely from the next warp on.
#pragma once

#include "common.cuh"

namespace gdn {

constexpr int kConvThreads = 128;
constexpr int kConvHalo = kConvTaps - 1;
constexpr int kConvForwardGroup = 8, kConvBackwardGroup = 4;  // time steps whose loads are in flight together
constexpr int kConvTile = 64;                                 // time steps of a block

struct ConvLayout {
  int batch, tokens, channels, columns;  // B, T, C, P
  int normed_heads, head_dim;            // 2 Hk, dk
  int lanes;                             // of a head
  int normed_threads, threads;           // threads along the channels: for q and k (whole warps), for all
};

inline ConvLayout conv_layout(const MixerShape& s) {
  require_head_dims(s);
  const int lanes = lanes_for(s.head_dim_k / 8), normed_threads = divide_up(2 * s.heads_k * lanes, 32) * 32;
  return {s.batch,     s.tokens,       s.conv_channels(),
          s.columns(), 2 * s.heads_k,  s.head_dim_k,
          lanes,       normed_threads, normed_threads + s.value_dim() / 8};
}

inline dim3 conv_grid(const ConvLayout& at) {
  return dim3(divide_up(at.threads, kConvThreads), divide_up(at.tokens, kConvTile), at.batch);
}

// What a thread of the grid's x axis works on.
struct ConvThread {
  bool normed;  // its warp holds heads of q and k
  bool active;  // it has channels; if not, it only takes part in sums
  bool leads;   // first thread of its head
  int head;     // of q, then of k
  int channel;  // the first of its eight
};

__device__ inline ConvThread conv_thread(const ConvLayout& at) {
  const int thread = blockIdx.x * kConvThreads + threadIdx.x;
  ConvThread me = {};
  me.normed = thread < at.normed_threads;
  if (me.normed) {
    const int lane = thread % at.lanes;
    me.head = thread / at.lanes;
    me.channel = me.head * at.head_dim + lane * 8;
    me.active = me.head < at.normed_heads && lane * 8 < at.head_dim;
    me.leads = me.active && lane == 0;
  } else {
    me.channel = at.normed_heads * at.head_dim + (thread - at.normed_threads) * 8;
    me.active = me.channel < at.channels;
  }
  return me;
}

// tap[j][i] = taps[channel + i][j]
__device__ inline void load_taps(float (&tap)[kConvTaps][8], const float* taps, const ConvThread& me) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float4 t =
        me.active ? reinterpret_cast<const float4*>(taps)[me.channel + i] : make_float4(0, 0, 0, 0);
    tap[0][i] = t.x, tap[1][i] = t.y, tap[2][i] = t.z, tap[3][i] = t.w;
  }
}

// u = sum_j tap[j] * x[j]
__device__ inline void convolve(float (&u)[8], const float (&tap)[kConvTaps][8], const uint4* x) {
#pragma unroll
  for (int i = 0; i < 8; i++) u[i] = 0;
#pragma unroll
  for (int j = 0; j < kConvTaps; j++) {
    float value[8];
    unpack8(value, x[j]);
#pragma unroll
    for (int i = 0; i < 8; i++) u[i] += tap[j][i] * value[i];
  }
}

// A block does kConvTile steps of one sequence.
// Floor at M = 32768, C = 3072: 403 MB (the columns of proj in, qkv out), 0.0951 ms at the copy rate. Reached
// on an H200: 0.1537 ms, 62% of the copy rate.
static __global__ void __launch_bounds__(kConvThreads)
    short_conv_forward_kernel(act* __restrict__ qkv, float* __restrict__ rnorm, const act* __restrict__ proj,
                              const float* __restrict__ taps, const act* __restrict__ history,
                              ConvLayout at) {
  constexpr int kGroup = kConvForwardGroup;
  const ConvThread me = conv_thread(at);
  const int sequence = blockIdx.z, begin = blockIdx.y * kConvTile, end = min(begin + kConvTile, at.tokens);
  const act* from = proj + int64_t(sequence) * at.tokens * at.columns + me.channel;
  act* to = qkv + int64_t(sequence) * at.tokens * at.channels + me.channel;
  float* norms = rnorm + int64_t(sequence) * at.tokens * at.normed_heads + me.head;
  const act* before = history ? history + int64_t(sequence) * kConvHalo * at.channels + me.channel : nullptr;

  float tap[kConvTaps][8];
  load_taps(tap, taps, me);
  uint4 x[kConvHalo + kGroup];  // x[kConvHalo + i]: the input at step t + i
#pragma unroll
  for (int j = 0; j < kConvHalo; j++) {
    const int t = begin - kConvHalo + j;
    x[j] = make_uint4(0, 0, 0, 0);
    if (me.active && t >= 0) x[j] = load16(from + int64_t(t) * at.columns);
    if (me.active && t < 0 && before) x[j] = load16(before + int64_t(t + kConvHalo) * at.channels);
  }
#pragma unroll 1
  for (int t = begin; t < end; t += kGroup) {
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      x[kConvHalo + i] = make_uint4(0, 0, 0, 0);
      if (me.active && t + i < end) x[kConvHalo + i] = load16(from + int64_t(t + i) * at.columns);
    }
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      if (t + i >= end) break;  // the whole block
      float p[8];
      convolve(p, tap, x + i);
      float squares = 0;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        p[c] *= fast_sigmoid(p[c]);
        squares += p[c] * p[c];
      }
      if (me.normed) {  // the whole warp
        const float r = rsqrtf(lane_sum(squares, at.lanes) + float(kNormEps));
        if (me.leads) norms[int64_t(t + i) * at.normed_heads] = r;
#pragma unroll
        for (int c = 0; c < 8; c++) p[c] *= r;
      }
      if (me.active) store16(to + int64_t(t + i) * at.channels, pack8(p));
    }
#pragma unroll
    for (int j = 0; j < kConvHalo; j++) x[j] = x[kGroup + j];
  }
}

// history = the last three of (history, inputs), after the forward kernel has read the old ones. A thread
// reads its three vectors before it writes them.
static __global__ void __launch_bounds__(kConvThreads)
    short_conv_history_kernel(act* history, const act* __restrict__ proj, ConvLayout at) {
  const int channel = (blockIdx.x * kConvThreads + threadIdx.x) * 8, sequence = blockIdx.y;
  if (channel >= at.channels) return;
  act* mine = history + int64_t(sequence) * kConvHalo * at.channels + channel;
  const act* from = proj + int64_t(sequence) * at.tokens * at.columns + channel;
  uint4 x[kConvHalo];
#pragma unroll
  for (int j = 0; j < kConvHalo; j++) {
    const int t = at.tokens - kConvHalo + j;
    x[j] = load16(t >= 0 ? from + int64_t(t) * at.columns : mine + int64_t(t + kConvHalo) * at.channels);
  }
#pragma unroll
  for (int j = 0; j < kConvHalo; j++) store16(mine + int64_t(j) * at.channels, x[j]);
}

inline void short_conv_forward(Cuda& dev, act* qkv, float* rnorm, const act* proj, const float* taps,
                               act* history, const MixerShape& shape) {
  Range<Cuda> range(dev, __func__);
  const ConvLayout at = conv_layout(shape);
  if (shape.rows() == 0) return;
  short_conv_forward_kernel<<<conv_grid(at), kConvThreads, 0, dev.stream>>>(qkv, rnorm, proj, taps, history,
                                                                            at);
  launched("short_conv_forward");
  if (!history) return;
  const dim3 grid(divide_up(at.channels / 8, kConvThreads), at.batch);
  short_conv_history_kernel<<<grid, kConvThreads, 0, dev.stream>>>(history, proj, at);
  launched("short_conv_history");
}

// With p = silu(u) and q = p rnorm
//   dp = rnorm (dq - q (q . dq))    du = dp silu'(u)    dx_t = sum_j tap[j] du_{t+3-j}
// A block computes du of its kConvTile steps and of the three after them, which it needs for dx, and so never
// stores du; its sum of dtaps goes to its row of partials [B * tiles, C, 4].
// Floor at M = 32768, C = 3072, 2 Hk dk = 1536: 705 MB (dqkv, q and k, proj in, dproj out), 0.1664 ms at the
// copy rate. Reached on an H200, with the sum of the partials: 0.3211 ms, 52% of the copy rate.
static __global__ void __launch_bounds__(kConvThreads)
    short_conv_backward_kernel(act* __restrict__ dproj, float* __restrict__ partials,
                               const act* __restrict__ dqkv, const act* __restrict__ qkv,
                               const float* __restrict__ rnorm, const act* __restrict__ proj,
                               const float* __restrict__ taps, ConvLayout at) {
  constexpr int kGroup = kConvBackwardGroup;
  const ConvThread me = conv_thread(at);
  const int sequence = blockIdx.z, begin = blockIdx.y * kConvTile, end = min(begin + kConvTile, at.tokens);
  const int du_end = min(end + kConvHalo, at.tokens);  // du is zero from here on
  const int64_t row0 = int64_t(sequence) * at.tokens;
  const act *from = proj + row0 * at.columns + me.channel, *q_from = qkv + row0 * at.channels + me.channel;
  const act* dq_from = dqkv + row0 * at.channels + me.channel;
  const float* norms = rnorm + row0 * at.normed_heads + me.head;
  act* to = dproj + row0 * at.columns + me.channel;
  const uint4 zero = make_uint4(0, 0, 0, 0);

  float tap[kConvTaps][8], dtap[kConvTaps][8] = {};
  load_taps(tap, taps, me);
  uint4 x[kConvHalo + kGroup];  // x[kConvHalo + i]: the input at step t + i
#pragma unroll
  for (int j = 0; j < kConvHalo; j++) {
    const int t = begin - kConvHalo + j;
    x[j] = me.active && t >= 0 ? load16(from + int64_t(t) * at.columns) : zero;
  }
  float dx[kConvHalo][8] = {};  // dx[j]: what is known of dx at step t - 3 + j
#pragma unroll 1
  for (int t = begin; t < end + kConvHalo; t += kGroup) {
    uint4 dq[kGroup], q[kGroup];
    float r[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      const bool loads = me.active && t + i < du_end;
      x[kConvHalo + i] = loads ? load16(from + int64_t(t + i) * at.columns) : zero;
      dq[i] = loads ? load16(dq_from + int64_t(t + i) * at.channels) : zero;
      q[i] = loads && me.normed ? load16(q_from + int64_t(t + i) * at.channels) : zero;
      r[i] = loads && me.normed ? norms[int64_t(t + i) * at.normed_heads] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      float du[8], u[8];
      unpack8(du, dq[i]);
      if (me.normed) {  // the whole warp
        float direction[8], along = 0;
        unpack8(direction, q[i]);
#pragma unroll
        for (int c = 0; c < 8; c++) along += direction[c] * du[c];
        along = lane_sum(along, at.lanes);
#pragma unroll
        for (int c = 0; c < 8; c++) du[c] = r[i] * (du[c] - direction[c] * along);
      }
      convolve(u, tap, x + i);
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const float s = fast_sigmoid(u[c]);
        du[c] *= s * (1 + u[c] * (1 - s));
      }
      if (t + i < end) {  // the three steps after the tile are another block's
#pragma unroll
        for (int j = 0; j < kConvTaps; j++) {
          float value[8];
          unpack8(value, x[i + j]);
#pragma unroll
          for (int c = 0; c < 8; c++) dtap[j][c] += du[c] * value[c];
        }
      }
      // du_t is the last part of dx_{t-3}, and the first of dx_t.
#pragma unroll
      for (int c = 0; c < 8; c++) {
        dx[0][c] += tap[0][c] * du[c];
        dx[1][c] += tap[1][c] * du[c];
        dx[2][c] += tap[2][c] * du[c];
      }
      const int done = t + i - kConvHalo;
      if (me.active && done >= begin && done < end) store16(to + int64_t(done) * at.columns, pack8(dx[0]));
#pragma unroll
      for (int c = 0; c < 8; c++) {
        dx[0][c] = dx[1][c];
        dx[1][c] = dx[2][c];
        dx[2][c] = tap[3][c] * du[c];
      }
    }
#pragma unroll
    for (int j = 0; j < kConvHalo; j++) x[j] = x[kGroup + j];
  }
  if (!me.active) return;
  float4* partial = reinterpret_cast<float4*>(partials) +
                    (int64_t(sequence) * gridDim.y + blockIdx.y) * at.channels + me.channel;
#pragma unroll
  for (int c = 0; c < 8; c++) partial[c] = make_float4(dtap[0][c], dtap[1][c], dtap[2][c], dtap[3][c]);
}

inline int short_conv_backward_tiles(const MixerShape& shape) {
  return shape.batch * divide_up(shape.tokens, kConvTile);
}

inline size_t short_conv_backward_scratch_bytes(Cuda&, const MixerShape& shape) {
  return size_t(short_conv_backward_tiles(shape)) * shape.conv_channels() * kConvTaps * sizeof(float);
}

inline void short_conv_backward(Cuda& dev, act* dproj, float* dtaps, act* dqkv, const act* qkv,
                                const float* rnorm, const act* proj, const float* taps,
                                const MixerShape& shape, void* scratch) {
  Range<Cuda> range(dev, __func__);
  const ConvLayout at = conv_layout(shape);
  if (shape.rows() == 0) return;
  float* partials = static_cast<float*>(scratch);
  short_conv_backward_kernel<<<conv_grid(at), kConvThreads, 0, dev.stream>>>(dproj, partials, dqkv, qkv,
                                                                             rnorm, proj, taps, at);
  launched("short_conv_backward");
  add_partials(dev, dtaps, partials, short_conv_backward_tiles(shape), at.channels * kConvTaps,
               at.channels * kConvTaps);
}

}  // namespace gdn
