// Times the gated delta rule on the GPU: forward, backward, each of their kernels, and the recurrent form
// that generates, with CUDA events, the median of many runs after a warm-up. Random data, gates as a model at
// initialisation has them.
//
//   dev/bench_delta_rule [runs, 30] [B T Hk Hv dk dv: this shape alone] [decay, 1]
//
// `decay` multiplies the log decays: how long sequences are split depends on it (0: nothing is forgotten).
//
// The floor of a row is the larger of its bytes (each input read once, each output written once) at an H100's
// 3 TB/s and its products, at 600 TFLOP/s.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../gdn_kernels.cuh"
#include "../gdn/kernels/delta_rule/delta_rule.cuh"
#include "../gdn/tests/inputs.h"

namespace {

using namespace gdn;
using namespace gdn_tests;

constexpr double kBandwidth = 3.0e12, kRate = 600e12;

constexpr int kRandomRows = 2048;  // they repeat: a host makes random numbers slowly

// The first `size` of `block`, again and again.
std::vector<act> repeated(const std::vector<float>& block, size_t size) {
  std::vector<act> x(size);
  for (size_t i = 0; i < size; i++)
    x[i] = i < block.size() ? __float2bfloat16_rn(block[i]) : x[i - block.size()];
  return x;
}

// qkv with q and k of length 1 per head, as bf16.
std::vector<act> qkv_of(const MixerShape& shape) {
  std::mt19937 random(1);
  MixerShape block = shape;
  block.batch = 1, block.tokens = std::min(kRandomRows, shape.rows());
  return repeated(random_qkv<float>(block, random), size_t(shape.rows()) * shape.conv_channels());
}

std::vector<act> random_act(size_t rows, size_t columns) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(std::min<size_t>(kRandomRows, rows) * columns);
  for (float& value : x) value = normal(random);
  return repeated(x, rows * columns);
}

struct Gates {
  std::vector<float> g, beta;
};

Gates random_gates(const MixerShape& shape, float decay) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(0, 1);
  std::normal_distribution<float> normal;
  Gates gates;
  std::vector<float> A, dt;
  for (int h = 0; h < shape.heads_v; h++) {
    A.push_back(16 * uniform(random));
    dt.push_back(std::exp(uniform(random) * (std::log(0.1f) - std::log(0.001f)) + std::log(0.001f)));
  }
  for (int m = 0; m < shape.rows(); m++)
    for (int h = 0; h < shape.heads_v; h++) {
      gates.g.push_back(-decay * A[h] * dt[h] * std::exp(0.3f * normal(random)));
      gates.beta.push_back(1 / (1 + std::exp(-normal(random))));
    }
  return gates;
}

double median_ms(Cuda& device, int runs, const std::function<void()>& work) {
  cudaEvent_t start, stop;
  cuda_check(cudaEventCreate(&start));
  cuda_check(cudaEventCreate(&stop));
  for (int i = 0; i < 3; i++) work();
  std::vector<float> times(runs);
  for (float& ms : times) {
    cuda_check(cudaEventRecord(start, device.stream));
    work();
    cuda_check(cudaEventRecord(stop, device.stream));
    cuda_check(cudaEventSynchronize(stop));
    cuda_check(cudaEventElapsedTime(&ms, start, stop));
  }
  cuda_check(cudaEventDestroy(start));
  cuda_check(cudaEventDestroy(stop));
  std::sort(times.begin(), times.end());
  return times[runs / 2];
}

struct Cost {
  double bytes, flops;
};

void report(const char* name, double ms, const Cost& cost) {
  const double floor_ms = 1e3 * std::max(cost.bytes / kBandwidth, cost.flops / kRate);
  std::printf("  %-22s %8.3f ms  %7.1f TFLOP/s  %7.0f GB/s  floor %6.3f ms  %5.1f%%\n", name, ms,
              cost.flops / ms * 1e-9, cost.bytes / ms * 1e-6, floor_ms, 100 * floor_ms / ms);
}

void bench(Cuda& device, const MixerShape& shape, int runs, float decay = 1.f) {
  const auto qkv = upload(device, qkv_of(shape));
  const size_t values = size_t(shape.rows()) * shape.value_dim(),
               gate_count = size_t(shape.rows()) * shape.heads_v;
  const auto d_o = upload(device, random_act(size_t(shape.rows()), size_t(shape.value_dim())));
  const Gates gates = random_gates(shape, decay);
  const auto g = upload(device, gates.g), beta = upload(device, gates.beta);
  const Buffer<Cuda, act> o(device, values, "a benchmark"), dqkv(device, qkv.size(), "a benchmark");
  const Buffer<Cuda, float> dg(device, gate_count, "a benchmark"), dbeta(device, gate_count, "a benchmark");
  const Buffer<Cuda, char> saved(device, gated_delta_rule_saved_bytes(device, shape), "a benchmark");
  const Buffer<Cuda, char> scratch(device, gated_delta_rule_scratch_bytes(device, shape), "a benchmark");
  const float s = 1 / std::sqrt(float(shape.head_dim_k));

  // Bytes and products by kind, of all chunks and value heads.
  const double chunks = double(shape.batch) * shape.heads_v * shape.chunks();
  const double dk = shape.head_dim_k, dv = shape.head_dim_v, C = kChunk;
  const double square = 2 * C * C * dk, to_state = 2 * C * dk * dv, in_chunk = 2 * C * C * dv;
  const double keys = 2.0 * sizeof(act) * shape.rows() * shape.key_dim(),
               value = double(sizeof(act)) * values;
  const double states = chunks * dk * dv * sizeof(__half), matrices = chunks * 2 * C * C * sizeof(__half);
  const double input = keys + value;
  const Cost prepare = {keys + matrices, chunks * 2 * square};
  const Cost forward_pass = {input + matrices + value + states + value,
                             chunks * (3 * to_state + 2 * in_chunk)};
  const Cost backward_pass = {input + matrices + value + states + value,
                              chunks * (3 * to_state + 2 * in_chunk)};
  const Cost gradients = {2 * keys + 3 * value + 2 * states,
                          chunks * (3 * to_state + 2 * in_chunk + 6 * square)};
  const Cost forward = {input + value, prepare.flops + forward_pass.flops};
  const Cost backward = {2 * input + value, backward_pass.flops + gradients.flops};

  std::printf("B=%d T=%d Hk=%d Hv=%d dk=%d dv=%d   saved %zu MiB, scratch %zu MiB\n", shape.batch,
              shape.tokens, shape.heads_k, shape.heads_v, shape.head_dim_k, shape.head_dim_v,
              saved.bytes() >> 20, scratch.bytes() >> 20);
  const auto kept = delta_rule::saved_at(saved.get(), shape);
  const auto adjoints = delta_rule::adjoints_at(scratch.get(), shape);
  const auto prepared = delta_rule::prepared_at(saved.get(), nullptr, shape);
  const delta_rule::Splits splits = delta_rule::splits_at(device, scratch.get(), shape);
  const delta_rule::DeltaRulePlan plan = delta_rule::make_plan(device, shape, s, prepared, splits);
  const delta_rule::DeltaRulePlan whole =
      delta_rule::make_plan(device, shape, s, prepared, {1, shape.chunks(), nullptr, nullptr});
  const auto in = delta_rule::unpacked<const act>(qkv.get(), shape);
  const auto d_in = delta_rule::unpacked(dqkv.get(), shape);
  const auto out = delta_rule::dense_values(o.get(), shape);
  const auto d_out = delta_rule::dense_values<const act>(d_o.get(), shape);
  const auto time = [&](const char* name, const Cost& cost, const std::function<void()>& work) {
    report(name, median_ms(device, runs, work), cost);
  };
  const auto forward_that_saves = [&] {
    gated_delta_rule_forward(device, o.get(), saved.get(), qkv.get(), g.get(), beta.get(), shape, s,
                             scratch.get());
  };
  const auto backward_of_saved = [&] {
    gated_delta_rule_backward(device, dqkv.get(), dg.get(), dbeta.get(), d_o.get(), saved.get(), qkv.get(),
                              g.get(), beta.get(), shape, s, scratch.get());
  };
  time("forward", forward, forward_that_saves);
  time("  nothing saved", forward, [&] {
    gated_delta_rule_forward(device, o.get(), nullptr, qkv.get(), g.get(), beta.get(), shape, s,
                             scratch.get());
  });
  time("backward", backward, backward_of_saved);
  time("  nothing saved", {backward.bytes, forward.flops + backward.flops}, [&] {  // the forward once more
    forward_that_saves();
    backward_of_saved();
  });
  time("prepare_kernel", prepare, [&] {
    delta_rule::prepare(device, plan, {in.q, in.k, g.get(), beta.get()});
  });
  time("forward_pass_kernel", forward_pass, [&] { delta_rule::forward_pass(device, plan, out, kept, in); });
  time("  nothing saved", {forward_pass.bytes - states - value, forward_pass.flops},
       [&] { delta_rule::forward_pass(device, plan, out, {}, in); });
  time("backward_pass_kernel", backward_pass,
       [&] { delta_rule::backward_pass(device, plan, d_in.v, adjoints, in, d_out); });
  if (splits.count > 1) {
    std::printf("  %d splits of %d chunks\n", splits.count, splits.chunks);
    const Cost states_forward = {keys / 2 + value + matrices / 2,  // k, v and N
                                 chunks * (2 * to_state + in_chunk) * (dv + dk) / dv};
    const Cost states_backward = {input + matrices, chunks * (3 * to_state + 2 * in_chunk)};
    time("forward_states", states_forward, [&] { delta_rule::forward_states(device, plan, in, true); });
    time("backward_states", states_backward, [&] { delta_rule::backward_states(device, plan, in, d_out); });
    time("merge_splits_kernel", {0, 2.0 * shape.batch * shape.heads_v * (splits.count - 2) * dk * dk * dv},
         [&] { delta_rule::merge_splits(device, plan, false); });
    time("forward pass, not cut", forward_pass,
         [&] { delta_rule::forward_pass(device, whole, out, kept, in); });
    time("backward pass, not cut", backward_pass,
         [&] { delta_rule::backward_pass(device, whole, d_in.v, adjoints, in, d_out); });
  }
  time("gradients_kernel", gradients, [&] {
    delta_rule::gradients(device, plan, {d_in.q, d_in.k, dg.get(), dbeta.get()},
                          {in.q, in.k, d_out, kept, adjoints, prepared.gates});
  });

  // Generation: one token of every sequence, the state in fp32 read and written.
  MixerShape token = shape;
  token.tokens = 1;
  const std::vector<float> zeros(size_t(shape.batch) * shape.heads_v * shape.head_dim_k * shape.head_dim_v);
  const auto state = upload(device, zeros);
  const double entries = double(zeros.size());
  time("recurrent, one token", {8 * entries + (input + value) / shape.tokens, 6 * entries}, [&] {
    gated_delta_rule_recurrent(device, o.get(), state.get(), qkv.get(), g.get(), beta.get(), token, s);
  });
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 30;
  if (runs < 1 || (argc != 1 && argc != 2 && argc != 8 && argc != 9)) {
    std::fprintf(stderr, "expected: dev/bench_delta_rule [runs, 1 or more] [B T Hk Hv dk dv] [decay]\n");
    return 1;
  }
  try {
    Cuda device;
    std::printf("%s, median of %d runs\n", device.name.c_str(), runs);
    if (argc > 2) {
      int x[6];
      for (int i = 0; i < 6; i++) x[i] = std::atoi(argv[2 + i]);
      const float decay = argc > 8 ? float(std::atof(argv[8])) : 1.f;
      bench(device, make_shape(x[0], x[1], x[2], x[3], x[4], x[5]), runs, decay);
      return 0;
    }
    bench(device, make_shape(32, 1024, 6, 6, 32, 64), runs);
    bench(device, make_shape(32, 1024, 6, 6, 64, 128), runs);
    bench(device, make_shape(32, 1024, 6, 6, 128, 256), runs);
    bench(device, make_shape(8, 4096, 16, 32, 128, 128), runs);
    bench(device, make_shape(32, 1024, 6, 6, 192, 384), runs);
    bench(device, make_shape(8, 1024, 6, 6, 256, 512), runs);
    bench(device, make_shape(1, 32768, 6, 6, 32, 64), runs);  // few heads, one long sequence
    bench(device, make_shape(1, 32768, 6, 6, 128, 256), runs);
    bench(device, make_shape(1, 32768, 8, 16, 128, 128), runs);
    bench(device, make_shape(1, 32768, 16, 32, 128, 128), runs);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
