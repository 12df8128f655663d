// The gated delta rule to be read: token by token, in float, forward and backward in time, one line of code
// for one of the equations. Same arguments as gdn/kernels/delta_rule, which is fast. For row i of the
// state S [dk,dv] and column j, S_0 = 0:
//   S~_ij = e^g S_ij                       error_j = v_j - sum_i S~_ij k_i       u_j = beta error_j
//   S_ij  = S~_ij + k_i u_j                o_j = s sum_i S_ij q_i                arXiv 2412.06464, eq. 10
// Backward, from the last token to the first, dS starting at 0:
//   dq_i   = s sum_j S_ij do_j             dS_ij  = dS_ij + s q_i do_j           du_j = sum_i dS_ij k_i
//   dk_i   = sum_j (dS_ij u_j - beta S~_ij du_j)                                 dv_j = beta du_j
//   dbeta  = sum_j du_j error_j            dS~_ij = dS_ij - beta k_i du_j
//   dg     = sum_ij dS~_ij S~_ij           dS_ij  = e^g dS~_ij, of the token before
//
// A block has kColumns columns of one value head's state in one sequence. Columns meet only in the sums over
// j, which are finished by kernels of their own. Thread i of a block holds row i in registers: sums over j
// are its own, sums over i go over the block. Every sum has a fixed order.
#pragma once

#include "common.cuh"

namespace gdn {
namespace readable {

constexpr int kColumns = 16;        // of a block; dv is a multiple of it
constexpr int kLongestBlock = 256;  // threads: the largest dk

struct DeltaRuleSizes {
  int tokens, heads_k, heads_v, dk, dv, channels;
};

// Where the numbers of this block (sequence, value head, columns) and of this thread (row i of the state)
// lie.
struct DeltaRulePlace {
  DeltaRuleSizes size;
  int column, head, sequence, i;  // column: the first of the block's
  bool active;                    // i is a row of the state; where not, the thread's row is zero

  __device__ explicit DeltaRulePlace(const DeltaRuleSizes& s)
      : size(s),
        column(blockIdx.x * kColumns),
        head(blockIdx.y),
        sequence(blockIdx.z),
        i(threadIdx.x),
        active(int(threadIdx.x) < s.dk) {}

  __device__ int64_t row(int t) const { return int64_t(sequence) * size.tokens + t; }
  __device__ int key_head() const { return head / (size.heads_v / size.heads_k); }
  __device__ int64_t q(int t) const { return row(t) * size.channels + key_head() * size.dk + i; }
  __device__ int64_t k(int t) const { return q(t) + size.heads_k * size.dk; }
  __device__ int64_t v(int t) const {
    return row(t) * size.channels + 2 * size.heads_k * size.dk + head * size.dv + column;
  }
  __device__ int64_t gate(int t) const { return row(t) * size.heads_v + head; }  // of g, beta
  __device__ int64_t o(int t) const { return gate(t) * size.dv + column; }
  __device__ int64_t state(int j) const {  // in [B,Hv,dk,dv]
    return ((int64_t(sequence) * size.heads_v + head) * size.dk + i) * size.dv + column + j;
  }
  // In [B,Hv,dv/kColumns,count,kColumns,dk]: `count` states, this the n-th.
  __device__ int64_t kept(int n, int count, int j) const {
    const int64_t block = (int64_t(sequence) * size.heads_v + head) * gridDim.x + blockIdx.x;
    return ((block * count + n) * kColumns + j) * size.dk + i;
  }
  // In [dv/kColumns,M,Hv]: what this block adds to a number of its value head.
  __device__ int64_t part(int t) const {
    return int64_t(blockIdx.x) * gridDim.z * size.tokens * size.heads_v + gate(t);
  }
};

// x_n becomes its sum over the block's threads, in each of them.
template <int N>
__device__ void sum_over_rows(float (&x)[N]) {
  __shared__ float of_warp[kLongestBlock / 32][N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int n = 0; n < N; n++) x[n] = lane_sum(x[n]);
  __syncthreads();  // an earlier sum may still be read
  if (lane == 0)
    for (int n = 0; n < N; n++) of_warp[warp][n] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] = 0;
    for (int w = 0; w < warps; w++) x[n] += of_warp[w][n];
  }
}

// Thread j stores column j of what all threads have.
__device__ inline void store_columns(act* to, const float (&x)[kColumns]) {
#pragma unroll
  for (int j = 0; j < kColumns; j++)
    if (int(threadIdx.x) == j) to[j] = rounded(x[j]);
}

// S~_t from S_{t-1}, then error_t.
__device__ inline void decay_and_predict(float (&S)[kColumns], float (&error)[kColumns], float k,
                                         const act* v, float g) {
  const float alpha = expf(g);
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    S[j] *= alpha;
    error[j] = S[j] * k;
  }
  sum_over_rows(error);
#pragma unroll
  for (int j = 0; j < kColumns; j++) error[j] = number(v, j) - error[j];
}

// o from `state` [B,Hv,dk,dv], which becomes the last state (nullptr: from zeros, not kept). checkpoints
// (nullptr: not kept): the states before every kChunk-th token.
static __global__ void __launch_bounds__(kLongestBlock)
    delta_rule_forward_kernel(act* o, float* state, float* checkpoints, const act* qkv, const float* g,
                              const float* beta, DeltaRuleSizes size, float s) {
  const DeltaRulePlace at(size);
  const int chunks = divide_up(size.tokens, kChunk);
  float S[kColumns], error[kColumns], out[kColumns];
  for (int j = 0; j < kColumns; j++) S[j] = state && at.active ? state[at.state(j)] : 0.0f;
  for (int t = 0; t < size.tokens; t++) {
    if (checkpoints && at.active && t % kChunk == 0)
      for (int j = 0; j < kColumns; j++) checkpoints[at.kept(t / kChunk, chunks, j)] = S[j];
    const float q = number(qkv, at.q(t), at.active), k = number(qkv, at.k(t), at.active);
    decay_and_predict(S, error, k, qkv + at.v(t), g[at.gate(t)]);
    for (int j = 0; j < kColumns; j++) {
      S[j] += k * beta[at.gate(t)] * error[j];
      out[j] = s * S[j] * q;
    }
    sum_over_rows(out);
    store_columns(o + at.o(t), out);
  }
  if (state && at.active)
    for (int j = 0; j < kColumns; j++) state[at.state(j)] = S[j];
}

// What the backward has of its own, all float: S~ of the chunk that a block is at, and the blocks' parts of
// sums over the columns.
struct DeltaRuleScratch {
  float* decayed;     // [B,Hv,dv/kColumns,kChunk,kColumns,dk]
  float *dq, *dk;     // [dv/kColumns,M,Hv,dk]
  float *dg, *dbeta;  // [dv/kColumns,M,Hv]
};

// Chunk by chunk from the last: S~ of its tokens from the state before it, then its tokens in reverse.
static __global__ void __launch_bounds__(kLongestBlock)
    delta_rule_backward_kernel(act* dqkv, DeltaRuleScratch parts, const float* checkpoints, const act* d_o,
                               const act* qkv, const float* g, const float* beta, DeltaRuleSizes size,
                               float s) {
  const DeltaRulePlace at(size);
  const int chunks = divide_up(size.tokens, kChunk);
  float S[kColumns], dS[kColumns] = {}, error[kColumns], du[kColumns], dv[kColumns];
  for (int chunk = chunks - 1; chunk >= 0; chunk--) {
    const int begin = chunk * kChunk, end = min(begin + kChunk, size.tokens);
    for (int j = 0; j < kColumns; j++) S[j] = at.active ? checkpoints[at.kept(chunk, chunks, j)] : 0.0f;
    for (int t = begin; t < end; t++) {
      const float k = number(qkv, at.k(t), at.active);
      decay_and_predict(S, error, k, qkv + at.v(t), g[at.gate(t)]);
      for (int j = 0; j < kColumns; j++) {
        if (at.active) parts.decayed[at.kept(t - begin, kChunk, j)] = S[j];
        S[j] += k * beta[at.gate(t)] * error[j];
      }
    }
    for (int t = end - 1; t >= begin; t--) {
      const float q = number(qkv, at.q(t), at.active), k = number(qkv, at.k(t), at.active);
      const float alpha = expf(g[at.gate(t)]), write = beta[at.gate(t)];
      for (int j = 0; j < kColumns; j++) {
        S[j] = at.active ? parts.decayed[at.kept(t - begin, kChunk, j)] : 0.0f;  // S~_t
        error[j] = S[j] * k;
      }
      sum_over_rows(error);
      float dq = 0, dk = 0, dbeta = 0, dg[1] = {0};
      for (int j = 0; j < kColumns; j++) {
        const float d_out = number(d_o, at.o(t) + j);
        error[j] = number(qkv, at.v(t) + j) - error[j];
        dq += s * (S[j] + k * write * error[j]) * d_out;
        dS[j] += s * q * d_out;
        du[j] = dS[j] * k;
      }
      sum_over_rows(du);
      for (int j = 0; j < kColumns; j++) {
        dk += dS[j] * write * error[j] - write * S[j] * du[j];
        dv[j] = write * du[j];
        dbeta += du[j] * error[j];
        dS[j] -= write * k * du[j];  // dS~_t
        dg[0] += dS[j] * S[j];
        dS[j] *= alpha;
      }
      sum_over_rows(dg);
      store_columns(dqkv + at.v(t), dv);
      if (at.active) {
        parts.dq[at.part(t) * size.dk + at.i] = dq;
        parts.dk[at.part(t) * size.dk + at.i] = dk;
      }
      if (at.i == 0) {
        parts.dg[at.part(t)] = dg[0];
        parts.dbeta[at.part(t)] = dbeta;
      }
    }
  }
}

// The q and k columns of dqkv [M,C]: the parts of a key head's slices and value heads, added up. A thread
// does a number of q and the one of k.
static __global__ void __launch_bounds__(kThreads)
    add_key_parts_kernel(act* dqkv, DeltaRuleScratch parts, DeltaRuleSizes size, int rows) {
  const int64_t n = thread_number();  // in [M,Hk,dk]
  const int key_dim = size.heads_k * size.dk, group = size.heads_v / size.heads_k;
  if (n >= int64_t(rows) * key_dim) return;
  const int64_t row = n / key_dim;
  const int column = int(n % key_dim), key_head = column / size.dk, i = column % size.dk;
  float dq = 0, dk = 0;
  for (int slice = 0; slice < size.dv / kColumns; slice++)
    for (int head = key_head * group; head < (key_head + 1) * group; head++) {
      const int64_t part = ((int64_t(slice) * rows + row) * size.heads_v + head) * size.dk + i;
      dq += parts.dq[part];
      dk += parts.dk[part];
    }
  dqkv[row * size.channels + column] = rounded(dq);
  dqkv[row * size.channels + key_dim + column] = rounded(dk);
}

// dg, dbeta [n], n = M*Hv: the slices' parts, added up.
static __global__ void __launch_bounds__(kThreads)
    add_gate_parts_kernel(float* dg, float* dbeta, DeltaRuleScratch parts, int slices, int n) {
  const int i = int(thread_number());
  if (i >= n) return;
  dg[i] = dbeta[i] = 0;
  for (int slice = 0; slice < slices; slice++) {
    dg[i] += parts.dg[int64_t(slice) * n + i];
    dbeta[i] += parts.dbeta[int64_t(slice) * n + i];
  }
}

// ---- launching

inline DeltaRuleSizes delta_rule_sizes(const MixerShape& shape) {
  require_head_dims(shape);
  return {shape.tokens,     shape.heads_k,    shape.heads_v,
          shape.head_dim_k, shape.head_dim_v, shape.conv_channels()};
}
inline dim3 delta_rule_grid(const MixerShape& shape) {
  return dim3(shape.head_dim_v / kColumns, shape.heads_v, shape.batch);
}
inline int delta_rule_threads(const MixerShape& shape) { return divide_up(shape.head_dim_k, 32) * 32; }

// Numbers in the states of `count` tokens, and in a slice's parts: one a value head of each row.
inline size_t state_numbers(const MixerShape& shape, int count) {
  return size_t(shape.batch) * shape.heads_v * count * shape.head_dim_k * shape.head_dim_v;
}
inline size_t part_numbers(const MixerShape& shape) {
  return size_t(shape.head_dim_v / kColumns) * shape.rows() * shape.heads_v;
}

inline size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape& shape) {
  return state_numbers(shape, shape.chunks()) * sizeof(float);
}
inline size_t gated_delta_rule_scratch_bytes(Cuda&, const MixerShape& shape) {
  const size_t parts = part_numbers(shape) * (2 * shape.head_dim_k + 2);
  return (state_numbers(shape, kChunk) + parts) * sizeof(float);
}

inline void gated_delta_rule_forward(Cuda& device, act* o, void* saved, const act* qkv, const float* g,
                                     const float* beta, const MixerShape& shape, float s, void*) {
  Range<Cuda> range(device, __func__);
  const DeltaRuleSizes size = delta_rule_sizes(shape);
  if (shape.rows() == 0) return;
  delta_rule_forward_kernel<<<delta_rule_grid(shape), delta_rule_threads(shape), 0, device.stream>>>(
      o, nullptr, static_cast<float*>(saved), qkv, g, beta, size, s);
  launched("delta_rule_forward_kernel");
}

inline void gated_delta_rule_recurrent(Cuda& device, act* o, float* state, const act* qkv, const float* g,
                                       const float* beta, const MixerShape& shape, float s) {
  Range<Cuda> range(device, __func__);
  const DeltaRuleSizes size = delta_rule_sizes(shape);
  if (shape.rows() == 0) return;
  delta_rule_forward_kernel<<<delta_rule_grid(shape), delta_rule_threads(shape), 0, device.stream>>>(
      o, state, nullptr, qkv, g, beta, size, s);
  launched("delta_rule_forward_kernel");
}

inline void gated_delta_rule_backward(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o,
                                      const void* saved, const act* qkv, const float* g, const float* beta,
                                      const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  const DeltaRuleSizes size = delta_rule_sizes(shape);
  if (shape.rows() == 0) return;
  const size_t n = part_numbers(shape), keys = n * size.dk;
  DeltaRuleScratch parts;
  parts.decayed = static_cast<float*>(scratch);
  parts.dq = parts.decayed + state_numbers(shape, kChunk);
  parts.dk = parts.dq + keys;
  parts.dg = parts.dk + keys;
  parts.dbeta = parts.dg + n;
  delta_rule_backward_kernel<<<delta_rule_grid(shape), delta_rule_threads(shape), 0, device.stream>>>(
      dqkv, parts, static_cast<const float*>(saved), d_o, qkv, g, beta, size, s);
  launched("delta_rule_backward_kernel");

  const int rows = shape.rows(), gates = rows * size.heads_v, slices = size.dv / kColumns;
  add_key_parts_kernel<<<blocks_of_threads(int64_t(rows) * shape.key_dim()), kThreads, 0, device.stream>>>(
      dqkv, parts, size, rows);
  launched("add_key_parts_kernel");
  add_gate_parts_kernel<<<blocks_of_threads(gates), kThreads, 0, device.stream>>>(dg, dbeta, parts, slices,
                                                                                  gates);
  launched("add_gate_parts_kernel");
}

}  // namespace readable
}  // namespace gdn
