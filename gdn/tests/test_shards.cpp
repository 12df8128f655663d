// Parameters and optimizer in shards, where the weights that the layers read are a rounded copy, as on a GPU:
// ranks are threads here, and the copy is the upper half of a float.
#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../communicator.h"
#include "../cpu_layers.h"
#include "../optimizer.h"
#include "../parameters.h"
#include "../random.h"
#include "rank_threads.h"

namespace gdn_tests {

struct Rounding : gdn::Cpu<float> {
  using act = uint16_t;
};

inline uint16_t upper_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return uint16_t(bits >> 16);
}

}  // namespace gdn_tests

namespace gdn {

template <>
class Exchange<gdn_tests::Rounding> : public gdn_tests::ThreadExchange {
 public:
  using ThreadExchange::ThreadExchange;
};

}  // namespace gdn

namespace gdn_tests {

using namespace gdn;

void round_weights(Rounding&, uint16_t* weights, const float* master, size_t n) {
  for (size_t i = 0; i < n; i++) weights[i] = upper_half(master[i]);
}
void adamw_update(Rounding& dev, float* master, uint16_t* weights, float* moment1, float* moment2,
                  const float* gradients, const ArenaRange& range, const ParameterSpan* spans, int count,
                  const float* norm, const AdamwStep* step) {
  Cpu<float>& cpu = dev;
  adamw_update(cpu, master, master, moment1, moment2, gradients, range, spans, count, norm, step);
  round_weights(dev, weights, master, range.size());
}
void sgd_update(Rounding& dev, float* master, uint16_t* weights, float* moment, const float* gradients,
                const ArenaRange& range, const ParameterSpan* spans, int count, const float* norm,
                const SgdStep* step) {
  Cpu<float>& cpu = dev;
  sgd_update(cpu, master, master, moment, gradients, range, spans, count, norm, step);
  round_weights(dev, weights, master, range.size());
}

namespace {

constexpr int kLeaves = 4, kSteps = 3;

// What a rank has at the end, by the tensors' names: weights that the layers read, and of its shard what it
// has.
struct Left {
  std::map<std::string, std::vector<uint16_t>> weights;
  std::map<std::string, std::vector<float>> vectors;               // master weights that all have
  std::map<std::string, std::map<size_t, float>> master, moments;  // of a tensor's elements
  std::vector<float> norms;
  double loss = 0;
};

// Three steps with gradients that are sums over four leaves, of which each rank has an equal share.
Left train(Together& all, int rank, OptimizerKind kind) {
  Rounding dev;
  ModelConfig config = make_config(64, 32, 3, 3, 0, 2, 50, Parametrization::mup);
  Parameters<Rounding> p(dev, config, rank, all.ranks);
  CHECK(p.whole() == (all.ranks == 1));
  p.allocate_gradients();
  p.initialize(5);
  OptimizerConfig settings;
  settings.kind = kind;
  settings.clip = 0.5f;
  Exchange<Rounding> exchange(all, rank);
  Optimizer<Rounding> optimizer(p, settings, all.ranks > 1 ? &exchange : nullptr);
  Left left;
  const int share = kLeaves / all.ranks;
  for (int step = 1; step <= kSteps; step++) {
    p.zero_gradients();
    const auto leaf = [&](int number, const Tensor& t, size_t i) {
      return float(random_normal(stream_key(uint64_t(100 * step + number), t.name), i));
    };
    for (const Tensor& t : p.table.tensors)
      for (size_t i = 0; i < t.size; i++) {
        std::vector<float> x;
        for (int l = rank * share; l < (rank + 1) * share; l++) x.push_back(leaf(l, t, i));
        p.gradients(t.offset)[i] = share == 4   ? (x[0] + x[1]) + (x[2] + x[3])
                                   : share == 2 ? x[0] + x[1]
                                                : x[0];
      }
    double loss = 0;
    for (int l = rank * share; l < (rank + 1) * share; l++) loss += 1 + l;
    typename Optimizer<Rounding>::Scalars scalars;
    optimizer.upload_scalars(scalars, step, 0.01);
    if (all.ranks > 1) {
      for (int g = 0; g < int(p.table.groups.size()); g++) optimizer.sum_gradients(g);
      optimizer.sum_loss(&loss);
    }
    optimizer.update(&loss);
    if (all.ranks > 1) optimizer.gather_weights();
    left.norms.push_back(*optimizer.device_norm());
    left.loss = loss;
  }
  for (const Tensor& t : p.table.tensors) {
    left.weights[t.name].assign(p.weights(t.offset), p.weights(t.offset) + t.size);
    if (!drawn_from_a_normal(t.cls))
      left.vectors[t.name].assign(p.master(t.offset), p.master(t.offset) + t.size);
    for (const ShardPart& part : p.shard)
      for (size_t i = 0; i < t.size; i++) {
        const size_t at = t.offset + i;
        if (at < part.range.begin || at >= part.range.end) continue;
        left.master[t.name][i] = p.master(part)[at - part.range.begin];
        left.moments[t.name][i] = optimizer.moment1(part.at)[at - part.range.begin];
      }
  }
  return left;
}

TEST_CASE(
    "shards: 2 and 4 ranks with rounded weights have the bits of 1, each its part of master weights and "
    "moments") {
  for (const OptimizerKind kind : {OptimizerKind::adamw, OptimizerKind::sgd}) {
    Together alone(1);
    const Left expected = train(alone, 0, kind);
    CHECK(expected.loss == 10);
    CHECK(expected.norms[0] > 0.5f);  // it is clipped
    for (const int ranks : {2, 4}) {
      CAPTURE(ranks);
      Together all(ranks);
      std::vector<Left> left(static_cast<size_t>(ranks));
      in_threads(ranks, [&](int r) { left[size_t(r)] = train(all, r, kind); });
      std::map<std::string, std::map<size_t, float>> master, moments;
      size_t numbers = 0;
      for (const Left& l : left) {
        CHECK(l.weights == expected.weights);
        CHECK(l.vectors == expected.vectors);
        CHECK(l.norms == expected.norms);
        CHECK(l.loss == expected.loss);
        for (const auto& [name, elements] : l.master) {
          master[name].insert(elements.begin(), elements.end());
          numbers += elements.size();
        }
        for (const auto& [name, elements] : l.moments) moments[name].insert(elements.begin(), elements.end());
      }
      CHECK(master == expected.master);
      CHECK(moments == expected.moments);
      size_t once = 0;  // no number is in two shards
      for (const auto& [name, elements] : expected.master) once += elements.size();
      CHECK(numbers == once);
    }
  }
}

}  // namespace
}  // namespace gdn_tests
