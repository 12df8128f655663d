// wgmma (warpgroup matrix multiply, sm_90a) for the gated delta rule.
//
// wgmma.m64nNk16: warp w of the warpgroup has rows 16 w to 16 w + 15; A and accumulator fragments are those
// of mma.m16n8k16 (fragments.cuh). B, and A where it is not in registers, is read from shared tiles of [64
// rows, 64 columns] of 16-bit values with the 128-byte swizzle: 16-byte vector v of row r lies at v ^ (r %
// 8). A tile whose rows are n (or m) and whose columns are k is K-major; with rows k it is MN-major.
#pragma once

#include "../fragments.cuh"

namespace gdn {
namespace delta_rule {

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

}  // namespace delta_rule
}  // namespace gdn
