// Tests of the C functions (gdn/library.h) on the CPU: every gradient against central differences in double,
// in chunks against token by token, tensors with strides, packed documents and states carried against what
// they are to equal to the bit, the mixer against the trainer's layers, refusals word by word, and calls from
// several threads at once.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "../cpu_layers.h"
#include "../library.h"
#include "../model_checkpoint.h"
#include "relative_error.h"

namespace {

template <class Real>
constexpr gdn_type kType = sizeof(Real) == 4 ? GDN_FLOAT32 : GDN_FLOAT64;

struct Random {
  std::mt19937_64 engine{7};
  template <class Real>
  std::vector<Real> array(size_t n, double low = -1, double high = 1) {
    std::vector<Real> out(n);
    for (Real& x : out) x = Real(float(low + (high - low) * std::ldexp(double(engine() >> 11), -53)));
    return out;
  }
};

// A row-major tensor with its strides.
template <class Real>
gdn_tensor dense(std::vector<Real>& x, const std::vector<int64_t>& shape) {
  gdn_tensor out = {x.data(), {}};
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    out.stride[i] = step;
    step *= shape[i];
  }
  REQUIRE(step == int64_t(x.size()));
  return out;
}

struct Size {
  int64_t batch, tokens;
  int heads_k, heads_v, dk, dv;
  std::vector<int64_t> cu_seqlens;
  int64_t sequences() const { return cu_seqlens.empty() ? batch : int64_t(cu_seqlens.size()) - 1; }
  std::vector<int64_t> keys() const { return {batch, tokens, heads_k, dk}; }
  std::vector<int64_t> values() const { return {batch, tokens, heads_v, dv}; }
  std::vector<int64_t> gates() const { return {batch, tokens, heads_v}; }
  std::vector<int64_t> states() const { return {sequences(), heads_v, dk, dv}; }
};

size_t count(const std::vector<int64_t>& shape) {
  size_t n = 1;
  for (int64_t size : shape) n *= size_t(size);
  return n;
}

// A call of the delta rule with all that it reads and writes.
template <class Real>
struct DeltaRule {
  Size size;
  bool normalized;
  std::map<std::string, std::vector<Real>> at;
  std::vector<unsigned char> saved;
  Real s = Real(0.625);

  DeltaRule(const Size& sizes, bool with_norm, double weakest = -0.5) : size(sizes), normalized(with_norm) {
    Random random;
    const auto put = [&](const char* name, const std::vector<int64_t>& shape, double low, double high) {
      at[name] = random.array<Real>(count(shape), low, high);
      at[std::string("d_") + name] = std::vector<Real>(count(shape), std::nan(""));
    };
    const double key = with_norm ? 1 : 1 / std::sqrt(double(size.dk));
    put("q", size.keys(), -key, key), put("k", size.keys(), -key, key), put("v", size.values(), -1, 1);
    put("g", size.gates(), weakest, 0), put("beta", size.gates(), 0, 2);
    put("initial_state", size.states(), -1, 1);
    at["d_o"] = random.array<Real>(count(size.values()));
    at["d_final_state"] = random.array<Real>(count(size.states()));
    at["o"] = std::vector<Real>(count(size.values()), std::nan(""));
    at["final_state"] = std::vector<Real>(count(size.states()), std::nan(""));
  }

  gdn_delta_rule call() {
    gdn_delta_rule x = {};
    x.size = sizeof x;
    x.type = kType<Real>;
    x.batch = size.batch, x.tokens = size.tokens;
    x.heads_k = size.heads_k, x.heads_v = size.heads_v, x.head_dim_k = size.dk, x.head_dim_v = size.dv;
    x.sequences = size.sequences();
    x.cu_seqlens = size.cu_seqlens.empty() ? nullptr : size.cu_seqlens.data();
    x.scale = s, x.normalized = normalized;
    x.q = dense(at["q"], size.keys()), x.k = dense(at["k"], size.keys()), x.v = dense(at["v"], size.values());
    x.g = dense(at["g"], size.gates()), x.beta = dense(at["beta"], size.gates());
    x.initial_state = dense(at["initial_state"], size.states());
    x.o = dense(at["o"], size.values()), x.final_state = dense(at["final_state"], size.states());
    x.d_o = dense(at["d_o"], size.values()), x.d_final_state = dense(at["d_final_state"], size.states());
    x.dq = dense(at["d_q"], size.keys()), x.dk = dense(at["d_k"], size.keys()),
    x.dv = dense(at["d_v"], size.values());
    x.dg = dense(at["d_g"], size.gates()), x.dbeta = dense(at["d_beta"], size.gates());
    x.d_initial_state = dense(at["d_initial_state"], size.states());
    size_t bytes = 0, scratch = 1;
    REQUIRE(gdn_delta_rule_bytes(&x, &bytes, &scratch) == 0);
    CHECK(scratch == 0);
    saved.resize(bytes);
    x.saved = saved.data();
    return x;
  }
  void run() {
    const gdn_delta_rule x = call();
    REQUIRE_MESSAGE(gdn_delta_rule_forward(&x) == 0, gdn_last_error());
    REQUIRE_MESSAGE(gdn_delta_rule_backward(&x) == 0, gdn_last_error());
  }
};

const char* const kInputs[] = {"q", "k", "v", "g", "beta", "initial_state"};
const char* const kResults[] = {"o", "final_state", "d_q", "d_k", "d_v", "d_g", "d_beta", "d_initial_state"};

// dx against the central differences of loss(), which reads x.
void check_gradient(const std::function<double()>& loss, std::vector<double>& x,
                    const std::vector<double>& dx) {
  std::vector<double> numeric(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    const double at = x[i], step = 1e-5;
    x[i] = at + step;
    const double above = loss();
    x[i] = at - step;
    numeric[i] = (above - loss()) / (2 * step);
    x[i] = at;
  }
  CHECK(gdn::relative_error(dx, numeric) <= 1e-6);
}

double weighted(const std::vector<double>& x, const std::vector<double>& weights) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); i++) sum += x[i] * weights[i];
  return sum;
}

const Size kPacked = {1, 140, 2, 4, 5, 3, {0, 1, 1, 66, 130, 140}};

}  // namespace

TEST_CASE("library: delta rule's gradients, of states too, are those of central differences") {
  for (const bool normalized : {false, true})
    for (const Size& size :
         {Size{2, 3, 1, 2, 3, 2, {}}, Size{1, 67, 1, 1, 2, 3, {}}, Size{1, 7, 1, 2, 3, 2, {0, 3, 3, 7}}}) {
      CAPTURE(normalized);
      CAPTURE(size.tokens);
      DeltaRule<double> x(size, normalized);
      x.run();
      auto results = x.at;
      for (const char* name : kInputs) {
        CAPTURE(name);
        const auto loss = [&] {
          const gdn_delta_rule call = x.call();
          REQUIRE(gdn_delta_rule_forward(&call) == 0);
          return weighted(x.at["o"], results["d_o"]) +
                 weighted(x.at["final_state"], results["d_final_state"]);
        };
        check_gradient(loss, x.at[name], results[std::string("d_") + name]);
      }
    }
}

TEST_CASE("library: the recurrence's gradients are those of the chunks, from and into states") {
  for (const bool normalized : {false, true}) {
    CAPTURE(normalized);
    DeltaRule<double> x(kPacked, normalized, -3);
    x.run();
    const auto chunks = x.at;
    const gdn_delta_rule call = x.call();
    REQUIRE(gdn_delta_rule_recurrent(&call) == 0);
    CHECK(gdn::relative_error(x.at["o"], chunks.at("o")) <= 1e-14);
    CHECK(gdn::relative_error(x.at["final_state"], chunks.at("final_state")) <= 1e-14);

    gdn::DeltaRuleCall<double> rule;
    rule.heads_k = 2, rule.heads_v = 4, rule.head_dim_k = 5, rule.head_dim_v = 3;
    rule.s = x.s, rule.normalized = normalized;
    rule.set_documents(kPacked.cu_seqlens.data(), kPacked.sequences());
    const auto tensor = [&](const char* name, int heads, int columns) {
      return gdn::Strided<double>{x.at[name].data(), int64_t(kPacked.tokens) * heads * columns,
                                  int64_t(heads) * columns, columns, 1};
    };
    const auto read = [&](const char* name, int heads, int columns) {
      const auto at = tensor(name, heads, columns);
      return gdn::Strided<const double>{at.data, at.row, at.token, at.head, at.element};
    };
    rule.q = read("q", 2, 5), rule.k = read("k", 2, 5), rule.v = read("v", 4, 3);
    rule.g = read("g", 4, 1), rule.beta = read("beta", 4, 1);
    rule.initial_state = gdn::dense_state<const double>(x.at["initial_state"].data(), 4, 5, 3);
    gdn::delta_rule_recurrent_backward<double>(
        rule,
        {tensor("d_q", 2, 5), tensor("d_k", 2, 5), tensor("d_v", 4, 3), tensor("d_g", 4, 1),
         tensor("d_beta", 4, 1), gdn::dense_state(x.at["d_initial_state"].data(), 4, 5, 3)},
        read("d_o", 4, 3), gdn::dense_state<const double>(x.at["d_final_state"].data(), 4, 5, 3));
    for (const char* name : kInputs) {
      CAPTURE(name);
      const std::string gradient = std::string("d_") + name;
      CHECK(gdn::relative_error(x.at[gradient], chunks.at(gradient)) <= 1e-13);
    }
  }
}

TEST_CASE_TEMPLATE("library: packed documents have the bits of each alone", Real, float, double) {
  DeltaRule<Real> packed(kPacked, true);
  packed.run();
  for (int64_t n = 0; n < kPacked.sequences(); n++) {
    CAPTURE(n);
    const int64_t first = kPacked.cu_seqlens[size_t(n)], tokens = kPacked.cu_seqlens[size_t(n) + 1] - first;
    DeltaRule<Real> alone({1, tokens, 2, 4, 5, 3, {}}, true);
    // the part of a tensor that belongs to the document
    const auto part = [&](const std::string& name, const std::vector<Real>& of, size_t size) {
      const bool state = name.find("state") != std::string::npos;
      const size_t each = state    ? size
                          : tokens ? size / size_t(tokens)
                                   : 0,
                   begin = size_t(state ? n : first) * each;
      return std::vector<Real>(of.begin() + std::ptrdiff_t(begin), of.begin() + std::ptrdiff_t(begin + size));
    };
    for (const char* name : {"q", "k", "v", "g", "beta", "initial_state", "d_o", "d_final_state"})
      alone.at[name] = part(name, packed.at[name], alone.at[name].size());
    alone.run();
    for (const char* name : kResults) {
      CAPTURE(name);
      CHECK(alone.at[name] == part(name, packed.at[name], alone.at[name].size()));
    }
  }
}

TEST_CASE("library: a sequence in two calls with the state between has the gradients of one") {
  const int64_t T = 128, cut = 64;
  DeltaRule<double> whole({1, T, 1, 2, 3, 4, {}}, false);
  whole.run();
  DeltaRule<double> early({1, cut, 1, 2, 3, 4, {}}, false), late = early;
  const auto piece = [&](DeltaRule<double>& to, size_t index) {
    for (const char* name : {"q", "k", "v", "g", "beta", "d_o"}) {
      const auto& from = whole.at[name];
      const auto half = std::ptrdiff_t(from.size() / 2);
      to.at[name].assign(from.begin() + std::ptrdiff_t(index) * half,
                         from.begin() + std::ptrdiff_t(index + 1) * half);
    }
  };
  piece(early, 0), piece(late, 1);
  early.at["initial_state"] = whole.at["initial_state"];
  gdn_delta_rule call = early.call();
  REQUIRE(gdn_delta_rule_forward(&call) == 0);
  late.at["initial_state"] = early.at["final_state"];
  late.at["d_final_state"] = whole.at["d_final_state"];
  late.run();
  early.at["d_final_state"] = late.at["d_initial_state"];
  call = early.call();
  REQUIRE(gdn_delta_rule_backward(&call) == 0);
  for (const char* name : {"o", "d_q", "d_k", "d_v", "d_g", "d_beta"}) {
    CAPTURE(name);
    std::vector<double> joined = early.at[name];
    joined.insert(joined.end(), late.at[name].begin(), late.at[name].end());
    CHECK(joined == whole.at[name]);
  }
  CHECK(late.at["final_state"] == whole.at["final_state"]);
  CHECK(early.at["d_initial_state"] == whole.at["d_initial_state"]);
}

TEST_CASE("library: tensors with any strides have the bits of dense ones") {
  const Size size = {2, 70, 2, 4, 5, 3, {}};
  DeltaRule<float> x(size, true);
  x.run();
  const auto dense_results = x.at;
  // The same numbers with the dimensions in the opposite order and a gap of one number after each.
  std::map<std::string, std::vector<float>> spread;
  const auto spread_out = [&](gdn_tensor& tensor, const std::string& name, std::vector<int64_t> shape) {
    shape.resize(4, 1);
    std::vector<float>& to = spread[name];
    to.assign(2 * count(shape), std::nanf(""));
    int64_t step = 2, strides[4];
    for (int i = 0; i < 4; i++) {
      strides[i] = step;
      step *= shape[size_t(i)];
    }
    const std::vector<float>& from = x.at[name];
    size_t at = 0;
    for (int64_t a = 0; a < shape[0]; a++)
      for (int64_t b = 0; b < shape[1]; b++)
        for (int64_t c = 0; c < shape[2]; c++)
          for (int64_t d = 0; d < shape[3]; d++)
            to[size_t(a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3])] = from[at++];
    tensor.data = to.data();
    std::copy_n(strides, 4, tensor.stride);
  };
  gdn_delta_rule call = x.call();
  spread_out(call.q, "q", size.keys()), spread_out(call.k, "k", size.keys()),
      spread_out(call.v, "v", size.values());
  spread_out(call.g, "g", size.gates()), spread_out(call.beta, "beta", size.gates());
  spread_out(call.initial_state, "initial_state", size.states());
  spread_out(call.d_o, "d_o", size.values()), spread_out(call.d_final_state, "d_final_state", size.states());
  std::map<std::string, gdn_tensor*> results = {
      {"o", &call.o},          {"final_state", &call.final_state},
      {"d_q", &call.dq},       {"d_k", &call.dk},
      {"d_v", &call.dv},       {"d_g", &call.dg},
      {"d_beta", &call.dbeta}, {"d_initial_state", &call.d_initial_state}};
  for (auto& [name, tensor] : results) {
    x.at[name].assign(x.at[name].size(), std::nanf(""));
    spread_out(*tensor, name,
               name.find("state") != std::string::npos ? size.states()
               : name == "o" || name == "d_v"          ? size.values()
               : name == "d_g" || name == "d_beta"     ? size.gates()
                                                       : size.keys());
  }
  REQUIRE(gdn_delta_rule_forward(&call) == 0);
  REQUIRE(gdn_delta_rule_backward(&call) == 0);
  for (auto& [name, tensor] : results) {
    CAPTURE(name);
    const bool state = name.find("state") != std::string::npos, value = name == "o" || name == "d_v";
    std::vector<int64_t> shape = state                               ? size.states()
                                 : value                             ? size.values()
                                 : name == "d_g" || name == "d_beta" ? size.gates()
                                                                     : size.keys();
    shape.resize(4, 1);
    std::vector<float> back;
    for (int64_t a = 0; a < shape[0]; a++)
      for (int64_t b = 0; b < shape[1]; b++)
        for (int64_t c = 0; c < shape[2]; c++)
          for (int64_t d = 0; d < shape[3]; d++)
            back.push_back(static_cast<float*>(tensor->data)[a * tensor->stride[0] + b * tensor->stride[1] +
                                                             c * tensor->stride[2] + d * tensor->stride[3]]);
    CHECK(back == dense_results.at(name));
    for (size_t i = 1; i < spread[name].size(); i += 2) REQUIRE(std::isnan(spread[name][i]));  // the gaps
  }
}

TEST_CASE("library: the recurrence may decode in place; what is not wanted is not needed") {
  const Size size = {2, 1, 1, 2, 4, 3, {}};
  DeltaRule<float> x(size, false);
  gdn_delta_rule call = x.call();
  REQUIRE(gdn_delta_rule_recurrent(&call) == 0);
  const auto o = x.at["o"], state = x.at["final_state"];
  call.final_state = call.initial_state;
  REQUIRE(gdn_delta_rule_recurrent(&call) == 0);
  CHECK(x.at["o"] == o);
  CHECK(x.at["initial_state"] == state);

  DeltaRule<float> y({1, 100, 1, 2, 4, 3, {}}, false);
  y.at["initial_state"].assign(y.at["initial_state"].size(), 0);
  y.at["d_final_state"].assign(y.at["d_final_state"].size(), 0);
  y.run();
  const auto with_zeros = y.at;
  call = y.call();
  call.initial_state = call.final_state = call.d_final_state = call.d_initial_state = {};
  REQUIRE(gdn_delta_rule_forward(&call) == 0);
  REQUIRE(gdn_delta_rule_backward(&call) == 0);
  for (const char* name : {"o", "d_q", "d_k", "d_v", "d_g", "d_beta"})
    CHECK(y.at[name] == with_zeros.at(name));
  call.saved = nullptr;
  y.at["o"].assign(y.at["o"].size(), 0);
  REQUIRE(gdn_delta_rule_forward(&call) == 0);
  CHECK(y.at["o"] == with_zeros.at("o"));
  call.initial_state = call.final_state = {};
  call.tokens = 0;
  CHECK(gdn_delta_rule_forward(&call) == 0);
}

TEST_CASE_TEMPLATE("library: golden vectors with states and documents", Real, float, double) {
  for (const char* name : {"documents", "long_memory", "beta_near_0"}) {
    CAPTURE(name);
    const gdn::SafetensorsFile file("gdn/tests/golden/delta_rule_" + std::string(name) + ".safetensors");
    const auto read = [&](const std::string& tensor) {
      std::vector<Real> out;
      for (const double x : gdn::stored_values<double>(file.at(tensor), file.path())) out.push_back(Real(x));
      return out;
    };
    const gdn::TensorView& documents = file.at("cu_seqlens");
    std::vector<int64_t> cu_seqlens;
    for (int64_t i = 0; i < documents.shape[0]; i++) {
      int32_t x;
      documents.read(&x, size_t(i) * sizeof x, sizeof x);
      cu_seqlens.push_back(x);
    }
    DeltaRule<Real> x({1, file.at("q").shape[1], 1, 2, 16, 32, cu_seqlens}, false);
    x.s = Real(0.25);
    for (const char* input : {"q", "k", "v", "g", "beta", "initial_state", "d_o", "d_final_state"})
      x.at[input] = read(input);
    x.run();
    const std::map<const char*, const char*> results = {
        {"o", "o"},          {"final_state", "final_state"},
        {"dq", "d_q"},       {"dk", "d_k"},
        {"dv", "d_v"},       {"dg", "d_g"},
        {"dbeta", "d_beta"}, {"d_initial_state", "d_initial_state"}};
    for (const auto& [stored, ours] : results) {
      CAPTURE(stored);
      CHECK(gdn::relative_error(x.at[ours], read(stored)) <= (sizeof(Real) == 8 ? 6e-8 : 2e-5));
    }
  }
}

TEST_CASE("library: the structs have the sizes that scripts/gdn_torch.py writes out: change both, and this") {
  CHECK(sizeof(gdn_delta_rule) == 752);
  CHECK(sizeof(gdn_mixer) == 312);
}

TEST_CASE("library: errors are one line with the value and what was expected") {
  DeltaRule<float> x({1, 8, 2, 4, 4, 3, {0, 3, 8}}, false);
  const auto error = [&](const std::function<void(gdn_delta_rule&)>& change,
                         int (*function)(const gdn_delta_rule*) = gdn_delta_rule_forward) {
    gdn_delta_rule call = x.call();
    change(call);
    CHECK(function(&call) == -1);
    return std::string(gdn_last_error());
  };
  const std::string f = "gdn_delta_rule_forward: ";
  CHECK(error([](auto& c) { c.size = 8; }) ==
        f + "a struct of 8 bytes; this library's has " + std::to_string(sizeof(gdn_delta_rule)));
  CHECK(error([](auto& c) { c.heads_v = 3; }) == f + "heads_v 3, expected a multiple of heads_k, 2");
  CHECK(error([](auto& c) { c.head_dim_k = 0; }) == f + "head_dim_k 0, expected at least 1");
  CHECK(error([](auto& c) { c.type = GDN_BFLOAT16; }) ==
        f + "type bfloat16 on the CPU, expected float32 or float64");
  CHECK(error([](auto& c) { c.type = 9; }) == f + "type 9, expected 0 to 3 (gdn_type)");
  CHECK(error([](auto& c) { c.device = 5; }) == f + "device 5, expected 0 (CPU) or 1 (CUDA)");
  CHECK(error([](auto& c) { c.q = {}; }) == f + "q is null");
  CHECK(error([](auto& c) { c.tokens = 9; }) ==
        f + "cu_seqlens ends with 8, expected the number of tokens, 9");
  CHECK(error([](auto& c) { c.batch = 2; }) == f + "batch 2 with cu_seqlens, expected 1");
  CHECK(error([](auto& c) { c.cu_seqlens = nullptr; }) ==
        f + "sequences 2 without cu_seqlens, expected the batch, 1");
  const int64_t falling[] = {0, 9, 8}, late[] = {1, 3, 8};
  CHECK(error([&](auto& c) { c.cu_seqlens = falling; }) ==
        f + "cu_seqlens[2] is 8 after 9, expected ascending numbers");
  CHECK(error([&](auto& c) { c.cu_seqlens = late; }) == f + "cu_seqlens[0] is 1, expected 0");
  CHECK(error([](auto& c) { c.saved = nullptr; }, gdn_delta_rule_backward) ==
        "gdn_delta_rule_backward: saved is null");
  CHECK(gdn_delta_rule_forward(nullptr) == -1);
  CHECK(std::string(gdn_last_error()) == f + "the struct is null");
}

TEST_CASE("library: calls from several threads at once, each with its own error") {
  DeltaRule<float> expected({2, 100, 2, 2, 8, 8, {}}, true);
  expected.run();
  std::vector<DeltaRule<float>> calls(4, DeltaRule<float>({2, 100, 2, 2, 8, 8, {}}, true));
  std::vector<std::string> errors(4);
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < calls.size(); i++)
    threads.emplace_back([&, i] {
      for (int n = 0; n < 20; n++) {
        gdn_delta_rule call = calls[i].call();
        if (gdn_delta_rule_forward(&call) != 0 || gdn_delta_rule_backward(&call) != 0) failures++;
        call.heads_v = 3 + 2 * int(i);
        if (gdn_delta_rule_forward(&call) == 0) failures++;
        errors[i] = gdn_last_error();
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  for (size_t i = 0; i < calls.size(); i++) {
    for (const char* name : kResults) CHECK(calls[i].at[name] == expected.at[name]);
    CHECK(errors[i] == "gdn_delta_rule_forward: heads_v " + std::to_string(3 + 2 * i) +
                           ", expected a multiple of heads_k, 2");
  }
}

TEST_CASE("library: short convolution, gradients of central differences, documents, pieces") {
  const int64_t B = 1, T = 9, C = 5;
  const std::vector<int64_t> cu_seqlens = {0, 2, 2, 3, 9};
  const int64_t N = int64_t(cu_seqlens.size()) - 1;
  Random random;
  std::vector<double> x = random.array<double>(size_t(T * C), -2, 2),
                      taps = random.array<double>(size_t(C) * 4), dy = random.array<double>(x.size()),
                      y(x.size()), dx(x.size()), dtaps(taps.size());
  gdn_short_conv call = {};
  call.size = sizeof call;
  call.type = GDN_FLOAT64;
  call.batch = B, call.tokens = T, call.channels = C;
  call.sequences = N, call.cu_seqlens = cu_seqlens.data();
  call.taps = taps.data(), call.dtaps = dtaps.data();
  call.x = dense(x, {B, T, C}), call.y = dense(y, {B, T, C}), call.dy = dense(dy, {B, T, C}),
  call.dx = dense(dx, {B, T, C});
  const auto loss = [&] {
    REQUIRE_MESSAGE(gdn_short_conv_forward(&call) == 0, gdn_last_error());
    return weighted(y, dy);
  };
  REQUIRE(gdn_short_conv_backward(&call) == 0);
  check_gradient(loss, x, dx);
  check_gradient(loss, taps, dtaps);

  // Against a sum over the taps, and the last document fed in two pieces.
  loss();
  for (int64_t t = 3; t < T; t++)
    for (int64_t c = 0; c < C; c++) {
      double u = 0;
      for (int64_t j = std::max<int64_t>(0, 6 - t); j < 4; j++)
        u += taps[size_t(c * 4 + j)] * x[size_t((t - 3 + j) * C + c)];
      CHECK(y[size_t(t * C + c)] == doctest::Approx(u / (1 + std::exp(-u))).epsilon(1e-14));
    }
  const std::vector<double> whole = y;
  std::vector<double> history(size_t(3 * C)), state;
  call.cu_seqlens = nullptr, call.sequences = 1;
  call.final_state = dense(history, {1, 3, C});
  const auto piece = [&](int64_t first, int64_t tokens) {
    call.tokens = tokens;
    call.x.data = &x[size_t(first * C)], call.y.data = &y[size_t(first * C)];
    REQUIRE(gdn_short_conv_forward(&call) == 0);
  };
  std::fill(y.begin() + 3 * C, y.end(), 0);
  piece(3, 2);
  call.initial_state = call.final_state;
  piece(5, 1), piece(6, 3);
  CHECK(y == whole);
  CHECK(history == std::vector<double>(x.end() - 3 * C, x.end()));
  CHECK(gdn_short_conv_backward(&call) == -1);
  CHECK(std::string(gdn_last_error()) ==
        "gdn_short_conv_backward: initial_state in a backward call, expected null");
  call.x.stride[2] = 2;
  CHECK(gdn_short_conv_forward(&call) == -1);
  CHECK(std::string(gdn_last_error()) ==
        "gdn_short_conv_forward: x has stride 2 in its last dimension, expected 1");
}

TEST_CASE("library: gated norm, gradients of central differences") {
  const int64_t R = 6;
  const int n = 5;
  Random random;
  std::vector<double> x = random.array<double>(size_t(R * n)), z = random.array<double>(x.size(), -3, 3),
                      weight = random.array<double>(size_t(n), 0.5, 1.5), dy = random.array<double>(x.size()),
                      y(x.size()), dx(x.size()), dz(x.size()), dweight(weight.size());
  gdn_gated_norm call = {};
  call.size = sizeof call;
  call.type = GDN_FLOAT64;
  call.rows = R, call.width = n, call.eps = 1e-2;
  call.weight = weight.data(), call.dweight = dweight.data();
  call.x = dense(x, {R, n}), call.z = dense(z, {R, n}), call.y = dense(y, {R, n});
  call.dy = dense(dy, {R, n}), call.dx = dense(dx, {R, n}), call.dz = dense(dz, {R, n});
  const auto loss = [&] {
    REQUIRE(gdn_gated_norm_forward(&call) == 0);
    return weighted(y, dy);
  };
  REQUIRE(gdn_gated_norm_backward(&call) == 0);
  check_gradient(loss, x, dx);
  check_gradient(loss, z, dz);
  check_gradient(loss, weight, dweight);
  loss();
  double squares = 0;
  for (int c = 0; c < n; c++) squares += x[size_t(c)] * x[size_t(c)];
  CHECK(y[2] ==
        doctest::Approx(weight[2] * x[2] / std::sqrt(squares / n + 1e-2) * z[2] / (1 + std::exp(-z[2])))
            .epsilon(1e-14));
}

TEST_CASE("library: mixer, gradients of central differences, documents alone") {
  const int64_t B = 1, T = 7;
  const int d = 4, Hk = 1, Hv = 2, dk = 2, dv = 3;
  const std::vector<int64_t> cu_seqlens = {0, 3, 7};
  Random random;
  std::map<std::string, std::vector<double>> at, gradient;
  const auto put = [&](const char* name, size_t n, double low, double high) {
    at[name] = random.array<double>(n, low, high);
    gradient[name].resize(n);
  };
  put("h", size_t(T) * d, -1, 1), put("w_q", Hk * dk * d, -1, 1), put("w_k", Hk * dk * d, -1, 1);
  put("w_v", Hv * dv * d, -1, 1), put("w_z", Hv * dv * d, -1, 1), put("w_a", Hv * d, -1, 1),
      put("w_b", Hv * d, -1, 1);
  put("taps", size_t(2 * Hk * dk + Hv * dv) * 4, -1, 1), put("A_log", Hv, -1, 1), put("dt_bias", Hv, -1, 1);
  put("w_norm", dv, 0.5, 1.5), put("w_o", size_t(d * Hv * dv), -1, 1);
  std::vector<double> y(size_t(T) * d), dy = random.array<double>(y.size());
  gdn_mixer call = {};
  call.size = sizeof call;
  call.type = GDN_FLOAT64;
  call.batch = B, call.tokens = T, call.sequences = 2, call.cu_seqlens = cu_seqlens.data();
  call.width = d, call.heads_k = Hk, call.heads_v = Hv, call.head_dim_k = dk, call.head_dim_v = dv;
  call.scale = 0.7, call.norm_eps = 1e-5, call.beta_max = 2;
  call.h = at["h"].data(), call.w_q = at["w_q"].data(), call.w_k = at["w_k"].data(),
  call.w_v = at["w_v"].data();
  call.w_z = at["w_z"].data(), call.w_a = at["w_a"].data(), call.w_b = at["w_b"].data(),
  call.taps = at["taps"].data();
  call.A_log = at["A_log"].data(), call.dt_bias = at["dt_bias"].data(), call.w_norm = at["w_norm"].data();
  call.w_o = at["w_o"].data(), call.y = y.data(), call.dy = dy.data();
  call.dh = gradient["h"].data(), call.dw_q = gradient["w_q"].data(), call.dw_k = gradient["w_k"].data();
  call.dw_v = gradient["w_v"].data(), call.dw_z = gradient["w_z"].data(), call.dw_a = gradient["w_a"].data();
  call.dw_b = gradient["w_b"].data(), call.dtaps = gradient["taps"].data(),
  call.dA_log = gradient["A_log"].data();
  call.ddt_bias = gradient["dt_bias"].data(), call.dw_norm = gradient["w_norm"].data(),
  call.dw_o = gradient["w_o"].data();
  REQUIRE_MESSAGE(gdn_mixer_backward(&call) == 0, gdn_last_error());
  const std::vector<double> whole = y;
  const auto loss = [&] {
    REQUIRE(gdn_mixer_forward(&call) == 0);
    return weighted(y, dy);
  };
  for (auto& [name, x] : at) {
    CAPTURE(name);
    check_gradient(loss, x, gradient[name]);
  }
  loss();
  CHECK(y == whole);
  call.cu_seqlens = nullptr, call.sequences = 1;  // the second document alone
  call.tokens = 4, call.h = &at["h"][3 * d];
  loss();
  CHECK(gdn::relative_error(y.data(), &whole[3 * d], 4 * d) <= 1e-14);
}
