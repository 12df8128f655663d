// Times every GPU layer but the delta rule at one model size. What a layer moves is compared with the rate of
// a device-to-device copy measured first; matrix products are given in TFLOP/s.
//
//   nvcc -I. -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 dev/bench_layers.cu -o bench -lcublasLt
//   ./bench [-d WIDTH] [-m ROWS] [-v VOCABULARY]
//
// Medians of CUDA-event times of eight calls over random data; arrays smaller than the L2 cache rotate among
// copies. MB counts each input read once and each output written once.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gdn_kernels.cuh"

namespace {

using gdn::act;
using gdn::Buffer;
using gdn::Cuda;
using gdn::MixerShape;

struct Options {
  int width = 1024, rows = 32768, vocab = 50257;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    int* value = name == "-d" ? &o.width : name == "-m" ? &o.rows : name == "-v" ? &o.vocab : nullptr;
    if (!value || i + 1 == argc)
      throw std::runtime_error(name + ": expected -d WIDTH, -m ROWS or -v VOCABULARY");
    *value = std::atoi(argv[i + 1]);
  }
  if (o.width < 128 || o.width % 128 != 0)
    throw std::runtime_error("-d " + std::to_string(o.width) + ": expected a multiple of 128");
  if (o.rows < 1024 || o.rows % 1024 != 0)
    throw std::runtime_error("-m " + std::to_string(o.rows) +
                             ": expected a multiple of 1024 (sequences of 1024)");
  if (o.vocab < 2) throw std::runtime_error("-v " + std::to_string(o.vocab) + ": expected at least 2");
  return o;
}

__device__ float random_number(uint64_t i, uint32_t seed) {
  uint64_t z = i * 0x9e3779b97f4a7c15ull + seed;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return float(uint32_t(z >> 32)) * (2.0f / 4294967296.0f) - 1.0f;
}

__device__ void assign(float* p, float x) { *p = x; }
__device__ void assign(act* p, float x) { *p = __float2bfloat16(x); }

// x [n]: low + (high - low) * u, u uniform in [0,1)
template <class T>
__global__ void fill_kernel(T* x, size_t n, uint32_t seed, float low, float high) {
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    assign(x + i, low + (high - low) * 0.5f * (1 + random_number(i, seed)));
}

// Several copies of one array of random numbers, together larger than any L2 cache, to be used in turn.
template <class T>
class Rotating {
 public:
  Rotating(Cuda& dev, size_t n, float low = -1, float high = 1)
      : n_((n + 127) / 128 * 128),
        copies_(std::max<size_t>(1, kBytes / (n_ * sizeof(T)))),
        data_(dev, n_ * copies_, "a benchmark") {
    static uint32_t seed = 1;
    fill_kernel<<<1024, 256, 0, dev.stream>>>(data_.get(), data_.size(), seed++, low, high);
    gdn::launched("fill");
  }
  T* operator[](int run) const { return data_.get() + size_t(run) % copies_ * n_; }

 private:
  static constexpr size_t kBytes = size_t(128) << 20;
  size_t n_, copies_;
  Buffer<Cuda, T> data_;
};

using Acts = Rotating<act>;
using Floats = Rotating<float>;

// Median milliseconds of run(i), i counting up. kCalls calls one after the other are timed together, as they
// follow one another in a training step: the few microseconds between an event and a kernel next to it are
// not a layer's.
double median_ms(Cuda& dev, const std::function<void(int)>& run) {
  constexpr int kWarmUp = 2, kRuns = 21, kCalls = 8;
  cudaEvent_t begin, end;
  cuda_check(cudaEventCreate(&begin));
  cuda_check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kWarmUp + kRuns; i++) {
    cuda_check(cudaEventRecord(begin, dev.stream));
    for (int call = 0; call < kCalls; call++) run(i * kCalls + call);
    cuda_check(cudaEventRecord(end, dev.stream));
    cuda_check(cudaEventSynchronize(end));
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmUp) times.push_back(ms / kCalls);
  }
  cuda_check(cudaEventDestroy(begin));
  cuda_check(cudaEventDestroy(end));
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

class Table {
 public:
  explicit Table(Cuda& dev) : dev_(dev) {
    constexpr size_t kCopied = size_t(1) << 30;
    Buffer<Cuda, unsigned char> from(dev, kCopied, "a benchmark"), to(dev, kCopied, "a benchmark");
    fill_kernel<<<1024, 256, 0, dev.stream>>>(reinterpret_cast<float*>(from.get()), kCopied / 4, 7, -1, 1);
    gdn::launched("fill");
    const double ms = median_ms(dev, [&](int) {
      cuda_check(cudaMemcpyAsync(to.get(), from.get(), kCopied, cudaMemcpyDeviceToDevice, dev.stream));
    });
    copy_rate_ = 2 * kCopied / ms;
    std::printf("device copy: %.0f GB/s (read + write)\n\n", copy_rate_ / 1e6);
    std::printf("%-36s %9s %9s %8s %6s\n", "layer", "ms", "MB", "GB/s", "copy%");
  }
  void memory(const char* name, double bytes, const std::function<void(int)>& run) {
    const double ms = median_ms(dev_, run), rate = bytes / ms;
    std::printf("%-36s %9.4f %9.1f %8.0f %5.1f%%\n", name, ms, bytes / 1e6, rate / 1e6,
                100 * rate / copy_rate_);
    std::fflush(stdout);
  }
  void product(const char* name, double flops, const std::function<void(int)>& run) {
    const double ms = median_ms(dev_, run);
    std::printf("%-36s %9.4f %32.0f TFLOP/s\n", name, ms, flops / ms / 1e9);
    std::fflush(stdout);
  }

 private:
  Cuda& dev_;
  double copy_rate_ = 0;  // bytes a millisecond
};

std::vector<int32_t> random_tokens(int rows, int vocab) {
  std::mt19937 engine(1);
  std::vector<int32_t> tokens(rows);  // frequencies fall with the rank, as in text
  for (int32_t& t : tokens)
    t = std::min(vocab - 1, int(std::pow(double(vocab), std::uniform_real_distribution<>(0, 1)(engine))) - 1);
  return tokens;
}

struct Tokens {
  std::vector<int32_t> host, host_order;
  Buffer<Cuda, int32_t> tokens, order;
  Tokens(Cuda& dev, int rows, int vocab)
      : host(random_tokens(rows, vocab)),
        host_order(rows),
        tokens(dev, rows, "a benchmark"),
        order(dev, rows, "a benchmark") {
    std::iota(host_order.begin(), host_order.end(), 0);
    std::stable_sort(host_order.begin(), host_order.end(), [&](int a, int b) { return host[a] < host[b]; });
    dev.upload(tokens.get(), host.data(), rows * sizeof(int32_t));
    dev.upload(order.get(), host_order.data(), rows * sizeof(int32_t));
  }
  double distinct() const {
    std::vector<int32_t> sorted = host;
    std::sort(sorted.begin(), sorted.end());
    return double(std::unique(sorted.begin(), sorted.end()) - sorted.begin());
  }
};

using Bytes = Buffer<Cuda, unsigned char>;

void bench_embedding(Cuda& dev, Table& table, const Options& o) {
  const double M = o.rows, d = o.width;
  const Tokens t(dev, o.rows, o.vocab);
  const Acts w(dev, size_t(o.vocab) * o.width), x(dev, size_t(o.rows) * o.width);
  const Floats dw(dev, size_t(o.vocab) * o.width);
  const Bytes scratch(dev, gdn::embedding_backward_scratch_bytes(dev, o.rows, o.width), "a benchmark");
  table.memory("embedding_forward", t.distinct() * d * 2 + M * d * 2,
               [&](int i) { gdn::embedding_forward(dev, x[i], w[i], t.tokens.get(), o.rows, o.width); });
  table.memory("embedding_backward", M * d * 2 + t.distinct() * d * 8, [&](int i) {
    gdn::embedding_backward(dev, dw[i], x[i], t.tokens.get(), t.order.get(), o.rows, o.width, scratch.get());
  });
}

void bench_rmsnorm(Cuda& dev, Table& table, const Options& o) {
  const double bytes = 2.0 * o.rows * o.width;  // of one activation
  const size_t n = size_t(o.rows) * o.width;
  const Acts x(dev, n), branch(dev, n), h(dev, n), x_out(dev, n);
  const Floats rstd(dev, o.rows, 0.5f, 1.5f), w(dev, o.width), dw(dev, o.width);
  const Bytes scratch(dev, gdn::rmsnorm_backward_scratch_bytes(dev, o.rows, o.width), "a benchmark");
  table.memory("rmsnorm_forward", 2 * bytes,
               [&](int i) { gdn::rmsnorm_forward(dev, h[i], rstd[i], x[i], w[i], o.rows, o.width); });
  table.memory("residual_rmsnorm_forward", 4 * bytes, [&](int i) {
    gdn::residual_rmsnorm_forward(dev, x_out[i], h[i], rstd[i], x[i], branch[i], w[i], o.rows, o.width);
  });
  table.memory("rmsnorm_backward", 5 * bytes, [&](int i) {
    gdn::rmsnorm_backward(dev, x_out[i], dw[i], h[i], branch[i], x[i], rstd[i], w[i], o.rows, o.width,
                          scratch.get());
  });
}

void bench_mixer(Cuda& dev, Table& table, const Options& o) {
  const MixerShape s{o.rows / 1024, 1024, 6, 6, o.width / 8, o.width / 4};
  const size_t M = size_t(o.rows);
  const double row = 2.0 * M;  // bytes of one column of activations
  const Acts proj(dev, M * s.columns()), dproj(dev, M * s.columns());
  const Acts qkv(dev, M * s.conv_channels()), dqkv(dev, M * s.conv_channels());
  const Acts o_(dev, M * s.value_dim()), y(dev, M * s.value_dim());
  const Floats taps(dev, size_t(s.conv_channels()) * 4), dtaps(dev, size_t(s.conv_channels()) * 4);
  const Floats rnorm(dev, M * 2 * s.heads_k), rstd(dev, M * s.heads_v), w_o(dev, s.head_dim_v),
      dw_o(dev, s.head_dim_v);
  const Floats g(dev, M * s.heads_v, -1, 0), beta(dev, M * s.heads_v, 0, 1), dg(dev, M * s.heads_v),
      dbeta(dev, M * s.heads_v);
  const Floats A_log(dev, s.heads_v), dt_bias(dev, s.heads_v), dA_log(dev, s.heads_v),
      ddt_bias(dev, s.heads_v);
  const Bytes conv_scratch(dev, gdn::short_conv_gates_backward_scratch_bytes(dev, s), "a benchmark");
  const Bytes norm_scratch(dev, gdn::output_norm_backward_scratch_bytes(dev, s), "a benchmark");
  const double C = s.conv_channels(), V = s.value_dim(), H = s.heads_v;

  table.memory("short_conv_gates_forward", row * (2 * C + 6 * H), [&](int i) {
    gdn::short_conv_gates_forward(dev, qkv[i], rnorm[i], g[i], beta[i], proj[i], taps[i], A_log[i],
                                  dt_bias[i], nullptr, s, 1);
  });
  table.memory("short_conv_gates_backward", row * (3 * C + 12 * H), [&](int i) {
    gdn::short_conv_gates_backward(dev, dproj[i], dtaps[i], dA_log[i], ddt_bias[i], dqkv[i], dg[i], dbeta[i],
                                   rnorm[i], g[i], beta[i], proj[i], taps[i], A_log[i], dt_bias[i], s, 1,
                                   conv_scratch.get());
  });
  table.memory("output_norm_forward", row * 3 * V,
               [&](int i) { gdn::output_norm_forward(dev, y[i], rstd[i], o_[i], proj[i], w_o[i], s); });
  table.memory("output_norm_backward", row * 6 * V, [&](int i) {
    gdn::output_norm_backward(dev, dqkv[i], dproj[i], dw_o[i], y[i], qkv[i], o_[i], rstd[i], proj[i], w_o[i],
                              s, norm_scratch.get());
  });
}

int inner_size(int width) { return (8 * width / 3 + 255) / 256 * 256; }

void bench_swiglu(Cuda& dev, Table& table, const Options& o) {
  const int inner = inner_size(o.width);
  const size_t n = size_t(o.rows) * inner;
  const Acts gate_up(dev, 2 * n), dgate_up(dev, 2 * n), out(dev, n), again(dev, n);
  table.memory("swiglu_forward", 6.0 * n,
               [&](int i) { gdn::swiglu_forward(dev, out[i], gate_up[i], o.rows, inner); });
  table.memory("swiglu_backward", 12.0 * n, [&](int i) {
    gdn::swiglu_backward(dev, dgate_up[i], again[i], out[i], gate_up[i], o.rows, inner);
  });
}

void bench_classifier(Cuda& dev, Table& table, const Options& o) {
  for (const int vocab : {o.vocab, 256}) {
    const int padded = (vocab + 127) / 128 * 128;
    const double bytes = 2.0 * o.rows * padded;
    const Tokens targets(dev, o.rows, vocab);
    const Acts logits(dev, size_t(o.rows) * padded);
    const Floats losses(dev, o.rows);
    const std::string name = "softmax_cross_entropy, V = " + std::to_string(vocab);
    table.memory((name + ", loss").c_str(), bytes, [&](int i) {
      gdn::softmax_cross_entropy(dev, logits[i], losses[i], targets.tokens.get(), o.rows, vocab, padded, 0);
    });
    table.memory(name.c_str(), 2 * bytes, [&](int i) {
      gdn::softmax_cross_entropy(dev, logits[i], losses[i], targets.tokens.get(), o.rows, vocab, padded, 1);
    });
  }
  const Floats losses(dev, o.rows);
  const Buffer<Cuda, double> total(dev, 1, "a benchmark");
  cuda_check(cudaMemsetAsync(total.get(), 0, total.bytes(), dev.stream));
  table.memory("sum_losses", 4.0 * o.rows,
               [&](int i) { gdn::sum_losses(dev, total.get(), losses[i], o.rows); });
}

void bench_optimizer(Cuda& dev, Table& table, const Options& o) {
  // An embedding, and for each of 8 blocks six matrices and some small tensors, about as in the model.
  std::vector<gdn::ParameterSpan> spans;
  size_t n = 0;
  const size_t d = o.width, inner = inner_size(o.width);
  const auto add = [&](size_t size) {
    spans.push_back({n, size, 1, 0.1f});
    n += (size + 7) / 8 * 8;
  };
  add(size_t(o.vocab + 47) * d);
  for (int layer = 0; layer < 8; layer++)
    for (size_t size :
         {d, d * d * 9 / 2, d * d * 3 / 2, size_t(6), size_t(6), d * 12, d / 4, d, 2 * inner * d, inner * d})
      add(size);
  Buffer<Cuda, gdn::ParameterSpan> dev_spans(dev, spans.size(), "a benchmark");
  dev.upload(dev_spans.get(), spans.data(), dev_spans.bytes());
  const Floats master(dev, n), gradients(dev, n, -1e-3f, 1e-3f), moment1(dev, n), moment2(dev, n, 0, 1),
      norm(dev, 1, 1, 2);
  const Acts weights(dev, n);
  const gdn::ArenaRange all = {0, (n + gdn::kArenaBlock - 1) / gdn::kArenaBlock * gdn::kArenaBlock};
  const Buffer<Cuda, gdn::ArenaRange> group(dev, 1, "a benchmark");
  dev.upload(group.get(), &all, sizeof(all));
  const Buffer<Cuda, double> sums(dev, all.size() / gdn::kArenaBlock, "a benchmark");
  const int count = int(spans.size());
  table.memory("gradient norm", 4.0 * n, [&](int i) {
    gdn::sum_of_squares(dev, sums.get(), gradients[i], all, dev_spans.get(), count);
    gdn::norm_of_sums(dev, norm[0], sums.get(), group.get(), 1);
  });
  Buffer<Cuda, double> loss(dev, 1, "a benchmark");
  loss.zero();
  table.memory("add_gradients", 12.0 * n,
               [&](int i) { gdn::add_gradients(dev, moment1[i], gradients[i], n, loss.get(), loss.get()); });
  gdn::AdamwStep adamw;
  adamw.learning_rate = 1e-3f, adamw.beta1 = 0.9f, adamw.beta2 = 0.95f, adamw.clip = 1;
  const Buffer<Cuda, gdn::AdamwStep> dev_adamw(dev, 1, "a benchmark");
  dev.upload(dev_adamw.get(), &adamw, sizeof(adamw));
  table.memory("adamw_update", 30.0 * n, [&](int i) {
    gdn::adamw_update(dev, master[i], weights[i], moment1[i], moment2[i], gradients[i], all, dev_spans.get(),
                      count, norm[0], dev_adamw.get());
  });
  gdn::SgdStep sgd;
  sgd.learning_rate = 1e-3f, sgd.momentum = 0.9f;
  const Buffer<Cuda, gdn::SgdStep> dev_sgd(dev, 1, "a benchmark");
  dev.upload(dev_sgd.get(), &sgd, sizeof(sgd));
  table.memory("sgd_update", 22.0 * n, [&](int i) {
    gdn::sgd_update(dev, master[i], weights[i], moment1[i], gradients[i], all, dev_spans.get(), count,
                    norm[0], dev_sgd.get());
  });
  table.memory("round_weights", 6.0 * n, [&](int i) { gdn::round_weights(dev, weights[i], master[i], n); });
}

void bench_linear(Cuda& dev, Table& table, const Options& o, const char* name, int out, int in) {
  const double flops = 2.0 * o.rows * out * in;
  const Acts x(dev, size_t(o.rows) * in), w(dev, size_t(out) * in, -0.1f, 0.1f), y(dev, size_t(o.rows) * out);
  const Floats dw(dev, size_t(out) * in);
  const std::string shape = std::string(name) + " " + std::to_string(out) + " x " + std::to_string(in);
  table.product((shape + " forward").c_str(), flops,
                [&](int i) { gdn::linear_forward(dev, y[i], x[i], w[i], o.rows, out, in); });
  table.product((shape + " dx").c_str(), flops,
                [&](int i) { gdn::linear_backward_input(dev, x[i], y[i], w[i], o.rows, out, in, 1e-2f); });
  table.product((shape + " dw").c_str(), flops,
                [&](int i) { gdn::linear_backward_weight(dev, dw[i], y[i], x[i], o.rows, out, in, 1e-3f); });
}

void bench(const Options& o) {
  Cuda dev;
  std::printf("%s, d = %d, M = %d, H = 6, dk = %d, dv = %d, I = %d, V = %d\n", dev.name.c_str(), o.width,
              o.rows, o.width / 8, o.width / 4, inner_size(o.width), o.vocab);
  Table table(dev);
  bench_embedding(dev, table, o);
  bench_rmsnorm(dev, table, o);
  bench_mixer(dev, table, o);
  bench_swiglu(dev, table, o);
  bench_classifier(dev, table, o);
  bench_optimizer(dev, table, o);
  const MixerShape s{1, o.rows, 6, 6, o.width / 8, o.width / 4};
  bench_linear(dev, table, o, "q k v z a b", s.columns(), o.width);
  bench_linear(dev, table, o, "mixer out", o.width, s.value_dim());
  bench_linear(dev, table, o, "gate up", 2 * inner_size(o.width), o.width);
  bench_linear(dev, table, o, "down", o.width, inner_size(o.width));
  bench_linear(dev, table, o, "logits", (o.vocab + 127) / 128 * 128, o.width);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bench(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_layers: %s\n", error.what());
    return 1;
  }
}
