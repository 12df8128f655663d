// train_gdn: trains a Gated Delta Network language model under muP, on one NVIDIA GPU or on the CPU.
//
// This file holds the training loop: steps, checkpoints, validation, samples. The model is in gdn/model.h,
// its layers in gdn/cpu_layers.h and gdn_kernels.cuh, the scaling constants in mup.h, data in dataloader.h,
// the command line in gdn/options.h; what -gen, -eval and -coord_check do in the headers of those names.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <deque>
#include <exception>
#include <filesystem>
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
#include "gdn/coord_check_command.h"
#include "gdn/cpu_threads.h"
#include "gdn/eval_command.h"
#include "gdn/evaluate.h"
#include "gdn/generate_command.h"
#include "gdn/model.h"
#include "gdn/model_checkpoint.h"
#include "gdn/optimizer.h"
#include "gdn/options.h"
#include "gdn/provenance.h"
#include "gdn/report.h"
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
  Run(Device& dev, const Options& options, const OptionTable& table, const ModelConfig& config)
      : o_(options),
        table_(table),
        dev_(dev),
        loader_(o_.train, o_.seq_len, o_.global_batch, o_.seed, 0, 1, Split::train, o_.vocab_size),
        parameters_(dev, config),
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
      if (const std::string line = loader->source().dropped(o_.seq_len); !line.empty()) warn(line);
    }
    parameters_.allocate_gradients();
    optimizer_ = std::make_unique<Optimizer<Device>>(parameters_, optimizer_config(o_));
    model_ = std::make_unique<Model<Device>>(parameters_, o_.micro_batch, o_.seq_len, Use::training,
                                             Recompute(o_.recompute), separator(o_));
    training_step_ = std::make_unique<TrainingStep<Device>>(parameters_, *model_, *optimizer_,
                                                            o_.global_batch, o_.micro_batch, o_.seq_len);
    inputs_.resize(size_t(o_.global_batch) * o_.seq_len);
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
      for (const std::string& line : changes_of_data(*data, record_[0].second)) warn(line);
  }

  // Trains to the last step, or to a signal, in a folder that this run holds the lock of. While the GPU does
  // a step, the next one is queued, and the batch after it read; what a checkpoint, a validation or a sample
  // is due after is waited for first. Returns the exit code.
  int train(const std::string& folder) {
    folder_ = folder;
    signals::begin_training();
    log_ = std::make_unique<CsvLog>(folder_ + "/log.csv", step_, provenance_line(record_));
    describe();
    peak_ = measure_peak_flops(dev_);
    report_.say("peak matrix product: " + numbered("%.2f TFLOP/s", peak_ / 1e12) +
                " (a step's \"% of peak\": its matrix products, at that rate, over its time)");
    report_.say("output in " + folder_);
    const int64_t first = step_ + 1;
    for (;;) {
      const int64_t newest = step_ + int64_t(queued_.size());  // the last step queued
      bool go_on = newest < o_.steps && !signals::stop() && (queued_.empty() || !anything_due(newest));
      if (go_on && !have_batch_) read_batch();
      if (go_on && batch_error_) {
        if (queued_.empty()) fail_batch();
        go_on = false;  // what is queued is finished first
      }
      if (go_on) queue_step();
      if (queued_.empty()) break;
      if (!go_on || int(queued_.size()) > kAhead) {
        finish_step();
        if (step_ == first)
          report_.say("first step after " + numbered("%.2f s", seconds_since_process_start()));
        if (due(o_.save_every, step_)) save();
        if (due(o_.validate_every, step_)) validate(o_.validation_sequences);
        if (due(o_.sample_every, step_)) sample();
      }
      if (go_on && kAhead > 0 && newest + 1 < o_.steps) read_batch();
    }
    return finish();
  }

 private:
  void describe() {
    const ModelConfig& c = parameters_.config;
    report_.say(provenance_line(record_));
    report_.say(std::to_string(parameters_.table.count) + " parameters: d " + std::to_string(c.width) +
                ", L " + std::to_string(c.layers) + ", H " + std::to_string(c.heads_k) + ", dk " +
                std::to_string(c.head_dim_k) + ", dv " + std::to_string(c.head_dim_v) + ", mlp " +
                std::to_string(c.mlp_size) + ", vocabulary " + std::to_string(c.vocab));
    report_.say(std::to_string(o_.global_batch) + " sequences of " + std::to_string(o_.seq_len) +
                " tokens a step in micro-batches of " + std::to_string(o_.micro_batch) + "; " +
                std::to_string(loader_.sequences()) + " sequences an epoch" +
                (loader_.source().is_builtin() ? " (built-in stories)" : ""));
    report_.say(mup_table(c.mup(), optimizer_->config().kind));
    size_t total = 0;
    std::string plan;
    for (const auto& [what, bytes] : dev_.allocated) {
      total += bytes;
      if (bytes >> 20) plan += ", " + what + " " + std::to_string(bytes >> 20);
    }
    report_.say("memory: " + numbered("%.2f GiB", double(total) / double(1 << 30)) + plan + " (MiB)");
    if (!validation_) report_.say("no validation data (-j)");
  }

  bool due(int64_t every, int64_t step) const { return every > 0 && step % every == 0 && step < o_.steps; }
  bool anything_due(int64_t step) const {
    return due(o_.validate_every, step) || due(o_.sample_every, step) || due(o_.save_every, step);
  }

  // Reads the next step's batch. What is wrong with it (a token outside the vocabulary, far into the data, or
  // a file that is not as it was) is said when the steps before it are done.
  void read_batch() {
    have_batch_ = true;
    try {
      for (int64_t bad = 0;; bad++) try {
          batch_floor_ = loader_.next(inputs_.data(), targets_.data());
          break;
        } catch (const data::BadToken& e) {
          if (!o_.skip_bad || bad > loader_.sequences()) throw;
          warn(std::string(e.what()) + "; its batch of " + std::to_string(o_.global_batch) +
               " sequences is stepped over");
          loader_.seek(loader_.position() + uint64_t(o_.global_batch));
        }
      training_step_->load(inputs_.data(), targets_.data());
    } catch (const std::exception&) {
      batch_error_ = std::current_exception();
    }
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
    if (!validation_ || signals::stop()) return true;
    try {
      const int64_t count = limit ? std::min(limit, validation_->sequences()) : validation_->sequences();
      const Evaluation e =
          evaluate(*model_, *validation_, count, o_.micro_batch, o_.seq_len, [] { return signals::stop(); });
      if (e.sequences == 0) return true;
      report_.say("validation after step " + std::to_string(step_) + ": loss " + numbered("%.4f", e.loss) +
                  (std::isfinite(e.floor) ? " (floor " + numbered("%.4f", e.floor) + ")" : "") + " over " +
                  std::to_string(count) + " sequences");
      log_->validation(step_, e.loss, e.floor);
      if (std::isfinite(e.loss) && saved_step_ == step_) accept_newest();
      return true;
    } catch (const std::exception& e) {
      warn("validation after step " + std::to_string(step_) + ": " + e.what());
      return false;
    }
  }

  void sample() {
    if (signals::stop()) return;
    try {
      std::string text;
      generate<Device>(
          parameters_, prompt_, codec_->is_bytes() ? 400 : 64, sampling(o_), separator(o_),
          [&](int token) { text += codec_->text(token); }, [] { return signals::stop(); });
      report_.say("sample after step " + std::to_string(step_) + ":\n" + codec_->shown(o_.prompt) + text +
                  "\n");
    } catch (const std::exception& e) {
      warn("sample after step " + std::to_string(step_) + ": " + e.what());
    }
  }

  // Saves a checkpoint; a failure (a full disk, a number that is not finite) is said and the run goes on.
  // Older ones stay until its weights have given a finite loss.
  bool save() {
    try {
      newest_checkpoint_ = save_run(folder_, parameters_, *optimizer_,
                                    {step_, position_, table_.chosen(), table_.in_effect(), record_}, 0);
      saved_step_ = step_;
      report_.say("saved " + newest_checkpoint_);
      return true;
    } catch (const std::exception& e) {
      warn(std::string("checkpoint not saved: ") + e.what() + "; the newest is " +
           or_none(newest_checkpoint_));
      return false;
    }
  }

  // The weights of the newest checkpoint have given a finite loss: it is good, and older ones may go.
  void accept_newest() {
    if (newest_checkpoint_ == good_checkpoint_) return;
    good_checkpoint_ = newest_checkpoint_;
    try {
      delete_older_checkpoints(folder_, saved_step_, o_.keep);
    } catch (const std::exception& e) {
      warn(std::string("older checkpoints stay: ") + e.what());
    }
  }

  // They have not: it is no checkpoint to go on from, and this run wrote it.
  void reject_newest() {
    if (newest_checkpoint_ == good_checkpoint_) return;
    warn(newest_checkpoint_ + ": the loss of these weights is not finite; it is deleted");
    checkpoints::discard(newest_checkpoint_);
    newest_checkpoint_ = good_checkpoint_;
  }

  // The loss of the weights as they are, over the first training sequence; NaN where it cannot be read.
  double loss_of_first_sequence() {
    try {
      return evaluate(*model_, loader_, 1, 1, o_.seq_len, [] { return false; }).loss;
    } catch (const std::exception&) {
      return NAN;
    }
  }

  // After the last step: saves first, then validates and samples. Returns the exit code.
  int finish() {
    const bool saved = step_ == saved_step_ || save();
    bool validated = true;
    if (!signals::stop()) {
      validated = validate(validation_ && validation_->source().is_builtin() ? o_.validation_sequences : 0);
      if (o_.sample_every) sample();
    }
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
    if (signals::stop()) {
      report_.say(signals::text() + ": stopped after step " + std::to_string(step_) +
                  "; to go on: ./train_gdn -resume -o " + name);
    } else {
      report_.say("done. Text from it:  ./train_gdn -load " + name + " -gen 400" +
                  (codec_->is_bytes() ? " -prompt \"Once\"" : ""));
      report_.say("To train on:         ./train_gdn -resume -o " + name + " -n " +
                  std::to_string(2 * o_.steps));
    }
    if (!log_->flush()) throw std::runtime_error(folder_ + "/log.csv is incomplete; is the disk full?");
    if (!validated)
      throw std::runtime_error("the last validation failed; the run is kept in " + newest_checkpoint_);
    if (!report_.error().empty()) throw std::runtime_error(report_.error());
    return signals::stop() ? signals::exit_code() : 0;
  }

  static constexpr int kAhead = TrainingStep<Device>::kAhead;
  struct QueuedStep {
    StepReport report;      // without what the step itself finds out
    uint64_t position = 0;  // of the data after it
  };

  const Options o_;
  const OptionTable& table_;
  Device& dev_;
  DataLoader loader_;
  std::unique_ptr<DataLoader> validation_;
  Parameters<Device> parameters_;
  const Schedule schedule_;
  std::unique_ptr<Optimizer<Device>> optimizer_;
  std::unique_ptr<Model<Device>> model_;
  std::unique_ptr<TrainingStep<Device>> training_step_;
  std::string folder_;
  std::unique_ptr<CsvLog> log_;
  Reporter report_;
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
  double peak_ = 0;                                  // operations per second
  std::string newest_checkpoint_, good_checkpoint_;  // good: its weights have given a finite loss
};

// Where -resume goes on, its checkpoint open; nothing where -resume auto has nothing to go on from. Never
// starts anew by itself: throws one line where there is nothing whole.
std::unique_ptr<Checkpoint> open_resumed(Options& o, FolderLock& lock) {
  const bool automatic = o.resume == Resume::automatic;
  if (o.output.empty()) o.output = last_run_folder();
  if (o.output.empty() && !automatic)
    throw std::runtime_error("-resume: there is no run_001 here; name the run's folder with -o");
  if (o.output.empty() || !path_exists(o.output)) {
    if (automatic) return nullptr;
    throw std::runtime_error("-resume -o " + o.output + ": no such folder, expected a run to go on from");
  }
  lock = FolderLock(o.output);
  std::string wrong;
  const std::string newest = find_newest_checkpoint(o.output, [&](const std::string& line) {
    if (!wrong.empty()) warn(wrong);
    wrong = line;
  });
  if (!newest.empty() || automatic) {
    if (!wrong.empty()) warn(wrong);
    if (newest.empty()) return nullptr;
    std::printf("resuming %s\n", newest.c_str());
    return std::make_unique<Checkpoint>(open_checkpoint(newest));
  }
  throw std::runtime_error("-resume -o " + o.output + ": no whole checkpoint there" +
                           (wrong.empty() ? "" : " (" + wrong + ")") +
                           ", expected one to go on from; -resume auto starts where there is none");
}

// Throws one line where a new run would write over what is there.
void require_free(const std::string& folder, bool automatic) {
  if (automatic) return;
  for (const checkpoints::Folder& found : checkpoints::list_folders(folder))
    if (found.kind != checkpoints::Kind::temporary)
      throw std::runtime_error("-o " + folder + ": already holds " + found.path +
                               "; add -resume to go on from it, or choose another folder");
  if (path_exists(folder + "/log.csv"))
    throw std::runtime_error("-o " + folder +
                             ": already holds log.csv; choose another folder, or move it away");
}

template <class Device>
int run_on(Device& dev, Options& o, OptionTable& table) {
  if (o.generate) return generate_and_print(dev, o, table), 0;
  if (!o.evaluate.empty()) return evaluate_and_print(dev, o, table), 0;
  if (o.coord_check) return check_coordinates(dev, o, table), 0;
  FolderLock lock;
  std::unique_ptr<Checkpoint> resumed, loaded;
  if (o.resume != Resume::no) resumed = open_resumed(o, lock);
  const bool automatic = o.resume == Resume::automatic;
  if (!resumed && !o.output.empty()) require_free(o.output, automatic);
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
  const ModelConfig config = checkpoint ? config_of_checkpoint(o, table, *checkpoint, source.vocab_size())
                                        : config_of_options(o, source.vocab_size());
  Run<Device> run(dev, o, table, config);
  if (resumed) {
    run.start_from(*resumed);
    return run.train(o.output);
  }
  run.start_fresh();
  const std::string folder = make_run_folder(o.output);
  if (!lock.tried()) lock = FolderLock(folder);
  require_free(folder, automatic);  // by now
  return run.train(folder);
}

int run(int argc, char** argv) {
  Options o;
  OptionTable table(o);
  table.parse(argc, argv);
  if (o.help) return table.print_help(), 0;
  if (o.version) return std::printf("train_gdn %s\n%s\n", commit().c_str(), build_text().c_str()), 0;
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
#ifdef GDN_CUDA
  const std::string no_gpu = Cuda::unavailable();
  if (o.device == DeviceChoice::cuda || (o.device == DeviceChoice::automatic && no_gpu.empty())) {
    Cuda dev;
    if (trains) std::printf("device: %s\nkernels: %s\n", dev.name.c_str(), kernels_in_use().c_str());
    return run_on(dev, o, table);
  }
#else
  const std::string no_gpu = "built without nvcc";
  if (o.device == DeviceChoice::cuda)
    throw std::runtime_error(
        "-d cuda: this train_gdn was built without nvcc; install the CUDA Toolkit and run make");
#endif
  sleep_while_waiting(argv);
  Cpu<float> dev;
  if (trains)
    std::printf("device: CPU%s\n", o.device == DeviceChoice::automatic ? (" (" + no_gpu + ")").c_str() : "");
  return run_on(dev, o, table);
}

}  // namespace
}  // namespace gdn

int main(int argc, char** argv) {
  gdn::open_closed_streams();
  try {
    const int code = gdn::run(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
      gdn::warn(std::string("standard output: cannot be written: ") + std::strerror(errno));
      return code ? code : gdn::signals::work_to_save && (errno == EPIPE || errno == EIO) ? 0 : 1;
    }
    return code;
  } catch (const std::exception& e) {
    std::fflush(stdout);
    gdn::warn(e.what());
    return 1;
  }
}
