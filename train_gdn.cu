// train_gdn: trains a Gated Delta Network language model under muP, on NVIDIA GPUs or on CPUs: one process, or one a
// GPU under mpirun or srun (gdn/communicator.h).
//
// This file holds the training loop. How one step flows, from the bottom of this file to the top:
//
//   run()               reads the options and chooses the device
//   run_on()            opens the data and a checkpoint to go on from, makes the model's configuration
//   Run                 makes data loader, parameters, optimizer and model; then, in train(), again and again
//     read_batch()        the next batch [B,T] of tokens, while the step before it is computed
//     queue_step()        TrainingStep::queue (gdn/training_step.h): for each micro-batch Model::forward_backward
//                         (gdn/model.h), then Optimizer::update (gdn/optimizer.h)
//     finish_step()       waits for a step's loss and gradient norm; writes the log
//     save(), validate(), sample()   when they are due; with several ranks the weights are gathered first
//
// The model's layers are in gdn/cpu_layers.h and gdn_kernels.cuh, the scaling constants in mup.h, data in
// dataloader.h, the command line in gdn/options.h; what -gen, -eval and -coord_check do in the headers of those
// names.
#include <omp.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dataloader.h"
#include "mup.h"
#include "gdn/cpu_layers.h"
#ifdef GDN_CUDA
#include "gdn_kernels.cuh"
#endif
#include "gdn/communicator.h"
#include "gdn/coord_check_command.h"
#include "gdn/cpu_threads.h"
#include "gdn/eval_command.h"
#include "gdn/evaluate.h"
#include "gdn/generate_command.h"
#include "gdn/model.h"
#include "gdn/model_checkpoint.h"
#include "gdn/mup_table.h"
#include "gdn/optimizer.h"
#include "gdn/options.h"
#include "gdn/provenance.h"
#include "gdn/report.h"
#include "gdn/resume.h"
#include "gdn/run_folder.h"
#include "gdn/settings.h"
#include "gdn/signals.h"
#include "gdn/speed_of_light.h"
#include "gdn/training_step.h"
#include "gdn/version.h"

namespace gdn {
namespace {

std::string numbered(const char* format, double x) {
  char text[64];
  std::snprintf(text, sizeof text, format, x);
  return text;
}

template <class Device>
class Run {
 public:
  Run(Device& dev, Communicator& ranks, const Options& options, const OptionTable& table,
      const ModelConfig& config)
      : o_(options),
        table_(table),
        dev_(dev),
        ranks_(ranks),
        loader_(o_.train, o_.seq_len, o_.global_batch, o_.seed, ranks.rank(), ranks.ranks(), Split::train,
                o_.vocab_size),
        parameters_(dev, config, ranks.rank(), ranks.ranks()),
        schedule_{o_.learning_rate, minimum_learning_rate(o_.min_learning_rate, o_.learning_rate), o_.warmup,
                  o_.steps} {
    if (!o_.validation.empty() && loader_.source().is_builtin())
      throw std::runtime_error("-j '" + o_.validation +
                               "': without -i training is on the built-in stories, which have a "
                               "validation of their own; give -i FILES, or leave out -j");
    if (!o_.validation.empty() || loader_.source().is_builtin()) {
      constexpr uint64_t kValidationSeed = 0;  // the same built-in stories whatever -seed is
      validation_ = std::make_unique<DataLoader>(o_.validation, o_.seq_len, o_.micro_batch, kValidationSeed,
                                                 0, 1, Split::validation, o_.vocab_size);
      if (validation_->source().vocab_size() != loader_.source().vocab_size())
        throw std::runtime_error("-j '" + o_.validation + "': has a vocabulary of " +
                                 std::to_string(validation_->source().vocab_size()) + ", -i one of " +
                                 std::to_string(loader_.source().vocab_size()));
    }
    if (o_.mask_docs && loader_.source().is_bytes())
      throw std::runtime_error(
          "-mask_docs: needs token shards (-i FILES.bin), whose documents begin with token " +
          std::to_string(document_start(o_)));
    for (const DataLoader* loader : {&loader_, validation_.get()}) {
      if (!loader) continue;
      if (o_.mask_docs) loader->source().require_separator(separator(o_));
      if (const std::string line = loader->source().dropped(o_.seq_len); !line.empty()) warn_once(line);
    }
    parameters_.allocate_gradients();
    // NCCL can be had with one rank, too, to see what its calls cost in the graph
    if (ranks_.ranks() > 1 || o_.exchange_by == ExchangeBy::nccl)
      exchange_ = std::make_unique<Exchange<Device>>(dev_, ranks_, o_.exchange_by);
    optimizer_ = std::make_unique<Optimizer<Device>>(parameters_, optimizer_config(o_), exchange_.get());
    model_ = std::make_unique<Model<Device>>(parameters_, o_.micro_batch, o_.seq_len, Use::training,
                                             Recompute(o_.recompute), separator(o_));
    make_training_step();
    inputs_.resize(size_t(loader_.local_batch()) * o_.seq_len);
    targets_.resize(inputs_.size());
    codec_ = std::make_unique<TextCodec>(config.vocab, o_.vocabulary, document_start(o_));
    if (o_.sample_every) prompt_ = codec_->tokens(o_.prompt);
    record_ = {{"data", data_record(o_, loader_.source(), validation_ ? &validation_->source() : nullptr)},
               {"program", program_record()}};
  }

  // Weights from the seed or, with -load, from a checkpoint.
  void start_fresh() {
    if (o_.load.empty())
      parameters_.initialize(o_.seed, parse_class_factors(o_.init_factors));
    else
      load_parameters(parameters_, open_any_checkpoint(o_.load));
  }

  // Weights, moments, step and place in the data as they were.
  void start_from(const Checkpoint& checkpoint) {
    load_parameters(parameters_, checkpoint);
    load_optimizer(*optimizer_, parameters_, checkpoint);
    const TrainingCounters counters = read_counters(checkpoint);
    step_ = saved_step_ = counters.step;
    position_ = counters.position;
    loader_.seek(position_);
    newest_checkpoint_ = good_checkpoint_ = checkpoint.path;
    if (const Json* data = checkpoint.counters.find("data"))
      for (const std::string& line : changes_of_data(*data, record_[0].second)) warn_once(line);
  }

  // Trains to the last step, or to a signal, in a folder that this run holds the lock of. While the GPU does
  // a step, the next one is queued, and the batch after it read; what a checkpoint, a validation or a sample
  // is due after is waited for first. Returns the exit code.
  int train(const std::string& folder) {
    folder_ = folder;
    signals::begin_training();
    if (ranks_.first())
      log_ = std::make_unique<CsvLog>(folder_ + "/log.csv", step_, provenance_line(record_));
    describe();
    if (ranks_.first()) peak_ = ranks_.ranks() * measure_peak_flops(dev_);
    say("peak matrix product: " + numbered("%.2f TFLOP/s", peak_ / 1e12) +
        " (a step's \"% of peak\": its matrix products, at that rate, over its time)");
    say("output in " + folder_);
    const int64_t first = step_ + 1;
    for (;;) {
      const int64_t newest = step_ + int64_t(queued_.size());  // the last step queued
      bool go_on = newest < o_.steps && !stop() && (queued_.empty() || !anything_due(newest));
      if (go_on && !have_batch_) read_batch();
      go_on = go_on && !stop();
      if (go_on && batch_error_) {
        if (queued_.empty()) fail_batch();
        go_on = false;  // what is queued is finished first
      }
      if (go_on) queue_step();
      if (queued_.empty()) break;
      if (!go_on || int(queued_.size()) > kAhead) {
        finish_step();
        if (step_ == first) say("first step after " + numbered("%.2f s", seconds_since_process_start()));
        // Steps take alike long: one that takes ten times the longest so far hangs. What comes now may take long.
        ranks_.limit_step(0);
        if (due(o_.save_every, step_)) save();
        if (due(o_.validate_every, step_)) validate(o_.validation_sequences);
        if (due(o_.sample_every, step_)) sample();
      }
      if (step_ >= first + 2) ranks_.limit_step(std::max(o_.timeout, 10 * longest_step_));
      if (go_on && kAhead > 0 && newest + 1 < o_.steps) read_batch();
    }
    ranks_.limit_step(0);
    return finish();
  }

 private:
  // Whether a signal has come: with several ranks to one that all know of.
  bool stop() const { return ranks_.ranks() == 1 ? signals::stop() : agreed_signal_ != 0; }
  void agree_on_signals() { agreed_signal_ = ranks_.agree(signals::received); }

  // A line on standard output, of rank 0.
  void say(const std::string& line) {
    if (ranks_.first()) report_.say(line);
  }
  // On standard error, of this rank.
  void warn(const std::string& line) const {
    gdn::warn((ranks_.first() ? "" : "rank " + std::to_string(ranks_.rank()) + ": ") + line);
  }

  // What all ranks find is said by rank 0.
  void warn_once(const std::string& line) const {
    if (ranks_.first()) warn(line);
  }

  // Where the device has no room for the tree's spare gradients and nobody asked for the tree, the sum is the
  // running one, and that is said.
  void make_training_step() {
    const auto make = [&](GradientSum sum) {
      training_step_ = std::make_unique<TrainingStep<Device>>(
          parameters_, *model_, *optimizer_, o_.global_batch, o_.micro_batch, o_.seq_len, sum);
    };
    const bool may_change = o_.sum == GradientSum::tree && !table_.given("sum");
    std::string no_room;
    try {
      make(o_.sum);
    } catch (const OutOfMemory& e) {
      if (!may_change) throw;
      no_room = e.what();
    }
    if (ranks_.agree(!no_room.empty()) == 0) return;
    if (!no_room.empty()) warn(no_room + "; so this run is -sum running");
    o_.sum = GradientSum::running;
    make(GradientSum::running);
  }

  void describe() {
    const ModelConfig& c = parameters_.config;
    say(provenance_line(record_));
    say(std::to_string(parameters_.table.count) + " parameters: d " + std::to_string(c.width) + ", L " +
        std::to_string(c.layers) + ", H " + std::to_string(c.heads_k) + ", dk " +
        std::to_string(c.head_dim_k) + ", dv " + std::to_string(c.head_dim_v) + ", mlp " +
        std::to_string(c.mlp_size) + ", vocabulary " + std::to_string(c.vocab));
    say(std::to_string(o_.global_batch) + " sequences of " + std::to_string(o_.seq_len) +
        " tokens a step in micro-batches of " + std::to_string(o_.micro_batch) + "; " +
        std::to_string(loader_.sequences()) + " sequences an epoch" +
        (loader_.source().is_builtin() ? " (built-in stories)" : ""));
    if (exchange_)
      say(std::to_string(ranks_.ranks()) + " ranks, " + std::to_string(ranks_.local_ranks()) +
          " on this host, " + exchange_->description() + "; of each step a rank does " +
          std::to_string(o_.global_batch / o_.micro_batch / ranks_.ranks()) +
          " micro-batches, of the optimizer 1/" + std::to_string(ranks_.ranks()) +
          (o_.sum == GradientSum::running && o_.global_batch / o_.micro_batch > ranks_.ranks()
               ? "; -sum running: the bits depend on the number of ranks"
               : ""));
    say(mup_table(c.mup(), optimizer_->config().kind));
    size_t total = 0;
    std::string plan;
    for (const auto& [what, bytes] : dev_.allocated) {
      total += bytes;
      if (bytes >> 20) plan += ", " + what + " " + std::to_string(bytes >> 20);
    }
    say((ranks_.ranks() > 1 ? "memory of a rank: " : "memory: ") +
        numbered("%.2f GiB", double(total) / double(1 << 30)) + plan + " (MiB)");
    if (!validation_) say("no validation data (-j)");
  }

  bool due(int64_t every, int64_t step) const { return every > 0 && step % every == 0 && step < o_.steps; }
  bool anything_due(int64_t step) const {
    return due(o_.validate_every, step) || due(o_.sample_every, step) || due(o_.save_every, step);
  }

  // Reads the next step's batch. What is wrong with it (a token outside the vocabulary, far into the data, or
  // a file that is not as it was) is said when the steps before it are done.
  // Each rank reads its share, and all know then whether one of them could not.
  void read_batch() {
    have_batch_ = true;
    enum : int64_t { good, stepped_over, failed };
    for (int64_t bad = 0;; bad++) {
      int64_t state = good;
      const uint64_t position = loader_.position();
      try {
        batch_floor_ = loader_.next(inputs_.data(), targets_.data());
      } catch (const data::BadToken& e) {
        state = o_.skip_bad && bad <= loader_.sequences() ? stepped_over : failed;
        if (state == failed)
          batch_error_ = std::current_exception();
        else
          warn(std::string(e.what()) + "; its batch of " + std::to_string(o_.global_batch) +
               " sequences is stepped over");
      } catch (const std::exception&) {
        state = failed;
        batch_error_ = std::current_exception();
      }
      const std::vector<int64_t> all = ranks_.agree({state, signals::received});
      agreed_signal_ = all[1];
      if (all[0] == failed && !batch_error_) batch_error_ = std::make_exception_ptr(OtherRankFailed());
      if (all[0] == failed) return;
      if (all[0] == good) break;
      loader_.seek(position + uint64_t(o_.global_batch));
    }
    batch_floor_ = ranks_.mean(batch_floor_);
    training_step_->load(inputs_.data(), targets_.data());
  }

  [[noreturn]] void fail_batch() {
    if (step_ > 0 && step_ > saved_step_) save();  // keep what was learned
    std::rethrow_exception(batch_error_);
  }

  // Queues a step over the batch that was read.
  void queue_step() {
    QueuedStep q;
    q.report.step = step_ + int64_t(queued_.size()) + 1;
    q.report.steps = o_.steps;
    q.report.floor = batch_floor_;
    q.report.learning_rate = schedule_.learning_rate(q.report.step);
    q.position = loader_.position();
    training_step_->queue(q.report.step, q.report.learning_rate);
    queued_.push_back(q);
    have_batch_ = false;
  }

  // Waits for the oldest queued step and reports it. Throws when its loss or gradient is not finite; it has
  // then changed nothing.
  void finish_step() {
    StepReport r = queued_.front().report;
    const typename TrainingStep<Device>::Result result = training_step_->wait();
    r.loss = result.loss;
    r.norm = result.norm;
    if (!std::isfinite(r.loss)) {
      reject_newest();
      fail_not_finite("loss", r);
    }
    accept_newest();  // the step's loss is of the weights before it
    if (!std::isfinite(r.norm)) fail_not_finite("gradient", r);
    step_ = r.step;
    position_ = queued_.front().position;
    queued_.pop_front();
    const double tokens = double(o_.global_batch) * o_.seq_len;
    r.milliseconds = 1000 * result.seconds;
    r.tokens_per_second = tokens / result.seconds;
    r.share_of_peak = flops_per_token(parameters_.config) * tokens / (result.seconds * peak_);
    r.ranks = ranks_.ranks();
    r.waited_milliseconds = 1000 * (ranks_.seconds_waited() - waited_);
    // on a GPU NCCL's time is the stream's, not the host's
    if (Device::is_gpu && exchange_ && exchange_->in_graph())
      r.waited_milliseconds += 1000 * result.exchange_seconds;
    waited_ = ranks_.seconds_waited();
    longest_step_ = std::max(longest_step_, result.seconds);
    if (!ranks_.first()) return;
    report_.step(r);
    log_->train(r);
  }

  [[noreturn]] void fail_not_finite(const char* what, const StepReport& r) {
    throw std::runtime_error("step " + std::to_string(r.step) + ": the " + what + " is not finite (loss " +
                             shortest(r.loss) + "); lower -lr; the last good checkpoint is " +
                             or_none(good_checkpoint_));
  }

  static std::string or_none(const std::string& path) { return path.empty() ? "none" : path; }

  // Mean loss over the first `limit` validation sequences (0: all), in file order. What goes wrong is said,
  // and the run goes on; false then. A signal ends it.
  bool validate(int64_t limit) {
    if (!validation_ || stop()) return true;
    training_step_->finish_gather();
    try {
      const int64_t count = limit ? std::min(limit, validation_->sequences()) : validation_->sequences();
      const Evaluation e = evaluate(
          *model_, *validation_, count, o_.micro_batch, o_.seq_len, [] { return signals::stop(); }, ranks_);
      if (e.sequences == 0) return true;
      say("validation after step " + std::to_string(step_) + ": loss " + numbered("%.4f", e.loss) +
          (std::isfinite(e.floor) ? " (floor " + numbered("%.4f", e.floor) + ")" : "") + " over " +
          std::to_string(count) + " sequences");
      if (ranks_.first()) log_->validation(step_, e.loss, e.floor);
      if (std::isfinite(e.loss) && saved_step_ == step_) accept_newest();
      return true;
    } catch (const OtherRankFailed&) {
      return false;  // it says why
    } catch (const std::exception& e) {
      warn("validation after step " + std::to_string(step_) + ": " + e.what());
      return false;
    }
  }

  void sample() {
    if (stop()) return;
    training_step_->finish_gather();
    if (!ranks_.first()) return;
    try {
      std::string text;
      generate<Device>(
          parameters_, prompt_, codec_->is_bytes() ? 400 : 64, sampling(o_), separator(o_),
          [&](int token) { text += codec_->text(token); }, [] { return signals::stop(); });
      say("sample after step " + std::to_string(step_) + ":\n" + codec_->shown(o_.prompt) + text + "\n");
    } catch (const std::exception& e) {
      warn("sample after step " + std::to_string(step_) + ": " + e.what());
    }
  }

  // Saves a checkpoint; a failure (a full disk, a number that is not finite) is said and the run goes on.
  // Older ones stay until its weights have given a finite loss.
  bool save() {
    training_step_->finish_gather();
    std::string path;
    try {
      path = save_run(folder_, parameters_, *optimizer_,
                      {step_, position_, table_.chosen(), table_.in_effect(), record_}, 0, ranks_);
    } catch (const std::exception& e) {
      warn(std::string("checkpoint not saved: ") + e.what() + "; the newest is " +
           or_none(newest_checkpoint_));
    }
    path = ranks_.broadcast(path);
    if (path.empty()) return false;
    newest_checkpoint_ = path;
    saved_step_ = step_;
    say("saved " + newest_checkpoint_);
    return true;
  }

  // The weights of the newest checkpoint have given a finite loss: it is good, and older ones may go.
  void accept_newest() {
    if (newest_checkpoint_ == good_checkpoint_) return;
    good_checkpoint_ = newest_checkpoint_;
    if (!ranks_.first()) return;
    try {
      delete_older_checkpoints(folder_, saved_step_, o_.keep);
    } catch (const std::exception& e) {
      warn(std::string("older checkpoints stay: ") + e.what());
    }
  }

  // They have not: it is no checkpoint to go on from, and this run wrote it.
  void reject_newest() {
    if (newest_checkpoint_ == good_checkpoint_) return;
    if (ranks_.first()) {
      warn(newest_checkpoint_ + ": the loss of these weights is not finite; it is deleted");
      checkpoints::discard(newest_checkpoint_);
    }
    newest_checkpoint_ = good_checkpoint_;
  }

  // The loss of the weights as they are, over the first training sequence; NaN where it cannot be read.
  double loss_of_first_sequence() {
    training_step_->finish_gather();
    try {
      return evaluate(
                 *model_, loader_, 1, 1, o_.seq_len, [] { return false; }, ranks_)
          .loss;
    } catch (const std::exception&) {
      return NAN;
    }
  }

  // After the last step: saves first, then validates and samples. Returns the exit code.
  int finish() {
    const bool saved = step_ == saved_step_ || save();
    bool validated = true;
    agree_on_signals();
    if (!stop()) {
      validated = validate(validation_ && validation_->source().is_builtin() ? o_.validation_sequences : 0);
      if (o_.sample_every) sample();
    }
    agree_on_signals();
    if (newest_checkpoint_ != good_checkpoint_ && saved) {
      if (!std::isfinite(loss_of_first_sequence())) {
        reject_newest();
        throw std::runtime_error("after step " + std::to_string(step_) +
                                 " the loss is not finite; lower -lr; the last "
                                 "good checkpoint is " +
                                 or_none(good_checkpoint_));
      }
      accept_newest();
    }
    if (!saved)
      throw std::runtime_error("the last checkpoint could not be saved; the newest is " +
                               or_none(newest_checkpoint_));
    const std::string name = shell_word(folder_);
    if (stop()) {
      if (ranks_.ranks() > 1) signals::received = int(agreed_signal_);
      say(signals::text() + ": stopped after step " + std::to_string(step_) +
          "; to go on: ./train_gdn -resume -o " + name);
    } else {
      say("done. Text from it:  ./train_gdn -load " + name + " -gen 400" +
          (codec_->is_bytes() ? " -prompt \"Once\"" : ""));
      say("To train on:         ./train_gdn -resume -o " + name + " -n " + std::to_string(2 * o_.steps));
    }
    if (log_ && !log_->flush())
      throw std::runtime_error(folder_ + "/log.csv is incomplete; is the disk full?");
    if (!validated)
      throw std::runtime_error("the last validation failed; the run is kept in " + newest_checkpoint_);
    if (!report_.error().empty()) throw std::runtime_error(report_.error());
    return stop() ? signals::exit_code() : 0;
  }

  static constexpr int kAhead = TrainingStep<Device>::kAhead;
  struct QueuedStep {
    StepReport report;      // without what the step itself finds out
    uint64_t position = 0;  // of the data after it
  };

  Options o_;
  const OptionTable& table_;
  Device& dev_;
  Communicator& ranks_;
  DataLoader loader_;
  std::unique_ptr<DataLoader> validation_;
  Parameters<Device> parameters_;
  const Schedule schedule_;
  std::unique_ptr<Exchange<Device>> exchange_;  // with the other ranks
  std::unique_ptr<Optimizer<Device>> optimizer_;
  std::unique_ptr<Model<Device>> model_;
  std::unique_ptr<TrainingStep<Device>> training_step_;
  std::string folder_;
  std::unique_ptr<CsvLog> log_;
  Reporter report_{!Communicator::has_launcher()};
  Json::Object record_;                    // of data and program, for checkpoints and the log
  std::vector<int32_t> inputs_, targets_;  // [B,T]
  std::unique_ptr<TextCodec> codec_;
  std::vector<int32_t> prompt_;  // of samples
  bool have_batch_ = false;      // the next step's has been read
  double batch_floor_ = 0;
  std::exception_ptr batch_error_;
  std::deque<QueuedStep> queued_;
  int64_t step_ = 0, saved_step_ = -1;               // steps done, and in the newest checkpoint
  uint64_t position_ = 0;                            // in the data after them; the loader may have read on
  double peak_ = 0;                                  // operations per second, of all ranks; rank 0 knows
  double longest_step_ = 0;                          // seconds
  double waited_ = 0;                                // seconds for other ranks, up to the last step
  int64_t agreed_signal_ = 0;                        // with several ranks: one that all know of
  std::string newest_checkpoint_, good_checkpoint_;  // good: its weights have given a finite loss
};

// What must be the same on all ranks, as names and values.
std::vector<std::pair<std::string, std::string>> agreement(const OptionTable& table, const Options& o,
                                                           const TokenSource& source, bool gpu,
                                                           const Checkpoint* checkpoint) {
  std::vector<std::pair<std::string, std::string>> values = {
      {"commit", commit()}, {"build", build_text()}, {"device", gpu ? "cuda" : "cpu"}};
  for (const auto& [name, value] : table.in_effect()) values.emplace_back("-" + name, "'" + value + "'");
  const auto add_files = [&](const std::string& option, const TokenSource& files) {
    for (size_t i = 0; i < files.files().size(); i++)
      values.emplace_back("file " + std::to_string(i + 1) + " of " + option,
                          data::fingerprint(files.files()[i]));
  };
  add_files("-i", source);
  if (!o.validation.empty()) add_files("-j", TokenSource(o.validation, 0, Split::validation, o.vocab_size));
  if (checkpoint && checkpoint->has_training_state)
    values.emplace_back("checkpoint",
                        checkpoint->path + ", step " + std::to_string(read_counters(*checkpoint).step) +
                            ", xxh64 " +
                            checkpoints::checksum_text(
                                digest_file(checkpoint->path + "/" + checkpoints::kManifest).checksum));
  return values;
}

template <class Device>
int run_on(Device& dev, Communicator& ranks, Options& o, OptionTable& table) {
  if (o.generate) return generate_and_print(dev, o, table), 0;
  if (!o.evaluate.empty()) return evaluate_and_print(dev, o, table), 0;
  if (o.coord_check) return check_coordinates(dev, o, table), 0;
  FolderLock lock;
  std::unique_ptr<Checkpoint> resumed, loaded;
  const bool automatic = o.resume == Resume::automatic;
  if (ranks.first()) {  // it alone writes
    if (o.resume != Resume::no) resumed = open_resumed(o, lock);
    if (!resumed && !o.output.empty()) require_free(o.output, automatic);
  }
  o.output = ranks.broadcast(o.output);
  const std::string path = ranks.broadcast(resumed ? resumed->path : "");
  if (!path.empty() && !resumed) resumed = std::make_unique<Checkpoint>(open_checkpoint(path));
  if (resumed) {
    const TrainingCounters counters = read_counters(*resumed);
    for (const auto& [name, value] : counters.options) table.restore(name, value);
    for (const auto& [name, value] : counters.in_effect) table.restore_default(name, value);
  }
  resolve_defaults(o, Device::is_gpu);
  const TokenSource source(o.train, 0, Split::train, o.vocab_size);
  if (o.separator < 0) o.separator = source.separator();
  if (!resumed && !o.load.empty()) loaded = std::make_unique<Checkpoint>(open_any_checkpoint(o.load));
  const Checkpoint* checkpoint = resumed ? resumed.get() : loaded.get();
  ranks.compare(agreement(table, o, source, Device::is_gpu, checkpoint));
  require_ranks(ranks.ranks(), o.global_batch / o.micro_batch);
  const ModelConfig config = checkpoint ? config_of_checkpoint(o, table, *checkpoint, source.vocab_size())
                                        : config_of_options(o, source.vocab_size());
  Run<Device> run(dev, ranks, o, table, config);
  if (resumed) {
    run.start_from(*resumed);
    return run.train(o.output);
  }
  run.start_fresh();
  std::string folder;
  if (ranks.first()) {
    folder = make_run_folder(o.output);
    if (!lock.tried()) lock = FolderLock(folder);
    require_free(folder, automatic);  // by now
  }
  return run.train(ranks.broadcast(folder));
}

// Joins the other ranks and shares the CPU's cores with those of this host.
void join(Communicator& ranks, const Options& o) {
  ranks.join(o.timeout);
  if (ranks.ranks() == 1) return;
  signals::silent = 1;
  if (!std::getenv("OMP_NUM_THREADS"))
    omp_set_num_threads(std::max(1, omp_get_num_procs() / ranks.local_ranks()));
}

int run(int argc, char** argv, Communicator& ranks) {
  Options o;
  OptionTable table(o);
  table.parse(argc, argv);
  if ((o.help || o.version || !o.mup_table.empty()) && Communicator::launched() > 1 &&
      Communicator::launched_rank() > 0)
    return 0;
  if (o.help) return table.print_help(), 0;
  if (o.version) return std::printf("train_gdn %s\n%s\n", commit().c_str(), build_text().c_str()), 0;
  if (!o.mup_table.empty()) return print_mup_table(o, table), 0;
  for (const bool given : {o.generate != 0, !o.evaluate.empty()})
    if (given && o.load.empty())
      throw std::runtime_error(std::string(o.generate ? "-gen" : "-eval") +
                               " needs a checkpoint: -load FOLDER");
  if (o.generate && !o.evaluate.empty()) throw std::runtime_error("-gen and -eval exclude each other");
  if (o.resume != Resume::no && !o.load.empty())
    throw std::runtime_error("-resume and -load exclude each other");
  if (o.coord_check && (o.resume != Resume::no || o.generate || o.mask_docs))
    throw std::runtime_error(
        "-coord_check neither resumes nor generates, and takes whole sequences: leave out -resume, -gen and "
        "-mask_docs");
  signals::install();
  const bool trains = !o.generate && !o.coord_check && o.evaluate.empty();
  Communicator::require_mpi_if_launched();
  if (!trains && Communicator::launched() > 1)
    throw std::runtime_error(std::string(o.generate      ? "-gen"
                                         : o.coord_check ? "-coord_check"
                                                         : "-eval") +
                             ": " + std::to_string(Communicator::launched()) +
                             " ranks were started, expected one process");
#ifdef GDN_CUDA
  const std::string no_gpu = Cuda::unavailable();
  if (o.device == DeviceChoice::cuda || (o.device == DeviceChoice::automatic && no_gpu.empty())) {
    join(ranks, o);
    Cuda dev(ranks.local_rank());
    if (trains && ranks.first())
      std::printf("device: %s\nkernels: %s\n", dev.name.c_str(), kernels_in_use().c_str());
    return run_on(dev, ranks, o, table);
  }
#else
  const std::string no_gpu = "built without nvcc";
  if (o.device == DeviceChoice::cuda)
    throw std::runtime_error(
        "-d cuda: this train_gdn was built without nvcc; install the CUDA Toolkit and run make");
#endif
  sleep_while_waiting(argv);
  join(ranks, o);
  Cpu<float> dev;
  if (trains && ranks.first())
    std::printf("device: CPU%s\n", o.device == DeviceChoice::automatic ? (" (" + no_gpu + ")").c_str() : "");
  return run_on(dev, ranks, o, table);
}

}  // namespace
}  // namespace gdn

int main(int argc, char** argv) {
  gdn::open_closed_streams();
  gdn::Communicator ranks;
  try {
    const int code = gdn::run(argc, argv, ranks);
    ranks.leave();
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
      gdn::warn(std::string("standard output: cannot be written: ") + std::strerror(errno));
      return code ? code : gdn::signals::work_to_save && (errno == EPIPE || errno == EIO) ? 0 : 1;
    }
    return code;
  } catch (const gdn::OtherRankFailed&) {
    ranks.abort_after_another();
  } catch (const std::exception& e) {
    std::fflush(stdout);
    if (gdn::Communicator::launched() > 1) ranks.abort(e.what());
    gdn::warn(e.what());
    return 1;
  }
}
