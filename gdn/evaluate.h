// The mean loss of a model over sequences in their order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

#include "../dataloader.h"
#include "communicator.h"
#include "model.h"

namespace gdn {

struct Evaluation {
  double loss = 0, floor = 0;  // nats a token; floor: NaN where it is not known
  int64_t sequences = 0;
};

// Over the first `count` sequences, `micro_batch` at a time. Throws what reading them throws; `stop` is asked
// before each micro-batch, and where it says so `sequences` is 0. Of several ranks all call, each does its
// share of the micro-batches, and all have the same bits as one rank; where one of them throws or stops, all
// do.
template <class Device, class Stop>
Evaluation evaluate(Model<Device>& model, const DataLoader& data, int64_t count, int micro_batch, int seq_len,
                    const Stop& stop, Communicator& ranks) {
  Evaluation e;
  std::vector<int32_t> inputs(size_t(micro_batch) * seq_len), targets(inputs.size());
  const int64_t pieces = (count + micro_batch - 1) / micro_batch;
  std::vector<double> losses(static_cast<size_t>(pieces)), floors(static_cast<size_t>(count));
  std::exception_ptr error;
  int64_t stopped = 0;
  try {
    for (int64_t piece = ranks.rank(); piece < pieces && !stopped; piece += ranks.ranks()) {
      stopped = stop();
      if (stopped) break;
      const int64_t first = piece * micro_batch;
      const int rows = int(std::min<int64_t>(micro_batch, count - first));
      for (int r = 0; r < rows; r++)
        floors[size_t(first + r)] =
            data.read(first + r, &inputs[size_t(r) * seq_len], &targets[size_t(r) * seq_len]);
      model.forward_loss(inputs.data(), targets.data(), rows, seq_len);
      losses[size_t(piece)] = model.loss_sum();
    }
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  const std::vector<int64_t> any = ranks.agree({error != nullptr, stopped});
  if (error) std::rethrow_exception(error);
  if (any[0]) throw OtherRankFailed();
  if (any[1]) return {};
  ranks.add_up(losses);
  ranks.add_up(floors);
  for (const double loss : losses) e.loss += loss;
  for (const double floor : floors) e.floor += floor;
  e.loss /= double(count * seq_len);
  e.floor /= double(count);
  e.sequences = count;
  return e;
}

}  // namespace gdn
