// parse_config (gdn/model_checkpoint.h): what it lets pass has sizes whose tensors can be listed, and a model
// without tensors is refused.
#include "../../gdn/cpu_layers.h"
#include "../../gdn/model_checkpoint.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  fuzz::may_fail([&] {
    gdn::Checkpoint checkpoint;
    checkpoint.config = gdn::parse_json(text, "config.json");
    const gdn::ModelConfig c = gdn::parse_config(checkpoint.config);
    fuzz::require(c.vocab >= 1 && c.vocab <= c.padded_vocab && c.padded_vocab % 64 == 0);
    fuzz::require(c.mixer_shape(1, 1).columns() > 0 && c.width >= 1 && c.mlp_size >= 1);
    if (c.layers <= 64) fuzz::require(gdn::make_parameter_table(c).size > 0);
    fuzz::require(std::isfinite(gdn::logit_scale(c.mup())));
    bool refused = false;
    try {
      gdn::read_config(checkpoint);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    fuzz::require(refused);
    gdn::parse_config(gdn::config_json(c));
  });
  return 0;
}
