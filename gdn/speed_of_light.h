// Share of peak (speed-of-light): the time the strictly needed matrix products would take at the peak rate
// this device was measured to reach, over the time a step took.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "model_config.h"
#include "random.h"

namespace gdn {

// Floating-point operations (a multiply and an add are two) one token needs, forward and backward: 6 per
// weight that enters a matrix product (the unembedding included, the embedding look-up not), and the delta
// rule token by token, S^T k, k u^T, S^T q: 6 dk dv forward and twice that backward.
inline double flops_per_token(const ModelConfig& c) {
  const MixerShape mixer = c.mixer_shape(1, 1);
  const double d = c.width, keys = mixer.key_dim(), values = mixer.value_dim();
  const double weights = d * (2 * keys + 3 * values + 2 * c.heads_v) + 3 * d * c.mlp_size;
  const double delta_rule = 18.0 * c.heads_v * c.head_dim_k * c.head_dim_v;
  return c.layers * (6 * weights + delta_rule) + 6 * d * c.padded_vocab;
}

// Operations per second of a large product of random numbers through the trainer's own linear layer: 8192^3
// on the GPU, 1024^3 on the CPU; the fastest of ten after a warm-up, of fewer where these take longer than
// 0.2 s.
template <class Device>
double measure_peak_flops(Device& dev) {
  using act = typename Device::act;
  const int n = Device::is_gpu ? 8192 : 1024;
  const size_t size = size_t(n) * n;
  Buffer<Device, act> x(dev, size, "peak measurement"), w(dev, size, "peak measurement"),
      y(dev, size, "peak measurement");
  {
    std::vector<act> pattern(1009 * 512);  // repeated; a length that is no multiple of a row's
    for (size_t i = 0; i < pattern.size(); i++) pattern[i] = act(float(random_uniform(1, i) - 0.5));
    size_t filled = std::min(pattern.size(), size);
    dev.upload(x.get(), pattern.data(), filled * sizeof(act));
    for (size_t more; filled < size; filled += more) {
      more = std::min(filled, size - filled);
      dev.copy(x.get() + filled, x.get(), more * sizeof(act));
    }
    dev.copy(w.get(), x.get(), size * sizeof(act));
  }
  double best = 1e30, all = 0;  // seconds
  for (int repeat = 0; repeat < 11 && all < 0.2; repeat++) {
    dev.synchronize();
    const auto start = std::chrono::steady_clock::now();
    linear_forward(dev, y.get(), x.get(), w.get(), n, n, n);
    dev.synchronize();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (repeat || seconds >= 0.2) best = std::min(best, seconds);
    if (repeat || seconds >= 0.2) all += seconds;
  }
  return 2.0 * n * double(n) * n / best;
}

}  // namespace gdn
