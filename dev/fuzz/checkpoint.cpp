// gdn/checkpoint.h and model_checkpoint.h: a folder with a checkpoint of which one file (first byte) is
// replaced; the manifest gets its checksum again, so that what it says is read.
#include "../../gdn/cpu_layers.h"
#include "../../gdn/model_checkpoint.h"
#include "fuzz.h"

namespace {

namespace fs = std::filesystem;
using Cpu = gdn::Cpu<float>;

std::string make_run() {
  Cpu dev;
  gdn::Parameters<Cpu> parameters(dev, gdn::make_config(16, 16, 1, 1, 0, 1, 64, gdn::Parametrization::mup));
  parameters.initialize(1);
  parameters.allocate_gradients();
  gdn::Optimizer<Cpu> optimizer(parameters, gdn::OptimizerConfig{});
  gdn::Communicator one_process;
  return gdn::save_run(fuzz::folder() + "/run", parameters, optimizer, {}, 0, one_process);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string step = make_run();
  static const std::string good[] = {gdn::read_text_file(step + "/checkpoint.json"),
                                     gdn::read_text_file(step + "/config.json"),
                                     gdn::read_text_file(step + "/model.safetensors"),
                                     gdn::read_text_file(step + "/training_state.safetensors")};
  static const char* const names[] = {"/checkpoint.json", "/config.json", "/model.safetensors",
                                      "/training_state.safetensors"};
  if (size == 0) return 0;
  const int which = data[0] % 4;
  const bool weights_alone = data[0] & 64 && which != 0 && which != 3;
  std::string bytes(reinterpret_cast<const char*>(data + 1), size - 1);
  if (which == 0) {
    const std::string end = "\"xxh64\": \"0000000000000000\"\n}\n";
    if (data[0] & 128) bytes += end;
    if (bytes.size() >= end.size()) bytes = gdn::checkpoints::sealed(bytes);
  }
  for (int i = 0; i < 4; i++)
    fuzz::write("run/step_00000000" + std::string(names[i]), i == which ? bytes : good[i]);
  if (weights_alone)
    for (int i : {0, 3}) fs::remove(step + names[i]);
  fuzz::may_fail([&] {
    const gdn::Checkpoint checkpoint =
        gdn::open_any_checkpoint(weights_alone ? step : fuzz::folder() + "/run");
    fuzz::may_fail([&] { gdn::read_counters(checkpoint); });
    const gdn::ModelConfig config = gdn::read_config(checkpoint);
    if (make_parameter_table(config).size > 1 << 16) return;
    Cpu dev;
    gdn::Parameters<Cpu> parameters(dev, config);
    load_parameters(parameters, checkpoint);
  });
  return 0;
}
