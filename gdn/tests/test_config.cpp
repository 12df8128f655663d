// Folders of flash-linear-attention as checkpoints: which configurations load, and which key is named where
// one does not.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../cpu_layers.h"
#include "../model_checkpoint.h"
#include "files.h"

namespace {

using namespace gdn;
using namespace gdn_tests;

ModelConfig config_of(const std::string& json) { return parse_config(parse_json(json, "config.json")); }

// A model of one layer, and its configuration as flash-linear-attention writes it.
const std::string kSmall =
    R"("hidden_size": 8, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 4, "expand_v": 1.0, "intermediate_size": 8)";

struct StoredTensor {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

std::vector<StoredTensor> tensors_of(const ModelConfig& config) {
  std::vector<StoredTensor> tensors;
  for (const Tensor& t : make_parameter_table(config).tensors) {
    std::string bytes;
    for (size_t i = 0; i < t.size; i++) {
      const float x = 0.5f + float(i % 7);
      bytes.append(reinterpret_cast<const char*>(&x), sizeof x);
    }
    tensors.push_back({t.name, "F32", t.shape, bytes});
  }
  return tensors;
}

// A folder of weights as Hugging Face writes it.
std::string write_folder(const TemporaryFolder& folder, const std::string& config,
                         const std::vector<StoredTensor>& tensors) {
  folder.write("config.json", config);
  std::vector<TensorSource> sources;
  for (const StoredTensor& t : tensors)
    sources.push_back(from_host(t.name, t.dtype, t.shape, t.bytes.data()));
  write_safetensors(folder.file("model.safetensors"), sources, {{"format", "pt"}});
  return folder.path;
}

TEST_CASE("config: flash-linear-attention's keys, and its defaults where they are missing") {
  const ModelConfig defaults = config_of(R"({"model_type": "gated_deltanet"})");
  CHECK(defaults.width == 2048);
  CHECK(defaults.layers == 21);
  CHECK(defaults.heads_k == 6);
  CHECK(defaults.heads_v == 6);
  CHECK(defaults.head_dim_k == 256);
  CHECK(defaults.head_dim_v == 512);
  CHECK(defaults.mlp_size == 5632);  // 2048 * 4 * 2/3 = 5461, up to a multiple of 256
  CHECK(defaults.vocab == 32000);
  CHECK_FALSE(defaults.tied);
  CHECK_FALSE(defaults.neg_eigval);
  CHECK(logit_scale(defaults.mup()) == 1);
  CHECK(readout_scale(defaults.mup()) == doctest::Approx(1 / 16.0));

  const ModelConfig c = config_of(
      R"({"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "num_v_heads": 4, "head_dim": 24,
          "expand_v": 1.5, "hidden_ratio": 3, "intermediate_size": null, "vocab_size": 50257, "attn": null,
          "allow_neg_eigval": true, "tie_word_embeddings": true, "norm_eps": 1e-06, "conv_size": 4})");
  CHECK(c.heads_v == 4);
  CHECK(c.head_dim_v == 36);
  CHECK(c.mlp_size == 256);
  CHECK(c.vocab == 50257);
  CHECK(c.padded_vocab == 50304);
  CHECK(c.neg_eigval);
  CHECK(c.tied);
}

TEST_CASE("config: what this program does not have is refused by its key") {
  const struct {
    const char *key, *value;
  } cases[] = {{"model_type", "\"gla\""},
               {"use_gate", "false"},
               {"use_short_conv", "false"},
               {"conv_bias", "true"},
               {"conv_size", "3"},
               {"attn", "{\"layers\": [1]}"},
               {"attnres_block_size", "4"},
               {"use_l2warp", "true"},
               {"hidden_act", "\"powlu\""},
               {"norm_eps", "1e-05"},
               {"num_v_heads", "7"},
               {"expand_v", "1.501"},
               {"num_hidden_layers", "0"},
               {"hidden_size", "\"8\""},
               {"head_dim", "-1"},
               {"output_gate_activation", "\"sigmoid\""},
               {"quantization_config", "{}"},
               {"rope_theta", "10000.0"},
               {"train_gdn", "3"},
               {"vocab_size", "16777217"},
               {"num_heads", "1000000"},
               {"hidden_act", "3"}};
  for (const auto& c : cases) {
    const std::string json = "{\"" + std::string(c.key) + "\": " + c.value + "}";
    const std::string error = error_of([&] { config_of(json); });
    CAPTURE(error);
    CHECK(contains(error, std::string("'") + c.key + "'"));
  }
}

TEST_CASE("config: null is the same as a missing key, and keys without effect here are passed over") {
  const ModelConfig c = config_of(
      R"({"hidden_act": null, "norm_eps": null, "model_type": null, "num_heads": null, "tie_word_embeddings": null,
          "torch_dtype": "bfloat16", "use_cache": true, "bos_token_id": 1, "initializer_range": 0.02, "rope_theta": null,
          "attn_mode": "fused_recurrent", "fuse_norm": true, "max_position_embeddings": 2048})");
  CHECK(c.heads_k == 6);
  CHECK_FALSE(c.tied);
}

TEST_CASE("config: sizes that are out of range, alone or as products, are refused in one place") {
  const auto error = [](const std::string& json) { return error_of([&] { config_of(json); }); };
  const std::string ours = R"("base_width": 8, "fixed_head_size": true, "parametrization": "mup")";
  const auto own = [&](const std::string& vocab) {
    return error("{" + kSmall + ", \"vocab_size\": 64, \"train_gdn\": {\"vocab\": " + vocab + ", " + ours +
                 "}}");
  };
  CHECK(own("64") == "");
  CHECK(own("65") == "'train_gdn': 'vocab' is 65, expected 1 to 64");
  CHECK(own("-5") == "'train_gdn': 'vocab' is -5, expected 1 to 64");
  CHECK(own("4294967297") == "'train_gdn': 'vocab' is 4294967297, expected 1 to 64");
  CHECK(own("64, \"new\": 1") == "'train_gdn': 'new' is 1, a key that this program does not know");
  CHECK(own("64, \"logit_factor\": 0.0") == "the factor of the logits is 0.000000, expected 1e-06 to 1e+06");
  CHECK(error(R"({"num_heads": 256, "head_dim": 16777216, "expand_v": 5.960464477539063e-08})") ==
        "heads times their key size is 4294967296, expected 1 to 16777216");
  CHECK(error(R"({"num_heads": 2, "num_v_heads": 4096, "head_dim": 8192, "expand_v": 1})") ==
        "value heads times their size is 33554432, expected 1 to 16777216");
  CHECK(error(R"({"expand_v": 1e300})") ==
        "'expand_v' is 1e+300, which times head_dim 256 is no whole number from 1 to 16777216");
  CHECK(error(R"({"num_hidden_layers": 16777216})") == "'num_hidden_layers' is 16777216, expected 1 to 4096");
  const auto options_error = [](int width, int heads, int head_dim, double ev) {
    return error_of([&] { make_config(width, 8, 1, heads, head_dim, ev, 256, Parametrization::mup); });
  };
  CHECK(options_error(64, 2, 16, 2) == "");
  CHECK(options_error(65536, 1, 0, 64) ==
        "a head's state, key size times value size, is 154618822656, expected 1 to 16777216");
  CHECK(options_error(65536, 4096, 4096, 64) ==
        "value heads times their size is 1073741824, expected 1 to 16777216");
  CHECK(error_of([] { require_batch(32, 64, 1024); }) == "");
  CHECK(error_of([] { require_batch(1 << 20, 1 << 20, 1 << 24); }) ==
        "-b 1048576 times -T 16777216: expected at most 2147483647 tokens");
  CHECK(error_of([] { require_batch(1, 1 << 24, 1024); }) ==
        "-B 16777216 times -T 1024: expected at most 2147483647 tokens");
}

TEST_CASE("config: sizes that the tensors do not have take no memory") {
  const TemporaryFolder folder;
  const std::string path = write_folder(
      folder, R"({"hidden_size": 65536, "num_hidden_layers": 4096, "vocab_size": 16777216})", {});
  CHECK(error_of([&] { read_config(open_checkpoint(path)); }) ==
        path + "/model.safetensors: tensor 'model.embeddings.weight' is missing");
}

TEST_CASE("config: more memory than the machine has is refused, not granted and then missing") {
  Cpu<float> dev;
  const size_t most = physical_memory() / 10 * 6;
  CHECK(contains(error_of([&] { dev.allocate(physical_memory() + 1, "a model", "choose a smaller one"); }),
                 " MiB asked for a model; choose a smaller one"));
  void* p = dev.allocate(most, "half", "");
  CHECK(contains(error_of([&] { dev.allocate(most, "half", ""); }), "out of memory: "));
  dev.release(p);
  dev.release(dev.allocate(most, "half", ""));
}

TEST_CASE("config: tensors that the model does not have, or has in another shape, end the load by name") {
  const TemporaryFolder folder;
  const std::string config = "{" + kSmall + R"(, "vocab_size": 64, "tie_word_embeddings": true})";
  const std::vector<StoredTensor> good = tensors_of(config_of(config));
  const auto error = [&](const std::vector<StoredTensor>& tensors) {
    const std::string path = write_folder(folder, config, tensors);
    const std::string message = error_of([&] { read_config(open_checkpoint(path)); });
    return message.empty() ? message : message.substr(path.size());
  };
  const auto with = [&](StoredTensor extra) {
    std::vector<StoredTensor> tensors = good;
    tensors.push_back(std::move(extra));
    return error(tensors);
  };
  const std::string four(4 * 4, '\0');
  CHECK(error(good) == "");
  for (const char* name : {"model.layers.0.attn.q_proj.bias", "model.layers.0.attn.D",
                           "model.layers.1.attn.D", "model.layers.1.attn.A_log", "other"})
    CHECK(with({name, "F32", {4}, four}) ==
          ": tensor '" + std::string(name) + "' is none of the model that config.json describes");
  StoredTensor head = good[0];
  head.name = "lm_head.weight";
  CHECK(with(head) == "");  // tied: the same numbers
  head.bytes[5]++;
  CHECK(with(head) ==
        ": tensor 'lm_head.weight' is not the embedding, which 'tie_word_embeddings' says it is");
  std::vector<StoredTensor> missing = good;
  missing.pop_back();
  CHECK(error(missing) == "/model.safetensors: tensor 'model.norm.weight' is missing");
  std::vector<StoredTensor> wrong = good;
  wrong.back().shape = {2, 4};
  CHECK(error(wrong) == ": tensor 'model.norm.weight' is 2 x 4, expected 8");
}

TEST_CASE(
    "config: checkpoints of older flash-linear-attention: gate and up in one tensor, a tensor that is never "
    "read") {
  const TemporaryFolder folder;
  const std::string config = "{" + kSmall + R"(, "vocab_size": 64, "tie_word_embeddings": true})";
  const ModelConfig model = config_of(config);
  std::vector<StoredTensor> apart = tensors_of(model), joined;
  const std::string gate = "model.layers.0.mlp.gate_proj.weight", up = "model.layers.0.mlp.up_proj.weight";
  float x = 0;  // numbers that all differ: 1, 2, ...
  for (StoredTensor& t : apart)
    for (size_t at = 0; at < t.bytes.size(); at += sizeof x) {
      x++;
      std::memcpy(&t.bytes[at], &x, sizeof x);
    }
  for (const StoredTensor& t : apart)
    if (t.name != gate && t.name != up) joined.push_back(t);
  const auto find = [&](const std::string& name) {
    return *std::find_if(apart.begin(), apart.end(), [&](const StoredTensor& t) { return t.name == name; });
  };
  StoredTensor both = find(gate);
  both.shape[0] *= 2;
  both.bytes += find(up).bytes;
  joined.push_back(both);
  const int64_t heads = model.heads_k;
  joined.push_back(
      {"model.layers.0.attn.D", "F32", {heads}, std::string(size_t(heads) * sizeof(float), '\0')});

  Cpu<float> dev;
  const auto loaded = [&](const std::vector<StoredTensor>& tensors) {
    const Checkpoint checkpoint = open_checkpoint(write_folder(folder, config, tensors));
    Parameters<Cpu<float>> parameters(dev, read_config(checkpoint));
    load_parameters(parameters, checkpoint);
    std::vector<float> all;
    for (const Tensor& t : parameters.table.tensors)
      all.insert(all.end(), parameters.master(t.offset), parameters.master(t.offset) + t.size);
    return all;
  };
  CHECK(loaded(joined) == loaded(apart));
  joined.back().shape = {heads + 1};
  joined.back().bytes += std::string(sizeof(float), '\0');
  const std::string path = write_folder(folder, config, joined);
  CHECK(contains(error_of([&] { read_config(open_checkpoint(path)); }),
                 "tensor 'model.layers.0.attn.D' is none of the model"));
}

TEST_CASE("config: weights of every type load, and a number that is not finite does not") {
  const TemporaryFolder folder;
  const auto loaded = [&](const std::string& dtype, const std::string& bytes, int64_t count) {
    const std::string path = folder.file("a.safetensors");
    write_safetensors(path, {from_host("w", dtype, {count}, bytes.data())}, {});
    const SafetensorsFile file(path);
    return stored_values<float>(file.at("w"), "folder");
  };
  const auto words = [](const std::vector<uint16_t>& bits) {
    return std::string(reinterpret_cast<const char*>(bits.data()), 2 * bits.size());
  };
  // 1, -2, 65504, the smallest normal, the smallest subnormal and its largest, -0
  const std::vector<float> halves =
      loaded("F16", words({0x3c00, 0xc000, 0x7bff, 0x0400, 0x0001, 0x03ff, 0x8000}), 7);
  CHECK(halves == std::vector<float>{1, -2, 65504, 0x1p-14f, 0x1p-24f, 0x1.ff8p-15f, -0.0f});
  CHECK(std::signbit(halves[6]));
  CHECK(loaded("BF16", words({0x3f80, 0xc000}), 2) == std::vector<float>{1, -2});
  const double doubles[] = {0.5, -3};
  CHECK(loaded("F64", std::string(reinterpret_cast<const char*>(doubles), 16), 2) ==
        std::vector<float>{0.5f, -3});
  for (uint16_t bits : {0x7c00, 0xfc00, 0x7c01, 0x7e00})
    CHECK(error_of([&] {
            loaded("F16", words({0x3c00, bits}), 2);
          }) == "folder: tensor 'w' holds a number that is not finite, at place 1");
  CHECK(error_of([&] { loaded("BF16", words({0x7fc0}), 1); }) ==
        "folder: tensor 'w' holds a number that is not finite, at place 0");
  CHECK(error_of([&] { loaded("I16", words({1}), 1); }) ==
        "folder: tensor 'w' is I16, expected F32, F64, F16 or BF16");
}

TEST_CASE("config: an embedding without its padding loads, and the padding is zero") {
  const TemporaryFolder folder;
  std::vector<float> stored(50 * 3, 2.0f);
  const std::string path = folder.file("a.safetensors");
  write_safetensors(path, {from_host("w", "F32", {50, 3}, stored.data())}, {});
  const SafetensorsFile file(path);
  Cpu<float> dev;
  std::vector<float> loaded(64 * 3, 7.0f);
  load_tensor(dev, loaded.data(), {"w", TensorClass::embedding, {64, 3}, 0, 64 * 3}, file, "", path, 50);
  stored.resize(64 * 3);
  CHECK(loaded == stored);
  const std::string error = error_of([&] {
    load_tensor(dev, loaded.data(), {"w", TensorClass::hidden, {64, 3}, 0, 64 * 3}, file, "", path, 50);
  });
  CHECK(contains(error, "tensor 'w' is 50 x 3, expected 64 x 3"));
}

}  // namespace
