// gdn/token_file.h and dataloader.h. First byte: the file's name (shard, text or none of both) and the length
// of a sequence; second: a vocabulary; the rest is the file.
#include "../../dataloader.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const char* names[] = {"a.bin", "a.txt", "a", "a.BIN"};
  const std::string name = names[data[0] % 4];
  const int length = 1 + data[0] / 4 % 16;
  const std::string bytes(reinterpret_cast<const char*>(data + 2), size - 2);
  fuzz::may_fail([&] {
    gdn::DataLoader loader(fuzz::write(name, bytes), length, 1, data[1], 0, 1, gdn::Split::train,
                           data[1] % 8 ? 0 : 300);
    std::vector<int32_t> inputs(length), targets(length);
    const int vocabulary = loader.source().vocab_size();
    fuzz::may_fail([&] { loader.source().require_separator(7); });
    fuzz::require(loader.source().tokens() <= int64_t(bytes.size()));
    loader.source().dropped(length);
    for (int64_t i = 0; i < std::min<int64_t>(loader.sequences(), 40); ++i)
      fuzz::may_fail([&] {
        loader.next(inputs.data(), targets.data());
        for (int t = 0; t < length; ++t)
          fuzz::require(inputs[t] >= 0 && inputs[t] < vocabulary && targets[t] >= 0 &&
                        targets[t] < vocabulary);
      });
  });
  return 0;
}
