// The mixer's short convolution, silu and the L2 norm of q and k, fused, with the gates (gates.cuh) in the
// same launch: proj is read once and qkv written once. For a channel with inputs x_t and four taps:
//   u_t = sum_{j=0..3} taps[j] x_{t-3+j}         p = silu(u);  v = p
//   q = p rnorm, k = p rnorm                     rnorm = 1 / sqrt(|p|^2 + eps), over the channels of a head
//   dp = rnorm (dq - q (q . dq)), of k alike     du = dp silu'(u)
//   dx_t = sum_j taps[j] du_{t+3-j}              dtaps[j] = sum_t du_t x_{t-3+j}
//
// Layout: a thread owns eight channels. Those of one head of q or k lie in an aligned group of lanes, a power
// of two (the last ones idle where dk / 8 is none), so its norm is a sum over lanes; the channels of v follow
// densely from the next warp on. A block owns a tile of time steps of kConvThreads threads' channels; the
// last block along the channels (grid x) computes the gates of the tile.
//
// Schedule: a thread walks along time with the last three inputs in registers, and prefetches the coming
// steps by cp.async to shared memory of its own, in groups of kConvGroup steps: loads are always in flight,
// without registers or barriers.
//
// Times: NVIDIA H100, dev/results/layer_speed/h100_d1024.txt; %: of the rate of a copy of as many bytes.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "gates.cuh"

namespace gdn {

constexpr int kConvThreads = 128;
constexpr int kConvHalo = kConvTaps - 1;
constexpr int kConvGroup = 4;                                   // time steps of a cp.async group
constexpr int kConvForwardGroups = 3, kConvBackwardGroups = 2;  // stages of the ring in shared memory
// Time steps of a tile: at most, and for each 128 threads along the channels (conv_layout).
constexpr int kConvForwardTile = 80, kConvForwardTilePerBlock = 28;
constexpr int kConvBackwardTile = 128, kConvBackwardTilePerBlock = 48;
static_assert(kConvGroup == kConvTaps, "the window of inputs is back in its first slot after a group");

struct ConvLayout {
  int batch, tokens, channels, columns;  // B, T, C, P
  int normed_heads, head_dim;            // 2 Hk, dk
  int lanes;                             // of a head
  int normed_threads, threads;           // threads along the channels: for q and k (whole warps), for all
  int tile;                              // time steps of a block
  int channel_blocks() const { return divide_up(threads, kConvThreads); }
  int tiles() const { return divide_up(tokens, tile); }
  // From row to row of proj and of qkv, in vectors of eight. The kernels count in them: an int then reaches
  // through 32 GB, and an address takes two instructions and one register instead of a product of 64 bits.
  __host__ __device__ int column_vectors() const { return columns / 8; }
  __host__ __device__ int channel_vectors() const { return channels / 8; }
  dim3 grid() const { return dim3(channel_blocks() + 1, tiles(), batch); }
};

// A longer tile reads fewer inputs twice and leaves fewer partial sums; with few blocks along the channels it
// is shorter, so that there are enough blocks in all. At B = 32, T = 1024 the blocks are a little less than
// two waves of 132 SMs. A tile must not depend on B and T: work space is made for the largest ones.
inline ConvLayout conv_layout(const MixerShape& s, int longest_tile, int tile_per_block) {
  require_head_dims(s);
  const int lanes = lanes_for(s.head_dim_k / 8), normed_threads = divide_up(2 * s.heads_k * lanes, 32) * 32;
  ConvLayout at = {s.batch,
                   s.tokens,
                   s.conv_channels(),
                   s.columns(),
                   2 * s.heads_k,
                   s.head_dim_k,
                   lanes,
                   normed_threads,
                   normed_threads + s.value_dim() / 8,
                   0};
  at.tile = std::min(longest_tile, tile_per_block * at.channel_blocks());
  return at;
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

// u = sum_j tap[j] * x_{t-3+j}; step t's input is x[(i + 3) % 4], the three before it x[i], x[(i + 1) % 4]
// and x[(i + 2) % 4].
__device__ inline void convolve(float (&u)[8], const float (&tap)[kConvTaps][8],
                                const float (&x)[kConvTaps][8], int i) {
#pragma unroll
  for (int c = 0; c < 8; c++) u[c] = tap[0][c] * x[i][c];
#pragma unroll
  for (int j = 1; j < kConvTaps; j++)
#pragma unroll
    for (int c = 0; c < 8; c++) u[c] += tap[j][c] * x[(i + j) % kConvTaps][c];
}

// Makes zeros of the inputs before a document's start in the window of convolve(..., i), of a step that is
// `position` steps after it.
__device__ inline void mask_window(float (&x)[kConvTaps][8], int position, int i) {
#pragma unroll
  for (int j = 0; j < kConvHalo; j++)
    if (kConvHalo - j > position)
#pragma unroll
      for (int c = 0; c < 8; c++) x[(i + j) % kConvTaps][c] = 0;
}

// position [M] of the group of steps from t on, up to `end` (kConvHalo: all inputs are of one document).
__device__ inline void load_positions(int (&to)[kConvGroup], const int32_t* position, int t, int end) {
#pragma unroll
  for (int i = 0; i < kConvGroup; i++) to[i] = t + i < end ? position[t + i] : kConvHalo;
}

// position [M], read where kMasked: steps since the row's document began.
//
// M = 32768, C = 3072: 405 MB (the columns of proj in, qkv out), 0.1348 ms at the copy rate; measured 0.1708
// ms, 79%.
template <bool kMasked>
static __global__ void __launch_bounds__(kConvThreads, 5)
    short_conv_gates_forward_kernel(act* __restrict__ qkv, float* __restrict__ rnorm, float* __restrict__ g,
                                    float* __restrict__ beta, const act* __restrict__ proj,
                                    const float* __restrict__ taps, const act* __restrict__ history,
                                    const int32_t* __restrict__ position, ConvLayout at, GateInputs gates) {
  constexpr int kGroups = kConvForwardGroups;
  __shared__ uint4 slots[kGroups * kConvGroup][kConvThreads];
  const int sequence = blockIdx.z, begin = blockIdx.y * at.tile, end = min(begin + at.tile, at.tokens);
  const int64_t row0 = int64_t(sequence) * at.tokens;
  if (blockIdx.x == gridDim.x - 1)
    return gates_forward_rows(g, beta, proj, kMasked ? position : nullptr, gates, int(row0) + begin,
                              int(row0) + end);
  const ConvThread me = conv_thread(at);
  const int steps = end - begin, row = sequence * at.tokens + begin;
  const int column_vectors = at.column_vectors(), channel_vectors = at.channel_vectors();
  const int first = row * column_vectors + me.channel / 8;  // of proj
  const int first_out = row * channel_vectors + me.channel / 8, first_norm = row * at.normed_heads + me.head;

  const auto fetch = [&](int step, int group) {
#pragma unroll
    for (int i = 0; i < kConvGroup; i++)
      copy16_async(&slots[group * kConvGroup + i][threadIdx.x],
                   proj + int64_t(first + (step + i) * column_vectors) * 8, me.active && step + i < steps);
    __pipeline_commit();
  };
#pragma unroll
  for (int group = 0; group < kGroups - 1; group++) fetch(group * kConvGroup, group);

  float tap[kConvTaps][8], x[kConvTaps][8];
  load_taps(tap, taps, me);
  const act* before = history ? history + int64_t(sequence) * kConvHalo * at.channels + me.channel : nullptr;
#pragma unroll
  for (int j = 0; j < kConvHalo; j++) {
    const int t = begin - kConvHalo + j;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (me.active && t >= 0) packed = load16(proj + (row0 + t) * at.columns + me.channel);
    if (me.active && t < 0 && before) packed = load16(before + int64_t(t + kConvHalo) * at.channels);
    unpack8(x[j], packed);
  }

  int group = 0;
#pragma unroll 1
  for (int step = 0; step < steps; step += kConvGroup) {
    fetch(step + (kGroups - 1) * kConvGroup, group == 0 ? kGroups - 1 : group - 1);
    [[maybe_unused]] int since[kConvGroup];
    if constexpr (kMasked) load_positions(since, position + row0, begin + step, end);
    __pipeline_wait_prior(kGroups - 1);
#pragma unroll
    for (int i = 0; i < kConvGroup; i++) {
      unpack8(x[(i + kConvHalo) % kConvTaps], slots[group * kConvGroup + i][threadIdx.x]);
      if constexpr (kMasked) mask_window(x, since[i], i);
      float p[8], squares = 0;
      convolve(p, tap, x, i);
#pragma unroll
      for (int c = 0; c < 8; c++) {
        p[c] *= fast_sigmoid(p[c]);
        squares += p[c] * p[c];
      }
      if (me.normed) {  // the whole warp
        const float r = rsqrtf(lane_sum(squares, at.lanes) + float(kNormEps));
        if (me.leads && step + i < steps) rnorm[first_norm + (step + i) * at.normed_heads] = r;
#pragma unroll
        for (int c = 0; c < 8; c++) p[c] *= r;
      }
      if (me.active && step + i < steps)
        store16(qkv + int64_t(first_out + (step + i) * channel_vectors) * 8, pack8(p));
    }
    group = group == kGroups - 1 ? 0 : group + 1;
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

void short_conv_gates_forward(Cuda& dev, act* qkv, float* rnorm, float* g, float* beta, const act* proj,
                              const float* taps, const float* A_log, const float* dt_bias, act* history,
                              const MixerShape& shape, float beta_max, const int32_t* position) {
  Range<Cuda> range(dev, __func__);
  const ConvLayout at = conv_layout(shape, kConvForwardTile, kConvForwardTilePerBlock);
  if (shape.rows() == 0) return;
  const auto kernel =
      position ? short_conv_gates_forward_kernel<true> : short_conv_gates_forward_kernel<false>;
  kernel<<<at.grid(), kConvThreads, 0, dev.stream>>>(qkv, rnorm, g, beta, proj, taps, history, position, at,
                                                     gates_of(A_log, dt_bias, beta_max, shape));
  launched("short_conv_gates_forward");
  if (!history) return;
  const dim3 grid(divide_up(at.channels / 8, kConvThreads), at.batch);
  short_conv_history_kernel<<<grid, kConvThreads, 0, dev.stream>>>(history, proj, at);
  launched("short_conv_history");
}

// A block recomputes u and p of its tile, then computes du, also of the three steps after the tile, and from
// these dx. Its sums of dtaps, or of dA_log and ddt_bias, go to the tile's row of partials [B tiles, stride]:
// 4 C for dtaps, then Hv and Hv; add_partials sums them.
//
// M = 32768, C = 3072: 609 MB (the columns of proj, dqkv in, those of dproj out), 0.2026 ms at the copy rate;
// measured 0.2769 ms, 73%, add_partials included.
template <bool kMasked>
static __global__ void __launch_bounds__(kConvThreads, 3)
    short_conv_gates_backward_kernel(act* __restrict__ dproj, float* __restrict__ partials, int stride,
                                     const act* __restrict__ dqkv, const float* __restrict__ dg,
                                     const float* __restrict__ dbeta, const float* __restrict__ rnorm,
                                     const float* __restrict__ g, const float* __restrict__ beta,
                                     const act* __restrict__ proj, const float* __restrict__ taps,
                                     const int32_t* __restrict__ position, ConvLayout at, GateInputs gates) {
  constexpr int kGroups = kConvBackwardGroups, kSlots = kGroups * kConvGroup;
  __shared__ uint4 x_slots[kSlots][kConvThreads], dq_slots[kSlots][kConvThreads];
  __shared__ float r_slots[kSlots][kConvThreads];
  const int sequence = blockIdx.z, begin = blockIdx.y * at.tile, end = min(begin + at.tile, at.tokens);
  const int du_end = min(end + kConvHalo, at.tokens);  // du is zero from here on
  const int64_t row0 = int64_t(sequence) * at.tokens;
  float* mine = partials + (sequence * gridDim.y + blockIdx.y) * int64_t(stride);
  if (blockIdx.x == gridDim.x - 1)
    return gates_backward_rows<kConvThreads>(dproj, mine + at.channels * kConvTaps, dg, dbeta, g, beta, proj,
                                             kMasked ? position : nullptr, gates, int(row0) + begin,
                                             int(row0) + end);
  const ConvThread me = conv_thread(at);
  const int steps = end - begin, steps_read = du_end - begin;
  const int column_vectors = at.column_vectors(), channel_vectors = at.channel_vectors();
  const int row = sequence * at.tokens + begin;
  const int first = row * column_vectors + me.channel / 8;  // of proj and dproj
  const int first_dq = row * channel_vectors + me.channel / 8;
  const int first_norm = row * at.normed_heads + me.head;

  const auto fetch = [&](int step, int group) {
#pragma unroll
    for (int i = 0; i < kConvGroup; i++) {
      const int slot = group * kConvGroup + i;
      const bool read = me.active && step + i < steps_read;
      copy16_async(&x_slots[slot][threadIdx.x], proj + int64_t(first + (step + i) * column_vectors) * 8,
                   read);
      copy16_async(&dq_slots[slot][threadIdx.x], dqkv + int64_t(first_dq + (step + i) * channel_vectors) * 8,
                   read);
      if (me.normed)
        copy4_async(&r_slots[slot][threadIdx.x], rnorm + first_norm + (step + i) * at.normed_heads, read);
    }
    __pipeline_commit();
  };
  fetch(0, 0);

  float tap[kConvTaps][8], dtap[kConvTaps][8] = {}, x[kConvTaps][8];
  load_taps(tap, taps, me);
#pragma unroll
  for (int j = 0; j < kConvHalo; j++) {
    const bool read = me.active && begin - kConvHalo + j >= 0;
    const act* from = proj + int64_t(first + (j - kConvHalo) * column_vectors) * 8;
    unpack8(x[j], read ? load16(from) : make_uint4(0, 0, 0, 0));
  }
  float dx[kConvTaps][8] = {};  // at a group's step i, dx[(i + j) % 4]: what is known of dx 3 - j steps back
  int group = 0;
#pragma unroll 1
  for (int step = 0; step < steps + kConvHalo; step += kConvGroup, group ^= 1) {
    fetch(step + kConvGroup, group ^ 1);
    [[maybe_unused]] int since[kConvGroup];
    if constexpr (kMasked) load_positions(since, position + row0, begin + step, du_end);
    __pipeline_wait_prior(1);
#pragma unroll
    for (int i = 0; i < kConvGroup; i++) {
      const int slot = group * kConvGroup + i;
      float du[8], u[8], slope[8];
      unpack8(x[(i + kConvHalo) % kConvTaps], x_slots[slot][threadIdx.x]);
      unpack8(du, dq_slots[slot][threadIdx.x]);
      if constexpr (kMasked) mask_window(x, since[i], i);
      convolve(u, tap, x, i);
#pragma unroll
      for (int c = 0; c < 8; c++) {  // u becomes p = silu(u); slope = silu'(u) = s + p (1 - s)
        const float s = fast_sigmoid(u[c]);
        u[c] *= s;
        slope[c] = s + u[c] * (1 - s);
      }
      if (me.normed) {  // the whole warp
        float along = 0;
#pragma unroll
        for (int c = 0; c < 8; c++) along += u[c] * du[c];
        const float r = r_slots[slot][threadIdx.x];
        along = r * r * r * lane_sum(along, at.lanes);  // r (q . dq) r, to go with p = q / r
#pragma unroll
        for (int c = 0; c < 8; c++) du[c] = r * du[c] - along * u[c];
      }
#pragma unroll
      for (int c = 0; c < 8; c++) du[c] *= slope[c];
      if (step + i < steps) {  // the three steps after the tile are another block's
#pragma unroll
        for (int j = 0; j < kConvTaps; j++)
#pragma unroll
          for (int c = 0; c < 8; c++) dtap[j][c] += du[c] * x[(i + j) % kConvTaps][c];
      }
      // du_t is the last part of dx_{t-3}, and the first of dx_t.
#pragma unroll
      for (int j = 0; j < kConvHalo; j++)
        if (!kMasked || kConvHalo - j <= since[i])
#pragma unroll
          for (int c = 0; c < 8; c++) dx[(i + j) % kConvTaps][c] += tap[j][c] * du[c];
#pragma unroll
      for (int c = 0; c < 8; c++) dx[(i + kConvHalo) % kConvTaps][c] = tap[kConvHalo][c] * du[c];
      const int done = step + i - kConvHalo;
      if (me.active && done >= 0 && done < steps)
        store16(dproj + int64_t(first + done * column_vectors) * 8, pack8(dx[i]));
    }
  }
  if (!me.active) return;
  float4* partial = reinterpret_cast<float4*>(mine) + me.channel;
#pragma unroll
  for (int c = 0; c < 8; c++) partial[c] = make_float4(dtap[0][c], dtap[1][c], dtap[2][c], dtap[3][c]);
}

// Numbers in a tile's row of partials, a multiple of four for 16-byte stores.
inline int conv_partials_stride(const MixerShape& shape) {
  return shape.conv_channels() * kConvTaps + divide_up(2 * shape.heads_v, 4) * 4;
}

size_t short_conv_gates_backward_scratch_bytes(Cuda&, const MixerShape& shape) {
  const ConvLayout at = conv_layout(shape, kConvBackwardTile, kConvBackwardTilePerBlock);
  return size_t(at.batch) * at.tiles() * conv_partials_stride(shape) * sizeof(float);
}

void short_conv_gates_backward(Cuda& dev, act* dproj, float* dtaps, float* dA_log, float* ddt_bias, act* dqkv,
                               const float* dg, const float* dbeta, const float* rnorm, const float* g,
                               const float* beta, const act* proj, const float* taps, const float* A_log,
                               const float* dt_bias, const MixerShape& shape, float beta_max, void* scratch,
                               const int32_t* position) {
  Range<Cuda> range(dev, __func__);
  const ConvLayout at = conv_layout(shape, kConvBackwardTile, kConvBackwardTilePerBlock);
  if (shape.rows() == 0) return;
  const int count = at.batch * at.tiles(), stride = conv_partials_stride(shape), heads = shape.heads_v;
  float *partials = static_cast<float*>(scratch), *of_gates = partials + at.channels * kConvTaps;
  const auto kernel =
      position ? short_conv_gates_backward_kernel<true> : short_conv_gates_backward_kernel<false>;
  kernel<<<at.grid(), kConvThreads, 0, dev.stream>>>(dproj, partials, stride, dqkv, dg, dbeta, rnorm, g, beta,
                                                     proj, taps, position, at,
                                                     gates_of(A_log, dt_bias, beta_max, shape));
  launched("short_conv_gates_backward");
  add_partials(dev, {{{dtaps, partials, count, at.channels * kConvTaps, stride},
                      {dA_log, of_gates, count, heads, stride},
                      {ddt_bias, of_gates + heads, count, heads, stride}}});
}

}  // namespace gdn
