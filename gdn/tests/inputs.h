// Inputs of the gated delta rule, for the tests, dev/bench_delta_rule.cu and dev/emulate.
#pragma once

#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include "gdn/device.h"
#include "gdn/shapes.h"

namespace gdn_tests {

inline gdn::MixerShape make_shape(int batch, int tokens, int heads_k, int heads_v, int dk, int dv) {
  gdn::MixerShape shape;
  shape.batch = batch, shape.tokens = tokens;
  shape.heads_k = heads_k, shape.heads_v = heads_v;
  shape.head_dim_k = dk, shape.head_dim_v = dv;
  return shape;
}

// qkv [B,T,C] of normals, q and k of length 1 per head, not yet rounded.
template <class Real, class Engine>
std::vector<Real> random_qkv(const gdn::MixerShape& shape, Engine& random) {
  std::normal_distribution<Real> normal;
  std::vector<Real> qkv(size_t(shape.rows()) * shape.conv_channels());
  for (Real& x : qkv) x = normal(random);
  for (int m = 0; m < shape.rows(); m++)
    for (int head = 0; head < 2 * shape.heads_k; head++) {
      Real* row = &qkv[size_t(m) * shape.conv_channels() + head * shape.head_dim_k];
      Real squares = 0;
      for (int i = 0; i < shape.head_dim_k; i++) squares += row[i] * row[i];
      for (int i = 0; i < shape.head_dim_k; i++) row[i] /= std::sqrt(squares);
    }
  return qkv;
}

// x in the device's memory.
template <class Device, class T>
gdn::Buffer<Device, T> upload(Device& device, const std::vector<T>& x) {
  gdn::Buffer<Device, T> buffer(device, x.size(), "test inputs");
  device.upload(buffer.get(), x.data(), buffer.bytes());
  device.synchronize();
  return buffer;
}

}  // namespace gdn_tests
