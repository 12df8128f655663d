// Runs ./train_gdn as a user does, in a folder of its own.
#pragma once

#include <doctest/doctest.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace gdn_tests {

namespace fs = std::filesystem;

// A folder that goes with the test.
struct Folder {
  Folder() {
    std::string name = (fs::temp_directory_path() / "train_gdn_test_XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
  fs::path path;
};

inline std::string program() { return (fs::current_path() / "train_gdn").string(); }

struct Outcome {
  int code;
  std::string out, err;
};

inline std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_file(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

// Runs train_gdn with `arguments` inside `folder`, after `before` (shell).
inline Outcome run(const Folder& folder, const std::string& arguments, const std::string& before = "true") {
  const std::string command = "cd '" + folder.path.string() + "' && " + before + " && '" + program() + "' " +
                              arguments + " >.out 2>.err </dev/null";
  const int status = std::system(command.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder.path / ".out"),
          read_file(folder.path / ".err")};
}

// A shard with these tokens; `header` overrides the first header words.
inline std::string shard(const std::vector<uint16_t>& tokens, std::vector<int32_t> header = {}) {
  std::vector<int32_t> words(256);
  words[0] = 20240520;
  words[1] = 1;
  words[2] = int32_t(tokens.size());
  std::copy(header.begin(), header.end(), words.begin());
  std::string bytes(reinterpret_cast<const char*>(words.data()), 1024);
  return bytes.append(reinterpret_cast<const char*>(tokens.data()), 2 * tokens.size());
}

constexpr const char* kTiny = "-d cpu -w 32 -heads 3 -L 1 -T 32 -B 2 -b 1 -s 0 -v 0 ";

}  // namespace gdn_tests
