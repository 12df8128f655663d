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

static_assert(kChunk == 64, "the kernels' tiles are of 64 tokens");
constexpr int kMatrixElements = kChunk * kChunk;  // elements of such a tile in global memory

enum Gate {
  kBeta,
  kDecayFromStart,
  kDecayToEnd,
  kCumulativeLogDecay
};  // rows of the gates: beta, e^G, e^{G_C - G}, G

// Values [B,T,heads,columns] of a call in global memory: strides in elements from row to row (row b T + t)
// and from head to head, multiples of 8; columns are contiguous.
template <class T>
struct HeadRows {
  T* at;
  int row_stride, head_stride;
  __device__ T* head(int h) const { return at + int64_t(h) * head_stride; }
};

// q, k [B,T,Hk,dk], v [B,T,Hv,dv], or their gradients: separate tensors, or parts of packed rows.
template <class T>
struct Qkv {
  HeadRows<T> q, k, v;
};

// The parts of packed rows [B,T,C] (gdn/shapes.h).
template <class T>
Qkv<T> unpacked(T* qkv, const MixerShape& shape) {
  const int C = shape.conv_channels(), dk = shape.head_dim_k, keys = shape.key_dim();
  return {{qkv, C, dk}, {qkv + keys, C, dk}, {qkv + 2 * keys, C, shape.head_dim_v}};
}

// [B,T,Hv,dv], dense.
template <class T>
HeadRows<T> dense_values(T* values, const MixerShape& shape) {
  return {values, shape.value_dim(), shape.head_dim_v};
}

// Inputs of prepare_kernel: q, k; log decay g and write strength beta [B,T,Hv].
struct PrepareInputs {
  HeadRows<const act> q, k;
  const float *g, *beta;
};

// Its outputs, which both passes read: N and P [chunks,2,64,64] and gates [chunks,4,64].
struct Prepared {
  __half* matrices;
  float* gates;
};

// Problem size of a call. Chunk `chunk` of value head h of sequence b has the index (b Hv + h) chunks +
// chunk.
struct Sizes {
  int tokens, heads_k, heads_v, dk, dv, chunks, value_heads_per_key;
  __device__ int64_t chunk_number(int b, int h, int chunk) const {
    return (int64_t(b) * heads_v + h) * chunks + chunk;
  }
  __device__ int64_t first_row(int b, int chunk) const { return int64_t(b) * tokens + chunk * kChunk; }
  __device__ int rows_in(int chunk) const { return min(kChunk, tokens - chunk * kChunk); }
  __device__ int value_stride() const { return heads_v * dv; }  // from row to row of E and X [B,T,Hv,dv]
  // h / value_heads_per_key by a float division; exact below 2^20 heads.
  __device__ int key_head(int h) const { return int(__fdividef(h + 0.5f, value_heads_per_key)); }
};

}  // namespace delta_rule
}  // namespace gdn
