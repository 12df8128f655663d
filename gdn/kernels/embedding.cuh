// Embedding: rows of a table gathered by token, and their gradients summed back per token.
#pragma once

#include "common.cuh"

namespace gdn {

constexpr int kEmbeddingThreads = 128;

// A block copies 8 rows, each thread one vector of eight columns in each.
// Floor at M = 32768, d = 1024: 67 MB out and 2 KB in for each distinct token; with 9.8 thousand of them 87
// MB, 0.0206 ms at the copy rate. Reached on an H200: 0.0287 ms, 72% of the copy rate.
static __global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_forward_kernel(act* __restrict__ x, const act* __restrict__ w_emb,
                             const int32_t* __restrict__ tokens, int rows, int width) {
  constexpr int kRows = 8;
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

inline void embedding_forward(Cuda& dev, act* x, const act* w_emb, const int32_t* tokens, int rows,
                              int width) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(width, "the width of the embedding");
  if (rows == 0) return;
  const dim3 grid(divide_up(rows, 8), divide_up(width, 8 * kEmbeddingThreads));
  embedding_forward_kernel<<<grid, kEmbeddingThreads, 0, dev.stream>>>(x, w_emb, tokens, rows, width);
  launched("embedding_forward");
}

// Backward. The sorted positions are cut into chunks of kSortedChunk; a run is the positions of one token. A
// run inside one chunk is added to dw_emb by that chunk's block. A run that crosses chunk borders leaves one
// partial sum in each of its chunks: in row 0 of the chunk where the run came in from the chunk before, in
// row 1 where it begins. A second kernel adds up each crossing run's partial sums in order.
constexpr int kSortedChunk = 32;

// dw_emb row += sum, eight columns
__device__ inline void add8(float* to, const float (&sum)[8]) {
  float total[8];
  load8(total, to);
  for (int i = 0; i < 8; i++) total[i] += sum[i];
  store8(to, total);
}

// Floor at M = 32768, d = 1024: 67 MB of dx, and 8 KB in and out of dw_emb for each distinct token; with 9.8
// thousand of them 148 MB, 0.0349 ms at the copy rate. Reached on an H200, by both kernels together: 0.0767
// ms, 45% of the copy rate.
static __global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_backward_chunks_kernel(float* __restrict__ dw_emb, float* __restrict__ partials,
                                     const act* __restrict__ dx, const int32_t* __restrict__ tokens,
                                     const int32_t* __restrict__ order, int rows, int width) {
  constexpr int kGroup = 8;  // rows loaded before the first is added
  __shared__ int32_t row_at[kSortedChunk];
  __shared__ int32_t token_at[kSortedChunk + 2];  // with the neighbours before and after; -1 past the ends
  const int begin = blockIdx.x * kSortedChunk, count = min(kSortedChunk, rows - begin);
  if (int(threadIdx.x) < kSortedChunk + 2) {
    const int position = begin + int(threadIdx.x) - 1;
    token_at[threadIdx.x] = position >= 0 && position < rows ? tokens[order[position]] : -1;
  }
  if (int(threadIdx.x) < count) row_at[threadIdx.x] = order[begin + threadIdx.x];
  __syncthreads();
  const int column = (blockIdx.y * kEmbeddingThreads + threadIdx.x) * 8;
  if (column >= width) return;

  const int32_t* token = token_at + 1;
  bool came_in = token[-1] == token[0];  // the current run began in an earlier chunk
  float sum[8] = {};
  for (int first = 0; first < count; first += kGroup) {
    uint4 packed[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; i++)
      if (first + i < count) packed[i] = load16(dx + int64_t(row_at[first + i]) * width + column);
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
      const int position = first + i;
      if (position >= count) break;
      float value[8];
      unpack8(value, packed[i]);
      for (int c = 0; c < 8; c++) sum[c] += value[c];
      const bool run_ends = token[position] != token[position + 1];
      if (!run_ends && position + 1 < count) continue;
      if (run_ends && !came_in)
        add8(dw_emb + int64_t(token[position]) * width + column, sum);
      else
        store8(partials + (int64_t(blockIdx.x) * 2 + (came_in ? 0 : 1)) * width + column, sum);
      came_in = false;
      for (int c = 0; c < 8; c++) sum[c] = 0;
    }
  }
}

// The block of the chunk in which a crossing run begins adds up the run; the other blocks have nothing to do.
static __global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_backward_runs_kernel(float* __restrict__ dw_emb, const float* __restrict__ partials,
                                   const int32_t* __restrict__ tokens, const int32_t* __restrict__ order,
                                   int rows, int width) {
  const int column = (blockIdx.y * kEmbeddingThreads + threadIdx.x) * 8;
  const int begin = blockIdx.x * kSortedChunk, end = begin + kSortedChunk;
  if (column >= width || end >= rows) return;
  const int32_t token = tokens[order[end - 1]];
  if (tokens[order[end]] != token) return;  // no run leaves this chunk
  if (begin > 0 && tokens[order[begin]] == token && tokens[order[begin - 1]] == token)
    return;  // it began earlier

  // The run goes through all chunks whose first position holds its token; these are found by bisection.
  int inside = blockIdx.x + 1, outside = divide_up(rows, kSortedChunk);
  while (outside - inside > 1) {
    const int middle = (inside + outside) / 2;
    (tokens[order[middle * kSortedChunk]] == token ? inside : outside) = middle;
  }
  float sum[8];
  load8(sum, partials + (int64_t(blockIdx.x) * 2 + 1) * width + column);
#pragma unroll 4
  for (int chunk = blockIdx.x + 1; chunk < outside; chunk++) {
    float value[8];
    load8(value, partials + int64_t(chunk) * 2 * width + column);
    for (int c = 0; c < 8; c++) sum[c] += value[c];
  }
  add8(dw_emb + int64_t(token) * width + column, sum);
}

inline size_t embedding_backward_scratch_bytes(Cuda&, int rows, int width) {
  return size_t(divide_up(rows, kSortedChunk)) * 2 * width * sizeof(float);
}

inline void embedding_backward(Cuda& dev, float* dw_emb, const act* dx, const int32_t* tokens,
                               const int32_t* order, int rows, int width, void* scratch) {
  Range<Cuda> range(dev, __func__);
  require_multiple_of_8(width, "the width of the embedding");
  if (rows == 0) return;
  float* partials = static_cast<float*>(scratch);
  const dim3 grid(divide_up(rows, kSortedChunk), divide_up(width, 8 * kEmbeddingThreads));
  embedding_backward_chunks_kernel<<<grid, kEmbeddingThreads, 0, dev.stream>>>(dw_emb, partials, dx, tokens,
                                                                               order, rows, width);
  launched("embedding_backward_chunks");
  embedding_backward_runs_kernel<<<grid, kEmbeddingThreads, 0, dev.stream>>>(dw_emb, partials, tokens, order,
                                                                             rows, width);
  launched("embedding_backward_runs");
}

}  // namespace gdn
