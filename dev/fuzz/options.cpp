// gdn/options.h: an argument a line. What is taken is shown as text that is taken again, and gives a model of
// sizes in range or one line.
#include "../../gdn/model_config.h"
#include "../../gdn/options.h"
#include "fuzz.h"

#include <list>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::list<std::string> words;  // getopt keeps a pointer into the last call's
  std::list<std::string> before;
  before.swap(words);
  words.emplace_back("train_gdn");
  words.emplace_back();
  for (size_t i = 0; i < size; i++) {
    if (data[i] == '\n')
      words.emplace_back();
    else if (data[i])
      words.back() += char(data[i]);
  }
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  optind = 0;
  getopt(1, arguments.data(), "");
  fuzz::may_fail([&] {
    gdn::Options options;
    gdn::OptionTable table(options);
    table.parse(int(words.size()), arguments.data());
    gdn::Options restored;
    gdn::OptionTable other(restored);
    for (const auto& [name, value] : table.values()) other.restore(name, value);
    fuzz::require(other.values() == table.values());
    const int heads = options.heads || options.head_dim ? options.heads : 6;
    gdn::make_config(options.width, options.base_width, options.layers, heads, options.head_dim,
                     options.value_expansion, 256, gdn::Parametrization::mup);
  });
  return 0;
}
