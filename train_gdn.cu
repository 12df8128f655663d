// train_gdn: trains a Gated Delta Network language model under muP, on one NVIDIA GPU or on the CPU.
//
// This file holds what a run does: options, the training loop, validation, samples, checkpoints. The model is
// in gdn/model.h, its layers in gdn/cpu_layers.h and gdn_kernels.cuh, the scaling constants in mup.h, data in
// dataloader.h.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <iterator>
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
#include "gdn/coord_check.h"
#include "gdn/generate.h"
#include "gdn/model.h"
#include "gdn/model_checkpoint.h"
#include "gdn/optimizer.h"
#include "gdn/options.h"
#include "gdn/report.h"
#include "gdn/speed_of_light.h"
#include "gdn/training_step.h"

namespace gdn {
namespace {

volatile std::sig_atomic_t signal_received = 0;

// The first SIGINT or SIGTERM lets the step finish, saves and leaves; a second one kills.
void install_signal_handlers() {
  struct sigaction action = {};
  action.sa_handler = [](int signal) { signal_received = signal; };
  action.sa_flags = SA_RESETHAND | SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

std::string numbered(const char* format, double x) {
  char text[64];
  std::snprintf(text, sizeof text, format, x);
  return text;
}

// Fills in what the command line left open; throws one line where values contradict each other.
void resolve_defaults(Options& o, bool gpu) {
  const bool adamw = parse_optimizer(o.optimizer) == OptimizerKind::adamw;
  if (o.heads == 0 && o.head_dim == 0) o.heads = 6;
  if (o.seq_len == 0) o.seq_len = gpu ? 1024 : 128;
  if (o.global_batch == 0) o.global_batch = o.micro_batch ? o.micro_batch : gpu ? 64 : 16;
  if (o.micro_batch == 0)
    for (int b = 1; b <= std::min(o.global_batch, 32); b++)
      if (o.global_batch % b == 0) o.micro_batch = b;
  if (o.global_batch % o.micro_batch != 0)
    throw std::runtime_error("-B " + std::to_string(o.global_batch) + ": must be a multiple of -b " +
                             std::to_string(o.micro_batch));
  if (o.steps == 0) o.steps = gpu ? 2000 : 500;
  if (o.learning_rate < 0) o.learning_rate = adamw ? 0.004 : 0.3;
  if (o.weight_decay < 0) o.weight_decay = adamw ? 0.1 : 0;
  if (o.clip_norm.empty()) o.clip_norm = name(adamw ? ClipNorm::plain : ClipNorm::scaled);
  if (o.warmup < 0) o.warmup = o.steps / 10;
  if (o.warmup > o.steps)
    throw std::runtime_error("-warmup " + std::to_string(o.warmup) + ": must not exceed -n " +
                             std::to_string(o.steps));
  o.min_learning_rate = std::min(o.min_learning_rate, o.learning_rate);
  const int64_t tenth = std::max<int64_t>(1, o.steps / 10);
  for (int64_t* every : {&o.validate_every, &o.save_every, &o.sample_every})
    if (*every < 0) *every = tenth;
  if (o.validation_sequences < 0) o.validation_sequences = gpu ? 256 : 32;
  require_batch(o.micro_batch, o.global_batch, o.seq_len);
}

OptimizerConfig optimizer_config(const Options& o) {
  return {parse_optimizer(o.optimizer),
          float(o.weight_decay),
          float(o.beta1),
          float(o.beta2),
          float(o.epsilon),
          float(o.momentum),
          float(o.clip),
          parse_clip_norm(o.clip_norm),
          parse_decay_mode(o.decay_mode),
          parse_class_factors(o.class_factors)};
}

// The token that begins a document.
int document_start(const Options& o) { return o.separator >= 0 ? o.separator : kEndOfText; }
int separator(const Options& o) { return o.mask_docs ? document_start(o) : kNoSeparator; }

Sampling sampling(const Options& o) { return {o.temperature, o.top_k, o.top_p, o.seed}; }

// The first of run_001, run_002, ... that does not exist, or to resume the last one that does.
std::string run_folder(bool resume) {
  std::string last;
  for (int n = 1;; n++) {
    char name[16];
    std::snprintf(name, sizeof name, "run_%03d", n);
    if (!std::filesystem::exists(name)) return resume && !last.empty() ? last : name;
    last = name;
  }
}

void warn(const std::string& line) { std::fprintf(stderr, "train_gdn: %s\n", line.c_str()); }

template <class Device>
class Run {
 public:
  Run(Device& dev, const Options& options, const OptionTable& table, const ModelConfig& config)
      : o_(options),
        table_(table),
        dev_(dev),
        loader_(o_.train, o_.seq_len, o_.global_batch, o_.seed, 0, 1, Split::train, o_.vocab_size),
        parameters_(dev, config),
        schedule_{o_.learning_rate, o_.min_learning_rate, o_.warmup, o_.steps} {
    if (!o_.validation.empty() && loader_.source().is_builtin())
      throw std::runtime_error("-j '" + o_.validation + "': without -i training is on the built-in stories, which have a "
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
    training_step_ = std::make_unique<TrainingStep<Device>>(parameters_, *model_, *optimizer_, o_.global_batch,
                                                            o_.micro_batch, o_.seq_len);
    inputs_.resize(size_t(o_.global_batch) * o_.seq_len);
    targets_.resize(inputs_.size());
    codec_ = std::make_unique<TextCodec>(config.vocab, o_.vocabulary, document_start(o_));
    prompt_ = codec_->tokens(o_.prompt);
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
    newest_checkpoint_ = checkpoint.path;
  }

  // Trains to the last step, or to a signal. While the GPU does a step, the next one is queued, and the batch
  // after it read; what a validation, a sample or a checkpoint is due after is waited for first.
  void train() {
    log_ = std::make_unique<CsvLog>(o_.output + "/log.csv", step_);
    describe();
    peak_ = measure_peak_flops(dev_);
    report_.say("peak matrix product: " + numbered("%.2f TFLOP/s", peak_ / 1e12) + ", output in " + o_.output);
    const int64_t first = step_ + 1;
    for (;;) {
      const int64_t newest = step_ + int64_t(queued_.size());  // the last step queued
      bool go_on = newest < o_.steps && !signal_received && (queued_.empty() || !anything_due(newest));
      if (go_on && !have_batch_) read_batch();
      if (go_on && batch_error_) {
        if (queued_.empty()) fail_batch();
        go_on = false;  // what is queued is finished first
      }
      if (go_on) queue_step();
      if (queued_.empty()) break;
      if (!go_on || int(queued_.size()) > kAhead) {
        finish_step();
        if (step_ == first) report_.say("first step after " + numbered("%.2f s", seconds_since_process_start()));
        if (due(o_.validate_every, step_)) validate(o_.validation_sequences);
        if (due(o_.sample_every, step_)) sample();
        if (due(o_.save_every, step_)) save();
      }
      if (go_on && kAhead > 0 && newest + 1 < o_.steps) read_batch();
    }
    if (signal_received)
      report_.say("signal " + std::to_string(int(signal_received)) + ": stopped after step " +
                  std::to_string(step_));
    else {
      validate(validation_ && validation_->source().is_builtin() ? o_.validation_sequences : 0);
      if (o_.sample_every) sample();
    }
    if (!save())
      throw std::runtime_error("the last checkpoint could not be saved; the newest is " + newest_text());
    if (log_->failed()) throw std::runtime_error(o_.output + "/log.csv is incomplete; is the disk full?");
  }

 private:
  void describe() {
    const ModelConfig& c = parameters_.config;
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

  // Reads the next step's batch. What is wrong with it (a token outside the vocabulary, far into the data) is
  // said when the steps before it are done.
  void read_batch() {
    have_batch_ = true;
    try {
      batch_floor_ = loader_.next(inputs_.data(), targets_.data());
      training_step_->load(inputs_.data(), targets_.data());
    } catch (const std::exception&) {
      batch_error_ = std::current_exception();
    }
  }

  [[noreturn]] void fail_batch() {
    if (step_ > saved_step_) save();  // keep what was learned
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

  // Waits for the oldest queued step and reports it. Throws when its loss or gradient is not finite; it has then
  // changed nothing.
  void finish_step() {
    StepReport r = queued_.front().report;
    const typename TrainingStep<Device>::Result result = training_step_->wait();
    r.loss = result.loss;
    r.norm = result.norm;
    if (!std::isfinite(r.loss)) fail_not_finite("loss", r);
    if (!std::isfinite(r.norm)) fail_not_finite("gradient", r);
    step_ = r.step;
    position_ = queued_.front().position;
    queued_.pop_front();
    const double tokens = double(o_.global_batch) * o_.seq_len;
    r.milliseconds = 1000 * result.seconds;
    r.tokens_per_second = tokens / result.seconds;
    r.speed_of_light = flops_per_token(parameters_.config) * tokens / (result.seconds * peak_);
    report_.step(r);
    log_->train(r);
  }

  [[noreturn]] void fail_not_finite(const char* what, const StepReport& r) {
    throw std::runtime_error("step " + std::to_string(r.step) + ": the " + what + " is not finite (loss " +
                             shortest(r.loss) + "); lower -lr; the last good checkpoint is " + newest_text());
  }

  std::string newest_text() const { return newest_checkpoint_.empty() ? "none" : newest_checkpoint_; }

  // Mean loss over the first `limit` validation sequences (0: all), in file order.
  void validate(int64_t limit) {
    if (!validation_) return;
    const int64_t count = limit ? std::min(limit, validation_->sequences()) : validation_->sequences();
    double loss = 0, floor = 0;
    for (int64_t first = 0; first < count; first += o_.micro_batch) {
      const int rows = int(std::min<int64_t>(o_.micro_batch, count - first));
      for (int r = 0; r < rows; r++)
        floor += validation_->read(first + r, &inputs_[int64_t(r) * o_.seq_len],
                                   &targets_[int64_t(r) * o_.seq_len]);
      model_->forward_loss(inputs_.data(), targets_.data(), rows, o_.seq_len);
      loss += model_->loss_sum();
    }
    loss /= double(count * o_.seq_len);
    floor /= double(count);
    report_.say("validation after step " + std::to_string(step_) + ": loss " + numbered("%.4f", loss) +
                (std::isfinite(floor) ? " (floor " + numbered("%.4f", floor) + ")" : "") + " over " +
                std::to_string(count) + " sequences");
    log_->validation(step_, loss);
  }

  void sample() {
    std::string text;
    generate<Device>(
        parameters_, prompt_, codec_->is_bytes() ? 400 : 64, sampling(o_), separator(o_),
        [&](int token) { text += codec_->text(token); }, [] { return signal_received != 0; });
    report_.say("sample after step " + std::to_string(step_) + ":\n" + codec_->shown(o_.prompt) + text + "\n");
  }

  // Saves a checkpoint; a failure (a full disk) is said and the run goes on.
  bool save() {
    try {
      newest_checkpoint_ = save_run(o_.output, parameters_, *optimizer_,
                                    {step_, position_, table_.values()}, o_.keep);
      saved_step_ = step_;
      report_.say("saved " + newest_checkpoint_);
      return true;
    } catch (const std::exception& e) {
      warn(std::string("checkpoint not saved: ") + e.what() + "; the newest is " + newest_text());
      return false;
    }
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
  std::unique_ptr<CsvLog> log_;
  Reporter report_;
  std::vector<int32_t> inputs_, targets_;  // [B,T]
  std::unique_ptr<TextCodec> codec_;
  std::vector<int32_t> prompt_;  // of samples
  bool have_batch_ = false;  // the next step's has been read
  double batch_floor_ = 0;
  std::exception_ptr batch_error_;
  std::deque<QueuedStep> queued_;
  int64_t step_ = 0, saved_step_ = 0;  // steps done, and in the newest checkpoint
  uint64_t position_ = 0;              // in the data after them; the loader may have read on
  double peak_ = 0;                    // operations per second
  std::string newest_checkpoint_;
};

// The model the options describe. With a checkpoint it must be the checkpoint's; options not given follow it.
ModelConfig choose_config(Options& o, const OptionTable& table, int vocab, const Checkpoint* checkpoint) {
  if (checkpoint) {
    const ModelConfig saved = read_config(*checkpoint);
    bool given = false;
    for (const char* name :
         {"w", "w0", "L", "heads", "head_dim", "ev", "param", "gains", "gates", "logit_factor"})
      given = given || table.given(name);
    if (!given) {
      if (vocab && vocab != saved.vocab)
        throw std::runtime_error(checkpoint->path + ": has a vocabulary of " + std::to_string(saved.vocab) +
                                 ", the data one of " + std::to_string(vocab));
      return saved;
    }
  }
  ModelConfig config = make_config(o.width, o.base_width, o.layers, o.heads, o.head_dim, o.value_expansion,
                                   vocab, parse_parametrization(o.parametrization));
  config.vectors = parse_vector_rule(o.gains);
  config.gates = parse_gate_rule(o.gates);
  config.logit_factor = o.logit_factor;
  if (checkpoint) require_same_shape(config, read_config(*checkpoint), checkpoint->path);
  return config;
}

// A training's checkpoint says whether documents were masked, and where the vocabulary was.
template <class Device>
void generate_and_print(Device& dev, const Options& o, OptionTable& table) {
  const Checkpoint checkpoint = open_any_checkpoint(o.load);
  if (checkpoint.has_training_state)
    for (const auto& [name, value] : read_counters(checkpoint).options)
      if (name == "mask_docs" || name == "separator" || (name == "vocab" && std::filesystem::exists(value)))
        table.restore(name, value);
  Parameters<Device> parameters(dev, read_config(checkpoint));
  load_parameters(parameters, checkpoint);
  const TextCodec codec(parameters.config.vocab, o.vocabulary, document_start(o));
  const std::vector<int32_t> prompt = codec.tokens(o.prompt);
  std::printf("%s", codec.shown(o.prompt).c_str());
  const auto emit = [&](int token) {
    const std::string text = codec.text(token);
    std::fwrite(text.data(), 1, text.size(), stdout);  // may hold zero bytes
    std::fflush(stdout);
  };
  generate<Device>(parameters, prompt, o.generate, sampling(o), separator(o), emit,
                   [] { return signal_received != 0; });
  std::printf("\n");
}

// The coordinate check of the model the options describe (gdn/coord_check.h).
template <class Device>
void check_coordinates(Device& dev, Options& o, const OptionTable& table) {
  if (o.global_batch == 0) o.global_batch = 4;
  o.micro_batch = o.global_batch;  // one micro-batch a step
  resolve_defaults(o, Device::is_gpu);
  DataLoader loader(o.train, o.seq_len, o.global_batch, o.seed, 0, 1, Split::train, o.vocab_size);
  std::vector<int32_t> tokens(size_t(o.global_batch) * o.seq_len), targets(tokens.size());
  loader.next(tokens.data(), targets.data());
  std::unique_ptr<Checkpoint> loaded;
  if (!o.load.empty()) loaded = std::make_unique<Checkpoint>(open_any_checkpoint(o.load));
  const ModelConfig config = choose_config(o, table, loader.source().vocab_size(), loaded.get());
  std::function<void(Parameters<Device>&)> start;
  if (loaded)
    start = [&](Parameters<Device>& parameters) { load_parameters(parameters, *loaded); };
  else
    start = [&](Parameters<Device>& parameters) {
      parameters.initialize(o.seed, parse_class_factors(o.init_factors));
    };
  const std::vector<CoordRow> rows =
      coordinate_check(dev, config, optimizer_config(o), o.learning_rate, o.seed, tokens, targets,
                       o.global_batch, o.seq_len, kCoordSteps[std::size(kCoordSteps) - 1], start);
  write_coord_rows(o.output, rows, config, parse_optimizer(o.optimizer), o.seed);
}

template <class Device>
void run_on(Device& dev, Options& o, OptionTable& table) {
  if (o.generate) return generate_and_print(dev, o, table);
  if (o.coord_check) return check_coordinates(dev, o, table);
  if (o.output.empty()) o.output = run_folder(o.resume);
  std::unique_ptr<Checkpoint> resumed;
  const std::string newest = find_newest_checkpoint(o.output, warn);
  if (o.resume && !newest.empty()) {
    resumed = std::make_unique<Checkpoint>(open_checkpoint(newest));
    for (const auto& [name, value] : read_counters(*resumed).options) table.restore(name, value);
    std::printf("resuming %s\n", newest.c_str());
  } else if (o.resume) {
    std::printf("no complete checkpoint in %s: starting at step 1\n", o.output.c_str());
  } else if (!newest.empty()) {
    throw std::runtime_error("-o " + o.output + ": already holds " + newest +
                             "; add -resume to go on from it, or choose another folder");
  }
  resolve_defaults(o, Device::is_gpu);
  const TokenSource source(o.train, 0, Split::train, o.vocab_size);
  const int vocab = source.vocab_size();
  if (o.separator < 0) o.separator = source.separator();
  std::unique_ptr<Checkpoint> loaded;
  if (!resumed && !o.load.empty()) loaded = std::make_unique<Checkpoint>(open_any_checkpoint(o.load));
  const ModelConfig config = choose_config(o, table, vocab, resumed ? resumed.get() : loaded.get());
  std::filesystem::create_directories(o.output);
  Run<Device> run(dev, o, table, config);
  if (resumed)
    run.start_from(*resumed);
  else
    run.start_fresh();
  run.train();
}

int run(int argc, char** argv) {
  Options o;
  OptionTable table(o);
  table.parse(argc, argv);
  if (o.help) {
    table.print_help();
    return 0;
  }
  parse_parametrization(o.parametrization);
  parse_optimizer(o.optimizer);
  if (o.device != "auto" && o.device != "cuda" && o.device != "cpu")
    throw std::runtime_error("-d '" + o.device + "': expected auto, cuda or cpu");
  if (o.generate && o.load.empty()) throw std::runtime_error("-gen needs a checkpoint: -load FOLDER");
  parse_vector_rule(o.gains);
  parse_gate_rule(o.gates);
  parse_decay_mode(o.decay_mode);
  if (!o.clip_norm.empty()) parse_clip_norm(o.clip_norm);
  parse_class_factors(o.class_factors);
  check_init_factors(parse_class_factors(o.init_factors));
  if (o.resume && !o.load.empty()) throw std::runtime_error("-resume and -load exclude each other");
  if (o.coord_check && (o.resume || o.generate || o.mask_docs))
    throw std::runtime_error(
        "-coord_check neither resumes nor generates, and takes whole sequences: leave out -resume, -gen and "
        "-mask_docs");
  install_signal_handlers();
#ifdef GDN_CUDA
  const std::string no_gpu = Cuda::unavailable();
  if (o.device == "cuda" || (o.device == "auto" && no_gpu.empty())) {
    Cuda dev;
    if (!o.generate && !o.coord_check) std::printf("device: %s\nkernels: %s\n", dev.name.c_str(), kernels_in_use().c_str());
    run_on(dev, o, table);
    return 0;
  }
#else
  const std::string no_gpu = "built without nvcc";
  if (o.device == "cuda")
    throw std::runtime_error(
        "-d cuda: this train_gdn was built without nvcc; install the CUDA Toolkit and run make");
#endif
  Cpu<float> dev;
  if (!o.generate && !o.coord_check) std::printf("device: CPU%s\n", o.device == "auto" ? (" (" + no_gpu + ")").c_str() : "");
  run_on(dev, o, table);
  return 0;
}

}  // namespace
}  // namespace gdn

int main(int argc, char** argv) {
  try {
    return gdn::run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "train_gdn: %s\n", e.what());
    return 1;
  }
}
