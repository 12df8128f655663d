// A training step whose exchanges go on beside the layers: ranks are threads here, on a device whose second
// stream runs as late as it may, so that whoever reads weights or gradients before having waited for them reads
// what the test has put there.
#include <doctest/doctest.h>

#include <chrono>
#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "../training_step.h"
#include "models.h"
#include "rank_threads.h"

namespace gdn_tests {

struct Late : Cpu<float> {
  struct Event : Cpu<float>::Event {
    mutable bool ahead = false;  // recorded, and not yet followed
  };
  void record(Event& event) {
    Cpu<float>::record(event);
    event.ahead = true;
  }
  // Runs what is beside up to the event's record.
  void follow(const Event& event) {
    int count = 0;
    for (; !event.ahead; count++) run_next();
    event.ahead = false;
    followed.push_back(count);
  }
  void join() {
    int count = 0;
    for (; !beside.empty(); count++) run_next();
    joined.push_back(count);
  }

  std::deque<std::function<void()>> beside;
  double pause = 0;                   // seconds that each call takes longer
  std::vector<int> followed, joined;  // calls that each follow and each join ran

 private:
  void run_next() {
    if (beside.empty()) throw std::logic_error("an event is followed that nothing records");
    const auto next = std::move(beside.front());
    beside.pop_front();
    std::this_thread::sleep_for(std::chrono::duration<double>(pause));
    next();
  }
};

}  // namespace gdn_tests

namespace gdn {

template <>
class Exchange<gdn_tests::Late> : public gdn_tests::ThreadExchange {
 public:
  Exchange(gdn_tests::Late& dev, gdn_tests::Together& all, int rank) : ThreadExchange(all, rank), dev_(dev) {}
  static constexpr bool in_graph() { return true; }
  template <class Calls>
  void beside(const Calls& calls) {
    dev_.beside.emplace_back(calls);
  }
  void join() { dev_.join(); }

 private:
  gdn_tests::Late& dev_;
};

}  // namespace gdn

namespace gdn_tests {
namespace {

constexpr int kBatch = 8, kLength = 33, kSteps = 3, kVocabulary = 50;

struct Left {
  std::vector<double> losses, norms, exchange_seconds;
  std::vector<std::vector<float>> weights;
  std::vector<int> followed, joined;
  bool poisoned = false;  // weights were not numbers before the last gather
};

// NaN in the place of what the other ranks have updated and this one has not gathered.
void poison(Parameters<Late>& p) {
  for (const ArenaRange& group : p.table.groups)
    for (int r = 0; r < p.ranks; r++) {
      const ArenaRange part = ParameterTable::part(group, r, p.ranks);
      if (r != p.rank)
        std::fill_n(p.weights(part.begin), part.size(), std::numeric_limits<float>::quiet_NaN());
    }
}

Left train(Together& all, int rank, int micro_batch, bool tied, double pause = 0) {
  Late dev;
  dev.pause = pause;
  ModelConfig config = make_config(64, 32, 3, 3, 0, 2, kVocabulary, Parametrization::mup);
  config.tied = tied;
  Parameters<Late> p(dev, config, rank, all.ranks);
  p.allocate_gradients();
  p.initialize(7);
  Exchange<Late> exchange(dev, all, rank);
  Optimizer<Late> optimizer(p, {}, all.ranks > 1 ? &exchange : nullptr);
  Model<Late> model(p, micro_batch, kLength, Use::training);
  TrainingStep<Late> training_step(p, model, optimizer, kBatch, micro_batch, kLength);
  Left left;
  for (int step = 1; step <= kSteps; step++) {
    const TestBatch b = random_batch(kBatch, kLength, kVocabulary, uint64_t(60 + step));
    const int mine = rank * kBatch / all.ranks * kLength;
    training_step.load(&b.tokens[size_t(mine)], &b.targets[size_t(mine)]);
    training_step.queue(step, 0.02);
    if (all.ranks > 1) poison(p);
    const auto result = training_step.wait();
    left.losses.push_back(result.loss);
    left.norms.push_back(result.norm);
    left.exchange_seconds.push_back(result.exchange_seconds);
    if (step != 2) continue;  // a validation after this one
    training_step.finish_gather();
    left.losses.push_back(loss_of(model, random_batch(1, kLength, kVocabulary, 59)));
  }
  const auto find = [&](const auto& say) {
    for (const Tensor& t : p.table.tensors) say(p.weights(t.offset), p.weights(t.offset) + t.size);
  };
  find([&](const float* begin, const float* end) {
    for (; begin < end; begin++) left.poisoned |= std::isnan(*begin);
  });
  training_step.finish_gather();
  find([&](const float* begin, const float* end) { left.weights.emplace_back(begin, end); });
  left.followed = dev.followed;
  left.joined = dev.joined;
  return left;
}

TEST_CASE("overlap: weights gathered and gradients summed as late as may be have the bits of one rank") {
  for (const bool tied : {false, true}) {
    CAPTURE(tied);
    const int groups = 3 + 2 + !tied;
    Together one(1);
    const Left alone = train(one, 0, 1, tied);
    CHECK(alone.losses.front() != alone.losses.back());
    CHECK(alone.followed.empty());
    for (const int ranks : {2, 4, 8}) {  // of 4, 2 and 1 micro-batches each
      CAPTURE(ranks);
      Together all(ranks);
      std::vector<Left> several(static_cast<size_t>(ranks));
      in_threads(ranks, [&](int r) { several[size_t(r)] = train(all, r, 1, tied); });
      bool poisoned = false;
      for (const Left& left : several) {
        CHECK(left.losses == alone.losses);
        CHECK(left.norms == alone.norms);
        CHECK(left.weights == alone.weights);
        // each wait of a forward is for the next gather alone, and all gradients are there after the backward
        CHECK(left.followed == std::vector<int>(size_t(kSteps * groups), 1));
        CHECK(left.joined == std::vector<int>(kSteps, groups + 1));
        poisoned |= left.poisoned;
      }
      CHECK(poisoned);
    }
  }
}

TEST_CASE("overlap: the time that a step waits is that of its gathers and of its gradients") {
  constexpr int kRanks = 2, kGroups = 3 + 2;
  constexpr double kPause = 0.002;
  Together all(kRanks);
  std::vector<Left> several(kRanks);
  in_threads(kRanks, [&](int r) { several[size_t(r)] = train(all, r, 2, true, kPause); });
  for (const Left& left : several)
    for (const double seconds : left.exchange_seconds) CHECK(seconds >= (2 * kGroups + 1) * kPause);
}

TEST_CASE(
    "overlap: a pass reads each group before its layers, in the order of the gathers, and completes each "
    "once") {
  for (const bool tied : {false, true})
    for (const Recompute recompute : {Recompute::nothing, Recompute::layers}) {
      CAPTURE(tied);
      Cpu<float> dev;
      ModelConfig config = small_config(2, 8);
      config.tied = tied;
      Parameters<Cpu<float>> p(dev, config);
      p.allocate_gradients();
      p.initialize(8);
      Model<Cpu<float>> model(p, 2, 9, Use::training, recompute);
      const TestBatch b = random_batch(2, 9, kVocabulary, 58);
      std::vector<int32_t> packed(kPackedRows * b.tokens.size());
      pack_batch(packed.data(), b.tokens.data(), b.targets.data(), 2, 9, config.padded_vocab, kNoSeparator);
      model.upload_batch(packed.data(), 2, 9);
      GroupTurns completed("gradients of group", p.table);
      std::vector<int> read;
      double loss = 0;
      GroupCalls calls;
      calls.read = [&](int group) { read.push_back(group); };
      calls.complete = [&](int group) { completed.take(group); };
      model.forward_backward(1, &loss, calls);
      CHECK(read == p.table.forward_order());
      CHECK_NOTHROW(completed.end());
      CHECK(loss > 0);
    }
}

TEST_CASE("overlap: a group without a turn, with two, or that is none is an error") {
  const ParameterTable table = make_parameter_table(small_config(2, 8));
  GroupTurns turns("gradients of group", table);
  for (int g = 1; g < int(table.groups.size()); g++) turns.take(g);
  CHECK_THROWS_WITH_AS(turns.end(), "gradients of group 0: had no turn", std::logic_error);
  CHECK_THROWS_WITH_AS(turns.take(1), "gradients of group 1: had its turn before", std::logic_error);
  CHECK_THROWS_AS(turns.take(-1), std::logic_error);
  CHECK_THROWS_AS(turns.take(int(table.groups.size())), std::logic_error);
  turns.take(0);
  CHECK_NOTHROW(turns.end());
}

}  // namespace
}  // namespace gdn_tests
