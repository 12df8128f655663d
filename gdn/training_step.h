// One optimizer step over a batch of several micro-batches:
//
//   gradients = 0;  for each micro-batch: forward, backward;  norm of the gradients;  clipped update
//
// It is queued on the device and read back later, so that the host reads the next batch, and hands it over, while
// the device computes. On the GPU a micro-batch is one CUDA graph and the update another; what changes from step
// to step (tokens, their order, learning rate, bias corrections) they find in device memory. On the CPU a step is
// done when queue() returns.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "model.h"
#include "optimizer.h"

namespace gdn {

template <class Device>
class TrainingStep {
 public:
  using real = typename Device::real;
  // How many steps may be queued behind the one that is waited for.
  static constexpr int kAhead = Device::is_gpu ? 1 : 0;

  struct Result {
    double loss = 0;     // nats per token, the mean over the batch
    double norm = 0;     // of the gradient before clipping; NaN where the loss is not finite
    double seconds = 0;  // since the step before ended where one was still running, else since this one began
  };

  // Steps over `global_batch` sequences of `length` tokens, `micro_batch` at a time (a divisor). Without graphs
  // each layer is launched by itself; the bits are the same.
  TrainingStep(Parameters<Device>& parameters, Model<Device>& model, Optimizer<Device>& optimizer,
               int64_t global_batch, int micro_batch, int length, bool graphs = true)
      : dev_(parameters.dev),
        p_(parameters),
        model_(model),
        optimizer_(optimizer),
        micro_batches_(int(global_batch / micro_batch)),
        micro_batch_(micro_batch),
        length_(length),
        graphs_(graphs),
        slots_{{dev_, batch_numbers()}, {dev_, batch_numbers()}} {}

  // Takes the batch of the next queue(): inputs, targets [B,T]. At most one step may be running.
  void load(const int32_t* inputs, const int32_t* targets) {
    if (queued_ - done_ > 1) throw std::logic_error("TrainingStep: a batch for a third step");
    Range<Device> range(dev_, "pack batch");
    const int rows = micro_batch_ * length_;
    for (int i = 0; i < micro_batches_; i++)
      pack_batch(next().batch.get() + kPackedRows * size_t(i) * rows, inputs + size_t(i) * rows,
                 targets + size_t(i) * rows, micro_batch_, length_, p_.config.padded_vocab,
                 model_.separator());
  }

  // Queues step `step` (from 1) over the batch loaded last. Where its loss or gradient is not finite it changes
  // nothing.
  void queue(int64_t step, double learning_rate) {
    Range<Device> range(dev_, "training step");
    Slot& slot = next();
    slot.behind_another = queued_ > done_;
    dev_.record(slot.begin);
    {
      Range<Device> r(dev_, "zero gradients");
      p_.zero_gradients();
      model_.zero_loss();
    }
    const int rows = micro_batch_ * length_;
    const float loss_weight = float(1.0 / (double(rows) * micro_batches_));
    for (int i = 0; i < micro_batches_; i++) {
      {
        Range<Device> r(dev_, "upload batch");
        model_.upload_batch(slot.batch.get() + kPackedRows * size_t(i) * rows, micro_batch_, length_);
      }
      run(micro_batch_graph_, "micro-batch", [&] { model_.forward_backward(loss_weight); });
    }
    optimizer_.upload_scalars(*slot.scalars.get(), step, learning_rate);
    run(update_graph_, "update", [&] { optimizer_.update(model_.device_loss_sum()); });
    dev_.download_later(slot.loss.get(), model_.device_loss_sum(), sizeof(double));
    dev_.download_later(slot.norm.get(), optimizer_.device_norm(), sizeof(real));
    dev_.record(ends_[queued_ % 3]);
    queued_++;
  }

  int running() const { return int(queued_ - done_); }

  // Waits for the oldest step that was queued.
  Result wait() {
    if (running() == 0) throw std::logic_error("TrainingStep: no step is queued");
    const Slot& slot = slots_[done_ % 2];
    const auto& end = ends_[done_ % 3];
    dev_.wait(end);
    const auto& from = slot.behind_another ? ends_[(done_ + 2) % 3] : slot.begin;
    const Result result = {*slot.loss.get() / (double(micro_batch_) * length_ * micro_batches_),
                           double(*slot.norm.get()), dev_.seconds(from, end)};
    done_++;
    return result;
  }

  // Of a micro-batch and of the update, once they have run twice.
  const typename Device::Graph& micro_batch_graph() const { return micro_batch_graph_; }
  const typename Device::Graph& update_graph() const { return update_graph_; }

 private:
  // Of one step: what the device reads and writes while the host goes on.
  struct Slot {
    Slot(Device& dev, size_t numbers) : batch(dev, numbers), scalars(dev, 1), loss(dev, 1), norm(dev, 1) {}
    HostBuffer<Device, int32_t> batch;  // [micro-batches,4,rows]
    HostBuffer<Device, typename Optimizer<Device>::Scalars> scalars;
    HostBuffer<Device, double> loss;
    HostBuffer<Device, real> norm;
    typename Device::Event begin;
    bool behind_another = false;
  };

  size_t batch_numbers() const { return kPackedRows * size_t(micro_batches_) * micro_batch_ * length_; }
  Slot& next() { return slots_[queued_ % 2]; }

  template <class Calls>
  void run(typename Device::Graph& graph, const char* name, const Calls& calls) {
    Range<Device> range(dev_, name);
    if (graphs_)
      dev_.replay(graph, calls);
    else
      calls();
  }

  Device& dev_;
  Parameters<Device>& p_;
  Model<Device>& model_;
  Optimizer<Device>& optimizer_;
  const int micro_batches_, micro_batch_, length_;
  const bool graphs_;
  Slot slots_[2];                   // of steps in turn
  typename Device::Event ends_[3];  // of the last step that was waited for, and of two that may run
  int64_t queued_ = 0, done_ = 0;
  typename Device::Graph micro_batch_graph_, update_graph_;
};

}  // namespace gdn
