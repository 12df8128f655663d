// The gated delta rule on the CPU: token by token (the definition), and in chunks (what the GPU computes
// too).
//
// One head, state S [dk,dv], S_0 = 0, log decay g_t <= 0, write strength beta_t, readout scale s:
//   S~_t = exp(g_t) S_{t-1}
//   u_t  = beta_t (v_t - S~_t^T k_t)
//   S_t  = S~_t + k_t u_t^T
//   o_t  = s S_t^T q_t                                          arXiv 2412.06464, eq. 10, transposed
//
// In chunks: the equations, shapes and letters of dev/doc/delta_rule.md, whose numbers stand beside the code.
// Two things are done in another order than there. s multiplies dO and o instead of P: DQK = D . Q K^T = P /
// s. And the triangular systems are solved row by row, without N: with bL = diag(beta) L and bE = beta * E
// (fla's v_new)
//   (F1), (F2)  (I + bL) bE = beta * R        (B2)  (I + bL)^T X = Y
// the second since X = Y - N^T (beta * Y). Differences of G are taken before the exponential: no exponent is
// positive, nothing overflows.
//
// (G5)'s sums are formed as written there (and not as sum_{i >= t} dG_i, where what begins and ends after t
// is added and taken off): nothing cancels that is not there, which under strong decay is most of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

#include "cpu_gemm.h"
#include "device.h"
#include "shapes.h"

namespace gdn {

// Dense products of a chunk's matrices, [rows, cols] row-major, C += alpha * ...; in double, which gradients
// are checked with, plain loops.
namespace small {

// c [m,n] += alpha a [m,k] b [k,n]; rows of a are `lda` apart
template <class Real>
void add_ab(Real* c, const Real* a, int lda, const Real* b, int m, int k, int n, Real alpha) {
  if constexpr (std::is_same<Real, float>::value) {
    tiles::add_product(c, a, lda, 1, b, m, k, n, alpha);
  } else {
    for (int i = 0; i < m; i++)
      for (int l = 0; l < k; l++)
        for (int j = 0; j < n; j++) c[i * n + j] += alpha * a[i * lda + l] * b[l * n + j];
  }
}
template <class Real>
void add_ab(Real* c, const Real* a, const Real* b, int m, int k, int n, Real alpha = 1) {
  add_ab(c, a, k, b, m, k, n, alpha);
}

// c [m,n] += alpha a [k,m]^T b [k,n]; rows of a are `lda` apart
template <class Real>
void add_atb(Real* c, const Real* a, int lda, const Real* b, int m, int k, int n, Real alpha) {
  if constexpr (std::is_same<Real, float>::value) {
    tiles::add_product(c, a, 1, lda, b, m, k, n, alpha);
  } else {
    for (int l = 0; l < k; l++)
      for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) c[i * n + j] += alpha * a[l * lda + i] * b[l * n + j];
  }
}
template <class Real>
void add_atb(Real* c, const Real* a, const Real* b, int m, int k, int n, Real alpha = 1) {
  add_atb(c, a, m, b, m, k, n, alpha);
}

// c [m,n] += alpha a [m,k] b [n,k]^T
template <class Real>
void add_abt(Real* c, const Real* a, const Real* b, int m, int k, int n, Real alpha = 1) {
  std::vector<Real> transposed(size_t(k) * n);
  for (int j = 0; j < n; j++)
    for (int l = 0; l < k; l++) transposed[l * n + j] = b[j * k + l];
  add_ab(c, a, transposed.data(), m, k, n, alpha);
}

}  // namespace small

// Bytes that gated_delta_rule_forward keeps for the backward, and that both need while they run. On the CPU
// only the states at the chunks' starts are kept, [B,Hv,chunks,dk,dv]; the rest is computed again.
template <class Real>
size_t gated_delta_rule_saved_bytes(Cpu<Real>&, const MixerShape& shape) {
  return sizeof(Real) * shape.batch * shape.heads_v * shape.chunks() * shape.head_dim_k * shape.head_dim_v;
}

template <class Real>
size_t gated_delta_rule_scratch_bytes(Cpu<Real>&, const MixerShape&) {
  return 0;
}

// A tensor of tokens and heads wherever it lies: element e of head h of token t of row b is at
// data[b * row + t * token + h * head + e * element]. g and beta have one element a head; a state
// [N,Hv,dk,dv] takes sequences for rows and dk for tokens. Null data: there is none.
template <class T>
struct Strided {
  T* data = nullptr;
  int64_t row = 0, token = 0, head = 0, element = 1;

  T* at(int64_t b, int64_t t, int h) const { return data + b * row + t * token + h * head; }
  explicit operator bool() const { return data != nullptr; }
};

// A state [N,Hv,dk,dv]: element (i, j) of sequence n and head h at data[n * sequence + h * head + i * key + j
// * value].
template <class T>
struct StridedState {
  T* data = nullptr;
  int64_t sequence = 0, head = 0, key = 0, value = 1;

  T* at(int64_t n, int h) const { return data + n * sequence + h * head; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
StridedState<T> dense_state(T* data, int heads, int dk, int dv) {
  return {data, int64_t(heads) * dk * dv, int64_t(dk) * dv, dv, 1};
}

// to [n] = from, `step` elements apart, and back
template <class Real>
void gather(Real* to, const Real* from, int64_t step, int n) {
  if (step == 1) {
    std::copy_n(from, n, to);
  } else {
    for (int i = 0; i < n; i++) to[i] = from[i * step];
  }
}
template <class Real>
void scatter(Real* to, int64_t step, const Real* from, int n) {
  if (step == 1) {
    std::copy_n(from, n, to);
  } else {
    for (int i = 0; i < n; i++) to[i * step] = from[i];
  }
}

// S [dk,dv] of sequence n and head h, zeros where there is no state, and back, to nowhere where there is
// none.
template <class Real>
void load_state(Real* S, const StridedState<const Real>& from, int64_t n, int h, int dk, int dv) {
  if (!from) {
    std::fill_n(S, dk * dv, Real(0));
  } else {
    for (int i = 0; i < dk; i++) gather(S + i * dv, from.at(n, h) + i * from.key, from.value, dv);
  }
}
template <class Real>
void store_state(const StridedState<Real>& to, int64_t n, int h, const Real* S, int dk, int dv) {
  if (!to) return;
  for (int i = 0; i < dk; i++) scatter(to.at(n, h) + i * to.key, to.value, S + i * dv, dv);
}

// x [n] = x / sqrt(|x|^2 + eps), what the short convolution does to q and k; returns the factor.
template <class Real>
Real normalize(Real* x, int n) {
  const Real r = 1 / std::sqrt(dot(x, x, n) + Real(kNormEps));
  for (int i = 0; i < n; i++) x[i] *= r;
  return r;
}

// The gradient dx [n] of the row that normalize() made into x with factor r, from that of x: in place.
template <class Real>
void normalize_backward(Real* dx, const Real* x, Real r, int n) {
  const Real along = dot(x, dx, n);
  for (int i = 0; i < n; i++) dx[i] = r * (dx[i] - x[i] * along);
}

// Calls work(n, h) for n < count and h < heads, in parallel where that is worth waking threads: `products` is the number
// of multiplications in all. What a thread throws (no memory) is thrown on from here, which OpenMP alone cannot do.
template <class Work>
void for_each_head(int count, int heads, [[maybe_unused]] int64_t products, const Work& work) {
  [[maybe_unused]] constexpr int64_t kWorthThreads = 1 << 16;  // nvcc does not see the pragma use it
  std::exception_ptr failure;
#pragma omp parallel for collapse(2) schedule(static) if (products >= kWorthThreads)
  for (int n = 0; n < count; n++)
    for (int h = 0; h < heads; h++) {
      try {
        work(n, h);
      } catch (...) {
#pragma omp critical(gdn_for_each_head)
        failure = std::current_exception();
      }
    }
  if (failure) std::rethrow_exception(failure);
}

// Tokens [first, first + tokens) of row b: from a state of its own to a state of its own. Its chunks are
// counted after those of the sequences before it.
struct DeltaRuleSequence {
  int64_t row, first;
  int tokens;
  int64_t first_chunk;

  int chunks() const { return (tokens + kChunk - 1) / kChunk; }
};

// A call of the gated delta rule. q, k [B,T,Hk,dk], v [B,T,Hv,dv], g, beta [B,T,Hv], initial_state
// [N,Hv,dk,dv] (none: zeros), N sequences. With `normalized` q and k are divided by their lengths first
// (normalize()).
template <class Real>
struct DeltaRuleCall {
  int heads_k = 0, heads_v = 0, head_dim_k = 0, head_dim_v = 0;
  Real s = 1;
  bool normalized = false;
  std::vector<DeltaRuleSequence> sequences;
  Strided<const Real> q, k, v, g, beta;
  StridedState<const Real> initial_state;

  int group() const { return heads_v / heads_k; }
  // B rows of T tokens, each a sequence.
  void set_rows(int64_t rows, int tokens) {
    for (int64_t b = 0; b < rows; b++)
      sequences.push_back({b, 0, tokens, b * ((tokens + kChunk - 1) / kChunk)});
  }
  // Documents of one row that end where the next begins: N of cu_seqlens [N+1] tokens.
  void set_documents(const int64_t* cu_seqlens, int64_t count) {
    int64_t chunks = 0;
    for (int64_t n = 0; n < count; n++) {
      sequences.push_back({0, cu_seqlens[n], int(cu_seqlens[n + 1] - cu_seqlens[n]), chunks});
      chunks += sequences.back().chunks();
    }
  }
  int64_t chunks() const {
    return sequences.empty() ? 0 : sequences.back().first_chunk + sequences.back().chunks();
  }
  // Multiplications of the recurrence with the state, three a token.
  int64_t products() const {
    int64_t tokens = 0;
    for (const DeltaRuleSequence& seq : sequences) tokens += seq.tokens;
    return 3 * tokens * heads_v * head_dim_k * head_dim_v;
  }
  // Numbers that the forward in chunks keeps for the backward: the states at the chunks' starts.
  size_t saved_size() const { return size_t(chunks()) * heads_v * head_dim_k * head_dim_v; }
  // Where in them those of a head are: [chunks of the sequence,dk,dv].
  size_t saved_offset(int n, int h) const {
    const DeltaRuleSequence& seq = sequences[n];
    return size_t(seq.first_chunk * heads_v + int64_t(h) * seq.chunks()) * head_dim_k * head_dim_v;
  }
};

// Gradients of a call's inputs, overwritten; d_initial_state may be missing.
template <class Real>
struct DeltaRuleGradients {
  Strided<Real> dq, dk, dv, dg, dbeta;
  StridedState<Real> d_initial_state;
};

// What a mixer hands over: qkv [M,conv_channels] and g, beta [M,Hv], sequences of T tokens.
template <class Real>
DeltaRuleCall<Real> delta_rule_call(const Real* qkv, const Real* g, const Real* beta, const MixerShape& shape,
                                    Real s) {
  DeltaRuleCall<Real> call;
  call.heads_k = shape.heads_k, call.heads_v = shape.heads_v;
  call.head_dim_k = shape.head_dim_k, call.head_dim_v = shape.head_dim_v;
  call.s = s;
  call.set_rows(shape.batch, shape.tokens);
  const int64_t T = shape.tokens, C = shape.conv_channels(), H = shape.heads_v;
  call.q = {qkv, T * C, C, shape.head_dim_k, 1};
  call.k = {qkv + shape.key_dim(), T * C, C, shape.head_dim_k, 1};
  call.v = {qkv + 2 * shape.key_dim(), T * C, C, shape.head_dim_v, 1};
  call.g = {g, T * H, H, 1, 1};
  call.beta = {beta, T * H, H, 1, 1};
  return call;
}

template <class Real>
DeltaRuleGradients<Real> delta_rule_gradients(Real* dqkv, Real* dg, Real* dbeta, const MixerShape& shape) {
  const int64_t T = shape.tokens, C = shape.conv_channels(), H = shape.heads_v;
  return {{dqkv, T * C, C, shape.head_dim_k, 1},
          {dqkv + shape.key_dim(), T * C, C, shape.head_dim_k, 1},
          {dqkv + 2 * shape.key_dim(), T * C, C, shape.head_dim_v, 1},
          {dg, T * H, H, 1, 1},
          {dbeta, T * H, H, 1, 1},
          {}};
}

// o [M,Hv*dv] or its gradient
template <class T>
Strided<T> values_tensor(T* o, const MixerShape& shape) {
  return {o, int64_t(shape.tokens) * shape.value_dim(), shape.value_dim(), shape.head_dim_v, 1};
}

// q, k and v of one token of one head, dense, and the factors of the lengths where these are divided by.
template <class Real>
struct DeltaRuleToken {
  std::vector<Real> q, k, v;
  Real q_factor = 1, k_factor = 1;

  DeltaRuleToken(int dk, int dv) : q(dk), k(dk), v(dv) {}
  void load(const DeltaRuleCall<Real>& call, const DeltaRuleSequence& seq, int t, int h) {
    const int hk = h / call.group(), dk = int(q.size());
    gather(q.data(), call.q.at(seq.row, seq.first + t, hk), call.q.element, dk);
    gather(k.data(), call.k.at(seq.row, seq.first + t, hk), call.k.element, dk);
    gather(v.data(), call.v.at(seq.row, seq.first + t, h), call.v.element, int(v.size()));
    if (!call.normalized) return;
    q_factor = normalize(q.data(), dk);
    k_factor = normalize(k.data(), dk);
  }
};

// Token by token: the definition that the chunked form must meet, and what sampling runs. o [B,T,Hv,dv];
// final_state (none: not wanted) may be initial_state.
template <class Real>
void delta_rule_recurrent(const DeltaRuleCall<Real>& call, const Strided<Real>& o,
                          const StridedState<Real>& final_state) {
  const int dk = call.head_dim_k, dv = call.head_dim_v;
  const Real s = call.s;
  for_each_head(int(call.sequences.size()), call.heads_v, call.products(), [&](int n, int h) {
    const DeltaRuleSequence& seq = call.sequences[n];
    DeltaRuleToken<Real> x(dk, dv);
    std::vector<Real> u(dv), out(dv), own;
    const bool in_place = final_state && final_state.key == dv && final_state.value == 1;
    if (!in_place) own.resize(size_t(dk) * dv);
    Real* S = in_place ? final_state.at(n, h) : own.data();
    if (!call.initial_state || call.initial_state.at(n, h) != S || !in_place)
      load_state(S, call.initial_state, n, h, dk, dv);
    for (int t = 0; t < seq.tokens; t++) {
      x.load(call, seq, t, h);
      const Real *q = x.q.data(), *k = x.k.data();
      const Real alpha = std::exp(*call.g.at(seq.row, seq.first + t, h)),
                 write = *call.beta.at(seq.row, seq.first + t, h);
      std::copy_n(x.v.data(), dv, u.data());
      for (int i = 0; i < dk; i++)
        for (int j = 0; j < dv; j++) {
          S[i * dv + j] *= alpha;
          u[j] -= S[i * dv + j] * k[i];
        }
      std::fill(out.begin(), out.end(), Real(0));
      for (int i = 0; i < dk; i++)
        for (int j = 0; j < dv; j++) {
          S[i * dv + j] += k[i] * write * u[j];
          out[j] += s * q[i] * S[i * dv + j];
        }
      scatter(o.at(seq.row, seq.first + t, h), o.element, out.data(), dv);
    }
    if (!in_place) store_state(final_state, n, h, S, dk, dv);
  });
}

// Backward in time of delta_rule_recurrent, in double the exact gradient: for tests. d_final_state may be
// missing.
//   dS += s q do^T    dq = s S do    du = dS^T k    dk = dS u - beta S~ du    dv = beta du    dbeta = du . (v
//   - S~^T k) dS~ = dS - beta k du^T    dg = <dS~, S~>    dS <- alpha dS~
template <class Real>
void delta_rule_recurrent_backward(const DeltaRuleCall<Real>& call, const DeltaRuleGradients<Real>& to,
                                   const Strided<const Real>& d_o,
                                   const StridedState<const Real>& d_final_state) {
  const int dk = call.head_dim_k, dv = call.head_dim_v, group = call.group();
  const Real s = call.s;
  for_each_head(int(call.sequences.size()), call.heads_k, call.products(), [&](int n, int hk) {
    const DeltaRuleSequence& seq = call.sequences[n];
    const int T = seq.tokens;
    DeltaRuleToken<Real> x(dk, dv);
    std::vector<Real> decayed(int64_t(T) * dk * dv), S(dk * dv), dS(dk * dv), u(dv), error(dv), du(dv),
        d_out(dv);
    std::vector<Real> dq(int64_t(T) * dk), dk_of(int64_t(T) * dk), one(dk);
    for (int h = hk * group; h < (hk + 1) * group; h++) {
      const auto error_of = [&](int t) {  // v - S~^T k
        std::copy_n(x.v.data(), dv, error.data());
        small::add_ab(error.data(), x.k.data(), &decayed[int64_t(t) * dk * dv], 1, dk, dv, Real(-1));
      };
      load_state(S.data(), call.initial_state, n, h, dk, dv);
      for (int t = 0; t < T; t++) {
        x.load(call, seq, t, h);
        const Real alpha = std::exp(*call.g.at(seq.row, seq.first + t, h));
        Real* D = &decayed[int64_t(t) * dk * dv];
        for (int e = 0; e < dk * dv; e++) D[e] = alpha * S[e];
        error_of(t);
        std::copy_n(D, dk * dv, S.data());
        small::add_ab(S.data(), x.k.data(), error.data(), dk, 1, dv,
                      *call.beta.at(seq.row, seq.first + t, h));
      }
      load_state(dS.data(), d_final_state, n, h, dk, dv);
      for (int t = T - 1; t >= 0; t--) {
        x.load(call, seq, t, h);
        const int64_t at = seq.first + t;
        const Real beta = *call.beta.at(seq.row, at, h), alpha = std::exp(*call.g.at(seq.row, at, h));
        const Real *k = x.k.data(), *D = &decayed[int64_t(t) * dk * dv];
        gather(d_out.data(), d_o.at(seq.row, at, h), d_o.element, dv);
        error_of(t);
        for (int c = 0; c < dv; c++) u[c] = beta * error[c];
        std::copy_n(D, dk * dv, S.data());
        small::add_ab(S.data(), k, u.data(), dk, 1, dv);
        std::fill(one.begin(), one.end(), Real(0));
        small::add_ab(one.data(), S.data(), d_out.data(), dk, dv, 1, s);
        if (call.normalized) normalize_backward(one.data(), x.q.data(), x.q_factor, dk);
        for (int c = 0; c < dk; c++) dq[int64_t(t) * dk + c] += one[c];
        small::add_ab(dS.data(), x.q.data(), d_out.data(), dk, 1, dv, s);
        std::fill(du.begin(), du.end(), Real(0));
        small::add_ab(du.data(), k, dS.data(), 1, dk, dv);
        std::fill(one.begin(), one.end(), Real(0));
        small::add_ab(one.data(), dS.data(), u.data(), dk, dv, 1);
        small::add_ab(one.data(), D, du.data(), dk, dv, 1, -beta);
        if (call.normalized) normalize_backward(one.data(), k, x.k_factor, dk);
        for (int c = 0; c < dk; c++) dk_of[int64_t(t) * dk + c] += one[c];
        for (int c = 0; c < dv; c++) to.dv.at(seq.row, at, h)[c * to.dv.element] = beta * du[c];
        *to.dbeta.at(seq.row, at, h) = dot(du.data(), error.data(), dv);
        small::add_ab(dS.data(), k, du.data(), dk, 1, dv, -beta);
        *to.dg.at(seq.row, at, h) = dot(dS.data(), D, dk * dv);
        for (Real& y : dS) y *= alpha;
      }
      store_state(to.d_initial_state, n, h, dS.data(), dk, dv);
    }
    for (int t = 0; t < T; t++) {
      scatter(to.dq.at(seq.row, seq.first + t, hk), to.dq.element, &dq[int64_t(t) * dk], dk);
      scatter(to.dk.at(seq.row, seq.first + t, hk), to.dk.element, &dk_of[int64_t(t) * dk], dk);
    }
  });
}

// The same on a mixer's tensors, from and into state [B,Hv,dk,dv].
template <class Real>
void gated_delta_rule_recurrent(Cpu<Real>&, Real* o, Real* state, const Real* qkv, const Real* g,
                                const Real* beta, const MixerShape& shape, Real s) {
  DeltaRuleCall<Real> call = delta_rule_call(qkv, g, beta, shape, s);
  const StridedState<Real> at = dense_state(state, shape.heads_v, shape.head_dim_k, shape.head_dim_v);
  call.initial_state = {at.data, at.sequence, at.head, at.key, at.value};
  delta_rule_recurrent(call, values_tensor(o, shape), at);
}

// From S_0 = 0.
template <class Real>
void gated_delta_rule_recurrent_backward(Cpu<Real>&, Real* dqkv, Real* dg, Real* dbeta, const Real* d_o,
                                         const Real* qkv, const Real* g, const Real* beta,
                                         const MixerShape& shape, Real s) {
  delta_rule_recurrent_backward(delta_rule_call(qkv, g, beta, shape, s),
                                delta_rule_gradients(dqkv, dg, dbeta, shape), values_tensor(d_o, shape), {});
}

constexpr int kSolved = 8;  // rows of a triangular system that are solved together

// The matrices of one chunk of one head, C = kChunk rows (a shorter last chunk fills the first n).
template <class Real>
struct DeltaRuleChunk {
  int n, dk, dv;                         // tokens in this chunk, head sizes
  std::vector<Real> q, k, v, beta;       // inputs
  std::vector<Real> q_factor, k_factor;  // what normalize() returned, where lengths are divided by
  std::vector<double> G;                 // running sum of g, in double: differences of large sums are taken
  std::vector<Real> eG, D;               // e^G_i, and D_ij = e^(G_i - G_j) for i >= j, else 0
  std::vector<Real> kk, qk, bL, DQK;     // as in the file's comment; kk, qk the bare products k.k, q.k
  std::vector<Real> KS, bE, K_to_end;    // KS = K S_0

  DeltaRuleChunk(int head_dim_k, int head_dim_v)
      : n(0),
        dk(head_dim_k),
        dv(head_dim_v),
        q(kChunk * dk),
        k(kChunk * dk),
        v(kChunk * dv),
        beta(kChunk),
        q_factor(kChunk),
        k_factor(kChunk),
        G(kChunk),
        eG(kChunk),
        D(kChunk * kChunk),
        kk(kChunk * kChunk),
        qk(kChunk * kChunk),
        bL(kChunk * kChunk),
        DQK(kChunk * kChunk),
        KS(kChunk * dv),
        bE(kChunk * dv),
        K_to_end(kChunk * dk) {}
};

// Reads chunk `index` of a sequence, value head h.
template <class Real>
void load_chunk(DeltaRuleChunk<Real>& c, const DeltaRuleCall<Real>& call, const DeltaRuleSequence& seq, int h,
                int index) {
  const int hk = h / call.group(), first = index * kChunk;
  c.n = std::min(kChunk, seq.tokens - first);
  for (int i = 0; i < c.n; i++) {
    const int64_t t = seq.first + first + i;
    gather(&c.q[i * c.dk], call.q.at(seq.row, t, hk), call.q.element, c.dk);
    gather(&c.k[i * c.dk], call.k.at(seq.row, t, hk), call.k.element, c.dk);
    gather(&c.v[i * c.dv], call.v.at(seq.row, t, h), call.v.element, c.dv);
    if (call.normalized) {
      c.q_factor[i] = normalize(&c.q[i * c.dk], c.dk);
      c.k_factor[i] = normalize(&c.k[i * c.dk], c.dk);
    }
    c.G[i] = *call.g.at(seq.row, t, h) + (i ? c.G[i - 1] : 0);
    c.beta[i] = *call.beta.at(seq.row, t, h);
  }
}

// bL, DQK, KS, bE, K_to_end from the inputs and the state S0 [dk,dv] at the chunk's start.
template <class Real>
void prepare_chunk(DeltaRuleChunk<Real>& c, const Real* S0) {
  const int n = c.n, dk = c.dk, dv = c.dv;
  std::fill_n(c.kk.begin(), n * n, Real(0));
  std::fill_n(c.qk.begin(), n * n, Real(0));
  // (1), (3)
  small::add_abt(c.kk.data(), c.k.data(), c.k.data(), n, dk, n);
  small::add_abt(c.qk.data(), c.q.data(), c.k.data(), n, dk, n);
  for (int i = 0; i < n; i++) {
    c.eG[i] = std::exp(Real(c.G[i]));
#pragma omp simd
    for (int j = 0; j < n; j++) {
      const Real decay =
          std::exp(std::min(Real(c.G[i] - c.G[j]), Real(0)));  // no overflow above the diagonal either
      c.D[i * n + j] = i >= j ? decay : Real(0);
      c.bL[i * n + j] = i > j ? c.beta[i] * decay * c.kk[i * n + j] : Real(0);
      c.DQK[i * n + j] = c.D[i * n + j] * c.qk[i * n + j];
    }
  }
  // (F1), (F2)
  std::fill_n(c.KS.begin(), n * dv, Real(0));
  small::add_ab(c.KS.data(), c.k.data(), S0, n, dk, dv);
  for (int i = 0; i < n; i++)
    for (int e = 0; e < dv; e++)
      c.bE[i * dv + e] = c.beta[i] * (c.v[i * dv + e] - c.eG[i] * c.KS[i * dv + e]);
  for (int first = 0; first < n; first += kSolved) {  // forward substitution, some rows at a time
    const int rows = std::min(kSolved, n - first);
    Real* X = &c.bE[first * dv];
    small::add_ab(X, &c.bL[first * n], n, c.bE.data(), rows, first, dv, Real(-1));
    for (int i = 1; i < rows; i++)
      small::add_ab(X + i * dv, &c.bL[(first + i) * n + first], n, X, 1, i, dv, Real(-1));
  }
  for (int i = 0; i < n; i++)
    for (int e = 0; e < dk; e++) c.K_to_end[i * dk + e] = c.D[(n - 1) * n + i] * c.k[i * dk + e];
}

// o [B,T,Hv,dv] in chunks; final_state may be missing. saved [saved_size()]: for the backward (nullptr: none
// follows).
template <class Real>
void delta_rule_forward(const DeltaRuleCall<Real>& call, const Strided<Real>& o,
                        const StridedState<Real>& final_state, Real* saved) {
  const int dk = call.head_dim_k, dv = call.head_dim_v;
  const Real s = call.s;
  for_each_head(int(call.sequences.size()), call.heads_v, call.products(), [&](int sequence, int h) {
    const DeltaRuleSequence& seq = call.sequences[sequence];
    DeltaRuleChunk<Real> c(dk, dv);
    std::vector<Real> out(kChunk * dv), S(dk * dv), start(saved ? 0 : dk * dv);
    load_state(S.data(), call.initial_state, sequence, h, dk, dv);
    for (int index = 0; index < seq.chunks(); index++) {
      Real* S0 = saved ? saved + call.saved_offset(sequence, h) + int64_t(index) * dk * dv : start.data();
      std::copy(S.begin(), S.end(), S0);
      load_chunk(c, call, seq, h, index);
      prepare_chunk(c, S0);
      const int n = c.n;
      std::fill(out.begin(), out.end(), Real(0));
      small::add_ab(out.data(), c.q.data(), S0, n, dk, dv, s);  // (F3)
      for (int i = 0; i < n; i++)
        for (int e = 0; e < dv; e++) out[i * dv + e] *= c.eG[i];
      small::add_ab(out.data(), c.DQK.data(), c.bE.data(), n, n, dv, s);
      for (Real& x : S) x *= c.eG[n - 1];  // (F4)
      small::add_atb(S.data(), c.K_to_end.data(), c.bE.data(), dk, n, dv);
      for (int i = 0; i < n; i++)
        scatter(o.at(seq.row, seq.first + index * kChunk + i, h), o.element, &out[i * dv], dv);
    }
    store_state(final_state, sequence, h, S.data(), dk, dv);
  });
}

// Gradients from d_o [B,T,Hv,dv], d_final_state (missing: zeros) and what the forward saved.
template <class Real>
void delta_rule_backward(const DeltaRuleCall<Real>& call, const DeltaRuleGradients<Real>& to,
                         const Strided<const Real>& d_o, const StridedState<const Real>& d_final_state,
                         const Real* saved) {
  const int dk = call.head_dim_k, dv = call.head_dim_v, group = call.group();
  const Real s = call.s;
  for_each_head(int(call.sequences.size()), call.heads_k, call.products(), [&](int sequence, int hk) {
    const DeltaRuleSequence& seq = call.sequences[sequence];
    DeltaRuleChunk<Real> c(dk, dv);
    std::vector<Real> s_dO(kChunk * dv), Y(kChunk * dv), dqk(kChunk * kChunk), dkk(kChunk * kChunk);
    std::vector<Real> dQ(kChunk * dk), dK(kChunk * dk), dK_to_end(kChunk * dk), spans(kChunk), reads(kChunk),
        writes(kChunk), dS(dk * dv);
    std::vector<Real> dKS(kChunk * dv);
    for (int h = hk * group; h < (hk + 1) * group; h++) {
      load_state(dS.data(), d_final_state, sequence, h, dk, dv);
      for (int index = seq.chunks() - 1; index >= 0; index--) {
        const Real* S0 = saved + call.saved_offset(sequence, h) + int64_t(index) * dk * dv;
        load_chunk(c, call, seq, h, index);
        prepare_chunk(c, S0);
        const int n = c.n, last = n - 1;
        const int64_t first = seq.first + int64_t(index) * kChunk;
        for (int i = 0; i < n; i++) {
          gather(&s_dO[i * dv], d_o.at(seq.row, first + i, h), d_o.element, dv);
          for (int e = 0; e < dv; e++) s_dO[i * dv + e] *= s;
        }
        const auto clear = [](std::vector<Real>& x) { std::fill(x.begin(), x.end(), Real(0)); };
        for (auto* x : {&Y, &dqk, &dkk, &dQ, &dK, &dK_to_end, &spans}) clear(*x);

        // (B1), and the products with dO, E, S and dS of (G2) to (G4)
        small::add_atb(Y.data(), c.DQK.data(), s_dO.data(), n, n, dv);
        small::add_ab(Y.data(), c.K_to_end.data(), dS.data(), n, dk, dv);
        small::add_abt(dqk.data(), s_dO.data(), c.bE.data(), n, dv, n);
        small::add_abt(dK_to_end.data(), c.bE.data(), dS.data(), n, dv, dk);
        small::add_abt(dQ.data(), s_dO.data(), S0, n, dv, dk);

        std::vector<Real>& X = Y;  // (B2) in place: backward substitution with (I + bL)^T
        const auto subtract = [&](int row, int rows, int from,
                                  int to) {  // bL[from:to,row:row+rows]^T X[from:to]
          small::add_atb(X.data() + row * dv, c.bL.data() + from * n + row, n, X.data() + from * dv, rows,
                         to - from, dv, Real(-1));
        };
        for (int begin = last / kSolved * kSolved; begin >= 0; begin -= kSolved) {
          const int end = std::min(begin + kSolved, n);
          subtract(begin, end - begin, end, n);
          for (int i = end - 2; i >= begin; i--) subtract(i, 1, i + 1, end);
        }
        small::add_abt(dkk.data(), X.data(), c.bE.data(), n, dv, n, Real(-1));
        for (int i = 0; i < n; i++)
          for (int e = 0; e < dv; e++) dKS[i * dv + e] = -c.beta[i] * c.eG[i] * X[i * dv + e];
        small::add_abt(dK.data(), dKS.data(), S0, n, dv, dk);

        const Real through_states = c.eG[last] * dot(S0, dS.data(), dk * dv);
        for (Real& x : dS) x *= c.eG[last];  // (B3)
        for (int i = 0; i < n; i++)
          for (int e = 0; e < dv; e++) s_dO[i * dv + e] *= c.eG[i];
        small::add_atb(dS.data(), c.q.data(), s_dO.data(), dk, n, dv);
        small::add_atb(dS.data(), c.k.data(), dKS.data(), dk, n, dv);

        for (int i = 0; i < n; i++) {
          const Real eG = c.eG[i], to_end = c.D[last * n + i], b_i = c.beta[i];
          const Real vX = dot(&c.v[i * dv], &X[i * dv], dv), ksX = eG * dot(&c.KS[i * dv], &X[i * dv], dv);
          Real d_beta = vX - ksX, before = 0;  // (G1), E_i written out; before: sum_{j < t} M_ij
          reads[i] = eG * dot(&c.q[i * dk], &dQ[i * dk], dk) - b_i * ksX;
          writes[i] = to_end * dot(&c.k[i * dk], &dK_to_end[i * dk], dk);
          for (int e = 0; e < dk; e++) {
            dQ[i * dk + e] *= eG;
            dK[i * dk + e] += to_end * dK_to_end[i * dk + e];
          }
          for (int j = 0; j <= i; j++) {
            // (G2): dqk and dkk become the gradients of q_i.k_j and k_i.k_j
            const Real D = c.D[i * n + j], through_L = dkk[i * n + j] * D * c.kk[i * n + j];
            dqk[i * n + j] *= D;
            if (j < i) {
              before += dqk[i * n + j] * c.qk[i * n + j] + b_i * through_L;
              spans[j + 1] += before;
              d_beta += through_L;
            }
            dkk[i * n + j] *= b_i * D;
          }
          for (int j = i; j < n; j++) dkk[i * n + j] = 0;
          for (int j = i + 1; j < n; j++) dqk[i * n + j] = 0;
          *to.dbeta.at(seq.row, first + i, h) = d_beta;
        }
        // (G3), (G4)
        small::add_ab(dQ.data(), dqk.data(), c.k.data(), n, n, dk);
        small::add_atb(dK.data(), dqk.data(), c.q.data(), n, n, dk);
        small::add_ab(dK.data(), dkk.data(), c.k.data(), n, n, dk);
        small::add_atb(dK.data(), dkk.data(), c.k.data(), n, n, dk);
        Real writes_before = 0, reads_after = 0;  // (G5)
        for (int t = 0; t < n; t++) {
          spans[t] += through_states + writes_before;
          writes_before += writes[t];
        }
        for (int i = last; i >= 0; i--) {
          reads_after += reads[i];
          *to.dg.at(seq.row, first + i, h) = spans[i] + reads_after;
          Real *dq_i = &dQ[i * dk], *dk_i = &dK[i * dk], *dv_i = &dKS[i * dv];
          if (call.normalized) {
            normalize_backward(dq_i, &c.q[i * dk], c.q_factor[i], dk);
            normalize_backward(dk_i, &c.k[i * dk], c.k_factor[i], dk);
          }
          const bool first_of_group = h == hk * group;
          const auto add = [&](const Strided<Real>& sum, const Real* x) {
            Real* at = sum.at(seq.row, first + i, hk);
            for (int e = 0; e < dk; e++)
              at[e * sum.element] = x[e] + (first_of_group ? Real(0) : at[e * sum.element]);
          };
          add(to.dq, dq_i);
          add(to.dk, dk_i);
          for (int e = 0; e < dv; e++) dv_i[e] = c.beta[i] * X[i * dv + e];
          scatter(to.dv.at(seq.row, first + i, h), to.dv.element, dv_i, dv);
        }
      }
      store_state(to.d_initial_state, sequence, h, dS.data(), dk, dv);
    }
  });
}

// o [M,Hv*dv] in chunks on a mixer's tensors; `saved` as gated_delta_rule_saved_bytes asks. Starts from S_0 =
// 0.
template <class Real>
void gated_delta_rule_forward(Cpu<Real>&, Real* o, void* saved, const Real* qkv, const Real* g,
                              const Real* beta, const MixerShape& shape, Real s, void*) {
  delta_rule_forward(delta_rule_call(qkv, g, beta, shape, s), values_tensor(o, shape), {},
                     static_cast<Real*>(saved));
}

// dqkv [M,conv_channels], dg, dbeta [M,Hv] from d_o [M,Hv*dv] and what the forward saved.
template <class Real>
void gated_delta_rule_backward(Cpu<Real>&, Real* dqkv, Real* dg, Real* dbeta, const Real* d_o,
                               const void* saved, const Real* qkv, const Real* g, const Real* beta,
                               const MixerShape& shape, Real s, void*) {
  delta_rule_backward(delta_rule_call(qkv, g, beta, shape, s), delta_rule_gradients(dqkv, dg, dbeta, shape),
                      values_tensor(d_o, shape), {}, static_cast<const Real*>(saved));
}

}  // namespace gdn
