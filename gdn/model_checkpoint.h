// A run as a checkpoint (gdn/checkpoint.h) and back:
//   model.safetensors            weights as the forward uses them (bf16 on the GPU), under flash-linear-attention's names
//   training_state.safetensors   master.NAME, moment1.NAME and (AdamW) moment2.NAME in the type of the master weights
//   config.json                  flash-linear-attention's configuration keys, and what only this program needs
//   counters                     step, place in the data, the options of the run
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "checkpoint.h"
#include "model.h"
#include "optimizer.h"

namespace gdn {

// ---- configuration ------------------------------------------------------------------------------------------------

inline Json config_json(const ModelConfig& c) {
  return Json::Object{{"architectures", Json::Array{"GatedDeltaNetForCausalLM"}},
                      {"model_type", "gated_deltanet"},
                      {"attn_mode", "chunk"},
                      {"hidden_size", c.width},
                      {"num_hidden_layers", c.layers},
                      {"num_heads", c.heads_k},
                      {"num_v_heads", c.heads_v},
                      {"head_dim", c.head_dim_k},
                      {"expand_v", double(c.head_dim_v) / c.head_dim_k},
                      {"use_gate", true},
                      {"use_short_conv", true},
                      {"conv_size", kConvTaps},
                      {"allow_neg_eigval", c.neg_eigval},
                      {"intermediate_size", c.mlp_size},
                      {"hidden_act", "swish"},
                      {"norm_eps", kNormEps},
                      {"vocab_size", c.padded_vocab},
                      {"tie_word_embeddings", c.tied},
                      {"train_gdn", Json::Object{{"vocab", c.vocab},
                                                 {"base_width", c.base_width},
                                                 {"fixed_head_size", c.fixed_head_size},
                                                 {"parametrization", name(c.parametrization)},
                                                 {"gains", name(c.vectors)},
                                                 {"gates", name(c.gates)},
                                                 {"readout", name(c.readout)},
                                                 {"logit_factor", c.logit_factor}}}};
}

// Throws one line naming the first key of a flash-linear-attention configuration that asks for what this
// program does not have. Keys that are missing or null have the value that GatedDeltaNetConfig gives them.
inline void require_supported(const Json& json) {
  const auto require = [&](const char* key, const Json& expected, const char* text) {
    const Json* value = json.find(key);
    if (value && !value->is<std::nullptr_t>() && *value != expected)
      throw std::runtime_error("'" + std::string(key) + "' is " + json_text(*value) +
                               ", this program has only " + text);
  };
  require("model_type", "gated_deltanet", "\"gated_deltanet\"");
  require("use_gate", true, "true");
  require("use_short_conv", true, "true");
  require("conv_bias", false, "false");
  require("conv_size", kConvTaps, "4");
  require("attn", Json(), "null (no attention layers)");
  require("attnres_block_size", Json(), "null");
  require("use_l2warp", false, "false");
  if (const Json* act = json.find("hidden_act"); act && *act != "swish" && *act != "silu")
    throw std::runtime_error("'hidden_act' is " + json_text(*act) + ", this program has only \"swish\"");
  if (json.find("norm_eps") && json.number("norm_eps") != kNormEps)
    throw std::runtime_error("'norm_eps' is " + json_text(json.at("norm_eps")) +
                             ", this program has only 1e-06");
}

// The model of a checkpoint: of ours, or of a folder whose config.json is flash-linear-attention's
// (GatedDeltaNetConfig). The latter knows no muP: its width is its base width, and its vocabulary has no
// padding. Throws one line naming the file and the key where the model is not one that this program has.
inline ModelConfig read_config(const Checkpoint& checkpoint) try {
  const Json& json = checkpoint.config;
  require_supported(json);
  const auto given = [&](const char* key) {
    const Json* value = json.find(key);
    return value && !value->is<std::nullptr_t>();
  };
  const auto whole = [&](const char* key, int64_t otherwise) {
    const int64_t n = given(key) ? json.integer(key) : otherwise;
    if (n < 1 || n > 1 << 24)
      throw std::runtime_error("'" + std::string(key) + "' is " + std::to_string(n) +
                               ", expected 1 to 16777216");
    return int(n);
  };
  const auto flag = [&](const char* key) { return given(key) && json.boolean(key); };
  ModelConfig c;
  c.width = whole("hidden_size", 2048);
  c.layers = whole("num_hidden_layers", 21);
  c.heads_k = whole("num_heads", 6);
  c.heads_v = whole("num_v_heads", c.heads_k);
  if (c.heads_v % c.heads_k != 0)
    throw std::runtime_error("'num_v_heads' is " + std::to_string(c.heads_v) +
                             ", expected a multiple of num_heads " + std::to_string(c.heads_k));
  c.head_dim_k = whole("head_dim", 256);
  const double expand_v = given("expand_v") ? json.number("expand_v") : 2, dv = expand_v * c.head_dim_k;
  c.head_dim_v = int(dv + 0.5);
  if (!(std::fabs(dv - c.head_dim_v) < 1e-5 * dv) || c.head_dim_v < 1)
    throw std::runtime_error("'expand_v' is " + json_text(json.at("expand_v")) + ", which times head_dim " +
                             std::to_string(c.head_dim_k) + " is no whole number");
  c.neg_eigval = flag("allow_neg_eigval");
  const int inner = int(int64_t(c.width) * whole("hidden_ratio", 4) * 2 / 3);
  c.mlp_size = whole("intermediate_size", (inner + 255) / 256 * 256);
  const int stored_vocab = whole("vocab_size", 32000);
  c.padded_vocab = (stored_vocab + 63) / 64 * 64;
  c.tied = flag("tie_word_embeddings");
  if (const Json* ours = json.find("train_gdn")) {
    c.vocab = int(ours->integer("vocab"));
    c.base_width = int(ours->integer("base_width"));
    c.fixed_head_size = ours->boolean("fixed_head_size");
    c.parametrization = parse_parametrization(ours->string("parametrization"));
    if (ours->find("gains")) c.vectors = parse_vector_rule(ours->string("gains"));  // older ones: vector
    if (ours->find("gates")) c.gates = parse_gate_rule(ours->string("gates"));      // older ones: independent
    if (ours->find("readout")) c.readout = parse_readout_rule(ours->string("readout"));  // older ones: param
    if (ours->find("logit_factor")) c.logit_factor = ours->number("logit_factor");  // older ones: 1
  } else {
    c.vocab = stored_vocab;
    c.base_width = c.width;
  }
  return c;
} catch (const std::runtime_error& e) {
  throw std::runtime_error(checkpoint.path + "/config.json: " + e.what());
}

// Throws one line naming the first size in which the wanted model differs from the checkpoint's.
inline void require_same_shape(const ModelConfig& wanted, const ModelConfig& saved, const std::string& path) {
  const auto same = [&](const char* what, double a, double b) {
    if (a == b) return;
    const auto text = [](double x) {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.15g", x);
      return std::string(digits);
    };
    throw std::runtime_error(path + ": has " + what + " " + text(b) + ", the options ask for " + text(a));
  };
  same("width", wanted.width, saved.width);
  same("base width", wanted.base_width, saved.base_width);
  same("layers", wanted.layers, saved.layers);
  same("heads", wanted.heads_k, saved.heads_k);
  same("value heads", wanted.heads_v, saved.heads_v);
  same("key head size", wanted.head_dim_k, saved.head_dim_k);
  same("value head size", wanted.head_dim_v, saved.head_dim_v);
  same("MLP size", wanted.mlp_size, saved.mlp_size);
  same("vocabulary", wanted.vocab, saved.vocab);
  same("fixed head size (0 or 1)", wanted.fixed_head_size, saved.fixed_head_size);
  same("-logit_factor", wanted.logit_factor, saved.logit_factor);
  if (wanted.vectors != saved.vectors)
    throw std::runtime_error(path + ": has -gains " + name(saved.vectors) + ", the options ask for " +
                             name(wanted.vectors));
  if (wanted.gates != saved.gates)
    throw std::runtime_error(path + ": has -gates " + name(saved.gates) + ", the options ask for " +
                             name(wanted.gates));
  if (wanted.readout != saved.readout)
    throw std::runtime_error(path + ": has -readout " + name(saved.readout) + ", the options ask for " +
                             name(wanted.readout));
  if (wanted.parametrization != saved.parametrization)
    throw std::runtime_error(path + ": has parametrization " + name(saved.parametrization) + ", the options ask for " +
                             name(wanted.parametrization));
}

// ---- counters -----------------------------------------------------------------------------------------------------

struct TrainingCounters {
  int64_t step = 0;       // steps done
  uint64_t position = 0;  // of the data loader
  std::vector<std::pair<std::string, std::string>> options;
};

inline Json counters_json(const TrainingCounters& counters) {
  Json::Object options;
  for (const auto& [name, value] : counters.options) options.emplace_back(name, value);
  return Json::Object{
      {"step", counters.step}, {"position", int64_t(counters.position)}, {"options", std::move(options)}};
}

inline TrainingCounters read_counters(const Checkpoint& checkpoint) try {
  if (!checkpoint.has_training_state) throw std::runtime_error("weights alone: training cannot go on from here");
  TrainingCounters counters;
  counters.step = checkpoint.counters.integer("step");
  counters.position = uint64_t(checkpoint.counters.integer("position"));
  for (const auto& [name, value] : checkpoint.counters.object("options"))
    counters.options.emplace_back(name, std::get<std::string>(value.value));
  return counters;
} catch (const std::runtime_error& e) {
  throw std::runtime_error(checkpoint.path + ": " + e.what());
}

// ---- tensors ------------------------------------------------------------------------------------------------------

// The safetensors name of a number type.
template <class T>
constexpr const char* dtype_name() {
  return std::is_same<T, float>::value ? "F32" : std::is_same<T, double>::value ? "F64" : "BF16";
}

template <class Device, class T>
TensorSource device_tensor(Device& dev, const Tensor& t, const std::string& prefix, const T* data) {
  return {prefix + t.name, dtype_name<T>(), t.shape, [&dev, data](void* host, size_t offset, size_t bytes) {
            dev.download(host, reinterpret_cast<const char*>(data) + offset, bytes);
          }};
}

// `count` numbers of a stored tensor as Real; throws on types other than F32, F64 and BF16.
template <class Real>
std::vector<Real> stored_values(const TensorView& view, size_t count, const std::string& path) {
  std::vector<Real> values(count);
  const auto read = [&](auto number) {
    for (size_t i = 0; i < count; i++) {
      std::memcpy(&number, view.data + i * sizeof(number), sizeof(number));
      values[i] = Real(number);
    }
  };
  if (view.dtype == "F32") {
    read(float());
  } else if (view.dtype == "F64") {
    read(double());
  } else if (view.dtype == "BF16") {  // the upper half of a float
    for (size_t i = 0; i < count; i++) {
      uint16_t half;
      std::memcpy(&half, view.data + 2 * i, 2);
      const uint32_t bits = uint32_t(half) << 16;
      float number;
      std::memcpy(&number, &bits, 4);
      values[i] = Real(number);
    }
  } else {
    throw std::runtime_error(path + ": tensor '" + view.name + "' is " + view.dtype + ", expected F32, F64 or BF16");
  }
  return values;
}

// Reads a tensor into memory on the device; of embedding and head the file may leave out the rows from
// `vocab` on, which are padding, and become zeros. Throws one line where the shape is another.
template <class Device>
void load_tensor(Device& dev, typename Device::real* to, const Tensor& t, const SafetensorsFile& file,
                 const std::string& prefix, const std::string& path, int vocab) {
  const TensorView& view = file.at(prefix + t.name);
  std::vector<int64_t> unpadded = t.shape;
  if (t.cls == TensorClass::embedding || t.cls == TensorClass::unembedding) unpadded[0] = vocab;
  if (view.shape != t.shape && view.shape != unpadded) {
    const auto text = [](const std::vector<int64_t>& shape) {
      std::string s;
      for (int64_t n : shape) s += (s.empty() ? "" : " x ") + std::to_string(n);
      return s;
    };
    throw std::runtime_error(path + ": tensor '" + view.name + "' is " + text(view.shape) + ", expected " +
                             text(t.shape));
  }
  auto values = stored_values<typename Device::real>(view, t.size / t.shape[0] * view.shape[0], path);
  values.resize(t.size);
  dev.upload(to, values.data(), t.size * sizeof(values[0]));
}

// ---- runs ---------------------------------------------------------------------------------------------------------

// Writes a checkpoint of the run and returns its path; see save_checkpoint.
template <class Device>
std::string save_run(const std::string& out_dir, Parameters<Device>& p, const Optimizer<Device>& optimizer,
                     const TrainingCounters& counters, int keep) {
  CheckpointContents contents;
  contents.step = counters.step;
  contents.config = config_json(p.config);
  contents.counters = counters_json(counters);
  contents.metadata = {{"format", "pt"}};  // what transformers asks of a file it loads
  for (const Tensor& t : p.table.tensors) {
    contents.model.push_back(device_tensor(p.dev, t, "", p.weights(t.offset)));
    contents.training_state.push_back(device_tensor(p.dev, t, "master.", p.master(t.offset)));
    contents.training_state.push_back(device_tensor(p.dev, t, "moment1.", optimizer.moment1(t.offset)));
    if (optimizer.config().kind == OptimizerKind::adamw)
      contents.training_state.push_back(device_tensor(p.dev, t, "moment2.", optimizer.moment2(t.offset)));
  }
  return save_checkpoint(out_dir, contents, keep);
}

// A checkpoint by its own path, or the newest one in a run's folder. Throws one line when there is none.
inline Checkpoint open_any_checkpoint(const std::string& path) {
  if (std::filesystem::exists(path + "/config.json")) return open_checkpoint(path);
  std::string damaged;
  const std::string newest = find_newest_checkpoint(path, [&](const std::string& line) { damaged = line; });
  if (newest.empty())
    throw std::runtime_error(path + ": no checkpoint there" + (damaged.empty() ? "" : " (" + damaged + ")"));
  return open_checkpoint(newest);
}

// Weights: the master weights where the checkpoint has them.
template <class Device>
void load_parameters(Parameters<Device>& p, const Checkpoint& checkpoint) {
  for (const Tensor& t : p.table.tensors)
    load_tensor(p.dev, p.master(t.offset), t,
                checkpoint.has_training_state ? checkpoint.training_state : checkpoint.model,
                checkpoint.has_training_state ? "master." : "", checkpoint.path, p.config.vocab);
  p.round();
}

// Moments. Throws one line when the checkpoint is of the other optimizer.
template <class Device>
void load_optimizer(Optimizer<Device>& optimizer, const Parameters<Device>& p, const Checkpoint& checkpoint) {
  const bool adamw = optimizer.config().kind == OptimizerKind::adamw;
  const bool saved_adamw = checkpoint.training_state.find("moment2." + p.table.tensors[0].name) != nullptr;
  if (adamw != saved_adamw)
    throw std::runtime_error(checkpoint.path + ": was trained with " + (saved_adamw ? "adamw" : "sgd") +
                             ", not with -opt " + name(optimizer.config().kind));
  for (const Tensor& t : p.table.tensors) {
    load_tensor(p.dev, optimizer.moment1(t.offset), t, checkpoint.training_state, "moment1.", checkpoint.path,
                p.config.vocab);
    if (adamw)
      load_tensor(p.dev, optimizer.moment2(t.offset), t, checkpoint.training_state, "moment2.",
                  checkpoint.path, p.config.vocab);
  }
}

}  // namespace gdn
