// Shared by the gradients kernels of both architectures.
#pragma once

#include "pass_common.cuh"

namespace gdn {
namespace delta_rule {

struct GradientInputs {
  HeadRows<const act> q, k, d_o;
  Saved saved;
  Adjoints adjoints;
  const float* gates;
};

struct GradientOutputs {
  HeadRows<act> dq, dk;
  float *dg, *dbeta;  // [B,T,Hv]
};

// A chunk of a value head: its n tokens, gates [4,64] in shared memory, and dg and dbeta of its first token,
// `stride` apart. Sums carry the power of two `scale` and products 2^c; unit removes the latter, result_unit
// both. s: the readout's scale.
struct HeadChunk {
  int n;
  const float* gates;
  float *dg, *dbeta;
  int stride;
  float s, scale, unit, result_unit;
};

// A warp's part of the products: 16 tokens (m_tile), and one of the splits of
// the columns, on Hopper those of two warpgroups.
struct WarpTile {
  int m_tile, n_split;
};

template <int Tiles>
__device__ inline void scale_tiles(float (&x)[Tiles][4], float factor) {
#pragma unroll
  for (int t = 0; t < Tiles; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[t][e] *= factor;
}

// (G5) by one warp, two tokens a lane. `from` holds the lane's rows_i - columns_i + reads_i, of which dg_t is
// the sum over i >= t, `before` its writes_j, summed over j < t; rows and columns are the sums of M's rows
// and columns, and sum_{i >= t} (rows_i - columns_i) = sum_{i >= t > j} M_ij. states: <S0, dS>, the only one
// without scale. `add`: adds to what an earlier slice of dk left.
__device__ inline void finish_dg(const HeadChunk& head, float2 from, float2 before, float states, bool add) {
  const int lane = threadIdx.x % 32;
  float after = from.x + from.y, writes = before.x + before.y;  // become sums from, and up to, this lane's
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float next = __shfl_down_sync(~0u, after, step), previous = __shfl_up_sync(~0u, writes, step);
    if (lane + step < 32) after += next;
    if (lane >= step) writes += previous;
  }
  float later = __shfl_down_sync(~0u, after, 1), earlier = __shfl_up_sync(~0u, writes, 1);
  if (lane == 31) later = 0.f;
  if (lane == 0) earlier = 0.f;
  const float end_decay = head.gates[kDecayFromStart * kChunk + kChunk - 1];
  const float whole = head.scale * end_decay * states;
  const int i = 2 * lane;
  const auto write = [&](int token, float x) {
    float& to = head.dg[int64_t(token) * head.stride];
    if (token < head.n) to = add ? to + x : x;
  };
  write(i, head.result_unit * (whole + after + earlier));
  write(i + 1, head.result_unit * (whole + (later + from.y) + (earlier + before.x)));
}

}  // namespace delta_rule
}  // namespace gdn
