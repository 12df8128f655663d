// Shared by the passes of both architectures: their CTAs, outputs, scaling of the state, (F1), staging of
// results.
#pragma once

#include "scale.cuh"
#include "splits.cuh"

namespace gdn {
namespace delta_rule {

// Saved by the forward for the backward, fp16: states at the chunks' starts [chunks,dv,dk] and E [B,T,Hv,dv],
// both times 2^exponent, exponents [chunks, dv / 16].
struct Saved {
  __half *states, *E;
  int* exponents;  // all null: nothing is saved
};

// Left by the backward pass for gradients_kernel, fp16: dS at the chunks' ends [chunks,dv,dk] and X
// [B,T,Hv,dv], both times 2^exponent, exponents [chunks, dv / 16], which bring the products with dO into
// range, too.
struct Adjoints {
  __half *d_states, *x;
  int* exponents;
};

// States of a call [B,Hv,dv,dk] fp32, in a pass's own direction: that it begins with (the initial state, or the
// gradient of the final one), and where it leaves that it ends with. Null: zeros; not wanted.
struct CallStates {
  const float* begin;
  float* end;
};

// Inputs of a pass. values: V in the forward, dO in the backward; matrices: N and P, and gates, of
// prepare_kernel.
struct PassInputs {
  HeadRows<const act> q, k, values;
  const __half* matrices;
  const float* gates;
  CallStates states = {};
};

// What a CTA of a pass works on: one sequence and value head, `warps` x 16 columns of dv, the chunks of one
// split.
struct PassBlock {
  int b, h, hk, warps, first_column, split, first_chunk, end_chunk;
};

// Decodes the grid [dv slices, value heads, sequences x count]: splits `first` to first + count - 1 of each
// sequence, slices of 16 columns a warp.
__device__ inline PassBlock pass_block(const Sizes& size, const Splits& splits, int first, int count,
                                       int warps) {
  PassBlock block;
  block.b = blockIdx.z / count;
  block.h = blockIdx.y;
  block.hk = size.key_head(block.h);
  block.warps = warps;
  block.first_column = blockIdx.x * 16 * block.warps;
  block.split = first + blockIdx.z % count;
  block.first_chunk = block.split * splits.chunks;
  block.end_chunk = min(block.first_chunk + splits.chunks, size.chunks);
  return block;
}

// The chunks of a split that the final state B depends on, or M: none where the split as a whole is
// forgotten, for M [dk,dk] is 0 then.
__device__ inline void forward_state_chunks(const PassInputs& in, PassBlock& block, const Sizes& size,
                                            bool transition) {
  const float* last = chunk_log_decay(in.gates, size, block.b, block.h, block.end_chunk - 1);
  const Memory memory = split_memory(last, -1, block.end_chunk - block.first_chunk);
  if (!memory.all) block.first_chunk = block.end_chunk - (transition ? 0 : memory.chunks);
}

// Those that B of the backward depends on.
__device__ inline void backward_state_chunks(const PassInputs& in, PassBlock& block, const Sizes& size) {
  const float* first = chunk_log_decay(in.gates, size, block.b, block.h, block.first_chunk);
  block.end_chunk = block.first_chunk + split_memory(first, 1, block.end_chunk - block.first_chunk).chunks;
}

// Where the state of a block's rows of [dv,dk], from `column` on, comes from at its first chunk: the split before
// (inner: there is one) or the call. Null: zeros.
__device__ inline const float* state_before(const PassInputs& in, const PassBlock& block, const Sizes& size,
                                            const Splits& splits, bool inner, int column) {
  const int64_t rows = (int64_t(block.b) * size.heads_v + block.h) * size.dv + column;
  if (inner) return splits.boundary(block.b, block.h, block.split, size) + column * size.dk;
  return in.states.begin ? in.states.begin + rows * size.dk : nullptr;
}

// Where it goes after its last chunk, where that is the call's last. Null: nowhere.
__device__ inline float* state_after(const PassInputs& in, const PassBlock& block, const Sizes& size,
                                     bool inner, int column) {
  const int64_t rows = (int64_t(block.b) * size.heads_v + block.h) * size.dv + column;
  return !inner && in.states.end ? in.states.end + rows * size.dk : nullptr;
}

template <int DK>
__device__ inline void scale_state(float (&state)[DK / 8][4], float factor) {
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) state[t][e] *= factor;
}

// Largest magnitude of this lane's part of a warp's 16 columns of a bf16 tile [64, 16]. Never -0, whose bits
// scale_exponent would take for the largest: of two zeros __hmax2 takes +0.
__device__ inline float largest_of_values(uint32_t columns_address, int ld) {
  __nv_bfloat162 high = __float2bfloat162_rn(0.f), low = high;
#pragma unroll
  for (int t = 0; t < 4; t++) {
    uint32_t v[4];
    ldmatrix_transposed(v, columns_address + 2 * 16 * t * ld);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const __nv_bfloat162 x = *reinterpret_cast<__nv_bfloat162*>(&v[e]);
      high = __hmax2(high, x), low = __hmin2(low, x);
    }
  }
  high = __hmax2(high, __hneg2(low));
  return fmaxf(__low2float(high), __high2float(high));
}

// Rescales the state at a chunk's start, so that it and the chunk's values are fp16 operands with the same
// scale factor 2^e. The state comes times 2^exponent; largest_value is the largest magnitude of this lane's
// values. Returns the new exponent.
template <int DK>
__device__ inline int rescale_state(float (&state)[DK / 8][4], float largest_value, int exponent) {
  float largest[4] = {power_of_two(exponent) * largest_value};  // four chains of dependent instructions
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) largest[e] = fmaxf(largest[e], fabsf(state[t][e]));
  const int e = scale_exponent(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])), exponent);
  if (e != exponent) scale_state<DK>(state, power_of_two(e - exponent));
  return e;
}

__device__ inline void scale_all_tokens(float (&x)[8][4], const float* gate, float factor) {
#pragma unroll
  for (int t = 0; t < 4; t++) scale_tokens(x[2 * t], x[2 * t + 1], gate, 16 * t, factor);
}

// (F1) R = scale V - e^G * (K S), in place from c = K S; [16 of dv, 64 tokens], scale a power of two.
__device__ inline void residuals(float (&c)[8][4], const float* gates, uint32_t v_columns, int ld,
                                 float unit) {
  const float* from_start = gates + kDecayFromStart * kChunk + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int t = 0; t < 4; t++) {
    uint32_t v[4];
    ldmatrix_transposed(v, v_columns + 2 * 16 * t * ld);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 x = unpack_bf16(scale_bf16(v[e], unit));
      const float2 gate = *reinterpret_cast<const float2*>(from_start + 16 * t + 8 * (e / 2));
      float(&tile)[4] = c[2 * t + e / 2];
      tile[2 * (e % 2)] = fmaf(-gate.x, tile[2 * (e % 2)], x.x);
      tile[2 * (e % 2) + 1] = fmaf(-gate.y, tile[2 * (e % 2) + 1], x.y);
    }
  }
}

// The bf16 A fragment d_o times scale, as accumulators.
__device__ inline void output_gradient(float (&left)[4], float (&right)[4], const uint32_t (&d_o)[4],
                                       float unit) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const float2 y = unpack_bf16(d_o[e]);
    float(&tile)[4] = e < 2 ? left : right;
    tile[2 * (e % 2)] = unit * y.x;
    tile[2 * (e % 2) + 1] = unit * y.y;
  }
}

// Packs x, y to T. bf16: times factor, a power of two. fp16: always factor 1, the value is stored with its
// scale factor.
__device__ inline uint32_t pack_as(const act*, float x, float y, float factor) {
  return scale_bf16(pack_bf16(x, y), factor);
}

__device__ inline uint32_t pack_as(const __half*, float x, float y, float) { return pack_fp16(x, y); }

// Stages factor * x [16 of dv, 64 tokens], transposed to rows of tokens, as 16-bit T in the warp's own 16
// columns of a shared tile with row stride ld.
template <class T>
__device__ inline void stage_tokens(act* staging, int ld, const float (&x)[8][4], float factor) {
  __syncwarp();
#pragma unroll
  for (int t = 0; t < 8; t += 2) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float(&tile)[4] = x[t + i / 2];
      w[i] = pack_as(static_cast<T*>(nullptr), tile[2 * (i % 2)], tile[2 * (i % 2) + 1], factor);
    }
    store_transposed(staging + 8 * t * ld, ld, w);
  }
}

// Writes the n first rows that stage_tokens staged to rows [tokens, 16] of `to`.
template <class T>
__device__ inline void write_tokens(T* to, int64_t stride, int n, const act* staging, int ld) {
  const int lane = threadIdx.x % 32, row = lane / 2, column = 8 * (lane % 2), step = int(stride);
  __syncwarp();
  to = advance_rows(to + column, row, step);
  staging += row * ld + column;
#pragma unroll
  for (int i = 0; i < kChunk; i += 16) {
    const uint4 word = *reinterpret_cast<const uint4*>(staging + i * ld);
    if (row + i < n) *reinterpret_cast<uint4*>(advance_rows(to, i, step)) = word;
  }
}

}  // namespace delta_rule
}  // namespace gdn
