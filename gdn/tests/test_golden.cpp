// The gated delta rule, one mixer and a small model against numbers of other implementations: the files of
// gdn/tests/golden, which dev/torch/golden.py wrote from the code of Hugging Face transformers (Qwen3-Next,
// OLMo-hybrid) run in float64. Inputs are bf16 numbers, outputs float64 rounded to float.
//
// Yardsticks. CPU in double: the rounding of the stored numbers. CPU in float: kFloatError. GPU: what the
// same layers in float cost whose activations are rounded to bf16 (rounded.h), times 2, or
// times 4 for tensors of fewer than 256 numbers, whose error is a few roundings and not their mean.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../cpu_layers.h"
#include "../model.h"
#include "../model_checkpoint.h"
#include "needs_gpu.h"
#include "relative_error.h"
#include "rounded.h"

namespace {

using namespace gdn;
using namespace gdn_tests;

using Doubles = std::vector<double>;
using Outputs = std::map<std::string, Doubles>;

constexpr double kStoredError = 6e-8;  // of float's 24 bits
constexpr double kFloatError = 2e-5;   // a few hundred roundings on the way to a gradient

struct GoldenFile {
  explicit GoldenFile(const std::string& name) : file("gdn/tests/golden/" + name + ".safetensors") {}
  Doubles operator[](const std::string& name) const {
    return stored_values<double>(file.at(name), file.path());
  }
  int size(const std::string& name, int axis) const { return int(file.at(name).shape.at(axis)); }
  SafetensorsFile file;
};

template <class Device, class T>
Buffer<Device, T> to_device(Device& dev, const Doubles& x) {
  std::vector<T> values;
  for (const double value : x) values.push_back(T(typename Device::real(value)));
  Buffer<Device, T> buffer(dev, values.size(), "a test");
  dev.upload(buffer.get(), values.data(), buffer.bytes());
  dev.synchronize();
  return buffer;
}

template <class Device, class T>
Doubles to_host(Device& dev, const T* data, size_t count) {
  std::vector<T> values(count);
  dev.download(values.data(), data, count * sizeof(T));
  Doubles x;
  for (const T& value : values) x.push_back(double(typename Device::real(value)));
  return x;
}

// Copies [rows, width] to columns [first, first + width) of rows of `stride`, or back.
void put_columns(Doubles& to, int stride, int first, const Doubles& from, int width) {
  for (size_t row = 0; row < from.size() / width; row++)
    std::copy_n(&from[row * width], width, &to[row * stride + first]);
}
Doubles get_columns(const Doubles& from, int stride, int first, int width) {
  Doubles to;
  for (size_t row = 0; row < from.size() / stride; row++)
    to.insert(to.end(), &from[row * stride + first], &from[row * stride + first] + width);
  return to;
}

void append(Doubles& to, const Doubles& from) { to.insert(to.end(), from.begin(), from.end()); }

// ---- the gated delta rule

const char* const kRegimeFiles[] = {"delta_rule_strong_decay", "delta_rule_beta_near_1",
                                    "delta_rule_beta_to_2"};

template <class Device>
Outputs run_delta_rule(Device& dev, const GoldenFile& golden) {
  using act = typename Device::act;
  using real = typename Device::real;
  MixerShape shape;
  shape.batch = golden.size("q", 0), shape.tokens = golden.size("q", 1);
  shape.heads_k = golden.size("q", 2), shape.head_dim_k = golden.size("q", 3);
  shape.heads_v = golden.size("v", 2), shape.head_dim_v = golden.size("v", 3);
  const int C = shape.conv_channels(), keys = shape.key_dim(), values = shape.value_dim(), M = shape.rows();
  Doubles packed(size_t(M) * C);
  put_columns(packed, C, 0, golden["q"], keys);
  put_columns(packed, C, keys, golden["k"], keys);
  put_columns(packed, C, 2 * keys, golden["v"], values);
  const auto qkv = to_device<Device, act>(dev, packed), d_o = to_device<Device, act>(dev, golden["d_o"]);
  const auto g = to_device<Device, real>(dev, golden["g"]),
             beta = to_device<Device, real>(dev, golden["beta"]);
  const Buffer<Device, act> o(dev, size_t(M) * values, "a test"), dqkv(dev, packed.size(), "a test");
  const Buffer<Device, real> dg(dev, g.size(), "a test"), dbeta(dev, g.size(), "a test");
  const Buffer<Device, unsigned char> saved(dev, gated_delta_rule_saved_bytes(dev, shape), "a test");
  const Buffer<Device, unsigned char> scratch(dev, gated_delta_rule_scratch_bytes(dev, shape), "a test");
  const real s = real(0.25);
  gated_delta_rule_forward(dev, o.get(), saved.get(), qkv.get(), g.get(), beta.get(), shape, s,
                           scratch.get());
  gated_delta_rule_backward(dev, dqkv.get(), dg.get(), dbeta.get(), d_o.get(), saved.get(), qkv.get(),
                            g.get(), beta.get(), shape, s, scratch.get());
  dev.synchronize();
  const Doubles gradient = to_host(dev, dqkv.get(), dqkv.size());
  return {{"o", to_host(dev, o.get(), o.size())},       {"dq", get_columns(gradient, C, 0, keys)},
          {"dk", get_columns(gradient, C, keys, keys)}, {"dv", get_columns(gradient, C, 2 * keys, values)},
          {"dg", to_host(dev, dg.get(), dg.size())},    {"dbeta", to_host(dev, dbeta.get(), dbeta.size())}};
}

void check_within(const Outputs& outputs, const GoldenFile& golden, double bound) {
  CAPTURE(golden.file.path());
  for (const auto& output : outputs) {
    CAPTURE(output.first);
    CHECK(relative_error(output.second, golden[output.first]) <= bound);
  }
}

TEST_CASE("golden: gated delta rule on the CPU") {
  for (const char* name : kRegimeFiles) {
    const GoldenFile golden(name);
    Cpu<double> exact;
    check_within(run_delta_rule(exact, golden), golden, kStoredError);
    Cpu<float> dev;
    check_within(run_delta_rule(dev, golden), golden, kFloatError);
  }
}

// ---- a mixer and a model, of the sizes in dev/torch/golden.py

ModelConfig golden_config() {
  ModelConfig c;
  c.width = 32, c.base_width = 16, c.layers = 2;
  c.heads_k = 2, c.heads_v = 4, c.head_dim_k = 16, c.head_dim_v = 16;
  c.mlp_size = 48, c.vocab = 60, c.padded_vocab = 64, c.tied = false;
  return c;
}

// y of the first layer's mixer for h, and the gradients of h and of its tensors for dy.
template <class Device>
Outputs run_mixer(Device& dev, const GoldenFile& golden) {
  using act = typename Device::act;
  using real = typename Device::real;
  const std::string at = "model.layers.0.attn.";
  const ModelConfig c = golden_config();
  const MixerShape shape = c.mixer_shape(golden.size("h", 0), golden.size("h", 1));
  const int M = shape.rows(), d = c.width, P = shape.columns(), C = shape.conv_channels(), H = shape.heads_v;
  const int values = shape.value_dim();
  Doubles in_proj, taps;
  for (const char* name : {"q", "k", "v", "g", "a", "b"}) append(in_proj, golden[at + name + "_proj.weight"]);
  in_proj.resize(size_t(P) * d);
  for (const char* name : {"q", "k", "v"}) append(taps, golden[at + name + "_conv1d.weight"]);

  const auto acts = [&](size_t n) { return Buffer<Device, act>(dev, n, "a test"); };
  const auto reals = [&](size_t n) {
    Buffer<Device, real> buffer(dev, n, "a test");
    buffer.zero();
    return buffer;
  };
  const auto h = to_device<Device, act>(dev, golden["h"]), dy = to_device<Device, act>(dev, golden["dy"]);
  const auto w_in = to_device<Device, act>(dev, in_proj);
  const auto w_out = to_device<Device, act>(dev, golden[at + "o_proj.weight"]);
  const auto w_taps = to_device<Device, real>(dev, taps);
  const auto A_log = to_device<Device, real>(dev, golden[at + "A_log"]);
  const auto dt_bias = to_device<Device, real>(dev, golden[at + "dt_bias"]);
  const auto gain = to_device<Device, real>(dev, golden[at + "o_norm.weight"]);
  const auto proj = acts(size_t(M) * P), qkv = acts(size_t(M) * C), o = acts(size_t(M) * values);
  const auto normed = acts(size_t(M) * values), y = acts(size_t(M) * d);
  const auto rnorm = reals(size_t(M) * 2 * shape.heads_k), g = reals(size_t(M) * H),
             beta = reals(size_t(M) * H);
  const auto rstd = reals(size_t(M) * H);
  const Buffer<Device, unsigned char> saved(dev, gated_delta_rule_saved_bytes(dev, shape), "a test");
  size_t bytes = gated_delta_rule_scratch_bytes(dev, shape);
  for (const size_t need :
       {short_conv_gates_backward_scratch_bytes(dev, shape), output_norm_backward_scratch_bytes(dev, shape)})
    bytes = std::max(bytes, need);
  const Buffer<Device, unsigned char> scratch(dev, bytes, "a test");
  const real s = real(readout_scale(c.mup())), beta_max = real(c.beta_max());
  act* const no_history = nullptr;

  linear_forward(dev, proj.get(), h.get(), w_in.get(), M, P, d);
  short_conv_gates_forward(dev, qkv.get(), rnorm.get(), g.get(), beta.get(), proj.get(), w_taps.get(),
                           A_log.get(), dt_bias.get(), no_history, shape, beta_max);
  gated_delta_rule_forward(dev, o.get(), saved.get(), qkv.get(), g.get(), beta.get(), shape, s,
                           scratch.get());
  output_norm_forward(dev, normed.get(), rstd.get(), o.get(), proj.get(), gain.get(), shape);
  linear_forward(dev, y.get(), normed.get(), w_out.get(), M, d, values);

  const auto dproj = acts(proj.size()), dqkv = acts(qkv.size()), d_o = acts(o.size()),
             dnormed = acts(o.size()), normed_again = acts(o.size());
  const auto dh = acts(h.size());
  const auto dg = reals(g.size()), dbeta = reals(g.size()), dw_in = reals(w_in.size()),
             dw_out = reals(w_out.size());
  const auto dtaps = reals(w_taps.size()), dA_log = reals(H), ddt_bias = reals(H), dgain = reals(gain.size());
  linear_backward_input(dev, dnormed.get(), dy.get(), w_out.get(), M, d, values);
  output_norm_backward(dev, d_o.get(), dproj.get(), dgain.get(), normed_again.get(), dnormed.get(), o.get(),
                       rstd.get(), proj.get(), gain.get(), shape, scratch.get());
  linear_backward_weight(dev, dw_out.get(), dy.get(), normed_again.get(), M, d, values);
  gated_delta_rule_backward(dev, dqkv.get(), dg.get(), dbeta.get(), d_o.get(), saved.get(), qkv.get(),
                            g.get(), beta.get(), shape, s, scratch.get());
  short_conv_gates_backward(dev, dproj.get(), dtaps.get(), dA_log.get(), ddt_bias.get(), dqkv.get(), dg.get(),
                            dbeta.get(), rnorm.get(), g.get(), beta.get(), proj.get(), w_taps.get(),
                            A_log.get(), dt_bias.get(), shape, beta_max, scratch.get());
  linear_backward_weight(dev, dw_in.get(), dproj.get(), h.get(), M, P, d);
  linear_backward_input(dev, dh.get(), dproj.get(), w_in.get(), M, P, d);
  dev.synchronize();

  Outputs out{{"y", to_host(dev, y.get(), y.size())},
              {"grad.h", to_host(dev, dh.get(), dh.size())},
              {"grad." + at + "o_proj.weight", to_host(dev, dw_out.get(), dw_out.size())},
              {"grad." + at + "A_log", to_host(dev, dA_log.get(), H)},
              {"grad." + at + "dt_bias", to_host(dev, ddt_bias.get(), H)},
              {"grad." + at + "o_norm.weight", to_host(dev, dgain.get(), dgain.size())}};
  size_t rows = 0, channels = 0;
  for (const char* name : {"q", "k", "v", "g", "a", "b"}) {
    const int n = golden.size(at + name + "_proj.weight", 0);
    out["grad." + at + name + "_proj.weight"] = to_host(dev, dw_in.get() + rows * d, size_t(n) * d);
    rows += n;
  }
  for (const char* name : {"q", "k", "v"}) {
    const int n = golden.size(at + name + "_conv1d.weight", 0);
    out["grad." + at + name + "_conv1d.weight"] =
        to_host(dev, dtaps.get() + channels * kConvTaps, size_t(n) * kConvTaps);
    channels += n;
  }
  return out;
}

// The loss and the gradient of every tensor.
template <class Device>
Outputs run_model(Device& dev, const GoldenFile& golden) {
  using real = typename Device::real;
  const int batch = golden.size("inputs", 0), tokens = golden.size("inputs", 1);
  std::vector<int32_t> inputs(size_t(batch) * tokens), targets(inputs.size());
  golden.file.at("inputs").read(inputs.data(), 0, inputs.size() * sizeof(int32_t));
  golden.file.at("targets").read(targets.data(), 0, targets.size() * sizeof(int32_t));
  Parameters<Device> p(dev, golden_config());
  p.allocate_gradients();
  for (const Tensor& t : p.table.tensors) {
    const Doubles values = golden[t.name];
    REQUIRE(values.size() == t.size);
    const std::vector<real> master(values.begin(), values.end());
    dev.upload(p.master(t.offset), master.data(), t.size * sizeof(real));
  }
  p.round();
  Model<Device> model(p, batch, tokens, Use::training);
  model.forward_backward(inputs.data(), targets.data(), batch, tokens, float(1.0 / double(inputs.size())));
  Outputs out{{"loss", {model.loss_sum() / double(inputs.size())}}};
  for (const Tensor& t : p.table.tensors) out["grad." + t.name] = to_host(dev, p.gradients(t.offset), t.size);
  return out;
}

TEST_CASE("golden: a mixer and a model on the CPU") {
  const GoldenFile mixer("mixer"), model("model");
  Cpu<double> exact;
  check_within(run_mixer(exact, mixer), mixer, kStoredError);
  // the weight 1 / tokens of a loss is a float
  check_within(run_model(exact, model), model, 2 * kStoredError);
  Cpu<float> dev;
  check_within(run_mixer(dev, mixer), mixer, kFloatError);
  check_within(run_model(dev, model), model, kFloatError);
}

#ifdef GDN_CUDA

void check_on_gpu(const Outputs& gpu, const Outputs& rounded, const GoldenFile& golden) {
  CAPTURE(golden.file.path());
  for (const auto& output : gpu) {
    CAPTURE(output.first);
    const Doubles& values = output.second;
    const Doubles expected = golden[output.first];
    const double yardstick = relative_error(rounded.at(output.first), expected);
    CAPTURE(yardstick);
    CHECK(relative_error(values, expected) <= (values.size() < 256 ? 4 : 2) * yardstick);
  }
}

TEST_CASE("golden: gated delta rule on the GPU" * needs_gpu()) {
  Cuda dev;
  for (const char* name : kRegimeFiles) {
    const GoldenFile golden(name);
    Cpu<float> cpu;
    Outputs rounded = run_delta_rule(cpu, golden);
    for (auto& [output, values] : rounded)
      for (double& x : values) x = double(__bfloat162float(__float2bfloat16_rn(float(x))));
    check_on_gpu(run_delta_rule(dev, golden), rounded, golden);
  }
}

TEST_CASE("golden: a mixer and a model on the GPU" * needs_gpu()) {
  Cuda dev;
  const GoldenFile mixer("mixer"), model("model");
  Rounded rounded;
  check_on_gpu(run_mixer(dev, mixer), run_mixer(rounded, mixer), mixer);
  const Outputs gpu = run_model(dev, model), yardstick = run_model(rounded, model);
  CHECK(std::fabs(gpu.at("loss")[0] - model["loss"][0]) <= 1e-3 * model["loss"][0]);
  Outputs gradients = gpu;
  gradients.erase("loss");
  check_on_gpu(gradients, yardstick, model);
}

#endif

}  // namespace
