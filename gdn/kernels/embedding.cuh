// Embedding: x_m = w_emb[token_m]; backward dw_emb[v] += the sum of dx_m over the rows m of token v, in an
// order that depends on the tokens alone (no atomics).
//
// Times: NVIDIA H100, dev/results/layer_speed/h100_d1024.txt; %: of the rate of a copy of as many bytes.
#pragma once

#include "common.cuh"

namespace gdn {

constexpr int kEmbeddingThreads = 128, kEmbeddingRows = 4;

// A block copies 4 rows, a thread eight columns of each, all four loads in flight before the first store.
//
// M = 32768, d = 1024, 9.8 thousand distinct tokens: 67 MB out and 2 KB in for each of these, 87 MB, 0.0290
// ms at the copy rate; measured 0.0351 ms, 83%.
static __global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_forward_kernel(act* __restrict__ x, const act* __restrict__ w_emb,
                             const int32_t* __restrict__ tokens, int rows, int width) {
  constexpr int kRows = kEmbeddingRows;
  const int column = (blockIdx.y * kEmbeddingThreads + threadIdx.x) * 8, first = blockIdx.x * kRows;
  if (column >= width) return;
  uint4 packed[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++)
    if (first + i < rows) packed[i] = load16(w_emb + int64_t(tokens[first + i]) * width + column);
#pragma unroll
  for (int i = 0; i < kRows; i++)
    if (first + i < rows) store16(x + int64_t(first + i) * width + column, packed[i]);
}

void embedding_forward(Cuda& dev, act* x, const act* w_emb, const int32_t* tokens, int rows, int width) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(width, "the width of the embedding");
  if (rows == 0) return;
  const dim3 grid(divide_up(rows, kEmbeddingRows), divide_up(width, 8 * kEmbeddingThreads));
  embedding_forward_kernel<<<grid, kEmbeddingThreads, 0, dev.stream>>>(x, w_emb, tokens, rows, width);
  launched("embedding_forward");
}

// Backward: a segmented sum. The rows, sorted by token, are cut into chunks of equal length, a block each; a
// run is the rows of one token. The first kernel adds a run that lies inside one chunk to dw_emb. A run that
// crosses a chunk's border leaves a partial sum in each of its chunks (partials [chunks,2,d]): in row 0 where
// it continues from the chunk before, in row 1 where it begins. The second kernel adds up each crossing run's
// partial sums in order. A thread owns four columns.
constexpr int kLongestSortedChunk = 128;

// Longer chunks leave fewer partial sums; a narrow model needs more blocks.
inline int sorted_chunk(int width) { return width >= 768 ? kLongestSortedChunk : kLongestSortedChunk / 2; }

constexpr int kEmbeddingBackwardThreads = 256;

inline int embedding_backward_threads(int width) {
  return width >= 4 * kEmbeddingBackwardThreads ? kEmbeddingBackwardThreads : divide_up(width / 4, 32) * 32;
}

__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ inline float4 add4(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline float4 unpack4(uint2 v) {
  return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
                     __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u));
}

// First kernel. The rows of dx of kGroup sorted rows, and the rows of dw_emb whose runs end among them, are
// all loaded before the first is added: rare tokens end a run at every row, and loaded one after another each
// would wait for memory. M = 32768, d = 1024, 9.8 thousand distinct tokens, both kernels: 67 MB of dx, and 8
// KB in and out of dw_emb for each distinct token, 148 MB, 0.0491 ms at the copy rate; measured 0.0652 ms,
// 75%.
static __global__ void __launch_bounds__(kEmbeddingBackwardThreads)
    embedding_backward_chunks_kernel(float* __restrict__ dw_emb, float* __restrict__ partials,
                                     const act* __restrict__ dx, const int32_t* __restrict__ tokens,
                                     const int32_t* __restrict__ order, int rows, int width, int chunk) {
  constexpr int kGroup = 8;
  __shared__ int32_t row_at[kLongestSortedChunk];
  __shared__ int32_t
      token_at[kLongestSortedChunk + 2];  // with the neighbours before and after; -1 past the ends
  const int begin = blockIdx.x * chunk, count = min(chunk, rows - begin);
  for (int i = int(threadIdx.x); i < count + 2; i += int(blockDim.x)) {
    const int position = begin + i - 1;
    const int32_t row = position >= 0 && position < rows ? order[position] : -1;
    if (i >= 1 && i <= count) row_at[i - 1] = row;
    token_at[i] = row >= 0 ? tokens[row] : -1;
  }
  __syncthreads();
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
  if (column >= width) return;

  const int32_t* token = token_at + 1;
  const int32_t before = token[-1];  // the run of this token came in
  float4 sum = make_float4(0, 0, 0, 0);
  for (int first = 0; first < count; first += kGroup) {
    uint2 packed[kGroup];
    float4 old[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      const int p = first + i;
      if (p >= count) break;
      packed[i] = *reinterpret_cast<const uint2*>(dx + int64_t(row_at[p]) * width + column);
      if (token[p] != token[p + 1] && token[p] != before)
        old[i] = load4(dw_emb + int64_t(token[p]) * width + column);
    }
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      const int p = first + i;
      if (p >= count) break;
      sum = add4(sum, unpack4(packed[i]));
      const bool run_ends = token[p] != token[p + 1], came_in = token[p] == before;
      if (!run_ends && p + 1 < count) continue;
      if (run_ends && !came_in)
        store4(dw_emb + int64_t(token[p]) * width + column, add4(old[i], sum));
      else
        store4(partials + (int64_t(blockIdx.x) * 2 + (came_in ? 0 : 1)) * width + column, sum);
      sum = make_float4(0, 0, 0, 0);
    }
  }
}

// Second kernel. The block of the chunk in which a crossing run begins adds up the run; the others return at
// once.
static __global__ void __launch_bounds__(kEmbeddingBackwardThreads)
    embedding_backward_runs_kernel(float* __restrict__ dw_emb, const float* __restrict__ partials,
                                   const int32_t* __restrict__ tokens, const int32_t* __restrict__ order,
                                   int rows, int width, int chunk) {
  const int begin = blockIdx.x * chunk, end = begin + chunk;
  if (end >= rows) return;
  const int32_t token = tokens[order[end - 1]];
  if (tokens[order[end]] != token) return;  // no run leaves this chunk
  if (begin > 0 && tokens[order[begin]] == token && tokens[order[begin - 1]] == token)
    return;  // it began earlier

  // The run goes through the chunks from here to the first whose first position has another token.
  int outside = int(blockIdx.x) + 1, more = int(blockDim.x);
  while (more == int(blockDim.x)) {
    const int64_t first = int64_t(outside + int(threadIdx.x)) * chunk;
    more = __syncthreads_count(first < rows && tokens[order[first]] == token);
    outside += more;
  }
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
  if (column >= width) return;
  float4 sum = load4(partials + (int64_t(blockIdx.x) * 2 + 1) * width + column);
#pragma unroll 8
  for (int i = blockIdx.x + 1; i < outside; i++)
    sum = add4(sum, load4(partials + int64_t(i) * 2 * width + column));
  float* to = dw_emb + int64_t(token) * width + column;
  store4(to, add4(load4(to), sum));
}

size_t embedding_backward_scratch_bytes(Cuda&, int rows, int width) {
  return size_t(divide_up(rows, sorted_chunk(width))) * 2 * width * sizeof(float);
}

void embedding_backward(Cuda& dev, float* dw_emb, const act* dx, const int32_t* tokens, const int32_t* order,
                        int rows, int width, void* scratch) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(width, "the width of the embedding");
  if (rows == 0) return;
  float* partials = static_cast<float*>(scratch);
  const int chunk = sorted_chunk(width), threads = embedding_backward_threads(width);
  const dim3 grid(divide_up(rows, chunk), divide_up(width, 4 * threads));
  embedding_backward_chunks_kernel<<<grid, threads, 0, dev.stream>>>(dw_emb, partials, dx, tokens, order,
                                                                     rows, width, chunk);
  launched("embedding_backward_chunks");
  embedding_backward_runs_kernel<<<grid, threads, 0, dev.stream>>>(dw_emb, partials, tokens, order, rows,
                                                                   width, chunk);
  launched("embedding_backward_runs");
}

}  // namespace gdn
