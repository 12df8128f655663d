// Scale factors for fp16 operands: one power of two per 16 columns, as in block floating point.
#pragma once

#include "fragments.cuh"

namespace gdn {
namespace delta_rule {

// fp16 operands are stored times 2^e, e such that the largest magnitude is below 4. Then a chunk's sums of
// products stay below 65504, and values 2^16 times smaller than the largest keep all 11 bits.
constexpr int kMaxExponent = 62;

__device__ inline float power_of_two(int e) { return __int_as_float((e + 127) << 23); }  // -126 <= e <= 127

// 2^e; 0 if that is below the smallest normal float.
__device__ inline float small_power_of_two(int e) { return e < -126 ? 0.f : power_of_two(e); }

// The exponent for values whose largest magnitude in the warp, already times 2^e, is `largest`: e while
// `largest` is in [2^-4, 4), else the exponent that brings it into [2,4); at most +-kMaxExponent. Uniform in
// the warp.
__device__ inline int scale_exponent(float largest, int e) {
  const int bits = int(__reduce_max_sync(~0u, __float_as_uint(largest)));
  const int exponent = (bits >> 23) - 127;
  if (bits == 0 || (exponent >= -4 && exponent <= 1)) return e;
  return max(-kMaxExponent, min(kMaxExponent, e + 1 - exponent));
}

__device__ inline float largest_of(const float (&x)[4], float largest) {
#pragma unroll
  for (int e = 0; e < 4; e++) largest = fmaxf(largest, fabsf(x[e]));
  return largest;
}

// Eight bf16 at p -> fp16 times `factor`, in place: exact where the result is in fp16's normal range.
__device__ inline void to_fp16(void* p, float factor) {
  uint4 v = *static_cast<uint4*>(p);
  uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 x = unpack_bf16(w[i]);
    w[i] = pack_fp16(factor * x.x, factor * x.y);
  }
  *static_cast<uint4*>(p) = make_uint4(w[0], w[1], w[2], w[3]);
}

}  // namespace delta_rule
}  // namespace gdn
