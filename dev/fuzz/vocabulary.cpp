// gdn/vocabulary.h and prompts (gdn/generate.h). First byte even: the rest is a vocabulary's file; odd: a
// text for one of bytes and a few words, and a prompt of numbers.
#include "../../gdn/cpu_layers.h"
#include "../../gdn/generate.h"
#include "fuzz.h"

namespace {

std::string small_vocabulary() {
  std::string text =
      "train_gdn vocabulary 1\nletters 41-5a,61-7a,c0-24f\nnumbers 30-39\nspaces 9-d,20-20,2000-200a\n";
  char line[8];
  for (int b = 0; b < 256; b++) text += (std::snprintf(line, sizeof line, "%02x\n", b), line);
  for (const char* token : {"2061", "6565", "65656565", "2020", "20202020", "616263", "2761", "c3a9"})
    text += std::string(token) + "\n";
  return text;
}

void round_trip(const gdn::Vocabulary& vocabulary, const std::string& text) {
  std::string back;
  for (int32_t token : vocabulary.encode(text)) {
    fuzz::require(token >= 0 && token < vocabulary.size());
    back += vocabulary.text(token);
  }
  fuzz::require(back == text);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data + 1), size - 1);
  if (data[0] % 2 == 0) {
    // what follows the ranges is bytes 0 to 255 and the rest, so that most inputs get that far
    std::string file = text;
    for (int lines = 0, i = 0; i < int(file.size()); i++)
      if (file[i] == '\n' && ++lines == 4) {
        std::string bytes;
        char line[8];
        for (int b = 0; b < 256; b++) bytes += (std::snprintf(line, sizeof line, "%02x\n", b), line);
        file.insert(size_t(i) + 1, bytes);
        break;
      }
    fuzz::may_fail([&] { round_trip(gdn::Vocabulary(fuzz::write("vocab.txt", file)), text); });
  } else {
    static const std::string path = fuzz::write("small.txt", small_vocabulary());
    static const gdn::Vocabulary vocabulary(path);
    round_trip(vocabulary, text);
    static const gdn::TextCodec numbers(300, ""), bytes(256, "");
    for (const gdn::TextCodec* codec : {&numbers, &bytes})
      fuzz::may_fail([&] {
        for (int32_t token : codec->tokens(text))
          fuzz::require(token >= 0 && token < (codec->is_bytes() ? 256 : 300));
      });
  }
  return 0;
}
