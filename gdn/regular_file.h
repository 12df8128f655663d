// A file read with pread, by offset, while others may change it.
//
// Of data that a long run reads again and again a change is a change of what they hold: another size, or
// other bytes where the file was sampled when it was opened (a file of up to 16 MiB in whole; of a larger one
// the first and last 4 KiB and 4 KiB at each of 254 places between). Only then the next read fails. New times
// (touch), rights, names and a replacement by the same bytes (a copy that is synchronized again) are said in
// one line, and the run goes on. A file that is gone fails the next read.
//
// Not mapped: a mapped file that shrinks ends the process with SIGBUS, a read of it fails with an error that
// can be said and after which a run can still save. Pipes, devices and folders are refused when they are
// opened, without waiting for a writer.
//
// Errors are std::runtime_error with one line: the file, the value seen, what was expected.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "random.h"
#include "terminal_text.h"

namespace gdn {

// Whether there is a file or folder of that name (a link to nothing is none). Throws when that cannot be told.
inline bool path_exists(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) == 0) return true;
  if (errno == ENOENT || errno == ENOTDIR) return false;
  throw std::runtime_error(path + ": cannot be read: " + std::strerror(errno));
}
inline bool is_folder(const std::string& path) {
  struct stat status;
  return path_exists(path) && stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

// What a file that was written to, or replaced, since it was opened is: another one, or, where it still holds
// the same bytes, the same.
enum class Change { by_times, by_content };

class RegularFile {
 public:
  // Throws when the file cannot be opened or is no regular file. keep_open: false where there are more files
  // than a process may have open; each read then opens the file again.
  explicit RegularFile(std::string path, bool keep_open = true, Change change = Change::by_times)
      : path_(std::move(path)), change_(change) {
    Descriptor opened(path_);
    status_ = opened.status;
    if (change_ == Change::by_content) sample_ = sample(opened.number);
    if (keep_open) kept_ = opened.take();
  }
  ~RegularFile() {
    if (kept_ >= 0) ::close(kept_);
  }
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return uint64_t(status_.st_size); }  // bytes, when it was opened

  // Bytes [offset, offset + bytes) to `to`. Throws when they cannot be read, and when the file is not the one
  // that was opened any more: shrunk, written to, replaced or deleted.
  void read(void* to, uint64_t offset, size_t bytes) const {
    if (offset + bytes > size())
      fail("has " + std::to_string(size()) + " bytes, expected at least " + std::to_string(offset + bytes));
    if (kept_ >= 0) {
      read_from(kept_, to, offset, bytes);
      struct stat now = {};  // after the read, so that bytes written before or during it are noticed
      if (fstat(kept_, &now) != 0) fail(std::string("cannot read: ") + std::strerror(errno));
      if (now.st_nlink > 0 || status_.st_nlink == 0) return require_same(kept_, now);
      Descriptor replacement(path_, "was deleted, expected it to stay as it was");
      require_same(replacement.number, replacement.status);
      ::close(std::exchange(kept_, replacement.take()));
    } else {
      const Descriptor opened(path_);
      read_from(opened.number, to, offset, bytes);
      struct stat now = {};
      if (fstat(opened.number, &now) != 0) fail(std::string("cannot read: ") + std::strerror(errno));
      require_same(opened.number, now);
    }
  }

 private:
  struct Descriptor {
    // missing: what is said where there is no such file
    explicit Descriptor(const std::string& path, const char* missing = nullptr)
        : number(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
      if (number < 0) {
        if (errno == ENOENT && missing) throw std::runtime_error(path + ": " + missing);
        const bool socket = errno == ENXIO;
        throw std::runtime_error(path +
                                 ": cannot open: " + (socket ? "not a regular file" : std::strerror(errno)));
      }
      const char* wrong = nullptr;
      if (fstat(number, &status) != 0)
        wrong = std::strerror(errno);
      else if (S_ISDIR(status.st_mode))
        wrong = "is a folder";
      else if (S_ISFIFO(status.st_mode))
        wrong = "is a pipe";
      else if (!S_ISREG(status.st_mode))
        wrong = "is a device";
      if (!wrong) return;
      ::close(number);
      throw std::runtime_error(path + ": " + wrong + ", expected a regular file");
    }
    ~Descriptor() {
      if (number >= 0) ::close(number);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int take() { return std::exchange(number, -1); }

    int number;
    struct stat status = {};
  };

  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error(path_ + ": " + message);
  }

  // What is behind the file's end is left as it is: require_same says that the file is shorter.
  void read_from(int descriptor, void* to, uint64_t offset, size_t bytes) const {
    char* p = static_cast<char*>(to);
    for (size_t done = 0; done < bytes;) {
      const ssize_t n = pread(descriptor, p + done, bytes - done, off_t(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail(std::string("cannot read: ") + std::strerror(errno));
      if (n == 0) return;
      done += size_t(n);
    }
  }

  // A number that depends on the bytes that the head of this header names.
  uint64_t sample(int descriptor) const {
    constexpr uint64_t kWhole = uint64_t{1} << 24, kPlaces = 256, kPiece = 4096;
    const bool whole = size() <= kWhole;
    std::vector<char> piece(whole ? size_t{1} << 18 : size_t{kPiece});
    const uint64_t pieces = whole ? (size() + piece.size() - 1) / piece.size() : kPlaces;
    const uint64_t span = (size() - kPiece) / (kPlaces - 1), rest = (size() - kPiece) % (kPlaces - 1);
    uint64_t number = size();
    for (uint64_t i = 0; i < pieces; i++) {
      const uint64_t offset = whole ? i * piece.size() : i * span + i * rest / (kPlaces - 1);
      std::fill(piece.begin(), piece.end(), char(0));
      read_from(descriptor, piece.data(), offset, size_t(std::min<uint64_t>(piece.size(), size() - offset)));
      for (size_t at = 0; at < piece.size(); at += sizeof(uint64_t)) {
        uint64_t word;
        std::memcpy(&word, piece.data() + at, sizeof word);
        number = mix64(number ^ word);
      }
    }
    return number;
  }

  // Throws unless the file that is open as `descriptor` is, with this status, still the one that was opened.
  void require_same(int descriptor, const struct stat& now) const {
    const auto same_time = [](const timespec& a, const timespec& b) {
      return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
    };
    if (now.st_size != status_.st_size)
      fail("has " + std::to_string(now.st_size) + " bytes, expected the " + std::to_string(status_.st_size) +
           " it had at the start");
    const bool replaced = now.st_dev != status_.st_dev || now.st_ino != status_.st_ino;
    const bool written = !same_time(now.st_mtim, status_.st_mtim);
    const bool by_content = change_ == Change::by_content;
    if (!replaced && !written && (!by_content || same_time(now.st_ctim, status_.st_ctim))) return;
    if (!by_content || sample(descriptor) != sample_)
      fail(std::string(replaced ? "was replaced" : "was written to") +
           " since the start, expected it to stay as it was");
    if (replaced || written)
      warn(path_ + (replaced ? ": was replaced" : ": has a new time of change") +
           (size() > (uint64_t{1} << 24) ? "; its size and 256 places in it are as before, the run goes on"
                                         : "; its bytes are as before, the run goes on"));
    status_ = now;
  }

  std::string path_;
  const Change change_;
  mutable struct stat status_ = {};  // when it was opened, or found to hold the same since
  mutable int kept_ = -1;
  uint64_t sample_ = 0;
};

// All bytes of a file that is text to be parsed. Throws when it cannot be read or has more than `limit`
// bytes.
inline std::string read_text_file(const std::string& path, uint64_t limit = uint64_t{1} << 28) {
  const RegularFile file(path);
  if (file.size() > limit)
    throw std::runtime_error(path + ": has " + std::to_string(file.size()) + " bytes, expected at most " +
                             std::to_string(limit));
  std::string text(size_t(file.size()), '\0');
  file.read(text.data(), 0, text.size());
  return text;
}

}  // namespace gdn
