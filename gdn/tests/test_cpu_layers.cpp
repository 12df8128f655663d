// Tests of the CPU's layers (gdn/cpu_layers.h, cpu_delta_rule.h, cpu_gemm.h). A layer with its inputs is put
// into one form, Layer, and layers() lists all of them in several shapes. Every one must
//   have the gradients that central differences in double find, for all inputs and parameters;
//   give in float what it gives in double;
//   give the same bits with any number of threads.
// Besides: the gated delta rule in chunks against the recurrence, feeding a sequence in pieces, matrix
// products against three loops, and the optimizers against PyTorch's documented algorithms, number by number.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <doctest/doctest.h>

#include "../cpu_layers.h"
#include "relative_error.h"

namespace {

using namespace gdn;

// ---- arrays -----------------------------------------------------------------------------------------------

template <class Real>
using Array = std::vector<Real>;

template <class Real>
using Tensors = std::map<std::string, Array<Real>>;

template <class Real>
Cpu<Real> cpu;

// Numbers that float represents, so that the layers in float and in double see the same.
struct Random {
  std::mt19937_64 engine;

  explicit Random(int seed = 1) : engine(seed) {}
  double uniform(double low, double high) {
    return static_cast<float>(low + (high - low) * std::ldexp(double(engine() >> 11), -53));
  }
  template <class Real>
  Array<Real> array(size_t n, double low = -1, double high = 1) {
    Array<Real> out(n);
    for (Real& x : out) x = Real(uniform(low, high));
    return out;
  }
  // [rows, width], every row of length 1
  template <class Real>
  Array<Real> unit_rows(int rows, int width) {
    Array<Real> out = array<Real>(rows * width);
    for (int m = 0; m < rows; m++) {
      double squares = 0;
      for (int c = 0; c < width; c++) squares += double(out[m * width + c]) * double(out[m * width + c]);
      for (int c = 0; c < width; c++)
        out[m * width + c] = static_cast<float>(double(out[m * width + c]) / std::sqrt(squares));
    }
    return out;
  }
};

// What a layer must overwrite, or must not read.
template <class Real>
Array<Real> unset(size_t n) {
  return Array<Real>(n, std::numeric_limits<Real>::quiet_NaN());
}

template <class Real>
bool all_nan(const Array<Real>& a) {
  return std::all_of(a.begin(), a.end(), [](Real x) { return std::isnan(x); });
}

template <class Real>
bool all_zero(const Array<Real>& a) {
  return std::all_of(a.begin(), a.end(), [](Real x) { return x == 0; });
}

// A gradient that a layer adds to: does not start at zero.
template <class Real>
struct Accumulator {
  Array<Real> start, value;

  explicit Accumulator(size_t n) : start(Random(2).array<Real>(n, 0.25, 0.75)), value(start) {}
  Real* data() { return value.data(); }
  Array<Real> added() const {
    Array<Real> out = value;
    for (size_t i = 0; i < out.size(); i++) out[i] -= start[i];
    return out;
  }
};

// Columns [first, first + count) of `whole` [rows, stride].
template <class Real>
Array<Real> columns(const Array<Real>& whole, int stride, int first, int count) {
  Array<Real> out;
  for (size_t row = 0; row < whole.size(); row += stride)
    out.insert(out.end(), &whole[row] + first, &whole[row] + first + count);
  return out;
}

// Writes `part` [rows, count] into `whole` [rows, stride] at column `first`.
template <class Real>
void put_columns(Array<Real>& whole, int stride, int first, const Array<Real>& part) {
  const size_t rows = whole.size() / stride, count = part.size() / rows;
  for (size_t m = 0; m < rows; m++)
    std::copy_n(part.begin() + m * count, count, whole.begin() + m * stride + first);
}

// Tokens [first, first + count) of every sequence of `all` [batch, tokens, ...].
template <class Real>
Array<Real> tokens_of(const Array<Real>& all, int batch, int tokens, int first, int count) {
  const int row = int(all.size()) / (batch * tokens);
  return columns(all, tokens * row, first * row, count * row);
}

// Differences of gradients that vanish are measured against this.
constexpr double kVanishing = 1e-6;

template <class A, class B>
void check_close(const Tensors<A>& a, const Tensors<B>& b, double tolerance) {
  REQUIRE(a.size() == b.size());
  for (const auto& tensor : a) {
    INFO("tensor " << tensor.first);
    CHECK(relative_error(tensor.second, b.at(tensor.first), kVanishing) <= tolerance);
  }
}

// The number of OpenMP threads for as long as it lives. Where a test makes many small calls, one is fastest.
class Threads {
 public:
  explicit Threads(int count) { set(count); }
  ~Threads() { set(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
#ifdef _OPENMP
  void set(int count) { omp_set_num_threads(count); }
  int before_ = omp_get_max_threads();
#else
  void set(int) {}
  int before_ = 1;
#endif
};

// ---- layers -----------------------------------------------------------------------------------------------

// A layer as a function of named tensors. forward returns the outputs and leaves in `saved` what backward
// needs; backward returns the gradient of every input.
template <class Real>
struct Layer {
  std::string name;
  Tensors<Real> inputs;
  std::function<Tensors<Real>(const Tensors<Real>& in, Tensors<Real>& saved)> forward;
  std::function<Tensors<Real>(const Tensors<Real>& in, const Tensors<Real>& saved,
                              const Tensors<Real>& d_out)>
      backward;
};

// Rows sorted by token, ties in ascending order.
Array<int32_t> order_by_token(const Array<int32_t>& tokens) {
  Array<int32_t> order(tokens.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
  return order;
}

template <class Real>
Layer<Real> embedding_layer(int rows, int width, int vocab) {
  Random random;
  Array<int32_t> tokens(rows);
  for (int32_t& token : tokens) token = int32_t(random.engine() % vocab);
  const auto forward = [=](const auto& in, auto&) {
    Array<Real> x = unset<Real>(rows * width);
    embedding_forward(cpu<Real>, x.data(), in.at("w_emb").data(), tokens.data(), rows, width);
    return Tensors<Real>{{"x", x}};
  };
  const auto backward = [=](const auto& in, const auto&, const auto& d_out) {
    Accumulator<Real> dw(in.at("w_emb").size());
    embedding_backward(cpu<Real>, dw.data(), d_out.at("x").data(), tokens.data(),
                       order_by_token(tokens).data(), rows, width, nullptr);
    return Tensors<Real>{{"w_emb", dw.added()}};
  };
  return {"embedding", {{"w_emb", random.array<Real>(vocab * width)}}, forward, backward};
}

template <class Real>
Layer<Real> rmsnorm_layer(int rows, int width) {
  const auto forward = [=](const auto& in, auto& saved) {
    Array<Real> h = unset<Real>(rows * width), rstd = unset<Real>(rows);
    rmsnorm_forward(cpu<Real>, h.data(), rstd.data(), in.at("x").data(), in.at("w").data(), rows, width);
    saved["rstd"] = rstd;
    saved["h"] = h;
    return Tensors<Real>{{"h", h}};
  };
  const auto backward = [=](const auto& in, const auto& saved, const auto& d_out) {
    Accumulator<Real> dx(rows * width), dw(width);
    Array<Real> h = d_out.at("h");  // in the place of its gradient
    rmsnorm_backward(cpu<Real>, dx.data(), dw.data(), h.data(), h.data(), in.at("x").data(),
                     saved.at("rstd").data(), in.at("w").data(), rows, width, nullptr);
    CHECK(h == saved.at("h"));
    return Tensors<Real>{{"x", dx.added()}, {"w", dw.added()}};
  };
  Random random;
  return {"rmsnorm",
          {{"x", random.array<Real>(rows * width)}, {"w", random.array<Real>(width, 0.5, 1.5)}},
          forward,
          backward};
}

// The residual stream goes on past the norm: dx starts as the gradient of x_out.
template <class Real>
Layer<Real> residual_rmsnorm_layer(int rows, int width) {
  const auto forward = [=](const auto& in, auto& saved) {
    Array<Real> x_out = unset<Real>(rows * width), h = x_out, rstd = unset<Real>(rows);
    residual_rmsnorm_forward(cpu<Real>, x_out.data(), h.data(), rstd.data(), in.at("x").data(),
                             in.at("branch").data(), in.at("w").data(), rows, width);
    saved["x_out"] = x_out;
    saved["rstd"] = rstd;
    return Tensors<Real>{{"x_out", x_out}, {"h", h}};
  };
  const auto backward = [=](const auto& in, const auto& saved, const auto& d_out) {
    Array<Real> dx = d_out.at("x_out");
    Accumulator<Real> dw(width);
    rmsnorm_backward(cpu<Real>, dx.data(), dw.data(), static_cast<Real*>(nullptr), d_out.at("h").data(),
                     saved.at("x_out").data(), saved.at("rstd").data(), in.at("w").data(), rows, width,
                     nullptr);
    return Tensors<Real>{{"x", dx}, {"branch", dx}, {"w", dw.added()}};
  };
  Random random;
  return {"residual rmsnorm",
          {{"x", random.array<Real>(rows * width)},
           {"branch", random.array<Real>(rows * width)},
           {"w", random.array<Real>(width, 0.5, 1.5)}},
          forward,
          backward};
}

template <class Real>
Layer<Real> linear_layer(int rows, int out, int in_width, Real scale) {
  const auto forward = [=](const auto& in, auto&) {
    Array<Real> y = unset<Real>(rows * out);
    linear_forward(cpu<Real>, y.data(), in.at("x").data(), in.at("w").data(), rows, out, in_width, scale);
    return Tensors<Real>{{"y", y}};
  };
  const auto backward = [=](const auto& in, const auto&, const auto& d_out) {
    const Real* dy = d_out.at("y").data();
    Array<Real> dx = unset<Real>(rows * in_width);
    Accumulator<Real> dw(out * in_width);
    linear_backward_input(cpu<Real>, dx.data(), dy, in.at("w").data(), rows, out, in_width, scale);
    linear_backward_weight(cpu<Real>, dw.data(), dy, in.at("x").data(), rows, out, in_width, scale);
    return Tensors<Real>{{"x", dx}, {"w", dw.added()}};
  };
  Random random;
  return {"linear",
          {{"x", random.array<Real>(rows * in_width)}, {"w", random.array<Real>(out * in_width)}},
          forward,
          backward};
}

// The mixer's layers see their own columns of proj; the others are NaN, and must stay NaN in dproj.
using Positions = std::vector<int32_t>;  // none: documents are not masked

inline const int32_t* data_or_null(const Positions& position) {
  return position.empty() ? nullptr : position.data();
}

template <class Real>
Layer<Real> short_conv_layer(const MixerShape& shape, const Positions& position = {}) {
  const int M = shape.rows(), C = shape.conv_channels(), P = shape.columns();
  const auto forward = [=](const auto& in, auto& saved) {
    Array<Real> proj = unset<Real>(M * P), qkv = unset<Real>(M * C);
    Array<Real> rnorm = unset<Real>(M * 2 * shape.heads_k);
    put_columns(proj, P, 0, in.at("proj"));
    short_conv_forward(cpu<Real>, qkv.data(), rnorm.data(), proj.data(), in.at("taps").data(),
                       static_cast<Real*>(nullptr), shape, data_or_null(position));
    saved["proj"] = proj;
    saved["rnorm"] = rnorm;
    return Tensors<Real>{{"qkv", qkv}};
  };
  const auto backward = [=](const auto& in, const auto& saved, const auto& d_out) {
    Array<Real> dproj = unset<Real>(M * P), dqkv = d_out.at("qkv");
    Accumulator<Real> dtaps(C * kConvTaps);
    short_conv_backward(cpu<Real>, dproj.data(), dtaps.data(), dqkv.data(), saved.at("rnorm").data(),
                        saved.at("proj").data(), in.at("taps").data(), shape, nullptr,
                        data_or_null(position));
    CHECK(all_nan(columns(dproj, P, C, P - C)));
    return Tensors<Real>{{"proj", columns(dproj, P, 0, C)}, {"taps", dtaps.added()}};
  };
  Random random;
  return {(position.empty() ? "short conv, T = " : "short conv of documents, T = ") +
              std::to_string(shape.tokens),
          {{"proj", random.array<Real>(M * C, -2, 2)}, {"taps", random.array<Real>(C * kConvTaps)}},
          forward,
          backward};
}

template <class Real>
Layer<Real> gates_layer(const MixerShape& shape, Real beta_max, double largest_a,
                        const Positions& position = {}) {
  const int M = shape.rows(), H = shape.heads_v, P = shape.columns();
  const int A = shape.a_column(), B = shape.b_column();
  const auto forward = [=](const auto& in, auto& saved) {
    Array<Real> proj = unset<Real>(M * P), g = unset<Real>(M * H), beta = g;
    put_columns(proj, P, A, in.at("a"));
    put_columns(proj, P, B, in.at("b"));
    gates_forward(cpu<Real>, g.data(), beta.data(), proj.data(), in.at("A_log").data(),
                  in.at("dt_bias").data(), shape, beta_max, data_or_null(position));
    saved["proj"] = proj;
    saved["g"] = g;
    saved["beta"] = beta;
    return Tensors<Real>{{"g", g}, {"beta", beta}};
  };
  const auto backward = [=](const auto& in, const auto& saved, const auto& d_out) {
    Array<Real> dproj = unset<Real>(M * P);
    Accumulator<Real> dA_log(H), ddt_bias(H);
    gates_backward(cpu<Real>, dproj.data(), dA_log.data(), ddt_bias.data(), d_out.at("g").data(),
                   d_out.at("beta").data(), saved.at("g").data(), saved.at("beta").data(),
                   saved.at("proj").data(), in.at("A_log").data(), in.at("dt_bias").data(), shape, beta_max,
                   nullptr, data_or_null(position));
    CHECK(all_nan(columns(dproj, P, 0, A)));
    CHECK(all_zero(columns(dproj, P, B + H, P - B - H)));
    return Tensors<Real>{{"a", columns(dproj, P, A, H)},
                         {"b", columns(dproj, P, B, H)},
                         {"A_log", dA_log.added()},
                         {"dt_bias", ddt_bias.added()}};
  };
  Random random;
  return {"gates, |a| up to " + std::to_string(largest_a),
          {{"a", random.array<Real>(M * H, -largest_a, largest_a)},
           {"b", random.array<Real>(M * H, -3, 3)},
           {"A_log", random.array<Real>(H, -2, std::log(16.0))},
           {"dt_bias", random.array<Real>(H, -7, 1)}},
          forward,
          backward};
}

struct Interval {
  double low, high;
  std::string text() const { return "from " + std::to_string(low) + " to " + std::to_string(high); }
};

// With `in_chunks` false the token by token form, forward and backward.
template <class Real>
Layer<Real> gated_delta_rule_layer(const MixerShape& shape, Interval g, Interval beta,
                                   bool in_chunks = true) {
  const int M = shape.rows(), H = shape.heads_v, C = shape.conv_channels(), K = shape.key_dim();
  const int dk = shape.head_dim_k, dv = shape.head_dim_v;
  const Real s = Real(0.625);
  const auto forward = [=](const auto& in, auto& saved) {
    Array<Real> qkv = unset<Real>(M * C), o = unset<Real>(M * H * dv);
    put_columns(qkv, C, 0, in.at("q"));
    put_columns(qkv, C, K, in.at("k"));
    put_columns(qkv, C, 2 * K, in.at("v"));
    const Real *log_decay = in.at("g").data(), *write = in.at("beta").data();
    if (in_chunks) {
      Array<Real> kept = unset<Real>(gated_delta_rule_saved_bytes(cpu<Real>, shape) / sizeof(Real));
      gated_delta_rule_forward(cpu<Real>, o.data(), kept.data(), qkv.data(), log_decay, write, shape, s,
                               nullptr);
      saved["kept"] = kept;
    } else {
      Array<Real> state(shape.batch * H * dk * dv);
      gated_delta_rule_recurrent(cpu<Real>, o.data(), state.data(), qkv.data(), log_decay, write, shape, s);
    }
    saved["qkv"] = qkv;
    return Tensors<Real>{{"o", o}};
  };
  const auto backward = [=](const auto& in, const auto& saved, const auto& d_out) {
    Array<Real> dqkv = unset<Real>(M * C), dg = unset<Real>(M * H), dbeta = dg;
    const Real *qkv = saved.at("qkv").data(), *log_decay = in.at("g").data(), *write = in.at("beta").data();
    if (in_chunks)
      gated_delta_rule_backward(cpu<Real>, dqkv.data(), dg.data(), dbeta.data(), d_out.at("o").data(),
                                saved.at("kept").data(), qkv, log_decay, write, shape, s, nullptr);
    else
      gated_delta_rule_recurrent_backward(cpu<Real>, dqkv.data(), dg.data(), dbeta.data(),
                                          d_out.at("o").data(), qkv, log_decay, write, shape, s);
    return Tensors<Real>{{"q", columns(dqkv, C, 0, K)},
                         {"k", columns(dqkv, C, K, K)},
                         {"v", columns(dqkv, C, 2 * K, H * dv)},
                         {"g", dg},
                         {"beta", dbeta}};
  };
  Random random;
  return {
      "gated delta rule, T = " + std::to_string(shape.tokens) + ", g " + g.text() + ", beta " + beta.text(),
      {{"q", random.unit_rows<Real>(M * shape.heads_k, dk)},
       {"k", random.unit_rows<Real>(M * shape.heads_k, dk)},
       {"v", random.array<Real>(M * H * dv)},
       {"g", random.array<Real>(M * H, g.low, g.high)},
       {"beta", random.array<Real>(M * H, beta.low, beta.high)}},
      forward,
      backward};
}

template <class Real>
Layer<Real> output_norm_layer(const MixerShape& shape) {
  const int M = shape.rows(), V = shape.value_dim(), P = shape.columns(), Z = shape.z_column();
  const auto forward = [=](const auto& in, auto& saved) {
    Array<Real> proj = unset<Real>(M * P), y = unset<Real>(M * V);
    Array<Real> rstd = unset<Real>(M * shape.heads_v);
    put_columns(proj, P, Z, in.at("z"));
    output_norm_forward(cpu<Real>, y.data(), rstd.data(), in.at("o").data(), proj.data(), in.at("w_o").data(),
                        shape);
    saved["proj"] = proj;
    saved["rstd"] = rstd;
    saved["y"] = y;
    return Tensors<Real>{{"y", y}};
  };
  const auto backward = [=](const auto& in, const auto& saved, const auto& d_out) {
    Array<Real> d_o = d_out.at("y"), dproj = unset<Real>(M * P), y = unset<Real>(M * V);
    Accumulator<Real> dw_o(shape.head_dim_v);
    output_norm_backward(cpu<Real>, d_o.data(), dproj.data(), dw_o.data(), y.data(), d_o.data(),
                         in.at("o").data(), saved.at("rstd").data(), saved.at("proj").data(),
                         in.at("w_o").data(), shape, nullptr);
    CHECK(y == saved.at("y"));
    CHECK(all_nan(columns(dproj, P, 0, Z)));
    CHECK(all_nan(columns(dproj, P, Z + V, P - Z - V)));
    return Tensors<Real>{{"o", d_o}, {"z", columns(dproj, P, Z, V)}, {"w_o", dw_o.added()}};
  };
  Random random;
  return {"output norm",
          {{"o", random.array<Real>(M * V)},
           {"z", random.array<Real>(M * V, -3, 3)},
           {"w_o", random.array<Real>(shape.head_dim_v, 0.5, 1.5)}},
          forward,
          backward};
}

template <class Real>
Layer<Real> swiglu_layer(int rows, int inner) {
  const auto forward = [=](const auto& in, auto& saved) {
    Array<Real> out = unset<Real>(rows * inner);
    swiglu_forward(cpu<Real>, out.data(), in.at("gate_up").data(), rows, inner);
    saved["out"] = out;
    return Tensors<Real>{{"out", out}};
  };
  const auto backward = [=](const auto& in, const auto& saved, const auto& d_out) {
    Array<Real> dgate_up = unset<Real>(rows * 2 * inner), out = d_out.at("out");
    swiglu_backward(cpu<Real>, dgate_up.data(), out.data(), out.data(), in.at("gate_up").data(), rows, inner);
    CHECK(out == saved.at("out"));
    return Tensors<Real>{{"gate_up", dgate_up}};
  };
  return {"swiglu", {{"gate_up", Random().array<Real>(rows * 2 * inner, -4, 4)}}, forward, backward};
}

// The output is the sum of the losses, so that its gradient is the one factor that dlogits_scale is. Every
// third target is ignored; the padding holds the largest logits of all.
template <class Real>
Layer<Real> cross_entropy_layer(int rows, int vocab, int padded) {
  Random random;
  Array<int32_t> targets(rows);
  for (int m = 0; m < rows; m++) targets[m] = m % 3 == 2 ? -1 : int32_t(random.engine() % vocab);
  Array<Real> logits = random.array<Real>(rows * padded, -5, 5);
  put_columns(logits, padded, vocab, random.array<Real>(rows * (padded - vocab), 100, 200));
  const auto forward = [=](const auto& in, auto&) {
    Array<Real> untouched = in.at("logits"), losses = unset<Real>(rows);
    double total = 0;
    softmax_cross_entropy(cpu<Real>, untouched.data(), losses.data(), targets.data(), rows, vocab, padded,
                          Real(0));
    sum_losses(cpu<Real>, &total, losses.data(), rows);
    CHECK(untouched == in.at("logits"));
    return Tensors<Real>{{"losses", {Real(total)}}};
  };
  const auto backward = [=](const auto& in, const auto&, const auto& d_out) {
    Array<Real> dlogits = in.at("logits"), losses = unset<Real>(rows);
    softmax_cross_entropy(cpu<Real>, dlogits.data(), losses.data(), targets.data(), rows, vocab, padded,
                          d_out.at("losses")[0]);
    CHECK(all_zero(columns(dlogits, padded, vocab, padded - vocab)));
    for (int m = 2; m < rows; m += 3)
      CHECK(all_zero(Array<Real>(&dlogits[m * padded], &dlogits[m * padded] + padded)));
    return Tensors<Real>{{"logits", dlogits}};
  };
  return {"softmax cross-entropy", {{"logits", logits}}, forward, backward};
}

template <class Real>
std::vector<Layer<Real>> layers() {
  const Interval decays{-0.1, -0.001}, writes{0.05, 0.95};  // from chunk to chunk 1/25 is left
  std::vector<Layer<Real>> list = {
      embedding_layer<Real>(23, 19, 7),
      rmsnorm_layer<Real>(1, 2),
      rmsnorm_layer<Real>(7, 37),
      residual_rmsnorm_layer<Real>(5, 19),
      linear_layer<Real>(1, 1, 1, Real(1)),
      linear_layer<Real>(7, 5, 11, Real(0.375)),
      gates_layer<Real>({2, 3, 1, 3, 2, 2}, Real(1), 3),
      gates_layer<Real>({2, 3, 1, 4, 2, 2}, Real(2), 30),
      gates_layer<Real>({2, 3, 1, 3, 2, 2}, Real(1), 3, {0, 1, 0, 0, 0, 1}),
      short_conv_layer<Real>({2, 9, 2, 4, 3, 5}, {0, 0, 1, 2, 3, 4, 0, 1, 0, 0, 1, 0, 1, 2, 0, 0, 0, 1}),
      output_norm_layer<Real>({2, 3, 1, 3, 2, 5}),
      output_norm_layer<Real>({1, 1, 1, 1, 1, 2}),
      swiglu_layer<Real>(5, 13),
      cross_entropy_layer<Real>(7, 13, 16),
      cross_entropy_layer<Real>(1, 5, 5),
  };
  for (int tokens : {1, 2, 3, 5})
    for (int batch : {1, 3}) list.push_back(short_conv_layer<Real>({batch, tokens, 2, 4, 3, 5}));
  for (int tokens : {1, 5, 64, 65, 130})
    list.push_back(gated_delta_rule_layer<Real>({1, tokens, 1, 2, 3, 2}, decays, writes));
  list.push_back(gated_delta_rule_layer<Real>({2, 5, 2, 6, 3, 4}, {-20, 0}, {0.05, 1.95}));
  return list;
}

template <class Real>
Tensors<Real> random_gradients(const Tensors<Real>& outputs) {
  Random random(3);
  Tensors<Real> out;
  for (const auto& tensor : outputs) out[tensor.first] = random.array<Real>(tensor.second.size());
  return out;
}

template <class Real>
struct Results {
  Tensors<Real> outputs, saved, gradients;
};

template <class Real>
Results<Real> run(const Layer<Real>& layer) {
  Results<Real> r;
  r.outputs = layer.forward(layer.inputs, r.saved);
  r.gradients = layer.backward(layer.inputs, r.saved, random_gradients(r.outputs));
  return r;
}

// ---- gradients against central differences ----------------------------------------------------------------

// dx against the central differences of <weights, f()>; f reads x and returns as many numbers as `weights`
// has.
template <class Function>
void check_gradient(Function f, Array<double>& x, const Array<double>& dx, const Array<double>& weights) {
  const double step = 1e-5;
  Array<double> numeric(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    const double at = x[i], above = at + step, below = at - step;
    x[i] = above;
    const Array<double> more = f();
    x[i] = below;
    const Array<double> less = f();
    x[i] = at;
    for (size_t j = 0; j < weights.size(); j++)
      numeric[i] += weights[j] * (more[j] - less[j]) / (above - below);
  }
  CHECK(relative_error(dx, numeric) <= 1e-6);
}

Array<double> concatenated(const Tensors<double>& tensors) {
  Array<double> out;
  for (const auto& tensor : tensors) out.insert(out.end(), tensor.second.begin(), tensor.second.end());
  return out;
}

TEST_CASE("cpu layers: every gradient is that of central differences") {
  const Threads one(1);
  for (const Layer<double>& layer : layers<double>()) {
    INFO(layer.name);
    const Results<double> results = run(layer);
    REQUIRE(results.gradients.size() == layer.inputs.size());
    Tensors<double> inputs = layer.inputs, ignored;
    for (auto& input : inputs) {
      INFO("gradient of " << input.first);
      check_gradient([&] { return concatenated(layer.forward(inputs, ignored)); }, input.second,
                     results.gradients.at(input.first), concatenated(random_gradients(results.outputs)));
    }
  }
}

TEST_CASE("cpu layers: float gives what double gives") {
  const Threads one(1);
  const auto in_float = layers<float>();
  const auto in_double = layers<double>();
  for (size_t i = 0; i < in_float.size(); i++) {
    INFO(in_float[i].name);
    const Results<float> a = run(in_float[i]);
    const Results<double> b = run(in_double[i]);
    check_close(a.outputs, b.outputs, 1e-5);
    check_close(a.gradients, b.gradients, 1e-5);
  }
}

// ---- the number of threads --------------------------------------------------------------------------------

// f() returns arrays by name; NaN (columns that a layer does not touch) equals NaN.
template <class Function>
void check_any_number_of_threads(Function f) {
  const auto with_threads = [&](int count) {
    const Threads threads(count);
    auto arrays = f();
    for (auto& array : arrays)
      for (auto& x : array.second)
        if (std::isnan(x)) x = 0;
    return arrays;
  };
  const auto one = with_threads(1);
  CHECK(with_threads(2) == one);
  CHECK(with_threads(3) == one);
}

TEST_CASE("cpu layers: the same bits with any number of threads") {
  std::vector<Layer<float>> list = layers<float>();
  for (auto& layer :
       {embedding_layer<float>(300, 50, 11), rmsnorm_layer<float>(300, 50),
        short_conv_layer<float>({3, 50, 2, 4, 5, 6}), gates_layer<float>({3, 50, 2, 4, 5, 6}, 1, 3),
        output_norm_layer<float>({3, 50, 2, 4, 5, 6}), cross_entropy_layer<float>(50, 300, 304),
        gated_delta_rule_layer<float>({3, 150, 2, 4, 5, 6}, {-1, 0}, {0, 1})})
    list.push_back(layer);
  for (const auto& layer : list) {
    INFO(layer.name);
    check_any_number_of_threads([&] {
      const Results<float> results = run(layer);
      Tensors<float> all = results.saved;
      for (const auto& tensor : results.outputs) all["output " + tensor.first] = tensor.second;
      for (const auto& tensor : results.gradients) all["gradient of " + tensor.first] = tensor.second;
      return all;
    });
  }
}

// The norm of all gradients, which begin at 0 of the arena.
template <class Real>
Real norm_of(Cpu<Real>& dev, const Array<Real>& gradients, const ParameterSpan* spans, int count) {
  const ArenaRange all = {0, (gradients.size() + kArenaBlock - 1) / kArenaBlock * kArenaBlock};
  std::vector<double> sums(all.end / kArenaBlock, -1);
  Real norm = -1;
  sum_of_squares(dev, sums.data(), gradients.data(), all, spans, count);
  norm_of_sums(dev, &norm, sums.data(), &all, 1);
  return norm;
}

TEST_CASE("cpu gemm, gradient norm, optimizers: the same bits with any number of threads") {
  const int m = 70, n = 300, k = 200, size = 300001;
  const auto a = Random().array<float>(m * k), b = Random(2).array<float>(k * n);
  const auto gradients = Random().array<float>(size);
  const ParameterSpan spans[] = {{0, 1003, 1.f, 0.1f, 3.f}, {1003, size - 1003, 0.5f, 0.f, 0.7f}};
  AdamwStep adamw;
  adamw.learning_rate = 0.01f, adamw.beta1 = 0.9f, adamw.beta2 = 0.95f, adamw.clip = 1;
  SgdStep sgd;
  sgd.learning_rate = 0.01f, sgd.momentum = 0.9f, sgd.clip = 1;
  check_any_number_of_threads([&] {
    Array<float> c = unset<float>(m * n), norm = unset<float>(1);
    cpu_gemm(false, false, m, n, k, 1.f, a.data(), k, b.data(), n, 0.f, c.data(), n);
    norm[0] = norm_of(cpu<float>, gradients, spans, 2);
    const ArenaRange all = {0, size_t(size)};
    auto master = gradients, weights = gradients, moment1 = gradients, moment2 = Array<float>(size, 0.5f);
    adamw_update(cpu<float>, master.data(), weights.data(), moment1.data(), moment2.data(), gradients.data(),
                 all, spans, 2, norm.data(), &adamw);
    sgd_update(cpu<float>, master.data(), weights.data(), moment1.data(), gradients.data(), all, spans, 2,
               norm.data(), &sgd);
    return Tensors<float>{{"c", c}, {"norm", norm}, {"master", master}};
  });
}

// ---- the gated delta rule ---------------------------------------------------------------------------------

struct DeltaRuleCase {
  int tokens;
  Interval g, beta;
};

const DeltaRuleCase kDeltaRuleCases[] = {
    {1, {-1, 0}, {0, 1}},
    {7, {-1, 0}, {0, 1}},
    {63, {-1, 0}, {0, 1}},
    {64, {-1, 0}, {0, 1}},
    {65, {-1, 0}, {0, 1}},
    {128, {-1, 0}, {0, 1}},
    {131, {-1, 0}, {0, 2}},
    {131, {-50, 0}, {0, 1}},      // strong decay
    {131, {-50, -50}, {0, 1}},    // and nothing else
    {131, {-0.1, 0}, {0, 1e-6}},  // hardly a write
    {131, {-0.1, 0}, {1 - 1e-6, 1}},
    {131, {-0.1, 0}, {2 - 1e-6, 2}},  // reflections
    {300, {-1e-3, 0}, {0, 1}},        // weak decay
    {300, {0, 0}, {0, 1}},            // none
};

TEST_CASE("gated delta rule: in chunks as token by token, outputs and gradients") {
  const Threads one(1);
  for (const DeltaRuleCase& test : kDeltaRuleCases) {
    const MixerShape shape{2, test.tokens, 2, 4, 7, 5};
    const auto chunked = gated_delta_rule_layer<double>(shape, test.g, test.beta);
    const auto recurrent = gated_delta_rule_layer<double>(shape, test.g, test.beta, false);
    INFO(chunked.name);
    const Results<double> a = run(chunked), b = run(recurrent);
    check_close(a.outputs, b.outputs, 1e-10);
    check_close(a.gradients, b.gradients, 1e-10);
    const Results<float> c = run(gated_delta_rule_layer<float>(shape, test.g, test.beta));
    check_close(c.outputs, a.outputs, 1e-4);
    check_close(c.gradients, a.gradients, 1e-4);
  }
}

TEST_CASE("gated delta rule: dg in chunks loses nothing under strong decay") {
  const Threads one(1);
  const MixerShape shape{2, 131, 2, 4, 16, 32};
  const Interval decay{-20, -5}, writes{0, 1};
  const auto exact = run(gated_delta_rule_layer<double>(shape, decay, writes, false)).gradients;
  const auto chunked = run(gated_delta_rule_layer<float>(shape, decay, writes)).gradients;
  check_close(Tensors<float>{{"g", chunked.at("g")}}, Tensors<double>{{"g", exact.at("g")}}, 2e-6);
}

// ---- sequences in pieces ----------------------------------------------------------------------------------

const int kPieces[] = {1, 1, 2, 5, 1, 5, 2, 2, 1, 3};

int pieces_total() { return std::accumulate(std::begin(kPieces), std::end(kPieces), 0); }

TEST_CASE("gated delta rule: a sequence in pieces, with the state carried") {
  MixerShape shape{2, pieces_total(), 2, 4, 3, 5};
  const int M = shape.rows(), H = shape.heads_v, row = shape.value_dim();
  Random random;
  const auto qkv = random.array<double>(M * shape.conv_channels(), -0.5, 0.5);
  const auto g = random.array<double>(M * H, -1, 0), beta = random.array<double>(M * H, 0, 1);
  const auto start = random.array<double>(shape.batch * H * shape.head_dim_k * shape.head_dim_v);
  auto whole = unset<double>(M * row), state = start;
  gated_delta_rule_recurrent(cpu<double>, whole.data(), state.data(), qkv.data(), g.data(), beta.data(),
                             shape, 0.5);

  auto carried = start;
  int first = 0;
  for (int count : kPieces) {
    const auto piece_of = [&](const Array<double>& all) {
      return tokens_of(all, shape.batch, shape.tokens, first, count);
    };
    MixerShape piece = shape;
    piece.tokens = count;
    auto o = unset<double>(piece.rows() * row);
    gated_delta_rule_recurrent(cpu<double>, o.data(), carried.data(), piece_of(qkv).data(),
                               piece_of(g).data(), piece_of(beta).data(), piece, 0.5);
    CHECK(o == piece_of(whole));
    first += count;
  }
  CHECK(carried == state);
}

TEST_CASE("short conv: a sequence in pieces, with the history carried") {
  MixerShape shape{2, pieces_total(), 1, 2, 3, 2};
  const int M = shape.rows(), C = shape.conv_channels(), P = shape.columns();
  Random random;
  const auto proj = random.array<double>(M * P), taps = random.array<double>(C * kConvTaps);
  auto whole = unset<double>(M * C), rnorm = unset<double>(M * 2);
  double* none = nullptr;
  short_conv_forward(cpu<double>, whole.data(), rnorm.data(), proj.data(), taps.data(), none, shape);

  const int kept = kConvTaps - 1;
  Array<double> history(shape.batch * kept * C);
  int first = 0;
  for (int count : kPieces) {
    const auto piece_of = [&](const Array<double>& all) {
      return tokens_of(all, shape.batch, shape.tokens, first, count);
    };
    MixerShape piece = shape;
    piece.tokens = count;
    auto qkv = unset<double>(piece.rows() * C), r = unset<double>(piece.rows() * 2);
    short_conv_forward(cpu<double>, qkv.data(), r.data(), piece_of(proj).data(), taps.data(), history.data(),
                       piece);
    CHECK(qkv == piece_of(whole));
    CHECK(r == piece_of(rnorm));
    first += count;
  }
  CHECK(history == tokens_of(columns(proj, P, 0, C), shape.batch, shape.tokens, shape.tokens - kept, kept));
}

TEST_CASE("residual rmsnorm: may add in place") {
  const int rows = 3, width = 7;
  const auto layer = residual_rmsnorm_layer<double>(rows, width);
  const auto outputs = run(layer).outputs;
  for (const char* place : {"x", "branch"}) {
    auto in = layer.inputs;
    auto h = unset<double>(rows * width), rstd = unset<double>(rows);
    residual_rmsnorm_forward(cpu<double>, in.at(place).data(), h.data(), rstd.data(), in.at("x").data(),
                             in.at("branch").data(), in.at("w").data(), rows, width);
    CHECK(in.at(place) == outputs.at("x_out"));
    CHECK(h == outputs.at("h"));
  }
}

// ---- scalar functions and the classifier ------------------------------------------------------------------

TEST_CASE("sigmoid, silu, softplus: neither overflow nor cancel") {
  for (float x : {-1000.f, -100.f, -1.f, 0.f, 1.f, 100.f, 1000.f}) {
    CAPTURE(x);
    CHECK(std::isfinite(silu(x)));
    CHECK(std::isfinite(silu_derivative(x)));
    CHECK(sigmoid(x) + sigmoid(-x) == doctest::Approx(1));
    CHECK(softplus(x) - softplus(-x) == doctest::Approx(x));
  }
  CHECK(softplus(-50.0) == doctest::Approx(std::exp(-50.0)));
  CHECK(sigmoid(-50.0) == doctest::Approx(std::exp(-50.0)));
}

TEST_CASE("softmax cross-entropy: losses in nats, far logits, ignored targets") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Array<int32_t> targets = {2, 0, 1, -1};
  Array<float> logits = {0, 0,    0, nan,  //
                         0, -1e4, 0, nan,  //
                         0, -1e4, 0, nan,  //
                         1, 2,    3, nan};
  Array<float> losses = unset<float>(4);
  softmax_cross_entropy(cpu<float>, logits.data(), losses.data(), targets.data(), 4, 3, 4, 2.f);
  CHECK(losses[0] == doctest::Approx(std::log(3.0)));
  CHECK(losses[1] == doctest::Approx(std::log(2.0)));
  CHECK(losses[2] == doctest::Approx(1e4 + std::log(2.0)));
  CHECK(losses[3] == 0);
  const float third = 2.f / 3;
  const Array<float> gradients = {third, third, third - 2, 0, -1, 0, 1, 0, 1, -2, 1, 0, 0, 0, 0, 0};
  CHECK(relative_error(logits, gradients) <= 1e-6);
}

// ---- matrix products --------------------------------------------------------------------------------------

// C = alpha op(A) op(B) + beta C, sums in double
template <class Real>
void three_loops(bool ta, bool tb, int m, int n, int k, Real alpha, const Real* a, int64_t lda, const Real* b,
                 int64_t ldb, Real beta, Real* c, int64_t ldc) {
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double sum = 0;
      for (int l = 0; l < k; l++)
        sum += double(a[ta ? l * lda + i : i * lda + l]) * double(b[tb ? j * ldb + l : l * ldb + j]);
      c[i * ldc + j] = Real(alpha * sum + (beta == 0 ? 0.0 : double(beta * c[i * ldc + j])));
    }
}

// cpu_gemm against three loops. The rows are longer than the matrices; between C's rows nothing is written.
template <class Real>
void check_gemm(int m, int n, int k, double tolerance) {
  Random random;
  for (bool ta : {false, true})
    for (bool tb : {false, true})
      for (Real beta : {Real(0), Real(1), Real(-0.5)}) {
        INFO("m " << m << ", n " << n << ", k " << k << ", transposed " << ta << tb << ", beta " << beta);
        const int64_t lda = (ta ? m : k) + 3, ldb = (tb ? k : n) + 2, ldc = n + 1;
        const auto a = random.array<Real>(lda * (ta ? k : m));
        const auto b = random.array<Real>(ldb * (tb ? n : k));
        Array<Real> start = unset<Real>(m * ldc);
        if (beta != 0) put_columns(start, int(ldc), 0, random.array<Real>(m * n));
        const auto product = [&](auto gemm) {
          Array<Real> c = start;
          gemm(ta, tb, m, n, k, Real(0.75), a.data(), lda, b.data(), ldb, beta, c.data(), ldc);
          CHECK(all_nan(columns(c, int(ldc), n, 1)));
          return columns(c, int(ldc), 0, n);
        };
        CHECK(relative_error(product(cpu_gemm<Real>), product(three_loops<Real>)) <= tolerance);
      }
}

TEST_CASE("cpu gemm: transposes, odd sizes, row strides, beta") {
  const Threads one(1);
  const int sizes[][3] = {{1, 1, 1},    {3, 5, 7},    {32, 256, 128}, {33, 257, 129}, {1, 300, 2},
                          {70, 1, 260}, {4, 40, 600}, {97, 300, 513}, {3100, 5, 4},   {5, 4200, 3}};
  for (const auto& size : sizes) {
    check_gemm<double>(size[0], size[1], size[2], 1e-14);
    check_gemm<float>(size[0], size[1], size[2], 1e-6);
  }
}

// ---- optimizers -------------------------------------------------------------------------------------------

// torch.optim.AdamW's documented algorithm for one number: gamma the learning rate, lambda the weight decay.
struct TorchAdamw {
  double theta, m = 0, v = 0;
  int t = 0;

  void step(double g, double gamma, double lambda, const AdamwStep& s) {
    const double beta1 = s.beta1, beta2 = s.beta2, epsilon = s.epsilon;
    t = t + 1;
    theta = theta - gamma * lambda * theta;
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    const double m_hat = m / (1 - std::pow(beta1, t)), v_hat = v / (1 - std::pow(beta2, t));
    theta = theta - gamma * m_hat / (std::sqrt(v_hat) + epsilon);
  }
};

// torch.optim.SGD's with nesterov, dampening 0.
struct TorchSgd {
  double theta, b = 0;
  int t = 0;

  void step(double g, double gamma, double lambda, const SgdStep& s) {
    const double mu = s.momentum;
    t = t + 1;
    g = g + lambda * theta;
    b = t > 1 ? mu * b + g : g;
    g = g + mu * b;
    theta = theta - gamma * g;
  }
};

// An arena with three tensors, and numbers between them that belong to none.
const ParameterSpan kSpans[] = {{2, 7, 1.f, 0.1f, 1.f}, {9, 20, 0.25f, 0.f, 4.f}, {31, 5, 3.f, 0.5f, 0.25f}};
constexpr size_t kArena = 40;

struct Arena {
  Array<double> master = Random(4).array<double>(kArena), weights = unset<double>(kArena);
  Array<double> moment1 = Array<double>(kArena), moment2 = Array<double>(kArena);

  void update(const double* gradients, const double* norm, const AdamwStep& step) {
    adamw_update(cpu<double>, master.data(), weights.data(), moment1.data(), moment2.data(), gradients,
                 {0, kArena}, kSpans, 3, norm, &step);
  }
  void update(const double* gradients, const double* norm, const SgdStep& step) {
    sgd_update(cpu<double>, master.data(), weights.data(), moment1.data(), gradients, {0, kArena}, kSpans, 3,
               norm, &step);
  }
  bool operator==(const Arena& other) const {
    return master == other.master && moment1 == other.moment1 && moment2 == other.moment2;
  }
};

void set_step(AdamwStep& step, int t) { step.set_step(t); }
void set_step(SgdStep&, int) {}

// Several steps, without clipping, with a bound that is sometimes reached, and with one always.
template <class Torch, class Step>
void check_optimizer(Step step) {
  for (float clip : {0.f, 2.5f, 0.125f}) {
    CAPTURE(clip);
    step.clip = clip;
    Step now = step;
    Arena arena;
    const Array<double> start = arena.master;
    std::vector<Torch> expected;
    for (double x : start) expected.push_back(Torch{x});
    Random random;
    for (int i = 0; i < 6; i++) {
      set_step(now, i + 1);
      now.learning_rate = step.learning_rate / (1 + i);  // a schedule
      const auto gradients = random.array<double>(kArena, -1.0 / (1 + i), 1.0 / (1 + i));
      double squares = 0;
      for (const ParameterSpan& span : kSpans)
        for (size_t p = span.offset; p < span.offset + span.size; p++)
          squares += span.norm_weight * gradients[p] * gradients[p];
      const double norm = norm_of(cpu<double>, gradients, kSpans, 3);
      CHECK(norm == doctest::Approx(std::sqrt(squares)).epsilon(1e-14));
      arena.update(gradients.data(), &norm, now);
      const double factor = clip == 0 ? 1 : std::min(1.0, double(clip) / std::sqrt(squares));
      for (const ParameterSpan& span : kSpans)
        for (size_t p = span.offset; p < span.offset + span.size; p++)
          expected[p].step(factor * gradients[p], double(now.learning_rate) * span.learning_rate_scale,
                           span.weight_decay, now);
    }
    Array<double> theta;
    for (const Torch& x : expected) theta.push_back(x.theta);
    CHECK(relative_error(arena.master, theta) <= 1e-14);
    for (size_t p = 0; p < kArena; p++) {
      if (expected[p].t > 0) {
        CHECK(arena.weights[p] == arena.master[p]);
        CHECK(arena.master[p] != start[p]);
      } else {
        CHECK(std::isnan(arena.weights[p]));
        CHECK(arena.master[p] == start[p]);
      }
    }

    const Arena before = arena;
    for (double norm : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
      arena.update(start.data(), &norm, now);
      CHECK(arena == before);
    }
  }
}

TEST_CASE("adamw: PyTorch's algorithm; nothing moves when the gradient is not finite") {
  AdamwStep step;
  step.learning_rate = 0.02f;
  step.beta1 = 0.9f;
  step.beta2 = 0.95f;
  step.epsilon = 1e-3f;  // large enough to see where it stands
  check_optimizer<TorchAdamw>(step);
}

TEST_CASE("sgd: PyTorch's algorithm with Nesterov momentum; nothing moves when the gradient is not finite") {
  SgdStep step;
  step.learning_rate = 0.02f;
  step.momentum = 0.9f;
  check_optimizer<TorchSgd>(step);
}

TEST_CASE("global norm: long arrays, none, and what is not finite") {
  auto gradients = Random().array<float>(200001);
  const auto norm = [&] {
    ParameterSpan all;
    all.size = gradients.size();
    return norm_of(cpu<float>, gradients, &all, 1);
  };
  long double squares = 0;
  for (float g : gradients) squares += static_cast<long double>(g) * g;
  CHECK(norm() == doctest::Approx(double(std::sqrt(squares))).epsilon(1e-6));
  gradients[150000] = std::numeric_limits<float>::infinity();
  CHECK(!std::isfinite(norm()));
  gradients[150000] = std::numeric_limits<float>::quiet_NaN();
  CHECK(!std::isfinite(norm()));
  gradients = {3e30f, -4e30f};  // their squares are no floats
  CHECK(norm() == doctest::Approx(5e30f));
  gradients.clear();
  CHECK(norm() == 0);
}

TEST_CASE("gradient norm and updates by ranges of the arena have the bits of the whole") {
  const size_t size = 5 * kArenaBlock;
  const auto gradients = Random().array<float>(size);
  const std::vector<ParameterSpan> spans = {
      {8, 1003, 1.f, 0.1f, 3.f},
      {1016, kArenaBlock, 2.f, 0.f, 1.f},
      {2 * kArenaBlock + 8, size - 2 * kArenaBlock - 100, 0.5f, 0.2f, 0.7f}};
  const int count = int(spans.size());
  AdamwStep adamw;
  adamw.learning_rate = 0.01f, adamw.beta1 = 0.9f, adamw.beta2 = 0.95f, adamw.clip = 1;
  SgdStep sgd;
  sgd.learning_rate = 0.01f, sgd.momentum = 0.9f, sgd.clip = 1;
  const auto all = [&](const std::vector<ArenaRange>& ranges) {
    Tensors<float> out;
    std::vector<double> sums(size / kArenaBlock, -1);
    for (const ArenaRange& range : ranges)
      sum_of_squares(cpu<float>, sums.data(), gradients.data(), range, spans.data(), count);
    const ArenaRange whole = {0, size};
    Array<float> norm(1);
    norm_of_sums(cpu<float>, norm.data(), sums.data(), &whole, 1);
    auto master = Random(3).array<float>(size), moment1 = Array<float>(size, 0.25f),
         moment2 = Array<float>(size, 0.5f), weights = master, momentum = moment1;
    for (const ArenaRange& range : ranges) {
      const size_t at = range.begin;
      adamw_update(cpu<float>, &master[at], &weights[at], &moment1[at], &moment2[at], &gradients[at], range,
                   spans.data(), count, norm.data(), &adamw);
      sgd_update(cpu<float>, &master[at], &weights[at], &momentum[at], &gradients[at], range, spans.data(),
                 count, norm.data(), &sgd);
    }
    return Tensors<float>{{"norm", norm},       {"master", master},   {"weights", weights},
                          {"moment1", moment1}, {"moment2", moment2}, {"momentum", momentum}};
  };
  const auto whole = all({{0, size}});
  CHECK(whole.at("norm")[0] > 0);
  CHECK(all({{2 * kArenaBlock, size}, {0, kArenaBlock}, {kArenaBlock, 2 * kArenaBlock}}) == whole);
  // zeros behind a group's end leave the sum as it is
  const std::vector<double> sums = {0.1, 0.2, 0.3}, padded = {0.1, 0.2, 0, 0, 0.3, 0};
  const ArenaRange groups[] = {{0, 2 * kArenaBlock}, {2 * kArenaBlock, 3 * kArenaBlock}},
                   padded_groups[] = {{0, 4 * kArenaBlock}, {4 * kArenaBlock, 6 * kArenaBlock}};
  double a = 0, b = 1;
  norm_of_sums(cpu<double>, &a, sums.data(), groups, 2);
  norm_of_sums(cpu<double>, &b, padded.data(), padded_groups, 2);
  CHECK(a == b);
}

TEST_CASE("check loss: a loss that is not finite makes the norm NaN, another leaves it") {
  const double losses[] = {1e300, std::numeric_limits<double>::infinity(),
                           std::numeric_limits<double>::quiet_NaN()};
  for (double loss : losses) {
    float norm = 3;
    check_loss(cpu<float>, &norm, &loss);
    CHECK((norm == 3) == std::isfinite(loss));
    CHECK(std::isnan(norm) == !std::isfinite(loss));
  }
}

TEST_CASE("round weights: a copy on the CPU") {
  const auto master = Random().array<float>(9);
  auto weights = unset<float>(9);
  round_weights(cpu<float>, weights.data(), master.data(), 9);
  CHECK(weights == master);
  round_weights(cpu<float>, weights.data(), weights.data(), 9);
  CHECK(weights == master);
}

}  // namespace
