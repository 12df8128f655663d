// Sizes of a call of the gated delta rule, and of what its kernels pass on.
#pragma once

#include "../ptx.cuh"
#include "schedule.h"

namespace gdn {
namespace delta_rule {

// Code for sm_90a, where the kernels on wgmma take the place of those on mma.sync; the latter are then empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(GDN_EMULATED)
constexpr bool kHopperCode = true;
#else
constexpr bool kHopperCode = false;
#endif

constexpr int kMatrixElements = kChunk * kChunk;  // elements of such a tile in global memory

enum Gate {
  kBeta,
  kDecayFromStart,
  kDecayToEnd,
  kCumulativeLogDecay
};  // rows of the gates: beta, e^G, e^{G_C - G}, G

// Problem size of a call. Chunk `chunk` of value head h of sequence b has the index (b Hv + h) chunks +
// chunk.
struct Sizes {
  int tokens, heads_k, heads_v, dk, dv, chunks, channels, value_heads_per_key;
  __device__ int64_t chunk_number(int b, int h, int chunk) const {
    return (int64_t(b) * heads_v + h) * chunks + chunk;
  }
  __device__ int64_t first_row(int b, int chunk) const { return int64_t(b) * tokens + chunk * kChunk; }
  __device__ int rows_in(int chunk) const { return min(kChunk, tokens - chunk * kChunk); }
  __device__ int q_column(int hk) const { return hk * dk; }
  __device__ int k_column(int hk) const { return (heads_k + hk) * dk; }
  __device__ int v_column(int h) const { return 2 * heads_k * dk + h * dv; }
  // h / value_heads_per_key by a float division; exact below 2^20 heads.
  __device__ int key_head(int h) const { return int(__fdividef(h + 0.5f, value_heads_per_key)); }
};

}  // namespace delta_rule
}  // namespace gdn
