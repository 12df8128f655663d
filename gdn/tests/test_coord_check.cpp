// The coordinate check at small widths on the CPU: under mup every slope is where mup.h derives it, under sp
// and with any one exponent of the tables half a power off it is not. Few tokens, one layer, several seeds:
// the derivation holds for widths far above the number of tokens (gdn/coord_check.h). The same over depths.
#include <doctest/doctest.h>

#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu_layers.h"
#include "../coord_check.h"

namespace {

using namespace gdn;

constexpr int kWidths[] = {64, 128, 256}, kDepths[] = {4, 8, 16};
constexpr int kTokens = 6, kVocab = 64;
constexpr double kTolerance = 0.25;  // half of what breaking an exponent moves a slope by

// Exponents of r = d/256 on top of those of the rules: a broken entry of mup.h's table. They are laid over
// the rules through the factors that -init_of, -lr_of and -logit_factor set, here another one for each width.
struct Perturbation {
  double init[kTensorClassCount] = {}, learning_rate[kTensorClassCount] = {};
  double logit_scale = 0, readout_scale = 0;
};

inline ClassFactors factors_of(const double (&exponents)[kTensorClassCount], double ratio) {
  ClassFactors factors = ones();
  for (int i = 0; i < kTensorClassCount; i++) factors[i] = std::pow(ratio, exponents[i]);
  return factors;
}

struct Setup {
  Parametrization parametrization = Parametrization::mup;
  OptimizerKind optimizer = OptimizerKind::adamw;
  bool fixed_head_size = false;
  Perturbation perturbation = {};
  int last_step = 1;
  bool judge_gates = true;
  bool tied = false;  // false: embedding and unembedding are classes of their own
  GateRule gates = GateRule::independent;
  bool over_depth = false;  // models of one width and several depths
  DepthRule depth = DepthRule::one, judged_as = DepthRule::one;
};

// The estimates of mup.h, section 7, take the stream for Theta(1): the embedding is to be what it is made of.
constexpr double kLargeEmbedding = 50;

inline double ratio_of(const Setup& s, int size) { return s.over_depth ? size / 8.0 : size / 256.0; }

inline ModelConfig config_of(const Setup& s, int size) {
  if (s.over_depth) {
    ModelConfig c = make_config(48, 48, size, 3, 0, 2, kVocab, s.parametrization);
    c.mlp_size = 48;
    c.tied = s.tied;
    c.base_layers = 8;
    c.depth = s.depth;
    return c;
  }
  const int width = size;
  ModelConfig c = make_config(width, 256, 1, s.fixed_head_size ? 0 : 3, s.fixed_head_size ? 8 : 0, 2, kVocab,
                              s.parametrization);
  c.mlp_size = width;  // not rounded, so that it grows as the width does
  c.tied = s.tied;
  c.logit_factor = std::pow(width / 256.0, s.perturbation.logit_scale);
  c.readout_factor = std::pow(width / 256.0, s.perturbation.readout_scale);
  c.gates = s.gates;
  return c;
}

// SGD's updates are as random as the gradients. Those of the gates differ from head to head by orders of
// magnitude, with the head's time scale, and take many seeds to average over; AdamW divides all that away.
inline int seeds_of(const Setup& s) {
  return s.optimizer == OptimizerKind::adamw ? 2 : s.judge_gates ? 48 : 12;
}

inline bool moves_a_gate(const std::string& activation, bool is_change) {
  return of_gates(activation) && (is_change || activation.rfind("update:", 0) == 0);
}

// A size's name, layer, step, and whether it is that of the change since step 0.
using Size = std::tuple<std::string, int, int, bool>;

// Slopes of log(size) against log(width), sizes pooled over seeds by their mean square.
inline std::map<Size, double> slopes(const Setup& s) {
  // Runs side by side, a thread each: the models are too small for a layer's own threads.
  static_assert(std::size(kWidths) == std::size(kDepths));
  const int *sizes = s.over_depth ? kDepths : kWidths, seeds = seeds_of(s),
            runs = int(std::size(kWidths)) * seeds;
  std::vector<std::vector<CoordRow>> rows(runs);
#pragma omp parallel for schedule(dynamic)
  for (int run = runs - 1; run >= 0; run--) {  // the wide ones first
    const int size = sizes[run / seeds], seed = run % seeds + 1;
    std::vector<int32_t> tokens, targets;
    for (int i = 0; i < kTokens; i++) {
      tokens.push_back(int32_t(random_bits(seed, 2 * i) % kVocab));
      targets.push_back(int32_t(random_bits(seed, 2 * i + 1) % kVocab));
    }
    OptimizerConfig optimizer;
    optimizer.kind = s.optimizer;
    optimizer.weight_decay = optimizer.clip = 0;
    optimizer.learning_rate_factors = factors_of(s.perturbation.learning_rate, ratio_of(s, size));
    const std::function<void(Parameters<Cpu<float>>&)> start = [&](Parameters<Cpu<float>>& parameters) {
      ClassFactors factors = factors_of(s.perturbation.init, ratio_of(s, size));
      if (s.over_depth) factors[int(TensorClass::embedding)] = kLargeEmbedding;
      parameters.initialize(seed, factors);
    };
    const double learning_rate = s.optimizer == OptimizerKind::adamw ? 1e-4 : 1e-3;  // effects of first order
    Cpu<float> dev;
    rows[run] = coordinate_check(dev, config_of(s, size), optimizer, learning_rate, seed, tokens, targets, 1,
                                 kTokens, s.last_step, start);
  }
  std::map<Size, std::map<int, double>> mean_squares;  // by the model's width or depth
  for (int run = 0; run < runs; run++)
    for (const CoordRow& row : rows[run]) {
      const int size = sizes[run / seeds];
      int layer = row.layer;
      if (s.over_depth && layer >= 0) {
        if ((layer + 1) * 4 % size) continue;  // those that end a quarter of the depth
        layer = (layer + 1) * 4 / size;
      }
      mean_squares[{row.activation, layer, row.step, false}][size] += row.rms * row.rms;
      if (row.step > 0 && std::isfinite(row.change))
        mean_squares[{row.activation, layer, row.step, true}][size] += row.change * row.change;
    }
  std::map<Size, double> slopes;
  for (const auto& [size, by_size] : mean_squares) {
    double n = 0, x = 0, y = 0, xx = 0, xy = 0;
    for (const auto& [model, mean_square] : by_size) {
      const double lx = std::log(model), ly = 0.5 * std::log(mean_square);
      n += 1, x += lx, y += ly, xx += lx * lx, xy += lx * ly;
    }
    slopes[size] = (n * xy - x * y) / (n * xx - x * x);
  }
  return slopes;
}

// The slopes that are not where they should be, one line each.
inline std::string violations(const Setup& s) {
  std::string text;
  for (const auto& [size, slope] : slopes(s)) {
    const auto& [activation, layer, step, is_change] = size;
    const ExpectedSlopes e =
        s.over_depth ? expected_depth_slopes(activation, s.judged_as == DepthRule::half ? 0.5 : 1)
                     : expected_slopes(activation, layer, step, s.fixed_head_size, s.gates, s.optimizer);
    const SlopeRange range = is_change ? e.change : e.rms;
    if (std::isnan(range.low) || (!s.judge_gates && moves_a_gate(activation, is_change))) continue;
    if (slope >= range.low - kTolerance && slope <= range.high + kTolerance) continue;
    char line[160];
    std::snprintf(line, sizeof line, "%s%s at step %d: slope %.2f, wanted %g to %g\n", activation.c_str(),
                  is_change ? "'s change" : "", step, slope, range.low, range.high);
    text += line;
  }
  return text;
}

TEST_CASE("coordinate check: mup passes, sp fails") {
  for (const bool fixed_head_size : {false, true})
    for (const OptimizerKind optimizer : kOptimizerKinds) {
      CAPTURE(fixed_head_size);
      CAPTURE(std::string(name(optimizer)));
      Setup s;
      s.fixed_head_size = fixed_head_size;
      s.optimizer = optimizer;
      s.last_step = 2;
      for (const bool tied : {false, true}) {
        s.tied = tied;
        CAPTURE(tied);
        CHECK(violations(s) == "");
      }
      s.parametrization = Parametrization::sp;
      s.judge_gates = false;
      CHECK(violations(s) != "");
    }
}

TEST_CASE("coordinate check: gates as output weights pass, and half a power below they fail") {
  for (const GateRule gates : {GateRule::output, GateRule::aligned})
    for (const bool fixed_head_size : {false, true})
      for (const OptimizerKind optimizer : kOptimizerKinds) {
        CAPTURE(std::string(name(gates)));
        CAPTURE(fixed_head_size);
        CAPTURE(std::string(name(optimizer)));
        Setup s;
        s.fixed_head_size = fixed_head_size;
        s.optimizer = optimizer;
        s.gates = gates;
        CHECK(violations(s) == "");
        s.perturbation.learning_rate[int(TensorClass::gate)] = -0.5;
        CHECK(violations(s) != "");
        s.perturbation = {};
        s.perturbation.init[int(TensorClass::gate)] = -0.5;
        CHECK(violations(s) != "");
      }
}

// The row that shows a tensor's own update: (ii) of mup.h for its class.
inline std::string own_update(TensorClass cls) {
  switch (cls) {
    case TensorClass::embedding:
      return "embedding's change";
    case TensorClass::unembedding:
      return "update:lm_head";
    case TensorClass::hidden:
      return "update:o_proj";
    case TensorClass::gate:
      return "update:b_proj";
    case TensorClass::gate_scalar:
      return "update:A_log";
    case TensorClass::conv:
      return "update:v_conv1d";
    case TensorClass::gain:
      return "update:mlp_norm";
    case TensorClass::output_gain:
      return "update:o_norm";
    case TensorClass::final_gain:
      return "update:norm ";
  }
  return "";
}

TEST_CASE("coordinate check: breaking any one exponent fails it") {
  for (const bool fixed_head_size : {false, true})
    for (const double by : {-0.5, 0.5}) {
      CAPTURE(fixed_head_size);
      CAPTURE(by);
      Setup intact;
      intact.fixed_head_size = fixed_head_size;
      for (const OptimizerKind optimizer : kOptimizerKinds) {  // as they are below
        Setup s = intact;
        s.optimizer = optimizer;
        s.judge_gates = optimizer == OptimizerKind::adamw;
        CHECK(violations(s) == "");
      }
      // An initial size or a multiplier may show in the activations or, through the gradients, in SGD's
      // updates.
      const auto fails = [&](const Perturbation& perturbation,
                             std::initializer_list<OptimizerKind> optimizers, bool for_gates = false,
                             const std::string& row = "") {
        for (const OptimizerKind optimizer : optimizers) {
          Setup s = intact;
          s.optimizer = optimizer;
          s.judge_gates = for_gates || optimizer == OptimizerKind::adamw;
          s.perturbation = perturbation;
          const std::string said = violations(s);
          if (said != "" && said.find(row) != std::string::npos) return true;
        }
        return false;
      };
      for (const TensorClass cls : kTensorClasses) {
        CAPTURE(std::string(name(cls)));
        Perturbation p;
        p.learning_rate[int(cls)] = by;
        CHECK(fails(p, {OptimizerKind::adamw}, false, own_update(cls)));
        CHECK(fails(p, {OptimizerKind::sgd}, cls == TensorClass::gate || cls == TensorClass::gate_scalar,
                    own_update(cls)));
        if (cls <= TensorClass::gate || cls == TensorClass::conv) {
          p = {};
          p.init[int(cls)] = by;
          CHECK(fails(p, {OptimizerKind::adamw, OptimizerKind::sgd}));
        }
      }
      Perturbation logits, readout;
      logits.logit_scale = by;
      readout.readout_scale = by;
      CHECK(fails(logits, {OptimizerKind::adamw, OptimizerKind::sgd}));
      CHECK(fails(readout, {OptimizerKind::adamw}));
    }
}

TEST_CASE(
    "coordinate check over depth: alpha 1 and 1/2 pass, the multiplier left out and any broken exponent "
    "fail") {
  for (const DepthRule depth : {DepthRule::one, DepthRule::half})
    for (const OptimizerKind optimizer : kOptimizerKinds) {
      CAPTURE(std::string(name(depth)));
      CAPTURE(std::string(name(optimizer)));
      Setup intact;
      intact.over_depth = true;
      intact.depth = intact.judged_as = depth;
      intact.optimizer = optimizer;
      intact.judge_gates = optimizer == OptimizerKind::adamw;
      CHECK(violations(intact) == "");
      for (const DepthRule other : {DepthRule::one, DepthRule::half, DepthRule::off}) {
        if (other == depth) continue;
        Setup s = intact;
        s.depth = other;
        CHECK(violations(s) != "");
      }
      for (const TensorClass cls : kTensorClasses) {
        CAPTURE(std::string(name(cls)));
        if (optimizer == OptimizerKind::sgd && (cls == TensorClass::gate || cls == TensorClass::gate_scalar))
          continue;  // not judged
        Setup s = intact;
        for (const double by : {-0.5, 0.5}) {
          s.perturbation.learning_rate[int(cls)] = by;
          const std::string said = violations(s);
          CHECK(said.find(own_update(cls)) != std::string::npos);
        }
      }
    }
}

}  // namespace
