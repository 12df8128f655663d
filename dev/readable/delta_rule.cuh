// The gated delta rule in chunks, in float, written to be read: the rung between the CPU's loops
// (gdn/cpu_delta_rule.h) and the tensor cores (gdn/kernels/delta_rule). Every line of arithmetic is an
// equation of dev/doc/delta_rule.md, with its number and its letters. The arguments are those of the layer in
// gdn_kernels.cuh.
//
// Four kernels with the work of the fast four: prepare, forward pass, backward pass, gradients. A thread
// computes one entry of a matrix at a time; each() ends with a barrier, so the next equation may read the
// whole matrix. A block of the passes has kColumns columns of V, O and the state of one value head, and walks
// over its chunks; columns do not depend on other columns. Blocks of the other two kernels have a chunk each.
// Every sum has one order.
#pragma once

#include "../../gdn/shapes.h"
#ifdef GDN_EMULATED
#include "../emulate/cuda_emulator.h"
#else
#include "../../gdn/kernels/common.cuh"
#endif

namespace gdn {
namespace readable {

constexpr int C = kChunk;
constexpr int kColumns = 16;   // dv is a multiple of it
constexpr int kThreads = 256;  // of a block

// What the kernels pass on. Matrices of a chunk have C rows, also where a sequence's last chunk has fewer
// tokens.
struct Saved {   // by the forward, for the backward
  float* G;      // [B,Hv,chunks,C]
  float *N, *P;  // [B,Hv,chunks,C,C]
  float* S;      // [B,Hv,chunks,dk,dv], at the chunk's start
  float* E;      // [B,Hv,chunks,C,dv]
};
struct Scratch {            // within the backward
  float* dS;                // [B,Hv,chunks,dk,dv], at the chunk's end
  float* X;                 // [B,Hv,chunks,C,dv]
  float *dQ, *dK;           // [B,Hk,chunks,C,dk], summed over a key head's value heads
  float *Q_S, *K_S, *K_dS;  // [B,Hk,chunks,C,dk], one value head's terms of (G3) and (G4) with S, and with dS
};

struct Sizes {
  int tokens, heads_k, heads_v, dk, dv, chunks, channels;
};

// ---- matrices

// Entry (i, j) of a matrix whose rows lie `stride` apart; entry (i) of a column.
struct Matrix {
  float* data;
  int64_t stride;
  __device__ float& operator()(int i, int j = 0) const { return data[i * stride + j]; }
};
struct Input {  // float
  const float* data;
  int64_t stride;
  __device__ float operator()(int i, int j = 0) const { return data[i * stride + j]; }
};
struct Activation {  // bf16
  const act* data;
  int64_t stride;
  __device__ float operator()(int i, int j) const { return __bfloat162float(data[i * stride + j]); }
};
struct Output {  // bf16, rounded to nearest even
  act* data;
  int64_t stride;
  __device__ void set(int i, int j, float x) const { data[i * stride + j] = __float2bfloat16_rn(x); }
};

// f(i, j) for every entry of a matrix [rows,columns]. The block's threads call it together.
template <class F>
__device__ inline void each(int rows, int columns, const F& f) {
  for (int e = threadIdx.x; e < rows * columns; e += kThreads) f(e / columns, e % columns);
  __syncthreads();
}

// f(first) + ... + f(end - 1)
template <class F>
__device__ inline float sum(int first, int end, const F& f) {
  float x = 0;
  for (int k = first; k < end; k++) x += f(k);
  return x;
}

// Where chunk `chunk` of value head h in sequence b lies, and how many tokens it has.
struct Place {
  Sizes z;
  int h, hk, n;
  int64_t row, of_value_head,
      of_key_head;  // its first row of [M,...]; its index in [B,Hv,chunks], [B,Hk,chunks]

  __device__ Place(const Sizes& sizes, int b, int value_head, int chunk)
      : z(sizes), h(value_head), hk(h / (z.heads_v / z.heads_k)), n(min(C, z.tokens - chunk * C)) {
    row = int64_t(b) * z.tokens + chunk * C;
    of_value_head = (int64_t(b) * z.heads_v + h) * z.chunks + chunk;
    of_key_head = (int64_t(b) * z.heads_k + hk) * z.chunks + chunk;
  }
  // q, k and v in a row of qkv or dqkv
  template <class T>
  __device__ T* q(T* qkv) const {
    return qkv + row * z.channels + hk * z.dk;
  }
  template <class T>
  __device__ T* k(T* qkv) const {
    return q(qkv) + z.heads_k * z.dk;
  }
  template <class T>
  __device__ T* v(T* qkv) const {
    return qkv + row * z.channels + 2 * z.heads_k * z.dk + h * z.dv;
  }
  template <class T>
  __device__ T* value(T* o) const {
    return o + (row * z.heads_v + h) * z.dv;
  }  // of o, d_o [M,Hv,dv]
  template <class T>
  __device__ T* gate(T* g) const {
    return g + row * z.heads_v + h;
  }  // of g, beta, dg, dbeta [M,Hv]

  __device__ Matrix G(float* all) const { return {all + of_value_head * C, 1}; }
  __device__ Matrix square(float* all) const { return {all + of_value_head * C * C, C}; }
  __device__ Matrix state(float* all) const { return {all + of_value_head * z.dk * z.dv, z.dv}; }
  __device__ Matrix values(float* all) const { return {all + of_value_head * C * z.dv, z.dv}; }
  __device__ Matrix keys(float* all) const { return {all + of_key_head * C * z.dk, z.dk}; }
};

extern __shared__ float memory[];

// ---- prepare: a block for each chunk of each value head

constexpr int kPrepareFloats = C * C;

static __global__ void __launch_bounds__(kThreads)
    prepare_kernel(Saved saved, const act* qkv, const float* g, const float* beta_of, Sizes z, float s) {
  const Place at(z, blockIdx.z, blockIdx.y, blockIdx.x);
  const int n = at.n;
  const Activation Q = {at.q(qkv), z.channels}, K = {at.k(qkv), z.channels};
  const Input g_t = {at.gate(g), z.heads_v}, beta = {at.gate(beta_of), z.heads_v};
  const Matrix G = at.G(saved.G), N = at.square(saved.N), P = at.square(saved.P), L = {memory, C};
  const auto D = [&](int i, int j) { return expf(G(i) - G(j)); };  // for i >= j
  const auto QK = [&](int i, int j) { return sum(0, z.dk, [&](int k) { return Q(i, k) * K(j, k); }); };
  const auto KK = [&](int i, int j) { return sum(0, z.dk, [&](int k) { return K(i, k) * K(j, k); }); };

  each(n, 1, [&](int i, int) { G(i) = sum(0, i + 1, [&](int t) { return g_t(t); }); });
  // (1) L = strictly lower part of D . K K^T
  each(n, n, [&](int i, int j) { L(i, j) = i > j ? D(i, j) * KK(i, j) : 0.0f; });
  // (2) N = (I + L diag(beta))^-1 L, that is N = L - L (beta * N): row i from the rows before it
  each(1, n, [&](int, int j) {
    for (int i = 0; i < n; i++)
      N(i, j) = L(i, j) - sum(0, i, [&](int k) { return L(i, k) * beta(k) * N(k, j); });
  });
  // (3) P = s (D . Q K^T)
  each(n, n, [&](int i, int j) { P(i, j) = i >= j ? s * D(i, j) * QK(i, j) : 0.0f; });
}

// ---- forward pass: a block for each kColumns columns of each value head

inline int forward_floats(int dk) { return (dk + 2 * C) * kColumns; }

static __global__ void __launch_bounds__(kThreads)
    forward_pass_kernel(act* o, Saved saved, const act* qkv, const float* beta_of, Sizes z, float s) {
  const int first = blockIdx.x * kColumns;
  const Matrix S = {memory, kColumns}, R = {&S(z.dk), kColumns}, E = {&R(C), kColumns};
  each(z.dk, kColumns, [&](int k, int j) { S(k, j) = 0; });
  for (int chunk = 0; chunk < z.chunks; chunk++) {
    const Place at(z, blockIdx.z, blockIdx.y, chunk);
    const int n = at.n;
    const Activation Q = {at.q(qkv), z.channels}, K = {at.k(qkv), z.channels},
                     V = {at.v(qkv) + first, z.channels};
    const Input beta = {at.gate(beta_of), z.heads_v};
    const Output O = {at.value(o) + first, z.heads_v * z.dv};
    const Matrix G = at.G(saved.G), N = at.square(saved.N), P = at.square(saved.P);
    const float G_C = G(n - 1);

    each(z.dk, kColumns, [&](int k, int j) { at.state(saved.S)(k, first + j) = S(k, j); });
    // (F1) R = V - e^G * (K S)
    each(n, kColumns, [&](int i, int j) {
      R(i, j) = V(i, j) - expf(G(i)) * sum(0, z.dk, [&](int k) { return K(i, k) * S(k, j); });
    });
    // (F2) E = R - N (beta * R)
    each(n, kColumns, [&](int i, int j) {
      E(i, j) = R(i, j) - sum(0, i, [&](int t) { return N(i, t) * beta(t) * R(t, j); });
      at.values(saved.E)(i, first + j) = E(i, j);
    });
    // (F3) O = s e^G * (Q S) + P (beta * E)
    each(n, kColumns, [&](int i, int j) {
      O.set(i, j, s * expf(G(i)) * sum(0, z.dk, [&](int k) {
                    return Q(i, k) * S(k, j);
                  }) + sum(0, i + 1, [&](int t) { return P(i, t) * beta(t) * E(t, j); }));
    });
    // (F4) S <- e^{G_C} S + K^T (e^{G_C - G} beta * E)
    each(z.dk, kColumns, [&](int k, int j) {
      S(k, j) = expf(G_C) * S(k, j) +
                sum(0, n, [&](int t) { return K(t, k) * expf(G_C - G(t)) * beta(t) * E(t, j); });
    });
  }
}

// ---- backward pass: the same blocks, last chunk first

static __global__ void __launch_bounds__(kThreads)
    backward_pass_kernel(act* dqkv, Scratch scratch, const act* d_o, Saved saved, const act* qkv,
                         const float* beta_of, Sizes z, float s) {
  const int first = blockIdx.x * kColumns;
  const Matrix dS = {memory, kColumns}, Y = {&dS(z.dk), kColumns}, X = {&Y(C), kColumns};
  each(z.dk, kColumns, [&](int k, int j) { dS(k, j) = 0; });
  for (int chunk = z.chunks - 1; chunk >= 0; chunk--) {
    const Place at(z, blockIdx.z, blockIdx.y, chunk);
    const int n = at.n;
    const Activation Q = {at.q(qkv), z.channels}, K = {at.k(qkv), z.channels},
                     dO = {at.value(d_o) + first, z.heads_v * z.dv};
    const Input beta = {at.gate(beta_of), z.heads_v};
    const Output dV = {at.v(dqkv) + first, z.channels};
    const Matrix G = at.G(saved.G), N = at.square(saved.N), P = at.square(saved.P);
    const float G_C = G(n - 1);

    each(z.dk, kColumns, [&](int k, int j) { at.state(scratch.dS)(k, first + j) = dS(k, j); });
    // (B1) Y = P^T dO + e^{G_C - G} * (K dS)
    each(n, kColumns, [&](int i, int j) {
      Y(i, j) = sum(i, n, [&](int t) { return P(t, i) * dO(t, j); }) +
                expf(G_C - G(i)) * sum(0, z.dk, [&](int k) { return K(i, k) * dS(k, j); });
    });
    // (B2) X = Y - N^T (beta * Y)
    each(n, kColumns, [&](int i, int j) {
      X(i, j) = Y(i, j) - sum(i + 1, n, [&](int t) { return N(t, i) * beta(t) * Y(t, j); });
      at.values(scratch.X)(i, first + j) = X(i, j);
    });
    // (B3) dV = beta * X;  dS <- e^{G_C} dS + Q^T (s e^G * dO) - K^T (beta e^G * X)
    each(n, kColumns, [&](int i, int j) { dV.set(i, j, beta(i) * X(i, j)); });
    each(z.dk, kColumns, [&](int k, int j) {
      dS(k, j) = expf(G_C) * dS(k, j) + sum(0, n, [&](int t) {
                   return expf(G(t)) * (s * Q(t, k) * dO(t, j) - beta(t) * K(t, k) * X(t, j));
                 });
    });
  }
}

// ---- gradients: a block for each chunk of each key head, its value heads one after another

inline int gradient_floats(int dk) { return 3 * C * C + 2 * C + dk; }

static __global__ void __launch_bounds__(kThreads)
    gradients_kernel(act* dqkv, float* dg_of, float* dbeta_of, Scratch scratch, const act* d_o, Saved saved,
                     const act* qkv, const float* beta_of, Sizes z, float s) {
  const Matrix dqk = {memory, C}, dkk = {&dqk(C), C}, M = {&dkk(C), C};
  const Matrix reads = {&M(C), 1}, writes = {&reads(C), 1}, S_dS = {&writes(C), 1};
  const int group = z.heads_v / z.heads_k;
  for (int h = blockIdx.y * group; h < (int(blockIdx.y) + 1) * group; h++) {
    const Place at(z, blockIdx.z, h, blockIdx.x);
    const int n = at.n;
    const Activation Q = {at.q(qkv), z.channels}, K = {at.k(qkv), z.channels},
                     dO = {at.value(d_o), z.heads_v * z.dv};
    const Input beta = {at.gate(beta_of), z.heads_v};
    const Matrix G = at.G(saved.G), S = at.state(saved.S), E = at.values(saved.E), dS = at.state(scratch.dS),
                 X = at.values(scratch.X);
    const Matrix dQ = at.keys(scratch.dQ), dK = at.keys(scratch.dK);
    const Matrix Q_S = at.keys(scratch.Q_S), K_S = at.keys(scratch.K_S), K_dS = at.keys(scratch.K_dS);
    const Matrix dg = {at.gate(dg_of), z.heads_v}, dbeta = {at.gate(dbeta_of), z.heads_v};
    const float G_C = G(n - 1);
    const auto D = [&](int i, int j) { return expf(G(i) - G(j)); };  // for i >= j
    const auto over_dv = [&](const auto& f) { return sum(0, z.dv, f); };
    const auto over_dk = [&](const auto& f) { return sum(0, z.dk, f); };

    // (G1) dbeta_i = X_i . E_i
    each(n, 1, [&](int i, int) { dbeta(i) = over_dv([&](int e) { return X(i, e) * E(i, e); }); });
    // (G2) dqk = s D . (dO E^T) diag(beta);  dkk = strictly lower part of -diag(beta) (D . X E^T) diag(beta)
    each(n, n, [&](int i, int j) {
      dqk(i, j) = i < j ? 0.0f : s * D(i, j) * beta(j) * over_dv([&](int e) { return dO(i, e) * E(j, e); });
      dkk(i, j) =
          i <= j ? 0.0f : -beta(i) * beta(j) * D(i, j) * over_dv([&](int e) { return X(i, e) * E(j, e); });
    });
    // the terms of (G3) and (G4) with S and with dS
    each(n, z.dk, [&](int i, int k) {
      Q_S(i, k) = s * expf(G(i)) * over_dv([&](int e) { return dO(i, e) * S(k, e); });
      K_S(i, k) = -beta(i) * expf(G(i)) * over_dv([&](int e) { return X(i, e) * S(k, e); });
      K_dS(i, k) = expf(G_C - G(i)) * beta(i) * over_dv([&](int e) { return E(i, e) * dS(k, e); });
    });
    // (G3) dQ = s e^G * (dO S^T) + dqk K
    // (G4) dK = -beta e^G * (X S^T) + e^{G_C - G} beta * (E dS^T) + dqk^T Q + (dkk + dkk^T) K
    each(n, z.dk, [&](int i, int k) {
      const float others_q = h % group ? dQ(i, k) : 0.0f, others_k = h % group ? dK(i, k) : 0.0f;
      dQ(i, k) = others_q + Q_S(i, k) + sum(0, i + 1, [&](int t) { return dqk(i, t) * K(t, k); });
      dK(i, k) = others_k + K_S(i, k) + K_dS(i, k) + sum(i, n, [&](int t) { return dqk(t, i) * Q(t, k); }) +
                 sum(0, n, [&](int t) { return (dkk(i, t) + dkk(t, i)) * K(t, k); });
    });
    // (G5) dg_t = e^{G_C} <S, dS> + sum_{i >= t} reads_i + sum_{j < t} writes_j + sum_{i >= t > j} M_ij
    each(z.dk, 1, [&](int k, int) { S_dS(k) = over_dv([&](int e) { return S(k, e) * dS(k, e); }); });
    each(n, 1, [&](int i, int) {
      reads(i) = over_dk([&](int k) { return Q(i, k) * Q_S(i, k) + K(i, k) * K_S(i, k); });
      writes(i) = over_dk([&](int k) { return K(i, k) * K_dS(i, k); });
    });
    each(n, n, [&](int i, int j) {
      M(i, j) = dqk(i, j) * over_dk([&](int k) { return Q(i, k) * K(j, k); }) +
                dkk(i, j) * over_dk([&](int k) { return K(i, k) * K(j, k); });
    });
    each(n, 1, [&](int t, int) {
      dg(t) = expf(G_C) * over_dk([&](int k) { return S_dS(k); }) +
              sum(t, n, [&](int i) { return reads(i); }) + sum(0, t, [&](int j) { return writes(j); }) +
              sum(t, n, [&](int i) { return sum(0, t, [&](int j) { return M(i, j); }); });
    });
  }
  const Place at(z, blockIdx.z, blockIdx.y * group, blockIdx.x);
  const Output dQ = {at.q(dqkv), z.channels}, dK = {at.k(dqkv), z.channels};
  each(at.n, z.dk, [&](int i, int k) {
    dQ.set(i, k, at.keys(scratch.dQ)(i, k));
    dK.set(i, k, at.keys(scratch.dK)(i, k));
  });
}

// ---- memory and launches

inline Sizes sizes_of(const MixerShape& shape) {
  return {shape.tokens,     shape.heads_k,  shape.heads_v,        shape.head_dim_k,
          shape.head_dim_v, shape.chunks(), shape.conv_channels()};
}

// Takes arrays one after another from `memory`; counts bytes alone where that is nullptr.
struct Arrays {
  float* memory;
  size_t floats = 0;
  float* take(size_t n) {
    floats += n;
    return memory ? memory + (floats - n) : nullptr;
  }
};

inline Saved take_saved(Arrays& arrays, const MixerShape& shape) {
  const size_t chunks = size_t(shape.batch) * shape.heads_v * shape.chunks();
  const size_t dk = shape.head_dim_k, dv = shape.head_dim_v;
  Saved x;
  x.G = arrays.take(chunks * C), x.N = arrays.take(chunks * C * C), x.P = arrays.take(chunks * C * C);
  x.S = arrays.take(chunks * dk * dv), x.E = arrays.take(chunks * C * dv);
  return x;
}

inline Scratch take_scratch(Arrays& arrays, const MixerShape& shape) {
  const size_t chunks = size_t(shape.batch) * shape.heads_v * shape.chunks();
  const size_t dk = shape.head_dim_k, dv = shape.head_dim_v;
  const size_t keys = size_t(shape.batch) * shape.heads_k * shape.chunks() * C * dk;
  Scratch x;
  x.dS = arrays.take(chunks * dk * dv), x.X = arrays.take(chunks * C * dv);
  for (float** of_keys : {&x.dQ, &x.dK, &x.Q_S, &x.K_S, &x.K_dS}) *of_keys = arrays.take(keys);
  return x;
}

// Calls launch(grid, floats of shared memory, kernel, arguments...) for the kernels of a forward.
template <class Launch>
void launch_forward(const Launch& launch, act* o, const Saved& saved, const act* qkv, const float* g,
                    const float* beta, const MixerShape& shape, float s) {
  const Sizes z = sizes_of(shape);
  const unsigned chunks = z.chunks, columns = z.dv / kColumns, values = z.heads_v, batch = shape.batch;
  launch({chunks, values, batch}, kPrepareFloats, prepare_kernel, saved, qkv, g, beta, z, s);
  launch({columns, values, batch}, forward_floats(z.dk), forward_pass_kernel, o, saved, qkv, beta, z, s);
}

template <class Launch>
void launch_backward(const Launch& launch, act* dqkv, float* dg, float* dbeta, const act* d_o,
                     const Scratch& scratch, const Saved& saved, const act* qkv, const float* beta,
                     const MixerShape& shape, float s) {
  const Sizes z = sizes_of(shape);
  const unsigned chunks = z.chunks, columns = z.dv / kColumns, values = z.heads_v, keys = z.heads_k,
                 batch = shape.batch;
  launch({columns, values, batch}, forward_floats(z.dk), backward_pass_kernel, dqkv, scratch, d_o, saved, qkv,
         beta, z, s);
  launch({chunks, keys, batch}, gradient_floats(z.dk), gradients_kernel, dqkv, dg, dbeta, scratch, d_o, saved,
         qkv, beta, z, s);
}

#ifndef GDN_EMULATED

inline size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape& shape) {
  Arrays count = {nullptr};
  take_saved(count, shape);
  return count.floats * sizeof(float);
}

inline size_t gated_delta_rule_scratch_bytes(Cuda&, const MixerShape& shape) {
  Arrays count = {nullptr};
  take_scratch(count, shape);
  return count.floats * sizeof(float);
}

inline auto launcher(Cuda& device) {
  return [&device](dim3 grid, int floats, auto kernel, auto... arguments) {
    const int bytes = floats * int(sizeof(float));
    allow_shared_bytes(device, kernel, bytes, "the readable delta rule");
    kernel<<<grid, kThreads, bytes, device.stream>>>(arguments...);
    launched("the readable delta rule");
  };
}

inline void gated_delta_rule_forward(Cuda& device, act* o, void* saved, const act* qkv, const float* g,
                                     const float* beta, const MixerShape& shape, float s, void*) {
  require_head_dims(shape);
  if (shape.rows() == 0) return;
  Arrays arrays = {static_cast<float*>(saved)};
  launch_forward(launcher(device), o, take_saved(arrays, shape), qkv, g, beta, shape, s);
}

inline void gated_delta_rule_backward(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o,
                                      const void* saved, const act* qkv, const float*, const float* beta,
                                      const MixerShape& shape, float s, void* scratch) {
  require_head_dims(shape);
  if (shape.rows() == 0) return;
  Arrays kept = {static_cast<float*>(const_cast<void*>(saved))}, work = {static_cast<float*>(scratch)};
  launch_backward(launcher(device), dqkv, dg, dbeta, d_o, take_scratch(work, shape), take_saved(kept, shape),
                  qkv, beta, shape, s);
}

#endif  // GDN_EMULATED

}  // namespace readable
}  // namespace gdn
