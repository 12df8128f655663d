// The command line: one table holds every option's name, argument, default, unit and help, and both the
// parser (getopt_long_only: single dash) and -h read it.
#pragma once

#include <getopt.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../mup.h"

namespace gdn {

// A value of 0 (or -1, or "") marked "by device" or "by optimizer" is filled in by resolve_defaults of
// train_gdn.cu.
struct Options {
  std::string train, validation;
  int width = 256, base_width = 256, layers = 8, heads = 0, head_dim = 0;
  double value_expansion = 2;
  int seq_len = 0;                        // by device
  int micro_batch = 0, global_batch = 0;  // sequences, by device
  int64_t steps = 0;                      // by device
  std::string optimizer = "adamw";
  double learning_rate = -1, weight_decay = -1;  // by optimizer
  std::string decay_mode = "coupled", class_factors, init_factors;
  std::string clip_norm;  // by optimizer
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, momentum = 0.9, clip = 1;
  int64_t warmup = -1;  // a tenth of the steps
  double min_learning_rate = 5e-5;
  std::string parametrization = "mup", gains = "vector", gates = "independent";
  double logit_factor = 1;
  std::string device = "auto";
  uint64_t seed = 42;
  std::string output;
  int64_t validate_every = -1, validation_sequences = -1, save_every = -1, sample_every = -1;  // by device
  int keep = 2;
  int recompute = 0;
  int vocab_size = 0;   // by the shards' format
  int separator = -1;  // by the shards' format
  bool mask_docs = false, resume = false, coord_check = false, help = false;
  std::string load;
  int64_t generate = 0;
  std::string prompt, vocabulary;
  double temperature = 0.8, top_p = 1;
  int64_t top_k = 0;
};

struct OptionSpec {
  const char* name;
  const char* argument;  // nullptr: a flag
  std::string help, initial;
  std::function<void(const std::string&)> set;  // none: a heading of the help
  std::function<std::string()> show;
};

inline std::string shortest(double x) {  // the fewest digits that read back as x
  char text[32];
  for (int digits = 1; digits <= 17; digits++) {
    std::snprintf(text, sizeof text, "%.*g", digits, x);
    if (std::strtod(text, nullptr) == x) break;
  }
  return text;
}

class OptionTable {
 public:
  explicit OptionTable(Options& o) {
    section("data");
    text("i", "FILES", o.train,
         "training data: a glob or a list with commas of token shards (.bin) or raw text; "
         "none: the built-in stories");
    text("j", "FILES", o.validation,
         "validation data, of the same kind; none: no validation (built-in: other stories)");
    whole("vocab_size", "N", o.vocab_size, 0, 1 << 24,
          "tokens in the vocabulary of shards that another tokenizer made", "GPT-2's 50257, of llm.c's Llama 3 shards 128256");
    whole("separator", "N", o.separator, -1, 1 << 24, "token that begins a document of shards",
          "GPT-2's 50256, of Llama 3 shards 128000");
    section("model");
    whole("w", "N", o.width, 8, 1 << 16, "width of the residual stream");
    whole("w0", "N", o.base_width, 8, 1 << 16, "base width, where the learning rate was tuned");
    whole("L", "N", o.layers, 1, 1 << 12, "layers");
    whole("heads", "N", o.heads, 1, 1 << 12, "fixed heads: N heads whose size grows with the width", "6");
    whole("head_dim", "N", o.head_dim, 1, 1 << 12,
          "fixed head size: heads of N keys whose number grows with the width; "
          "with -heads: exactly these",
          "none");
    real("ev", "X", o.value_expansion, 1e-3, 64, "value head size over key head size");
    text("param", "mup|mup0|sp", o.parametrization, "parametrization (mup.h)");
    text("gains", "vector|hidden", o.gains,
         "norm gains and convolution taps scale like vectors, or like hidden weights (mup.h, open question 1)");
    text("gates", "independent|output|aligned", o.gates,
         "under mup W_a and W_b start by their fan-in, or like output weights, there with gradients of independent or of "
         "aligned signs (mup.h, open question 2)");
    text("init_of", "CLASS=X,...", o.init_factors,
         "factors of the initial values of classes of tensors, at every width: embedding, unembedding, hidden, gate, conv",
         "1 each");
    real("logit_factor", "X", o.logit_factor, 1e-6, 1e6, "factor of the logits, at every width (mup.h, section 3)");
    section("training");
    whole("T", "N", o.seq_len, 1, 1 << 24, "tokens in a sequence", "1024, on the CPU 128");
    whole("b", "N", o.micro_batch, 1, 1 << 20, "sequences in a micro-batch (memory)",
          "at most 32, divides -B");
    whole("recompute", "0|1|2", o.recompute, 0, 2,
          "what the backward computes again to save memory: 0 nothing, 1 the short convolution, 2 whole "
          "layers");
    flag("mask_docs", o.mask_docs,
         "of shards: state and convolution see nothing before a document's start (-separator); -gen does as the training "
         "did");
    whole("B", "N", o.global_batch, 1, 1 << 24, "sequences in a step", "64, on the CPU 16");
    whole("n", "N", o.steps, 1, int64_t(1) << 40, "steps", "2000, on the CPU 500");
    text("opt", "adamw|sgd", o.optimizer, "optimizer: AdamW, or SGD with Nesterov momentum");
    real("lr", "X", o.learning_rate, 0, 1e6, "peak learning rate at the base width", "adamw 0.004, sgd 0.3");
    text("lr_of", "CLASS=X,...", o.class_factors,
         "factors of -lr for classes of tensors: embedding, unembedding, hidden, gate, gate_scalar, conv, "
         "gain, output_gain",
         "1 each");
    real("min_lr", "X", o.min_learning_rate, 0, 1e6, "learning rate at the last step (at most -lr)");
    whole("warmup", "N", o.warmup, 0, int64_t(1) << 40, "steps of linear warm-up, then a cosine to -min_lr",
          "-n / 10");
    real("wd", "X", o.weight_decay, 0, 1e3, "weight decay of Linear weights", "adamw 0.1, sgd 0");
    text("wd_mode", "coupled|independent", o.decay_mode,
         "decay a step: -wd times the tensor's own learning rate, or times -lr at every width");
    real("b1", "X", o.beta1, 0, 1, "AdamW beta1");
    real("b2", "X", o.beta2, 0, 1, "AdamW beta2");
    real("eps", "X", o.epsilon, 0, 1, "AdamW eps");
    real("mom", "X", o.momentum, 0, 1, "SGD's Nesterov momentum");
    real("clip", "X", o.clip, 0, 1e9, "largest norm of the gradient, 0: no clipping");
    text("clip_norm", "plain|scaled", o.clip_norm,
         "the norm that -clip bounds and the log shows: of all gradients alike, or of each tensor's scaled to mean the same "
         "at every width (mup.h, section 5)",
         "adamw plain, sgd scaled");
    whole("seed", "N", o.seed, 0, std::numeric_limits<int64_t>::max(),
          "seed of initial values, data order and samples");
    text("d", "auto|cuda|cpu", o.device, "device");
    section("output");
    text("o", "FOLDER", o.output, "log.csv and checkpoints",
         "run_001, run_002, ... (the first that is free)");
    whole("v", "N", o.validate_every, 0, int64_t(1) << 40, "steps between validations, 0: only at the end",
          "-n / 10");
    whole("vn", "N", o.validation_sequences, 0, int64_t(1) << 40,
          "sequences in a validation on the way, 0: all (the last one takes all of a file)",
          "256, on the CPU 32");
    whole("save", "N", o.save_every, 0, int64_t(1) << 40, "steps between checkpoints, 0: only at the end",
          "-n / 10");
    whole("keep", "N", o.keep, 0, 1 << 20, "checkpoints that stay, 0: all");
    whole("s", "N", o.sample_every, 0, int64_t(1) << 40, "steps between samples, 0: none", "-n / 10");
    flag("resume", o.resume,
         "go on from the newest complete checkpoint in -o, with its options where none are given");
    section("coordinate check");
    flag("coord_check", o.coord_check,
         "8 steps at a constant -lr on one batch of -B sequences [4], then stop: sizes of activations, gradients and "
         "updates as CSV, to the file -o or standard output (scripts/coord_check.py); weights are fresh or those of -load");
    section("generation, and samples while training");
    text("load", "FOLDER", o.load, "start from this checkpoint's weights");
    whole("gen", "N", o.generate, 1, int64_t(1) << 40, "generate N tokens from -load and stop", "none");
    text("prompt", "TEXT", o.prompt, "text to continue (GPT-2 tokens without -vocab: token ids)");
    text("vocab", "FILE", o.vocabulary,
         "GPT-2's vocabulary, to have text in and out (scripts/tokenize_text.py writes it)",
         "with -gen the training's where it still is, else none: token ids");
    real("temperature", "X", o.temperature, 0, 100, "logits are divided by it, 0: the most probable token");
    whole("top_k", "N", o.top_k, 0, 1 << 24, "draw among the N most probable tokens, 0: all");
    real("top_p", "X", o.top_p, 0, 1, "draw among the most probable tokens that together have probability X");
    flag("h", o.help, "this help");
  }

  // Reads the command line; throws one line that names the option, the value seen and what was expected.
  void parse(int argc, char** argv) {
    std::vector<option> table;
    std::vector<const OptionSpec*> rows;
    for (const OptionSpec& s : specs_) {
      if (!s.set) continue;
      table.push_back({s.name, s.argument ? required_argument : no_argument, nullptr, 0});
      rows.push_back(&s);
    }
    table.push_back({nullptr, 0, nullptr, 0});
    opterr = 0;
    optind = 1;
    int index = 0;
    for (int code; (code = getopt_long_only(argc, argv, ":", table.data(), &index)) != -1;) {
      const std::string seen = argv[optind - 1];
      if (code == '?')
        throw std::runtime_error("unknown or ambiguous option '" + seen + "'; -h lists the options");
      if (code == ':') throw std::runtime_error("option '" + seen + "' needs a value; -h lists the options");
      rows[index]->set(optarg ? optarg : "");
      given_.insert(rows[index]->name);
    }
    if (optind < argc)
      throw std::runtime_error("unexpected argument '" + std::string(argv[optind]) +
                               "'; -h lists the options");
  }

  bool given(const std::string& name) const { return given_.count(name) > 0; }

  // Values of all options but those that say where to start and stop, as name-value pairs: kept in
  // checkpoints.
  std::vector<std::pair<std::string, std::string>> values() const {
    std::vector<std::pair<std::string, std::string>> values;
    for (const OptionSpec& s : specs_)
      if (s.set && !about_this_call(s.name)) values.emplace_back(s.name, s.show());
    return values;
  }

  // Sets an option from a checkpoint unless the command line gave it.
  void restore(const std::string& name, const std::string& value) {
    for (const OptionSpec& s : specs_)
      if (s.set && s.name == name && !given(name) && !about_this_call(name) && value != s.show())
        s.set(value);
  }

  void print_help() const {
    std::printf("train_gdn: trains Gated Delta Networks under the maximal update parametrization\n");
    for (const OptionSpec& s : specs_) {
      if (!s.set) {
        std::printf("\n%s\n", s.name);
        continue;
      }
      const std::string head = "-" + std::string(s.name) + (s.argument ? " " + std::string(s.argument) : "");
      std::printf("  %-22s %s%s\n", head.c_str(), s.help.c_str(),
                  s.initial.empty() ? "" : (" [" + s.initial + "]").c_str());
    }
  }

 private:
  static bool about_this_call(const std::string& name) {
    for (const char* mine : {"o", "d", "load", "gen", "prompt", "resume", "coord_check", "h"})
      if (name == mine) return true;
    return false;
  }

  void section(const char* title) { specs_.push_back({title, nullptr, "", "", nullptr, nullptr}); }

  void flag(const char* name, bool& target, const std::string& help) {
    specs_.push_back({name, nullptr, help, "", [&target](const std::string& value) { target = value != "0"; },
                      [&target] { return target ? "1" : "0"; }});
  }

  void text(const char* name, const char* argument, std::string& target, const std::string& help,
            const std::string& initial = "") {
    specs_.push_back({name, argument, help, initial.empty() ? target : initial,
                      [&target, name, argument](const std::string& value) {
                        if (value.empty() && (!std::strcmp(argument, "FILES") || !std::strcmp(argument, "FOLDER")))
                          throw std::runtime_error("-" + std::string(name) + " '': expected " + argument +
                                                   ", found nothing (an unset variable?)");
                        target = value;
                      },
                      [&target] { return target; }});
  }

  template <class Integer>
  void whole(const char* name, const char* argument, Integer& target, int64_t low, int64_t high,
             const std::string& help, const std::string& initial = "") {
    const auto set = [&target, name, low, high](const std::string& value) {
      char* end = nullptr;
      errno = 0;
      const long long n = std::strtoll(value.c_str(), &end, 10);
      if (value.empty() || *end || errno || n < low || n > high)
        throw std::runtime_error("-" + std::string(name) + " '" + value + "': expected a whole number from " +
                                 std::to_string(low) + " to " + std::to_string(high));
      target = Integer(n);
    };
    specs_.push_back({name, argument, help, initial.empty() ? std::to_string(target) : initial, set,
                      [&target] { return std::to_string(target); }});
  }

  void real(const char* name, const char* argument, double& target, double low, double high,
            const std::string& help, const std::string& initial = "") {
    const auto set = [&target, name, low, high](const std::string& value) {
      char* end = nullptr;
      const double x = std::strtod(value.c_str(), &end);
      if (value.empty() || *end || !(x >= low && x <= high))
        throw std::runtime_error("-" + std::string(name) + " '" + value + "': expected a number from " +
                                 shortest(low) + " to " + shortest(high));
      target = x;
    };
    specs_.push_back({name, argument, help, initial.empty() ? shortest(target) : initial, set,
                      [&target] { return shortest(target); }});
  }

  std::vector<OptionSpec> specs_;
  std::set<std::string> given_;
};

}  // namespace gdn
