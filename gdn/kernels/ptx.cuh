// All inline PTX of the kernels, one function an instruction, under the names that CUTLASS and the PTX manual
// use. dev/emulate/ptx_emulated.h has the same functions for the CPU.
#pragma once

#ifdef GDN_EMULATED
#include "../../dev/emulate/ptx_emulated.h"
#else

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../cuda_device.cuh"

namespace gdn {

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- registers

// Re-reads %tid.x: keeps address arithmetic from being hoisted out of the chunk loop, where it would cost
// registers.
__device__ inline int reload_thread_idx() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// Nanoseconds of the GPU's clock.
__device__ inline int64_t global_timer() {
  int64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// Makes a pointer opaque to the compiler, so that it stays in a register instead of being recomputed.
template <class T>
__device__ inline void keep(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ inline void keep(int& x) { asm volatile("" : "+r"(x)); }

// setmaxnreg: registers a thread of this warpgroup from here on, fewer (dealloc) or more (alloc).
template <int kRegisters>
__device__ inline void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- arithmetic

// 2^x, relative error at most 2^-22; 0 below 2^-126.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, relative error at most 2^-23; subnormal results are 0.
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- cp.async, global stores

// cp.async of 16 bytes from global to shared memory; zero-fill where !valid.
__device__ inline void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The same copy from an address in the global state space (__cvta_generic_to_global).
__device__ inline void cp_async_16(void* to, size_t from, bool valid) {
  cp_async_16(to, reinterpret_cast<const void*>(from), valid);
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

// cp.async of 4 bytes; zero-fill where !valid. from: an address in the global state space.
__device__ inline void cp_async_4(void* to, size_t from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
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

// ---- ldmatrix, stmatrix, movmatrix

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

// movmatrix: transposes an 8x8 matrix of 16-bit values held as one register a lane, (row g, columns 2c,
// 2c+1).
__device__ inline uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ inline void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// stmatrix of four 8x8 matrices, transposed (sm_90).
__device__ inline void stmatrix_transposed(uint32_t address, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// ---- mma.sync

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

// ---- wgmma (sm_90a)

// wgmma.fence: orders earlier register accesses before the wgmma that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: all but the newest `pending` groups are complete.
template <int pending>
__device__ inline void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// fence.proxy.async: this thread's earlier stores to shared memory become visible to wgmma and TMA (the async
// proxy) after the next barrier.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Empty asm with the registers as operands: keeps the compiler from moving accesses to registers that an
// asynchronous wgmma reads or writes.
template <int kTiles>
__device__ inline void wgmma_fence_operand(float (&x)[kTiles][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(x[t][e])::"memory");
}

__device__ inline void wgmma_fence_operand(uint32_t (&a)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) asm volatile("" : "+r"(a[e])::"memory");
}

template <int kFragments>
__device__ inline void wgmma_fence_operand(uint32_t (&a)[kFragments][4]) {
#pragma unroll
  for (int t = 0; t < kFragments; t++) wgmma_fence_operand(a[t]);
}

enum Major { kMajorK = 0, kMajorMN = 1 };

#define GDN_TILE(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])

// d [64,64] (eight accumulator tiles) = kSign a b + (add ? d : 0); fp16, a from registers.
template <Major kMajor, int kSign = 1>
__device__ inline void wgmma_64(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, %39, 1, %38;\n}\n"
      : GDN_TILE(0), GDN_TILE(1), GDN_TILE(2), GDN_TILE(3), GDN_TILE(4), GDN_TILE(5), GDN_TILE(6), GDN_TILE(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(kMajor)), "n"(kSign));
}

// d [64,32] = kSign a b + (add ? d : 0); fp16, a from registers.
template <Major kMajor, int kSign = 1>
__device__ inline void wgmma_32(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, p, %23, 1, %22;\n}\n"
      : GDN_TILE(0), GDN_TILE(1), GDN_TILE(2), GDN_TILE(3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(kMajor)), "n"(kSign));
}

// d [64,32] = a b + (add ? d : 0); bf16, a from registers, b K-major.
__device__ inline void wgmma_32_bf16(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"
      : GDN_TILE(0), GDN_TILE(1), GDN_TILE(2), GDN_TILE(3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// d [64,32] = a b + (add ? d : 0); bf16, a and b K-major in shared memory.
__device__ inline void wgmma_32_bf16_shared(float (*d)[4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1, 0, 0;\n}\n"
      : GDN_TILE(0), GDN_TILE(1), GDN_TILE(2), GDN_TILE(3)
      : "l"(a), "l"(b), "r"(add));
}

// d [64,64] = a b + (add ? d : 0), fp16, a and b in shared memory; a: kMajorK [m][k], kMajorMN [k][m].
template <Major kA, Major kB>
__device__ inline void wgmma_64_shared(float (*d)[4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, %35, %36;\n}\n"
      : GDN_TILE(0), GDN_TILE(1), GDN_TILE(2), GDN_TILE(3), GDN_TILE(4), GDN_TILE(5), GDN_TILE(6), GDN_TILE(7)
      : "l"(a), "l"(b), "r"(add), "n"(int(kA)), "n"(int(kB)));
}

// d [64,32] = a b + (add ? d : 0), fp16, a and b in shared memory.
template <Major kA, Major kB>
__device__ inline void wgmma_32_shared(float (*d)[4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1, %19, %20;\n}\n"
      : GDN_TILE(0), GDN_TILE(1), GDN_TILE(2), GDN_TILE(3)
      : "l"(a), "l"(b), "r"(add), "n"(int(kA)), "n"(int(kB)));
}

#undef GDN_TILE

// ---- mbarriers and TMA (sm_90)

__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and the phase also waits for `bytes` bytes of TMA loads.
__device__ inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Spins until the mbarrier's phase of this parity has completed; a fresh mbarrier counts parity 1 as
// completed.
__device__ inline void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// TMA load of `bytes` contiguous bytes (a multiple of 16).
__device__ inline void tma_load_1d(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// L2 cache policy evict_first, for data that is read once.
__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// TMA load of a box of a 3D tensor (columns, rows, matrix), with an L2 policy.
__device__ inline void tma_load_3d(void* to, const CUtensorMap* tensor, int column, int row, int matrix,
                                   uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(tensor), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// TMA load of a box of a 4D tensor (columns, head, token, sequence): 64 columns of 64 tokens.
__device__ inline void tma_load_4d(void* to, const CUtensorMap* tensor, int column, int head, int token,
                                   int sequence, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4, %5}], [%6];" ::"r"(shared_address(to)),
      "l"(tensor), "r"(column), "r"(head), "r"(token), "r"(sequence), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void tma_store_4d(const CUtensorMap* tensor, int column, int head, int token, int sequence,
                                    const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
          tensor),
      "r"(column), "r"(head), "r"(token), "r"(sequence), "r"(shared_address(from))
      : "memory");
}

// Commits this thread's TMA stores and waits until they have read shared memory.
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Makes initialised mbarriers visible to the async proxy (TMA).
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace gdn

#endif  // GDN_EMULATED
