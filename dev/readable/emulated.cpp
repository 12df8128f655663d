// The readable kernels of the gated delta rule in the emulator (dev/emulate/run.py), against the CPU's layer
// in double: o and all gradients, over short last chunks, grouped value heads, head sizes, decay and write
// strength.
#include <cstdio>
#include <limits>
#include <random>

#include "delta_rule.cuh"
#include "gdn/cpu_layers.h"
#include "gdn/tests/inputs.h"
#include "gdn/tests/relative_error.h"

namespace gdn {
namespace readable {
float memory[1 << 16];  // what the kernels name by extern
}
}  // namespace gdn

namespace {

using namespace gdn;
using Doubles = std::vector<double>;

constexpr float kUnset = std::numeric_limits<float>::quiet_NaN();
double as_bf16(double x) { return __bfloat162float(__float2bfloat16_rn(float(x))); }

std::vector<act> to_act(const Doubles& x) {
  std::vector<act> y;
  for (double v : x) y.push_back(__float2bfloat16_rn(float(v)));
  return y;
}

int failures = 0;
void compare(const char* name, double error, double bound) {
  std::printf(" %s %.1e", name, error);
  if (error <= bound) return;
  failures++;
  std::printf(" (FAILED: expected at most %.1e)", bound);
}

// g in [-decay, 0], beta in [0, beta_max].
void check(const MixerShape& shape, double decay, double beta_max) {
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<float> uniform;
  Doubles qkv = gdn_tests::random_qkv<double>(shape, random), d_o(size_t(shape.rows()) * shape.value_dim());
  for (double& x : qkv) x = as_bf16(x);
  for (double& x : d_o) x = as_bf16(normal(random));
  std::vector<float> g, beta;
  for (int i = 0; i < shape.rows() * shape.heads_v; i++) {
    g.push_back(-float(decay) * uniform(random));
    beta.push_back(float(beta_max) * uniform(random));
  }
  const float s = 1 / std::sqrt(float(shape.head_dim_k));

  Cpu<double> cpu;
  const Doubles g_double(g.begin(), g.end()), beta_double(beta.begin(), beta.end());
  Doubles o(d_o.size()), dqkv(qkv.size()), dg(g.size()), dbeta(g.size());
  Doubles kept(gated_delta_rule_saved_bytes(cpu, shape) / sizeof(double));
  gated_delta_rule_forward(cpu, o.data(), kept.data(), qkv.data(), g_double.data(), beta_double.data(), shape,
                           double(s), nullptr);
  gated_delta_rule_backward(cpu, dqkv.data(), dg.data(), dbeta.data(), d_o.data(), kept.data(), qkv.data(),
                            g_double.data(), beta_double.data(), shape, double(s), nullptr);
  for (Doubles* rounded : {&o, &dqkv})
    for (double& x : *rounded) x = as_bf16(x);

  readable::Arrays count_saved = {nullptr}, count_scratch = {nullptr};
  readable::take_saved(count_saved, shape), readable::take_scratch(count_scratch, shape);
  std::vector<float> saved(count_saved.floats, kUnset), scratch(count_scratch.floats, kUnset);
  readable::Arrays saved_arrays = {saved.data()}, scratch_arrays = {scratch.data()};
  const readable::Saved kept_by_forward = readable::take_saved(saved_arrays, shape);
  const readable::Scratch work = readable::take_scratch(scratch_arrays, shape);

  const auto launch = [](emulator::Dim grid, int floats, auto kernel, auto... arguments) {
    if (floats > int(std::size(readable::memory))) std::abort();
    std::fill(std::begin(readable::memory), std::end(readable::memory), kUnset);
    emulator::launch(grid, readable::kThreads, [&] { kernel(arguments...); });
  };
  const std::vector<act> qkv_act = to_act(qkv), d_o_act = to_act(d_o);
  std::vector<act> our_o(o.size(), __float2bfloat16_rn(kUnset)),
      our_dqkv(dqkv.size(), __float2bfloat16_rn(kUnset));
  std::vector<float> our_dg(dg.size(), kUnset), our_dbeta(dbeta.size(), kUnset);
  readable::launch_forward(launch, our_o.data(), kept_by_forward, qkv_act.data(), g.data(), beta.data(),
                           shape, s);
  readable::launch_backward(launch, our_dqkv.data(), our_dg.data(), our_dbeta.data(), d_o_act.data(), work,
                            kept_by_forward, qkv_act.data(), beta.data(), shape, s);

  const auto numbers = [](const std::vector<act>& x) {
    Doubles y;
    for (act v : x) y.push_back(__bfloat162float(v));
    return y;
  };
  // One rounding to bf16 of 5,000 that falls to the other side costs 6e-5. In float, differences of G, whose
  // largest is `decays`, are wrong by its rounding.
  double decays = 0;
  for (int m = 0; m < std::min(shape.tokens, kChunk); m++) decays -= g[size_t(m) * shape.heads_v];
  const double rounded_bound = 2e-4, float_bound = (20 + decays) * std::ldexp(1, -24);
  std::printf("readable B=%d T=%d Hk=%d Hv=%d dk=%d dv=%d, decay %g, beta to %g:", shape.batch, shape.tokens,
              shape.heads_k, shape.heads_v, shape.head_dim_k, shape.head_dim_v, decay, beta_max);
  compare("o", relative_error(numbers(our_o), o), rounded_bound);
  compare("dqkv", relative_error(numbers(our_dqkv), dqkv), rounded_bound);
  compare("dg", relative_error(our_dg, dg), float_bound);
  compare("dbeta", relative_error(our_dbeta, dbeta), float_bound);
  std::printf("\n");
}

}  // namespace

int main() {
  using gdn_tests::make_shape;
  for (const bool late : {false, true}) {  // which warp goes on first (cuda_emulator.h)
    emulator::late = late;
    check(make_shape(1, 130, 1, 1, 32, 64), 0.02, 1);
    check(make_shape(2, 70, 1, 2, 16, 48), 2, 2);
    check(make_shape(1, 64, 2, 2, 64, 16), 50, 1);
    check(make_shape(1, 5, 1, 3, 256, 32), 0.01, 2);
  }
  std::printf("%s\n", failures == 0 ? "all as expected" : "FAILED");
  return failures != 0;
}
