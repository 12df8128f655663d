// CUDA on a CPU, as far as the kernels of the gated delta rule need it (ptx_emulated.h has the instructions). A thread
// is a fiber; the threads of a block take turns and switch where they wait for each other or exchange registers. Blocks
// run one after another.
//
// It shows what a kernel computes, on machines without a GPU, not its speed. Asynchronous work (cp.async, TMA, wgmma)
// is done at once, or, if `late`, at the wait, with what registers and memory hold then. Which warp goes on is decided
// against the kernel (run_block). So a missing wait or barrier mostly shows in one of the two.
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
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../../gdn/shapes.h"

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
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
// As the GPU's: of two zeros +0 is the larger. (std::fmax may return either: -0, taken for a largest magnitude, has
// the largest bits.)
namespace emulator {
inline float max_of(float x, float y) {
  return x == 0 && y == 0 ? (std::signbit(x) ? y : x) : std::fmax(x, y);
}
inline float min_of(float x, float y) {
  return x == 0 && y == 0 ? (std::signbit(x) ? x : y) : std::fmin(x, y);
}
}  // namespace emulator
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(emulator::max_of(__low2float(a), __low2float(b)),
                               emulator::max_of(__high2float(a), __high2float(b)));
}
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(emulator::min_of(__low2float(a), __low2float(b)),
                               emulator::min_of(__high2float(a), __high2float(b)));
}
inline __nv_bfloat162 __hneg2(__nv_bfloat162 x) {
  return {{uint16_t(x.x.bits ^ 0x8000)}, {uint16_t(x.y.bits ^ 0x8000)}};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(__low2float(a) * __low2float(b), __high2float(a) * __high2float(b));
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(emulator::max_of(__half2float(a.x), __half2float(b.x)),
                           emulator::max_of(__half2float(a.y), __half2float(b.y)));
}
inline __half2 __hmin2(__half2 a, __half2 b) {
  return __floats2half2_rn(emulator::min_of(__half2float(a.x), __half2float(b.x)),
                           emulator::min_of(__half2float(a.y), __half2float(b.y)));
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
  Pending copies, products, stores;
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
inline Barrier block_barrier, warp_barriers[32], named_barriers[16];
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
inline Barrier& named_barrier(int which, int threads) {
  Barrier& barrier = named_barriers[which];
  if (barrier.count > 0 && barrier.size != threads)
    throw std::logic_error("a named barrier with two numbers of threads");
  barrier.size = threads;
  return barrier;
}

// bar.red.or: each phase clears the flag of the phase after the next, when nobody reads it any more.
inline bool any_of(int which, int threads, bool x) {
  static bool any[16][4];
  Barrier& barrier = named_barrier(which, threads);
  const int now = barrier.generation % 4;
  any[which][(now + 2) % 4] = false;
  any[which][now] |= x;
  wait(barrier);
  return any[which][now];
}

// An mbarrier and the TMA loads it waits for, by its address.
struct MBarrier {
  int arrivals, missing, bytes,
      parity;  // of the current phase: arrivals that are missing, bytes still to come
  std::deque<std::function<void()>> loads;
};
inline std::map<const uint64_t*, MBarrier> mbarriers;
inline MBarrier& mbarrier(const uint64_t* at) {
  const auto found = mbarriers.find(at);
  if (found == mbarriers.end()) throw std::logic_error("an mbarrier that was not initialised");
  return found->second;
}
inline void complete(MBarrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.parity ^= 1;
  steps++;
}
inline void arrive(MBarrier& barrier, int bytes) {
  if (barrier.missing == 0) throw std::logic_error("an arrival too many at an mbarrier");
  barrier.missing--;
  barrier.bytes += bytes;
  complete(barrier);
}
inline void load(const uint64_t* at, int bytes, const std::function<void()>& copy) {
  MBarrier& barrier = mbarrier(at);
  const auto arrived = [&barrier, bytes, copy] {
    copy();
    barrier.bytes -= bytes;
    complete(barrier);
  };
  if (late)
    barrier.loads.push_back(arrived);
  else
    arrived();
}
inline void wait(const uint64_t* at, int parity) {
  MBarrier& barrier = mbarrier(at);
  while (barrier.parity == parity) {
    if (barrier.missing == 0 && !barrier.loads.empty()) {
      const auto next = barrier.loads.front();
      barrier.loads.pop_front();
      next();
    } else {
      yield();
    }
  }
}

inline void run_block(int threads, const std::function<void()>& call) {
  kernel = call;
  mbarriers.clear();
  blockDim.x = unsigned(threads);
  block_barrier = {threads, 0, 0};
  for (Barrier& barrier : warp_barriers) barrier = {32, 0, 0};
  for (Barrier& barrier : named_barriers) barrier = {0, 0, 0};
  fibers.resize(size_t(threads));
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 17);
    fiber.begun = fiber.done = false;
    fiber.copies = fiber.products = fiber.stores = {};
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  // One warp, another in each block, goes as far as barriers let it; only then others move, first those of its
  // warpgroup: it is seen to overtake wherever nothing keeps it from it. Late, chance picks who moves.
  static unsigned blocks, chance = 1;
  const int warps = (threads + 31) / 32, in_fours = (warps + 3) / 4 * 4,
            leader = int(blocks++ % unsigned(warps));
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
    if (!fiber.copies.work.empty() || !fiber.products.work.empty() || !fiber.stores.work.empty())
      throw std::logic_error("copies or products that nobody waited for");
  for (const auto& [at, barrier] : mbarriers)
    if (!barrier.loads.empty() || barrier.bytes != 0)
      throw std::logic_error("TMA loads that nobody waited for");
  for (const Barrier& barrier : named_barriers)
    if (barrier.count != 0) throw std::logic_error("a named barrier that never completed");
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
inline unsigned __ballot_sync(unsigned, bool x) {
  const emulator::Words* all = emulator::warp_share({uint32_t(x)});
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; lane++) lanes |= unsigned(all[lane][0] != 0) << lane;
  emulator::warp_read();
  return lanes;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline bool __any_sync(unsigned mask, bool x) { return __reduce_max_sync(mask, x) != 0; }

namespace gdn {

using act = __nv_bfloat16;

template <class Int>
constexpr Int divide_up(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace gdn
