// gdn/safetensors.h, and the numbers of its tensors: one file, and several by an index (first byte).
#include "../../gdn/cpu_layers.h"
#include "../../gdn/model_checkpoint.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data + 1), size - 1);
  fuzz::may_fail([&] {
    gdn::SafetensorsFile file;
    if (data[0] % 4 == 0) {
      const float x[3] = {1, 2, 3};
      static const bool written =
          (gdn::write_safetensors(fuzz::folder() + "/a", {gdn::from_host("x", "F32", {3}, x)}, {}), true);
      fuzz::require(written);
      file = gdn::SafetensorsFile::sharded(fuzz::write("index.json", bytes));
    } else {
      file = gdn::SafetensorsFile(fuzz::write("model.safetensors", bytes));
    }
    for (const std::string& name : file.names())
      fuzz::may_fail([&] {
        const std::vector<float> values = gdn::stored_values<float>(file.at(name), "file");
        for (float x : values) fuzz::require(std::isfinite(x) || file.at(name).dtype == "F64");
      });
  });
  return 0;
}
