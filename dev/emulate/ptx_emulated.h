// The functions of gdn/kernels/ptx.cuh on a CPU, for a build with -DGDN_EMULATED (run.py).
#pragma once

#include "cuda_emulator.h"

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

// c [16,8] += a b, as mma.m16n8k16 (fragments.cuh)
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
// in shared memory, 128-byte swizzle; by_n: its rows are k (sm90/tiles.cuh). rows: of a, row g of this lane and row
// g + 8.
inline void wgmma_of_rows(float (*d)[4], int tiles, const float (&rows)[2][16], uint64_t b, bool add,
                          bool by_n, int sign, bool fp16) {
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
inline void wgmma_now(float (*d)[4], int tiles, const uint32_t (&a)[4], uint64_t b, bool add, bool by_n,
                      int sign, bool fp16) {
  const Words* all = warp_share({a[0], a[1], a[2], a[3]});
  float rows[2][16];
  rows_of_a(rows, all, fp16);
  wgmma_of_rows(d, tiles, rows, b, add, by_n, sign, fp16);
}
// The same, now or late. What d and a name has to be there until the wait.
inline void wgmma(float (*d)[4], int tiles, const uint32_t (&a)[4], uint64_t b, bool add, bool by_n,
                  int sign) {
  const uint32_t(*operand)[4] = &a;
  products().add([=] { wgmma_now(d, tiles, *operand, b, add, by_n, sign, true); });
}
inline void wgmma_bf16(float (*d)[4], int tiles, const uint32_t (&a)[4], uint64_t b, bool add) {
  const uint32_t(*operand)[4] = &a;
  products().add([=] { wgmma_now(d, tiles, *operand, b, add, false, 1, false); });
}
// The same with a in shared memory: rows m (K-major), or rows k if a_by_m.
inline void wgmma_shared(float (*d)[4], int tiles, uint64_t a, uint64_t b, bool add, bool a_by_m, bool by_n,
                         bool fp16) {
  products().add([=] {
    float rows[2][16];
    const uint32_t first = 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
    for (uint32_t i = 0; i < 32; i++) {
      const uint32_t m = first + i / 16 * 8, k = i % 16;
      rows[i / 16][k] =
          number(load_16_bits(swizzled_address(a, a_by_m ? 128 * k + 2 * m : 128 * m + 2 * k)), fp16);
    }
    wgmma_of_rows(d, tiles, rows, b, add, by_n, 1, fp16);
  });
}

inline void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
  const Words* all = warp_share({address});
  for (uint32_t i = 0; i < 4; i++)
    std::memcpy(shared_memory + all[8 * i + threadIdx.x % 32 / 4][0] + 4 * (threadIdx.x % 4), &r[i], 4);
  warp_read();
}

}  // namespace emulator

// A TMA descriptor: sizes and strides in elements of 16 bits, columns first; a box of 64 columns and, in dimension
// `rows`, 64; 128-byte swizzle.
struct CUtensorMap {
  unsigned char* data;
  int rank, rows;
  int64_t size[4], stride[4];
};

namespace emulator {

// f(bytes of the tile in shared memory, element in global memory or null where it is outside), 64 x 64 elements.
template <class F>
void for_each_of_box(const CUtensorMap& map, const std::array<int, 4>& first, const F& f) {
  for (int row = 0; row < 64; row++)
    for (int column = 0; column < 64; column++) {
      int64_t offset = 0;
      bool inside = true;
      for (int i = 0; i < map.rank; i++) {
        const int64_t at = first[size_t(i)] + (i == 0 ? column : i == map.rows ? row : 0);
        inside = inside && at < map.size[i];
        offset += at * map.stride[i];
      }
      f(128 * row + 16 * ((column / 8) ^ (row & 7)) + 2 * (column % 8),
        inside ? map.data + 2 * offset : nullptr);
    }
}
inline void load_box(void* to, const CUtensorMap* map, const std::array<int, 4>& first,
                     const uint64_t* barrier) {
  unsigned char* tile = static_cast<unsigned char*>(to);
  load(barrier, 2 * 64 * 64, [=] {
    for_each_of_box(*map, first, [&](int at, const unsigned char* from) {
      if (from)
        std::memcpy(tile + at, from, 2);
      else
        std::memset(tile + at, 0, 2);
    });
  });
}

}  // namespace emulator

namespace gdn {

inline uint32_t shared_address(const void* p) { return emulator::address_of(p); }

// ---- registers
inline int reload_thread_idx() { return int(threadIdx.x); }
template <class T>
void keep(T&) {}
template <int kRegisters>
void warpgroup_reg_dealloc() {}
template <int kRegisters>
void warpgroup_reg_alloc() {}

// ---- arithmetic
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1 / x; }

// ---- cp.async, global stores
inline void cp_async_16(void* to, const void* from, bool valid) { emulator::copy(to, from, 16, valid); }
inline void cp_async_4(void* to, const void* from) { emulator::copy(to, from, 4, true); }
inline void st_global_v4(void* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  const uint32_t words[4] = {x, y, z, w};
  std::memcpy(to, words, 16);
}
inline void cp_async_commit() { emulator::copies().close(); }
inline void cp_async_wait_all() { emulator::cp_async_wait_all(); }
inline void cp_async_wait_all_but_one() { emulator::copies().do_all_but(1); }

// ---- named barriers
inline void named_barrier_sync(int id, int threads) { emulator::wait(emulator::named_barrier(id, threads)); }
inline bool named_barrier_any(int id, int threads, bool x) { return emulator::any_of(id, threads, x); }
inline void named_barrier_arrive(int id, int threads) {
  emulator::arrive(emulator::named_barrier(id, threads));
}

// ---- ldmatrix, stmatrix, movmatrix
inline void ldmatrix(uint32_t (&r)[4], uint32_t address) { emulator::ldmatrix(r, address, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) { emulator::ldmatrix(r, address, true); }
inline void stmatrix(uint32_t address, const uint32_t (&r)[4]) { emulator::stmatrix(address, r); }
inline uint32_t transpose_8x8(uint32_t x) { return emulator::transpose_8x8(x); }

// ---- mma.sync
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma(c, a, b0, b1, false);
}
inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma(c, a, b0, b1, true);
}

// ---- wgmma
inline void wgmma_fence() {}
inline void wgmma_commit_group() { emulator::products().close(); }
template <int pending>
void wgmma_wait_group() {
  emulator::products().do_all_but(pending);
}
inline void fence_proxy_async() {}
template <class T>
void wgmma_fence_operand(T&) {}
enum Major { kMajorK = 0, kMajorMN = 1 };
template <Major kMajor, int kSign = 1>
void wgmma_64(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int add) {
  emulator::wgmma(d, 8, a, b, add, kMajor == kMajorMN, kSign);
}
template <Major kMajor, int kSign = 1>
void wgmma_32(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int add) {
  emulator::wgmma(d, 4, a, b, add, kMajor == kMajorMN, kSign);
}
inline void wgmma_32_bf16(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int add) {
  emulator::wgmma_bf16(d, 4, a, b, add);
}
inline void wgmma_32_bf16_shared(float (*d)[4], uint64_t a, uint64_t b, int add) {
  emulator::wgmma_shared(d, 4, a, b, add, false, false, false);
}
template <Major kA, Major kB>
void wgmma_64_shared(float (*d)[4], uint64_t a, uint64_t b, int add) {
  emulator::wgmma_shared(d, 8, a, b, add, kA == kMajorMN, kB == kMajorMN, true);
}
template <Major kA, Major kB>
void wgmma_32_shared(float (*d)[4], uint64_t a, uint64_t b, int add) {
  emulator::wgmma_shared(d, 4, a, b, add, kA == kMajorMN, kB == kMajorMN, true);
}

// ---- mbarriers and TMA
inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulator::mbarriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}
inline void mbarrier_arrive(uint64_t* barrier) { emulator::arrive(emulator::mbarrier(barrier), 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  emulator::arrive(emulator::mbarrier(barrier), bytes);
}
inline void mbarrier_wait(uint64_t* barrier, int parity) { emulator::wait(barrier, parity); }
inline void fence_mbarrier_init() {}
inline void tma_load_1d(void* to, const void* from, int bytes, uint64_t* barrier) {
  emulator::load(barrier, bytes, [=] { std::memcpy(to, from, size_t(bytes)); });
}
inline uint64_t evict_first_policy() { return 0; }
inline void tma_load_3d(void* to, const CUtensorMap* tensor, int column, int row, int matrix,
                        uint64_t* barrier, uint64_t) {
  emulator::load_box(to, tensor, {column, row, matrix, 0}, barrier);
}
inline void tma_load_4d(void* to, const CUtensorMap* tensor, int column, int head, int token, int sequence,
                        uint64_t* barrier) {
  emulator::load_box(to, tensor, {column, head, token, sequence}, barrier);
}
inline void tma_store_4d(const CUtensorMap* tensor, int column, int head, int token, int sequence,
                         const void* from) {
  emulator::fibers[size_t(emulator::current)].stores.add([=] {
    emulator::for_each_of_box(*tensor, {column, head, token, sequence}, [&](int at, unsigned char* to) {
      if (to) std::memcpy(to, static_cast<const unsigned char*>(from) + at, 2);
    });
  });
}
inline void tma_store_wait_read() {
  emulator::Pending& stores = emulator::fibers[size_t(emulator::current)].stores;
  stores.close();
  stores.do_all_but(0);
}

}  // namespace gdn
