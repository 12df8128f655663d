// The two sequential kernels on mma.sync: (F1)-(F4) over the chunks forward, (B1)-(B3) over the chunks
// backward (dev/doc/delta_rule.md). Used on every GPU but Hopper.
//
// Each warp owns 16 columns of the state and keeps them transposed, [16 of dv, dk], in fp32 accumulators for
// the whole sequence. Transposed, every product of a chunk has the state, or the result of the previous
// product, as its A operand, already in registers; B operands are Q, K, N, P in shared memory. Operands are
// fp16: q, k, N and P are small numbers by nature; what a warp holds carries a power-of-two scale factor 2^e
// that brings its largest magnitude near 1. e is constant within a chunk, changes rarely, and is stored with
// what is saved. Warps exchange nothing; the warps of a CTA share the loads.
#pragma once

#include "../pass_common.cuh"

namespace gdn {
namespace delta_rule {

// Converts a tile that copy_tile brought from bf16 to fp16 in place: each thread the vectors that it copied
// itself, after its own cp.async have arrived.
__device__ inline void convert_own_copies_to_fp16(act* tile, int ld, int columns) {
  for_each_vector_of_thread(columns, blockDim.x,
                            [&](int row, int vector) { to_fp16(tile + row * ld + 8 * vector, 1.f); });
}

// N and P packed into one tile of 64 rows of five 16x16 blocks: block N_ij at (i, j), block P_ij at (3 - i, 4
// - i + j), in the half that N's lower triangle leaves free.
__device__ constexpr int block_of_n(int i, int j) { return 16 * (i * kPackedStride + j); }

__device__ constexpr int block_of_p(int i, int j) { return 16 * ((3 - i) * kPackedStride + 4 - i + j); }

// One stage of the cp.async pipeline: a chunk's inputs. `values` is V in the forward and dO in the backward;
// its tile also stages results on their way to global memory, each warp in its own 16 columns.
struct Sm80Stage {
  act* q;            // [64, DK + 8], zeros from column dk on; arrives as bf16 and becomes fp16
  act* k;            // the same
  act* values;       // [64, 16 warps + 8]
  __half* matrices;  // N and P: [64, kPackedStride]
  float* gates;      // [4, 64]
};

template <int DK>
__device__ inline Sm80Stage pass_stage(unsigned char* shared, int index, int warps) {
  Sm80Stage stage;
  stage.q = reinterpret_cast<act*>(shared + index * pass_stage_bytes(DK, warps));
  stage.k = stage.q + kChunk * (DK + 8);
  stage.values = stage.k + kChunk * (DK + 8);
  stage.matrices = reinterpret_cast<__half*>(stage.values + kChunk * (16 * warps + 8));
  stage.gates = reinterpret_cast<float*>(stage.matrices + kPackedElements);
  return stage;
}

// The CTA issues cp.async of N and P: the 16x16 blocks on and below the diagonal (prepare_kernel writes no
// others).
__device__ inline void copy_lower_blocks(__half* to, const __half* from) {
  for (int i = threadIdx.x; i < 2 * kMatrixElements / 8; i += blockDim.x) {
    const int row = i / (kChunk / 8) % kChunk, column = 8 * (i % (kChunk / 8)), block_row = row / 16;
    const int block = i < kMatrixElements / 8 ? block_of_n(block_row, 0) : block_of_p(block_row, 0);
    if (column / 16 <= block_row)
      cp_async_16(to + block + row % 16 * kPackedStride + column, from + 8 * i, true);
  }
}

// The CTA issues cp.async of a chunk's inputs.
template <int DK>
__device__ inline void copy_chunk(const Sm80Stage& stage, const PassInputs& in, const PassBlock& block,
                                  const Sizes& size, int chunk) {
  const int64_t row = size.first_row(block.b, chunk), number = size.chunk_number(block.b, block.h, chunk);
  const int n = size.rows_in(chunk), columns = 16 * block.warps;
  const int q_stride = in.q.row_stride, k_stride = in.k.row_stride, values_stride = in.values.row_stride;
  copy_tile(stage.q, DK + 8, in.q.head(block.hk) + row * q_stride, q_stride, size.dk, n, size.dk);
  copy_tile(stage.k, DK + 8, in.k.head(block.hk) + row * k_stride, k_stride, size.dk, n, size.dk);
  copy_tile(stage.values, columns + 8, in.values.head(block.h) + row * values_stride + block.first_column,
            values_stride, columns, n, size.dv - block.first_column);
  copy_lower_blocks(stage.matrices, in.matrices + number * 2 * kMatrixElements);
  for (int i = threadIdx.x; i < kGates / 4; i += blockDim.x)
    cp_async_16(stage.gates + 4 * i, in.gates + number * kGates + 4 * i, true);
  cp_async_commit();
}

// Waits for this thread's cp.async of a chunk and converts its part of q and k to fp16; the CTA must
// synchronise before reading.
template <int DK>
__device__ inline void wait_and_convert_chunk(const Sm80Stage& stage, const Sizes& size) {
  cp_async_wait_all();
  convert_own_copies_to_fp16(stage.q, DK + 8, size.dk);
  convert_own_copies_to_fp16(stage.k, DK + 8, size.dk);
}

// c [16,64] += a b^T over 16 columns of dk; address: lane_address_columns_first of b, rows [64,dk].
__device__ inline void add_times_rows(float (&c)[8][4], const uint32_t (&a)[4], uint32_t address, int ld) {
  uint32_t b[4][4];
#pragma unroll
  for (int t = 0; t < 4; t++) ldmatrix(b[t], address + 2 * 16 * t * ld);
#pragma unroll
  for (int t = 0; t < 4; t++) mma_pair(c[2 * t], c[2 * t + 1], a, b[t]);
}

// Writes 32 columns of the warp's state, held as two A fragments, to rows [16 of dv, dk] of `to`.
__device__ inline void store_32_of_state(__half* to, int dk, int column, const uint32_t (&left)[4],
                                         const uint32_t (&right)[4]) {
  __half* row = to + (threadIdx.x % 32) / 4 * dk + column;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t w[4] = {left[half], left[half + 2], right[half], right[half + 2]};
    store_32_columns(row + 8 * half * dk, w, dk - column);
  }
}

// One pass over the state [16 of dv, dk], so that it is rounded to fp16 once:
//   from_k [16,64] += state K^T      from_q [16,64] += state Q^T (kWithQ)
// The fp16 state goes to `to`, rows [16 of dv, dk], unless that is null.
template <int DK, bool kWithQ>
__device__ inline void read_state(float (&from_k)[8][4], float (&from_q)[8][4],
                                  const float (&state)[DK / 8][4], const act* k, const act* q, __half* to,
                                  int dk) {
  const uint32_t k_columns = lane_address_columns_first(k, DK + 8),
                 q_columns = lane_address_columns_first(q, DK + 8);
#pragma unroll
  for (int e = 0; e < DK / 32; e++) {
    uint32_t a[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = 2 * e + half;
      pack_a_fragment(a[half], state[2 * at], state[2 * at + 1]);
      add_times_rows(from_k, a[half], k_columns + 2 * 16 * at, DK + 8);
      if (kWithQ) add_times_rows(from_q, a[half], q_columns + 2 * 16 * at, DK + 8);
    }
    if (to) store_32_of_state(to, dk, 32 * e, a[0], a[1]);
  }
}

// state [16,dk] += a [16, 16 tokens] rows [16 tokens, dk]; address: lane_address_rows_first of the 16 rows.
template <int DK>
__device__ inline void add_16_rows(float (&state)[DK / 8][4], const uint32_t (&a)[4], uint32_t address) {
#pragma unroll
  for (int e = 0; e < DK / 16; e++) {
    uint32_t b[4];
    ldmatrix_transposed(b, address + 2 * 16 * e);
    mma_pair(state[2 * e], state[2 * e + 1], a, b);
  }
}

// stage_tokens, then write_tokens.
template <class T>
__device__ inline void store_tokens(T* to, int64_t stride, int n, act* staging, int ld,
                                    const float (&x)[8][4], float factor) {
  stage_tokens<T>(staging, ld, x, factor);
  write_tokens(to, stride, n, staging, ld);
}

// Loads the warp's 16 rows [dk] of a fp32 state, row 0 at `from`, into accumulators; zeros if `from` is null.
template <int DK>
__device__ inline void load_state(float (&state)[DK / 8][4], const float* from, int dk) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const bool valid = from && 8 * t < dk;
      const float2 x = valid ? *reinterpret_cast<const float2*>(from + (g + 8 * half) * dk + 8 * t + c)
                             : make_float2(0.f, 0.f);
      state[t][2 * half] = x.x;
      state[t][2 * half + 1] = x.y;
    }
}

// Stores factor * state to rows [16, dk] of `to`.
template <int DK>
__device__ inline void store_state(float* to, const float (&state)[DK / 8][4], float factor, int dk) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (8 * t < dk)
        *reinterpret_cast<float2*>(to + (g + 8 * half) * dk + 8 * t + c) =
            make_float2(factor * state[t][2 * half], factor * state[t][2 * half + 1]);
}

// Rows `row` to row + 15 of the identity matrix as accumulators.
template <int DK>
__device__ inline void unit_state(float (&state)[DK / 8][4], int row) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) state[t][e] = 8 * t + c + e % 2 == row + g + 8 * (e / 2) ? 1.f : 0.f;
}

// Stores factor * state as rows `row` to row + 15 of M^T [dk,dk], and transposed to M behind it.
template <int DK>
__device__ inline void store_transition(float* to, const float (&state)[DK / 8][4], float factor, int row,
                                        int dk) {
  store_state<DK>(to + row * dk, state, factor, dk);
  const int lane = threadIdx.x % 32, g = lane / 4, c = 2 * (lane % 4);
  float* transposed = to + dk * dk + row;
#pragma unroll
  for (int t = 0; t < DK / 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (8 * t < dk) transposed[(8 * t + c + e % 2) * dk + g + 8 * (e / 2)] = factor * state[t][e];
}

// (F1), (F2): E = R - N (beta * R), in place from c = K S.
__device__ inline void solve_forward(float (&c)[8][4], const Sm80Stage& stage, uint32_t v_columns, int ld,
                                     float unit) {
  residuals(c, stage.gates, v_columns, ld, unit);
  // The last 16 tokens first: row block p of N only reads tokens of blocks <= p, which are still R.
  const uint32_t n_columns = lane_address_columns_first(stage.matrices, kPackedStride);
#pragma unroll
  for (int p = 3; p >= 0; p--) {
    uint32_t a[4];
    pack_scaled_a_fragment(a, c[2 * p], c[2 * p + 1], stage.gates + kBeta * kChunk, 16 * p, -1.f);
#pragma unroll
    for (int t = p; t < 4; t++) {
      uint32_t b[4];
      ldmatrix(b, n_columns + 2 * block_of_n(t, p));
      mma_pair(c[2 * t], c[2 * t + 1], a, b);
    }
  }
}

// (F3), intra-chunk part: out [16 of dv, 64 tokens] += (beta * E) P^T, written = beta * E.
__device__ inline void add_intra_chunk(float (&out)[8][4], const float (&written)[8][4],
                                       const Sm80Stage& stage) {
  const uint32_t p_columns = lane_address_columns_first(stage.matrices, kPackedStride);
#pragma unroll
  for (int p = 0; p < 4; p++) {
    uint32_t a[4];
    pack_a_fragment(a, written[2 * p], written[2 * p + 1]);
#pragma unroll
    for (int t = p; t < 4; t++) {
      uint32_t b[4];
      ldmatrix(b, p_columns + 2 * block_of_p(t, p));
      mma_pair(out[2 * t], out[2 * t + 1], a, b);
    }
  }
}

// (F1)-(F4) over the chunks of a split. One CTA: a sequence, a value head, a slice of dv. Two cp.async
// stages, a chunk's loads overlapping the products of the chunk before; or one stage, filled between the
// chunks, where shared memory is short (schedule.h). Writes o and, unless null, Saved.
//
// Lower bound at B=32, T=1024, H=6, dk=128, dv=256: reads q, k, v, N, P 0.24 GB, writes o, states, E 0.40 GB;
// 52 GFLOP. H100: 0.327 ms (dev/results/layer_speed): shared memory is busy half of the cycles with
// operands that every warp loads for itself.
template <int DK, int kStages>
__global__ void __launch_bounds__(32 * kMaxPassWarps, pass_blocks(DK))
    forward_pass_kernel(PassInputs in, HeadRows<act> o, Saved saved, Sizes size, Splits splits, float s) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(GDN_EMULATED)
  extern __shared__ __align__(16) unsigned char shared[];
  const PassBlock block = pass_block(size, splits, 0, splits.count, blockDim.x / 32);
  const int warp = threadIdx.x / 32, ld = 16 * block.warps + 8, column = block.first_column + 16 * warp;
  const bool active = column < size.dv;
  clear_shared(shared, kStages * pass_stage_bytes(DK, block.warps));
  __syncthreads();
  copy_chunk<DK>(pass_stage<DK>(shared, block.first_chunk & (kStages - 1), block.warps), in, block, size,
                 block.first_chunk);

  float state[DK / 8][4] = {};
  if (active)
    if (const float* from = state_before(in, block, size, splits, block.split > 0, column))
      load_state<DK>(state, from, size.dk);
  int exponent = 0;  // of the state's unit, 2^exponent
  for (int chunk = block.first_chunk; chunk < block.end_chunk; chunk++) {
    const Sm80Stage stage = pass_stage<DK>(shared, chunk & (kStages - 1), block.warps);
    if (kStages == 1 && chunk > block.first_chunk) {
      __syncthreads();  // all are done with the stage
      copy_chunk<DK>(stage, in, block, size, chunk);
    }
    wait_and_convert_chunk<DK>(stage, size);
    __syncthreads();
    if (kStages == 2 && chunk + 1 < block.end_chunk)
      copy_chunk<DK>(pass_stage<DK>(shared, (chunk + 1) & (kStages - 1), block.warps), in, block, size,
                     chunk + 1);
    if (!active) continue;
    const int64_t number = size.chunk_number(block.b, block.h, chunk), row = size.first_row(block.b, chunk);
    const int64_t stride = size.value_stride(), out = row * stride + block.h * size.dv + column;
    const int n = size.rows_in(chunk);
    act* staging = stage.values + 16 * warp;
    const uint32_t v_columns = lane_address_columns_first(staging, ld);

    exponent = rescale_state<DK>(state, largest_of_values(v_columns, ld), exponent);
    float E[8][4] = {}, O[8][4] = {};
    __half* state_to = saved.states ? saved.states + (number * size.dv + column) * size.dk : nullptr;
    read_state<DK, true>(E, O, state, stage.k, stage.q, state_to, size.dk);
    solve_forward(E, stage, v_columns, ld, power_of_two(exponent));
    if (saved.states) {
      store_tokens(saved.E + out, stride, n, staging, ld, E, 1.f);
      if (threadIdx.x % 32 == 0) saved.exponents[(number * size.dv + column) / 16] = exponent;
    }
    scale_all_tokens(O, stage.gates + kDecayFromStart * kChunk, s);
    scale_all_tokens(E, stage.gates + kBeta * kChunk, 1.f);
    add_intra_chunk(O, E, stage);
    store_tokens(o.head(block.h) + row * o.row_stride + column, o.row_stride, n, staging, ld, O,
                 power_of_two(-exponent));

    scale_state<DK>(state, stage.gates[kDecayFromStart * kChunk + kChunk - 1]);
    const uint32_t k_rows = lane_address_rows_first(stage.k, DK + 8);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      uint32_t a[4];
      pack_scaled_a_fragment(a, E[2 * p], E[2 * p + 1], stage.gates + kDecayToEnd * kChunk, 16 * p, 1.f);
      add_16_rows<DK>(state, a, k_rows + 2 * 16 * p * (DK + 8));
    }
  }
  if (active)
    if (float* to = state_after(in, block, size, block.split < splits.count - 1, column))
      store_state<DK>(to, state, power_of_two(-exponent), size.dk);
#endif
}

// (B1), intra-chunk part: x [16 of dv, 64 tokens] += dO^T P for rows 16 p to 16 p + 15 of P; d_o: the A
// fragment of those tokens.
__device__ inline void add_intra_chunk_backward(float (&x)[8][4], const uint32_t (&d_o)[4],
                                                const Sm80Stage& stage, int p) {
  const uint32_t p_rows = lane_address_rows_first(stage.matrices, kPackedStride);
#pragma unroll
  for (int t = 0; t <= p; t++) {
    uint32_t b[4];
    ldmatrix_transposed(b, p_rows + 2 * block_of_p(p, t));
    mma_pair(x[2 * t], x[2 * t + 1], d_o, b);
  }
}

// (B2) X = Y - N^T (beta * Y), in place. The first 16 tokens first: they only read later tokens, still Y.
__device__ inline void solve_backward(float (&x)[8][4], const Sm80Stage& stage) {
  const uint32_t n_rows = lane_address_rows_first(stage.matrices, kPackedStride);
#pragma unroll
  for (int p = 0; p < 4; p++) {
    uint32_t a[4];
    pack_scaled_a_fragment(a, x[2 * p], x[2 * p + 1], stage.gates + kBeta * kChunk, 16 * p, -1.f);
#pragma unroll
    for (int t = 0; t <= p; t++) {
      uint32_t b[4];
      ldmatrix_transposed(b, n_rows + 2 * block_of_n(p, t));
      mma_pair(x[2 * t], x[2 * t + 1], a, b);
    }
  }
}

// (B1)-(B3) over the chunks of a split, last chunk first. One CTA: a sequence, a value head, a slice of dv.
// Writes dv, and X and each chunk's dS before the update into Adjoints. With kStates it writes none
// of these, but the dS at the split's start, from 0 at its end, to the boundary state of the split before,
// for all splits but the first (splits.cuh).
//
// Lower bound at B=32, T=1024, H=6, dk=128, dv=256: reads q, k, do, N, P 0.24 GB, writes dv, X, dS 0.40 GB;
// 52 GFLOP. H100: 0.341 ms (dev/results/layer_speed).
template <int DK, int kStages, bool kStates>
__global__ void __launch_bounds__(32 * kMaxPassWarps, pass_blocks(DK))
    backward_pass_kernel(PassInputs in, HeadRows<act> dv, Adjoints adjoints, Sizes size, Splits splits,
                         float s) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(GDN_EMULATED)
  extern __shared__ __align__(16) unsigned char shared[];
  PassBlock block = pass_block(size, splits, kStates, splits.count - kStates, blockDim.x / 32);
  if (kStates) backward_state_chunks(in, block, size);
  const int warp = threadIdx.x / 32, ld = 16 * block.warps + 8, column = block.first_column + 16 * warp;
  const bool active = column < size.dv;
  const int64_t stride = size.value_stride();
  clear_shared(shared, kStages * pass_stage_bytes(DK, block.warps));
  __syncthreads();
  copy_chunk<DK>(pass_stage<DK>(shared, (block.end_chunk - 1) & (kStages - 1), block.warps), in, block, size,
                 block.end_chunk - 1);

  float state[DK / 8][4] = {};  // dS
  if (!kStates && active)
    if (const float* from = state_before(in, block, size, splits, block.split < splits.count - 1, column))
      load_state<DK>(state, from, size.dk);
  int exponent = 0;
  for (int chunk = block.end_chunk - 1; chunk >= block.first_chunk; chunk--) {
    const Sm80Stage stage = pass_stage<DK>(shared, chunk & (kStages - 1), block.warps);
    if constexpr (kStages == 1)
      if (chunk + 1 < block.end_chunk) {
        __syncthreads();  // all are done with the stage
        copy_chunk<DK>(stage, in, block, size, chunk);
      }
    wait_and_convert_chunk<DK>(stage, size);
    __syncthreads();
    if (kStages == 2 && chunk > block.first_chunk)
      copy_chunk<DK>(pass_stage<DK>(shared, (chunk - 1) & (kStages - 1), block.warps), in, block, size,
                     chunk - 1);
    if (!active) continue;
    const int64_t number = size.chunk_number(block.b, block.h, chunk), row = size.first_row(block.b, chunk);
    const int64_t out = row * stride + block.h * size.dv + column;
    const int n = size.rows_in(chunk);
    act* staging = stage.values + 16 * warp;
    const uint32_t do_columns = lane_address_columns_first(staging, ld);
    const float* from_start = stage.gates + kDecayFromStart * kChunk;

    exponent = rescale_state<DK>(state, largest_of_values(do_columns, ld), exponent);
    if (!kStates && threadIdx.x % 32 == 0) adjoints.exponents[(number * size.dv + column) / 16] = exponent;
    float X[8][4] = {};
    __half* state_to = kStates ? nullptr : adjoints.d_states + (number * size.dv + column) * size.dk;
    read_state<DK, false>(X, X, state, stage.k, stage.q, state_to, size.dk);
    scale_all_tokens(X, stage.gates + kDecayToEnd * kChunk, 1.f);
    scale_state<DK>(state, from_start[kChunk - 1]);
    const uint32_t q_rows = lane_address_rows_first(stage.q, DK + 8);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      uint32_t a[4];
      float left[4], right[4];
      ldmatrix_transposed(a, do_columns + 2 * 16 * p * ld);
      output_gradient(left, right, a, power_of_two(exponent));
      pack_a_fragment(a, left, right);
      add_intra_chunk_backward(X, a, stage, p);
      pack_scaled_a_fragment(a, left, right, from_start, 16 * p, s);
      add_16_rows<DK>(state, a, q_rows + 2 * 16 * p * (DK + 8));
    }
    solve_backward(X, stage);
    if (!kStates) store_tokens(adjoints.x + out, stride, n, staging, ld, X, 1.f);
    scale_all_tokens(X, stage.gates + kBeta * kChunk, 1.f);
    if (!kStates)
      store_tokens(dv.head(block.h) + row * dv.row_stride + column, dv.row_stride, n, staging, ld, X,
                   power_of_two(-exponent));

    const uint32_t k_rows = lane_address_rows_first(stage.k, DK + 8);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      uint32_t a[4];
      pack_scaled_a_fragment(a, X[2 * p], X[2 * p + 1], from_start, 16 * p, -1.f);
      add_16_rows<DK>(state, a, k_rows + 2 * 16 * p * (DK + 8));
    }
  }
  if (kStates && active)
    store_state<DK>(splits.boundary(block.b, block.h, block.split - 1, size) + column * size.dk, state,
                    power_of_two(-exponent), size.dk);
  if (!kStates && active)
    if (float* to = state_after(in, block, size, block.split > 0, column))
      store_state<DK>(to, state, power_of_two(-exponent), size.dk);
#endif
}

// (F1), (F2), (F4) alone: the final states of all splits but the last, from a state of zero, to the boundary
// state of the next; and M of those that are neither first nor last: CTAs from slices_v on compute rows of
// M^T.
template <int DK, int kStages>
__global__ void __launch_bounds__(32 * kMaxPassWarps, pass_blocks(DK))
    forward_state_kernel(PassInputs in, Sizes size, Splits splits, int slices_v) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(GDN_EMULATED)
  extern __shared__ __align__(16) unsigned char shared[];
  PassBlock block = pass_block(size, splits, 0, splits.count - 1, blockDim.x / 32);
  const int warp = threadIdx.x / 32, ld = 16 * block.warps + 8;
  const bool transition = int(blockIdx.x) >= slices_v;
  const int row = (int(blockIdx.x) - (transition ? slices_v : 0)) * 16 * block.warps + 16 * warp;
  if (transition && block.split == 0) return;
  if (transition) block.first_column = size.dv;  // v = 0
  const bool active = row < (transition ? size.dk : size.dv);
  forward_state_chunks(in, block, size, transition);
  const bool any = block.first_chunk < block.end_chunk;
  if (int(blockIdx.x) == slices_v && threadIdx.x == 0)
    splits.remembered(block.b, block.h, size)[block.split] = any ? 1.f : 0.f;
  clear_shared(shared, kStages * pass_stage_bytes(DK, block.warps));
  __syncthreads();
  if (any)
    copy_chunk<DK>(pass_stage<DK>(shared, block.first_chunk & (kStages - 1), block.warps), in, block, size,
                   block.first_chunk);

  float state[DK / 8][4] = {};
  if (transition && any) unit_state<DK>(state, row);
  int exponent = 0;
  for (int chunk = block.first_chunk; chunk < block.end_chunk; chunk++) {
    const Sm80Stage stage = pass_stage<DK>(shared, chunk & (kStages - 1), block.warps);
    if (kStages == 1 && chunk > block.first_chunk) {
      __syncthreads();  // all are done with the stage
      copy_chunk<DK>(stage, in, block, size, chunk);
    }
    wait_and_convert_chunk<DK>(stage, size);
    __syncthreads();
    if (kStages == 2 && chunk + 1 < block.end_chunk)
      copy_chunk<DK>(pass_stage<DK>(shared, (chunk + 1) & (kStages - 1), block.warps), in, block, size,
                     chunk + 1);
    if (!active) continue;
    const uint32_t v_columns = lane_address_columns_first(stage.values + 16 * warp, ld);
    exponent = rescale_state<DK>(state, largest_of_values(v_columns, ld), exponent);
    float E[8][4] = {};
    read_state<DK, false>(E, E, state, stage.k, stage.q, nullptr, size.dk);
    solve_forward(E, stage, v_columns, ld, power_of_two(exponent));
    scale_all_tokens(E, stage.gates + kBeta * kChunk, 1.f);
    scale_state<DK>(state, stage.gates[kDecayFromStart * kChunk + kChunk - 1]);
    const uint32_t k_rows = lane_address_rows_first(stage.k, DK + 8);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      uint32_t a[4];
      pack_scaled_a_fragment(a, E[2 * p], E[2 * p + 1], stage.gates + kDecayToEnd * kChunk, 16 * p, 1.f);
      add_16_rows<DK>(state, a, k_rows + 2 * 16 * p * (DK + 8));
    }
  }
  if (!active) return;
  if (transition)
    store_transition<DK>(splits.transition(block.b, block.h, block.split, size), state,
                         power_of_two(-exponent), row, size.dk);
  else
    store_state<DK>(splits.boundary(block.b, block.h, block.split + 1, size) + row * size.dk, state,
                    power_of_two(-exponent), size.dk);
#endif
}

}  // namespace delta_rule
}  // namespace gdn
