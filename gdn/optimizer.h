// AdamW or SGD over all parameters, with each tensor's own learning rate and decay (mup.h), and the schedule.
// With several ranks each updates its shard, of which it alone has the moments (ZeRO-1, Rajbhandari et al.,
// arXiv 1910.02054): the gradients of its shard come from all ranks, the new weights go to all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "communicator.h"
#ifdef GDN_CUDA
#include "communicator_cuda.h"
#endif
#include "parameters.h"

namespace gdn {

struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::adamw;
  float weight_decay = 0.1f, beta1 = 0.9f, beta2 = 0.95f,
        epsilon = 1e-8f;                 // AdamW; SGD uses weight_decay too
  float momentum = 0.9f;                 // SGD, Nesterov
  float clip = 1.0f;                     // largest norm of the gradient; 0: off
  ClipNorm clip_norm = ClipNorm::plain;  // which norm
  DecayMode decay_mode = DecayMode::coupled;
  ClassFactors learning_rate_factors = ones();
  EpsMode eps_mode = EpsMode::constant;
};

// Linear warm-up over `warmup` steps to `peak`, then a half cosine that reaches `floor` at step `steps`.
// step counts from 1.
struct Schedule {
  double peak = 0, floor = 0;
  int64_t warmup = 0, steps = 1;

  double learning_rate(int64_t step) const {
    if (step <= warmup) return peak * double(step) / double(warmup);
    const double progress =
        std::min(1.0, double(step - warmup) / double(std::max<int64_t>(1, steps - warmup)));
    return floor + 0.5 * (peak - floor) * (1 + std::cos(3.14159265358979323846 * progress));
  }
};

template <class Device>
class Optimizer {
 public:
  using real = typename Device::real;
  // What a step's update reads in the device's memory.
  struct Scalars {
    AdamwStep adamw;
    SgdStep sgd;
  };

  // exchange: with the other ranks; null where there are none.
  Optimizer(Parameters<Device>& parameters, const OptimizerConfig& config,
            Exchange<Device>* exchange = nullptr)
      : config_(config), p_(parameters), dev_(parameters.dev), exchange_(exchange) {
    const char* remedy = Parameters<Device>::kRemedy;
    const std::vector<ParameterSpan> spans =
        p_.spans(config.kind, config.weight_decay, config.decay_mode, config.learning_rate_factors,
                 config.clip_norm, config.eps_mode);
    spans_ = Buffer<Device, ParameterSpan>(dev_, spans.size(), "parameter table", remedy);
    dev_.upload(spans_.get(), spans.data(), spans_.bytes());
    const size_t ranks = size_t(p_.ranks), shard = p_.table.size / ranks;
    moment1_ = Buffer<Device, real>(dev_, shard, "first moments", remedy);
    moment1_.zero();
    if (config.kind == OptimizerKind::adamw) {
      moment2_ = Buffer<Device, real>(dev_, shard, "second moments", remedy);
      moment2_.zero();
    }
    const std::vector<ArenaRange>& groups = p_.table.groups;
    groups_ = Buffer<Device, ArenaRange>(dev_, groups.size(), "parameter table", remedy);
    dev_.upload(groups_.get(), groups.data(), groups_.bytes());
    norm_ = Buffer<Device, real>(dev_, 1, "gradient norm", remedy);
    sums_ = Buffer<Device, double>(dev_, p_.table.size / kArenaBlock, "gradient norm", remedy);
    scalars_ = Buffer<Device, Scalars>(dev_, 1, "work space", remedy);
    if (!exchange_) return;
    losses_ = Buffer<Device, double>(dev_, ranks, "statistics", remedy);
    size_t largest = 0;
    for (const ArenaRange& group : groups) largest = std::max(largest, group.size());
    received_ = Buffer<Device, real>(dev_, ranks == 1 ? 0 : largest / 2, "exchange of gradients", remedy);
  }

  // Applies the accumulated gradients as step `step` (from 1) and returns their global norm before clipping.
  // When the norm is not finite nothing is changed. Waits for the device.
  double step(int64_t step, double learning_rate) {
    Scalars host;
    upload_scalars(host, step, learning_rate);
    update(nullptr);
    real norm = 0;
    dev_.download(&norm, norm_.get(), sizeof(norm));
    return double(norm);
  }

  // The same in parts. Fills `host` in and uploads it; pinned memory is read later.
  void upload_scalars(Scalars& host, int64_t step, double learning_rate) {
    host.adamw = {float(learning_rate), config_.beta1, config_.beta2, config_.epsilon, config_.clip};
    host.adamw.set_step(step);
    host.sgd = {float(learning_rate), config_.momentum, config_.clip};
    dev_.upload(scalars_.get(), &host, sizeof(host));
  }
  // The gradients of this rank's part of a group of the arena become the sum over the ranks.
  void sum_gradients(int group) {
    Range<Device> range(dev_, "exchange gradients", group);
    const ArenaRange& gradients = p_.table.groups[size_t(group)];
    sum_parts(dev_, *exchange_, p_.rank, p_.ranks, p_.gradient_buffer(0) + gradients.begin,
              gradients.size() / size_t(p_.ranks), received_.get());
  }
  // *loss (device memory) likewise.
  void sum_loss(double* loss) {
    dev_.copy(losses_.get() + p_.rank, loss, sizeof(double));
    exchange_->gather_parts(losses_.get(), 1);
    sum_tree(dev_, loss, losses_.get(), p_.ranks);
  }

  // Launches and touches no host memory. With several ranks the gradients and *loss are those of all. Nothing
  // is changed either when *loss (device memory) is not finite; it may be null.
  void update(const double* loss) {
    Range<Device> range(dev_, "optimizer");
    const int count = int(spans_.size());
    for (const ShardPart& part : p_.shard)
      sum_of_squares(dev_, sums_.get(), p_.gradient_buffer(0), part.range, spans_.get(), count);
    if (exchange_) gather_sums();
    norm_of_sums(dev_, norm_.get(), sums_.get(), groups_.get(), int(groups_.size()));
    if (loss) check_loss(dev_, norm_.get(), loss);
    for (const ShardPart& part : p_.shard) {
      const size_t begin = part.range.begin;
      if (config_.kind == OptimizerKind::adamw)
        adamw_update(dev_, p_.master(part), p_.weights(begin), moment1_.get() + part.at,
                     moment2_.get() + part.at, p_.gradient_buffer(0) + begin, part.range, spans_.get(), count,
                     norm_.get(), &scalars_.get()->adamw);
      else
        sgd_update(dev_, p_.master(part), p_.weights(begin), moment1_.get() + part.at,
                   p_.gradient_buffer(0) + begin, part.range, spans_.get(), count, norm_.get(),
                   &scalars_.get()->sgd);
    }
  }
  // With several ranks: every rank's new weights of a group of the arena to all. Done again it changes nothing.
  void gather_weights(int group) {
    Range<Device> range(dev_, "gather weights", group);
    const ArenaRange& weights = p_.table.groups[size_t(group)];
    const size_t part = weights.size() / size_t(p_.ranks);
    exchange_->together([&] {
      exchange_->gather_parts(p_.weights(weights.begin), part);
      if (group == p_.table.vectors_group() && !p_.whole())
        exchange_->gather_parts(p_.master(weights.begin), part);
    });
  }
  // Of all groups.
  void gather_weights() {
    exchange_->together([&] {
      for (int group : p_.table.forward_order()) gather_weights(group);
    });
  }
  const real* device_norm() const { return norm_.get(); }
  Exchange<Device>* exchange() const { return exchange_; }

  const OptimizerConfig& config() const { return config_; }
  // Of this rank's shard: those of a part begin at part.at.
  real* moment1(size_t offset = 0) const { return moment1_.get() + offset; }
  real* moment2(size_t offset = 0) const { return moment2_.get() + offset; }  // AdamW only

 private:
  // Every rank's sums of squares to all.
  void gather_sums() {
    exchange_->together([&] {
      for (const ArenaRange& group : p_.table.groups)
        exchange_->gather_parts(sums_.get() + group.begin / kArenaBlock,
                                group.size() / size_t(p_.ranks) / kArenaBlock);
    });
  }

  const OptimizerConfig config_;
  Parameters<Device>& p_;
  Device& dev_;
  Exchange<Device>* const exchange_;
  Buffer<Device, ParameterSpan> spans_;
  Buffer<Device, ArenaRange> groups_;
  Buffer<Device, double> sums_;  // squares of the gradients, by block of the arena
  Buffer<Device, real> moment1_, moment2_, norm_;
  Buffer<Device, Scalars> scalars_;
  Buffer<Device, double> losses_;  // of all ranks
  Buffer<Device, real> received_;  // from another rank
};

}  // namespace gdn
