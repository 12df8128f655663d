// gdn/json.h: text that parses is written and parses to the same value.
#include "../../gdn/json.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  fuzz::may_fail([&] {
    const gdn::Json json = gdn::parse_json(text, "text");
    for (bool indented : {false, true}) {
      const std::string written = gdn::json_text(json, indented);
      gdn::Json again;
      try {
        again = gdn::parse_json(written, "written");
      } catch (const std::runtime_error&) {
        abort();
      }
      fuzz::require(again == json);
    }
  });
  return 0;
}
