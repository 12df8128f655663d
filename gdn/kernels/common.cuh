// What the GPU layers share: 16-byte accesses, sums over lanes and blocks, fast exponentials, and the second
// stage of every gradient that is summed over rows.
#pragma once

#include <cuda_pipeline.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "../cuda_device.cuh"
#include "../shapes.h"
#include "ptx.cuh"

namespace gdn {

// Throws one line when a width does not fill whole 16-byte accesses.
inline void require_multiple_of_8(int width, const char* what) {
  if (width <= 0 || width % 8 != 0)
    throw std::runtime_error(std::string(what) + " is " + std::to_string(width) +
                             "; on the GPU it must be a multiple of 8");
}

// Throws one line when the GPU has no kernels for these head sizes.
inline void require_head_dims(const MixerShape& shape) {
  const int dk = shape.head_dim_k, dv = shape.head_dim_v;
  if (dk <= 0 || dv <= 0 || dk % 16 != 0 || dv % 16 != 0 || dk > 256 || dv > 512)
    throw std::runtime_error(
        "on the GPU head sizes must be multiples of 16, dk <= 256, dv <= 512; got dk = " +
        std::to_string(dk) + ", dv = " + std::to_string(dv));
}

template <class Int>
__host__ __device__ constexpr Int divide_up(Int a, Int b) {
  return (a + b - 1) / b;
}

// The fewest lanes, a power of two, that hold `vectors` of them, one each; at most a warp.
inline int lanes_for(int vectors) {
  int lanes = 1;
  while (lanes < vectors && lanes < 32) lanes *= 2;
  return lanes;
}

// ---- shared memory ----------------------------------------------------------------------------------------

// Lets a kernel have so many dynamic bytes on the current GPU. The runtime is asked once a process, kernel and GPU, or
// when more are wanted: a call costs the host a microsecond. Any thread may call.
inline void raise_shared_bytes(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  int number = 0;
  cuda_check(cudaGetDevice(&number));
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, number}];
  if (bytes <= most) return;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  most = bytes;
}

// Before a launch with so many dynamic bytes. Throws one line when the GPU has fewer.
template <class Kernel>
void allow_shared_bytes(const Cuda& device, Kernel* kernel, int bytes, const char* what) {
  if (bytes > device.shared_bytes)
    throw std::runtime_error(std::string(what) + " needs " + std::to_string(bytes) +
                             " bytes of shared memory a block at these sizes; this GPU has " +
                             std::to_string(device.shared_bytes));
  raise_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

// ---- eight numbers at a time ------------------------------------------------------------------------------

__device__ inline uint4 load16(const act* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ inline void store16(act* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

// A bf16 is the upper half of a float.
__device__ inline void unpack8(float (&x)[8], uint4 v) {
  const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(pair[i] << 16);
    x[2 * i + 1] = __uint_as_float(pair[i] & 0xffff0000u);
  }
}

__device__ inline uint32_t pack2(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return uint32_t(__bfloat16_as_ushort(pair.x)) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
}

// cp.async of sixteen bytes, or zeros where `read` is false. To be waited for with __pipeline_commit and
// __pipeline_wait_prior; a thread sees its own without a barrier.
__device__ inline void copy16_async(uint4* to, const act* from, bool read) {
  cp_async_16(to, __cvta_generic_to_global(from), read);
}
__device__ inline void copy4_async(float* to, const float* from, bool read) {
  cp_async_4(to, __cvta_generic_to_global(from), read);
}

// Rounds to nearest even.
__device__ inline uint4 pack8(const float (&x)[8]) {
  return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}

__device__ inline void load8(float (&x)[8], float4 a, float4 b) {
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ inline void load8(float (&x)[8], const float* p) {
  load8(x, reinterpret_cast<const float4*>(p)[0], reinterpret_cast<const float4*>(p)[1]);
}

__device__ inline void store8(float* p, const float (&x)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// ---- functions --------------------------------------------------------------------------------------------

constexpr float kLog2e = 1.4426950408889634f;

// 1 / (1 + e^-x); where e^-x overflows, the reciprocal of infinity is the right answer, 0.
__device__ inline float fast_sigmoid(float x) { return fast_reciprocal(1 + fast_exp2(-kLog2e * x)); }

// ---- sums -------------------------------------------------------------------------------------------------

// Sum over an aligned group of `lanes` lanes (a power of two); each of them gets it. The whole warp must take
// part. Always five exchanges, so that there is neither a loop nor a branch where `lanes` is no constant.
template <class T>
__device__ inline T lane_sum(T x, int lanes = 32) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(~0u, x, offset);
    x += offset < lanes ? other : T(0);
  }
  return x;
}

// Sum over a block of kWarps warps; each thread gets it. `shared` [kWarps].
template <int kWarps, class T>
__device__ inline T block_sum(T x, T* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = lane_sum(x);
  __syncthreads();  // an earlier sum may still be read
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return lane_sum(lane < kWarps ? shared[lane] : T(0));
}

constexpr int kPartialGroups = 16, kPartialSums = 3;
constexpr int kPartialLoads = 8;  // of a thread, in flight together

// gradient [columns] += sum of the `count` rows of partials [count,stride].
struct PartialSum {
  float* gradient = nullptr;
  const float* partials = nullptr;
  int count = 0, columns = 0, stride = 0;
};

struct PartialSums {
  PartialSum of[kPartialSums];
};

// The order of a sum depends on its `count` alone: group i of 16 adds up rows i, i + 16, ..., then the groups
// are added in order. A block does 32 columns of one gradient.
static __global__ void __launch_bounds__(32 * kPartialGroups)
    add_partials_kernel(const __grid_constant__ PartialSums sums) {
  __shared__ float group_sums[kPartialGroups][32];
  int which = 0, block = blockIdx.x;
  while (block >= divide_up(sums.of[which].columns, 32)) block -= divide_up(sums.of[which++].columns, 32);
  const PartialSum& mine = sums.of[which];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32, column = block * 32 + lane;
  float sum = 0;
  if (column < mine.columns) {
    for (int first = group; first < mine.count; first += kPartialLoads * kPartialGroups) {
      float value[kPartialLoads];
#pragma unroll
      for (int i = 0; i < kPartialLoads; i++) {
        const int p = first + i * kPartialGroups;
        value[i] = p < mine.count ? mine.partials[int64_t(p) * mine.stride + column] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kPartialLoads; i++) sum += value[i];
    }
  }
  group_sums[group][lane] = sum;
  __syncthreads();
  if (group != 0 || column >= mine.columns) return;
  for (int i = 1; i < kPartialGroups; i++) sum += group_sums[i][lane];
  mine.gradient[column] += sum;
}

// The second stage of up to kPartialSums gradients in one launch.
inline void add_partials(Cuda& dev, const PartialSums& sums) {
  int blocks = 0;
  for (const PartialSum& s : sums.of) blocks += divide_up(s.columns, 32);
  add_partials_kernel<<<blocks, 32 * kPartialGroups, 0, dev.stream>>>(sums);
  launched("add_partials");
}

}  // namespace gdn
