// What the options (gdn/options.h) mean: defaults filled in, and the model, the optimizer and the sampling
// they describe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "generate.h"
#include "model_checkpoint.h"
#include "model_config.h"
#include "optimizer.h"
#include "options.h"

namespace gdn {

// Fills in what the command line left open; throws one line where values contradict each other.
inline void resolve_defaults(Options& o, bool gpu) {
  const bool adamw = o.optimizer == OptimizerKind::adamw;
  if (o.layers == 0) o.layers = gpu ? 8 : 2;
  if (o.base_layers == 0) o.base_layers = o.layers;
  if (o.heads == 0 && o.head_dim == 0) o.heads = 6;
  if (o.seq_len == 0) o.seq_len = gpu ? 1024 : 512;
  if (o.global_batch == 0) o.global_batch = o.micro_batch ? o.micro_batch : gpu ? 64 : 1;
  if (o.micro_batch == 0)
    for (int b = 1; b <= std::min(o.global_batch, 32); b++)
      if (o.global_batch % b == 0) o.micro_batch = b;
  if (o.global_batch % o.micro_batch != 0)
    throw std::runtime_error("-B " + std::to_string(o.global_batch) + ": must be a multiple of -b " +
                             std::to_string(o.micro_batch));
  if (o.steps == 0) o.steps = gpu ? 2000 : 500;
  if (o.learning_rate < 0) o.learning_rate = adamw ? 0.004 : 0.3;
  if (o.weight_decay < 0) o.weight_decay = adamw ? 0.1 : 0;
  if (o.decay_time > 0) {
    if (!(o.learning_rate > 0)) throw std::runtime_error("-wd_tau: needs a -lr above 0");
    o.weight_decay = 1 / (o.learning_rate * o.decay_time * double(o.steps));
    o.decay_mode = DecayMode::independent;
  }
  if (!o.clip_norm) o.clip_norm = adamw ? ClipNorm::plain : ClipNorm::scaled;
  if (o.warmup < 0) o.warmup = o.steps / 10;
  if (o.warmup > o.steps)
    throw std::runtime_error("-warmup " + std::to_string(o.warmup) + ": must not exceed -n " +
                             std::to_string(o.steps));
  const int64_t tenth = std::max<int64_t>(1, o.steps / 10);
  for (int64_t* every : {&o.validate_every, &o.save_every, &o.sample_every})
    if (*every < 0) *every = tenth;
  if (o.validation_sequences < 0) o.validation_sequences = gpu ? 256 : 16;
  require_batch(o.micro_batch, o.global_batch, o.seq_len);
}

inline OptimizerConfig optimizer_config(const Options& o) {
  return {o.optimizer,      float(o.weight_decay),
          float(o.beta1),   float(o.beta2),
          float(o.epsilon), float(o.momentum),
          float(o.clip),    o.clip_norm.value_or(ClipNorm::plain),
          o.decay_mode,     parse_class_factors(o.class_factors),
          o.eps_mode};
}

// The token that begins a document.
inline int document_start(const Options& o) { return o.separator >= 0 ? o.separator : kEndOfText; }
inline int separator(const Options& o) { return o.mask_docs ? document_start(o) : kNoSeparator; }

inline Sampling sampling(const Options& o) { return {o.temperature, o.top_k, o.top_p, o.seed}; }

// The model the options describe.
inline ModelConfig config_of_options(const Options& o, int vocab) {
  ModelConfig config = make_config(o.width, o.base_width, o.layers, o.heads, o.head_dim, o.value_expansion,
                                   vocab, o.parametrization);
  config.vectors = o.gains;
  config.gates = o.gates;
  config.readout = o.readout;
  config.logit_factor = o.logit_factor;
  config.base_layers = o.base_layers;
  config.depth = o.depth;
  return config;
}

// The checkpoint's model, of which the options may name what they want. Throws one line where they want
// another, or the data have another vocabulary (0: none is known).
inline ModelConfig config_of_checkpoint(const Options& o, const OptionTable& table,
                                        const Checkpoint& checkpoint, int vocab) {
  const ModelConfig saved = read_config(checkpoint);
  ModelConfig wanted = saved;
  if (table.given("w")) wanted.width = o.width;
  if (table.given("w0")) wanted.base_width = o.base_width;
  if (table.given("L")) wanted.layers = o.layers;
  if (table.given("L0")) wanted.base_layers = o.base_layers;
  if (table.given("depth_alpha")) wanted.depth = o.depth;
  if (table.given("heads")) wanted.heads_k = o.heads;
  if (table.given("head_dim")) wanted.head_dim_k = o.head_dim;
  if (table.given("heads") || table.given("head_dim")) wanted.fixed_head_size = table.given("head_dim");
  if (table.given("ev")) wanted.head_dim_v = int(o.value_expansion * wanted.head_dim_k + 0.5);
  if (table.given("param")) wanted.parametrization = o.parametrization;
  if (table.given("gains")) wanted.vectors = o.gains;
  if (table.given("readout")) wanted.readout = o.readout;
  if (table.given("gates")) wanted.gates = o.gates;
  if (table.given("logit_factor")) wanted.logit_factor = o.logit_factor;
  require_same_shape(wanted, saved, checkpoint.path);
  if (vocab && vocab != saved.vocab)
    throw std::runtime_error(checkpoint.path + ": has a vocabulary of " + std::to_string(saved.vocab) +
                             ", the data one of " + std::to_string(vocab));
  return saved;
}

// Of a training's checkpoint the options that whatever uses its weights has to follow
// (OptionSpec::follows_weights): how documents were masked, the vocabulary where it still is, the sequences'
// length.
inline void follow_training(OptionTable& table, const Checkpoint& checkpoint) {
  if (!checkpoint.has_training_state) return;
  for (const auto& [name, value] : options_in_effect(checkpoint)) table.follow(name, value);
}

}  // namespace gdn
