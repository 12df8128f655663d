// Tests of the gated delta rule on the GPU (gdn/kernels/delta_rule) against the recurrence on the CPU in
// double, over head sizes, lengths, grouped heads and regimes of decay and write strength. The yardstick of
// every output is an oracle: the recurrence in float with its results rounded to bf16. Ours may err twice as
// much as that.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../dev/readable/delta_rule.cuh"
#include "../../gdn_kernels.cuh"
#include "../cpu_layers.h"
#include "../kernels/delta_rule/delta_rule.cuh"
#include "relative_error.h"
#include "inputs.h"
#include "needs_gpu.h"

namespace {

using namespace gdn;
using namespace gdn_tests;

enum Regime {
  kInitial,
  kWeakDecay,
  kStrongDecay,
  kBetaNearZero,
  kBetaNearOne,
  kBetaToTwo,
  kWeakDecayBetaToTwo
};
constexpr int kRegimes = 7;
const char* const kRegimeNames[kRegimes] = {"initial values",       "weak decay",  "strong decay",
                                            "beta near 0",          "beta near 1", "beta to 2",
                                            "weak decay, beta to 2"};

using Doubles = std::vector<double>;

double round_to_bf16(double x) { return __bfloat162float(__float2bfloat16_rn(float(x))); }

struct Inputs {
  Doubles qkv, d_o;  // bf16 values
  Doubles g, beta;   // float values
  float s;
};

std::string describe(const MixerShape& shape) {
  const auto text = [](int x) { return std::to_string(x); };
  return "B=" + text(shape.batch) + " T=" + text(shape.tokens) + " Hk=" + text(shape.heads_k) +
         " Hv=" + text(shape.heads_v) + " dk=" + text(shape.head_dim_k) + " dv=" + text(shape.head_dim_v);
}

double draw_g(std::mt19937_64& random, Regime regime, double decay_scale) {
  std::uniform_real_distribution<double> uniform(0, 1);
  const double u = uniform(random);
  if (regime == kWeakDecay || regime == kWeakDecayBetaToTwo) return -0.002 * u;
  if (regime == kStrongDecay)
    return u < 0.2 ? -50 * uniform(random) : u < 0.5 ? -2 * uniform(random) : -0.01 * u;
  return -decay_scale * 0.1 * std::pow(0.01, u);
}

double draw_beta(std::mt19937_64& random, Regime regime) {
  const double u = std::uniform_real_distribution<double>(0, 1)(random);
  if (regime == kBetaNearZero) return 1e-3 * u;
  if (regime == kBetaNearOne) return 1 - 1e-3 * u;
  if (regime == kBetaToTwo || regime == kWeakDecayBetaToTwo) return 2 * u;
  return 1 / (1 + std::exp(-3 * (u - 0.5)));
}

Inputs make_inputs(const MixerShape& shape, Regime regime, int seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  Inputs in;
  in.s = 1 / std::sqrt(float(shape.head_dim_k));
  in.qkv = random_qkv<double>(shape, random);
  in.d_o.resize(size_t(shape.rows()) * shape.value_dim());
  for (double& x : in.d_o) x = round_to_bf16(normal(random));
  for (double& x : in.qkv) x = round_to_bf16(x);
  for (int m = 0; m < shape.rows(); m++)
    for (int h = 0; h < shape.heads_v; h++) {
      in.g.push_back(float(draw_g(random, regime, 1 + 5 * h)));
      in.beta.push_back(float(draw_beta(random, regime)));
    }
  return in;
}

enum Output { kO, kDq, kDk, kDv, kDg, kDbeta };
constexpr int kOutputs = 6;
const char* const kOutputNames[kOutputs] = {"o", "dq", "dk", "dv", "dg", "dbeta"};

struct Results {
  Doubles of[kOutputs];
};

// Columns [first, first + width) of rows of C.
Doubles columns(const Doubles& x, int C, int first, int width) {
  Doubles out;
  for (size_t row = 0; row < x.size(); row += C)
    out.insert(out.end(), &x[row + first], &x[row + first] + width);
  return out;
}

Results split_results(const MixerShape& shape, const Doubles& o, const Doubles& dqkv, const Doubles& dg,
                      const Doubles& dbeta) {
  const int C = shape.conv_channels(), key_dim = shape.key_dim();
  return {{o, columns(dqkv, C, 0, key_dim), columns(dqkv, C, key_dim, key_dim),
           columns(dqkv, C, 2 * key_dim, shape.value_dim()), dg, dbeta}};
}

template <class Real>
Results recurrence(const MixerShape& shape, const Inputs& in) {
  using Reals = std::vector<Real>;
  const auto reals = [](const Doubles& x) { return Reals(x.begin(), x.end()); };
  const Reals qkv = reals(in.qkv), g = reals(in.g), beta = reals(in.beta), d_o = reals(in.d_o);
  Reals o(d_o.size()), dqkv(qkv.size()), dg(g.size()), dbeta(g.size());
  Reals state(size_t(shape.batch) * shape.heads_v * shape.head_dim_k * shape.head_dim_v, Real(0));
  Cpu<Real> cpu;
  gated_delta_rule_recurrent(cpu, o.data(), state.data(), qkv.data(), g.data(), beta.data(), shape,
                             Real(in.s));
  gated_delta_rule_recurrent_backward(cpu, dqkv.data(), dg.data(), dbeta.data(), d_o.data(), qkv.data(),
                                      g.data(), beta.data(), shape, Real(in.s));
  const auto doubles = [](const Reals& x) { return Doubles(x.begin(), x.end()); };
  return split_results(shape, doubles(o), doubles(dqkv), doubles(dg), doubles(dbeta));
}

// ---- on the GPU -------------------------------------------------------------------------------------------

std::vector<act> to_act(const Doubles& x) {
  std::vector<act> out;
  for (double value : x) out.push_back(__float2bfloat16_rn(float(value)));
  return out;
}
std::vector<float> to_float(const Doubles& x) { return std::vector<float>(x.begin(), x.end()); }

Doubles to_double(const std::vector<float>& x) { return Doubles(x.begin(), x.end()); }
Doubles to_double(const std::vector<act>& x) {
  Doubles out;
  for (act value : x) out.push_back(__bfloat162float(value));
  return out;
}

// Every byte 0xff: a NaN in bf16 and in float.
template <class T>
Buffer<Cuda, T> poisoned(Cuda& device, size_t size) {
  std::vector<T> x(size);
  std::memset(static_cast<void*>(x.data()), 0xff, size * sizeof(T));
  return upload(device, x);
}

template <class T>
std::vector<T> download(Cuda& device, const Buffer<Cuda, T>& buffer) {
  std::vector<T> x(buffer.size());
  device.download(x.data(), buffer.get(), buffer.bytes());
  return x;
}

struct GpuResults {
  std::vector<act> o, dqkv;
  std::vector<float> dg, dbeta;
};

// The layer's functions.
struct DeltaRule {
  size_t (*saved_bytes)(Cuda&, const MixerShape&);
  size_t (*scratch_bytes)(Cuda&, const MixerShape&);
  void (*forward)(Cuda&, act* o, void* saved, const act* qkv, const float* g, const float* beta,
                  const MixerShape&, float s, void* scratch);
  void (*backward)(Cuda&, act* dqkv, float* dg, float* dbeta, const act* d_o, const void* saved,
                   const act* qkv, const float* g, const float* beta, const MixerShape&, float s,
                   void* scratch);
};
const DeltaRule kTrainers = {gated_delta_rule_saved_bytes, gated_delta_rule_scratch_bytes,
                             gated_delta_rule_forward, gated_delta_rule_backward};

// With memory as `made_for` needs it, where that is another shape.
GpuResults run_on_gpu(Cuda& device, const MixerShape& shape, const Inputs& in,
                      const DeltaRule& rule = kTrainers, const MixerShape* made_for = nullptr) {
  const auto qkv = upload(device, to_act(in.qkv)), d_o = upload(device, to_act(in.d_o));
  const auto g = upload(device, to_float(in.g)), beta = upload(device, to_float(in.beta));
  const auto o = poisoned<act>(device, in.d_o.size()), dqkv = poisoned<act>(device, in.qkv.size());
  const auto dg = poisoned<float>(device, in.g.size()), dbeta = poisoned<float>(device, in.g.size());
  const auto saved = poisoned<uint8_t>(device, rule.saved_bytes(device, made_for ? *made_for : shape));
  const size_t scratch_bytes = rule.scratch_bytes(device, made_for ? *made_for : shape);
  const auto scratch = poisoned<uint8_t>(device, scratch_bytes),
             scratch2 = poisoned<uint8_t>(device, scratch_bytes);
  rule.forward(device, o.get(), saved.get(), qkv.get(), g.get(), beta.get(), shape, in.s, scratch.get());
  rule.backward(device, dqkv.get(), dg.get(), dbeta.get(), d_o.get(), saved.get(), qkv.get(), g.get(),
                beta.get(), shape, in.s, scratch2.get());
  device.synchronize();
  return {download(device, o), download(device, dqkv), download(device, dg), download(device, dbeta)};
}

// What rounding to bf16 alone costs. Of a few numbers an oracle's error is luck, and may be far less.
constexpr double kBf16Error = 1.66e-3;

double allowed_error(const Doubles& oracle, const Doubles& reference) {
  const double error = relative_error(oracle, reference);
  return 2 * (reference.size() < 256 ? std::max(error, kBf16Error) : error);
}

// With each of `shared_bytes` a block; 0: all that the GPU has.
void check_against_recurrence(Cuda& device, const MixerShape& shape, Regime regime, int seed,
                              const std::vector<int>& shared_bytes = {0}) {
  const Inputs in = make_inputs(shape, regime, seed);
  const Results reference = recurrence<double>(shape, in);
  Results oracle = recurrence<float>(shape, in);
  for (Doubles& output : oracle.of)
    for (double& x : output) x = round_to_bf16(x);
  for (const int bytes : shared_bytes) {
    const int all = device.shared_bytes;
    if (bytes > 0) device.shared_bytes = std::min(bytes, all);
    const GpuResults gpu = run_on_gpu(device, shape, in);
    device.shared_bytes = all;
    const Results ours =
        split_results(shape, to_double(gpu.o), to_double(gpu.dqkv), to_double(gpu.dg), to_double(gpu.dbeta));
    INFO(describe(shape), ", ", kRegimeNames[regime], ", bytes of shared memory (0: all): ", bytes);
    for (int i = 0; i < kOutputs; i++) {
      const double error = relative_error(ours.of[i], reference.of[i]);
      const double oracle_error = relative_error(oracle.of[i], reference.of[i]);
      INFO(kOutputNames[i], ": error ", error, ", oracle's ", oracle_error);
      CHECK(error <= allowed_error(oracle.of[i], reference.of[i]));
    }
  }
}

// Each with the next seed.
void check_every_regime(Cuda& device, const MixerShape& shape, int& seed) {
  for (int regime = 0; regime < kRegimes; regime++)
    check_against_recurrence(device, shape, Regime(regime), seed++);
}

TEST_CASE("cuda delta rule: forward and backward against the recurrence" * needs_gpu()) {
  Cuda device;
  const MixerShape shapes[] = {
      make_shape(2, 130, 2, 2, 32, 64),   make_shape(1, 200, 2, 2, 64, 128),
      make_shape(1, 65, 2, 2, 96, 192),   make_shape(1, 130, 1, 1, 128, 256),
      make_shape(1, 64, 1, 1, 192, 384),  make_shape(1, 65, 1, 1, 256, 512),
      make_shape(3, 63, 2, 2, 16, 16),    make_shape(2, 65, 1, 3, 48, 80),
      make_shape(1, 130, 1, 2, 128, 128), make_shape(2, 5, 2, 4, 32, 48),
      make_shape(3, 1, 1, 1, 64, 64),     make_shape(1, 70, 1, 2, 256, 32),
      make_shape(1, 130, 2, 2, 176, 64),  make_shape(1, 130, 1, 2, 192, 64),
  };
  int seed = 1;
  for (const MixerShape& shape : shapes) check_every_regime(device, shape, seed);
}

// Many chunks: errors of the state and its gradient have time to add up.
TEST_CASE("cuda delta rule: long sequences" * needs_gpu()) {
  Cuda device;
  const MixerShape shape = make_shape(1, 777, 1, 1, 64, 48);
  int seed = 100;
  check_every_regime(device, shape, seed);
}

// More chunks than SMs: blocks that take several in turn reuse everything they have.
const MixerShape kManyChunks[] = {make_shape(3, 900, 8, 16, 80, 64), make_shape(3, 900, 8, 8, 48, 320),
                                  make_shape(3, 900, 5, 5, 144, 128)};

TEST_CASE("cuda delta rule: many chunks" * needs_gpu()) {
  Cuda device;
  for (const MixerShape& shape : kManyChunks) check_against_recurrence(device, shape, kInitial, 200);
}

// What GPUs with 99 KiB (sm_86, 89, 120) and 163 KiB (sm_80) of shared memory a block run, on one with more:
// all compiled head sizes, one value head a key head and several, whole and cut; where blocks take several
// work tiles; and with so few SMs that blocks of the passes have all the warps that fit. The plans:
// dev/delta_rule_plans. In a build for Hopper the kernels on wgmma have one plan, and need more: build with
// GPU_ARCH=80.
TEST_CASE("cuda delta rule: every head size in 99 and 163 KiB of shared memory" * needs_gpu()) {
  using namespace gdn::delta_rule;
  if (has_wgmma()) {
    MESSAGE("skipped: this build's kernels are on wgmma; with GPU_ARCH=80 it runs");
    return;
  }
  Cuda device;
  const std::vector<int> shared_bytes = {0, kSharedBytes163, kSharedBytes99};
  int seed = 600;
  const auto check = [&](const MixerShape& shape) {
    for (const Regime regime : {kInitial, kStrongDecay, kWeakDecayBetaToTwo})
      check_against_recurrence(device, shape, regime, seed++, shared_bytes);
  };
  device.sm_count = 1;
  for (const int heads_v : {1, 2})
    for (const MixerShape& shape :
         {make_shape(2, 130, 1, heads_v, 32, 64), make_shape(1, 200, 1, heads_v, 64, 128),
          make_shape(1, 65, 1, heads_v, 96, 192), make_shape(1, 130, 1, heads_v, 128, 256),
          make_shape(1, 130, 1, heads_v, 192, 384), make_shape(1, 65, 1, heads_v, 256, 512),
          make_shape(1, 200, 1, heads_v, 48, 80), make_shape(1, 130, 1, heads_v, 112, 128),
          make_shape(1, 130, 1, heads_v, 176, 32), make_shape(1, 200, 1, heads_v, 208, 16)})
      check(shape);
  device.sm_count = 132;
  for (const MixerShape& shape : {make_shape(3, 900, 5, 10, 256, 64), make_shape(3, 900, 8, 8, 144, 48)})
    check_against_recurrence(device, shape, kInitial, seed++, shared_bytes);
  // cut, where the number of splits does not depend on shared memory
  for (const MixerShape& shape : {make_shape(1, 900, 1, 1, 96, 48), make_shape(1, 1090, 1, 2, 128, 256),
                                  make_shape(1, 800, 1, 1, 176, 64), make_shape(1, 1500, 1, 1, 256, 96)}) {
    REQUIRE(choose_splits(device, shape).count >= 3);
    check(shape);
  }
}

// More blocks of the passes than SMs: on Hopper they have two warpgroups then. Every compiled dk.
const MixerShape kTwoWarpgroups[] = {make_shape(1, 200, 1, 2, 32, 128),  make_shape(2, 130, 1, 1, 64, 80),
                                     make_shape(1, 330, 1, 2, 80, 112),  make_shape(1, 450, 2, 2, 112, 128),
                                     make_shape(2, 40, 1, 1, 128, 256),  make_shape(1, 130, 1, 1, 176, 96),
                                     make_shape(1, 190, 1, 1, 256, 256), make_shape(1, 130, 1, 1, 96, 144)};

TEST_CASE("cuda delta rule: two warpgroups a block" * needs_gpu()) {
  Cuda device;
  device.sm_count = 1;
  int seed = 500;
  for (const MixerShape& shape : kTwoWarpgroups) {
    REQUIRE(gdn::delta_rule::pass_groups(device, shape, 1) == 2);
    check_every_regime(device, shape, seed);
  }
}

// What a model computes when nothing will go backward, with one warpgroup a block, in splits, and with two.
TEST_CASE("cuda delta rule: o with nothing saved" * needs_gpu()) {
  const auto check = [](Cuda& device, const MixerShape& shape) {
    const Inputs in = make_inputs(shape, kInitial, 1);
    const GpuResults trained = run_on_gpu(device, shape, in);
    const auto qkv = upload(device, to_act(in.qkv));
    const auto g = upload(device, to_float(in.g)), beta = upload(device, to_float(in.beta));
    const auto o = poisoned<act>(device, trained.o.size());
    const auto scratch = poisoned<uint8_t>(device, gated_delta_rule_scratch_bytes(device, shape));
    gated_delta_rule_forward(device, o.get(), nullptr, qkv.get(), g.get(), beta.get(), shape, in.s,
                             scratch.get());
    const auto alone = download(device, o);
    INFO(describe(shape));
    CHECK(std::memcmp(alone.data(), trained.o.data(), alone.size() * sizeof(act)) == 0);
  };
  Cuda device;
  check(device, make_shape(2, 200, 1, 2, 64, 128));
  check(device, make_shape(1, 1000, 1, 2, 64, 128));
  device.sm_count = 1;
  for (const MixerShape& shape : kTwoWarpgroups) check(device, shape);
}

// Few heads and a long sequence: the passes take splits of it side by side (delta_rule/splits.cuh). Lengths
// leave a last split with fewer chunks, and a last chunk with fewer tokens.
const MixerShape kCut[] = {make_shape(1, 1000, 2, 2, 64, 128), make_shape(2, 830, 1, 3, 48, 80),
                           make_shape(1, 1300, 1, 1, 32, 64),  make_shape(1, 1090, 1, 2, 128, 256),
                           make_shape(1, 900, 1, 1, 96, 48),   make_shape(1, 800, 1, 1, 176, 64),
                           make_shape(1, 1500, 1, 1, 256, 96)};

TEST_CASE("cuda delta rule: a sequence cut into splits" * needs_gpu()) {
  Cuda device;
  device.sm_count = 132;  // the same splits on every GPU
  int seed = 300;
  for (const MixerShape& shape : kCut) {
    REQUIRE(gdn::delta_rule::choose_splits(device, shape).count >= 3);
    check_every_regime(device, shape, seed);
  }
}

TEST_CASE("cuda delta rule: one sequence, cut, in memory for a batch that is not" * needs_gpu()) {
  Cuda device;
  device.sm_count = 132;
  const MixerShape one = make_shape(1, 1000, 2, 2, 256, 256), many = make_shape(40, 1000, 2, 2, 256, 256);
  REQUIRE(gdn::delta_rule::choose_splits(device, one).count >= 3);
  REQUIRE(gdn::delta_rule::choose_splits(device, many).count == 1);
  const Inputs in = make_inputs(one, kInitial, 400);
  const GpuResults a = run_on_gpu(device, one, in), b = run_on_gpu(device, one, in, kTrainers, &many);
  CHECK(std::memcmp(a.o.data(), b.o.data(), a.o.size() * sizeof(act)) == 0);
  CHECK(std::memcmp(a.dqkv.data(), b.dqkv.data(), a.dqkv.size() * sizeof(act)) == 0);
}

// [B,T,heads,columns] of 16-bit values with gaps behind each head and each row.
struct Gapped {
  int heads, columns, head_stride, row_stride;
  Gapped(int heads, int columns, int head_gap, int row_gap)
      : heads(heads),
        columns(columns),
        head_stride(columns + head_gap),
        row_stride(heads * head_stride + row_gap) {}

  // from columns [first, first + heads columns) of rows of C
  std::vector<act> spread(const std::vector<act>& packed, int C, int first) const {
    const size_t rows = packed.size() / C;
    std::vector<act> out(rows * row_stride, __float2bfloat16_rn(std::numeric_limits<float>::quiet_NaN()));
    for (size_t m = 0; m < rows; m++)
      for (int h = 0; h < heads; h++)
        std::copy_n(&packed[m * C + first + h * columns], columns, &out[m * row_stride + h * head_stride]);
    return out;
  }
  std::vector<act> packed(const std::vector<act>& apart) const {
    std::vector<act> out;
    for (size_t at = 0; at + row_stride <= apart.size(); at += row_stride)
      for (int h = 0; h < heads; h++)
        out.insert(out.end(), &apart[at + h * head_stride], &apart[at + h * head_stride] + columns);
    return out;
  }
  template <class T>
  gdn::delta_rule::HeadRows<T> rows(T* at) const {
    return {at, row_stride, head_stride};
  }
};

// q, k, v, o and their gradients as tensors of their own, as from another library.
TEST_CASE("cuda delta rule: separate strided tensors give the bits of packed rows" * needs_gpu()) {
  using namespace gdn::delta_rule;
  Cuda device;
  device.sm_count = 132;
  for (const MixerShape& shape : {make_shape(2, 130, 2, 4, 64, 128), make_shape(1, 200, 2, 2, 256, 64),
                                  make_shape(1, 100, 1, 2, 48, 80), make_shape(1, 1000, 1, 2, 128, 64)}) {
    INFO(describe(shape));
    const Inputs in = make_inputs(shape, kInitial, 700);
    const GpuResults expected = run_on_gpu(device, shape, in);
    const int Hk = shape.heads_k, Hv = shape.heads_v, dk = shape.head_dim_k, dv = shape.head_dim_v;
    const int C = shape.conv_channels(), keys = shape.key_dim(), values = shape.value_dim();
    const Gapped q_at(Hk, dk, 0, 8), k_at(Hk, dk, 16, 0), v_at(Hv, dv, 8, 24), d_o_at(Hv, dv, 0, 40),
        o_at(Hv, dv, 24, 0), dq_at(Hk, dk, 8, 8), dk_at(Hk, dk, 0, 16), dv_at(Hv, dv, 40, 8);
    const auto qkv = to_act(in.qkv), d_o = to_act(in.d_o);
    const auto q = upload(device, q_at.spread(qkv, C, 0)), k = upload(device, k_at.spread(qkv, C, keys)),
               v = upload(device, v_at.spread(qkv, C, 2 * keys)),
               d_out = upload(device, d_o_at.spread(d_o, values, 0));
    const auto memory = [&](const Gapped& x) {
      return poisoned<act>(device, size_t(shape.rows()) * x.row_stride);
    };
    const auto o = memory(o_at), dq = memory(dq_at), d_k = memory(dk_at), d_v = memory(dv_at);
    const auto g = upload(device, to_float(in.g)), beta = upload(device, to_float(in.beta));
    const auto dg = poisoned<float>(device, in.g.size()), dbeta = poisoned<float>(device, in.g.size());
    const auto saved = poisoned<uint8_t>(device, gated_delta_rule_saved_bytes(device, shape));
    const auto scratch = poisoned<uint8_t>(device, gated_delta_rule_scratch_bytes(device, shape));
    const Saved forward = saved_at(saved.get(), shape);
    const Adjoints adjoints = adjoints_at(scratch.get(), shape);
    const DeltaRulePlan plan = make_plan(device, shape, in.s, prepared_at(saved.get(), nullptr, shape),
                                         splits_at(device, scratch.get(), shape));
    const Qkv<const act> tensors = {q_at.rows<const act>(q.get()), k_at.rows<const act>(k.get()),
                                    v_at.rows<const act>(v.get())};
    const HeadRows<const act> output_gradient = d_o_at.rows<const act>(d_out.get());
    prepare(device, plan, {tensors.q, tensors.k, g.get(), beta.get()});
    if (plan.splits.count > 1) {
      forward_states(device, plan, tensors, true);
      merge_splits(device, plan, false);
    }
    forward_pass(device, plan, o_at.rows(o.get()), forward, tensors, {});
    if (plan.splits.count > 1) {
      forward_states(device, plan, tensors, false);
      backward_states(device, plan, tensors, output_gradient);
      merge_splits(device, plan, true);
    }
    backward_pass(device, plan, dv_at.rows(d_v.get()), adjoints, tensors, output_gradient, {});
    gradients(device, plan, {dq_at.rows(dq.get()), dk_at.rows(d_k.get()), dg.get(), dbeta.get()},
              {tensors.q, tensors.k, output_gradient, forward, adjoints, plan.prepared.gates});
    device.synchronize();
    const auto same = [&](const Gapped& x, const Buffer<Cuda, act>& ours, const std::vector<act>& packed,
                          int C, int first) {
      const std::vector<act> a = x.packed(download(device, ours)), b = x.packed(x.spread(packed, C, first));
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(act)) == 0;
    };
    CHECK(same(o_at, o, expected.o, values, 0));
    CHECK(same(dq_at, dq, expected.dqkv, C, 0));
    CHECK(same(dk_at, d_k, expected.dqkv, C, keys));
    CHECK(same(dv_at, d_v, expected.dqkv, C, 2 * keys));
    CHECK(download(device, dg) == expected.dg);
    CHECK(download(device, dbeta) == expected.dbeta);
  }
}

TEST_CASE("cuda delta rule: which sequences are cut") {
  using gdn::delta_rule::choose_splits;
  CHECK(choose_splits(512, 24, 132).count == 5);
  CHECK(choose_splits(512, 24, 132).chunks == 103);
  CHECK(choose_splits(512, 45, 132).count == 8);  // two would gain nothing; eight take three waves
  CHECK(choose_splits(512, 64, 132).count == 8);
  CHECK(choose_splits(512, 64, 132).chunks == 64);
  CHECK(choose_splits(512, 67, 132).count == 1);  // eight would take five waves
  CHECK(choose_splits(512, 67, 264).count == 3);
  CHECK(choose_splits(127, 64, 132).count == 1);  // too short
  CHECK(choose_splits(16, 768, 132).count == 1);
  CHECK(choose_splits(11, 1, 132).count == 1);  // splits of less than four chunks
  CHECK(choose_splits(13, 1, 132).count == 3);
  CHECK(choose_splits(13, 1, 132).chunks == 5);
  for (int chunks = 1; chunks < 300; chunks++)
    for (int blocks : {1, 3, 7, 20, 45, 66}) {
      const auto x = choose_splits(chunks, blocks, 132);
      CHECK(x.count * x.chunks >= chunks);
      CHECK((x.count - 1) * x.chunks < chunks);  // none is empty
      CHECK((x.count == 1 || x.count >= 3));
      CHECK((x.count == 1 || x.count * blocks <= (blocks <= 44 ? 132 : 4 * 132)));
    }
}

// max_splits grows with the tokens: what holds for a batch's own holds in memory made for a larger one.
TEST_CASE("cuda delta rule: memory for the splits of every smaller batch") {
  using gdn::delta_rule::choose_splits, gdn::delta_rule::max_splits;
  for (int resident : {132, 264, 24})
    for (int heads : {1, 2, 6, 32})
      for (int slices : {1, 4, 8})
        for (int tokens = 1; tokens < 40000; tokens += tokens < 9000 ? 61 : 997)
          for (int batch = 1; batch < 9; batch++) {
            const auto x = choose_splits((tokens + 63) / 64, batch * heads * slices, resident);
            if (x.count > 1)
              CHECK(batch * heads * x.count <= max_splits(batch * tokens, heads, slices, resident));
          }
}

// Longer and wider than the CPU does in reasonable time. Both results are rounded to bf16.
TEST_CASE("cuda delta rule: against the readable one" * needs_gpu()) {
  Cuda device;
  const DeltaRule readable = {
      gdn::readable::gated_delta_rule_saved_bytes, gdn::readable::gated_delta_rule_scratch_bytes,
      gdn::readable::gated_delta_rule_forward, gdn::readable::gated_delta_rule_backward};
  int seed = 200;
  for (const MixerShape& shape : {make_shape(1, 16384, 1, 2, 64, 128), make_shape(2, 1000, 3, 3, 128, 256),
                                  make_shape(2, 1000, 5, 5, 192, 384), make_shape(1, 500, 2, 2, 256, 512)})
    for (Regime regime : {kInitial, kStrongDecay, kWeakDecayBetaToTwo}) {
      const Inputs in = make_inputs(shape, regime, seed++);
      const auto results = [&](const DeltaRule& rule) {
        const GpuResults gpu = run_on_gpu(device, shape, in, rule);
        return split_results(shape, to_double(gpu.o), to_double(gpu.dqkv), to_double(gpu.dg),
                             to_double(gpu.dbeta));
      };
      const Results fast = results(kTrainers), plain = results(readable);
      for (int i = 0; i < kOutputs; i++) {
        INFO(describe(shape), ", ", kRegimeNames[regime], ", ", kOutputNames[i]);
        CHECK(relative_error(fast.of[i], plain.of[i]) <= 2 * kBf16Error);
      }
    }
}

TEST_CASE("cuda delta rule: the same bits in two runs" * needs_gpu()) {
  Cuda device;
  for (const MixerShape& shape : {make_shape(2, 200, 1, 2, 64, 128), kManyChunks[0], kManyChunks[1],
                                  kManyChunks[2], make_shape(1, 1000, 1, 2, 64, 128)}) {
    const Inputs in = make_inputs(shape, kInitial, 1);
    const GpuResults a = run_on_gpu(device, shape, in), b = run_on_gpu(device, shape, in);
    CHECK(std::memcmp(a.o.data(), b.o.data(), a.o.size() * sizeof(act)) == 0);
    CHECK(std::memcmp(a.dqkv.data(), b.dqkv.data(), a.dqkv.size() * sizeof(act)) == 0);
    CHECK(std::memcmp(a.dg.data(), b.dg.data(), a.dg.size() * sizeof(float)) == 0);
    CHECK(std::memcmp(a.dbeta.data(), b.dbeta.data(), a.dbeta.size() * sizeof(float)) == 0);
  }
}

void check_recurrent(Cuda& device, const MixerShape& shape) {
  const Inputs in = make_inputs(shape, kBetaToTwo, 5);
  std::mt19937_64 random(6);
  std::normal_distribution<double> normal;
  Doubles state(size_t(shape.batch) * shape.heads_v * shape.head_dim_k * shape.head_dim_v), o(in.d_o.size());
  for (double& x : state) x = float(normal(random));

  const auto qkv = upload(device, to_act(in.qkv));
  const auto g = upload(device, to_float(in.g)), beta = upload(device, to_float(in.beta));
  const auto gpu_state = upload(device, to_float(state));
  const auto gpu_o = poisoned<act>(device, o.size());
  gated_delta_rule_recurrent(device, gpu_o.get(), gpu_state.get(), qkv.get(), g.get(), beta.get(), shape,
                             in.s);
  device.synchronize();

  Cpu<double> cpu;
  gated_delta_rule_recurrent(cpu, o.data(), state.data(), in.qkv.data(), in.g.data(), in.beta.data(), shape,
                             double(in.s));
  INFO(describe(shape));
  CHECK(relative_error(to_double(download(device, gpu_state)), state) < 1e-5);
  CHECK(relative_error(to_double(download(device, gpu_o)), o) < 1.2 * kBf16Error);
}

TEST_CASE("cuda delta rule: token by token" * needs_gpu()) {
  Cuda device;
  check_recurrent(device, make_shape(2, 7, 2, 2, 32, 64));
  check_recurrent(device, make_shape(2, 3, 1, 3, 48, 80));
  check_recurrent(device, make_shape(1, 5, 1, 1, 256, 512));
  check_recurrent(device, make_shape(3, 1, 1, 2, 128, 16));
}

TEST_CASE("cuda delta rule: other head sizes are refused" * needs_gpu()) {
  Cuda device;
  const auto message = [&](int dk, int dv) {
    try {
      gated_delta_rule_forward(device, nullptr, nullptr, nullptr, nullptr, nullptr,
                               make_shape(1, 1, 1, 1, dk, dv), 1.f, nullptr);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const std::string rule = "on the GPU head sizes must be multiples of 16, dk <= 256, dv <= 512; got ";
  CHECK(message(24, 64) == rule + "dk = 24, dv = 64");
  CHECK(message(64, 40) == rule + "dk = 64, dv = 40");
  CHECK(message(272, 64) == rule + "dk = 272, dv = 64");
  CHECK(message(64, 528) == rule + "dk = 64, dv = 528");
}

}  // namespace
