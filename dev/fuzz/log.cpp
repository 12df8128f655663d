// CsvLog (gdn/report.h): a run that goes on reads its old log and keeps the rows up to its step.
#include "../../gdn/report.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string path =
      fuzz::write("log.csv", std::string(reinterpret_cast<const char*>(data + 1), size - 1));
  fuzz::may_fail([&] {
    gdn::CsvLog log(path, data[0]);
    log.validation(data[0] + 1, 0.5);
    fuzz::require(!log.failed());
  });
  std::ifstream log(path);
  std::string row;
  fuzz::require(std::getline(log, row) && row == gdn::CsvLog::kHeader);
  return 0;
}
