// All parameters of a model in one arena: every tensor's name (flash-linear-attention's), class (mup.h),
// place and initial values; the arenas of master weights, gradients and of the rounded weights that enter
// matrix products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "device.h"
#include "model_config.h"
#include "random.h"

namespace gdn {

struct Tensor {
  std::string name;
  TensorClass cls;
  std::vector<int64_t> shape;
  size_t offset = 0, size = 0;
  FanIn fan_in = FanIn::width;  // of a hidden weight (mup.h)
};

// Where each layer's tensors start. Tensors that enter one matrix product stand behind each other as rows of
// one matrix: in_proj = [W_q; W_k; W_v; W_g; W_a; W_b; zero rows up to MixerShape::columns()], gate_up =
// [W_gate; W_up], taps = [q; k; v].
struct LayerOffsets {
  size_t attn_norm, in_proj, taps, A_log, dt_bias, o_norm, o_proj, mlp_norm, gate_up, down;
};

// A range of the arena that a rank updates, and where its moments lie among those of all its ranges.
struct ShardPart {
  ArenaRange range;
  size_t at = 0;
};

struct ParameterTable {
  std::vector<Tensor> tensors;
  std::vector<LayerOffsets> layers;
  size_t embedding = 0, final_norm = 0, lm_head = 0;  // lm_head = embedding where they are tied
  size_t size = 0;                                    // elements of the arena, zero padding included
  size_t count = 0;                                   // parameters
  // The arena cut into what a backward finishes together: the embedding, each layer's matrices, the head
  // where it is not the embedding, and last the vectors of all layers. Each group's size is a multiple of
  // kArenaBlock times the number of ranks: rank r has the r-th equal part of every group.
  std::vector<ArenaRange> groups;
  int embedding_group() const { return 0; }
  int layer_group(int l) const { return 1 + l; }
  int head_group() const {
    return lm_head == embedding ? embedding_group() : layer_group(int(layers.size()));
  }
  int vectors_group() const { return int(groups.size()) - 1; }
  const ArenaRange& vectors() const { return groups.back(); }
  // The groups in the order in which a forward comes to read them; every layer reads vectors.
  std::vector<int> forward_order() const {
    std::vector<int> order = {embedding_group(), vectors_group()};
    for (int l = 0; l < int(layers.size()); l++) order.push_back(layer_group(l));
    if (head_group() != embedding_group()) order.push_back(head_group());
    return order;
  }
  // Rank r's part of a group, of `ranks` equal ones.
  static ArenaRange part(const ArenaRange& group, int rank, int ranks) {
    const size_t size = group.size() / size_t(ranks);
    return {group.begin + size_t(rank) * size, group.begin + size_t(rank + 1) * size};
  }
  // What rank `rank` of `ranks` updates: a part of every group, and the whole arena where it is the only one.
  std::vector<ShardPart> shard(int rank, int ranks) const {
    if (ranks == 1) return {{{0, size}, 0}};
    std::vector<ShardPart> parts;
    size_t at = 0;
    for (const ArenaRange& group : groups) {
      parts.push_back({part(group, rank, ranks), at});
      at += parts.back().range.size();
    }
    return parts;
  }
};

// Sees to it that each group of the arena has its turn once.
class GroupTurns {
 public:
  // what: for the errors, such as "the gradients of group".
  GroupTurns(std::string what, const ParameterTable& table)
      : what_(std::move(what)), taken_(table.groups.size()) {}
  // Throws std::logic_error where the group has had its turn, or there is none of that number.
  void take(int group) {
    if (group < 0 || group >= int(taken_.size())) fail(group, "there is no such group");
    if (taken_[size_t(group)]) fail(group, "had its turn before");
    taken_[size_t(group)] = true;
  }
  // Throws std::logic_error where a group has not had its turn.
  void end() const {
    for (size_t g = 0; g < taken_.size(); g++)
      if (!taken_[g]) fail(int(g), "had no turn");
  }

 private:
  [[noreturn]] void fail(int group, const char* why) const {
    throw std::logic_error(what_ + " " + std::to_string(group) + ": " + why);
  }
  const std::string what_;
  std::vector<bool> taken_;
};

// The large tensors, "matrices": all but the vectors, which are gains, taps and the gates' scalars.
inline bool drawn_from_a_normal(TensorClass cls) { return cls <= TensorClass::gate; }

inline ParameterTable make_parameter_table(const ModelConfig& c, int ranks = 1) {
  ParameterTable table;
  size_t vectors = 0;  // their elements so far; they are moved behind the matrices at the end
  // Appends a tensor; `aligned` ones start at a multiple of 64 elements, the others right behind the last.
  const auto add = [&](const std::string& name, TensorClass cls, std::vector<int64_t> shape,
                       bool aligned = true, FanIn fan_in = FanIn::width) {
    size_t& end = drawn_from_a_normal(cls) ? table.size : vectors;
    if (aligned) end = (end + 63) / 64 * 64;
    Tensor t{name, cls, std::move(shape), end, 1, fan_in};
    for (int64_t n : t.shape) t.size *= size_t(n);
    end += t.size;
    table.count += t.size;
    table.tensors.push_back(t);
    return t.offset;
  };
  // Ends the group of what was added since the last one.
  const auto end_group = [&] {
    const size_t begin = table.groups.empty() ? 0 : table.groups.back().end,
                 unit = kArenaBlock * size_t(ranks);
    table.size = begin + (table.size - begin + unit - 1) / unit * unit;
    table.groups.push_back({begin, table.size});
  };
  const MixerShape mixer = c.mixer_shape(1, 1);
  const int64_t d = c.width, keys = mixer.key_dim(), values = mixer.value_dim(), heads = c.heads_v;
  table.embedding = add("model.embeddings.weight", TensorClass::embedding, {c.padded_vocab, d});
  end_group();
  for (int l = 0; l < c.layers; l++) {
    const std::string layer = "model.layers." + std::to_string(l) + ".", attn = layer + "attn.";
    LayerOffsets at;
    at.attn_norm = add(layer + "attn_norm.weight", TensorClass::gain, {d});
    at.in_proj = add(attn + "q_proj.weight", TensorClass::hidden, {keys, d});
    add(attn + "k_proj.weight", TensorClass::hidden, {keys, d}, false);
    add(attn + "v_proj.weight", TensorClass::hidden, {values, d}, false);
    add(attn + "g_proj.weight", TensorClass::hidden, {values, d}, false);
    add(attn + "a_proj.weight", TensorClass::gate, {heads, d}, false);
    add(attn + "b_proj.weight", TensorClass::gate, {heads, d}, false);
    table.size = at.in_proj + size_t(mixer.columns()) * size_t(d);
    at.taps = add(attn + "q_conv1d.weight", TensorClass::conv, {keys, 1, kConvTaps});
    add(attn + "k_conv1d.weight", TensorClass::conv, {keys, 1, kConvTaps}, false);
    add(attn + "v_conv1d.weight", TensorClass::conv, {values, 1, kConvTaps}, false);
    at.A_log = add(attn + "A_log", TensorClass::gate_scalar, {heads});
    at.dt_bias = add(attn + "dt_bias", TensorClass::gate_scalar, {heads});
    at.o_norm = add(attn + "o_norm.weight", TensorClass::output_gain, {c.head_dim_v});
    at.o_proj = add(attn + "o_proj.weight", TensorClass::hidden, {d, values}, true, FanIn::values);
    at.mlp_norm = add(layer + "mlp_norm.weight", TensorClass::gain, {d});
    at.gate_up = add(layer + "mlp.gate_proj.weight", TensorClass::hidden, {c.mlp_size, d});
    add(layer + "mlp.up_proj.weight", TensorClass::hidden, {c.mlp_size, d}, false);
    at.down = add(layer + "mlp.down_proj.weight", TensorClass::hidden, {d, c.mlp_size}, true, FanIn::inner);
    table.layers.push_back(at);
    end_group();
  }
  table.final_norm = add("model.norm.weight", TensorClass::final_gain, {d});
  table.lm_head =
      c.tied ? table.embedding : add("lm_head.weight", TensorClass::unembedding, {c.padded_vocab, d});
  if (!c.tied) end_group();
  const size_t base = table.size;
  for (Tensor& t : table.tensors)
    if (!drawn_from_a_normal(t.cls)) t.offset += base;
  for (LayerOffsets& at : table.layers)
    for (size_t* offset : {&at.attn_norm, &at.taps, &at.A_log, &at.dt_bias, &at.o_norm, &at.mlp_norm})
      *offset += base;
  table.final_norm += base;
  table.size += vectors;
  end_group();
  return table;
}

// Initial value number `index` of a tensor (mup.h, section 3): a function of seed, name and index
// alone.
inline float initial_value(const Tensor& t, const Mup& mup, uint64_t key, uint64_t index) {
  switch (t.cls) {
    case TensorClass::gain:
    case TensorClass::output_gain:
    case TensorClass::final_gain:
      return 1.0f;
    case TensorClass::conv:
      return float((random_uniform(key, index) - 0.5) * 2 * conv_init_range(mup));  // 1/2 = 1/sqrt(4 taps)
    case TensorClass::gate_scalar: {
      const double u = random_uniform(key, index);
      if (t.name.find("A_log") != std::string::npos) return float(std::log(1e-4 + u * (16 - 1e-4)));
      const double dt = std::max(std::exp(u * (std::log(0.1) - std::log(0.001)) + std::log(0.001)), 1e-4);
      return float(dt + std::log(-std::expm1(-dt)));  // softplus^-1(dt)
    }
    default:
      return float(init_std(mup, t.cls, t.fan_in) * random_normal(key, index));
  }
}

template <class Device>
class Parameters {
 public:
  using real = typename Device::real;
  using act = typename Device::act;
  static constexpr bool kRounded =
      !std::is_same<real, act>::value;  // are the working weights a rounded copy?
  static constexpr const char* kRemedy = "choose a smaller -w or -L";

  // Those of one rank of several. Where the weights that enter matrix products are a copy, it has the master
  // weights of its shard, and those of the vectors, which the layers read.
  Parameters(Device& device, const ModelConfig& model_config, int rank = 0, int ranks = 1)
      : dev(device),
        config(model_config),
        table(make_parameter_table(model_config, ranks)),
        rank(rank),
        ranks(ranks),
        shard(table.shard(rank, ranks)),
        master_(device, whole() ? table.size : table.vectors().begin / size_t(ranks), "master weights",
                kRemedy),
        vectors_(device, whole() ? 0 : table.vectors().size(), "master weights", kRemedy),
        weights_(device, kRounded ? table.size : 0, "bf16 weights", kRemedy) {
    master_.zero();
    vectors_.zero();
  }

  // Does this rank have all master weights? If not, the layers' offsets are those of vectors.
  bool whole() const { return ranks == 1 || !kRounded; }
  real* master(size_t offset = 0) const {
    return whole() ? master_.get() + offset : vectors_.get() + (offset - table.vectors().begin);
  }
  // Of a part of this rank's shard.
  real* master(const ShardPart& part) const {
    const bool sharded = !whole() && part.range.begin < table.vectors().begin;
    return sharded ? master_.get() + part.at : master(part.range.begin);
  }
  act* weights(size_t offset = 0) const {
    if constexpr (kRounded)
      return weights_.get() + offset;
    else
      return master_.get() + offset;
  }
  // Gradients take memory only in training. Buffer 0 is the gradients; further ones take the partial sums of
  // a step's micro-batches (TrainingStep). The layers add to the buffer in use.
  void allocate_gradients(int spares = 0) {
    gradients_.resize(std::min<size_t>(gradients_.size(), 1));
    for (int i = int(gradients_.size()); i <= spares; i++)
      gradients_.emplace_back(dev, table.size, i ? "spare gradients" : "gradients",
                              i ? "-sum running needs none" : kRemedy);
    use_gradients(0);
    for (auto& buffer : gradients_) buffer.zero();
  }
  void use_gradients(int buffer) { gradients_in_use_ = gradients_[size_t(buffer)].get(); }
  real* gradients(size_t offset = 0) const { return gradients_in_use_ + offset; }
  real* gradient_buffer(int buffer) const { return gradients_[size_t(buffer)].get(); }
  void zero_gradients() { dev.zero(gradients(), table.size * sizeof(real)); }

  // Initial values from the seed, times a factor for each class (check_init_factors).
  void initialize(uint64_t seed, const ClassFactors& factors = ones()) {
    check_init_factors(factors);
    const Mup mup = config.mup();
    std::vector<real> values;
    for (const Tensor& t : table.tensors) {
      const uint64_t key = stream_key(seed, t.name);
      const double factor = factors[int(t.cls)];
      if (drawn_from_a_normal(t.cls)) {
        random_normals(dev, filled(t.offset), t.size, key, factor * init_std(mup, t.cls, t.fan_in));
        continue;
      }
      values.resize(t.size);
      for (size_t i = 0; i < t.size; i++) values[i] = real(factor) * real(initial_value(t, mup, key, i));
      dev.upload(filled(t.offset), values.data(), t.size * sizeof(real));
    }
    take_over();
  }

  // Where all master weights are written to, whatever this rank keeps of them: their own memory, or that of
  // the gradients, which have to be there. take_over() then makes them the weights.
  real* filled(size_t offset = 0) const { return whole() ? master(offset) : gradients(offset); }
  void take_over() {
    if (!whole()) {
      for (const ShardPart& part : shard)
        if (part.range.begin < table.vectors().begin)
          dev.copy(master(part), filled(part.range.begin), part.range.size() * sizeof(real));
      dev.copy(vectors_.get(), filled(table.vectors().begin), vectors_.bytes());
    }
    round_weights(dev, weights(), filled(), table.size);
    if (!whole()) zero_gradients();
  }

  // The rounded weights from the master weights, of which this rank has all.
  void round() { round_weights(dev, weights(), master(), table.size); }

  // The optimizer's view: each tensor's learning rate, decay, weight in the norm and eps under the
  // parametrization. The factors multiply the learning rates, and decay as far as it is coupled to them.
  std::vector<ParameterSpan> spans(OptimizerKind optimizer, float weight_decay,
                                   DecayMode mode = DecayMode::coupled, const ClassFactors& factors = ones(),
                                   ClipNorm clip_norm = ClipNorm::plain,
                                   EpsMode eps_mode = EpsMode::constant) const {
    const Mup mup = config.mup();
    std::vector<ParameterSpan> spans;
    for (const Tensor& t : table.tensors) {
      const double factor = factors[int(t.cls)];
      // a factor of 0 leaves the tensor as it is, decay included
      const double decay = weight_decay * weight_decay_scale(mup, optimizer, t.cls, mode, t.fan_in) /
                           (mode == DecayMode::coupled || factor == 0 ? 1
                            : mode == DecayMode::sqrt                 ? std::sqrt(factor)
                                                                      : factor);
      spans.push_back({t.offset, t.size, float(factor * learning_rate_scale(mup, optimizer, t.cls, t.fan_in)),
                       float(decay), float(clip_weight(mup, t.cls, clip_norm, t.fan_in)),
                       float(epsilon_scale(mup, t.cls, eps_mode, t.fan_in))});
    }
    std::sort(spans.begin(), spans.end(),
              [](const ParameterSpan& a, const ParameterSpan& b) { return a.offset < b.offset; });
    return spans;
  }

  Device& dev;
  const ModelConfig config;
  const ParameterTable table;
  const int rank, ranks;
  const std::vector<ShardPart> shard;  // what this rank updates

 private:
  Buffer<Device, real> master_, vectors_;
  Buffer<Device, act> weights_;
  std::vector<Buffer<Device, real>> gradients_;
  real* gradients_in_use_ = nullptr;
};

}  // namespace gdn
