// The names of mup.h's choices as text, factors of tensor classes, and all constants of one model as text.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>

#include "../mup.h"

namespace gdn {

constexpr Parametrization kParametrizations[] = {Parametrization::sp, Parametrization::mup0,
                                                 Parametrization::mup};
constexpr OptimizerKind kOptimizerKinds[] = {OptimizerKind::adamw, OptimizerKind::sgd};
constexpr TensorClass kTensorClasses[] = {
    TensorClass::embedding, TensorClass::unembedding, TensorClass::hidden,
    TensorClass::gate,      TensorClass::gate_scalar, TensorClass::conv,
    TensorClass::gain,      TensorClass::output_gain, TensorClass::final_gain};

// Of an enum: what an error calls it, and its values' names in their order.
template <class Enum>
struct Names;
template <>
struct Names<Parametrization> {
  static constexpr const char *what = "parametrization", *names[] = {"sp", "mup0", "mup"};
};
template <>
struct Names<OptimizerKind> {
  static constexpr const char *what = "optimizer", *names[] = {"adamw", "sgd"};
};
template <>
struct Names<TensorClass> {
  static constexpr const char *what = "class", *names[] = {"embedding", "unembedding", "hidden",
                                                           "gate",      "gate_scalar", "conv",
                                                           "gain",      "output_gain", "final_gain"};
};
template <>
struct Names<VectorRule> {
  static constexpr const char *what = "gains and taps", *names[] = {"vector", "hidden"};
};
template <>
struct Names<GateRule> {
  static constexpr const char *what = "gates", *names[] = {"independent", "output", "aligned"};
};
template <>
struct Names<ReadoutRule> {
  static constexpr const char *what = "readout scale", *names[] = {"param", "sp", "mup"};
};
template <>
struct Names<DecayMode> {
  static constexpr const char *what = "decay mode", *names[] = {"coupled", "sqrt", "independent"};
};
template <>
struct Names<EpsMode> {
  static constexpr const char *what = "eps mode", *names[] = {"constant", "scaled"};
};
template <>
struct Names<DepthRule> {
  static constexpr const char *what = "depth alpha", *names[] = {"1", "1/2", "off"};
};
template <>
struct Names<ClipNorm> {
  static constexpr const char *what = "norm to clip", *names[] = {"plain", "scaled"};
};

template <class Enum>
auto name(Enum x) -> decltype(Names<Enum>::names[0]) {
  return Names<Enum>::names[int(x)];
}

// Throws one line with the text seen and the names expected.
template <class Enum>
Enum parse(const std::string& text) {
  std::string expected;
  const int count = int(std::size(Names<Enum>::names));
  for (int i = 0; i < count; i++) {
    if (text == Names<Enum>::names[i]) return Enum(i);
    expected += (i == 0 ? "" : i + 1 == count ? " or " : ", ") + std::string(Names<Enum>::names[i]);
  }
  throw std::runtime_error(Names<Enum>::what + (" '" + text + "': expected " + expected));
}

inline Parametrization parse_parametrization(const std::string& text) { return parse<Parametrization>(text); }
inline OptimizerKind parse_optimizer(const std::string& text) { return parse<OptimizerKind>(text); }
inline VectorRule parse_vector_rule(const std::string& text) { return parse<VectorRule>(text); }
inline GateRule parse_gate_rule(const std::string& text) { return parse<GateRule>(text); }
inline ReadoutRule parse_readout_rule(const std::string& text) { return parse<ReadoutRule>(text); }
inline DecayMode parse_decay_mode(const std::string& text) { return parse<DecayMode>(text); }
inline EpsMode parse_eps_mode(const std::string& text) { return parse<EpsMode>(text); }
inline DepthRule parse_depth_rule(const std::string& text) { return parse<DepthRule>(text); }
inline ClipNorm parse_clip_norm(const std::string& text) { return parse<ClipNorm>(text); }

// One factor for each class, in the order of TensorClass: what a user tunes at the base besides the learning
// rate itself. Being the same at every width, they change no exponent, and transfer as the learning rate does
// ([TP5], table 2).
using ClassFactors = std::array<double, kTensorClassCount>;

inline ClassFactors ones() {
  ClassFactors factors;
  factors.fill(1);
  return factors;
}

// Reads "conv=0.5,gain=2"; classes that are not named have 1, but for final_gain, which is a gain. Throws one
// line that says what was expected.
inline ClassFactors parse_class_factors(const std::string& text) {
  ClassFactors factors = ones();
  std::set<TensorClass> named;
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
    if (!named.insert(*found).second)
      throw std::runtime_error("factor '" + part + "': " + name(*found) + " is named twice, expected once");
    factors[int(*found)] = factor;
    begin = end + 1;
  }
  if (!named.count(TensorClass::final_gain))
    factors[int(TensorClass::final_gain)] = factors[int(TensorClass::gain)];
  return factors;
}

// Initial values that are drawn around 0 can be scaled in the same sense. Gains (1) and time scales cannot:
// throws one line where such a factor is not 1.
inline void check_init_factors(const ClassFactors& factors) {
  for (const TensorClass cls :
       {TensorClass::gate_scalar, TensorClass::gain, TensorClass::output_gain, TensorClass::final_gain})
    if (factors[int(cls)] != 1)
      throw std::runtime_error("factor of the initial values of " + std::string(name(cls)) +
                               ": expected none, they do not lie around 0");
}

inline std::string mup_table(const Mup& m, OptimizerKind optimizer) {
  char line[240];
  const ModelShape &a = m.shape, &b = m.base;
  std::snprintf(line, sizeof line,
                "%s, %s: d = %g (base %g), H = %g (%g), dk = %g (%g), dv = %g (%g), I = %g (%g)\n",
                name(m.parametrization), name(optimizer), a.width, b.width, a.heads, b.heads, a.head_dim_k,
                b.head_dim_k, a.head_dim_v, b.head_dim_v, a.inner, b.inner);
  std::string table = line;
  std::snprintf(line, sizeof line, "  %-12s %10s %10s  %s\n", "class", "init std", "lr", "decay");
  table += line;
  const auto row = [&](const char* title, TensorClass cls, FanIn fan_in) {
    const bool drawn_from_normal = cls <= TensorClass::gate;
    char std_text[16] = "-";
    if (drawn_from_normal) std::snprintf(std_text, sizeof std_text, "%.5g", init_std(m, cls, fan_in));
    std::snprintf(line, sizeof line, "  %-12s %10s %10.5g  %s\n", title, std_text,
                  learning_rate_scale(m, optimizer, cls, fan_in), has_weight_decay(cls) ? "yes" : "no");
    table += line;
  };
  for (const TensorClass cls : kTensorClasses) {
    row(name(cls), cls, FanIn::width);
    if (cls != TensorClass::hidden) continue;
    row("  W_o", cls, FanIn::values);
    row("  W_down", cls, FanIn::inner);
  }
  std::snprintf(line, sizeof line, "  logits x %.5g (m_out), readout x %.5g (s)\n", logit_scale(m),
                readout_scale(m));
  table += line;
  if (m.layers == m.base_layers) return table;
  std::snprintf(line, sizeof line, "  L = %g (%g): branches x %.5g, depth alpha %s\n", m.layers,
                m.base_layers, residual_scale(m), name(m.depth));
  return table + line;
}

}  // namespace gdn
