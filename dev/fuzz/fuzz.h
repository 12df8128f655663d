// What the fuzz targets share. A target feeds bytes that libFuzzer makes to one parser, as a user's file
// would: it may throw std::runtime_error, and must do nothing else that a sanitizer, an assertion here or the
// limit on memory (run.sh) objects to.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace fuzz {

// A folder for the files of this process, in memory where the system has that, removed at the end.
inline const std::string& folder() {
  static const struct Folder {
    Folder() {
      path = std::string(access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + "/train_gdn_fuzz_XXXXXX";
      if (!mkdtemp(path.data())) abort();
    }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
    std::string path;
  } folder;
  return folder.path;
}

// Writes a file there and returns its path.
inline std::string write(const std::string& name, const std::string& bytes) {
  const std::string path = folder() + "/" + name;
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (!file || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || std::fclose(file) != 0)
    abort();
  return path;
}

inline void require(bool condition) {
  if (!condition) abort();
}

// Runs a call that may throw std::runtime_error with a message, and nothing else.
template <class Call>
void may_fail(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error& e) {
    require(e.what()[0] != '\0');
  }
}

}  // namespace fuzz
