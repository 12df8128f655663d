// One optimizer step over a batch of several micro-batches:
//
//   gradients = sum over the micro-batches of (forward, backward);  norm of the gradients;  clipped update
//
// The sum over n micro-batches, and that of their losses, is taken in the order of a fixed binary tree over
// their index: a node over c > 1 of them adds the sum of its first ceil(c / 2) and that of the others.
// Whoever computes a subtree, the bits are the same. It needs ceil(log2(n)) spare gradient buffers.
// GradientSum::running adds one micro-batch after the other and needs none.
//
// It is queued on the device and read back later, so that the host reads the next batch, and hands it over,
// while the device computes. On the GPU a micro-batch is one CUDA graph and the update another; what changes
// from step to step (tokens, their order, learning rate, bias corrections) they find in device memory. On the
// CPU a step is done when queue() returns.
//
// With several ranks, and an exchange that graphs can hold, communication goes on beside the layers:
//
//   first micro-batch   the weights that the update before it left in shards are gathered, group by group of the
//                       arena in the order of the forward, which waits for each before it reads it
//   last micro-batch    each group's gradients go to the other ranks when its backward is done
//
// so that between steps a rank has new weights of its own shard alone: finish_gather() is for who reads them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "model.h"
#include "optimizer.h"

namespace gdn {

// Spare gradient buffers for the tree over n micro-batches: its depth.
inline int spare_gradient_buffers(GradientSum sum, int64_t n) {
  int depth = 0;
  if (sum == GradientSum::tree)
    while ((int64_t(1) << depth) < n) depth++;
  return depth;
}

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
    // Of the device's time, with nothing to do but to exchange gradients and weights.
    double exchange_seconds = 0;
  };

  // Steps over `global_batch` sequences of `length` tokens, `micro_batch` at a time (a divisor). With several
  // ranks (of the parameters) each does an equal share of the micro-batches, in their order: a subtree.
  // Without graphs each layer is launched by itself; the bits are the same. Throws OutOfMemory where the
  // device has no room for the spare gradients.
  TrainingStep(Parameters<Device>& parameters, Model<Device>& model, Optimizer<Device>& optimizer,
               int64_t global_batch, int micro_batch, int length, GradientSum sum = GradientSum::tree,
               bool graphs = true)
      : dev_(parameters.dev),
        p_(parameters),
        model_(model),
        optimizer_(optimizer),
        micro_batches_(int(global_batch / micro_batch)),
        my_micro_batches_(micro_batches_ / parameters.ranks),
        micro_batch_(micro_batch),
        length_(length),
        sum_(sum),
        graphs_(graphs),
        slots_{{dev_, batch_numbers(), stamps()}, {dev_, batch_numbers(), stamps()}},
        micro_batch_graphs_(size_t(spare_gradient_buffers(sum, my_micro_batches_)) + 1),
        losses_(dev_, micro_batch_graphs_.size(), "statistics"),
        stamps_(dev_, stamps(), "statistics"),
        gathered_(p_.table.groups.size()) {
    stamps_.zero();
    p_.allocate_gradients(int(micro_batch_graphs_.size()) - 1);
  }

  // Takes the batch of the next queue(): inputs, targets [B / ranks,T], this rank's share. At most one step
  // may be running.
  void load(const int32_t* inputs, const int32_t* targets) {
    if (queued_ - done_ > 1) throw std::logic_error("TrainingStep: a batch for a third step");
    Range<Device> range(dev_, "pack batch");
    const int rows = micro_batch_ * length_;
    for (int i = 0; i < my_micro_batches_; i++)
      pack_batch(next().batch.get() + kPackedRows * size_t(i) * rows, inputs + size_t(i) * rows,
                 targets + size_t(i) * rows, micro_batch_, length_, p_.config.padded_vocab,
                 model_.separator());
  }

  // Queues step `step` (from 1) over the batch loaded last. Where its loss or gradient is not finite it
  // changes nothing.
  void queue(int64_t step, double learning_rate) {
    Range<Device> range(dev_, "training step");
    Slot& slot = next();
    slot.behind_another = queued_ > done_;
    dev_.record(slot.begin);
    if (sum_ == GradientSum::tree) {
      sum_micro_batches(slot, 0, my_micro_batches_, 0, true);
    } else {
      zero(0);
      for (int i = 0; i < my_micro_batches_; i++) add_micro_batch(slot, i, 0, i + 1 == my_micro_batches_);
    }
    p_.use_gradients(0);
    optimizer_.upload_scalars(*slot.scalars.get(), step, learning_rate);
    const bool in_turn = optimizer_.exchange() && !exchanges_beside();
    if (in_turn)
      waited(kForGradients, [&] {
        for (int g = 0; g < int(p_.table.groups.size()); g++) optimizer_.sum_gradients(g);
        optimizer_.sum_loss(losses_.get());
      });
    run(
        update_graph_, "update", [&] { optimizer_.update(losses_.get()); }, !in_turn);
    if (in_turn) waited(kForWeights, [&] { optimizer_.gather_weights(); });
    gather_pending_ = exchanges_beside();
    if (optimizer_.exchange()) dev_.download_later(slot.stamps.get(), stamps_.get(), stamps_.bytes());
    dev_.download_later(slot.loss.get(), losses_.get(), sizeof(double));
    dev_.download_later(slot.norm.get(), optimizer_.device_norm(), sizeof(real));
    dev_.record(ends_[queued_ % 3]);
    queued_++;
  }

  // Gathers the weights that the last queued step left in shards, if it did. All ranks call it, before anything
  // but the next step reads weights.
  void finish_gather() {
    if (gather_pending_) optimizer_.gather_weights();
    gather_pending_ = false;
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
                           double(*slot.norm.get()), dev_.seconds(from, end),
                           optimizer_.exchange() ? exchange_seconds(slot.stamps.get()) : 0};
    done_++;
    return result;
  }

  // Of a micro-batch (with several ranks the last one) and of the update, once they have run twice.
  const typename Device::Graph& micro_batch_graph() const {
    return exchanges_beside() ? last_graph_ : micro_batch_graphs_[0];
  }
  const typename Device::Graph& update_graph() const { return update_graph_; }

 private:
  // What a step with several ranks waits for: the gradients, and each group's weights (or once for all).
  static constexpr int kForGradients = 0, kForWeights = 1;
  // When each wait began and when it ended, in nanoseconds of the device's clock.
  size_t stamps() const { return 2 * (kForWeights + p_.table.groups.size()); }
  template <class Calls>
  void waited(int number, const Calls& calls) {
    time_stamp(dev_, stamps_.get() + 2 * number);
    calls();
    time_stamp(dev_, stamps_.get() + 2 * number + 1);
  }
  double exchange_seconds(const int64_t* times) const {
    int64_t sum = 0;
    for (size_t i = 0; i < stamps(); i += 2) sum += times[i + 1] - times[i];
    return 1e-9 * double(sum);
  }

  // Of one step: what the device reads and writes while the host goes on.
  struct Slot {
    Slot(Device& dev, size_t numbers, size_t stamp_count)
        : batch(dev, numbers), scalars(dev, 1), loss(dev, 1), norm(dev, 1), stamps(dev, stamp_count) {}
    HostBuffer<Device, int32_t> batch;  // [this rank's micro-batches,4,rows]
    HostBuffer<Device, typename Optimizer<Device>::Scalars> scalars;
    HostBuffer<Device, double> loss;
    HostBuffer<Device, real> norm;
    HostBuffer<Device, int64_t> stamps;
    typename Device::Event begin;
    bool behind_another = false;
  };

  // Whether gradients and weights travel while layers go on.
  bool exchanges_beside() const { return optimizer_.exchange() && optimizer_.exchange()->in_graph(); }

  // Buffer `buffer` = the sum over `count` micro-batches from number `first` on; uses those behind it. last:
  // these end with the step's last one.
  void sum_micro_batches(Slot& slot, int first, int count, int buffer, bool last) {
    if (count == 1) {
      zero(buffer);
      add_micro_batch(slot, first, buffer, last);
      return;
    }
    const int left = (count + 1) / 2;
    sum_micro_batches(slot, first, left, buffer, false);
    sum_micro_batches(slot, first + left, count - left, buffer + 1, last);
    if (last && exchanges_beside()) return;  // the last micro-batch has done it
    add_gradients(dev_, p_.gradient_buffer(buffer), p_.gradient_buffer(buffer + 1), p_.table.size,
                  losses_.get() + buffer, losses_.get() + buffer + 1);
  }

  void zero(int buffer) {
    Range<Device> r(dev_, "zero gradients");
    p_.use_gradients(buffer);
    p_.zero_gradients();
    dev_.zero(losses_.get() + buffer, sizeof(double));
  }

  // Adds micro-batch i's gradients and loss to buffer `buffer`; last: it is the step's last one.
  void add_micro_batch(Slot& slot, int i, int buffer, bool last) {
    const int rows = micro_batch_ * length_;
    const float loss_weight = float(1.0 / (double(rows) * micro_batches_));
    {
      Range<Device> r(dev_, "upload batch");
      model_.upload_batch(slot.batch.get() + kPackedRows * size_t(i) * rows, micro_batch_, length_);
    }
    p_.use_gradients(buffer);
    const bool gathers = i == 0 && exchanges_beside(), exchanges = last && exchanges_beside();
    typename Device::Graph& graph = exchanges ? last_graph_
                                    : gathers ? first_graph_
                                              : micro_batch_graphs_[size_t(buffer)];
    const char* const name = exchanges ? "last micro-batch" : gathers ? "first micro-batch" : "micro-batch";
    run(graph, name, [&] {
      GroupTurns read("weights read of group", p_.table), completed("gradients of group", p_.table);
      GroupCalls calls;
      if (gathers) {
        gather_beside();
        calls.read = [&](int group) {
          read.take(group);
          wait_for_weights(group);
        };
      }
      if (exchanges)
        calls.complete = [&](int group) {
          completed.take(group);
          exchange_beside(group, buffer);
        };
      model_.forward_backward(loss_weight, losses_.get() + buffer, calls);
      if (gathers) read.end();
      if (!exchanges) return;
      completed.end();
      exchange_losses_beside(buffer);
      Range<Device> r(dev_, "wait for gradients");
      waited(kForGradients, [&] { optimizer_.exchange()->join(); });
    });
    if (gathers) gather_pending_ = false;
  }

  // What goes on beside the layers may run late, so it holds copies.

  // Where finish_gather() has done it, or no step has come before, this changes nothing: the graph is the same.
  void gather_beside() {
    for (const int group : p_.table.forward_order())
      optimizer_.exchange()->beside([this, group] {
        optimizer_.gather_weights(group);
        dev_.record(gathered_[size_t(group)]);
      });
  }
  void wait_for_weights(int group) {
    Range<Device> r(dev_, "wait for weights", group);
    waited(kForWeights + group, [&] { dev_.follow(gathered_[size_t(group)]); });
  }
  // A group's gradients go up what is left of the tree, and to the other ranks.
  void exchange_beside(int group, int buffer) {
    optimizer_.exchange()->beside([this, group, buffer] {
      const ArenaRange& range = p_.table.groups[size_t(group)];
      for (int b = buffer; b > 0; b--)
        add_pieces(dev_, p_.gradient_buffer(b - 1) + range.begin, p_.gradient_buffer(b) + range.begin, 1,
                   range.size(), range.size());
      optimizer_.sum_gradients(group);
    });
  }
  void exchange_losses_beside(int buffer) {
    optimizer_.exchange()->beside([this, buffer] {
      for (int b = buffer; b > 0; b--)
        add_gradients(dev_, p_.gradient_buffer(b - 1), p_.gradient_buffer(b), 0, losses_.get() + b - 1,
                      losses_.get() + b);
      optimizer_.sum_loss(losses_.get());
    });
  }

  size_t batch_numbers() const { return kPackedRows * size_t(my_micro_batches_) * micro_batch_ * length_; }
  Slot& next() { return slots_[queued_ % 2]; }

  template <class Calls>
  void run(typename Device::Graph& graph, const char* name, const Calls& calls, bool recordable = true) {
    Range<Device> range(dev_, name);
    if (graphs_ && recordable)
      dev_.replay(graph, calls);
    else
      calls();
  }

  Device& dev_;
  Parameters<Device>& p_;
  Model<Device>& model_;
  Optimizer<Device>& optimizer_;
  const int micro_batches_, my_micro_batches_, micro_batch_, length_;
  const GradientSum sum_;
  const bool graphs_;
  Slot slots_[2];                   // of steps in turn
  typename Device::Event ends_[3];  // of the last step that was waited for, and of two that may run
  int64_t queued_ = 0, done_ = 0;
  std::vector<typename Device::Graph> micro_batch_graphs_;  // by the gradient buffer that they add to
  Buffer<Device, double> losses_;                           // sums of the tokens' losses, as the gradients
  Buffer<Device, int64_t> stamps_;                          // [stamps()]
  typename Device::Graph first_graph_, last_graph_, update_graph_;
  std::vector<typename Device::Event> gathered_;  // of each group, in the first micro-batch
  bool gather_pending_ = false;                   // the weights are in shards
};

}  // namespace gdn
