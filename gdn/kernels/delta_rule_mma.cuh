// Fragments of mma.sync.m16n8k16 for the gated delta rule: fp16 or bf16 operands, fp32 accumulators.
//
// Lane = 4 g + c holds
//   A [16,16]  a0 = (row g, k 2c, 2c+1)       a1 = (row g+8, the same k)    a2, a3 = a0, a1 at k + 8
//   B [16,8]   b0 = (k 2c, 2c+1, column g)    b1 = b0 at k + 8
//   C [16,8]   c0, c1 = (row g, columns 2c, 2c+1)       c2, c3 = (row g+8, the same columns)
// Two neighbouring C tiles, packed to 16 bits, are an A fragment: chained products stay in registers.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "../cuda_device.cuh"

namespace gdn {
namespace delta_rule {

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The shared-memory address that this lane passes to ldmatrix.x4 for a 16x16 block (row stride ld). The four
// 8x8 matrices come in the order (0,0), (8,0), (0,8), (8,8) of their first (row, column) with
// lane_address_rows_first, and (0,0), (0,8), (8,0), (8,8) with lane_address_columns_first.
template <class T>
__device__ inline uint32_t lane_address_rows_first(const T* block, int ld) {
  const int lane = threadIdx.x % 32;
  return shared_address(block + (lane & 15) * ld + 8 * (lane >> 4));
}
template <class T>
__device__ inline uint32_t lane_address_columns_first(const T* block, int ld) {
  const int lane = threadIdx.x % 32;
  return shared_address(block + ((lane & 7) + 8 * (lane >> 4)) * ld + 8 * ((lane >> 3) & 1));
}

// Address order and load for each kind of fragment (B: 16 columns, two fragments (r0,r1) and (r2,r3)):
//   A stored as [m][k]: rows first, ldmatrix         A stored as [k][m]: columns first, ldmatrix_transposed
//   B stored as [n][k]: columns first, ldmatrix      B stored as [k][n]: rows first, ldmatrix_transposed
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// c += a b, bf16 operands
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b, fp16 operands
__device__ inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// [left, right] += a b: two accumulator tiles side by side, b has 16 columns.
__device__ inline void mma_pair_bf16(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[4]) {
  mma_bf16(left, a, b[0], b[1]);
  mma_bf16(right, a, b[2], b[3]);
}
__device__ inline void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[4]) {
  mma_fp16(left, a, b[0], b[1]);
  mma_fp16(right, a, b[2], b[3]);
}

__device__ inline float2 unpack_bf16(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
__device__ inline uint32_t pack_bf16(float x, float y) {  // x in the low half
  __nv_bfloat162 word = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<uint32_t*>(&word);
}
// Two packed bf16 times a power of two; exact.
__device__ inline uint32_t scale_bf16(uint32_t x, float factor) {
  const __nv_bfloat162 y = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&x), __float2bfloat162_rn(factor));
  return *reinterpret_cast<const uint32_t*>(&y);
}
__device__ inline float2 unpack_fp16(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
__device__ inline uint32_t pack_fp16(float x, float y) {
  __half2 word = __floats2half2_rn(x, y);
  return *reinterpret_cast<uint32_t*>(&word);
}

// x = high + low, both fp16: 22 bits of mantissa, absolute error at least 2^-25.
__device__ inline void split_hi_lo(uint32_t& high, uint32_t& low, float x, float y) {
  high = pack_fp16(x, y);
  const float2 h = unpack_fp16(high);
  low = pack_fp16(x - h.x, y - h.y);
}

// A fragments (hi and lo fp16) of two neighbouring accumulator tiles.
__device__ inline void split_hi_lo(uint32_t (&high)[4], uint32_t (&low)[4], const float (&left)[4],
                                   const float (&right)[4]) {
  split_hi_lo(high[0], low[0], left[0], left[1]);
  split_hi_lo(high[1], low[1], left[2], left[3]);
  split_hi_lo(high[2], low[2], right[0], right[1]);
  split_hi_lo(high[3], low[3], right[2], right[3]);
}

// A fragment (fp16) of two neighbouring accumulator tiles.
__device__ inline void pack_a_fragment(uint32_t (&out)[4], const float (&left)[4], const float (&right)[4]) {
  out[0] = pack_fp16(left[0], left[1]);
  out[1] = pack_fp16(left[2], left[3]);
  out[2] = pack_fp16(right[0], right[1]);
  out[3] = pack_fp16(right[2], right[3]);
}

// [left, right] += (a_high + a_low) (b_high + b_low) in fp16 without low * low: three mma per tile.
__device__ inline void mma_pair_hi_lo(float (&left)[4], float (&right)[4], const uint32_t (&high)[4],
                                      const uint32_t (&low)[4], const uint32_t (&b_high)[4],
                                      const uint32_t (&b_low)[4]) {
  mma_pair(left, right, high, b_high);
  mma_pair(left, right, low, b_high);
  mma_pair(left, right, high, b_low);
}

// Multiplies each column of two accumulator tiles, columns = the 16 tokens from `token` on, by factor * gate.
__device__ inline void scale_tokens(float (&left)[4], float (&right)[4], const float* gate, int token,
                                    float factor) {
  const int c = 2 * (threadIdx.x & 3);
  const float2 x = *reinterpret_cast<const float2*>(gate + token + c);
  const float2 y = *reinterpret_cast<const float2*>(gate + token + 8 + c);
  left[0] *= factor * x.x, left[1] *= factor * x.y, left[2] *= factor * x.x, left[3] *= factor * x.y;
  right[0] *= factor * y.x, right[1] *= factor * y.y, right[2] *= factor * y.x, right[3] *= factor * y.y;
}

// A fragment (fp16) of two accumulator tiles whose columns are scaled by factor * gate.
__device__ inline void pack_scaled_a_fragment(uint32_t (&out)[4], const float (&left)[4],
                                              const float (&right)[4], const float* gate, int token,
                                              float factor) {
  float x[4], y[4];
#pragma unroll
  for (int e = 0; e < 4; e++) x[e] = left[e], y[e] = right[e];
  scale_tokens(x, y, gate, token, factor);
  pack_a_fragment(out, x, y);
}

// ---- scale factors for fp16: one power of two per 16 columns, as in block floating point

// fp16 operands are stored times 2^e, e such that the largest magnitude is below 4. Then a chunk's sums of
// products stay below 65504, and values 2^16 times smaller than the largest keep all 11 bits.
constexpr int kMaxExponent = 62;

__device__ inline float power_of_two(int e) { return __int_as_float((e + 127) << 23); }  // -126 <= e <= 127

// The exponent for values whose largest magnitude in the warp, already times 2^e, is `largest`: e while
// `largest` is in [2^-4, 4), else the exponent that brings it into [2,4); at most +-kMaxExponent. Uniform in
// the warp.
__device__ inline int scale_exponent(float largest, int e) {
  const int bits = int(__reduce_max_sync(~0u, __float_as_uint(largest)));
  const int exponent = (bits >> 23) - 127;
  if (bits == 0 || (exponent >= -4 && exponent <= 1)) return e;
  return max(-kMaxExponent, min(kMaxExponent, e + 1 - exponent));
}

// 2^x, relative error at most 2^-22; 0 below 2^-126.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

// movmatrix: transposes an 8x8 matrix of 16-bit values held as one register a lane, (row g, columns 2c,
// 2c+1).
__device__ inline uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Stores the transposes of four 8x8 matrices (one register a lane each) to a shared tile with row stride ld:
// matrices 0, 1 to rows [0,8), columns 0 and 8; matrices 2, 3 to rows [8,16).
template <class T>
__device__ inline void store_transposed(T* to, int ld, const uint32_t (&r)[4]) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  const uint32_t address = shared_address(to + (lane % 8 + 8 * (lane / 16)) * ld + 8 * (lane / 8 % 2));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; i++)
    *reinterpret_cast<uint32_t*>(to + (lane / 4 + 8 * (i / 2)) * ld + 8 * (i % 2) + 2 * (lane % 4)) =
        transpose_8x8(r[i]);
#endif
}

// Transposes registers x lanes in a quad: w[j] of lane c <-> w[c] of lane j, so that a lane's four registers
// become 16 contiguous bytes.
__device__ inline void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
    if (odd)
      w[i] = other;
    else
      w[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t other = __shfl_xor_sync(~0u, upper ? w[i] : w[i + 2], 2);
    if (upper)
      w[i] = other;
    else
      w[i + 2] = other;
  }
}

// Stores 8 rows of four accumulator tiles, packed, to row-major memory: row g at `row`, 8 columns a lane.
template <class T>
__device__ inline void store_32_columns(T* row, uint32_t (&w)[4], int valid_columns) {
  transpose_quad(w);
  const int column = 8 * (threadIdx.x & 3);
  if (column < valid_columns) *reinterpret_cast<uint4*>(row + column) = make_uint4(w[0], w[1], w[2], w[3]);
}

// cp.async of 16 bytes from global to shared memory; zero-fill where !valid.
__device__ inline void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// One 16-byte store. Written in C++, ptxas splits a state's first store into four, each a quarter of 16
// sectors, which the L2 cache has to merge (backward passes 3 to 8% slower).
__device__ inline void st_global_v4(void* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
__device__ inline void cp_async_4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// cp.async.wait_group 1: all of this thread's groups but the newest have arrived.
__device__ inline void cp_async_wait_all_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// ---- named barriers among `threads` threads of the block; id 0 is __syncthreads

__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// bar.red.or: named barrier that returns the OR of x over its threads.
__device__ inline bool named_barrier_any(int id, int threads, bool x) {
  int any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.s32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.s32 %0, 1, 0, q;\n}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(x))
      : "memory");
  return any;
}
// bar.arrive: signals the barrier, does not wait.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Advances a pointer by `rows` rows of `stride` elements; one instruction where `rows` is a constant.
template <class T>
__device__ inline T* advance_rows(T* from, int rows, int stride) {
  return from + int64_t(rows) * stride;
}

// f(row, vector) for each 16-byte vector that this thread handles of a [64, columns] tile of 16-bit values
// (columns and threads multiples of 8). Eight threads share a row, so a thread's rows are a fixed distance
// apart, whatever the number of columns.
template <class F>
__device__ inline void for_each_vector_of_thread(int columns, int threads, const F& f) {
  const int first = threadIdx.x / 8, step = threads / 8;
#pragma unroll 1
  for (int vector = threadIdx.x % 8; vector < columns / 8; vector += 8)
#pragma unroll 4
    for (int row = 0; row < kChunk; row += step)
      if (kChunk % step == 0 || row + first < kChunk) f(row + first, vector);
}

// The block issues cp.async of a [64, columns] tile of 16-bit values (row strides ld and stride, in
// elements); zero-fill from row valid_rows and column valid_columns on.
template <class T>
__device__ inline void copy_tile(T* to, int ld, const T* from, int64_t stride, int columns, int valid_rows,
                                 int valid_columns) {
  for_each_vector_of_thread(columns, blockDim.x, [&](int row, int vector) {
    cp_async_16(to + row * ld + 8 * vector, from + row * stride + 8 * vector,
                row < valid_rows && 8 * vector < valid_columns);
  });
}

// Converts a tile that copy_tile brought from bf16 to fp16 in place: each thread the vectors that it copied
// itself, after its own cp.async have arrived.
__device__ inline void convert_own_copies_to_fp16(act* tile, int ld, int columns) {
  for_each_vector_of_thread(columns, blockDim.x,
                            [&](int row, int vector) { to_fp16(tile + row * ld + 8 * vector, 1.f); });
}

// The block zeroes `bytes` (a multiple of 16) of shared memory.
__device__ inline void clear_shared(void* p, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    static_cast<uint4*>(p)[i] = make_uint4(0, 0, 0, 0);
}

}  // namespace delta_rule
}  // namespace gdn
