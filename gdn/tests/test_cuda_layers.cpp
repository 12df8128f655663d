// Every GPU layer but the delta rule against its CPU twin: fresh random inputs, rounded to bf16 where the GPU
// stores bf16, the reference in double on the same rounded numbers, outputs poisoned with NaN before the run,
// and every layer run twice from the same start with bit-for-bit the same results.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../gdn_kernels.cuh"
#include "../cpu_layers.h"
#include "needs_gpu.h"
#include "relative_error.h"

namespace {

using gdn::act;
using gdn::Buffer;
using gdn::Cuda;
using gdn::MixerShape;
using gdn::ParameterSpan;
using gdn::relative_error;
using gdn_tests::needs_gpu;
using Reference = gdn::Cpu<double>;
using Numbers = std::vector<double>;

constexpr double kActTolerance = 1e-2, kFloatTolerance = 1e-5, kSumTolerance = 1e-4;

inline uint32_t& seed() {
  static uint32_t value = std::random_device()();
  return value;
}

struct Random {
  std::mt19937 engine{seed()++};

  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine);
  }
  // Numbers that bf16 holds exactly.
  Numbers bf16(size_t n, double sigma = 1) {
    std::normal_distribution<float> normal(0, float(sigma));
    Numbers x(n);
    for (double& v : x) v = __bfloat162float(__float2bfloat16(normal(engine)));
    return x;
  }
  Numbers fp32(size_t n, double sigma = 1, double mean = 0) {
    std::normal_distribution<float> normal(static_cast<float>(mean), float(sigma));
    Numbers x(n);
    for (double& v : x) v = normal(engine);
    return x;
  }
};

inline act to_element(double v, act) { return __float2bfloat16(float(v)); }
inline float to_element(double v, float) { return float(v); }
inline double to_element(double v, double) { return v; }
inline double from_element(act v) { return __bfloat162float(v); }
inline double from_element(float v) { return v; }
inline double from_element(double v) { return v; }

// Numbers in GPU memory, with what they hold before each run.
template <class T>
class Array {
 public:
  Array(Cuda& dev, const Numbers& start)
      : dev_(dev), start_(start.size()), buffer_(dev, start.size(), "a test") {
    for (size_t i = 0; i < start.size(); i++) start_[i] = to_element(start[i], T());
    reset();
  }
  // NaN: whatever is not written fails the comparison.
  Array(Cuda& dev, size_t n) : Array(dev, Numbers(n, std::numeric_limits<double>::quiet_NaN())) {}

  operator T*() const { return buffer_.get(); }
  void reset() { dev_.upload(buffer_.get(), start_.data(), start_.size() * sizeof(T)); }
  std::vector<T> elements() const {
    std::vector<T> out(start_.size(), T());
    dev_.download(out.data(), buffer_.get(), out.size() * sizeof(T));
    return out;
  }
  Numbers numbers() const {
    Numbers out;
    for (T v : elements()) out.push_back(from_element(v));
    return out;
  }
  bool same_bits(const std::vector<T>& other) const {
    const std::vector<T> mine = elements();
    return std::memcmp(mine.data(), other.data(), mine.size() * sizeof(T)) == 0;
  }

 private:
  Cuda& dev_;
  std::vector<T> start_;
  Buffer<Cuda, T> buffer_;
};

using Acts = Array<act>;
using Floats = Array<float>;
using Doubles = Array<double>;

struct Scratch {
  Buffer<Cuda, unsigned char> buffer;
  Scratch(Cuda& dev, size_t bytes) : buffer(dev, bytes, "a test's work space") {
    // NaN in every reading: partial sums that nobody wrote must not pass
    if (bytes) cuda_check(cudaMemsetAsync(buffer.get(), 0xff, bytes, dev.stream));
  }
  operator void*() const { return buffer.get(); }
};

template <class T>
class DeviceCopy {
 public:
  DeviceCopy(Cuda& dev, const std::vector<T>& host) : buffer_(dev, host.size(), "a test") {
    dev.upload(buffer_.get(), host.data(), host.size() * sizeof(T));
  }
  operator T*() const { return buffer_.get(); }

 private:
  Buffer<Cuda, T> buffer_;
};

template <class T>
void check_close(const char* what, const Array<T>& out, const Numbers& ref, double tolerance) {
  INFO(std::string(what) << ", next seed " << seed());
  const Numbers numbers = out.numbers();
  REQUIRE(numbers.size() == ref.size());
  CHECK(relative_error(numbers, ref) <= tolerance);
}

inline void reset_all() {}
template <class First, class... Rest>
void reset_all(First& first, Rest&... rest) {
  first.reset();
  reset_all(rest...);
}

// Runs the layer on the arrays it writes, twice from the same start, and leaves the second results in place.
template <class Run, class... Outputs>
void run_twice(Run run, Outputs&... outputs) {
  reset_all(outputs...);
  run();
  const auto first = std::make_tuple(outputs.elements()...);
  reset_all(outputs...);
  run();
  const auto compare = [&](const auto&... elements) { return (outputs.same_bits(elements) && ...); };
  INFO("the second run must give the same bits");
  CHECK(std::apply(compare, first));
}

// The head sizes of the trained models, grouped heads, one head, and sequences of all kinds of length.
inline std::vector<MixerShape> mixer_shapes() {
  return {
      {2, 65, 2, 2, 32, 64},   {1, 100, 1, 1, 64, 128}, {3, 7, 3, 3, 96, 192}, {2, 130, 2, 4, 128, 256},
      {1, 65, 2, 2, 192, 384}, {2, 7, 1, 2, 256, 512},  {3, 1, 1, 1, 16, 16},  {1, 2, 6, 6, 128, 256},
      {1, 33, 3, 6, 48, 80},   {2, 3, 5, 5, 112, 240},  {2, 67, 6, 6, 32, 64},
  };
}

inline std::string describe(const MixerShape& s) {
  return "B " + std::to_string(s.batch) + " T " + std::to_string(s.tokens) + " Hk " +
         std::to_string(s.heads_k) + " Hv " + std::to_string(s.heads_v) + " dk " +
         std::to_string(s.head_dim_k) + " dv " + std::to_string(s.head_dim_v);
}

// Of a SUBCASE: "rows 65 width 256".
template <class... Sizes>
std::string sizes_text(const Sizes&... parts) {
  std::string text;
  const auto add = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      text += " " + std::to_string(part);
    else
      text += (text.empty() ? "" : " ") + std::string(part);
  };
  (add(parts), ...);
  return text;
}

// Columns [begin, end) of rows of `stride`.
inline Numbers columns(const Numbers& x, int stride, int begin, int end) {
  Numbers out;
  for (size_t row = 0; row < x.size(); row += stride) out.insert(out.end(), &x[row] + begin, &x[row] + end);
  return out;
}

inline void check_columns(const char* what, const Acts& out, const Numbers& ref, int stride, int begin,
                          int end) {
  INFO(std::string(what) << ", next seed " << seed());
  CHECK(relative_error(columns(out.numbers(), stride, begin, end), columns(ref, stride, begin, end)) <=
        kActTolerance);
}

// As before the run.
inline bool all_nan(const Numbers& x) {
  return std::all_of(x.begin(), x.end(), [](double v) { return std::isnan(v); });
}

TEST_CASE("cuda: embedding" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  struct Case {
    int rows, width, vocab;
    double repeated;
  };
  for (const Case& c : {Case{1, 8, 3, 0}, Case{33, 64, 256, 0.2}, Case{65, 1024, 50, 0},
                        Case{700, 1032, 40, 0.5}, Case{256, 256, 1, 1}, Case{999, 72, 5000, 0.3}})
    SUBCASE(sizes_text("rows", c.rows, "width", c.width, "vocab", c.vocab).c_str()) {
      INFO("seed " << seed());
      Random random;
      std::vector<int32_t> tokens(c.rows), order(c.rows);
      for (int32_t& t : tokens)
        t = random.uniform(0, 1) < c.repeated ? c.vocab / 2 : int(random.uniform(0, c.vocab));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
      const Numbers w = random.bf16(size_t(c.vocab) * c.width), dx = random.bf16(size_t(c.rows) * c.width);
      Numbers x_ref(dx.size()), dw_ref = random.fp32(w.size());
      const DeviceCopy<int32_t> dev_tokens(dev, tokens), dev_order(dev, order);
      Acts x(dev, x_ref.size());
      const Acts dev_w(dev, w), dev_dx(dev, dx);
      Floats dw(dev, dw_ref);
      Scratch scratch(dev, gdn::embedding_backward_scratch_bytes(dev, c.rows, c.width));

      SUBCASE("forward") {
        run_twice([&] { gdn::embedding_forward(dev, x, dev_w, dev_tokens, c.rows, c.width); }, x);
        gdn::embedding_forward(cpu, x_ref.data(), w.data(), tokens.data(), c.rows, c.width);
        check_close("x", x, x_ref, 0);
      }
      SUBCASE("backward") {
        run_twice(
            [&] {
              gdn::embedding_backward(dev, dw, dev_dx, dev_tokens, dev_order, c.rows, c.width, scratch);
            },
            dw);
        gdn::embedding_backward(cpu, dw_ref.data(), dx.data(), tokens.data(), order.data(), c.rows, c.width,
                                nullptr);
        check_close("dw_emb", dw, dw_ref, kFloatTolerance);
      }
    }
}

TEST_CASE("cuda: rmsnorm" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  struct Case {
    int rows, width;
  };
  for (const Case& c : {Case{1, 8}, Case{65, 256}, Case{333, 512}, Case{130, 768}, Case{5001, 64},
                        Case{257, 1024}, Case{77, 1544}, Case{33, 2048}, Case{600, 2056}, Case{7, 8192}})
    SUBCASE(sizes_text("rows", c.rows, "width", c.width).c_str()) {
      const int rows = c.rows, width = c.width;
      INFO("seed " << seed());
      Random random;
      const size_t n = size_t(rows) * width;
      const Numbers x = random.bf16(n), branch = random.bf16(n), dh = random.bf16(n),
                    dx_start = random.bf16(n);
      const Numbers w = random.fp32(width, 0.3, 1), dw_start = random.fp32(width);
      Numbers h_ref(n), sum_ref(n), r_ref(rows);
      const Acts dev_x(dev, x), dev_branch(dev, branch), dev_dh(dev, dh);
      const Floats dev_w(dev, w);
      Acts h(dev, n), sum(dev, n), dx(dev, dx_start), in_place(dev, x), in_branch(dev, branch);
      Floats r(dev, size_t(rows)), dw(dev, dw_start);

      SUBCASE("forward, then backward with h recomputed elsewhere and in place of its gradient") {
        run_twice([&] { gdn::rmsnorm_forward(dev, h, r, dev_x, dev_w, rows, width); }, h, r);
        gdn::rmsnorm_forward(cpu, h_ref.data(), r_ref.data(), x.data(), w.data(), rows, width);
        check_close("h", h, h_ref, kActTolerance);
        check_close("rstd", r, r_ref, kFloatTolerance);

        // The backward pass of the same norm, both from the GPU's own rstd.
        Numbers dx_ref = dx_start, dw_ref = dw_start;
        const Numbers r_used = r.numbers();
        Scratch scratch(dev, gdn::rmsnorm_backward_scratch_bytes(dev, rows, width));
        const std::vector<act> h_of_forward = h.elements();
        Acts dh_then_h(dev, dh), h_again(dev, n);
        run_twice(
            [&] {
              gdn::rmsnorm_backward(dev, dx, dw, nullptr, dev_dh, dev_x, r, dev_w, rows, width, scratch);
            },
            dx, dw);
        const std::vector<act> dx_without_h = dx.elements();
        const std::vector<float> dw_without_h = dw.elements();
        for (Acts* to : {&h_again, &dh_then_h}) {
          const Acts& from = to == &dh_then_h ? dh_then_h : dev_dh;
          run_twice(
              [&] { gdn::rmsnorm_backward(dev, dx, dw, *to, from, dev_x, r, dev_w, rows, width, scratch); },
              dx, dw, *to);
          CHECK(to->same_bits(h_of_forward));
          CHECK(dx.same_bits(dx_without_h));
          CHECK(dw.same_bits(dw_without_h));
        }
        double* const nowhere = nullptr;
        gdn::rmsnorm_backward(cpu, dx_ref.data(), dw_ref.data(), nowhere, dh.data(), x.data(), r_used.data(),
                              w.data(), rows, width, nullptr);
        check_close("dx", dx, dx_ref, kActTolerance);
        check_close("dw", dw, dw_ref, kSumTolerance);
      }

      SUBCASE("with a residual, elsewhere and in place of either summand") {
        run_twice(
            [&] { gdn::residual_rmsnorm_forward(dev, sum, h, r, dev_x, dev_branch, dev_w, rows, width); },
            sum, h, r);
        for (size_t i = 0; i < n; i++) sum_ref[i] = x[i] + branch[i];
        check_close("x_out", sum, sum_ref, kActTolerance);
        sum_ref = sum.numbers();  // the norm is of x_out as rounded
        gdn::rmsnorm_forward(cpu, h_ref.data(), r_ref.data(), sum_ref.data(), w.data(), rows, width);
        check_close("h of x_out", h, h_ref, kActTolerance);
        check_close("rstd of x_out", r, r_ref, kFloatTolerance);
        const std::vector<act> sum_before = sum.elements(), h_before = h.elements();
        run_twice(
            [&] {
              gdn::residual_rmsnorm_forward(dev, in_place, h, r, in_place, dev_branch, dev_w, rows, width);
            },
            in_place, h, r);
        CHECK(in_place.same_bits(sum_before));
        CHECK(h.same_bits(h_before));
        run_twice(
            [&] {
              gdn::residual_rmsnorm_forward(dev, in_branch, h, r, dev_x, in_branch, dev_w, rows, width);
            },
            in_branch, h, r);
        CHECK(in_branch.same_bits(sum_before));
        CHECK(h.same_bits(h_before));
      }
    }
  SUBCASE("a width that is no multiple of 8 is refused") {
    Acts x(dev, Numbers(12, 1.0)), h(dev, size_t(12));
    Floats r(dev, size_t(1)), w(dev, Numbers(12, 1.0));
    CHECK_THROWS(gdn::rmsnorm_forward(dev, h, r, x, w, 1, 12));
  }
}

TEST_CASE("cuda: linear" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  struct Case {
    int rows, out, in;
    double scale;
  };
  for (const Case& c : {Case{1, 8, 8, 1}, Case{33, 72, 40, 0.25}, Case{257, 128, 264, 1},
                        Case{1000, 64, 48, 2}, Case{65, 1032, 96, 0.5}})
    SUBCASE(sizes_text("rows", c.rows, "out", c.out, "in", c.in).c_str()) {
      INFO("seed " << seed());
      Random random;
      const Numbers x = random.bf16(size_t(c.rows) * c.in), w = random.bf16(size_t(c.out) * c.in);
      const Numbers dy = random.bf16(size_t(c.rows) * c.out);
      Numbers y_ref(dy.size()), dx_ref(x.size()), dw_ref = random.fp32(w.size());
      const Acts dev_x(dev, x), dev_w(dev, w), dev_dy(dev, dy);
      Acts y(dev, y_ref.size()), dx(dev, dx_ref.size());
      Floats dw(dev, dw_ref);
      const float scale = float(c.scale);

      SUBCASE("forward") {
        run_twice([&] { gdn::linear_forward(dev, y, dev_x, dev_w, c.rows, c.out, c.in, scale); }, y);
        gdn::linear_forward(cpu, y_ref.data(), x.data(), w.data(), c.rows, c.out, c.in, c.scale);
        check_close("y", y, y_ref, kActTolerance);
      }
      SUBCASE("gradient of the input") {
        run_twice([&] { gdn::linear_backward_input(dev, dx, dev_dy, dev_w, c.rows, c.out, c.in, scale); },
                  dx);
        gdn::linear_backward_input(cpu, dx_ref.data(), dy.data(), w.data(), c.rows, c.out, c.in, c.scale);
        check_close("dx", dx, dx_ref, kActTolerance);
      }
      SUBCASE("gradient of the weight") {
        run_twice([&] { gdn::linear_backward_weight(dev, dw, dev_dy, dev_x, c.rows, c.out, c.in, scale); },
                  dw);
        gdn::linear_backward_weight(cpu, dw_ref.data(), dy.data(), x.data(), c.rows, c.out, c.in, c.scale);
        check_close("dw", dw, dw_ref, kFloatTolerance);
      }
    }
}

TEST_CASE("cuda: short convolution and gates" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  std::vector<MixerShape> shapes = mixer_shapes();
  shapes.push_back({2, 300, 6, 6, 128, 256});  // several tiles of the longest, the last one ragged
  for (const MixerShape& s : shapes)
    for (bool documents : {false, true}) SUBCASE((describe(s) + (documents ? ", documents" : "")).c_str()) {
        INFO("seed " << seed());
        Random random;
        const int M = s.rows(), C = s.conv_channels(), P = s.columns(), H = s.heads_v;
        const double beta_max = M % 2 ? 1 : 2;
        const size_t norms = size_t(M) * 2 * s.heads_k, in_history = size_t(s.batch) * 3 * C,
                     n = size_t(M) * H;
        const Numbers proj = random.bf16(size_t(M) * P, 2), taps = random.fp32(size_t(C) * 4, 0.4);
        const Numbers A_log = random.fp32(H), dt_bias = random.fp32(H, 2, -4);
        const Numbers dqkv = random.bf16(size_t(M) * C), dg = random.fp32(n), dbeta = random.fp32(n);
        const Numbers dtaps_start = random.fp32(taps.size()), dA_start = random.fp32(H),
                      ddt_start = random.fp32(H);
        const Numbers history_start = random.bf16(in_history);
        Numbers qkv_ref(dqkv.size()), rnorm_ref(norms), g_ref(n), beta_ref(n), history_ref = history_start;
        const Acts dev_proj(dev, proj);
        const Floats dev_taps(dev, taps), dev_A(dev, A_log), dev_dt(dev, dt_bias);
        // documents of one to six tokens, and at the edges of tiles
        std::vector<int32_t> position(M);
        for (int m = 0; m < M; m++) {
          const int t = m % s.tokens;
          const bool starts = t == 0 || t % 32 == 0 || t % 32 == 31 || random.uniform(0, 4) < 1;
          position[m] = starts ? 0 : position[m - 1] + 1;
        }
        const DeviceCopy<int32_t> dev_position(dev, position);
        const int32_t *masked = documents ? static_cast<int32_t*>(dev_position) : nullptr,
                      *masked_ref = documents ? position.data() : nullptr;
        Acts qkv(dev, qkv_ref.size()), history(dev, history_start);
        Floats rnorm(dev, norms), g(dev, n), beta(dev, n);

        const auto forward = [&](act* from) {
          gdn::short_conv_gates_forward(dev, qkv, rnorm, g, beta, dev_proj, dev_taps, dev_A, dev_dt, from, s,
                                        float(beta_max), masked);
        };
        const auto forward_ref = [&](double* from) {
          gdn::short_conv_gates_forward(cpu, qkv_ref.data(), rnorm_ref.data(), g_ref.data(), beta_ref.data(),
                                        proj.data(), taps.data(), A_log.data(), dt_bias.data(), from, s,
                                        beta_max, masked_ref);
        };
        SUBCASE("forward after a history") {
          run_twice([&] { forward(history); }, qkv, rnorm, g, beta, history);
          forward_ref(history_ref.data());
          check_close("qkv after history", qkv, qkv_ref, kActTolerance);
          check_close("rnorm after history", rnorm, rnorm_ref, kFloatTolerance);
          check_close("history", history, history_ref, 0);
        }
        SUBCASE("forward and backward") {
          run_twice([&] { forward(nullptr); }, qkv, rnorm, g, beta);
          forward_ref(nullptr);
          check_close("qkv", qkv, qkv_ref, kActTolerance);
          check_close("rnorm", rnorm, rnorm_ref, kFloatTolerance);
          check_close("g", g, g_ref, kFloatTolerance);
          check_close("beta", beta, beta_ref, kFloatTolerance);

          // Both backward passes from the GPU's rnorm, g and beta.
          const Numbers rnorm_used = rnorm.numbers(), g_used = g.numbers(), beta_used = beta.numbers();
          Numbers dproj_ref(proj.size()), dtaps_ref = dtaps_start, dA_ref = dA_start, ddt_ref = ddt_start;
          Numbers work = dqkv;
          Acts dproj(dev, proj.size()), dev_dqkv(dev, dqkv);
          const Floats dev_dg(dev, dg), dev_dbeta(dev, dbeta);
          Floats dtaps(dev, dtaps_start), dA(dev, dA_start), ddt(dev, ddt_start);
          Scratch scratch(dev, gdn::short_conv_gates_backward_scratch_bytes(dev, s));
          run_twice(
              [&] {
                gdn::short_conv_gates_backward(dev, dproj, dtaps, dA, ddt, dev_dqkv, dev_dg, dev_dbeta, rnorm,
                                               g, beta, dev_proj, dev_taps, dev_A, dev_dt, s, float(beta_max),
                                               scratch, masked);
              },
              dproj, dtaps, dA, ddt, dev_dqkv);
          gdn::short_conv_gates_backward(
              cpu, dproj_ref.data(), dtaps_ref.data(), dA_ref.data(), ddt_ref.data(), work.data(), dg.data(),
              dbeta.data(), rnorm_used.data(), g_used.data(), beta_used.data(), proj.data(), taps.data(),
              A_log.data(), dt_bias.data(), s, beta_max, nullptr, masked_ref);
          check_columns("dproj", dproj, dproj_ref, P, 0, C);
          check_columns("da", dproj, dproj_ref, P, s.a_column(), s.b_column());
          check_columns("db", dproj, dproj_ref, P, s.b_column(), s.b_column() + H);
          check_columns("padding", dproj, dproj_ref, P, s.b_column() + H, P);
          CHECK(all_nan(columns(dproj.numbers(), P, s.z_column(), s.a_column())));  // the output norm's
          check_close("dtaps", dtaps, dtaps_ref, kSumTolerance);
          check_close("dA_log", dA, dA_ref, kSumTolerance);
          check_close("ddt_bias", ddt, ddt_ref, kSumTolerance);
        }
      }
}

TEST_CASE("cuda: output norm" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  std::vector<MixerShape> shapes = mixer_shapes();
  shapes.push_back({3, 700, 6, 6, 16, 32});  // several rounds of each block
  for (const MixerShape& s : shapes) SUBCASE(describe(s).c_str()) {
      INFO("seed " << seed());
      Random random;
      const int M = s.rows(), P = s.columns(), z = s.z_column();
      const size_t n = size_t(M) * s.value_dim(), heads = size_t(M) * s.heads_v;
      const Numbers proj = random.bf16(size_t(M) * P, 2), o = random.bf16(n), dy = random.bf16(n);
      const Numbers w_o = random.fp32(s.head_dim_v, 0.3, 1), dw_start = random.fp32(s.head_dim_v);
      Numbers y_ref(n), rstd_ref(heads), d_o_ref(n), dproj_ref(proj.size()), dw_ref = dw_start;
      const Acts dev_proj(dev, proj), dev_o(dev, o), dev_dy(dev, dy);
      const Floats dev_w(dev, w_o);
      Acts y(dev, n), d_o(dev, n), dproj(dev, proj.size());
      Floats rstd(dev, heads), dw(dev, dw_start);

      run_twice([&] { gdn::output_norm_forward(dev, y, rstd, dev_o, dev_proj, dev_w, s); }, y, rstd);
      gdn::output_norm_forward(cpu, y_ref.data(), rstd_ref.data(), o.data(), proj.data(), w_o.data(), s);
      check_close("y", y, y_ref, kActTolerance);
      check_close("rstd", rstd, rstd_ref, kFloatTolerance);

      const Numbers rstd_used = rstd.numbers();
      Scratch scratch(dev, gdn::output_norm_backward_scratch_bytes(dev, s));
      const std::vector<act> y_of_forward = y.elements();
      Acts y_again(dev, n), dy_then_d_o(dev, dy);
      run_twice(
          [&] {
            gdn::output_norm_backward(dev, d_o, dproj, dw, y_again, dev_dy, dev_o, rstd, dev_proj, dev_w, s,
                                      scratch);
          },
          d_o, dproj, dw, y_again);
      CHECK(y_again.same_bits(y_of_forward));
      const std::vector<act> d_o_elsewhere = d_o.elements();
      run_twice(
          [&] {
            gdn::output_norm_backward(dev, dy_then_d_o, dproj, dw, y_again, dy_then_d_o, dev_o, rstd,
                                      dev_proj, dev_w, s, scratch);
          },
          dy_then_d_o, dproj, dw, y_again);
      CHECK(dy_then_d_o.same_bits(d_o_elsewhere));
      Numbers y_unused(n);
      gdn::output_norm_backward(cpu, d_o_ref.data(), dproj_ref.data(), dw_ref.data(), y_unused.data(),
                                dy.data(), o.data(), rstd_used.data(), proj.data(), w_o.data(), s, nullptr);
      check_close("d_o", d_o, d_o_ref, kActTolerance);
      check_columns("dz", dproj, dproj_ref, P, z, z + s.value_dim());
      CHECK(all_nan(columns(dproj.numbers(), P, 0, z)));  // the other layers'
      CHECK(all_nan(columns(dproj.numbers(), P, z + s.value_dim(), P)));
      check_close("dw_o", dw, dw_ref, kSumTolerance);
    }
  SUBCASE("a head size that is no multiple of 16 is refused") {
    MixerShape odd{1, 4, 1, 1, 24, 32};
    Acts none(dev, size_t(8));
    Floats no_floats(dev, size_t(8));
    CHECK_THROWS(gdn::output_norm_forward(dev, none, no_floats, none, none, no_floats, odd));
  }
}

TEST_CASE("cuda: swiglu" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  struct Case {
    int rows, inner;
  };
  for (const Case& c : {Case{1, 8}, Case{7, 256}, Case{33, 2816}, Case{101, 1032}})
    SUBCASE(sizes_text("rows", c.rows, "inner", c.inner).c_str()) {
      const int rows = c.rows, inner = c.inner;
      INFO("seed " << seed());
      Random random;
      const size_t n = size_t(rows) * inner;
      const Numbers gate_up = random.bf16(2 * n, 4), dout = random.bf16(n);
      Numbers out_ref(n), dgate_up_ref(2 * n);
      const Acts dev_gate_up(dev, gate_up), dev_dout(dev, dout);
      Acts out(dev, n), dgate_up(dev, 2 * n);
      run_twice([&] { gdn::swiglu_forward(dev, out, dev_gate_up, rows, inner); }, out);
      gdn::swiglu_forward(cpu, out_ref.data(), gate_up.data(), rows, inner);
      check_close("out", out, out_ref, kActTolerance);
      const std::vector<act> out_of_forward = out.elements();
      Acts out_again(dev, n), dout_then_out(dev, dout);
      for (Acts* to : {&out_again, &dout_then_out}) {  // elsewhere, and in the place of its gradient
        const Acts& from = to == &dout_then_out ? dout_then_out : dev_dout;
        run_twice([&] { gdn::swiglu_backward(dev, dgate_up, *to, from, dev_gate_up, rows, inner); }, dgate_up,
                  *to);
        CHECK(to->same_bits(out_of_forward));
      }
      Numbers out_unused(n);
      gdn::swiglu_backward(cpu, dgate_up_ref.data(), out_unused.data(), dout.data(), gate_up.data(), rows,
                           inner);
      check_close("dgate_up", dgate_up, dgate_up_ref, kActTolerance);
    }
}

TEST_CASE("cuda: softmax cross-entropy" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  struct Case {
    int rows, vocab, padded;
    double sigma;
  };
  for (const Case& c :
       {Case{33, 256, 256, 1}, Case{1, 3, 8, 1}, Case{65, 2001, 2048, 5}, Case{5, 2050, 2056, 2},
        Case{7, 50257, 50304, 3}, Case{3, 50304, 50304, 20}, Case{2, 151669, 151672, 2},
        Case{2, 112641, 225288, 1}})  // the last: a piece without any column of the vocabulary
    SUBCASE(sizes_text("rows", c.rows, "vocab", c.vocab, "padded", c.padded).c_str()) {
      INFO("seed " << seed());
      Random random;
      const double scale = 1.0 / 64;
      const Numbers logits = random.bf16(size_t(c.rows) * c.padded, c.sigma);
      std::vector<int32_t> targets(c.rows);
      for (int32_t& t : targets) t = int(random.uniform(0, c.vocab));
      targets[0] = c.vocab - 1;
      if (c.rows > 2) targets[2] = -1;
      Numbers losses_ref(c.rows), gradient_ref = logits, total_ref(1);
      const DeviceCopy<int32_t> dev_targets(dev, targets);
      Acts dev_logits(dev, logits);
      Floats losses(dev, size_t(c.rows));
      Doubles total(dev, total_ref);
      const std::vector<act> before = dev_logits.elements();

      run_twice(
          [&] {
            gdn::softmax_cross_entropy(dev, dev_logits, losses, dev_targets, c.rows, c.vocab, c.padded, 0);
          },
          dev_logits, losses);
      CHECK(dev_logits.same_bits(before));
      gdn::softmax_cross_entropy(cpu, gradient_ref.data(), losses_ref.data(), targets.data(), c.rows, c.vocab,
                                 c.padded, scale);
      check_close("losses alone", losses, losses_ref, kFloatTolerance);
      run_twice(
          [&] {
            gdn::softmax_cross_entropy(dev, dev_logits, losses, dev_targets, c.rows, c.vocab, c.padded,
                                       float(scale));
          },
          dev_logits, losses);
      check_close("losses", losses, losses_ref, kFloatTolerance);
      check_close("dlogits", dev_logits, gradient_ref, kActTolerance);
      Numbers padding = columns(dev_logits.numbers(), c.padded, c.vocab, c.padded);
      CHECK(std::all_of(padding.begin(), padding.end(), [](double v) { return v == 0; }));

      run_twice([&] { gdn::sum_losses(dev, total, losses, c.rows); }, total);
      gdn::sum_losses(cpu, total_ref.data(), losses_ref.data(), c.rows);
      check_close("total", total, total_ref, kFloatTolerance);
    }
  SUBCASE("the sum of 40,001 losses") {
    Random random;
    const Numbers many = random.fp32(40001, 1, 5);
    Numbers sum(1, 7);
    Floats losses(dev, many);
    Doubles total(dev, sum);
    run_twice([&] { gdn::sum_losses(dev, total, losses, int(many.size())); }, total);
    gdn::sum_losses(cpu, sum.data(), many.data(), int(many.size()));
    check_close("sum of many", total, sum, 1e-6);
  }
}

TEST_CASE("cuda: norm of the gradients, rounding of weights" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  for (size_t n : {size_t(1), size_t(7), size_t(4096), size_t(100003), size_t(6000001)}) {
    INFO("numbers " << n << ", seed " << seed());
    Random random;
    const Numbers x = random.fp32(n);
    Numbers norm_ref(1), rounded(n);
    for (size_t i = 0; i < n; i++) rounded[i] = __bfloat162float(__float2bfloat16(float(x[i])));
    const Floats dev_x(dev, x);
    Floats norm(dev, size_t(1));
    Acts weights(dev, n);
    const gdn::ArenaRange all = {0, (n + gdn::kArenaBlock - 1) / gdn::kArenaBlock * gdn::kArenaBlock};
    const DeviceCopy<gdn::ArenaRange> groups(dev, {all});
    Doubles sums(dev, all.size() / gdn::kArenaBlock);
    Numbers sums_ref(all.size() / gdn::kArenaBlock);
    // one tensor, and six with weights of their own, of which some lie within one piece of a block
    std::vector<ParameterSpan> one(1), six;
    one[0].size = n;
    for (size_t i = 0; i < 6; i++) {
      const size_t begin = n * i * i / 36 / 8 * 8, end = i == 5 ? n : n * (i + 1) * (i + 1) / 36 / 8 * 8;
      six.push_back({begin, end - begin, 1, 0, float(random.uniform(0.01, 20))});
    }
    for (const auto& spans : {one, six}) {
      const DeviceCopy<ParameterSpan> dev_spans(dev, spans);
      const int count = int(spans.size());
      run_twice(
          [&] {
            gdn::sum_of_squares(dev, sums, dev_x, all, dev_spans, count);
            gdn::norm_of_sums(dev, norm, sums, groups, 1);
          },
          norm);
      gdn::sum_of_squares(cpu, sums_ref.data(), x.data(), all, spans.data(), count);
      gdn::norm_of_sums(cpu, norm_ref.data(), sums_ref.data(), &all, 1);
      check_close("norm", norm, norm_ref, 1e-6);
    }
    run_twice([&] { gdn::round_weights(dev, weights, dev_x, n); }, weights);
    check_close("weights", weights, rounded, 0);
  }
}

TEST_CASE("cuda: partial sums of gradients, of parts and of a number a rank: the CPU's bits" * needs_gpu()) {
  Cuda dev;
  gdn::Cpu<float> cpu;
  Random random;
  for (size_t n : {size_t(4), size_t(4096), size_t(100004)}) {
    CAPTURE(n);
    const Numbers a = random.fp32(n), b = random.fp32(n);
    std::vector<float> sum(a.begin(), a.end());
    const std::vector<float> x(b.begin(), b.end());
    Floats dev_sum(dev, a);
    const Floats dev_x(dev, b);
    const Doubles dev_losses(dev, Numbers{0.1, 0.2});
    gdn::add_gradients(dev, dev_sum, dev_x, n, dev_losses, dev_losses + 1);
    double loss = 0.1;
    const double other = 0.2;
    gdn::add_gradients(cpu, sum.data(), x.data(), n, &loss, &other);
    CHECK(dev_sum.numbers() == Numbers(sum.begin(), sum.end()));
    CHECK(dev_losses.numbers()[0] == loss);
  }
  const Numbers a = random.fp32(64 * 9), b = random.fp32(64 * 3);
  std::vector<float> sum(a.begin(), a.end());
  const std::vector<float> x(b.begin(), b.end());
  Floats dev_sum(dev, a);
  const Floats dev_x(dev, b);
  gdn::add_pieces(dev, dev_sum + 64, dev_x, 3, 64, 3 * 64);
  gdn::add_pieces(cpu, sum.data() + 64, x.data(), 3, 64, 3 * 64);
  CHECK(dev_sum.numbers() == Numbers(sum.begin(), sum.end()));
  for (int n : {1, 2, 8, 1024}) {
    Numbers numbers;
    for (int i = 0; i < n; i++) numbers.push_back(random.uniform(-1, 1));
    const Doubles dev_numbers(dev, numbers), dev_total(dev, Numbers(1));
    gdn::sum_tree(dev, dev_total, dev_numbers, n);
    double total = 0;
    gdn::sum_tree(cpu, &total, numbers.data(), n);
    CHECK(dev_total.numbers()[0] == total);
  }
}

// An arena of tensors of many sizes, large ones among many small ones, with gaps up to multiples of 8.
struct Arena {
  std::vector<ParameterSpan> spans;
  size_t size = 0;

  explicit Arena(Random& random) {
    for (size_t n : {size_t(1), size_t(6), size_t(6), size_t(8), size_t(30000), size_t(3), size_t(4096),
                     size_t(4093), size_t(1024), size_t(70001), size_t(5)}) {
      spans.push_back({size, n, float(random.uniform(0.1, 2)), float(spans.size() % 2 ? 0.1 : 0), 1});
      size += (n + 7) / 8 * 8;
    }
  }
  bool covers(size_t i) const {
    return std::any_of(spans.begin(), spans.end(),
                       [&](const ParameterSpan& s) { return i >= s.offset && i < s.offset + s.size; });
  }
};

// What an optimizer works on, once for each device. The gaps between tensors are NaN and must stay so.
struct UpdateTest {
  Random random;
  Arena arena{random};
  Numbers master, moment1, moment2, gradients;
  Floats dev_master, dev_moment1, dev_moment2, dev_gradients, norm;
  Acts dev_weights;
  DeviceCopy<ParameterSpan> dev_spans;
  int count = int(arena.spans.size());

  explicit UpdateTest(Cuda& dev)
      : master(random.fp32(arena.size)),
        moment1(random.fp32(arena.size, 0.1)),
        moment2(random.fp32(arena.size, 0.1)),
        gradients(random.fp32(arena.size)),
        dev_master(dev, with_gaps(master)),
        dev_moment1(dev, with_gaps(moment1)),
        dev_moment2(dev, with_gaps(squares(moment2))),
        dev_gradients(dev, gradients),
        norm(dev, Numbers(1, 3.0)),
        dev_weights(dev, arena.size),
        dev_spans(dev, arena.spans) {}

  gdn::ArenaRange range() const { return {0, arena.size}; }
  static Numbers& squares(Numbers& x) {
    for (double& v : x) v = float(v * v);
    return x;
  }
  Numbers with_gaps(const Numbers& x) const {
    Numbers out = x;
    for (size_t i = 0; i < out.size(); i++)
      if (!arena.covers(i)) out[i] = std::numeric_limits<double>::quiet_NaN();
    return out;
  }
  template <class T>
  void check(const char* what, const Array<T>& out, const Numbers& ref, double tolerance) const {
    INFO(std::string(what) << ", next seed " << seed());
    Numbers inside, expected;
    bool gaps_untouched = true;
    const Numbers numbers = out.numbers();
    for (size_t i = 0; i < numbers.size(); i++) {
      if (arena.covers(i)) {
        inside.push_back(numbers[i]);
        expected.push_back(ref[i]);
      } else {
        gaps_untouched = gaps_untouched && std::isnan(numbers[i]);
      }
    }
    CHECK(gaps_untouched);
    CHECK(relative_error(inside, expected) <= tolerance);
  }
};

TEST_CASE("cuda: adamw" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  INFO("seed " << seed());
  UpdateTest t(dev);
  gdn::AdamwStep step;
  step.learning_rate = 0.01f;
  step.beta1 = 0.9f;
  step.beta2 = 0.95f;
  step.clip = 1;
  const double norm = 3;
  Numbers weights(t.arena.size);
  std::vector<gdn::AdamwStep> steps(4, step);
  for (size_t i = 0; i < steps.size(); i++) steps[i].set_step(int64_t(i) + 1);
  const DeviceCopy<gdn::AdamwStep> dev_steps(dev, steps);
  run_twice(
      [&] {
        for (size_t i = 0; i < steps.size(); i++)
          gdn::adamw_update(dev, t.dev_master, t.dev_weights, t.dev_moment1, t.dev_moment2, t.dev_gradients,
                            t.range(), t.dev_spans, t.count, t.norm, dev_steps + i);
      },
      t.dev_master, t.dev_weights, t.dev_moment1, t.dev_moment2);
  for (const gdn::AdamwStep& now : steps)
    gdn::adamw_update(cpu, t.master.data(), weights.data(), t.moment1.data(), t.moment2.data(),
                      t.gradients.data(), t.range(), t.arena.spans.data(), t.count, &norm, &now);
  t.check("master", t.dev_master, t.master, 1e-6);
  t.check("first moment", t.dev_moment1, t.moment1, 1e-6);
  t.check("second moment", t.dev_moment2, t.moment2, 1e-6);
  t.check("weights", t.dev_weights, weights, kActTolerance);
}

TEST_CASE("cuda: sgd" * needs_gpu()) {
  Cuda dev;
  Reference cpu;
  INFO("seed " << seed());
  UpdateTest t(dev);
  gdn::SgdStep step;
  step.learning_rate = 0.1f;
  step.momentum = 0.9f;
  const double norm = 3;
  Numbers weights(t.arena.size);
  for (const float clip : {0.0f, 2.0f}) {
    step.clip = clip;
    const DeviceCopy<gdn::SgdStep> dev_step(dev, {step});
    Numbers master = t.master, moment = t.moment1;
    run_twice(
        [&] {
          for (int i = 0; i < 3; i++)
            gdn::sgd_update(dev, t.dev_master, t.dev_weights, t.dev_moment1, t.dev_gradients, t.range(),
                            t.dev_spans, t.count, t.norm, dev_step);
        },
        t.dev_master, t.dev_weights, t.dev_moment1);
    for (int i = 0; i < 3; i++)
      gdn::sgd_update(cpu, master.data(), weights.data(), moment.data(), t.gradients.data(), t.range(),
                      t.arena.spans.data(), t.count, &norm, &step);
    t.check("master", t.dev_master, master, 1e-6);
    t.check("moment", t.dev_moment1, moment, 1e-6);
    t.check("weights", t.dev_weights, weights, kActTolerance);
  }
}

TEST_CASE("cuda: a gradient that is not finite changes nothing" * needs_gpu()) {
  Cuda dev;
  INFO("seed " << seed());
  UpdateTest t(dev);
  const auto master = t.dev_master.elements(), moment1 = t.dev_moment1.elements(),
             moment2 = t.dev_moment2.elements();
  const auto weights = t.dev_weights.elements();
  const DeviceCopy<gdn::AdamwStep> adamw(dev, {gdn::AdamwStep{0.1f, 0.9f, 0.9f}});
  const DeviceCopy<gdn::SgdStep> sgd(dev, {gdn::SgdStep{0.1f, 0.9f}});
  for (const double bad :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    const Numbers gradients(9, bad);
    const Floats dev_gradients(dev, gradients);
    Doubles sums(dev, size_t(1));
    const gdn::ArenaRange all = {0, gdn::kArenaBlock};
    const DeviceCopy<gdn::ArenaRange> groups(dev, {all});
    const DeviceCopy<ParameterSpan> span(dev, {ParameterSpan{0, 9}});
    gdn::sum_of_squares(dev, sums, dev_gradients, all, span, 1);
    gdn::norm_of_sums(dev, t.norm, sums, groups, 1);
    gdn::adamw_update(dev, t.dev_master, t.dev_weights, t.dev_moment1, t.dev_moment2, t.dev_gradients,
                      t.range(), t.dev_spans, t.count, t.norm, adamw);
    gdn::sgd_update(dev, t.dev_master, t.dev_weights, t.dev_moment1, t.dev_gradients, t.range(), t.dev_spans,
                    t.count, t.norm, sgd);
    CHECK(t.dev_master.same_bits(master));
    CHECK(t.dev_moment1.same_bits(moment1));
    CHECK(t.dev_moment2.same_bits(moment2));
    CHECK(t.dev_weights.same_bits(weights));
  }
}

TEST_CASE("cuda: a loss that is not finite makes the norm NaN, another leaves it" * needs_gpu()) {
  Cuda dev;
  for (const double loss : {1e300, std::numeric_limits<double>::infinity(), std::nan("")}) {
    const Floats norm(dev, Numbers(1, 3));
    gdn::check_loss(dev, norm, Doubles(dev, Numbers(1, loss)));
    CHECK((norm.numbers()[0] == 3) == std::isfinite(loss));
    CHECK(std::isnan(norm.numbers()[0]) == !std::isfinite(loss));
  }
}

TEST_CASE("cuda: out of memory says what was asked for" * needs_gpu()) {
  Cuda dev;
  CHECK_THROWS_WITH_AS(dev.allocate(size_t(1) << 50, "a test", "ask for less"),
                       doctest::Contains("asked for a test"), std::runtime_error);
  CHECK(cudaGetLastError() == cudaSuccess);
}

}  // namespace
