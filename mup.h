// The maximal update parametrization (mup) of a Gated Delta Network: how initial values, learning rates and
// three multipliers change with the model's size, so that a learning rate tuned on a small model is right for a
// large one. To be read from top to bottom: sections 1 to 5 derive, section 6 is the table and the functions,
// section 7 adds depth; 8 and 9 are of the released code and of research options.
// "Measured:" names a section of dev/doc/transfer.md.
//
//   [TP5]  Yang et al., Tensor Programs V, arXiv 2203.03466: the method, and ordinary weights
//   [GDN]  Liu, Gu, Unlocking Feature Learning in Gated Delta Networks at Scale, arXiv 2606.04048: the gates
//          (W_a, W_b, A_log, dt_bias) and the readout scale s; its released code:
//          lauyikfung/gated_delta_net_mup
//   [SSM]  Vankadara, Xu, Haas, Cevher, On Feature Learning in Structured State Space Models, NeurIPS 2024:
//          why a recurrence can defeat estimates like the ones below
//
// Three parametrizations can be chosen:
//   sp    the standard one: nothing changes with size, s = dk^-1/2
//   mup0  the rules of [TP5], with the gates taken for ordinary weights. Made from the text of [GDN]: its
//         released code has no such switch
//   mup   mup0 with the rules of [GDN] for the gates and for s
// At the base size all three are the same network with the same updates, bit for bit.
#pragma once

#include <cmath>
#include <stdexcept>

namespace gdn {

enum class Parametrization { sp, mup0, mup };
enum class OptimizerKind { adamw, sgd };

// What kind of tensor a parameter is. V, T, the batch and the number of conv taps (4) never grow; L in section 7.
enum class TensorClass {
  embedding,    // W_emb [V,d]; where it is tied it is the unembedding too
  unembedding,  // an untied head [V,d]
  hidden,       // every other Linear but the gates': both its sides grow with d
  gate,         // W_a, W_b [H,d]
  gate_scalar,  // A_log, dt_bias [H]
  conv,         // taps of the short convolutions, 4 to a channel
  gain,         // weights of the RMSNorms over d
  output_gain,  // w_o [dv], weight of the RMSNorm of a head's output, shared by all heads
  final_gain,   // the gain of the last RMSNorm, behind all blocks
};
constexpr int kTensorClassCount = 9;

// What a hidden weight sums over: the width d; the value channels of all heads, H dv (W_o); the MLP's inner
// size I (W_down).
enum class FanIn { width, values, inner };

// Decay per step ~ lr: as the tensor's own lr, as that to the power 1/2, or the same at every size.
enum class DecayMode { coupled, sqrt, independent };
// AdamW's eps: one number, or one that scales as the tensor's gradient.
enum class EpsMode { constant, scaled };
// Exponent alpha of the branches' multiplier (L0/L)^alpha; off: depth changes nothing (section 7).
enum class DepthRule { one, half, off };
// The norm that is clipped: of all gradients alike, or clip_weight's.
enum class ClipNorm { plain, scaled };

// Research options; the first of each is the rule derived here (section 9).
enum class VectorRule { vector, hidden };
enum class GateRule { independent, output, aligned };
enum class ReadoutRule { param, sp, mup };

// ---- 1. What grows ----------------------------------------------------------------------------------------
//
// A family is a line of models, one for each width d. One of them, of width d0, is the base, where the
// learning rate is tuned. A model is described by five ratios to the base:
//
//   r = d/d0    r_H = H/H0    r_k = dk/dk0    r_v = dv/dv0    r_I = I/I0
//
// Two families are in use. In both, all value channels together keep their share of the width, r_H r_v = r:
//   fixed heads       r_H = 1,  r_k = r_v = r     head sizes grow
//   fixed head size   r_H = r,  r_k = r_v = 1     the number of heads grows
// The inner size I is 8d/3 rounded up to a multiple of 256, so r_I is r up to that rounding (I/d = 4, 3, 3,
// 2.75 at d = 128, 256, 512, 1024). The rules know the ratios alone, so both families, and those between
// them, come out of the same formulas.

struct ModelShape {
  double width, heads, head_dim_k, head_dim_v, inner;  // d, H (value heads), dk, dv, I
};

struct Mup {
  Parametrization parametrization;
  ModelShape shape, base;
  double logit_factor = 1;  // of the logits, at every width
  VectorRule vectors = VectorRule::vector;
  GateRule gates = GateRule::independent;
  ReadoutRule readout = ReadoutRule::param;
  double layers = 1, base_layers = 1;  // L, L0
  DepthRule depth = DepthRule::one;
};

inline ModelShape base_with_fixed_heads(const ModelShape& m, double base_width, double base_inner) {
  const double shrink = base_width / m.width;
  return {base_width, m.heads, m.head_dim_k * shrink, m.head_dim_v * shrink, base_inner};
}

// The base's number of heads need not be whole: only ratios matter.
inline ModelShape base_with_fixed_head_size(const ModelShape& m, double base_width, double base_inner) {
  return {base_width, m.heads * (base_width / m.width), m.head_dim_k, m.head_dim_v, base_inner};
}

struct Ratios {
  double r, r_H, r_k, r_v, r_I;
};

inline Ratios ratios(const Mup& m) {
  return {m.shape.width / m.base.width, m.shape.heads / m.base.heads, m.shape.head_dim_k / m.base.head_dim_k,
          m.shape.head_dim_v / m.base.head_dim_v, m.shape.inner / m.base.inner};
}

inline double ratio(const Mup& m, FanIn fan_in) {
  const auto [r, r_H, r_k, r_v, r_I] = ratios(m);
  return fan_in == FanIn::inner ? r_I : fan_in == FanIn::values ? r_H * r_v : r;
}

// ---- 2. What is wanted ------------------------------------------------------------------------------------
//
// Coordinate size: a vector v of n coordinates has size Theta(n^a) if its mean square |v|^2 / n is
// Theta(n^2a). "Theta(1)" below means: of the same size at every width. Wanted at every width:
//
//   (i)   every activation has coordinates Theta(1); q and k, normalized to length 1, Theta(dk^-1/2)
//   (ii)  one update of any one tensor changes that tensor's output by Theta(1)
//   (iii) logits are O(1), and one update changes them by Theta(1)
//
// All estimates use one fact about a sum of n terms of size e:
//
//   signs independent: Theta(n^1/2 e)        signs aligned: Theta(n e)
//
// Random weights meet activations independently. An update is made from the activations it will meet again:
// those two are aligned. scripts/coord_check.py checks that sizes come out as wanted. Measured: 10.

// ---- 3. Forward: initial sizes and the two multipliers ----------------------------------------------------
//
// Linear, y = W x with x Theta(1) and fan-in n: a sum of n independent terms, y = Theta(n^1/2 std). So (i)
// asks for
//
//   std ~ n^-1/2          n = d; H dv for W_o; I for W_down
//
// W_a and W_b follow the same rule: their outputs a and b enter alpha = exp(-exp(A_log) softplus(a +
// dt_bias)) and beta = sigmoid(b), which change with a and b at a rate that depends on the sizes of a and b
// alone, so these must be Theta(1) like any activation.
//
// Embedding, x = W_emb[token]: a one-hot input, fan-in 1, so std is constant. The unembedding has the same
// std, which it must where the two are one matrix; its size is mended by the multiplier m_out:
//
// Logits = m_out W h, with h Theta(1) and the d entries of a row of W Theta(1). The final h and the row of a
// token align, in training by (ii) and with tied weights from the start (h contains the embedding of the
// token just read): a sum of d aligned terms, Theta(d). So (iii) asks for
//
//   m_out ~ 1/d
//
// For rows that h does not align with, logits start at Theta(d^-1/2), which (iii) allows. What m_out is at
// the base no estimate says: -logit_factor is to be tuned there like the learning rate and, being the same at
// every width, transfers ([TP5], table 2: alpha_output). It multiplies all gradients, too: where it is
// larger, SGD's best learning rate is smaller. Measured: 8.
//
// Gains (1), conv taps (U(-1/2, 1/2), from 4 taps at any width), A_log and dt_bias (one time scale per head)
// have no fan-in that grows; their initial values are constants.
//
// The gated delta rule, one head (S is [dk,dv], q and k have length 1, v is Theta(1)):
//
//   u_t = beta_t (v_t - alpha_t S_{t-1}^T k_t)     S_t = alpha_t S_{t-1} + k_t u_t^T     o_t = s S_t^T q_t
//
// k has coordinates Theta(dk^-1/2), and S_t is applied to k through alpha_t (I - beta_t k_t k_t^T), which
// never stretches a vector: u is Theta(1), and S, a fading sum of terms k u^T, has entries Theta(dk^-1/2).
// S^T q is a sum of dk terms Theta(1/dk): Theta(dk^-1/2) if q is independent of the keys. Then (i) asks for
//
//   s ~ dk^1/2
//
// where sp, mup0 and the released code of [GDN] have dk^-1/2. How much this matters:
//   * o enters nothing but o / sqrt(mean(o^2) + eps), which with eps = 0 does not see s, nor does any
//     gradient. s acts through eps alone: with dk^-1/2, o^2 falls as dk^-2 until eps = 1e-6 rules the norm.
//     Measured: 11.
//   * The estimate holds while a head's time constant 1/(1 - alpha) is far below dk. A full memory answers:
//     after many more than dk writes S^T q is Theta(1), for random unit keys |S^T q|^2 = beta / (2 - beta) of
//     |v|^2, and S has entries Theta(1). Heads with long time constants, more of them as training goes on,
//     lie between. That recurrences break such estimates is the subject of [SSM].
//   * q and k are not quite independent: silu has a positive mean, so q . k has one, and training may align
//     them further: S^T q is Theta(1) then as well.
// In the last two cases s S^T q grows as dk^1/2, which the norm undoes, while eps spoils a falling o: of
// these estimates the one to scale for is the smallest.

// ---- 4. Backward: the size of a gradient ------------------------------------------------------------------
//
// dX stands for the gradient of the loss with respect to X. The loss is a mean over tokens, whose number is
// fixed: sums over tokens change no exponent. The gradient of the V logits is Theta(1).
//
// The residual stream.  dh = m_out W^T dlogits: a sum over V, which does not grow, so dx = Theta(1/d).
//   RMSNorms and W^T with std d^-1/2 keep this: a sum of d independent terms Theta(d^-1/2) Theta(1/d) is
//   Theta(1/d) again. Any coordinate of an activation as wide as d has a gradient Theta(1/d).
//   (H dv and I count as d here: how I is rounded changes the gradients within the MLP by (r/r_I)^1/2,
//   which is ignored.)
// Hidden.  dW = dy x^T: Theta(1/d).
// Embedding.  As input dW = dx: Theta(1/d). As output dW = m_out dlogits h^T: Theta(1/d) too. So one learning
//   rate serves both where they are tied.
// Gain, conv.  A parameter belongs to one channel c: dw_c = sum over tokens of dy_c x_c: Theta(1/d).
// Output gain.  w_o[j] serves channel j of every head: dw_o[j] = a sum over H heads of terms Theta(1/d) with
//   independent signs, Theta(H^1/2 / d).
// Inside a head (dk ~ dv, and q independent of the keys).  The norm divides by the size dk^-1/2 of S^T q, so
//   d(S^T q) = Theta(dk^1/2 / d). Then, where every sum has independent signs,
//     dS = q d(S^T q)^T         = Theta(1/d)
//     dv = beta dS^T k          = Theta(1/d)             a sum over dk
//     dq = S d(S^T q)           = Theta(dv^1/2 / d)      a sum over dv
//     dk = dS u + ...           = Theta(dv^1/2 / d)      a sum over dv
//   and before the normalization to length 1, which divides by a length Theta(dk^1/2), q and k too have
//   gradients Theta(1/d): W_q, W_k, W_v and their conv taps are like any other hidden weights and taps.
// Gates.  The inputs a and b of a head's gates are single numbers that act on all dv channels:
//     db ~ du . (v - alpha S^T k)   a sum over dv of terms Theta(1/d)
//     da ~ <dS, S>                  a sum over dk dv of terms Theta(dk^-1/2 / d)
//   and with independent signs both are
//     da, db = Theta(dv^1/2 / d)
//   which is Theta(d^-1/2) for fixed heads and Theta(1/d) for fixed head size. dW_a = da h^T, dA_log and
//   d(dt_bias) have that size too. This is the step that [TP5] does not have.
//
// Independent or aligned? "Independent signs" is an estimate at initial values, and a rule that is kept for
// fidelity to [GDN]. Once features are learnt v is correlated with du, and with aligned signs da, db =
// Theta(dv/d), Theta(1) for fixed heads. To that lean theory ([TP5]'s output weights, of which W_a and W_b
// with fixed heads are an example; the spectral condition, arXiv 2310.17813) and the gradients of trained
// gates; losses cannot tell. -gates aligned (section 9) is that rule. Measured: 5.
//
// mup0 takes W_a and W_b for hidden weights, da, db = Theta(1/d), and A_log and dt_bias for a vector of H
// coordinates, whose gradient in [TP5] is Theta(1/H). For fixed heads these are two different estimates of
// the same da and db. For fixed head size mup0 and mup agree.

// ---- 5. Updates -------------------------------------------------------------------------------------------
//
// Let one coordinate of a tensor's output be m times a sum over n entries of the tensor, and let each entry
// change by e, aligned with the Theta(1) input. The output changes by Theta(m n e), which by (ii) and (iii)
// shall be Theta(1):
//
//   AdamW   e = lr, whatever the gradient's size       lr ~ 1 / (m n)
//   SGD     e = lr g, g the size of the gradient       lr ~ 1 / (m n g)
//
// (Momentum multiplies e by a constant. AdamW's e = lr needs gradients well above its constant eps.
// Measured: 7.)
//
// Clipping multiplies the gradient by min(1, clip / norm). In the plain norm, of all gradients alike, d^2
// hidden entries Theta(1/d) and H d gate entries Theta(dv^1/2 / d) have Theta(1), all else d^-1/2: a
// threshold means the same once d is so large that the embedding's V d entries Theta(1/d) no longer count,
// which at V = 50304 they do. The scaled norm's square is what a small step of SGD gains,
//
//   -dL / lr = sum over tensors of learning_rate_scale |g|^2
//
// Theta(1) at every width, and at the base the plain norm's square. Theta(1) is the sum, thanks to hidden
// weights, embedding, taps and gains over d, not each term. For fixed heads the gates have d^-1/2 H d dv/d^2
// and their scalars d^1/2 H dv/d^2, for fixed head size the output gain d^1/2 dv H/d^2: all three d^-1/2.
// (With gradients and rates of aligned signs the gates' terms would be Theta(1).) Measured: 9.
//
// Decay pulls a tensor towards 0, which is a meaningful value for matrices that are summed over, but not for
// gains (1), taps and time scales; rare tokens' embeddings would fade between their occurrences. A step
// shrinks weights by lr decay with the tensor's own lr (coupled, as in [GDN]), so hidden weights forget over
// 1 / (lr decay) ~ d steps; or by the same at every width (independent). The estimates above do not choose.
// Measured: 6.

// ---- 6. The table, and what follows from it ---------------------------------------------------------------
//
// Exponents of r, with I ~ d (m: multiplier of the output, n: fan-in, g: gradient):
//
//                        std    m     n    g, fixed heads      AdamW  SGD, fixed heads   SGD, fixed head size
//                                          mup      mup0              mup      mup0      mup = mup0
//   embedding            0      0     0    -1       -1          0     +1       +1        +1
//   unembedding          0     -1    +1    -1       -1          0     +1       +1        +1
//   hidden              -1/2    0    +1    -1       -1         -1      0        0         0
//   gate                -1/2    0    +1    -1/2     -1         -1     -1/2      0         0
//   gate scalar          -      0     0    -1/2      0          0     +1/2      0        +1
//   conv                 0      0     0    -1       -1          0     +1       +1        +1
//   gain, final gain     -      0     0    -1       -1          0     +1       +1        +1
//   output gain          -      0     0    -1       -1          0     +1       +1        +1/2
//
// Measured: 1 (AdamW, to d = 2048), 2 and 3 (SGD, to d = 1024), 4 (conv and gain), 12 (weak places). 1 to 3
// are of -logit_factor 4 and, under SGD, eight more constants, and of runs before W_down had the fan-in I.

// How a tensor grows, as multiples of the base's.
struct Growth {
  double std;         // of its initial values
  double multiplier;  // of its output
  double fan_in;      // entries of the tensor that one coordinate of its output sums over
  double gradient;    // one entry of its gradient
  double change = 1;  // wanted of its output by one update: 1 but for depth
};

inline Growth growth(const Mup& m, TensorClass cls, FanIn fan_in) {
  if (m.parametrization == Parametrization::sp) return {1, 1, 1, 1};
  const auto [r, r_H, r_k, r_v, r_I] = ratios(m);
  const double n = ratio(m, fan_in);
  const bool mup0 = m.parametrization == Parametrization::mup0;
  // clang-format off
  switch (cls) {
    case TensorClass::embedding:   return {1, 1, 1, 1 / r};
    case TensorClass::unembedding: return {1, 1 / r, r, 1 / r};
    case TensorClass::hidden:      return {std::sqrt(1 / n), 1, n, 1 / r};
    case TensorClass::gate:        if (mup0) return {std::sqrt(1 / r), 1, r, 1 / r};
                                   return {std::sqrt(1 / r), 1, r, std::sqrt(r_v) / r};
    case TensorClass::gate_scalar: if (mup0) return {1, 1, 1, 1 / r_H};
                                   return {1, 1, 1, std::sqrt(r_v) / r};
    case TensorClass::conv:
    case TensorClass::gain:
    case TensorClass::final_gain:  return {1, 1, 1, 1 / r};
    case TensorClass::output_gain: return {1, 1, 1, std::sqrt(r_H) / r};
  }
  // clang-format on
  throw std::logic_error("growth: unknown tensor class");
}

// growth(), or what a research option has in its place (section 9), and what depth does to it (section 7).
inline Growth chosen_growth(const Mup& m, TensorClass cls, FanIn fan_in);

constexpr double kBaseStd = 0.02;  // GPT-2's, of every Linear and of the embedding, at the base

// Standard deviation of the initial values of embedding, unembedding, hidden weights and gates.
inline double init_std(const Mup& m, TensorClass cls, FanIn fan_in = FanIn::width) {
  if (cls > TensorClass::gate) throw std::logic_error("init_std: this class is not drawn from a normal");
  return kBaseStd * chosen_growth(m, cls, fan_in).std;
}

// Conv taps are drawn from U(-x, x); this is x.
inline double conv_init_range(const Mup& m) {
  return 0.5 * chosen_growth(m, TensorClass::conv, FanIn::width).std;
}

// m_out
inline double logit_scale(const Mup& m) {
  return m.parametrization == Parametrization::sp ? m.logit_factor : m.logit_factor / ratios(m).r;
}

// s: dk^-1/2; under mup what that is at the base, times r_k^1/2
inline double readout_scale(const Mup& m) {
  const bool as_mup = m.readout == ReadoutRule::param ? m.parametrization == Parametrization::mup
                                                      : m.readout == ReadoutRule::mup;
  if (!as_mup) return 1 / std::sqrt(m.shape.head_dim_k);
  return 1 / std::sqrt(m.base.head_dim_k) * std::sqrt(ratios(m).r_k);
}

// A tensor's learning rate as a multiple of that of the base.
inline double learning_rate_scale(const Mup& m, OptimizerKind optimizer, TensorClass cls,
                                  FanIn fan_in = FanIn::width) {
  const Growth c = chosen_growth(m, cls, fan_in);
  const double change_per_entry = c.multiplier * c.fan_in;
  const double entries = optimizer == OptimizerKind::adamw ? change_per_entry : change_per_entry * c.gradient;
  return c.change / entries;
}

// AdamW's eps as a multiple of that of the base. Scaled, it is the same share of a gradient at every size, and
// a loss times x with eps times x gives the same update.
inline double epsilon_scale(const Mup& m, TensorClass cls, EpsMode mode, FanIn fan_in = FanIn::width) {
  return mode == EpsMode::constant ? 1 : chosen_growth(m, cls, fan_in).gradient;
}

// The weight of a tensor's squared gradient in the norm that is clipped.
inline double clip_weight(const Mup& m, TensorClass cls, ClipNorm norm, FanIn fan_in = FanIn::width) {
  return norm == ClipNorm::plain ? 1 : learning_rate_scale(m, OptimizerKind::sgd, cls, fan_in);
}

inline bool has_weight_decay(TensorClass cls) {
  return cls == TensorClass::hidden || cls == TensorClass::gate || cls == TensorClass::unembedding;
}

// What multiplies the decay of a class: a step shrinks its weights by lr learning_rate_scale decay this.
inline double weight_decay_scale(const Mup& m, OptimizerKind optimizer, TensorClass cls, DecayMode mode,
                                 FanIn fan_in = FanIn::width) {
  if (!has_weight_decay(cls)) return 0;
  if (mode == DecayMode::coupled) return 1;
  const double scale = learning_rate_scale(m, optimizer, cls, fan_in);
  return mode == DecayMode::sqrt ? 1 / std::sqrt(scale) : 1 / scale;
}

// ---- 7. Depth ---------------------------------------------------------------------------------------------
//
// More layers, of width unchanged: rho = L/L0. Each layer adds two branches to the residual stream, a mixer and
// an MLP, here with one multiplier for all (Yang et al., Tensor Programs VI, arXiv 2310.02244; Dey et al.,
// CompleteP, arXiv 2505.01618, for transformers; that a gated delta rule asks for nothing else is ours):
//
//   x_l+1 = x_l + rho^-alpha branch(rmsnorm(x_l))
//
// Forward.  A branch reads a normalized stream and is Theta(1) at its start, whatever L: nothing inside it,
//   the recurrence included, depends on L. Branches of random weights add up with independent signs: the sum is
//   Theta(rho^(1/2 - alpha)), which stays bounded for alpha >= 1/2.
// Update.  What one update makes of all branches points in one direction, that of the gradient of x, and adds up
//   aligned: L changes e of the branches' outputs move x by L rho^-alpha e. Wanted is Theta(1), so
//
//     e ~ rho^(alpha - 1)          in place of condition (ii), for every tensor inside a block
//
//   At alpha = 1 each block still changes its output by Theta(1), that is to first order and beyond: it learns
//   features. At alpha = 1/2 it changes by rho^-1/2, ever more linearly. Hence alpha = 1 (-depth_alpha).
// Backward.  dx is what it was, since the stream is an identity plus changes that are Theta(1) in sum. A branch
//   receives rho^-alpha dx, so that every gradient inside a block is rho^-alpha of what it was.
// Both take the stream for Theta(1), made of the embedding. Where the branches are larger than it at the start, as
//   here with 0.02, the stream itself falls as rho^(1/2 - alpha), and what the norms divide by it grows: the share
//   of x that an update moves, and dx, which SGD's updates follow. Measured: 13.
//
// So by section 5, for all tensors inside blocks, and with exponents of width as they are,
//
//                    init     gradient       AdamW            SGD                AdamW's eps
//   in a block       1        rho^-alpha     rho^(alpha-1)    rho^(2 alpha-1)    rho^-alpha
//   outside          1        1              1                1                  1
//
// Outside are embedding, unembedding and the last norm's gain. With alpha = 1 AdamW needs the multiplier alone.
// The scaled norm of section 5 stays: L blocks, each rho^(2 alpha-1) rho^(-2 alpha). The multiplier is exact in
// no parameter: it goes into the products of W_o and W_down (gdn/model.h). At L = L0, and by -depth_alpha off,
// nothing changes, bit for bit. Measured, on small models: 13.

inline bool is_in_block(TensorClass cls) {
  return cls != TensorClass::embedding && cls != TensorClass::unembedding && cls != TensorClass::final_gain;
}

// rho^x; 1 under sp and where depth is off
inline double depth_power(const Mup& m, double x) {
  if (m.parametrization == Parametrization::sp || m.depth == DepthRule::off) return 1;
  return std::pow(m.layers / m.base_layers, x);
}

inline double depth_alpha(const Mup& m) { return m.depth == DepthRule::half ? 0.5 : 1; }

// rho^-alpha, what the two branches of a layer are multiplied by
inline double residual_scale(const Mup& m) { return depth_power(m, -depth_alpha(m)); }

inline Growth with_depth(const Mup& m, TensorClass cls, Growth c) {
  if (!is_in_block(cls)) return c;
  c.gradient *= residual_scale(m);
  c.change = depth_power(m, depth_alpha(m) - 1);
  return c;
}

// ---- 8. Where the released code of [GDN] differs ----------------------------------------------------------
//
// The same: gates (AdamW -1, SGD -1/2), gate scalars (0, +1/2), embedding (0, +1), hidden (-1, 0), logits
// d0/d, AdamW's constant eps 1e-8 and coupled decay 0.1. Other than here, in its code:
//   * s is dk^-1/2 under every parametrization. Here: -param mup -readout sp.
//   * Of its two muP models one (gdn-mup.py) multiplies the mixer's output by d0/d; the one that its README
//     runs (gdn.py) does not, and is the one followed here.
//   * Hidden weights start at 0.5 d^-1/2 with AdamW, 0.031 at d = 256, where its sp has 0.02: its sp and muP
//     are not one network at the base. With SGD 0.32 d^-1/2, which is 0.02 there.
//   * Conv taps start from a normal with the hidden weights' std, 0.02 to 0.03 at the base, where
//     U(-1/2, 1/2) has 0.29: its silu is nearly linear there, and q . k has no positive mean.
//   * Gains and taps are scaled like hidden weights (AdamW -1, SGD 0): -gains hidden. Taps decay; here not.
//   * Under sp with AdamW embedding and output gain decay, under muP they do not; here never. So its sp and
//     muP differ in decay as well.
//   * The plain norm is clipped, with SGD as well; here that is -clip_norm plain.
//   * Heads may grow in number, with the multipliers of fixed heads. The rules for fixed head size are ours.
// Later work of the same authors (Fan, Liu, Gu, arXiv 2510.15262) has decay ~ d^1/2 for AdamW's hidden
// weights; neither its code nor this one uses it.

// ---- 9. Research options ----------------------------------------------------------------------------------
//
// Rules that were measured against the table, none a default: -gates output, aligned; -gains hidden; -readout
// sp, mup. What they are and why, and chosen_growth(): gdn/mup_research.h.

}  // namespace gdn

#include "gdn/mup_research.h"
