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

// Token by token, from and into state [B,Hv,dk,dv]: for sampling, and the definition the chunked form must
// meet. o [M,Hv*dv]; qkv [M,conv_channels]; g, beta [M,Hv].
template <class Real>
void gated_delta_rule_recurrent(Cpu<Real>&, Real* o, Real* state, const Real* qkv, const Real* g,
                                const Real* beta, const MixerShape& shape, Real s) {
  const int dk = shape.head_dim_k, dv = shape.head_dim_v, H = shape.heads_v, group = H / shape.heads_k;
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < shape.batch; b++)
    for (int h = 0; h < H; h++) {
      Real* S = state + (int64_t(b) * H + h) * dk * dv;
      std::vector<Real> u(dv);
      for (int t = 0; t < shape.tokens; t++) {
        const int64_t m = int64_t(b) * shape.tokens + t;
        const Real* q = qkv + m * shape.conv_channels() + (h / group) * dk;
        const Real *k = q + shape.key_dim(),
                   *v = qkv + m * shape.conv_channels() + 2 * shape.key_dim() + h * dv;
        const Real alpha = std::exp(g[m * H + h]), write = beta[m * H + h];
        Real* out = o + (m * H + h) * dv;
        std::copy_n(v, dv, u.data());
        for (int i = 0; i < dk; i++)
          for (int j = 0; j < dv; j++) {
            S[i * dv + j] *= alpha;
            u[j] -= S[i * dv + j] * k[i];
          }
        std::fill_n(out, dv, Real(0));
        for (int i = 0; i < dk; i++)
          for (int j = 0; j < dv; j++) {
            S[i * dv + j] += k[i] * write * u[j];
            out[j] += s * q[i] * S[i * dv + j];
          }
      }
    }
}

// Backward in time of gated_delta_rule_recurrent from S_0 = 0, in double the exact gradient: for tests.
//   dS += s q do^T    dq = s S do    du = dS^T k    dk = dS u - beta S~ du    dv = beta du    dbeta = du . (v
//   - S~^T k) dS~ = dS - beta k du^T    dg = <dS~, S~>    dS <- alpha dS~
template <class Real>
void gated_delta_rule_recurrent_backward(Cpu<Real>&, Real* dqkv, Real* dg, Real* dbeta, const Real* d_o,
                                         const Real* qkv, const Real* g, const Real* beta,
                                         const MixerShape& shape, Real s) {
  const int dk = shape.head_dim_k, dv = shape.head_dim_v, H = shape.heads_v, group = H / shape.heads_k;
  const int T = shape.tokens, C = shape.conv_channels();
  std::fill_n(dqkv, int64_t(shape.rows()) * C, Real(0));
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < shape.batch; b++)
    for (int hk = 0; hk < shape.heads_k; hk++)
      for (int h = hk * group; h < (hk + 1) * group; h++) {
        std::vector<Real> decayed(int64_t(T) * dk * dv), S(dk * dv), dS(dk * dv), u(dv), error(dv), du(dv);
        const auto row = [&](int t) { return (int64_t(b) * T + t) * C; };
        const auto error_of = [&](int t) {  // v - S~^T k
          const Real *k = qkv + row(t) + shape.key_dim() + hk * dk,
                     *v = qkv + row(t) + 2 * shape.key_dim() + h * dv;
          std::copy_n(v, dv, error.data());
          small::add_ab(error.data(), k, &decayed[int64_t(t) * dk * dv], 1, dk, dv, Real(-1));
        };
        for (int t = 0; t < T; t++) {
          const int64_t i = (int64_t(b) * T + t) * H + h;
          Real* D = &decayed[int64_t(t) * dk * dv];
          for (int e = 0; e < dk * dv; e++) D[e] = std::exp(g[i]) * S[e];
          error_of(t);
          std::copy_n(D, dk * dv, S.data());
          small::add_ab(S.data(), qkv + row(t) + shape.key_dim() + hk * dk, error.data(), dk, 1, dv, beta[i]);
        }
        for (int t = T - 1; t >= 0; t--) {
          const int64_t i = (int64_t(b) * T + t) * H + h;
          const Real *q = qkv + row(t) + hk * dk, *k = q + shape.key_dim(),
                     *D = &decayed[int64_t(t) * dk * dv];
          const Real* d_out = d_o + i * dv;
          Real *dq = dqkv + row(t) + hk * dk, *dk_t = dq + shape.key_dim();
          Real* dv_t = dqkv + row(t) + 2 * shape.key_dim() + h * dv;
          error_of(t);
          for (int c = 0; c < dv; c++) u[c] = beta[i] * error[c];
          std::copy_n(D, dk * dv, S.data());
          small::add_ab(S.data(), k, u.data(), dk, 1, dv);
          small::add_ab(dq, S.data(), d_out, dk, dv, 1, s);
          small::add_ab(dS.data(), q, d_out, dk, 1, dv, s);
          std::fill(du.begin(), du.end(), Real(0));
          small::add_ab(du.data(), k, dS.data(), 1, dk, dv);
          small::add_ab(dk_t, dS.data(), u.data(), dk, dv, 1);
          small::add_ab(dk_t, D, du.data(), dk, dv, 1, -beta[i]);
          for (int c = 0; c < dv; c++) dv_t[c] = beta[i] * du[c];
          dbeta[i] = dot(du.data(), error.data(), dv);
          small::add_ab(dS.data(), k, du.data(), dk, 1, dv, -beta[i]);
          dg[i] = dot(dS.data(), D, dk * dv);
          for (Real& x : dS) x *= std::exp(g[i]);
        }
      }
}

constexpr int kSolved = 8;  // rows of a triangular system that are solved together

// The matrices of one chunk of one head, C = kChunk rows (a shorter last chunk fills the first n).
template <class Real>
struct DeltaRuleChunk {
  int n, dk, dv;                       // tokens in this chunk, head sizes
  std::vector<Real> q, k, v, beta;     // inputs
  std::vector<double> G;               // running sum of g, in double: differences of large sums are taken
  std::vector<Real> eG, D;             // e^G_i, and D_ij = e^(G_i - G_j) for i >= j, else 0
  std::vector<Real> kk, qk, bL, DQK;   // as in the file's comment; kk, qk the bare products k.k, q.k
  std::vector<Real> KS, bE, K_to_end;  // KS = K S_0

  DeltaRuleChunk(int head_dim_k, int head_dim_v)
      : n(0),
        dk(head_dim_k),
        dv(head_dim_v),
        q(kChunk * dk),
        k(kChunk * dk),
        v(kChunk * dv),
        beta(kChunk),
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

// Reads chunk `index` of sequence b, value head h.
template <class Real>
void load_chunk(DeltaRuleChunk<Real>& c, const Real* qkv, const Real* g, const Real* beta,
                const MixerShape& shape, int b, int h, int index) {
  const int H = shape.heads_v, hk = h / (H / shape.heads_k), first = index * kChunk;
  c.n = std::min(kChunk, shape.tokens - first);
  for (int i = 0; i < c.n; i++) {
    const int64_t m = int64_t(b) * shape.tokens + first + i;
    const Real* row = qkv + m * shape.conv_channels();
    std::copy_n(row + hk * c.dk, c.dk, &c.q[i * c.dk]);
    std::copy_n(row + shape.key_dim() + hk * c.dk, c.dk, &c.k[i * c.dk]);
    std::copy_n(row + 2 * shape.key_dim() + h * c.dv, c.dv, &c.v[i * c.dv]);
    c.G[i] = g[m * H + h] + (i ? c.G[i - 1] : 0);
    c.beta[i] = beta[m * H + h];
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

// o [M,Hv*dv] in chunks; `saved` as gated_delta_rule_saved_bytes asks. Starts from S_0 = 0.
template <class Real>
void gated_delta_rule_forward(Cpu<Real>&, Real* o, void* saved, const Real* qkv, const Real* g,
                              const Real* beta, const MixerShape& shape, Real s, void*) {
  const int dk = shape.head_dim_k, dv = shape.head_dim_v, H = shape.heads_v;
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < shape.batch; b++)
    for (int h = 0; h < H; h++) {
      DeltaRuleChunk<Real> c(dk, dv);
      std::vector<Real> out(kChunk * dv), S(dk * dv);
      for (int index = 0; index < shape.chunks(); index++) {
        Real* S0 = static_cast<Real*>(saved) + ((int64_t(b) * H + h) * shape.chunks() + index) * dk * dv;
        std::copy(S.begin(), S.end(), S0);
        load_chunk(c, qkv, g, beta, shape, b, h, index);
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
          std::copy_n(&out[i * dv], dv, o + ((int64_t(b) * shape.tokens + index * kChunk + i) * H + h) * dv);
      }
    }
}

// dqkv [M,conv_channels], dg, dbeta [M,Hv] from d_o [M,Hv*dv] and what the forward saved.
template <class Real>
void gated_delta_rule_backward(Cpu<Real>&, Real* dqkv, Real* dg, Real* dbeta, const Real* d_o,
                               const void* saved, const Real* qkv, const Real* g, const Real* beta,
                               const MixerShape& shape, Real s, void*) {
  const int dk = shape.head_dim_k, dv = shape.head_dim_v, H = shape.heads_v, group = H / shape.heads_k;
  const int C = shape.conv_channels();
#pragma omp parallel for collapse(2) schedule(static)
  for (int b = 0; b < shape.batch; b++)
    for (int hk = 0; hk < shape.heads_k; hk++) {
      DeltaRuleChunk<Real> c(dk, dv);
      std::vector<Real> s_dO(kChunk * dv), Y(kChunk * dv), dqk(kChunk * kChunk), dkk(kChunk * kChunk);
      std::vector<Real> dQ(kChunk * dk), dK(kChunk * dk), dK_to_end(kChunk * dk), spans(kChunk),
          reads(kChunk), writes(kChunk), dS(dk * dv);
      std::vector<Real> dKS(kChunk * dv);
      for (int h = hk * group; h < (hk + 1) * group; h++) {
        std::fill(dS.begin(), dS.end(), Real(0));
        for (int index = shape.chunks() - 1; index >= 0; index--) {
          const Real* S0 =
              static_cast<const Real*>(saved) + ((int64_t(b) * H + h) * shape.chunks() + index) * dk * dv;
          load_chunk(c, qkv, g, beta, shape, b, h, index);
          prepare_chunk(c, S0);
          const int n = c.n, last = n - 1;
          const int64_t first = int64_t(b) * shape.tokens + index * kChunk;
          for (int i = 0; i < n; i++)
            for (int e = 0; e < dv; e++) s_dO[i * dv + e] = s * d_o[((first + i) * H + h) * dv + e];
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
            dbeta[(first + i) * H + h] = d_beta;
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
            dg[(first + i) * H + h] = spans[i] + reads_after;
            Real *dq = dqkv + (first + i) * C + hk * dk, *dk_i = dq + shape.key_dim();
            Real* dv_i = dqkv + (first + i) * C + 2 * shape.key_dim() + h * dv;
            const bool first_of_group = h == hk * group;
            for (int e = 0; e < dk; e++) {
              dq[e] = dQ[i * dk + e] + (first_of_group ? Real(0) : dq[e]);
              dk_i[e] = dK[i * dk + e] + (first_of_group ? Real(0) : dk_i[e]);
            }
            for (int e = 0; e < dv; e++) dv_i[e] = c.beta[i] * X[i * dv + e];
          }
        }
      }
    }
}

}  // namespace gdn
