// The folder of a run: made in one step, and locked as long as the run lives, so that two runs never write to
// one.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>

#include "regular_file.h"
#include "terminal_text.h"

namespace gdn {

// Holds FOLDER/.lock; the system gives it back when the process ends, however that happens.
class FolderLock {
 public:
  FolderLock() = default;
  // Throws one line when another run holds it, or the folder cannot be written. File systems that cannot lock
  // are named on standard error, and the run goes on without.
  explicit FolderLock(const std::string& folder) {
    const std::string path = folder + "/.lock";
    file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (file_ < 0) throw std::runtime_error("-o " + folder + ": cannot be written: " + std::strerror(errno));
    if (flock(file_, LOCK_EX | LOCK_NB) == 0) return;
    if (errno == EWOULDBLOCK)
      throw std::runtime_error("-o " + folder +
                               ": another run is writing there; wait for it, or choose another folder");
    warn(path + ": " + std::strerror(errno) + "; see to it that no other run writes there");
  }
  FolderLock(FolderLock&& other) noexcept : file_(std::exchange(other.file_, -1)) {}
  FolderLock& operator=(FolderLock&& other) noexcept {
    std::swap(file_, other.file_);
    return *this;
  }
  bool tried() const { return file_ >= 0; }
  ~FolderLock() {
    if (file_ >= 0) close(file_);
  }

 private:
  int file_ = -1;
};

inline std::string numbered_folder(int n) {
  char name[16];
  std::snprintf(name, sizeof name, "run_%03d", n);
  return name;
}

// The last of run_001, run_002, ... that exists, "" if there is none.
inline std::string last_run_folder() {
  std::string last;
  for (int n = 1; path_exists(numbered_folder(n)); n++) last = numbered_folder(n);
  return last;
}

// Makes the folder, or the first of run_001, run_002, ... that is free where `folder` is empty; returns its
// name.
inline std::string make_run_folder(const std::string& folder) {
  const auto made = [](const std::string& name) {
    if (mkdir(name.c_str(), 0777) == 0) return true;
    if (errno != EEXIST) throw std::runtime_error("-o " + name + ": cannot be made: " + std::strerror(errno));
    return false;
  };
  if (folder.empty())
    for (int n = 1;; n++)
      if (made(numbered_folder(n))) return numbered_folder(n);
  const std::filesystem::path parent = std::filesystem::path(folder).parent_path();
  std::error_code error;
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  if (error) throw std::runtime_error("-o " + folder + ": cannot be made: " + error.message());
  if (!made(folder) && !is_folder(folder))
    throw std::runtime_error("-o " + folder + ": is no folder, expected one or a name that is free");
  return folder;
}

}  // namespace gdn
