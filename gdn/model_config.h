// What a model is: its sizes, checked, and the parametrization that scales it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "mup_names.h"
#include "shapes.h"

namespace gdn {

// The MLP's inner size: 8d/3 rounded up to a multiple of 256.
inline int mlp_size_of(int width) { return (8 * width + 3 * 256 - 1) / (3 * 256) * 256; }

struct ModelConfig {
  int width = 256;       // d
  int base_width = 256;  // d0, where the learning rate was tuned
  int layers = 8;        // L
  int base_layers = 0;   // L0, where the learning rate was tuned; 0: L
  DepthRule depth = DepthRule::one;
  int heads_k = 6, heads_v = 6;
  int head_dim_k = 32, head_dim_v = 64;
  bool fixed_head_size = false;  // how the family grows with d: heads (true) or head sizes (false)
  int mlp_size = 768;            // I
  int vocab = 256, padded_vocab = 256;
  bool tied = true;         // one matrix for embedding and unembedding
  bool neg_eigval = false;  // beta in (0,2)
  Parametrization parametrization = Parametrization::mup;
  VectorRule vectors = VectorRule::vector;
  GateRule gates = GateRule::independent;
  double logit_factor = 1;  // of the logits, at every width (mup.h)
  ReadoutRule readout = ReadoutRule::param;
  double readout_factor = 1;  // of the readout scale; for tests

  MixerShape mixer_shape(int batch, int tokens) const {
    return {batch, tokens, heads_k, heads_v, head_dim_k, head_dim_v};
  }
  Mup mup() const {
    const ModelShape shape{double(width), double(heads_v), double(head_dim_k), double(head_dim_v),
                           double(mlp_size)};
    return {parametrization,
            shape,
            fixed_head_size ? base_with_fixed_head_size(shape, base_width, base_mlp_size())
                            : base_with_fixed_heads(shape, base_width, base_mlp_size()),
            logit_factor,
            vectors,
            gates,
            readout,
            double(layers),
            double(base_depth()),
            depth};
  }
  int base_depth() const { return base_layers ? base_layers : layers; }
  double readout_scale() const { return readout_factor * gdn::readout_scale(mup()); }
  // I0: by the width where I is, else with the same share of it.
  double base_mlp_size() const {
    return mlp_size == mlp_size_of(width) ? mlp_size_of(base_width) : mlp_size * (double(base_width) / width);
  }
  float beta_max() const { return neg_eigval ? 2.0f : 1.0f; }
};

// Bounds of every size, of options and of files alike; far beyond them nothing fits any machine.
constexpr int kMaxWidth = 1 << 16, kMaxLayers = 1 << 12, kMaxHeads = 1 << 12, kMaxColumns = 1 << 24,
              kMaxVocabulary = 1 << 24;

// The one place where a model's sizes are checked, before any memory is taken: each by itself, and the
// products that code holds in an int. Throws one line naming the size, the value and what was expected.
inline void require_sizes(const ModelConfig& c) {
  const auto within = [](const char* what, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      throw std::runtime_error(std::string(what) + " is " + std::to_string(value) + ", expected " +
                               std::to_string(low) + " to " + std::to_string(high));
  };
  within("the width", c.width, 1, kMaxWidth);
  within("the base width", c.base_width, 1, kMaxWidth);
  within("the number of layers", c.layers, 1, kMaxLayers);
  within("the base's number of layers", c.base_layers, 0, kMaxLayers);
  within("the number of heads", c.heads_k, 1, kMaxHeads);
  within("the number of value heads", c.heads_v, 1, kMaxHeads);
  if (c.heads_v % c.heads_k != 0)
    throw std::runtime_error("the number of value heads is " + std::to_string(c.heads_v) +
                             ", expected a multiple of the heads' " + std::to_string(c.heads_k));
  within("the key head size", c.head_dim_k, 1, kMaxColumns);
  within("the value head size", c.head_dim_v, 1, kMaxColumns);
  within("heads times their key size", int64_t{c.heads_k} * c.head_dim_k, 1, kMaxColumns);
  within("value heads times their size", int64_t{c.heads_v} * c.head_dim_v, 1, kMaxColumns);
  within("a head's state, key size times value size,", int64_t{c.head_dim_k} * c.head_dim_v, 1, kMaxColumns);
  within("the MLP size", c.mlp_size, 1, kMaxColumns);
  within("the padded vocabulary", c.padded_vocab, 1, kMaxVocabulary);
  within("the vocabulary", c.vocab, 1, c.padded_vocab);
  if (!(c.logit_factor >= 1e-6 && c.logit_factor <= 1e6))
    throw std::runtime_error("the factor of the logits is " + std::to_string(c.logit_factor) +
                             ", expected 1e-06 to 1e+06");
}

// The same of a step's sequences: micro_batch and global_batch times tokens are rows, held in an int.
inline void require_batch(int64_t micro_batch, int64_t global_batch, int64_t tokens) {
  constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
  const auto within = [&](const char* option, int64_t sequences) {
    if (sequences > kMaxRows / tokens)
      throw std::runtime_error(std::string(option) + " " + std::to_string(sequences) + " times -T " +
                               std::to_string(tokens) + ": expected at most " + std::to_string(kMaxRows) +
                               " tokens");
  };
  within("-b", micro_batch);
  within("-B", global_batch);
}

// The sizes that follow from the width: keys take 3d/4 columns in all, values `value_expansion`
// times that, the MLP 8d/3 rounded up to a multiple of 256.
//   heads > 0, head_dim = 0   fixed heads: dk = 3d / (4 heads)
//   heads = 0, head_dim > 0   fixed head size: H = 3d / (4 head_dim)
//   both                      as given; scaled as a member of the fixed-head-size family
// Throws one line when the width does not divide.
inline ModelConfig make_config(int width, int base_width, int layers, int heads, int head_dim,
                               double value_expansion, int vocab, Parametrization parametrization) {
  const auto fail = [](const std::string& message) { throw std::runtime_error(message); };
  ModelConfig c;
  c.width = width;
  c.base_width = base_width;
  c.layers = layers;
  c.parametrization = parametrization;
  c.fixed_head_size = head_dim > 0;
  if (head_dim > 0 && heads > 0) {
    c.heads_k = heads;
    c.head_dim_k = head_dim;
  } else {
    const int by = head_dim > 0 ? head_dim : heads;
    const char* option = head_dim > 0 ? "-head_dim " : "-heads ";
    if (3 * int64_t(width) % (4 * int64_t(by)) != 0)
      fail("-w " + std::to_string(width) + ": 3/4 of the width (" + std::to_string(0.75 * width) +
           ") must be a multiple of " + option + std::to_string(by) +
           "; choose another width, or give both -heads and -head_dim");
    const int other = int(3 * int64_t(width) / (4 * int64_t(by)));
    c.heads_k = head_dim > 0 ? other : heads;
    c.head_dim_k = head_dim > 0 ? head_dim : other;
  }
  c.heads_v = c.heads_k;
  const double dv = value_expansion * c.head_dim_k;
  c.head_dim_v = dv < kMaxColumns ? int(dv) : kMaxColumns;
  if (c.head_dim_v < 1 || c.head_dim_v != dv)
    fail("-ev " + std::to_string(value_expansion) + ": the value head size " + std::to_string(dv) +
         " (key head size " + std::to_string(c.head_dim_k) +
         " times -ev) must be a whole number, at least 1");
  c.mlp_size = mlp_size_of(width);
  c.vocab = vocab;
  c.padded_vocab = (vocab + 63) / 64 * 64;
  require_sizes(c);
  return c;
}

}  // namespace gdn
