// RMSNorm, alone and with the residual addition before it, for a row x of d columns:
//   rstd = 1 / sqrt(mean(x^2) + eps)       h = w * x * rstd
//   dx += rstd (e - n mean(e * n)),  e = w * dh,  n = x rstd         dw += sum over rows of dh * n
// A row stays in registers between its sum and its output, so every array is read once and written once.
//
// Times: NVIDIA H100, dev/results/layer_speed/h100_d1024.txt; %: of the rate of a copy of as many bytes.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gdn {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

// The threads of one row: kWarpsPerRow warps (1, or all 8 of the block), each thread with kVectors times
// eight columns.
template <int kVectorsOfThread, int kWarps>
struct RowTeam {
  static constexpr int kVectors = kVectorsOfThread, kWarpsPerRow = kWarps;
  static constexpr int kRows = kRowWarps / kWarpsPerRow;  // a block handles at a time
  static constexpr int kBackwardBlocks = kVectors <= 2 ? 3 : kVectors <= 4 ? 2 : 1;  // an SM
  static constexpr int kMaxWidth = kVectors * kWarpsPerRow * 32 * 8;

  __device__ static int row_in_block() { return threadIdx.x / 32 / kWarpsPerRow; }
  __device__ static int column(int vector) {
    return ((vector * kWarpsPerRow + threadIdx.x / 32 % kWarpsPerRow) * 32 + threadIdx.x % 32) * 8;
  }
  __device__ static bool leads() { return threadIdx.x % (32 * kWarpsPerRow) == 0; }
  // Sum over the row's threads; `shared` [kRowWarps].
  __device__ static float sum(float x, [[maybe_unused]] float* shared) {
    if constexpr (kWarpsPerRow == 1)
      return lane_sum(x);
    else
      return block_sum<kWarpsPerRow>(x, shared);
  }
};

// Calls run(RowTeam<...>()) with the smallest team that holds a row.
template <class Run>
void with_row_team(int width, Run run) {
  require_multiple_of_8(width, "the width of an RMSNorm");
  if (width <= RowTeam<2, 1>::kMaxWidth)
    run(RowTeam<2, 1>());
  else if (width <= RowTeam<4, 1>::kMaxWidth)
    run(RowTeam<4, 1>());
  else if (width <= RowTeam<8, 1>::kMaxWidth)
    run(RowTeam<8, 1>());
  else if (width <= RowTeam<4, 8>::kMaxWidth)
    run(RowTeam<4, 8>());
  else
    throw std::runtime_error("the width of an RMSNorm is " + std::to_string(width) +
                             "; on the GPU it is at most " + std::to_string(RowTeam<4, 8>::kMaxWidth));
}

// h = w * x * rstd; with kResidual first x_out = x + branch, and the norm is of x_out as rounded.
// M = 32768, d = 1024: 134 MB (x in, h out), 0.0447 ms at the copy rate, measured 0.0491 ms, 91%; with the
// residual 268 MB (x, branch in, x_out, h out), 0.0893 ms, measured 0.0939 ms, 95%.
template <class Team, bool kResidual>
__global__ void __launch_bounds__(kRowThreads)
    rmsnorm_forward_kernel(act* x_out, act* __restrict__ h, float* __restrict__ rstd, const act* x,
                           const act* branch, const float* __restrict__ w, int rows, int width) {
  constexpr int kVectors = Team::kVectors;
  __shared__ float shared[kRowWarps];
  const int row = blockIdx.x * Team::kRows + Team::row_in_block();
  if (row >= rows) return;  // all of a row's warps together
  const int64_t start = int64_t(row) * width;

  uint4 packed[kVectors], added[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; v++)
    if (Team::column(v) < width) {
      packed[v] = load16(x + start + Team::column(v));
      if constexpr (kResidual) added[v] = load16(branch + start + Team::column(v));
    }
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; v++)
    if (Team::column(v) < width) {
      float value[8];
      unpack8(value, packed[v]);
      if constexpr (kResidual) {
        float other[8];
        unpack8(other, added[v]);
        for (int i = 0; i < 8; i++) value[i] += other[i];
        packed[v] = pack8(value);
        store16(x_out + start + Team::column(v), packed[v]);
        unpack8(value, packed[v]);
      }
      for (int i = 0; i < 8; i++) squares += value[i] * value[i];
    }
  const float r = rsqrtf(Team::sum(squares, shared) / width + float(kNormEps));
  if (Team::leads()) rstd[row] = r;
#pragma unroll
  for (int v = 0; v < kVectors; v++)
    if (Team::column(v) < width) {
      float value[8], gain[8];
      unpack8(value, packed[v]);
      load8(gain, w + Team::column(v));
      for (int i = 0; i < 8; i++) value[i] *= gain[i] * r;
      store16(h + start + Team::column(v), pack8(value));
    }
}

template <bool kResidual>
void launch_rmsnorm_forward(Cuda& dev, act* x_out, act* h, float* rstd, const act* x, const act* branch,
                            const float* w, int rows, int width) {
  if (rows == 0) return;
  with_row_team(width, [&](auto team) {
    using Team = decltype(team);
    rmsnorm_forward_kernel<Team, kResidual>
        <<<divide_up(rows, int(Team::kRows)), kRowThreads, 0, dev.stream>>>(x_out, h, rstd, x, branch, w,
                                                                            rows, width);
  });
  launched("rmsnorm_forward");
}

void rmsnorm_forward(Cuda& dev, act* h, float* rstd, const act* x, const float* w, int rows, int width) {
  Range<Cuda> range(dev, __func__);
  launch_rmsnorm_forward<false>(dev, nullptr, h, rstd, x, nullptr, w, rows, width);
}

void residual_rmsnorm_forward(Cuda& dev, act* x_out, act* h, float* rstd, const act* x, const act* branch,
                              const float* w, int rows, int width) {
  Range<Cuda> range(dev, __func__);
  launch_rmsnorm_forward<true>(dev, x_out, h, rstd, x, branch, w, rows, width);
}

// dx and dw, and h (where not null) with the forward's bits; h may be dh: a thread reads its part of dh
// before it writes there. Persistent blocks, as many as are resident at once: each walks over rows, keeps its
// sum of dw in registers and writes it to its row of partials [blocks,d], which add_partials sums.
//
// M = 32768, d = 1024: 336 MB (dh, x, dx in, dx, h out), 0.1117 ms at the copy rate; measured 0.1290 ms, 87%,
// add_partials included.
template <class Team>
__global__ void __launch_bounds__(kRowThreads, Team::kBackwardBlocks)
    rmsnorm_backward_kernel(act* __restrict__ dx, float* __restrict__ partials, act* h, const act* dh,
                            const act* __restrict__ x, const float* __restrict__ rstd,
                            const float* __restrict__ w, int rows, int width) {
  constexpr int kVectors = Team::kVectors;
  __shared__ float shared[kRowWarps];
  // w, columns 0 to 3 and 4 to 7 of each vector. In shared memory: loads through L1 would queue behind the
  // rows' loads.
  __shared__ float4 gains[2][Team::kMaxWidth / 8];
  const int row_vectors = width / 8;  // an int counts vectors of eight through 32 GB
  const float per_column = 1.0f / float(width);
  float dw[kVectors][8] = {};

  for (int i = threadIdx.x; i < width / 4; i += kRowThreads)
    gains[i % 2][i / 2] = reinterpret_cast<const float4*>(w)[i];
  __syncthreads();

  for (int row = blockIdx.x * Team::kRows + Team::row_in_block(); row < rows;
       row += gridDim.x * Team::kRows) {  // all of a row's warps together
    uint4 packed_dh[kVectors], packed_x[kVectors], packed_dx[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; v++)
      if (Team::column(v) < width) {
        const int64_t at = int64_t(row * row_vectors + Team::column(v) / 8) * 8;
        packed_dh[v] = load16(dh + at);
        packed_x[v] = load16(x + at);
        packed_dx[v] = load16(dx + at);
      }
    const float r = rstd[row];
    float along = 0;
#pragma unroll
    for (int v = 0; v < kVectors; v++)
      if (Team::column(v) < width) {
        float dh8[8], x8[8], gain[8];
        unpack8(dh8, packed_dh[v]);
        unpack8(x8, packed_x[v]);
        load8(gain, gains[0][Team::column(v) / 8], gains[1][Team::column(v) / 8]);
        for (int i = 0; i < 8; i++) {
          const float product = dh8[i] * x8[i];
          along += gain[i] * product;
          dw[v][i] += r * product;
        }
      }
    const float mean = Team::sum(along, shared) * r * per_column, back = r * r * mean;
#pragma unroll
    for (int v = 0; v < kVectors; v++)
      if (Team::column(v) < width) {
        const int64_t at = int64_t(row * row_vectors + Team::column(v) / 8) * 8;
        float dh8[8], x8[8], dx8[8], gain[8];
        unpack8(dh8, packed_dh[v]);
        unpack8(x8, packed_x[v]);
        unpack8(dx8, packed_dx[v]);
        load8(gain, gains[0][Team::column(v) / 8], gains[1][Team::column(v) / 8]);
        for (int i = 0; i < 8; i++) {
          const float scale = gain[i] * r;
          dx8[i] += scale * dh8[i] - back * x8[i];
          x8[i] *= scale;
        }
        store16(dx + at, pack8(dx8));
        if (h) store16(h + at, pack8(x8));
      }
  }

  // The upper half of the block's teams hand their sums to the lower half, until one team has them all.
  if constexpr (Team::kRows > 1) {
    __shared__ float4 sums[Team::kRows / 2][2][Team::kMaxWidth / 8];
    const int team = Team::row_in_block();
    for (int half = Team::kRows / 2; half > 0; half /= 2) {
#pragma unroll
      for (int v = 0; v < kVectors; v++)
        if (team >= half && team < 2 * half) {
          float4(&to)[2][Team::kMaxWidth / 8] = sums[team - half];
          to[0][Team::column(v) / 8] = make_float4(dw[v][0], dw[v][1], dw[v][2], dw[v][3]);
          to[1][Team::column(v) / 8] = make_float4(dw[v][4], dw[v][5], dw[v][6], dw[v][7]);
        }
      __syncthreads();
#pragma unroll
      for (int v = 0; v < kVectors; v++)
        if (team < half) {
          float other[8];
          load8(other, sums[team][0][Team::column(v) / 8], sums[team][1][Team::column(v) / 8]);
          for (int i = 0; i < 8; i++) dw[v][i] += other[i];
        }
      __syncthreads();  // the sums are read; the next ones may be written
    }
    if (team > 0) return;
  }
#pragma unroll
  for (int v = 0; v < kVectors; v++)
    if (Team::column(v) < width) store8(partials + int64_t(blockIdx.x) * width + Team::column(v), dw[v]);
}

// Blocks of the backward, and so rows of partials.
inline int rmsnorm_backward_blocks(const Cuda& dev, int rows, int width) {
  int at_once = 0;
  with_row_team(width, [&](auto team) { at_once = decltype(team)::kBackwardBlocks * dev.sm_count; });
  return std::min(divide_up(rows, kRowWarps), at_once);
}

size_t rmsnorm_backward_scratch_bytes(Cuda& dev, int rows, int width) {
  return size_t(rmsnorm_backward_blocks(dev, rows, width)) * width * sizeof(float);
}

void rmsnorm_backward(Cuda& dev, act* dx, float* dw, act* h, const act* dh, const act* x, const float* rstd,
                      const float* w, int rows, int width, void* scratch) {
  Range<Cuda> range(dev, __func__);
  if (rows == 0) return;
  const int blocks = rmsnorm_backward_blocks(dev, rows, width);
  float* partials = static_cast<float*>(scratch);
  with_row_team(width, [&](auto team) {
    using Team = decltype(team);
    rmsnorm_backward_kernel<Team>
        <<<blocks, kRowThreads, 0, dev.stream>>>(dx, partials, h, dh, x, rstd, w, rows, width);
  });
  launched("rmsnorm_backward");
  add_partials(dev, {{{dw, partials, blocks, width, width}}});
}

}  // namespace gdn
