// Small models and batches for the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpu_layers.h"
#ifdef GDN_CUDA
#include "../../gdn_kernels.cuh"
#endif

#include "../model.h"
#include "../random.h"

namespace gdn_tests {

using namespace gdn;

struct TestBatch {
  int batch, length;
  std::vector<int32_t> tokens, targets;
};

inline TestBatch random_batch(int batch, int length, int vocab, uint64_t seed) {
  TestBatch b{batch, length, {}, {}};
  for (int i = 0; i < batch * length; i++) {
    b.tokens.push_back(int32_t(random_bits(seed, 2 * i) % vocab));
    b.targets.push_back(int32_t(random_bits(seed, 2 * i + 1) % vocab));
  }
  return b;
}

// A small model of the family the arguments name; the base width is half the width, so that mup's scales are
// not 1.
inline ModelConfig small_config(int heads, int head_dim,
                                Parametrization parametrization = Parametrization::mup) {
  ModelConfig c = make_config(32, 16, 2, heads, head_dim, 2, 50, parametrization);
  c.mlp_size = 40;
  return c;
}

// Initial values far from symmetric points: gains and gates scattered.
template <class Device>
void scatter(Parameters<Device>& p, uint64_t seed) {
  p.initialize(seed);
  for (const Tensor& t : p.table.tensors) {
    std::vector<typename Device::real> values(t.size);
    p.dev.download(values.data(), p.master(t.offset), t.size * sizeof(values[0]));
    const double scale = t.cls == TensorClass::conv || t.shape.size() == 1 ? 0.2 : 0.1;
    for (size_t i = 0; i < t.size; i++)
      values[i] += float(scale * random_normal(stream_key(seed + 1, t.name), i));
    p.dev.upload(p.master(t.offset), values.data(), t.size * sizeof(values[0]));
  }
  p.round();
}

template <class Device>
double loss_of(Model<Device>& model, const TestBatch& b) {
  model.forward_loss(b.tokens.data(), b.targets.data(), b.batch, b.length);
  return model.loss_sum() / (b.batch * b.length);
}

template <class Device>
void add_gradient(Model<Device>& model, const TestBatch& b) {
  model.forward_backward(b.tokens.data(), b.targets.data(), b.batch, b.length,
                         1.0f / float(b.batch * b.length));
}

}  // namespace gdn_tests
