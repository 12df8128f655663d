// The mean loss of a model over sequences in their order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../dataloader.h"
#include "model.h"

namespace gdn {

struct Evaluation {
  double loss = 0, floor = 0;  // nats a token; floor: NaN where it is not known
  int64_t sequences = 0;
};

// Over the first `count` sequences, `micro_batch` at a time. Throws what reading them throws; `stop` is asked
// before each micro-batch, and where it says so `sequences` is 0.
template <class Device, class Stop>
Evaluation evaluate(Model<Device>& model, const DataLoader& data, int64_t count, int micro_batch, int seq_len,
                    const Stop& stop) {
  Evaluation e;
  std::vector<int32_t> inputs(size_t(micro_batch) * seq_len), targets(inputs.size());
  for (int64_t first = 0; first < count; first += micro_batch) {
    if (stop()) return {};
    const int rows = int(std::min<int64_t>(micro_batch, count - first));
    for (int r = 0; r < rows; r++)
      e.floor += data.read(first + r, &inputs[size_t(r) * seq_len], &targets[size_t(r) * seq_len]);
    model.forward_loss(inputs.data(), targets.data(), rows, seq_len);
    e.loss += model.loss_sum();
  }
  e.loss /= double(count * seq_len);
  e.floor /= double(count);
  e.sequences = count;
  return e;
}

}  // namespace gdn
