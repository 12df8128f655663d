// The maximal update parametrization (mup) of a Gated Delta Network: how initial values, learning rates and
// two multipliers change with the model's size, so that a learning rate tuned on a small model is right for a
// large one. Written to be read from top to bottom; every constant stands beside its derivation.
//
//   Sources  [TP5] Yang et al., Tensor Programs V, arXiv 2203.03466: the method, and ordinary weights
//            [GDN] Liu, Gu, Unlocking Feature Learning in Gated Delta Networks at Scale, arXiv 2606.04048:
//                  the gates (W_a, W_b, A_log, dt_bias) and the readout scale s
//
// Three parametrizations can be chosen:
//   sp    the standard one: nothing changes with size, s = dk^-1/2
//   mup0  the rules of [TP5], with the gates taken for ordinary weights
//   mup   mup0 with the rules of [GDN] for the gates and for s
// At the base size all three are the same network with the same updates, bit for bit.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gdn {

enum class Parametrization { sp, mup0, mup };
enum class OptimizerKind { adamw, sgd };

// What kind of tensor a parameter is. V, L, T, the batch and the number of conv taps (4) never grow.
enum class TensorClass {
  embedding,    // W_emb [V,d]; where it is tied it is the unembedding too
  unembedding,  // an untied head [V,d]
  hidden,       // every other Linear but the gates': both its sides grow with d
  gate,         // W_a, W_b [H,d]
  gate_scalar,  // A_log, dt_bias [H]
  conv,         // taps of the short convolutions, 4 to a channel
  gain,         // weights of the RMSNorms over d
  output_gain,  // w_o [dv], weight of the RMSNorm of a head's output, shared by all heads
};
constexpr int kTensorClassCount = 8;

// Alternatives that the derivation leaves to measurement (sections 4 and 5, open questions 1, 2 and 3).
enum class VectorRule { vector, hidden };       // gains and conv taps: like vectors, or like hidden weights
enum class DecayMode { coupled, independent };  // decay per step: its rate times lr, or the same at every width
// W_a and W_b under mup: by fan-in, or like output weights, there with gradients of independent or aligned
// signs.
enum class GateRule { independent, output, aligned };
// The readout scale s (section 3): as the parametrization has it, or one of the two forms under any of them.
enum class ReadoutRule { param, sp, mup };
// The norm that is clipped: of all gradients alike, or as at the end of section 5.
enum class ClipNorm { plain, scaled };

// ---- 1. What grows ----------------------------------------------------------------------------------------
//
// A family is a line of models, one for each width d. One of them, of width d0, is the base, where the
// learning rate is tuned. A model is described by four ratios to the base:
//
//   r = d/d0    r_H = H/H0    r_k = dk/dk0    r_v = dv/dv0
//
// In a family all value channels together keep their share of the width, and so do the keys and the MLP's
// inner size:
//
//   H dv ~ H dk ~ d,  so  r_H r_v = r_H r_k = r
//
// (the inner size is rounded up to a multiple of 256; these rules ignore that). Two families are in use:
//   fixed heads       r_H = 1,  r_k = r_v = r     head sizes grow
//   fixed head size   r_H = r,  r_k = r_v = 1     the number of heads grows
// The rules below know only the ratios, so both families, and those between them, come out of the same
// formulas.

struct ModelShape {
  double width, heads, head_dim_k, head_dim_v;  // d, H (value heads), dk, dv
};

// Exponents of r on top of those of the rules. All are 0 except where a test breaks one entry of the tables, to
// see that the coordinate check (gdn/coord_check.h) notices.
struct Perturbation {
  double init[kTensorClassCount] = {}, learning_rate[kTensorClassCount] = {};
  double logit_scale = 0, readout_scale = 0;
};

struct Mup {
  Parametrization parametrization;
  ModelShape shape, base;
  VectorRule vectors = VectorRule::vector;
  GateRule gates = GateRule::independent;
  double logit_factor = 1;  // of the logits, at every width
  ReadoutRule readout = ReadoutRule::param;
  Perturbation perturbation = {};
};

inline ModelShape base_with_fixed_heads(const ModelShape& m, double base_width) {
  const double shrink = base_width / m.width;
  return {base_width, m.heads, m.head_dim_k * shrink, m.head_dim_v * shrink};
}

// The base's number of heads need not be whole: only ratios matter.
inline ModelShape base_with_fixed_head_size(const ModelShape& m, double base_width) {
  return {base_width, m.heads * (base_width / m.width), m.head_dim_k, m.head_dim_v};
}

struct Ratios {
  double r, r_H, r_k, r_v;
};

inline Ratios ratios(const Mup& m) {
  return {m.shape.width / m.base.width, m.shape.heads / m.base.heads, m.shape.head_dim_k / m.base.head_dim_k,
          m.shape.head_dim_v / m.base.head_dim_v};
}

// r^x, exactly 1 for x = 0.
inline double power_of_ratio(const Mup& m, double x) { return std::pow(ratios(m).r, x); }

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
// those two are aligned.

// ---- 3. Forward: initial sizes and the two multipliers ----------------------------------------------------
//
// Linear, y = W x with x Theta(1) and fan-in n: a sum of n independent terms, y = Theta(n^1/2 std). So (i)
// asks for
//
//   std ~ n^-1/2
//
// In a family every fan-in (d, H dv, the MLP's inner size) grows as r. W_a and W_b follow the same rule:
// their outputs a and b enter alpha = exp(-exp(A_log) softplus(a + dt_bias)) and beta = sigmoid(b), which
// change with a and b at a rate that depends on the sizes of a and b alone, so these must be Theta(1) like
// any activation.
//
// Embedding, x = W_emb[token]: a one-hot input, fan-in 1, so std is constant. The unembedding has the same
// std, which it must where the two are one matrix; its size is mended by the multiplier m_out below.
//
// Gains (1), conv taps (U(-1/2, 1/2), from 4 taps at any width), A_log and dt_bias (one time scale per head)
// have no fan-in that grows; their initial values are constants, set where the model is initialized.

constexpr double kBaseStd = 0.02;  // of every Linear and of the embedding, at the base

inline const char* name(TensorClass cls);

inline bool gates_are_outputs(const Mup& m) {
  return m.parametrization == Parametrization::mup && m.gates != GateRule::independent;
}

inline double init_std(const Mup& m, TensorClass cls) {
  switch (cls) {
    case TensorClass::embedding:
    case TensorClass::unembedding:
      return kBaseStd * power_of_ratio(m, m.perturbation.init[int(cls)]);
    case TensorClass::hidden:
    case TensorClass::gate: {
      const auto [r, r_H, r_k, r_v] = ratios(m);
      double variance = m.parametrization == Parametrization::sp ? 1 : 1 / r;
      if (cls == TensorClass::gate && gates_are_outputs(m)) variance *= r_H / r;
      return kBaseStd * std::sqrt(variance) * power_of_ratio(m, m.perturbation.init[int(cls)]);
    }
    default:
      throw std::logic_error(std::string(name(cls)) + " tensors are not drawn from a normal");
  }
}

// Conv taps are drawn from U(-x, x); this is x.
inline double conv_init_range(const Mup& m) {
  const bool by_width = m.parametrization != Parametrization::sp && m.vectors == VectorRule::hidden;
  return 0.5 / std::sqrt(by_width ? ratios(m).r : 1) *
         power_of_ratio(m, m.perturbation.init[int(TensorClass::conv)]);
}

// Logits = m_out W h, with h Theta(1) and the d entries of a row of W Theta(1). The final h and the row of a
// token align, in training by (ii) and with tied weights from the start (h contains the embedding of the
// token just read): a sum of d aligned terms, Theta(d). So (iii) asks for m_out ~ 1/d. For rows that h does
// not align with, logits start at Theta(d^-1/2), which (iii) allows.
//
// What m_out is at the base no estimate says. logit_factor is to be tuned there like the learning rate;
// being the same at every width it changes no exponent, and transfers ([TP5], table 2: alpha_output). It
// multiplies all gradients, too: where it is larger, SGD's best learning rate is smaller. With embeddings as
// small as kBaseStd a factor above 1 makes up for logits that start near 0. Measured (AdamW, books, 1,000
// steps, lr 4e-3; dev/results/2026-11-27_h100_second): factors of 1, 2, 4, 8 give 4.26, 4.16, 4.12, 4.14 at
// d = 256, and 1 and 4 give 4.19 and 4.00 at 512, 4.11 and 3.90 at 1024. Two seeds differ by 0.005 with 4, by
// 0.03 with 1, which hides a regret of 0.01. Under SGD on a small model (2026-11-27_cpu) 4 lowers the loss by
// 0.15 and more, and together with hidden weights of twice the std the loss falls with the width.
inline double logit_scale(const Mup& m) {
  if (m.parametrization == Parametrization::sp) return m.logit_factor;
  return m.logit_factor / ratios(m).r * power_of_ratio(m, m.perturbation.logit_scale);
}

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
// where sp and mup0 have dk^-1/2. Two remarks on how much this matters.
//
// First, o enters nothing but o / sqrt(mean(o^2) + eps), which with eps = 0 does not see s at all: neither
// the network's output nor the gradient of any parameter depends on it (only dL/do, which nobody uses, does).
// s acts through eps alone: with s = dk^-1/2, o^2 falls as dk^-2 until eps = 1e-6 rules the norm. Measured at
// initial values (H = 6, L = 2): the root mean square of the normalized o goes from 0.92 at d = 256 to 0.68
// at d = 1024 with s = dk^-1/2, and to 0.94 with the s below.
//
// Second, q and k are not quite independent: silu has a positive mean, so q . k has one too, small at first
// but without dk^-1/2, and training may align them further. Then S^T q is Theta(1) and o grows as dk^1/2
// (measured, d = 256 to 1024: S^T q has slope -0.4 at initial values; after 50 steps of SGD 0.0 in the first
// layer and -0.4 in the second). The norm undoes a growing o, while eps spoils a falling one: of the two
// estimates the one to scale for is the smaller.
inline double readout_scale(const Mup& m) {
  const bool grows = m.readout == ReadoutRule::param ? m.parametrization == Parametrization::mup
                                                     : m.readout == ReadoutRule::mup;
  if (!grows) return 1 / std::sqrt(m.shape.head_dim_k);
  return 1 / std::sqrt(m.base.head_dim_k) * std::sqrt(ratios(m).r_k) *
         power_of_ratio(m, m.perturbation.readout_scale);
}

// ---- 4. Backward: the size of a gradient ------------------------------------------------------------------
//
// dX stands for the gradient of the loss with respect to X. The loss is a mean over tokens, whose number is
// fixed: sums over tokens change no exponent. The gradient of the V logits is Theta(1).
//
// The residual stream.  dh = m_out W^T dlogits: a sum over V, which does not grow, so dx = Theta(1/d).
//   RMSNorms and W^T with std d^-1/2 keep this: a sum of d independent terms Theta(d^-1/2) Theta(1/d) is
//   Theta(1/d) again. Any coordinate of an activation as wide as d has a gradient Theta(1/d).
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
// Open question 2: independent or aligned? With aligned signs da, db = Theta(dv/d), Theta(1) for fixed heads,
// and section 5 would have SGD exponents -1 for the gates and 0 for their scalars instead of -1/2 and +1/2.
// Measured with mup and SGD (H = 6, L = 2, d = 256, 512, 1024, slope of log rms against log d): at initial
// values da -0.5 to -0.7, db -0.45 to -0.6, as for independent signs; after 50 steps da -0.3 in the first
// layer and -0.9 in the second, db -0.35 and -0.65. That is too short and too small a training to settle it.
// -gates aligned is the other rule, with W_a and W_b as the output weights below. Measured side by side (SGD,
// bytes of books, 1,000 steps, base 256, two seeds; dev/results/2026-11-28_h200_second): at d = 1024 and lr
// 0.4, 0.8, 1.6 it ends 0.0006, 0.0003, 0.0020 lower, where two seeds' differences differ by 0.002: half the
// learning rate, (d/d0)^-1/2, for two matrices of H rows and their scalars is nothing that this loss sees.
// The rule of [GDN] stays.
//
// What no learning rate of a gate mends: da and db reach the residual stream too, as W_a^T da and W_b^T db,
// of coordinates Theta(d^-1/2) Theta(d^-1/2) = Theta(1/d) for fixed heads, as large as all else there. So
// every update before the gate, made Theta(1) by section 5, contains a part along the rows of W_a and W_b,
// which these meet aligned: d terms Theta(d^-1/2), and a and b move by Theta(d^1/2) times that part's share.
// Measured with mup and SGD (first layer, d = 256 to 2048, lr 0.03, 8 seeds; dev/results/2026-11-26_cpu):
// after one step W_b's own update moves b by 0.05 at every width (slope -0.05), the embedding's by three to
// five times as much, so that b's change has slope 0.13 +- 0.04, and a's 0.09 +- 0.04; after two steps 0.19
// +- 0.02 and 0.12 +- 0.03. In the second layer, and everywhere with AdamW, these slopes stay within 0.09 of
// 0 up to the eighth step.
//
// What mends it is another initial size. W_a and W_b have H outputs; where H does not grow they are matrices
// that [TP5] calls output weights, and gives entries Theta(1/d) (as a std, or as 1 and a multiplier like
// m_out):
//   std ~ d^-1 for fixed heads, d^-1/2 where H ~ d      in general fan-in^-1/2 (H/d)^1/2
// Then a and b start at d^-1/2, which costs nothing: dt_bias and beta = sigmoid(0) give the gates their
// initial values, and their own update, whose learning rate is the same, makes a and b Theta(1). W_a^T da
// falls to Theta(d^-3/2): of an update of the residual stream a part Theta(d^-1/2) lies along the rows of
// W_a, and moves a by as much. This is -gates output. Measured as above (dev/results/2026-11-27_cpu), 252
// slopes each: with SGD 19 are outside their ranges by fan-in and 0 as output weights, with AdamW 1 and 0. In
// training it makes no difference yet: measured as the aligned rule above, -0.0010, +0.0002, -0.0028. So the
// default is the rule of [GDN].
//
// mup0 takes W_a and W_b for hidden weights, da, db = Theta(1/d), and A_log and dt_bias for a vector of H
// coordinates, whose gradient in [TP5] is Theta(1/H). For fixed heads these are two different estimates of
// the same da and db. For fixed head size mup0 and mup agree.

// How a tensor's coordinates grow, as multiples of the base's.
struct Growth {
  double fan_in;      // entries of the tensor that one coordinate of its output sums over
  double multiplier;  // of that output
  double gradient;    // one entry of the tensor's gradient
};

inline Growth growth(const Mup& m, TensorClass cls) {
  const auto [r, r_H, r_k, r_v] = ratios(m);
  const double gate_gradient = m.parametrization != Parametrization::mup ? 0  // mup0 has two, below
                               : m.gates == GateRule::aligned            ? r_v / r
                                                                         : std::sqrt(r_v) / r;
  const bool is_vector =
      cls == TensorClass::conv || cls == TensorClass::gain || cls == TensorClass::output_gain;
  if (is_vector && m.vectors == VectorRule::hidden) cls = TensorClass::hidden;
  // clang-format off
  switch (cls) {
    case TensorClass::embedding:   return {1, 1, 1 / r};
    case TensorClass::unembedding: return {r, 1 / r, 1 / r};
    case TensorClass::hidden:      return {r, 1, 1 / r};
    case TensorClass::gate:        return {r, 1, gate_gradient ? gate_gradient : 1 / r};
    case TensorClass::gate_scalar: return {1, 1, gate_gradient ? gate_gradient : 1 / r_H};
    case TensorClass::conv:
    case TensorClass::gain:        return {1, 1, 1 / r};
    case TensorClass::output_gain: break;
  }
  // clang-format on
  return {1, 1, std::sqrt(r_H) / r};
}

// ---- 5. Updates: the learning rate of each tensor ---------------------------------------------------------
//
// Let one coordinate of a tensor's output be m times a sum over n entries of the tensor, and let each entry
// change by e, aligned with the Theta(1) input. The output changes by Theta(m n e), which by (ii) and (iii)
// shall be Theta(1):
//
//   AdamW   e = lr, whatever the gradient's size       lr ~ 1 / (m n)
//   SGD     e = lr g, g the size of the gradient       lr ~ 1 / (m n g)
//
// (Momentum multiplies e by a constant.) With the growth() of each class, as exponents of r:
//
//                        m     n     g, fixed heads       AdamW   SGD, fixed heads      SGD, fixed head size
//                                    mup      mup0                mup       mup0        mup = mup0
//   embedding            0     0     -1       -1            0     +1        +1          +1
//   unembedding         -1    +1     -1       -1            0     +1        +1          +1
//   hidden               0    +1     -1       -1           -1      0         0           0
//   gate                 0    +1     -1/2     -1           -1     -1/2       0           0
//   gate scalar          0     0     -1/2      0            0     +1/2       0          +1
//   conv                 0     0     -1       -1            0     +1        +1          +1
//   gain                 0     0     -1       -1            0     +1        +1          +1
//   output gain          0     0     -1       -1            0     +1        +1          +1/2
//
// Measured (AdamW, 33M tokens of books, 1,000 steps, fixed heads): with logits of factor 4 (section 3; two
// seeds at the best, dev/results/2026-11-29_h200_second) the best learning rates at d = 256, 512, 1024 and
// 2048 are 5.4e-3, 5.1e-3, 4.5e-3 and 4.4e-3, and the one of 256 costs 0.0002, 0.0021 and 0.0028 at the
// others; on a grid of factors of two 4e-3 is the best at all four. Under sp they are 5.4e-3, 3.7e-3 and
// 2.2e-3, costs 0.008 and 0.066 (0.028 on the grid), and d = 1024 ends at 3.942, where mup has 3.902. Heads
// of one size (64; two seeds at the best): 5.6e-3, 4.9e-3 and 4.6e-3 at 256, 512 and 1024, costs 0.0006 and
// 0.0021. With factor 1 (dev/results/2026-11-27_h100, two seeds 0.03 apart) 4e-3 is the best at 256 and 512,
// and 0.003 from the best at 1024. Under sp (one seed) it costs 0.022 at 512 and 0.044 at 1024, where half
// of it is best.
//
// Measured (bytes of the same books, 8 million of them, 1,000 steps, two seeds; constants of the base and
// tables in dev/results/2026-11-28_h200_second): best learning rates at d = 256, 512 and 1024, and what the
// one of 256 costs at the others,
//
//                 fixed heads                               fixed head size
//   AdamW, mup    2.2e-3, 2.3e-3, 2.1e-3  0.0000, 0.0000    2.3e-3, 2.2e-3, 2.3e-3  0.0000, 0.0000
//   SGD, mup      1.11, 0.86, 0.90        0.0015, 0.0009    1.11, 1.10, 0.87        0.0000, 0.0011
//   SGD, mup0     1.11, 0.97, 0.79        0.0004, 0.0022
//   AdamW, sp     2.2e-3, 1.5e-3, 1.2e-3  0.0010, 0.0031
//   SGD, sp       1.11, 1.20, 1.17        0.0002, 0.0002
//
// At d = 1024 sp ends 0.013 above mup under AdamW and 0.048 above it under SGD, where the loss hardly falls
// from 512 on; mup0 cannot be told from mup. With a base of 128 (dev/results/2026-11-28_h200) SGD's best
// learning rate falls by 0.58 octaves to d = 512, at a cost of 0.004: exponents hold in the limit of large
// d, and the base must not be far from it. What had hidden SGD's transfer is no exponent: a momentum of 0.98,
// whose 50 steps are half the warm-up of a run this short (losses 0.1 higher, spikes), and an embedding that
// moves too fast for its size (-init_of embedding=4).
//
// With GPT-2's 50304 tokens (dev/results/2026-11-28_h200_fourth; two seeds) what made wide models fail first
// is the embedding: with a quarter of the base's learning rate d = 256 ends at 4.56 and d = 1024 at 5.11,
// with a sixteenth at 4.57 and 4.27. What made two seeds differ by 0.11 at d = 512 is the size at which
// hidden weights start. kBaseStd is a third of d^-1/2 at the base, so each of them shrinks what passes
// through it and the gradients of its neighbours, to which AdamW is blind and SGD is not. With four times
// that (-init_of hidden=4; on the built-in stories no gain, 2026-11-28_cpu) seeds differ by 0.01, but right
// above the best learning rate, 12.8, is a cliff: at 25.6 five runs of six end at 6.39 or more. The cliff is
// made by gains and taps. With a quarter of their learning rate, at every width, the curves are parabolas
// (dev/results/2026-11-29_h200; two seeds under mup, under mup0 and sp at the best of each width):
//
//         best lr at d = 256, 512, 1024  best loss              shift                          regret
//   mup   17.8, 17.1, 16.1               4.439, 4.276, 4.151    -0.06 +- 0.02, -0.14 +- 0.04   0.0013, 0.0085
//   mup0  17.8, 16.6, 14.1               4.439, 4.283, 4.204    -0.10, -0.33                   0.0027, 0.0165
//   sp    17.8, 17.8, 10.3               4.439, 4.426, 4.628     0.00, -0.78                   0.0000, 0.1284
//
// Here mup0 can be told from mup: it ends 0.05 higher at d = 1024, and its best learning rate begins to move.
//
// Open question 1: conv taps and gains. One tap moves one channel, so that lr = Theta(1) under AdamW moves
// every channel by Theta(1): rules as for any vector of d coordinates in [TP5]. The code the authors of
// [GDN] released instead treats gains and taps like hidden weights (AdamW -1, SGD 0, taps initialized by
// fan-in). Measured (bytes of books, base 256, d = 1024, two seeds; dev/results/2026-11-28_h200_second):
// as hidden weights they cost 0.0022, 0.0001, 0.0018 under AdamW at 2e-3, 4e-3, 8e-3 and 0.0025, 0.0064,
// 0.0091 under SGD at 0.4, 0.8, 1.6. The rule of [TP5] is better, and stays.
// With GPT-2's tokens gains and taps are what fails first under SGD (above): their constant at the base wants
// to be smaller; with exponents as derived the best learning rate then stays where it is. Gradients of models
// after 200 steps of SGD (bytes, d = 128 to 512, lr 0.2, one seed; dev/results/2026-11-28_cpu) have slopes
// -0.9 to -1.3 for the norms' gains and -1.06 for the embedding, as derived, but -0.6 for the taps of v and
// the output gain, whose updates then grow as d^0.4; near the edge of what can be trained (lr 0.8) most fall
// more slowly than 1/d. So they do with GPT-2's tokens at the best learning rate (500 steps at lr 18.1,
// d = 256 to 1024, four batches, dev/results/2026-11-29_h200): embedding -0.98, norms' gains -0.59 to -1.32,
// the MLP's weights -0.65 to -0.80.
//
// Open question 3: decay. AdamW shrinks a weight by lr decay a step with the tensor's own lr, so hidden
// weights forget over 1 / (lr decay) ~ d steps. The independent form keeps lr decay constant in d: divide the
// decay by the AdamW scale below. The estimates above do not choose between the two, and neither does a
// measurement of 1,000 steps (as for question 1): the independent form gives -0.0004, -0.0011, -0.0012. At
// these learning rates it decays a weight by 10 to 40% in a run, the coupled one by 3 to 10%.
//
// Open question 4: Adam's eps. e = lr needs gradients well above eps, a constant, but g falls with d. Measured
// as for question 1, eps = 1e-15 in place of 1e-8 gives +0.0006, -0.0010, -0.0008 at d = 1024 and +0.0008,
// +0.0023, -0.0026 at d = 256: nothing. At widths like these 1e-8 is small enough.
inline double learning_rate_scale(const Mup& m, OptimizerKind optimizer, TensorClass cls) {
  if (m.parametrization == Parametrization::sp) return 1;
  const Growth c = growth(m, cls);
  const double change_per_entry = c.multiplier * c.fan_in;
  const double scale =
      optimizer == OptimizerKind::adamw ? 1 / change_per_entry : 1 / (change_per_entry * c.gradient);
  return scale * power_of_ratio(m, m.perturbation.learning_rate[int(cls)]);
}

// Clipping multiplies the gradient by min(1, clip / norm). Should the norm be that of all parameters alike?
// d^2 hidden entries Theta(1/d) and H d gate entries Theta(dv^1/2 / d) have norm Theta(1), the V d entries of
// the embedding, Theta(1/d), and all other tensors have d^-1/2. So one threshold means the same at every width
// once d is so large that the embedding's part has vanished; but V is large, and at the base that part is not
// small (measured at initial values, L = 8, 2048 tokens of books: hidden 7.6, embedding 6.0 of 9.7 at d = 256,
// 6.7 and 2.6 of 7.2 at d = 1024). Wide models are clipped less. What is Theta(1) for every tensor by itself
// is the fall of the loss in a small step of SGD,
//
//   -dL / lr = sum over tensors of learning_rate_scale |g|^2
//
// the square of the scaled norm; at the base it is that of the plain one.
//
// Measured (SGD, mup, 33M tokens of books, fixed heads; dev/results/2026-11-27_h100): it is what lets SGD's
// learning rate transfer. Clipped at 1, SGD diverges at d = 256 between 0.8 and 1.6, without clipping between
// 0.1 and 0.3: the bound decides where. With the plain norm d = 256 stands 0.8 and d = 1024 does not (one
// seed); with the scaled one all widths stand 0.8 (eight of eight runs) and diverge at 1.6, and the best
// learning rates at d = 256 and 1024 are 0.44 and 0.51. AdamW, which divides the gradient's size away, was
// measured with the plain norm.
inline double clip_weight(const Mup& m, TensorClass cls, ClipNorm norm) {
  return norm == ClipNorm::plain ? 1 : learning_rate_scale(m, OptimizerKind::sgd, cls);
}

// Decay pulls a tensor towards 0, which is a meaningful value for matrices that are summed over, but not for
// gains (1), taps and time scales; rare tokens' embeddings would fade between their occurrences.
inline bool has_weight_decay(TensorClass cls) {
  return cls == TensorClass::hidden || cls == TensorClass::gate || cls == TensorClass::unembedding;
}

// What multiplies the decay of a class: a step shrinks its weights by lr learning_rate_scale decay this.
inline double weight_decay_scale(const Mup& m, OptimizerKind optimizer, TensorClass cls, DecayMode mode) {
  if (!has_weight_decay(cls)) return 0;
  return mode == DecayMode::coupled ? 1 : 1 / learning_rate_scale(m, optimizer, cls);
}

// ---- Names, and all constants of one model as text --------------------------------------------------------

constexpr Parametrization kParametrizations[] = {Parametrization::sp, Parametrization::mup0,
                                                 Parametrization::mup};
constexpr OptimizerKind kOptimizerKinds[] = {OptimizerKind::adamw, OptimizerKind::sgd};
constexpr TensorClass kTensorClasses[] = {
    TensorClass::embedding,   TensorClass::unembedding, TensorClass::hidden, TensorClass::gate,
    TensorClass::gate_scalar, TensorClass::conv,        TensorClass::gain,   TensorClass::output_gain};

inline const char* name(Parametrization p) {
  constexpr const char* names[] = {"sp", "mup0", "mup"};
  return names[int(p)];
}

inline const char* name(OptimizerKind optimizer) {
  constexpr const char* names[] = {"adamw", "sgd"};
  return names[int(optimizer)];
}

inline const char* name(TensorClass cls) {
  switch (cls) {
    case TensorClass::embedding: return "embedding";
    case TensorClass::unembedding: return "unembedding";
    case TensorClass::hidden: return "hidden";
    case TensorClass::gate: return "gate";
    case TensorClass::gate_scalar: return "gate_scalar";
    case TensorClass::conv: return "conv";
    case TensorClass::gain: return "gain";
    case TensorClass::output_gain: return "output_gain";
  }
  return "";
}

inline const char* name(VectorRule rule) { return rule == VectorRule::vector ? "vector" : "hidden"; }

inline const char* name(GateRule rule) {
  constexpr const char* names[] = {"independent", "output", "aligned"};
  return names[int(rule)];
}

inline const char* name(ReadoutRule rule) {
  constexpr const char* names[] = {"param", "sp", "mup"};
  return names[int(rule)];
}

inline const char* name(ClipNorm norm) { return norm == ClipNorm::plain ? "plain" : "scaled"; }

inline const char* name(DecayMode mode) { return mode == DecayMode::coupled ? "coupled" : "independent"; }

inline Parametrization parse_parametrization(const std::string& text) {
  for (const Parametrization p : kParametrizations)
    if (text == name(p)) return p;
  throw std::runtime_error("parametrization '" + text + "': expected sp, mup0 or mup");
}

inline OptimizerKind parse_optimizer(const std::string& text) {
  for (const OptimizerKind optimizer : kOptimizerKinds)
    if (text == name(optimizer)) return optimizer;
  throw std::runtime_error("optimizer '" + text + "': expected adamw or sgd");
}

inline VectorRule parse_vector_rule(const std::string& text) {
  for (const VectorRule rule : {VectorRule::vector, VectorRule::hidden})
    if (text == name(rule)) return rule;
  throw std::runtime_error("gains and taps '" + text + "': expected vector or hidden");
}

inline GateRule parse_gate_rule(const std::string& text) {
  for (const GateRule rule : {GateRule::independent, GateRule::output, GateRule::aligned})
    if (text == name(rule)) return rule;
  throw std::runtime_error("gates '" + text + "': expected independent, output or aligned");
}

inline ReadoutRule parse_readout_rule(const std::string& text) {
  for (const ReadoutRule rule : {ReadoutRule::param, ReadoutRule::sp, ReadoutRule::mup})
    if (text == name(rule)) return rule;
  throw std::runtime_error("readout scale '" + text + "': expected param, sp or mup");
}

inline DecayMode parse_decay_mode(const std::string& text) {
  for (const DecayMode mode : {DecayMode::coupled, DecayMode::independent})
    if (text == name(mode)) return mode;
  throw std::runtime_error("decay mode '" + text + "': expected coupled or independent");
}

inline ClipNorm parse_clip_norm(const std::string& text) {
  for (const ClipNorm norm : {ClipNorm::plain, ClipNorm::scaled})
    if (text == name(norm)) return norm;
  throw std::runtime_error("norm to clip '" + text + "': expected plain or scaled");
}

// One factor for each class, in the order of TensorClass: what a user tunes at the base besides the learning
// rate itself. Being the same at every width, they change no exponent, and transfer as the learning rate does
// ([TP5], table 2).
using ClassFactors = std::array<double, kTensorClassCount>;

inline ClassFactors ones() {
  ClassFactors factors;
  factors.fill(1);
  return factors;
}

// Reads "conv=0.5,gain=2"; classes that are not named have 1. Throws one line that says what was expected.
inline ClassFactors parse_class_factors(const std::string& text) {
  ClassFactors factors = ones();
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const size_t equals = std::min(part.find('='), part.size());
    const TensorClass* found = nullptr;
    for (const TensorClass& cls : kTensorClasses)
      if (part.substr(0, equals) == name(cls)) found = &cls;
    const std::string number = equals < part.size() ? part.substr(equals + 1) : "";
    char* rest = nullptr;
    const double factor = std::strtod(number.c_str(), &rest);
    if (!found || number.empty() || *rest || !(factor >= 0 && factor <= 1e6)) {
      std::string names;
      for (const TensorClass cls : kTensorClasses)
        names += std::string(names.empty() ? "" : ", ") + name(cls);
      throw std::runtime_error("factor '" + part + "': expected CLASS=X with X from 0 to 1e6 and CLASS of " +
                               names);
    }
    factors[int(*found)] = factor;
    begin = end + 1;
  }
  return factors;
}

// Initial values that are drawn around 0 can be scaled in the same sense. Gains (1) and time scales cannot: throws
// one line where such a factor is not 1.
inline void check_init_factors(const ClassFactors& factors) {
  for (const TensorClass cls : {TensorClass::gate_scalar, TensorClass::gain, TensorClass::output_gain})
    if (factors[int(cls)] != 1)
      throw std::runtime_error("factor of the initial values of " + std::string(name(cls)) +
                               ": expected none, they do not lie around 0");
}

inline std::string mup_table(const Mup& m, OptimizerKind optimizer) {
  char line[160];
  const ModelShape &a = m.shape, &b = m.base;
  std::snprintf(line, sizeof line, "%s, %s: d = %g (base %g), H = %g (%g), dk = %g (%g), dv = %g (%g)\n",
                name(m.parametrization), name(optimizer), a.width, b.width, a.heads, b.heads, a.head_dim_k,
                b.head_dim_k, a.head_dim_v, b.head_dim_v);
  std::string table = line;
  std::snprintf(line, sizeof line, "  %-12s %10s %10s  %s\n", "class", "init std", "lr", "decay");
  table += line;
  for (const TensorClass cls : kTensorClasses) {
    const bool drawn_from_normal = cls <= TensorClass::gate;
    char std_text[16] = "-";
    if (drawn_from_normal) std::snprintf(std_text, sizeof std_text, "%.5g", init_std(m, cls));
    std::snprintf(line, sizeof line, "  %-12s %10s %10.5g  %s\n", name(cls), std_text,
                  learning_rate_scale(m, optimizer, cls), has_weight_decay(cls) ? "yes" : "no");
    table += line;
  }
  std::snprintf(line, sizeof line, "  logits x %.5g (m_out), readout x %.5g (s)\n", logit_scale(m),
                readout_scale(m));
  return table + line;
}

}  // namespace gdn
