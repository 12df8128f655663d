// A file read with pread, by offset, while others may change it.
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

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace gdn {

class RegularFile {
 public:
  // Throws when the file cannot be opened or is no regular file. keep_open: false where there are more files
  // than a process may have open; each read then opens the file again.
  explicit RegularFile(std::string path, bool keep_open = true) : path_(std::move(path)) {
    Descriptor opened(path_);
    status_ = opened.status;
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
    if (kept_ >= 0) return read_from(kept_, to, offset, bytes);
    const Descriptor opened(path_);
    if (opened.status.st_dev != status_.st_dev || opened.status.st_ino != status_.st_ino)
      fail("is another file than at the start, expected it to stay as it was");
    read_from(opened.number, to, offset, bytes);
  }

 private:
  struct Descriptor {
    explicit Descriptor(const std::string& path)
        : number(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
      if (number < 0) {
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

  void read_from(int descriptor, void* to, uint64_t offset, size_t bytes) const {
    char* p = static_cast<char*>(to);
    for (size_t done = 0; done < bytes;) {
      const ssize_t n = pread(descriptor, p + done, bytes - done, off_t(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail(std::string("cannot read: ") + std::strerror(errno));
      if (n == 0) break;  // shorter than it was: said below
      done += size_t(n);
    }
    // After the read, so that bytes written before or during it are noticed.
    struct stat now = {};
    if (fstat(descriptor, &now) != 0) fail(std::string("cannot read: ") + std::strerror(errno));
    if (now.st_size != status_.st_size)
      fail("has " + std::to_string(now.st_size) + " bytes, expected the " + std::to_string(status_.st_size) +
           " it had at the start");
    if (now.st_mtim.tv_sec != status_.st_mtim.tv_sec || now.st_mtim.tv_nsec != status_.st_mtim.tv_nsec)
      fail("was written to since the start, expected it to stay as it was");
    if (now.st_nlink == 0 && status_.st_nlink > 0)
      fail("was deleted or replaced, expected it to stay as it was");
    if (offset + bytes > size())
      fail("has " + std::to_string(size()) + " bytes, expected at least " + std::to_string(offset + bytes));
  }

  std::string path_;
  struct stat status_ = {};  // when it was opened
  int kept_ = -1;
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
