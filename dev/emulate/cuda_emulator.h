// What the kernels of the gated delta rule need of CUDA, on a CPU: run.py compiles them with this header in place of
// gdn/cuda_device.cuh, and with these functions in place of their assembly. A thread is a fiber, a block's threads take
// turns, and change places where they wait for each other or exchange registers. Blocks run one after another.
//
// It shows what a kernel computes, on machines without a GPU, and not its speed. Copies to shared memory and products
// of a warpgroup, which a GPU does some time between their start and the wait for them, are done at once, or, if
// `late`, at the wait, of what registers and memory hold then. Which warp goes on is decided against the kernel
// (run_block). So a missing wait or barrier mostly shows, in one of the two.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "shapes.h"

#define __device__
#define __host__
#define __global__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 800
#define __CUDA_ARCH_FEAT_SM90_ALL

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};
template <class To, class From>
To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "the same bits");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulator

inline emulator::Dim threadIdx, blockIdx, blockDim, gridDim;

// ---- types and arithmetic

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint32_t __float_as_uint(float x) { return emulator::bits_of<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulator::bits_of<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_of<float>(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = __float_as_uint(x);
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline __half __float2half_rn(float x) { return emulator::bits_of<__half>(_Float16(x)); }
inline float __half2float(__half x) { return float(emulator::bits_of<_Float16>(x)); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __floats2bfloat162_rn(x, x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline float __low2float(__nv_bfloat162 x) { return __bfloat162float(x.x); }
inline float __high2float(__nv_bfloat162 x) { return __bfloat162float(x.y); }
inline __nv_bfloat162 __habs2(__nv_bfloat162 x) {
  return {{uint16_t(x.x.bits & 0x7fff)}, {uint16_t(x.y.bits & 0x7fff)}};
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(std::fmax(__low2float(a), __low2float(b)),
                               std::fmax(__high2float(a), __high2float(b)));
}
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(std::fmin(__low2float(a), __low2float(b)),
                               std::fmin(__high2float(a), __high2float(b)));
}
inline __nv_bfloat162 __hneg2(__nv_bfloat162 x) {
  return {{uint16_t(x.x.bits ^ 0x8000)}, {uint16_t(x.y.bits ^ 0x8000)}};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(__low2float(a) * __low2float(b), __high2float(a) * __high2float(b));
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(std::fmax(__half2float(a.x), __half2float(b.x)),
                           std::fmax(__half2float(a.y), __half2float(b.y)));
}
inline __half2 __hmin2(__half2 a, __half2 b) {
  return __floats2half2_rn(std::fmin(__half2float(a.x), __half2float(b.x)),
                           std::fmin(__half2float(a.y), __half2float(b.y)));
}
inline __half2 __hneg2(__half2 x) { return {{uint16_t(x.x.bits ^ 0x8000)}, {uint16_t(x.y.bits ^ 0x8000)}}; }
inline float __fdividef(float x, float y) { return x / y; }
using std::max;
using std::min;

// ---- threads

namespace emulator {

inline bool late = false;

// A thread's copies or products that were started, in groups; `open` of the newest are in none yet.
struct Pending {
  std::deque<std::function<void()>> work;
  std::deque<size_t> groups;
  size_t open = 0;

  void add(const std::function<void()>& f) {
    if (!late) return f();
    work.push_back(f);
    open++;
  }
  void close() { groups.push_back(open), open = 0; }
  void do_all_but(size_t newest) {
    for (; groups.size() > newest; groups.pop_front())
      for (size_t i = 0; i < groups.front(); i++) {
        work.front()();
        work.pop_front();
      }
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::vector<char> stack;
  bool begun, done;
  Pending copies, products;
};
inline std::vector<Fiber> fibers;
inline int current;
inline ucontext_t scheduler_start;
inline jmp_buf scheduler;
inline std::function<void()> kernel;

inline void yield() {
  if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}
inline void run_fiber() {
  kernel();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}
inline void resume(int i) {
  current = i;
  threadIdx.x = unsigned(i);
  if (_setjmp(scheduler) != 0) return;
  if (fibers[i].begun) _longjmp(fibers[i].at, 1);
  fibers[i].begun = true;
  swapcontext(&scheduler_start, &fibers[i].start);
}

// Waits until `size` threads do. All of them must come, as on a GPU.
struct Barrier {
  int size, count, generation;
};
inline Barrier block_barrier, warp_barriers[32], meetings[16];
inline int64_t steps;                   // threads that ended and barriers that were passed
inline bool arrive(Barrier& barrier) {  // whether the last
  if (++barrier.count < barrier.size) return false;
  barrier.count = 0;
  barrier.generation++;
  steps++;
  return true;
}
inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (!arrive(barrier))
    while (barrier.generation == generation) yield();
}
// Of `threads` of the block's: bar.sync, bar.arrive
inline Barrier& meeting(int which, int threads) {
  Barrier& barrier = meetings[which];
  if (barrier.count > 0 && barrier.size != threads) throw std::logic_error("a meeting of two sizes");
  barrier.size = threads;
  return barrier;
}

// bar.red.or: each meeting clears what the one after the next will hold, when nobody reads it any more.
inline bool any_of(int which, int threads, bool x) {
  static bool any[16][4];
  Barrier& barrier = meeting(which, threads);
  const int now = barrier.generation % 4;
  any[which][(now + 2) % 4] = false;
  any[which][now] |= x;
  wait(barrier);
  return any[which][now];
}

inline void run_block(int threads, const std::function<void()>& call) {
  kernel = call;
  blockDim.x = unsigned(threads);
  block_barrier = {threads, 0, 0};
  for (Barrier& barrier : warp_barriers) barrier = {32, 0, 0};
  for (Barrier& barrier : meetings) barrier = {0, 0, 0};
  fibers.resize(size_t(threads));
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 17);
    fiber.begun = fiber.done = false;
    fiber.copies = fiber.products = {};
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  // One warp, another in each block, goes as far as barriers let it; only then others move, first those of its
  // warpgroup: it is seen to overtake wherever nothing keeps it from it. Late, chance picks who moves.
  static unsigned blocks, chance = 1;
  const int warps = (threads + 31) / 32, in_fours = (warps + 3) / 4 * 4, leader = int(blocks++ % unsigned(warps));
  for (int left = threads, stuck = 0; left > 0;) {
    const int64_t before = steps;
    for (int turn = 0; turn < in_fours && steps == before; turn++) {
      chance = chance * 1664525 + 1013904223;
      const int group = leader / 4 * 4;
      const int warp = late       ? int(chance >> 16) % warps
                       : turn < 4 ? group + (leader + turn) % 4
                                  : (group + turn) % in_fours;
      for (int lane = 0; lane < 32; lane++) {
        const int i = 32 * warp + (late ? 31 - lane : lane);
        if (i >= threads || fibers[size_t(i)].done) continue;
        resume(i);
        if (!fibers[size_t(i)].done) continue;
        left--;
        steps++;
      }
    }
    stuck = steps == before ? stuck + 1 : 0;
    if (stuck > 1000) throw std::logic_error("all threads wait");
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.copies.work.empty() || !fiber.products.work.empty())
      throw std::logic_error("copies or products that nobody waited for");
  for (const Barrier& barrier : meetings)
    if (barrier.count != 0) throw std::logic_error("a meeting that did not take place");
}

// kernel<<<grid, threads>>>
inline void launch(Dim grid, int threads, const std::function<void()>& call) {
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        run_block(threads, call);
      }
}

}  // namespace emulator


inline void __syncthreads() { emulator::wait(emulator::block_barrier); }
inline void __syncwarp() { emulator::wait(emulator::warp_barriers[threadIdx.x / 32]); }

// ---- exchanges in a warp

namespace emulator {

using Words = std::array<uint32_t, 6>;
inline Words exchanged[32][32];

// Every lane's words, all lanes calling; valid until the lane calls warp_read.
inline const Words* warp_share(const Words& mine) {
  exchanged[threadIdx.x / 32][threadIdx.x % 32] = mine;
  __syncwarp();
  return exchanged[threadIdx.x / 32];
}
inline void warp_read() { __syncwarp(); }

template <class T>
T from_lane(T x, int lane) {
  const Words* all = warp_share({bits_of<uint32_t>(x)});
  const T y = bits_of<T>(all[lane & 31][0]);
  warp_read();
  return y;
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::from_lane(x, int(threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::from_lane(x, lane);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  const int lane = int(threadIdx.x % 32);
  return emulator::from_lane(x, lane >= by ? lane - by : lane);
}
template <class T>
T __shfl_down_sync(unsigned, T x, int by) {
  const int lane = int(threadIdx.x % 32);
  return emulator::from_lane(x, lane + by < 32 ? lane + by : lane);
}
inline int __reduce_min_sync(unsigned, int x) {
  const emulator::Words* all = emulator::warp_share({uint32_t(x)});
  int least = x;
  for (int lane = 0; lane < 32; lane++) least = std::min(least, int(all[lane][0]));
  emulator::warp_read();
  return least;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
  const emulator::Words* all = emulator::warp_share({x});
  uint32_t largest = 0;
  for (int lane = 0; lane < 32; lane++) largest = std::max(largest, all[lane][0]);
  emulator::warp_read();
  return largest;
}
inline bool __any_sync(unsigned mask, bool x) { return __reduce_max_sync(mask, x) != 0; }

// ---- in place of the kernels' assembly

namespace emulator {

inline unsigned char* shared_memory;  // the running kernel's; a shared address counts from its start

inline uint32_t address_of(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - shared_memory);
}
inline uint16_t load_16_bits(uint32_t address) {
  uint16_t x;
  std::memcpy(&x, shared_memory + address, 2);
  return x;
}
inline float number(uint16_t x, bool fp16) { return fp16 ? __half2float({x}) : __bfloat162float({x}); }
inline uint16_t half_of(uint32_t word, int which) { return uint16_t(word >> 16 * which); }

inline Pending& copies() { return fibers[size_t(current)].copies; }
inline Pending& products() { return fibers[size_t(current)].products; }
inline void copy(void* to, const void* from, size_t bytes, bool valid) {
  copies().add([=] {
    if (valid)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
  });
}
// cp.async.wait_all: of those in no group, too
inline void cp_async_wait_all() {
  copies().close();
  copies().do_all_but(0);
}

inline void ldmatrix(uint32_t (&r)[4], uint32_t address, bool transposed) {
  const Words* all = warp_share({address});
  const int g = int(threadIdx.x % 32 / 4), c = int(threadIdx.x % 4);
  for (int i = 0; i < 4; i++) {
    uint16_t x[2];
    for (int e = 0; e < 2; e++)
      x[e] = transposed ? load_16_bits(all[8 * i + 2 * c + e][0] + 2 * uint32_t(g))
                        : load_16_bits(all[8 * i + g][0] + 2 * uint32_t(2 * c + e));
    r[i] = x[0] | uint32_t(x[1]) << 16;
  }
  warp_read();
}

inline uint32_t transpose_8x8(uint32_t word) {
  const Words* all = warp_share({word});
  const int g = int(threadIdx.x % 32 / 4), c = int(threadIdx.x % 4);
  uint32_t out = 0;
  for (int e = 0; e < 2; e++) out |= uint32_t(half_of(all[4 * (2 * c + e) + g / 2][0], g % 2)) << 16 * e;
  warp_read();
  return out;
}

// A [16,16] of all lanes' operands, row g of this lane and row g + 8
inline void rows_of_a(float (&a)[2][16], const Words* all, bool fp16) {
  const int g = int(threadIdx.x % 32 / 4);
  for (int c = 0; c < 4; c++)
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < 2; e++)
        a[i % 2][2 * c + e + 8 * (i / 2)] = number(half_of(all[4 * g + c][size_t(i)], e), fp16);
}

// c [16,8] += a b, as mma.m16n8k16 (delta_rule_mma.cuh)
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool fp16) {
  const Words* all = warp_share({a[0], a[1], a[2], a[3], b0, b1});
  float rows[2][16];
  rows_of_a(rows, all, fp16);
  for (int e = 0; e < 4; e++) {
    const int column = 2 * int(threadIdx.x % 4) + e % 2;
    double sum = 0;
    for (int k = 0; k < 16; k++)
      sum += double(rows[e / 2][k]) *
             number(half_of(all[4 * column + k % 8 / 2][size_t(4 + k / 8)], k % 2), fp16);
    c[e] = float(c[e] + sum);
  }
  warp_read();
}

inline uint32_t swizzled_address(uint64_t descriptor, uint32_t offset) {
  const uint32_t address = (uint32_t(descriptor & 0x3fff) << 4) + offset;
  return address ^ (address >> 7 & 7) << 4;
}

// d [16 rows of this warp, 8 tiles columns] = sign a b, added to what was there if `add`, as wgmma.m64nNk16 with b [16, N]
// in shared memory, 128-byte swizzle; by_n: its rows are k (delta_rule_wgmma.cuh). rows: of a, row g of this lane and row
// g + 8.
inline void wgmma_of_rows(float (*d)[4], int tiles, const float (&rows)[2][16], uint64_t b, bool add, bool by_n, int sign,
                          bool fp16) {
  for (int t = 0; t < tiles; t++)
    for (int e = 0; e < 4; e++) {
      const uint32_t n = 8 * uint32_t(t) + 2 * (threadIdx.x % 4) + uint32_t(e) % 2;
      double sum = 0;
      for (uint32_t k = 0; k < 16; k++)
        sum += double(rows[e / 2][k]) *
               number(load_16_bits(swizzled_address(b, by_n ? 128 * k + 2 * n : 128 * n + 2 * k)), fp16);
      d[t][e] = float((add ? d[t][e] : 0) + sign * sum);
    }
  warp_read();
}
inline void wgmma_now(float (*d)[4], int tiles, const uint32_t (&a)[4], uint64_t b, bool add, bool by_n, int sign,
                      bool fp16) {
  const Words* all = warp_share({a[0], a[1], a[2], a[3]});
  float rows[2][16];
  rows_of_a(rows, all, fp16);
  wgmma_of_rows(d, tiles, rows, b, add, by_n, sign, fp16);
}
// The same, now or late. What d and a name has to be there until the wait.
inline void wgmma(float (*d)[4], int tiles, const uint32_t (&a)[4], uint64_t b, bool add, bool by_n, int sign) {
  const uint32_t(*operand)[4] = &a;
  products().add([=] { wgmma_now(d, tiles, *operand, b, add, by_n, sign, true); });
}
inline void wgmma_bf16(float (*d)[4], int tiles, const uint32_t (&a)[4], uint64_t b, bool add) {
  const uint32_t(*operand)[4] = &a;
  products().add([=] { wgmma_now(d, tiles, *operand, b, add, false, 1, false); });
}
// a [64, 16] in shared memory, too, its rows m.
inline void wgmma_bf16(float (*d)[4], int tiles, uint64_t a, uint64_t b, bool add) {
  products().add([=] {
    float rows[2][16];
    const uint32_t first = 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
    for (uint32_t i = 0; i < 32; i++)
      rows[i / 16][i % 16] =
          number(load_16_bits(swizzled_address(a, 128 * (first + i / 16 * 8) + 2 * (i % 16))), false);
    wgmma_of_rows(d, tiles, rows, b, add, false, 1, false);
  });
}

}  // namespace emulator

namespace gdn {

using act = __nv_bfloat16;

template <class Int>
constexpr Int divide_up(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace gdn
