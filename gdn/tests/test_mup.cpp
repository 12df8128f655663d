// Tests of mup.h: at the base size all parametrizations are one, and away from it every constant grows with
// the exponent that is written out below, for both ways to grow a model.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "../cpu_layers.h"
#include "../model.h"
#include "../mup_names.h"
#include "../mup_table.h"
#include "../optimizer.h"
#include "../parameters.h"

namespace {
namespace mup_tests {

using namespace gdn;

enum class Family { fixed_heads, fixed_head_size };
constexpr Family kFamilies[] = {Family::fixed_heads, Family::fixed_head_size};
constexpr double kBaseWidth = 256;

// A model of the sizes that were trained in arXiv 2606.04048 (fixed heads), or with heads of 64 (fixed head
// size).
Mup model(Parametrization parametrization, Family family, double width) {
  if (family == Family::fixed_heads) {
    const ModelShape shape{width, 6, width / 8, width / 4, 3 * width};
    return {parametrization, shape, base_with_fixed_heads(shape, kBaseWidth, 3 * kBaseWidth)};
  }
  const ModelShape shape{width, 3 * width / 256, 64, 128, 3 * width};
  return {parametrization, shape, base_with_fixed_head_size(shape, kBaseWidth, 3 * kBaseWidth)};
}

constexpr double kNone = -99;  // no such constant

// Exponents of r = d/d0. `init` and `forward` are those of mup0 and of mup.
struct Row {
  TensorClass cls;
  double init, forward, adamw, sgd_mup, sgd_mup0;
};

// clang-format off
const std::vector<Row> kFixedHeads = {
    {TensorClass::embedding, 0, kNone, 0, +1, +1},
    {TensorClass::unembedding, 0, -1, 0, +1, +1},
    {TensorClass::hidden, -0.5, kNone, -1, 0, 0},
    {TensorClass::gate, -0.5, kNone, -1, -0.5, 0},
    {TensorClass::gate_scalar, kNone, kNone, 0, +0.5, 0},
    {TensorClass::conv, kNone, kNone, 0, +1, +1},
    {TensorClass::gain, kNone, kNone, 0, +1, +1},
    {TensorClass::output_gain, kNone, kNone, 0, +1, +1},
    {TensorClass::final_gain, kNone, kNone, 0, +1, +1},
};

const std::vector<Row> kFixedHeadSize = {
    {TensorClass::embedding, 0, kNone, 0, +1, +1},
    {TensorClass::unembedding, 0, -1, 0, +1, +1},
    {TensorClass::hidden, -0.5, kNone, -1, 0, 0},
    {TensorClass::gate, -0.5, kNone, -1, 0, 0},
    {TensorClass::gate_scalar, kNone, kNone, 0, +1, +1},
    {TensorClass::conv, kNone, kNone, 0, +1, +1},
    {TensorClass::gain, kNone, kNone, 0, +1, +1},
    {TensorClass::output_gain, kNone, kNone, 0, +0.5, +0.5},
    {TensorClass::final_gain, kNone, kNone, 0, +1, +1},
};
// clang-format on

const std::vector<Row>& exponents(Family family) {
  return family == Family::fixed_heads ? kFixedHeads : kFixedHeadSize;
}

struct ReadoutRow {
  Family family;
  Parametrization parametrization;
  double exponent;
};

const std::vector<ReadoutRow> kReadout = {
    {Family::fixed_heads, Parametrization::sp, -0.5},   {Family::fixed_head_size, Parametrization::sp, 0},
    {Family::fixed_heads, Parametrization::mup0, -0.5}, {Family::fixed_head_size, Parametrization::mup0, 0},
    {Family::fixed_heads, Parametrization::mup, +0.5},  {Family::fixed_head_size, Parametrization::mup, 0},
};

template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "no error";
}

const double kWidths[] = {64, 128, 384, 512, 768, 1536, 2048, 8192};

}  // namespace mup_tests
}  // namespace

TEST_CASE("mup: the tables of exponents name every class once, in order") {
  using namespace mup_tests;
  for (const Family family : kFamilies) {
    const std::vector<Row>& rows = exponents(family);
    REQUIRE(rows.size() == std::size(kTensorClasses));
    for (size_t i = 0; i < rows.size(); i++) CHECK(rows[i].cls == kTensorClasses[i]);
  }
}

TEST_CASE("mup: at the base width all parametrizations are the same, bit for bit") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const Parametrization p : kParametrizations) {
      CAPTURE(name(p));
      const Mup m = model(p, family, kBaseWidth);
      CHECK(logit_scale(m) == 1.0);
      CHECK(readout_scale(m) == 1 / std::sqrt(m.shape.head_dim_k));
      for (const Row& row : exponents(family)) {
        CAPTURE(name(row.cls));
        for (const OptimizerKind optimizer : kOptimizerKinds)
          CHECK(learning_rate_scale(m, optimizer, row.cls) == 1.0);
        if (row.init != kNone) CHECK(init_std(m, row.cls) == 0.02);
      }
    }
}

TEST_CASE("mup: at any base width, whole or not, the base of a model of that width is the model") {
  using namespace mup_tests;
  for (const double width : {48.0, 80.0, 272.0, 1000.0, 1536.0}) {
    const ModelShape shape{width, 7, 3 * width / 28, width / 7, 3 * width};
    for (const ModelShape& base : {base_with_fixed_heads(shape, width, 3 * width),
                                   base_with_fixed_head_size(shape, width, 3 * width)}) {
      CHECK(base.width == shape.width);
      CHECK(base.heads == shape.heads);
      CHECK(base.head_dim_k == shape.head_dim_k);
      CHECK(base.head_dim_v == shape.head_dim_v);
      CHECK(base.inner == shape.inner);
      for (const Parametrization p : kParametrizations)
        CHECK(readout_scale({p, shape, base}) == 1 / std::sqrt(shape.head_dim_k));
    }
  }
}

TEST_CASE("mup: the base of a family") {
  using namespace mup_tests;
  const ModelShape shape{1024, 6, 128, 256, 2816};
  const ModelShape heads = base_with_fixed_heads(shape, 256, 768),
                   head_size = base_with_fixed_head_size(shape, 256, 768);
  CHECK(heads.inner == 768);
  CHECK(head_size.inner == 768);
  CHECK((heads.width == 256 && heads.heads == 6 && heads.head_dim_k == 32 && heads.head_dim_v == 64));
  CHECK((head_size.width == 256 && head_size.heads == 1.5 && head_size.head_dim_k == 128 &&
         head_size.head_dim_v == 256));
}

TEST_CASE("mup: every constant grows with the exponent of the table") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const double width : kWidths) {
      CAPTURE(int(family));
      CAPTURE(width);
      const double log_r = std::log(width / kBaseWidth);
      const auto exponent = [&](double scale) {
        return doctest::Approx(std::log(scale) / log_r).epsilon(1e-12);
      };
      const Mup mup = model(Parametrization::mup, family, width),
                mup0 = model(Parametrization::mup0, family, width);
      for (const Row& row : exponents(family)) {
        CAPTURE(name(row.cls));
        for (const Mup& m : {mup, mup0}) {
          if (row.init != kNone) CHECK(row.init == exponent(init_std(m, row.cls) / 0.02));
          if (row.forward != kNone) CHECK(row.forward == exponent(logit_scale(m)));
          CHECK(row.adamw == exponent(learning_rate_scale(m, OptimizerKind::adamw, row.cls)));
        }
        CHECK(row.sgd_mup == exponent(learning_rate_scale(mup, OptimizerKind::sgd, row.cls)));
        CHECK(row.sgd_mup0 == exponent(learning_rate_scale(mup0, OptimizerKind::sgd, row.cls)));
      }
    }
}

TEST_CASE("mup: sp changes nothing with width") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const double width : kWidths) {
      const Mup m = model(Parametrization::sp, family, width);
      CHECK(logit_scale(m) == 1.0);
      for (const Row& row : exponents(family)) {
        for (const OptimizerKind optimizer : kOptimizerKinds)
          CHECK(learning_rate_scale(m, optimizer, row.cls) == 1.0);
        if (row.init != kNone) CHECK(init_std(m, row.cls) == 0.02);
      }
    }
}

TEST_CASE("mup: the readout scale") {
  using namespace mup_tests;
  for (const ReadoutRow& row : kReadout)
    for (const double width : kWidths) {
      CAPTURE(name(row.parametrization));
      CAPTURE(width);
      const double base_dk = row.family == Family::fixed_heads ? 32 : 64;
      const double s = readout_scale(model(row.parametrization, row.family, width));
      CHECK(s == doctest::Approx(std::pow(base_dk, -0.5) * std::pow(width / kBaseWidth, row.exponent))
                     .epsilon(1e-12));
    }
}

TEST_CASE("mup: the readout scale of one parametrization under another changes nothing else") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const double width : kWidths)
      for (const Parametrization p : kParametrizations)
        for (const Parametrization other : {Parametrization::sp, Parametrization::mup}) {
          const Mup plain = model(p, family, width);
          Mup m = plain;
          m.readout = other == Parametrization::sp ? ReadoutRule::sp : ReadoutRule::mup;
          CHECK(readout_scale(m) == readout_scale(model(other, family, width)));
          CHECK(logit_scale(m) == logit_scale(plain));
          for (const TensorClass cls : kTensorClasses)
            for (const OptimizerKind optimizer : kOptimizerKinds)
              CHECK(learning_rate_scale(m, optimizer, cls) == learning_rate_scale(plain, optimizer, cls));
        }
  for (const ReadoutRule rule : {ReadoutRule::param, ReadoutRule::sp, ReadoutRule::mup})
    CHECK(parse_readout_rule(name(rule)) == rule);
  CHECK(error_of([] { parse_readout_rule("mup0"); }) == "readout scale 'mup0': expected param, sp or mup");
}

// Head count and head size grow by different factors: r = 8 = r_H r_v, r_H = 2, r_k = r_v = 4.
TEST_CASE("mup: a family between the two") {
  using namespace mup_tests;
  const ModelShape base{256, 6, 32, 64, 768}, shape{2048, 12, 128, 256, 6144};
  const Mup mup{Parametrization::mup, shape, base}, mup0{Parametrization::mup0, shape, base};
  const auto sgd = [](const Mup& m, TensorClass cls) {
    return learning_rate_scale(m, OptimizerKind::sgd, cls);
  };
  CHECK(sgd(mup, TensorClass::gate) == doctest::Approx(1 / 2.0));  // r_v^-1/2
  CHECK(sgd(mup0, TensorClass::gate) == doctest::Approx(1));
  CHECK(sgd(mup, TensorClass::gate_scalar) == doctest::Approx(8 / 2.0));             // r r_v^-1/2
  CHECK(sgd(mup0, TensorClass::gate_scalar) == doctest::Approx(2));                  // r_H
  CHECK(sgd(mup, TensorClass::output_gain) == doctest::Approx(8 / std::sqrt(2.0)));  // r r_H^-1/2
  CHECK(readout_scale(mup) == doctest::Approx(2 / std::sqrt(32.0)));                 // r_k^1/2
  CHECK(readout_scale(mup0) == doctest::Approx(1 / std::sqrt(128.0)));
}

namespace {
namespace mup_tests {

// The table once more, stated without m, n and g: what each constant is as a product of powers of the ratios
// r, r_H, r_v and r_I. Rows of mup0 where they differ from mup's.
struct Product {
  double r = 0, H = 0, v = 0, I = 0;
  double of(const Ratios& x) const {
    return std::pow(x.r, r) * std::pow(x.r_H, H) * std::pow(x.r_v, v) * std::pow(x.r_I, I);
  }
};
struct Statement {
  TensorClass cls;
  FanIn fan_in;
  Product init, adamw, sgd, sgd_mup0;
};
// clang-format off
const std::vector<Statement> kStatements = {
    //                                           init                adamw           sgd, mup            sgd, mup0
    {TensorClass::embedding,   FanIn::width,  {},                 {},             {1},                {1}},
    {TensorClass::unembedding, FanIn::width,  {},                 {},             {1},                {1}},
    {TensorClass::hidden,      FanIn::width,  {-0.5},             {-1},           {},                 {}},
    {TensorClass::hidden,      FanIn::values, {0, -0.5, -0.5},    {0, -1, -1},    {1, -1, -1},        {1, -1, -1}},
    {TensorClass::hidden,      FanIn::inner,  {0, 0, 0, -0.5},    {0, 0, 0, -1},  {1, 0, 0, -1},      {1, 0, 0, -1}},
    {TensorClass::gate,        FanIn::width,  {-0.5},             {-1},           {0, 0, -0.5},       {}},
    {TensorClass::gate_scalar, FanIn::width,  {},                 {},             {1, 0, -0.5},       {0, 1}},
    {TensorClass::conv,        FanIn::width,  {},                 {},             {1},                {1}},
    {TensorClass::gain,        FanIn::width,  {},                 {},             {1},                {1}},
    {TensorClass::output_gain, FanIn::width,  {},                 {},             {1, -0.5},          {1, -0.5}},
    {TensorClass::final_gain,  FanIn::width,  {},                 {},             {1},                {1}},
};
// clang-format on

// -mup_table json: every tensor, with the numbers that the trainer itself uses.
TEST_CASE("mup: the table for other programs has the trainer's own factors") {
  for (const bool tied : {true, false}) {
    ModelConfig config = make_config(512, 256, 3, 6, 0, 2, 300, Parametrization::mup);
    config.tied = tied;
    config.base_layers = 2;
    const Json table =
        parse_json(json_text(mup_json(config, DecayMode::independent, EpsMode::scaled), true), "a table");
    CHECK(table.at("forward").number("logits") == 0.5);
    CHECK(table.at("forward").number("readout") == doctest::Approx(config.readout_scale()));
    CHECK(table.at("forward").number("branches") == doctest::Approx(2 / 3.0));
    const Mup m = config.mup();
    const std::vector<Tensor> tensors = make_parameter_table(config).tensors;
    const Json::Array& rows = std::get<Json::Array>(table.at("tensors").value);
    REQUIRE(rows.size() == tensors.size());
    CHECK(tensors.back().name == (tied ? "model.norm.weight" : "lm_head.weight"));
    for (size_t i = 0; i < rows.size(); i++) {
      const Tensor& t = tensors[i];
      CAPTURE(t.name);
      CHECK(rows[i].string("name") == t.name);
      CHECK(rows[i].string("class") == name(t.cls));
      const Json::Array& shape = std::get<Json::Array>(rows[i].at("shape").value);
      CHECK(shape.size() == t.shape.size());
      CHECK(std::get<int64_t>(shape[0].value) == t.shape[0]);
      const Json &adamw = rows[i].at("adamw"), &sgd = rows[i].at("sgd");
      const double lr = learning_rate_scale(m, OptimizerKind::adamw, t.cls, t.fan_in);
      CHECK(adamw.number("lr") == doctest::Approx(lr).epsilon(1e-15));
      CHECK(adamw.number("weight_decay") == doctest::Approx(has_weight_decay(t.cls) ? 1 / lr : 0));
      CHECK(adamw.number("eps") == doctest::Approx(epsilon_scale(m, t.cls, EpsMode::scaled, t.fan_in)));
      CHECK(sgd.number("lr") ==
            doctest::Approx(learning_rate_scale(m, OptimizerKind::sgd, t.cls, t.fan_in)).epsilon(1e-15));
      const Json& init = rows[i].at("init");
      if (t.cls == TensorClass::gate_scalar)
        CHECK(init.is<std::nullptr_t>());
      else if (drawn_from_a_normal(t.cls))
        CHECK(init.number("normal") == doctest::Approx(init_std(m, t.cls, t.fan_in)).epsilon(1e-15));
      else
        CHECK(init.number(t.cls == TensorClass::conv ? "uniform" : "constant") ==
              (t.cls == TensorClass::conv ? 0.5 : 1));
    }
  }
}

}  // namespace mup_tests
}  // namespace

TEST_CASE("mup: every constant is the product of ratios that the second statement of the table says") {
  using namespace mup_tests;
  const ModelShape base{256, 6, 32, 64, 768};
  for (const ModelShape& shape : {ModelShape{1024, 6, 128, 256, 2816},  // fixed heads, I as rounded
                                  ModelShape{1024, 24, 32, 64, 2816},   // fixed head size
                                  ModelShape{1024, 12, 64, 128, 2816},  // H ~ dk ~ r^1/2
                                  ModelShape{128, 6, 16, 32, 512},      // below the base
                                  ModelShape{512, 9, 48, 72, 1280},     // no family: r_H r_v != r
                                  ModelShape{256, 6, 32, 64, 768}}) {   // the base
    const Ratios x = ratios({Parametrization::mup, shape, base});
    CAPTURE(shape.width);
    CAPTURE(shape.heads);
    for (const Parametrization p : kParametrizations) {
      CAPTURE(name(p));
      const Mup m{p, shape, base};
      const bool sp = p == Parametrization::sp, mup0 = p == Parametrization::mup0;
      const auto is = [&](const Product& product) {
        return doctest::Approx(sp ? 1.0 : product.of(x)).epsilon(1e-12);
      };
      for (const Statement& s : kStatements) {
        CAPTURE(name(s.cls));
        CAPTURE(int(s.fan_in));
        if (s.cls <= TensorClass::gate) CHECK(init_std(m, s.cls, s.fan_in) / 0.02 == is(s.init));
        CHECK(learning_rate_scale(m, OptimizerKind::adamw, s.cls, s.fan_in) == is(s.adamw));
        const double sgd = learning_rate_scale(m, OptimizerKind::sgd, s.cls, s.fan_in);
        CHECK(sgd == is(mup0 ? s.sgd_mup0 : s.sgd));
        CHECK(clip_weight(m, s.cls, ClipNorm::scaled, s.fan_in) == sgd);
        const double decay =
            weight_decay_scale(m, OptimizerKind::adamw, s.cls, DecayMode::independent, s.fan_in);
        CHECK(decay == (has_weight_decay(s.cls) ? doctest::Approx(sp ? 1.0 : 1 / s.adamw.of(x)).epsilon(1e-12)
                                                : doctest::Approx(0)));
      }
      CHECK(logit_scale(m) == is({-1}));
      CHECK(readout_scale(m) * std::sqrt(shape.head_dim_k) ==
            doctest::Approx(p == Parametrization::mup ? x.r_k : 1.0).epsilon(1e-12));
      CHECK(conv_init_range(m) == 0.5);
    }
  }
}

TEST_CASE("mup: W_down and W_o scale by what they sum over, every other tensor by the width") {
  using namespace mup_tests;
  Cpu<float> dev;
  const ModelConfig c = make_config(256, 128, 1, 3, 0, 2, 64, Parametrization::mup);
  CHECK(c.mlp_size == 768);
  CHECK(c.mup().base.inner == 512);
  Parameters<Cpu<float>> p(dev, c);
  p.initialize(1);
  const std::vector<ParameterSpan> adamw = p.spans(OptimizerKind::adamw, 0),
                                   sgd = p.spans(OptimizerKind::sgd, 0);
  std::vector<Tensor> tensors = p.table.tensors;  // in the spans' order
  std::sort(tensors.begin(), tensors.end(),
            [](const Tensor& a, const Tensor& b) { return a.offset < b.offset; });
  for (size_t i = 0; i < adamw.size(); i++) {
    const Tensor& t = tensors[i];
    REQUIRE(adamw[i].offset == t.offset);
    CAPTURE(t.name);
    const bool down = t.name.find("down_proj") != std::string::npos;
    CHECK((t.fan_in == FanIn::inner) == down);
    CHECK((t.fan_in == FanIn::values) == (t.name.find("o_proj") != std::string::npos));
    if (t.cls != TensorClass::hidden) continue;
    CHECK(adamw[i].learning_rate_scale == doctest::Approx(down ? 1 / 1.5 : 1 / 2.0));  // 1/r_I, 1/r
    CHECK(sgd[i].learning_rate_scale == doctest::Approx(down ? 2 / 1.5 : 1.0));        // r/r_I, 1
    double squares = 0;
    for (size_t k = 0; k < t.size; k++) squares += double(p.master(t.offset)[k]) * p.master(t.offset)[k];
    CHECK(std::sqrt(squares / t.size) == doctest::Approx(0.02 / std::sqrt(down ? 1.5 : 2.0)).epsilon(0.02));
  }
  ModelConfig other = c;  // an inner size that does not follow from the width keeps its share of it
  other.mlp_size = 100;
  CHECK(other.mup().base.inner == 50);
}

TEST_CASE("mup: which classes have an init std, and which decay") {
  using namespace mup_tests;
  const Mup m = model(Parametrization::mup, Family::fixed_heads, 512);
  for (const TensorClass cls : {TensorClass::gate_scalar, TensorClass::conv, TensorClass::gain,
                                TensorClass::output_gain, TensorClass::final_gain}) {
    CHECK_THROWS_AS(init_std(m, cls), std::logic_error);
    CHECK_FALSE(has_weight_decay(cls));
  }
  CHECK_FALSE(has_weight_decay(TensorClass::embedding));
  for (const TensorClass cls : {TensorClass::unembedding, TensorClass::hidden, TensorClass::gate})
    CHECK(has_weight_decay(cls));
}

TEST_CASE("mup: gains and taps as hidden weights") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const double width : kWidths)
      for (const Parametrization p : kParametrizations) {
        CAPTURE(std::string(name(p)));
        CAPTURE(width);
        const Mup as_vector = model(p, family, width);
        Mup as_hidden = as_vector;
        as_hidden.vectors = VectorRule::hidden;
        const double r = width / kBaseWidth;
        CHECK(conv_init_range(as_vector) == 0.5);
        CHECK(conv_init_range(as_hidden) ==
              doctest::Approx(p == Parametrization::sp ? 0.5 : 0.5 / std::sqrt(r)).epsilon(1e-12));
        for (const TensorClass cls : kTensorClasses)
          for (const OptimizerKind optimizer : kOptimizerKinds) {
            const bool is_vector = cls == TensorClass::conv || cls == TensorClass::gain ||
                                   cls == TensorClass::output_gain || cls == TensorClass::final_gain;
            CHECK(learning_rate_scale(as_hidden, optimizer, cls) ==
                  learning_rate_scale(as_vector, optimizer, is_vector ? TensorClass::hidden : cls));
          }
      }
  Mup base = model(Parametrization::mup, Family::fixed_heads, kBaseWidth);
  base.vectors = VectorRule::hidden;
  CHECK(conv_init_range(base) == 0.5);
}

TEST_CASE("mup: gates as output weights, with gradients of independent and of aligned signs") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const double width : kWidths)
      for (const Parametrization p : kParametrizations)
        for (const GateRule rule : {GateRule::output, GateRule::aligned}) {
          CAPTURE(std::string(name(p)));
          CAPTURE(width);
          CAPTURE(std::string(name(rule)));
          const Mup plain = model(p, family, width);
          Mup m = plain;
          m.gates = rule;
          const double r = width / kBaseWidth;
          const bool differs = p == Parametrization::mup && family == Family::fixed_heads;
          const bool aligned = differs && rule == GateRule::aligned;
          CHECK(init_std(m, TensorClass::gate) ==
                doctest::Approx(init_std(plain, TensorClass::gate) * (differs ? std::pow(r, -0.5) : 1)));
          for (const OptimizerKind optimizer : kOptimizerKinds)
            for (const TensorClass cls : kTensorClasses) {
              const bool of_gate = cls == TensorClass::gate || cls == TensorClass::gate_scalar;
              const double exponent = optimizer == OptimizerKind::sgd && of_gate && aligned ? -0.5 : 0;
              CHECK(learning_rate_scale(m, optimizer, cls) ==
                    doctest::Approx(learning_rate_scale(plain, optimizer, cls) * std::pow(r, exponent)));
            }
        }
  for (const GateRule rule : {GateRule::independent, GateRule::output, GateRule::aligned})
    CHECK(parse_gate_rule(name(rule)) == rule);
  CHECK(error_of([] { parse_gate_rule("both"); }) == "gates 'both': expected independent, output or aligned");
}

TEST_CASE("mup: independent decay is the same at every width, coupled decay follows the learning rate") {
  using namespace mup_tests;
  for (const double width : kWidths)
    for (const OptimizerKind optimizer : kOptimizerKinds)
      for (const TensorClass cls : kTensorClasses) {
        const Mup m = model(Parametrization::mup, Family::fixed_heads, width);
        const double lr = learning_rate_scale(m, optimizer, cls),
                     coupled = weight_decay_scale(m, optimizer, cls, DecayMode::coupled),
                     independent = weight_decay_scale(m, optimizer, cls, DecayMode::independent);
        CHECK(coupled == (has_weight_decay(cls) ? 1 : 0));
        CHECK(lr * independent == doctest::Approx(coupled).epsilon(1e-12));
        const double root = weight_decay_scale(m, optimizer, cls, DecayMode::sqrt);
        CHECK(root * root == doctest::Approx(coupled * independent).epsilon(1e-12));
      }
}

TEST_CASE("mup: depth multiplies what its table says, inside blocks alone, on top of width") {
  using namespace mup_tests;
  const double rho = 4;
  for (const Family family : kFamilies)
    for (const double width : kWidths)
      for (const Parametrization p : kParametrizations)
        for (const DepthRule depth : {DepthRule::one, DepthRule::half, DepthRule::off}) {
          CAPTURE(std::string(name(p)));
          CAPTURE(width);
          CAPTURE(std::string(name(depth)));
          const Mup plain = model(p, family, width);
          Mup m = plain;
          m.layers = 8 * rho, m.base_layers = 8, m.depth = depth;
          const bool counts = p != Parametrization::sp && depth != DepthRule::off;
          const double alpha = depth == DepthRule::half ? 0.5 : 1;
          const auto power = [&](double x) {
            return doctest::Approx(counts ? std::pow(rho, x) : 1).epsilon(1e-12);
          };
          CHECK(residual_scale(m) == power(-alpha));
          CHECK(logit_scale(m) == logit_scale(plain));
          CHECK(readout_scale(m) == readout_scale(plain));
          CHECK(conv_init_range(m) == conv_init_range(plain));
          for (const TensorClass cls : kTensorClasses) {
            CAPTURE(std::string(name(cls)));
            const bool outside = cls == TensorClass::embedding || cls == TensorClass::unembedding ||
                                 cls == TensorClass::final_gain;
            const auto lr = [&](const Mup& x, OptimizerKind o) { return learning_rate_scale(x, o, cls); };
            CHECK(lr(m, OptimizerKind::adamw) / lr(plain, OptimizerKind::adamw) ==
                  power(outside ? 0 : alpha - 1));
            CHECK(lr(m, OptimizerKind::sgd) / lr(plain, OptimizerKind::sgd) ==
                  power(outside ? 0 : 2 * alpha - 1));
            const auto eps = [&](const Mup& x) { return epsilon_scale(x, cls, EpsMode::scaled); };
            CHECK(eps(m) / eps(plain) == power(outside ? 0 : -alpha));
            CHECK(epsilon_scale(m, cls, EpsMode::constant) == 1);
            if (drawn_from_a_normal(cls)) CHECK(init_std(m, cls) == init_std(plain, cls));
          }
        }
  Mup at_base = model(Parametrization::mup, Family::fixed_heads, 512);
  at_base.layers = at_base.base_layers = 24;
  for (const TensorClass cls : kTensorClasses)
    CHECK(
        learning_rate_scale(at_base, OptimizerKind::sgd, cls) ==
        learning_rate_scale(model(Parametrization::mup, Family::fixed_heads, 512), OptimizerKind::sgd, cls));
  for (const DepthRule depth : {DepthRule::one, DepthRule::half, DepthRule::off})
    CHECK(parse_depth_rule(name(depth)) == depth);
  CHECK(error_of([] { parse_depth_rule("2"); }) == "depth alpha '2': expected 1, 1/2 or off");
  CHECK(error_of([] { parse_eps_mode("none"); }) == "eps mode 'none': expected constant or scaled");
}

// A model in float whose weights, gradients and moments scale by powers of two alone has the same bits.
TEST_CASE("mup: a loss 2^k times with eps 2^k times gives AdamW's same steps, bit for bit") {
  using namespace mup_tests;
  Cpu<float> dev;
  const ModelConfig c = make_config(64, 32, 2, 2, 0, 2, 64, Parametrization::mup);
  const auto trained = [&](int k, EpsMode mode) {
    Parameters<Cpu<float>> p(dev, c);
    p.allocate_gradients();
    p.initialize(1);
    OptimizerConfig o;
    o.epsilon = std::ldexp(1e-6f, k);
    o.eps_mode = mode;
    o.clip = 0;
    Optimizer<Cpu<float>> optimizer(p, o);
    Model<Cpu<float>> model(p, 1, 16, Use::training);
    std::vector<int32_t> tokens(16), targets(16);
    for (int i = 0; i < 16; i++) tokens[i] = i * 7 % 64, targets[i] = i * 11 % 64;
    for (int step = 1; step <= 3; step++) {
      p.zero_gradients();
      model.forward_backward(tokens.data(), targets.data(), 1, 16, std::ldexp(1 / 16.0f, k));
      optimizer.step(step, 1e-2);
    }
    return std::vector<float>(p.master(), p.master() + p.table.size);
  };
  for (const EpsMode mode : {EpsMode::constant, EpsMode::scaled})
    for (const int k : {-12, 9}) CHECK(trained(k, mode) == trained(0, mode));
  CHECK(trained(0, EpsMode::constant) != trained(0, EpsMode::scaled));
}

TEST_CASE("mup: the factor of the logits is one at every width, and changes nothing else") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const double width : kWidths)
      for (const Parametrization p : kParametrizations) {
        const Mup plain = model(p, family, width);
        Mup m = plain;
        m.logit_factor = 4;
        CHECK(logit_scale(m) == 4 * logit_scale(plain));
        CHECK(readout_scale(m) == readout_scale(plain));
        for (const TensorClass cls : kTensorClasses)
          for (const OptimizerKind optimizer : kOptimizerKinds)
            CHECK(learning_rate_scale(m, optimizer, cls) == learning_rate_scale(plain, optimizer, cls));
      }
}

TEST_CASE(
    "mup: the scaled norm weighs a tensor as SGD's learning rate does, and is the plain one at the base") {
  using namespace mup_tests;
  for (const Family family : kFamilies)
    for (const double width : kWidths)
      for (const TensorClass cls : kTensorClasses) {
        const Mup m = model(Parametrization::mup, family, width);
        CHECK(clip_weight(m, cls, ClipNorm::plain) == 1);
        CHECK(clip_weight(m, cls, ClipNorm::scaled) == learning_rate_scale(m, OptimizerKind::sgd, cls));
        CHECK(clip_weight(model(Parametrization::sp, family, width), cls, ClipNorm::scaled) == 1);
        CHECK(clip_weight(model(Parametrization::mup, family, kBaseWidth), cls, ClipNorm::scaled) == 1);
      }
}

TEST_CASE("mup: names and parsing") {
  using namespace mup_tests;
  for (const VectorRule rule : {VectorRule::vector, VectorRule::hidden})
    CHECK(parse_vector_rule(name(rule)) == rule);
  for (const DecayMode mode : {DecayMode::coupled, DecayMode::independent})
    CHECK(parse_decay_mode(name(mode)) == mode);
  CHECK(error_of([] { parse_vector_rule("gain"); }) == "gains and taps 'gain': expected vector or hidden");
  CHECK(error_of([] { parse_decay_mode(""); }) == "decay mode '': expected coupled, sqrt or independent");
  for (const ClipNorm norm : {ClipNorm::plain, ClipNorm::scaled}) CHECK(parse_clip_norm(name(norm)) == norm);
  CHECK(error_of([] { parse_clip_norm("mup"); }) == "norm to clip 'mup': expected plain or scaled");
  for (const Parametrization p : kParametrizations) CHECK(parse_parametrization(name(p)) == p);
  for (const OptimizerKind optimizer : kOptimizerKinds) CHECK(parse_optimizer(name(optimizer)) == optimizer);
  CHECK(error_of([] { parse_parametrization("muP"); }) == "parametrization 'muP': expected sp, mup0 or mup");
  CHECK(error_of([] { parse_parametrization(""); }) == "parametrization '': expected sp, mup0 or mup");
  CHECK(error_of([] { parse_optimizer("adam"); }) == "optimizer 'adam': expected adamw or sgd");
}

TEST_CASE("mup: factors of the classes' learning rates") {
  using namespace mup_tests;
  CHECK(parse_class_factors("") == ones());
  ClassFactors want = ones();
  want[int(TensorClass::conv)] = 0.5;
  want[int(TensorClass::gate_scalar)] = 0;
  CHECK(parse_class_factors("conv=0.5,gate_scalar=0") == want);
  for (const char* bad :
       {"conv", "conv=", "conv=x", "conv=-1", "conv=nan", "conv=1e7", "convs=1", "=1", "gain=1 2", ","}) {
    CAPTURE(bad);
    const std::string said = error_of([&] { parse_class_factors(bad); });
    CHECK(said.find("expected CLASS=X") != std::string::npos);
  }
}

TEST_CASE("mup: the printed table") {
  using namespace mup_tests;
  CHECK(mup_table(model(Parametrization::mup, Family::fixed_heads, 1024), OptimizerKind::sgd) ==
        "mup, sgd: d = 1024 (base 256), H = 6 (6), dk = 128 (32), dv = 256 (64), I = 3072 (768)\n"
        "  class          init std         lr  decay\n"
        "  embedding          0.02          4  no\n"
        "  unembedding        0.02          4  yes\n"
        "  hidden             0.01          1  yes\n"
        "    W_o              0.01          1  yes\n"
        "    W_down           0.01          1  yes\n"
        "  gate               0.01        0.5  yes\n"
        "  gate_scalar           -          2  no\n"
        "  conv                  -          4  no\n"
        "  gain                  -          4  no\n"
        "  output_gain           -          4  no\n"
        "  final_gain            -          4  no\n"
        "  logits x 0.25 (m_out), readout x 0.35355 (s)\n");
}
