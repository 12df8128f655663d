// Folders of flash-linear-attention as checkpoints: which configurations load, and which key is named where
// one does not.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "../cpu_layers.h"
#include "../model_checkpoint.h"
#include "files.h"

namespace {

using namespace gdn;
using namespace gdn_tests;

ModelConfig config_of(const std::string& json) {
  Checkpoint checkpoint;
  checkpoint.path = "folder";
  checkpoint.config = parse_json(json, "config.json");
  return read_config(checkpoint);
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
  } cases[] = {{"model_type", "\"gla\""},   {"use_gate", "false"},    {"use_short_conv", "false"},
               {"conv_bias", "true"},       {"conv_size", "3"},       {"attn", "{\"layers\": [1]}"},
               {"attnres_block_size", "4"}, {"use_l2warp", "true"},   {"hidden_act", "\"powlu\""},
               {"norm_eps", "1e-05"},       {"num_v_heads", "7"},     {"expand_v", "1.501"},
               {"num_hidden_layers", "0"},  {"hidden_size", "\"8\""}, {"head_dim", "-1"}};
  for (const auto& c : cases) {
    const std::string json = "{\"" + std::string(c.key) + "\": " + c.value + "}";
    const std::string error = error_of([&] { config_of(json); });
    CAPTURE(error);
    CHECK(contains(error, "folder/config.json: "));
    CHECK(contains(error, std::string("'") + c.key + "'"));
  }
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
