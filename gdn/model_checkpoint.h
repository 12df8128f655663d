// A run as a checkpoint (gdn/checkpoint.h) and back:
//   model.safetensors            weights as the forward uses them (bf16 on the GPU), under
//   flash-linear-attention's names training_state.safetensors   master.NAME, moment1.NAME and (AdamW)
//   moment2.NAME in the type of the master weights config.json                  flash-linear-attention's
//   configuration keys, and what only this program needs counters                     step, place in the
//   data, the options of the run
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "checkpoint.h"
#include "model.h"
#include "optimizer.h"
#include "shard_reader.h"

namespace gdn {

// ---- configuration ----------------------------------------------------------------------------------------

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
                                                 {"logit_factor", c.logit_factor},
                                                 {"base_layers", c.base_depth()},
                                                 {"depth_alpha", name(c.depth)}}}};
}

// Keys of a configuration that read_config reads, and those that Hugging Face's and flash-linear-attention's
// configurations have beside them and that change nothing here: what text generation, training and the choice
// of kernels do in transformers.
constexpr const char* kReadKeys[] = {"model_type",         "use_gate",
                                     "use_short_conv",     "conv_bias",
                                     "conv_size",          "attn",
                                     "attnres_block_size", "use_l2warp",
                                     "hidden_act",         "output_gate_activation",
                                     "norm_eps",           "hidden_size",
                                     "num_hidden_layers",  "num_heads",
                                     "num_v_heads",        "head_dim",
                                     "expand_v",           "allow_neg_eigval",
                                     "hidden_ratio",       "intermediate_size",
                                     "vocab_size",         "tie_word_embeddings",
                                     "train_gdn",          "train_gdn_export"};
constexpr const char* kHarmlessKeys[] = {"architectures",
                                         "transformers_version",
                                         "torch_dtype",
                                         "dtype",
                                         "_name_or_path",
                                         "_commit_hash",
                                         "auto_map",
                                         "_attn_implementation_autoset",
                                         "attn_mode",
                                         "fuse_norm",
                                         "fuse_swiglu",
                                         "fuse_cross_entropy",
                                         "fuse_linear_cross_entropy",
                                         "use_cache",
                                         "initializer_range",
                                         "max_position_embeddings",
                                         "bos_token_id",
                                         "eos_token_id",
                                         "pad_token_id",
                                         "sep_token_id",
                                         "cls_token_id",
                                         "decoder_start_token_id",
                                         "tokenizer_class",
                                         "output_hidden_states",
                                         "output_attentions",
                                         "output_scores",
                                         "return_dict",
                                         "return_dict_in_generate",
                                         "torchscript",
                                         "use_bfloat16",
                                         "pruned_heads",
                                         "chunk_size_feed_forward",
                                         "is_encoder_decoder",
                                         "is_decoder",
                                         "cross_attention_hidden_size",
                                         "add_cross_attention",
                                         "tie_encoder_decoder",
                                         "max_length",
                                         "min_length",
                                         "do_sample",
                                         "early_stopping",
                                         "num_beams",
                                         "num_beam_groups",
                                         "diversity_penalty",
                                         "temperature",
                                         "top_k",
                                         "top_p",
                                         "typical_p",
                                         "repetition_penalty",
                                         "length_penalty",
                                         "no_repeat_ngram_size",
                                         "encoder_no_repeat_ngram_size",
                                         "bad_words_ids",
                                         "num_return_sequences",
                                         "forced_bos_token_id",
                                         "forced_eos_token_id",
                                         "remove_invalid_values",
                                         "exponential_decay_length_penalty",
                                         "suppress_tokens",
                                         "begin_suppress_tokens",
                                         "finetuning_task",
                                         "id2label",
                                         "label2id",
                                         "prefix",
                                         "task_specific_params",
                                         "problem_type",
                                         "tf_legacy_loss"};

// Throws one line naming a key of an object that is not among those known and is not null.
template <size_t n, size_t m>
void require_known_keys(const Json& json, const char* const (&read)[n], const char* const (&harmless)[m]) {
  if (!json.is<Json::Object>())
    throw std::runtime_error("is " + json::described(json) + ", expected an object");
  for (const std::pair<std::string, Json>& member : std::get<Json::Object>(json.value)) {
    const std::string& key = member.first;
    const Json& value = member.second;
    const auto is_key = [&](const char* known) { return key == known; };
    if (!value.is<std::nullptr_t>() && std::none_of(std::begin(read), std::end(read), is_key) &&
        std::none_of(std::begin(harmless), std::end(harmless), is_key))
      throw std::runtime_error("'" + key + "' is " + json::described(value) +
                               ", a key that this program does not know");
  }
}

// Throws one line naming the first key of a flash-linear-attention configuration that asks for what this
// program does not have. Keys that are missing or null have the value that GatedDeltaNetConfig gives them.
inline void require_supported(const Json& json) {
  require_known_keys(json, kReadKeys, kHarmlessKeys);
  const auto require = [&](const char* key, std::initializer_list<Json> expected, const char* text) {
    const Json* value = json.find(key);
    if (value && !value->is<std::nullptr_t>() &&
        std::find(expected.begin(), expected.end(), *value) == expected.end())
      throw std::runtime_error("'" + std::string(key) + "' is " + json::described(*value) +
                               ", this program has only " + text);
  };
  require("model_type", {"gated_deltanet"}, "\"gated_deltanet\"");
  require("use_gate", {true}, "true");
  require("use_short_conv", {true}, "true");
  require("conv_bias", {false}, "false");
  require("conv_size", {kConvTaps}, "4");
  require("attn", {}, "null (no attention layers)");
  require("attnres_block_size", {}, "null");
  require("use_l2warp", {false}, "false");
  require("hidden_act", {"swish", "silu"}, "\"swish\"");
  require("output_gate_activation", {"swish", "silu"}, "\"swish\"");
  // scripts/export_hf.py puts muP's multipliers into weights and norm_eps, and names the checkpoint
  if (const Json* eps = json.find("norm_eps"), *source = json.find("train_gdn_export");
      source && eps && *eps != Json(kNormEps))
    throw std::runtime_error(
        "'norm_eps' is " + json::described(*eps) +
        " in this export of a muP model, this program has only 1e-06; load the checkpoint that "
        "it was made from, " +
        (source->is<std::string>() ? std::get<std::string>(source->value) : "with -load"));
  require("norm_eps", {kNormEps}, "1e-06");
}

// The model that the text of a config.json describes: one of ours, or flash-linear-attention's
// (GatedDeltaNetConfig). The latter knows no muP: its width is its base width, and its vocabulary has no
// padding. Throws one line naming the key where the model is not one that this program has.
inline ModelConfig parse_config(const Json& json) {
  require_supported(json);
  const auto given = [&](const char* key) {
    const Json* value = json.find(key);
    return value && !value->is<std::nullptr_t>();
  };
  const auto whole_of = [](const Json& object, const char* key, int64_t high) {
    const int64_t n = object.integer(key);
    if (n < 1 || n > high)
      throw std::runtime_error("'" + std::string(key) + "' is " + std::to_string(n) + ", expected 1 to " +
                               std::to_string(high));
    return int(n);
  };
  const auto whole = [&](const char* key, int64_t otherwise, int64_t high) {
    return given(key) ? whole_of(json, key, high) : int(otherwise);
  };
  const auto flag = [&](const char* key) { return given(key) && json.boolean(key); };
  ModelConfig c;
  c.width = whole("hidden_size", 2048, kMaxWidth);
  c.layers = whole("num_hidden_layers", 21, kMaxLayers);
  c.heads_k = whole("num_heads", 6, kMaxHeads);
  c.heads_v = whole("num_v_heads", c.heads_k, kMaxHeads);
  if (c.heads_v % c.heads_k != 0)
    throw std::runtime_error("'num_v_heads' is " + std::to_string(c.heads_v) +
                             ", expected a multiple of num_heads " + std::to_string(c.heads_k));
  c.head_dim_k = whole("head_dim", 256, kMaxColumns);
  const double expand_v = given("expand_v") ? json.number("expand_v") : 2, dv = expand_v * c.head_dim_k;
  c.head_dim_v = dv > 0 && dv < kMaxColumns ? int(dv + 0.5) : 0;
  if (c.head_dim_v < 1 || !(std::fabs(dv - c.head_dim_v) < 1e-5 * dv))
    throw std::runtime_error("'expand_v' is " + json_text(expand_v) + ", which times head_dim " +
                             std::to_string(c.head_dim_k) + " is no whole number from 1 to " +
                             std::to_string(kMaxColumns));
  c.neg_eigval = flag("allow_neg_eigval");
  const int64_t inner = int64_t{c.width} * whole("hidden_ratio", 4, 1 << 10) * 2 / 3;
  c.mlp_size = whole("intermediate_size", (inner + 255) / 256 * 256, kMaxColumns);
  const int stored_vocab = whole("vocab_size", 32000, kMaxVocabulary);
  c.padded_vocab = (stored_vocab + 63) / 64 * 64;
  c.tied = flag("tie_word_embeddings");
  if (const Json* ours = json.find("train_gdn")) try {
      require_known_keys(*ours,
                         {"vocab", "base_width", "fixed_head_size", "parametrization", "gains", "gates",
                          "readout", "logit_factor", "base_layers", "depth_alpha"},
                         {""});
      c.vocab = whole_of(*ours, "vocab", stored_vocab);
      c.base_width = whole_of(*ours, "base_width", kMaxWidth);
      c.fixed_head_size = ours->boolean("fixed_head_size");
      c.parametrization = parse_parametrization(ours->string("parametrization"));
      if (ours->find("gains")) c.vectors = parse_vector_rule(ours->string("gains"));  // older ones: vector
      if (ours->find("gates")) c.gates = parse_gate_rule(ours->string("gates"));  // older ones: independent
      if (ours->find("readout"))
        c.readout = parse_readout_rule(ours->string("readout"));                      // older ones: param
      if (ours->find("logit_factor")) c.logit_factor = ours->number("logit_factor");  // older ones: 1
      if (ours->find("base_layers"))
        c.base_layers = whole_of(*ours, "base_layers", kMaxLayers);  // older ones: L
      if (ours->find("depth_alpha"))
        c.depth = parse_depth_rule(ours->string("depth_alpha"));  // older ones: no L0
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(std::string("'train_gdn': ") + e.what());
    }
  else {
    c.vocab = stored_vocab;
    c.base_width = c.width;
  }
  require_sizes(c);
  return c;
}

inline std::string sizes_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t n : shape) text += (text.empty() ? "" : " x ") + std::to_string(n);
  return text;
}

// Throws one line where a tensor in a file has another shape than the model's. Of embedding and head the file
// may leave out the rows from `vocab` on, which are padding.
inline void require_shape(const TensorView& view, const Tensor& t, const std::string& path, int vocab) {
  std::vector<int64_t> unpadded = t.shape;
  if (t.cls == TensorClass::embedding || t.cls == TensorClass::unembedding) unpadded[0] = vocab;
  if (view.shape != t.shape && view.shape != unpadded)
    throw std::runtime_error(path + ": tensor '" + view.name + "' is " + sizes_text(view.shape) +
                             ", expected " + sizes_text(t.shape));
}

// Whether two tensors have the same shape, type and bytes.
inline bool same_tensor(const TensorView& a, const TensorView& b) {
  if (a.shape != b.shape || a.dtype != b.dtype) return false;
  std::vector<char> x(safetensors::kPiece), y(safetensors::kPiece);
  for (size_t at = 0; at < a.bytes; at += x.size()) {
    const size_t piece = std::min(a.bytes - at, x.size());
    a.read(x.data(), at, piece);
    b.read(y.data(), at, piece);
    if (std::memcmp(x.data(), y.data(), piece) != 0) return false;
  }
  return true;
}

// Where a file holds a model's tensor: under its name, or, of gate and up projection, as a half of
// mlp.gate_proj where there is no mlp.up_proj: older flash-linear-attention has one above the other.
// Throws one line where it has none.
inline TensorView stored_tensor(const SafetensorsFile& file, const std::string& prefix, const Tensor& t) {
  const std::string name = prefix + t.name;
  for (const char* half : {"gate_proj.weight", "up_proj.weight"}) {
    const size_t stem = name.size() - std::min(name.size(), std::strlen(half));
    if (name.compare(stem, std::string::npos, half) != 0) continue;
    const TensorView* both = file.find(name.substr(0, stem) + "gate_proj.weight");
    if (!both || file.find(name.substr(0, stem) + "up_proj.weight")) continue;
    if (both->shape != std::vector<int64_t>{2 * t.shape[0], t.shape[1]}) continue;
    TensorView view = *both;
    view.shape = t.shape;
    view.bytes /= 2;
    if (half[0] == 'u') view.offset += view.bytes;
    return view;
  }
  return file.at(name);
}

// Whether a tensor is one that older flash-linear-attention keeps in every layer and never reads:
// attn.D, a number a head.
inline bool is_unused(const TensorView& view, const ModelConfig& config) {
  for (int l = 0; l < config.layers; l++)
    if (view.name == "model.layers." + std::to_string(l) + ".attn.D")
      return view.shape == std::vector<int64_t>{config.heads_k};
  return false;
}

// Throws one line naming the first tensor that a model has and the file does not, that has another shape, or
// that the model does not have. Takes no memory for the model, so that sizes that a configuration merely
// claims end here. A head beside tied embeddings is no other tensor where it is the same.
inline void require_tensors(const SafetensorsFile& file, const ModelConfig& config, const std::string& path) {
  const ParameterTable table = make_parameter_table(config);
  std::set<std::string> known;
  for (const Tensor& t : table.tensors) {
    const TensorView view = stored_tensor(file, "", t);
    require_shape(view, t, path, config.vocab);
    known.insert(view.name);
  }
  for (const std::string& name : file.names()) {
    if (known.count(name) || is_unused(file.at(name), config)) continue;
    const bool tied_head = config.tied && name == "lm_head.weight";
    if (tied_head && same_tensor(file.at(name), file.at(table.tensors[0].name))) continue;
    throw std::runtime_error(path + ": tensor '" + name + "' " +
                             (tied_head ? "is not the embedding, which 'tie_word_embeddings' says it is"
                                        : "is none of the model that config.json describes"));
  }
}

// The model of a checkpoint, whose tensors are as it says. Throws one line naming the file and the key or the
// tensor where the model is not one that this program has.
inline ModelConfig read_config(const Checkpoint& checkpoint) {
  ModelConfig config;
  try {
    config = parse_config(checkpoint.config);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(checkpoint.path + "/config.json: " + e.what());
  }
  require_tensors(checkpoint.model, config, checkpoint.path);
  return config;
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
  same("base layers", wanted.base_depth(), saved.base_depth());
  same("heads", wanted.heads_k, saved.heads_k);
  same("value heads", wanted.heads_v, saved.heads_v);
  same("key head size", wanted.head_dim_k, saved.head_dim_k);
  same("value head size", wanted.head_dim_v, saved.head_dim_v);
  same("MLP size", wanted.mlp_size, saved.mlp_size);
  same("vocabulary", wanted.vocab, saved.vocab);
  same("fixed head size (0 or 1)", wanted.fixed_head_size, saved.fixed_head_size);
  same("-logit_factor", wanted.logit_factor, saved.logit_factor);
  if (wanted.depth != saved.depth)
    throw std::runtime_error(path + ": has -depth_alpha " + name(saved.depth) + ", the options ask for " +
                             name(wanted.depth));
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
    throw std::runtime_error(path + ": has parametrization " + name(saved.parametrization) +
                             ", the options ask for " + name(wanted.parametrization));
}

// ---- counters ---------------------------------------------------------------------------------------------

struct TrainingCounters {
  int64_t step = 0;                                            // steps done
  uint64_t position = 0;                                       // of the data loader
  std::vector<std::pair<std::string, std::string>> options;    // that somebody chose
  std::vector<std::pair<std::string, std::string>> in_effect;  // all, with defaults
  Json::Object record;  // what is kept with them: the data, and which program ran where
};

inline Json counters_json(const TrainingCounters& counters) {
  const auto object = [](const std::vector<std::pair<std::string, std::string>>& pairs) {
    Json::Object options;
    for (const auto& [name, value] : pairs) options.emplace_back(name, value);
    return options;
  };
  Json::Object json = {{"step", counters.step},
                       {"position", int64_t(counters.position)},
                       {"options", object(counters.options)},
                       {"in_effect", object(counters.in_effect)}};
  json.insert(json.end(), counters.record.begin(), counters.record.end());
  return json;
}

inline TrainingCounters read_counters(const Checkpoint& checkpoint) try {
  if (!checkpoint.has_training_state)
    throw std::runtime_error("weights alone: training cannot go on from here");
  const auto text_of = [](const std::string& name, const Json& value) {
    if (!value.is<std::string>())
      throw std::runtime_error("option '" + name + "' is " + json::described(value));
    return std::get<std::string>(value.value);
  };
  TrainingCounters counters;
  counters.step = checkpoint.counters.integer("step");
  counters.position = uint64_t(checkpoint.counters.integer("position"));
  for (const auto& [name, value] : checkpoint.counters.object("options"))
    counters.options.emplace_back(name, text_of(name, value));
  if (checkpoint.counters.find("in_effect"))
    for (const auto& [name, value] : checkpoint.counters.object("in_effect"))
      counters.in_effect.emplace_back(name, text_of(name, value));
  return counters;
} catch (const std::runtime_error& e) {
  throw std::runtime_error(checkpoint.path + ": " + e.what());
}

// All options of the training that left the checkpoint, defaults included.
inline std::vector<std::pair<std::string, std::string>> options_in_effect(const Checkpoint& checkpoint) {
  const TrainingCounters counters = read_counters(checkpoint);
  return counters.in_effect.empty() ? counters.options : counters.in_effect;  // older ones have options alone
}

// ---- tensors ----------------------------------------------------------------------------------------------

// The safetensors name of a number type.
template <class T>
constexpr const char* dtype_name() {
  return std::is_same<T, float>::value ? "F32" : std::is_same<T, double>::value ? "F64" : "BF16";
}

// Throws where a number is infinite or none: a checkpoint with such a number is no good to anyone. By the bits of
// the exponent, so that whatever -ffast-math assumes makes no difference.
template <class T>
void require_finite(const void* numbers, size_t bytes, const std::string& name) {
  using Bits =
      std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  const Bits exponent = sizeof(T) == 2   ? Bits(0x7F80)
                        : sizeof(T) == 4 ? Bits(0x7F800000)
                                         : Bits(0x7FF0000000000000);
  Bits bits, found = 0;
  for (size_t at = 0; at + sizeof(Bits) <= bytes; at += sizeof(Bits)) {
    std::memcpy(&bits, static_cast<const char*>(numbers) + at, sizeof(Bits));
    found |= (bits & exponent) == exponent;
  }
  if (found) throw std::runtime_error("tensor '" + name + "' holds a number that is not finite");
}

template <class Device, class T>
TensorSource device_tensor(Device& dev, const Tensor& t, const std::string& prefix, const T* data) {
  const std::string name = prefix + t.name;
  return {name, dtype_name<T>(), t.shape, [&dev, data, name](void* host, size_t offset, size_t bytes) {
            dev.download(host, reinterpret_cast<const char*>(data) + offset, bytes);
            require_finite<T>(host, bytes, name);
          }};
}

// The float that the bits of a half (F16) mean.
inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(1024 + fraction), exponent - 25);
  return bits >> 15 ? -size : size;
}

// The upper half of a float (BF16).
inline float bfloat16_value(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// All numbers of a stored tensor as Real, in pieces of `piece` bytes through memory. Throws on types other
// than F32, F64, F16 and BF16, and on a number that is not finite.
template <class Real>
std::vector<Real> stored_values(const TensorView& view, const std::string& path) {
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error(path + ": tensor '" + view.name + "' " + what);
  };
  const size_t element = size_t(safetensors::element_size(view.dtype));
  std::vector<Real> values(view.bytes / element);
  std::vector<char> piece(std::min(view.bytes, safetensors::kPiece));
  const auto read = [&](auto stored, const auto& value_of) {
    for (size_t at = 0; at < view.bytes; at += piece.size()) {
      const size_t bytes = std::min(view.bytes - at, piece.size());
      view.read(piece.data(), at, bytes);
      for (size_t i = 0; i < bytes / sizeof(stored); i++) {
        std::memcpy(&stored, piece.data() + i * sizeof(stored), sizeof(stored));
        const auto value = value_of(stored);
        if (!std::isfinite(value))
          fail("holds a number that is not finite, at place " + std::to_string(at / sizeof(stored) + i));
        values[at / sizeof(stored) + i] = Real(value);
      }
    }
  };
  const auto same = [](auto value) { return value; };
  if (view.dtype == "F32")
    read(float(), same);
  else if (view.dtype == "F64")
    read(double(), same);
  else if (view.dtype == "F16")
    read(uint16_t(), half_value);
  else if (view.dtype == "BF16")
    read(uint16_t(), bfloat16_value);
  else
    fail("is " + view.dtype + ", expected F32, F64, F16 or BF16");
  return values;
}

// Reads a tensor into memory on the device; padding that the file leaves out (require_shape) becomes zeros.
// Throws one line where the shape is another.
template <class Device>
void load_tensor(Device& dev, typename Device::real* to, const Tensor& t, const SafetensorsFile& file,
                 const std::string& prefix, const std::string& path, int vocab) {
  const TensorView view = stored_tensor(file, prefix, t);
  require_shape(view, t, path, vocab);
  auto values = stored_values<typename Device::real>(view, path);
  values.resize(t.size);
  dev.upload(to, values.data(), t.size * sizeof(values[0]));
}

// ---- runs -------------------------------------------------------------------------------------------------

// Writes a checkpoint of the run and returns its path; see save_checkpoint. Its bytes do not depend on the number of
// ranks. Of several ranks all call: rank 0 writes, and throws where that fails; the others return nothing.
template <class Device>
std::string save_run(const std::string& out_dir, Parameters<Device>& p, const Optimizer<Device>& optimizer,
                     const TrainingCounters& counters, int keep, Communicator& ranks) {
  using Reader = ShardReader<Device>;
  using real = typename Device::real;
  Reader shards(ranks, p, optimizer);
  if (!ranks.first()) {
    shards.serve();
    return "";
  }
  CheckpointContents contents;
  contents.step = counters.step;
  contents.config = config_json(p.config);
  contents.counters = counters_json(counters);
  contents.metadata = {{"format", "pt"}};  // what transformers asks of a file it loads
  const auto add = [&](const Tensor& t, const std::string& prefix, typename Reader::Array array,
                       const real* whole) {
    if (p.ranks == 1) {
      contents.training_state.push_back(device_tensor(p.dev, t, prefix, whole + t.offset));
      return;
    }
    const std::string name = prefix + t.name;
    contents.training_state.push_back({name, dtype_name<real>(), t.shape,
                                       [&shards, t, name, array](void* host, size_t offset, size_t bytes) {
                                         const size_t begin = t.offset * sizeof(real) + offset;
                                         shards.read(array, host, begin, begin + bytes);
                                         require_finite<real>(host, bytes, name);
                                       }});
  };
  for (const Tensor& t : p.table.tensors) {
    contents.model.push_back(device_tensor(p.dev, t, "", p.weights(t.offset)));
    add(t, "master.", Reader::master, p.ranks == 1 ? p.master() : nullptr);
    add(t, "moment1.", Reader::moment1, optimizer.moment1());
    if (optimizer.config().kind == OptimizerKind::adamw)
      add(t, "moment2.", Reader::moment2, optimizer.moment2());
  }
  std::string path;
  try {
    path = save_checkpoint(out_dir, contents, keep);
  } catch (...) {
    shards.done();
    throw;
  }
  shards.done();
  return path;
}

// A checkpoint by its own path, or the newest one in a run's folder. Throws one line when there is none.
inline Checkpoint open_any_checkpoint(const std::string& path) {
  if (path_exists(path + "/config.json")) return open_checkpoint(path);
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
    load_tensor(p.dev, p.filled(t.offset), t,
                checkpoint.has_training_state ? checkpoint.training_state : checkpoint.model,
                checkpoint.has_training_state ? "master." : "", checkpoint.path, p.config.vocab);
  p.take_over();
}

// Moments. Throws one line when the checkpoint is of the other optimizer.
template <class Device>
void load_optimizer(Optimizer<Device>& optimizer, Parameters<Device>& p, const Checkpoint& checkpoint) {
  const bool adamw = optimizer.config().kind == OptimizerKind::adamw;
  const bool saved_adamw = checkpoint.training_state.find("moment2." + p.table.tensors[0].name) != nullptr;
  if (adamw != saved_adamw)
    throw std::runtime_error(checkpoint.path + ": was trained with " + (saved_adamw ? "adamw" : "sgd") +
                             ", not with -opt " + name(optimizer.config().kind));
  using real = typename Device::real;
  const auto load = [&](const std::string& prefix, real* moment) {
    // with several ranks through the memory of the gradients
    real* const whole = p.ranks == 1 ? moment : p.gradients();
    for (const Tensor& t : p.table.tensors)
      load_tensor(p.dev, whole + t.offset, t, checkpoint.training_state, prefix, checkpoint.path,
                  p.config.vocab);
    if (p.ranks == 1) return;
    for (const ShardPart& part : p.shard)
      p.dev.copy(moment + part.at, whole + part.range.begin, part.range.size() * sizeof(real));
    p.zero_gradients();
  };
  load("moment1.", optimizer.moment1());
  if (adamw) load("moment2.", optimizer.moment2());
}

}  // namespace gdn
