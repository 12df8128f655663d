// data::list_files: names and patterns with commas, in a folder of files with odd names.
#include "../../dataloader.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool ready = [] {
    for (const char* name : {"a", "b", "a,b", "[ab]", " a", "a ", "c,", "*"}) fuzz::write(name, "x");
    return chdir(fuzz::folder().c_str()) == 0;
  }();
  fuzz::require(ready);
  std::string list;
  for (size_t i = 0; i < size && i < 200; i++)
    if (data[i] && data[i] != '/' && data[i] != '~') list += char(data[i]);
  fuzz::may_fail([&] {
    for (const std::string& file : gdn::data::list_files(list)) fuzz::require(gdn::data::exists(file));
  });
  return 0;
}
