// The command line: one table declares every option once, with its argument, allowed values, default, help
// and kind; the parser (getopt_long_only: single dash), -h and the checkpoints read it.
#pragma once

#include <getopt.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <limits>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../mup.h"
#include "communicator.h"
#include "shapes.h"

namespace gdn {

enum class DeviceChoice { automatic, cuda, cpu };
enum class Resume { no, yes, automatic };

inline const char* name(DeviceChoice d) {
  constexpr const char* names[] = {"auto", "cuda", "cpu"};
  return names[int(d)];
}
inline const char* name(Resume r) {
  constexpr const char* names[] = {"", "yes", "auto"};
  return names[int(r)];
}

// A value of 0 (or -1, or nothing) marked "by device" or "by optimizer" is filled in by resolve_defaults
// (gdn/defaults.h).
struct Options {
  std::string train, validation;
  int vocab_size = 0;  // by the shards' format
  int separator = -1;  // by the shards' format
  bool skip_bad = false;
  int width = 256, base_width = 256, layers = 0, heads = 0, head_dim = 0;  // layers: by device
  int base_layers = 0;                                                     // those of layers
  DepthRule depth = DepthRule::one;
  double value_expansion = 2;
  int seq_len = 0;                        // by device
  int micro_batch = 0, global_batch = 0;  // sequences, by device
  int64_t steps = 0;                      // by device
  OptimizerKind optimizer = OptimizerKind::adamw;
  double learning_rate = -1, weight_decay = -1;  // by optimizer
  DecayMode decay_mode = DecayMode::coupled;
  double decay_time = 0;  // in shares of the run; 0: by weight_decay
  EpsMode eps_mode = EpsMode::constant;
  std::string class_factors, init_factors;
  std::optional<ClipNorm> clip_norm;  // by optimizer
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, momentum = 0.9, clip = 1;
  int64_t warmup = -1;  // a tenth of the steps
  std::string min_learning_rate = "lr/20";
  Parametrization parametrization = Parametrization::mup;
  VectorRule gains = VectorRule::vector;
  GateRule gates = GateRule::independent;
  ReadoutRule readout = ReadoutRule::param;
  double logit_factor = 1;
  DeviceChoice device = DeviceChoice::automatic;
  double timeout = 15;
  ExchangeBy exchange_by = ExchangeBy::automatic;
  uint64_t seed = 42;
  std::string output;
  int64_t validate_every = -1, validation_sequences = -1, save_every = -1, sample_every = -1;  // by device
  int keep = 2;
  int recompute = 0;
  GradientSum sum = GradientSum::tree;
  bool mask_docs = false, coord_check = false, help = false, version = false;
  Resume resume = Resume::no;
  std::string load, evaluate, mup_table;
  int64_t generate = 0;
  std::string prompt, vocabulary;
  double temperature = 0.8, top_p = 1;
  int64_t top_k = 0;
};

// What an option is about: the model (a checkpoint's stay as they are), the run (kept in its checkpoints), or
// this call of the program alone.
enum class OptionKind { model, run, this_call };

struct OptionSpec {
  const char* name;
  const char* argument;  // nullptr: a flag
  std::string help, initial;
  OptionKind kind = OptionKind::run;
  std::function<void(const std::string&)> set = {};  // none: a heading of the help
  std::function<std::string()> show = {};
  const char* word = nullptr;      // the argument may be left out, and can only be this word
  bool needed_first = false;       // of the few that -h shows first
  bool default_by_device = false;  // a run that is resumed elsewhere keeps the default that it had
  bool follows_weights = false;    // whatever uses a training's weights does as it did

  OptionSpec& first() {
    needed_first = true;
    return *this;
  }
  OptionSpec& by_device() {
    default_by_device = true;
    return *this;
  }
  OptionSpec& optional(const char* shown, const char* only) {
    argument = shown;
    word = only;
    return *this;
  }
  OptionSpec& with_weights() {
    follows_weights = true;
    return *this;
  }
  OptionSpec& of_this_call() {
    kind = OptionKind::this_call;
    return *this;
  }
};

inline std::string shortest(double x) {  // the fewest digits that read back as x
  char text[32];
  for (int digits = 1; digits <= 17; digits++) {
    std::snprintf(text, sizeof text, "%.*g", digits, x);
    if (std::strtod(text, nullptr) == x) break;
  }
  return text;
}

// The whole text as a number; nothing where it is none.
inline std::optional<double> number_in(const std::string& text) {
  char* end = nullptr;
  const double x = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || std::isnan(x)) return {};
  return x;
}

// -min_lr as a number: X, or a share lr/X of the peak; at most the peak.
inline double minimum_learning_rate(const std::string& text, double peak) {
  const bool share = text.compare(0, 3, "lr/") == 0;
  const std::optional<double> x = number_in(share ? text.substr(3) : text);
  if (!x || !(share ? *x >= 1 && *x <= 1e9 : *x >= 0 && *x <= 1e6))
    throw std::runtime_error("-min_lr '" + text +
                             "': expected a number from 0 to 1e+06, or lr/X with X from 1 to 1e+09");
  return share ? peak / *x : std::min(*x, peak);
}

class OptionTable {
 public:
  explicit OptionTable(Options& o) {
    section("data", OptionKind::run);
    text("i", "FILES", o.train,
         "training data: names or globs, a comma-separated list, of token shards (.bin) or raw text; "
         "none: the built-in stories")
        .first();
    text("j", "FILES", o.validation,
         "validation data, of the same kind; none: no validation (built-in: other stories)")
        .first();
    whole("vocab_size", "N", o.vocab_size, 0, 1 << 24,
          "tokens in the vocabulary of shards that another tokenizer made",
          "GPT-2's 50257, of llm.c's Llama 3 shards 128256")
        .with_weights();
    whole("separator", "N", o.separator, -1, 1 << 24, "token that begins a document of shards",
          "GPT-2's 50256, of Llama 3 shards 128000")
        .with_weights();
    flag("skip_bad", o.skip_bad,
         "step over a batch with a token outside the vocabulary, with one line, in place of saving and "
         "ending");
    section("model", OptionKind::model);
    whole("w", "N", o.width, 8, 1 << 16, "width of the residual stream").first();
    whole("w0", "N", o.base_width, 8, 1 << 16, "base width, where the learning rate was tuned");
    whole("L", "N", o.layers, 1, 1 << 12, "layers", "8, on the CPU 2");
    whole("L0", "N", o.base_layers, 1, 1 << 12, "base depth, where the learning rate was tuned", "-L");
    choice("depth_alpha", o.depth, {DepthRule::one, DepthRule::half, DepthRule::off},
           "how each layer's two branches are multiplied, (L0/L)^alpha, and learning rates with them; off: "
           "depth "
           "changes nothing (mup.h, section 7)");
    whole("heads", "N", o.heads, 1, 1 << 12, "fixed heads: N heads whose size grows with the width", "6");
    whole("head_dim", "N", o.head_dim, 1, 1 << 12,
          "fixed head size: heads of N keys whose number grows with the width; "
          "with -heads: exactly these",
          "none");
    real("ev", "X", o.value_expansion, 1e-3, 64, "value head size over key head size");
    choice("param", o.parametrization, {Parametrization::mup, Parametrization::mup0, Parametrization::sp},
           "parametrization (mup.h)");
    choice("readout", o.readout, {ReadoutRule::param, ReadoutRule::mup, ReadoutRule::sp},
           "research: the readout scale s as -param has it; that of mup, which grows with the head size; or "
           "dk^-1/2 (mup.h, section 9)");
    choice("gains", o.gains, {VectorRule::vector, VectorRule::hidden},
           "research: norm gains and convolution taps scale like vectors, or like hidden weights (mup.h, "
           "section 9)");
    choice(
        "gates", o.gates, {GateRule::independent, GateRule::output, GateRule::aligned},
        "research: under mup W_a and W_b start by their fan-in, or like output weights, there with gradients "
        "of independent or of aligned signs (mup.h, section 9)");
    real("logit_factor", "X", o.logit_factor, 1e-6, 1e6,
         "factor of the logits, at every width (mup.h, section 3)");
    section("training", OptionKind::run);
    whole("T", "N", o.seq_len, 1, 1 << 24, "tokens in a sequence", "1024, on the CPU 512")
        .first()
        .by_device()
        .with_weights();
    whole("b", "N", o.micro_batch, 1, 1 << 20, "sequences in a micro-batch (memory)",
          "at most 32, divides -B");
    whole("recompute", "0|1|2", o.recompute, 0, 2,
          "what the backward pass recomputes to save memory: 0 nothing, 1 the short convolution, 2 whole "
          "layers");
    choice(
        "sum", o.sum, {GradientSum::tree, GradientSum::running},
        "order in which the gradients of a step's B/b micro-batches are added: by a binary tree, whose bits "
        "do not depend on the number of ranks, or one after the other, without the tree's log2(B/b) spare "
        "buffers");
    flag("mask_docs", o.mask_docs,
         "of shards: state and convolution see nothing before a document's start (-separator); -gen does as "
         "the training did")
        .with_weights();
    whole("B", "N", o.global_batch, 1, 1 << 24, "sequences in a step", "64, on the CPU 1").by_device();
    whole("n", "N", o.steps, 1, int64_t(1) << 40, "steps", "2000, on the CPU 500").first().by_device();
    choice("opt", o.optimizer, {OptimizerKind::adamw, OptimizerKind::sgd},
           "optimizer: AdamW, or SGD with Nesterov momentum");
    real("lr", "X", o.learning_rate, 0, 1e6, "peak learning rate at the base width", "adamw 0.004, sgd 0.3")
        .first();
    text("lr_of", "CLASS=X,...", o.class_factors,
         "factors of -lr for classes of tensors: embedding, unembedding, hidden, gate, gate_scalar, conv, "
         "gain (of it final_gain, where that is not named), output_gain",
         "1 each", [](const std::string& value) { parse_class_factors(value); });
    text("init_of", "CLASS=X,...", o.init_factors,
         "factors of the initial values of classes of tensors, at every width: embedding, unembedding, "
         "hidden, "
         "gate, conv",
         "1 each", [](const std::string& value) { check_init_factors(parse_class_factors(value)); });
    text("min_lr", "X|lr/X", o.min_learning_rate,
         "learning rate at the last step (at most -lr), or its share of -lr", "lr/20",
         [](const std::string& value) { minimum_learning_rate(value, 1); });
    whole("warmup", "N", o.warmup, 0, int64_t(1) << 40, "steps of linear warm-up, then a cosine to -min_lr",
          "n / 10");
    real("wd", "X", o.weight_decay, 0, 1e3, "weight decay of Linear weights", "adamw 0.1, sgd 0");
    choice("wd_mode", o.decay_mode, {DecayMode::coupled, DecayMode::sqrt, DecayMode::independent},
           "decay a step: -wd times the tensor's own learning rate, which the size scales; scaled by the "
           "root of that; "
           "or times -lr at every size (mup.h, section 5)");
    real(
        "wd_tau", "X", o.decay_time, 1e-6, 1e9,
        "decay by its time scale: 1 / (-lr -wd) steps are X of the run's; sets -wd, and -wd_mode independent",
        "by -wd");
    real("b1", "X", o.beta1, 0, 0.999999, "AdamW beta1");
    real("b2", "X", o.beta2, 0, 0.999999, "AdamW beta2");
    real("eps", "X", o.epsilon, 1e-30, 1, "AdamW eps");
    choice(
        "eps_mode", o.eps_mode, {EpsMode::constant, EpsMode::scaled},
        "AdamW's eps at every size: the same, or the same share of a tensor's gradient (mup.h, section 6)");
    real("mom", "X", o.momentum, 0, 0.999999, "SGD's Nesterov momentum");
    real("clip", "X", o.clip, 0, 1e9, "largest norm of the gradient, 0: no clipping");
    choice(
        "clip_norm", o.clip_norm, {ClipNorm::plain, ClipNorm::scaled},
        "the norm that -clip bounds and the log shows: of all gradients alike, or of each tensor's scaled to "
        "mean the same at every width (mup.h, section 5)",
        "adamw plain, sgd scaled");
    whole("seed", "N", o.seed, 0, std::numeric_limits<int64_t>::max(),
          "seed of initial values, data order and samples");
    choice("d", o.device, {DeviceChoice::automatic, DeviceChoice::cuda, DeviceChoice::cpu}, "device")
        .of_this_call();
    choice("comm", o.exchange_by, {ExchangeBy::automatic, ExchangeBy::nccl, ExchangeBy::host},
           "of several ranks: GPU data by NCCL, or through host memory, which auto takes where ranks share a "
           "GPU")
        .of_this_call();
    real("timeout", "S", o.timeout, 1, 1e6,
         "of several ranks: one that is not heard of for S seconds ends the run")
        .of_this_call();
    section("output", OptionKind::run);
    text("o", "FOLDER", o.output, "log.csv and checkpoints", "run_001, run_002, ... (the first that is free)")
        .first()
        .of_this_call();
    whole("v", "N", o.validate_every, 0, int64_t(1) << 40, "steps between validations, 0: only at the end",
          "n / 10");
    whole("vn", "N", o.validation_sequences, 0, int64_t(1) << 40,
          "sequences in a validation on the way, 0: all (the last one takes all of a file)",
          "256, on the CPU 16")
        .by_device();
    whole("save", "N", o.save_every, 0, int64_t(1) << 40, "steps between checkpoints, 0: only at the end",
          "n / 10");
    whole("keep", "N", o.keep, 0, 1 << 20, "checkpoints that stay, 0: all");
    whole("s", "N", o.sample_every, 0, int64_t(1) << 40, "steps between samples, 0: none", "n / 10");
    choice("resume", o.resume, {Resume::yes, Resume::automatic},
           "go on from the newest complete checkpoint in -o (else the last run_XXX), with its options where "
           "none are "
           "given; 'auto': where there is none yet, start",
           "none")
        .first()
        .of_this_call()
        .optional("[auto]", "auto");
    section("coordinate check", OptionKind::this_call);
    flag("coord_check", o.coord_check,
         "8 steps at a constant -lr on one batch of -B sequences [4], then stop: sizes of activations, "
         "gradients "
         "and updates as CSV, to the file -o or standard output (scripts/coord_check.py); weights are fresh "
         "or "
         "those of -load");
    section("rules for other programs", OptionKind::this_call);
    text("mup_table", "json", o.mup_table,
         "print each tensor's initial values and factors of learning rate, decay and eps, by mup.h, and stop "
         "(scripts/mup_groups.py)",
         "none", [](const std::string& value) {
           if (value != "json") throw std::runtime_error("'" + value + "': expected json");
         });
    section("evaluation and generation, and samples while training", OptionKind::run);
    text("load", "FOLDER", o.load, "start from this checkpoint's weights").first().of_this_call();
    text("eval", "FILES", o.evaluate, "loss of -load on these files, and stop", "none").of_this_call();
    whole("gen", "N", o.generate, 1, int64_t(1) << 40, "generate N tokens from -load and stop", "none")
        .first()
        .of_this_call();
    text("prompt", "TEXT", o.prompt, "text to continue (GPT-2 tokens without -vocab: token ids)")
        .of_this_call();
    text("vocab", "FILE", o.vocabulary,
         "GPT-2's vocabulary, to have text in and out (scripts/tokenize_text.py writes it)",
         "with -gen the training's where it still is, else none: token ids")
        .with_weights();
    real("temperature", "X", o.temperature, 0, 100, "logits are divided by it, 0: the most probable token");
    whole("top_k", "N", o.top_k, 0, 1 << 24, "draw among the N most probable tokens, 0: all");
    real("top_p", "X", o.top_p, 0, 1, "draw among the most probable tokens that together have probability X");
    section("about", OptionKind::this_call);
    flag("h", o.help, "this help, also -help");
    flag("help", o.help, "");
    flag("version", o.version, "commit, compilers and GPU code of this program");
  }

  // Reads the command line; throws one line that names the option, the value seen and what was expected.
  void parse(int argc, char** argv) {
    std::vector<option> table;
    std::vector<const OptionSpec*> rows;
    for (const OptionSpec& s : specs_) {
      if (!s.set) continue;
      table.push_back({s.name,
                       s.word       ? optional_argument
                       : s.argument ? required_argument
                                    : no_argument,
                       nullptr, 0});
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
      const OptionSpec& s = *rows[index];
      const bool word_follows = s.word && !optarg && optind < argc && !std::strcmp(argv[optind], s.word);
      s.set(word_follows ? argv[optind++] : optarg ? optarg : s.word ? "yes" : "");
      given_.insert(s.name);
    }
    if (optind < argc)
      throw std::runtime_error("unexpected argument '" + std::string(argv[optind]) +
                               "'; -h lists the options");
  }

  bool given(const std::string& name) const { return given_.count(name) > 0; }

  // The options that somebody chose, on this command line or, of a run that goes on, before, as name-value
  // pairs: kept in checkpoints. Those of this call alone are not among them.
  std::vector<std::pair<std::string, std::string>> chosen() const {
    return values([&](const OptionSpec& s) { return given_.count(s.name) || restored_.count(s.name); });
  }
  // All of them, defaults included, as they are in effect.
  std::vector<std::pair<std::string, std::string>> in_effect() const {
    return values([](const OptionSpec&) { return true; });
  }

  // Sets an option that was chosen before, unless the command line gave it.
  void restore(const std::string& name, const std::string& value) {
    for (const OptionSpec& s : specs_)
      if (s.set && s.name == name && !given(name) && s.kind != OptionKind::this_call) {
        if (value != s.show()) s.set(value);
        restored_.insert(name);
      }
  }
  // Sets a default that depends on the device to the one that was in effect, unless the option was chosen.
  void restore_default(const std::string& name, const std::string& value) {
    for (const OptionSpec& s : specs_)
      if (s.set && s.name == name && s.default_by_device && !given(name) && !restored_.count(name))
        s.set(value);
  }

  // Sets an option as the training had it whose weights are used, unless the command line gave it; a file
  // that is gone is left out.
  void follow(const std::string& name, const std::string& value) {
    for (const OptionSpec& s : specs_)
      if (s.set && s.follows_weights && s.name == name && !given(name) && value != s.show() &&
          (std::strcmp(s.argument ? s.argument : "", "FILE") || access(value.c_str(), R_OK) == 0))
        s.set(value);
  }

  // The help's text: the options one needs first, then the others; lines of at most `width` columns.
  std::string help(int width) const {
    std::string text =
        "train_gdn: trains Gated Delta Networks under the maximal update parametrization\n\nneeded first\n";
    for (const OptionSpec& s : specs_)
      if (s.set && s.needed_first) text += help_of(s, width);
    std::string heading;  // shown where an option follows
    for (const OptionSpec& s : specs_) {
      if (!s.set) heading = "\n" + std::string(s.name) + "\n";
      if (!s.set || s.needed_first || s.help.empty()) continue;
      text += heading + help_of(s, width);
      heading.clear();
    }
    return text;
  }

  void print_help() const {
    winsize size = {};
    const bool terminal = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    const std::string text = help(terminal ? std::clamp<int>(size.ws_col, 50, 120) : 80);
    std::fwrite(text.data(), 1, text.size(), stdout);
  }

 private:
  template <class Chosen>
  std::vector<std::pair<std::string, std::string>> values(const Chosen& is_chosen) const {
    std::vector<std::pair<std::string, std::string>> values;
    for (const OptionSpec& s : specs_)
      if (s.set && s.kind != OptionKind::this_call && is_chosen(s)) values.emplace_back(s.name, s.show());
    return values;
  }

  static std::string help_of(const OptionSpec& s, int width) {
    constexpr size_t kIndent = 19;
    std::string line = "  -" + std::string(s.name) + (s.argument ? " " + std::string(s.argument) : "");
    std::string text;
    const std::string words = s.help + (s.initial.empty() ? "" : " [" + s.initial + "]");
    if (line.size() + 2 > kIndent) {
      text = line + "\n";
      line.clear();
    }
    line.resize(kIndent, ' ');
    bool begun = false;
    for (size_t at = 0; at < words.size();) {
      const size_t end = std::min(words.find(' ', at), words.size());
      if (begun && line.size() + 1 + end - at > size_t(width)) {
        text += line + "\n";
        line.assign(kIndent, ' ');
        begun = false;
      }
      line += (begun ? " " : "") + words.substr(at, end - at);
      begun = true;
      at = end + 1;
    }
    return text + line + "\n";
  }

  OptionSpec& add(OptionSpec spec) {
    spec.kind = kind_;
    specs_.push_back(std::move(spec));
    return specs_.back();
  }

  void section(const char* title, OptionKind kind) {
    kind_ = kind;
    specs_.push_back({title, nullptr, "", ""});
  }

  OptionSpec& flag(const char* name, bool& target, const std::string& help) {
    return add({name, nullptr, help, "", OptionKind::run,
                [&target](const std::string& value) { target = value != "0"; },
                [&target] { return target ? "1" : "0"; }});
  }

  // check: throws where the value is none of those allowed.
  OptionSpec& text(const char* name, const char* argument, std::string& target, const std::string& help,
                   const std::string& initial = "", std::function<void(const std::string&)> check = {}) {
    const auto set = [&target, name, argument, check](const std::string& value) {
      if (value.empty() && (!std::strcmp(argument, "FILES") || !std::strcmp(argument, "FOLDER")))
        throw std::runtime_error("-" + std::string(name) + " '': expected " + argument +
                                 ", found nothing (an unset variable?)");
      try {
        if (check) check(value);
      } catch (const std::runtime_error& e) {
        const std::string option = "-" + std::string(name), line = e.what();
        throw std::runtime_error(line.compare(0, option.size(), option) == 0 ? line : option + ": " + line);
      }
      target = value;
    };
    return add({name, argument, help, initial.empty() ? target : initial, OptionKind::run, set,
                [&target] { return target; }});
  }

  // One of a few named values; `target` is an enum with a function name(), or an optional of one.
  template <class Target, class Enum>
  OptionSpec& choice(const char* name_of_option, Target& target, std::initializer_list<Enum> allowed,
                     const std::string& help, const std::string& initial = "") {
    const std::vector<Enum> values(allowed);
    std::string list, prose;
    for (size_t i = 0; i < values.size(); i++) {
      list += (i ? "|" : "") + std::string(name(values[i]));
      prose += (i == 0 ? "" : i + 1 == values.size() ? " or " : ", ") + std::string(name(values[i]));
    }
    const auto set = [&target, name_of_option, values, prose](const std::string& value) {
      for (const Enum v : values)
        if (value == name(v)) {
          target = v;
          return;
        }
      throw std::runtime_error("-" + std::string(name_of_option) + " '" + value + "': expected " + prose);
    };
    const auto show = [&target] {
      if constexpr (std::is_same<Target, std::optional<Enum>>::value)
        return std::string(target ? name(*target) : "");
      else
        return std::string(name(target));
    };
    const char* argument = arguments_.emplace_back(list).c_str();
    return add(
        {name_of_option, argument, help, initial.empty() ? show() : initial, OptionKind::run, set, show});
  }

  template <class Integer>
  OptionSpec& whole(const char* name, const char* argument, Integer& target, int64_t low, int64_t high,
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
    return add({name, argument, help, initial.empty() ? std::to_string(target) : initial, OptionKind::run,
                set, [&target] { return std::to_string(target); }});
  }

  OptionSpec& real(const char* name, const char* argument, double& target, double low, double high,
                   const std::string& help, const std::string& initial = "") {
    const auto set = [&target, name, low, high](const std::string& value) {
      char* end = nullptr;
      const double x = std::strtod(value.c_str(), &end);
      if (value.empty() || *end || !(x >= low && x <= high))
        throw std::runtime_error("-" + std::string(name) + " '" + value + "': expected a number from " +
                                 shortest(low) + " to " + shortest(high));
      target = x;
    };
    return add({name, argument, help, initial.empty() ? shortest(target) : initial, OptionKind::run, set,
                [&target] { return shortest(target); }});
  }

  OptionKind kind_ = OptionKind::run;  // of the section that is being declared
  std::deque<OptionSpec> specs_;       // references to its elements stay valid
  std::deque<std::string> arguments_;  // texts that specs_ points to
  std::set<std::string> given_, restored_;
};

}  // namespace gdn
