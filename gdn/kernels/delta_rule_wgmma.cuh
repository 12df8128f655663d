// wgmma (warpgroup matrix multiply, sm_90a) for the gated delta rule.
//
// wgmma.m64nNk16: warp w of the warpgroup has rows 16 w to 16 w + 15; A and accumulator fragments are those
// of mma.m16n8k16 (fragments.cuh). B, and A where it is not in registers, is read from shared tiles of [64
// rows, 64 columns] of 16-bit values with the 128-byte swizzle: 16-byte vector v of row r lies at v ^ (r %
// 8). A tile whose rows are n (or m) and whose columns are k is K-major; with rows k it is MN-major.
#pragma once

#include "delta_rule_mma.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kTileRow = 64;  // columns of a tile
constexpr int kTileBytes = kChunk * 2 * kTileRow;

// Byte offset of a 16-byte vector in a swizzled tile.
__device__ inline int swizzled(int row, int vector) { return 2 * kTileRow * row + 16 * (vector ^ (row & 7)); }

// Shared-memory matrix descriptor of a 1024-byte aligned tile: 128-byte swizzle, 1024 bytes between groups of
// 8 rows. The address field counts 16 bytes: + 2 for 16 columns, + 128 for 16 rows, + 512 for a tile.
__device__ inline uint64_t make_smem_desc(const void* tile) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | kEightRows << 32 | kEightRows << 16 | shared_address(tile) >> 4;
}
constexpr int kColumns16 = 2, kRows16 = 128, kNextTile = kTileBytes >> 4;

// Descriptor offset of the i-th 16 columns in a row of tiles.
__device__ constexpr int columns_16(int i) { return i / 4 * kNextTile + i % 4 * kColumns16; }

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

#undef GDN_TILE

}  // namespace delta_rule
}  // namespace gdn
