// What a training run says: one line a step on standard output (on a terminal a live line, kept at
// validations), and log.csv.
#pragma once

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "regular_file.h"
#include "terminal_text.h"

namespace gdn {

struct StepReport {
  int64_t step = 0, steps = 0;
  double loss = 0,
         floor = NAN;  // nats per token; floor: the entropy of the built-in stories, NaN where unknown
  double learning_rate = 0, norm = 0, milliseconds = 0, tokens_per_second = 0;
  double share_of_peak = 0;  // of the rate of matrix products that this device reaches, 0 to 1
  int ranks = 1;
  double waited_milliseconds = 0;  // of this rank, for others
};

// seconds as 1:02:03 or 2:03
inline std::string clock_text(double seconds) {
  const int64_t s = int64_t(seconds + 0.5);
  char text[32];
  if (s >= 3600)
    std::snprintf(text, sizeof text, "%lld:%02d:%02d", (long long)(s / 3600), int(s / 60 % 60), int(s % 60));
  else
    std::snprintf(text, sizeof text, "%d:%02d", int(s / 60), int(s % 60));
  return text;
}

// Seconds since the kernel started this process, to 0.01: loading the program and its libraries counts.
inline double seconds_since_process_start() {
  std::ifstream file("/proc/self/stat");
  std::string stat;
  std::getline(file, stat);
  std::istringstream fields(
      stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));  // a name may hold spaces
  std::string field;
  for (int i = 3; i <= 22; i++) fields >> field;  // 22: ticks from boot to start
  timespec now = {};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec) -
         double(std::atoll(field.c_str())) / double(sysconf(_SC_CLK_TCK));
}

// Opens /dev/null for each of the three standard streams that is closed: a file that is opened later would get
// its number, and what is printed.
inline void open_closed_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (fcntl(stream, F_GETFD) < 0 && errno == EBADF && open("/dev/null", O_RDWR) != stream) _exit(1);
}

// Writes all bytes; 0, or the error's number. `done` becomes the bytes that were written.
inline int write_all(int descriptor, const std::string& bytes, size_t* done = nullptr) {
  size_t at = 0;
  int error = 0;
  while (at < bytes.size() && !error) {
    const ssize_t n = write(descriptor, bytes.data() + at, bytes.size() - at);
    if (n > 0)
      at += size_t(n);
    else if (errno != EINTR)
      error = n == 0 ? EIO : errno;
  }
  if (done) *done = at;
  return error;
}

// Standard output. That nobody reads it any more (a closed pipe or terminal) ends no training; that it cannot
// be written (a full disk) is said once, and remembered.
class Reporter {
 public:
  // live: whether a terminal gets a live line. mpirun makes one of each rank's output, whatever reads it.
  explicit Reporter(bool live = true) : terminal_(live && isatty(STDOUT_FILENO)) {}

  void step(const StepReport& r) {
    // ETA from a running mean over about the last 20 steps
    mean_ms_ = mean_ms_ == 0 ? r.milliseconds : mean_ms_ + 0.05 * (r.milliseconds - mean_ms_);
    const std::string line = step_line(r, mean_ms_, terminal_ ? columns() - 1 : 0);
    put(terminal_ ? "\r\033[K" + line : line + "\n");
    live_ = terminal_;
  }

  // The fields of a step's line, the most wanted first; from the end whole fields are left out where the line
  // would have more than `width` columns (0: all stay).
  static std::string step_line(const StepReport& r, double mean_ms, int width) {
    const auto field = [](const char* format, auto... values) {
      char text[80];
      std::snprintf(text, sizeof text, format, values...);
      return std::string(text);
    };
    std::string line = field("step %lld/%lld", (long long)r.step, (long long)r.steps);
    const std::string floor = std::isfinite(r.floor) ? field(" (floor %.4f)", r.floor) : "";
    for (const std::string& next :
         {field("loss %.4f", r.loss) + floor, "eta " + clock_text(double(r.steps - r.step) * mean_ms / 1000),
          field("%.0f tokens/s", r.tokens_per_second) +
              (r.ranks > 1 ? field(" (%.0f a rank)", r.tokens_per_second / r.ranks) : ""),
          field("lr %.3e", r.learning_rate), field("norm %.3f", r.norm), field("%.1f ms", r.milliseconds),
          field("%.1f%% of peak", 100 * r.share_of_peak)}) {
      if (width > 0 && line.size() + 2 + next.size() > size_t(width)) break;
      line += "  " + next;
    }
    return line;
  }

  // A line that stays.
  void say(const std::string& line) {
    put((live_ ? "\n" : "") + for_terminal(line, STDOUT_FILENO) + "\n");
    live_ = false;
  }

  // Why standard output could not be written, "" where it could, or nobody reads it.
  const std::string& error() const { return error_; }

 private:
  void put(const std::string& text) {
    std::fflush(stdout);  // what was printed before
    const int error = write_all(STDOUT_FILENO, text);
    if (!error || error == EPIPE || error == EIO || !error_.empty()) return;
    error_ = std::string("standard output: cannot be written: ") + std::strerror(error);
    warn(error_ + "; the run goes on");
  }

  // The terminal's width, so that the live line never wraps.
  static int columns() {
    winsize size = {};
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col : 80;
  }

  const bool terminal_;
  bool live_ = false;
  double mean_ms_ = 0;
  std::string error_;
};

// log.csv: lines "# ..." that say where the run comes from, a header, a row a step, and a row a validation. A
// row is there whole or not at all. Where it cannot be written (a full disk) that is said at once, the rows
// wait in memory, and follow when it can be written again.
class CsvLog {
 public:
  static constexpr const char* kHeader =
      "step,split,loss,lr,grad_norm,ms,tokens_per_s,sol,floor,time,wait_ms";
  static constexpr const char* kHeaderWithoutWait =
      "step,split,loss,lr,grad_norm,ms,tokens_per_s,sol,floor,time";
  static constexpr const char* kOlderHeader = "step,split,loss,lr,grad_norm,ms,tokens_per_s,sol";

  // Opens path; of an older log the rows up to step `last_step` stay, so that a resumed run continues it, and
  // `about`, one line, joins those at its head. Throws one line when it is no log of this program, or cannot
  // be written.
  CsvLog(const std::string& path, int64_t last_step, const std::string& about) : path_(path) {
    std::string head, rows;
    read_older(last_step, head, rows);
    head_ = head + "# " + about + "\n" + kHeader + "\n";
    const size_t slash = path.rfind('/') + 1;  // the old log stays whole until the new one is
    const std::string fresh = path.substr(0, slash) + "." + path.substr(slash) + ".tmp";
    file_ = open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0666);
    int error = file_ < 0 ? errno : write_all(file_, head_ + rows);
    if (!error && std::rename(fresh.c_str(), path.c_str()) != 0) error = errno;
    if (!error) return;
    if (file_ >= 0) {
      close(file_);
      unlink(fresh.c_str());
    }
    throw std::runtime_error(path + ": cannot be written: " + std::strerror(error));
  }
  ~CsvLog() {
    if (file_ >= 0) close(file_);
  }
  CsvLog(const CsvLog&) = delete;
  CsvLog& operator=(const CsvLog&) = delete;

  // Whether a file is a log of this program, empty or none. Throws when it cannot be read.
  static bool is_ours(const std::string& path) { return begins_as_ours(older(path)); }

  void train(const StepReport& r) {
    char row[256];
    std::snprintf(row, sizeof row, "%lld,train,%.6f,%.6e,%.6f,%.3f,%.1f,%.4f,%s,%.2f,%.3f\n",
                  (long long)r.step, r.loss, r.learning_rate, r.norm, r.milliseconds, r.tokens_per_second,
                  r.share_of_peak, floor_text(r.floor).c_str(), now(), r.waited_milliseconds);
    write(row);
  }
  // Columns that a validation does not have stay empty.
  void validation(int64_t step, double loss, double floor) {
    char row[128];
    std::snprintf(row, sizeof row, "%lld,val,%.6f,,,,,,%s,%.2f,\n", (long long)step, loss,
                  floor_text(floor).c_str(), now());
    write(row);
  }

  // Writes what waits; false where that is not possible.
  bool flush() {
    if (waiting_.empty()) return true;
    const std::string error = append();
    if (error.empty() != failing_) return error.empty();
    failing_ = !error.empty();
    warn(path_ + (failing_
                      ? ": cannot be written: " + error + "; its rows are kept, and written when they can be"
                      : ": is written again, no row is missing"));
    return !failing_;
  }

 private:
  // The log that is there, "" where there is none. Throws when it cannot be read: it would be written over.
  static std::string older(const std::string& path) {
    if (!path_exists(path)) return "";
    return read_text_file(path, std::numeric_limits<uint64_t>::max());
  }

  static bool begins_as_ours(const std::string& log) {
    std::istringstream lines(log);
    std::string line;
    while (std::getline(lines, line) && line.rfind("# ", 0) == 0) {
    }
    return line.empty() || line == kHeader || line == kHeaderWithoutWait || line == kOlderHeader;
  }

  static std::string floor_text(double floor) {
    char text[32] = "";
    if (std::isfinite(floor)) std::snprintf(text, sizeof text, "%.6f", floor);
    return text;
  }

  static double now() {  // seconds since 1970
    timespec t = {};
    clock_gettime(CLOCK_REALTIME, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  void write(const std::string& row) {
    waiting_ += row;
    flush();
  }

  // Appends the waiting rows as one piece; what went wrong, "" if nothing did. A log that was deleted or
  // replaced is opened again.
  std::string append() {
    struct stat status = {};
    if (file_ >= 0 && fstat(file_, &status) == 0 && status.st_nlink == 0) {
      close(file_);
      file_ = -1;
    }
    if (file_ < 0) {
      file_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
      if (file_ < 0 || fstat(file_, &status) != 0) return std::strerror(errno);
      if (status.st_size == 0 && waiting_.rfind(head_, 0) != 0) waiting_ = head_ + waiting_;
    }
    if (fstat(file_, &status) != 0) return std::strerror(errno);
    size_t done = 0;
    const int error = write_all(file_, waiting_, &done);
    if (error && done > 0 && ftruncate(file_, status.st_size) == 0) done = 0;  // no half row
    waiting_.erase(0, done);
    return error ? std::strerror(error) : "";
  }

  // The rows of steps up to `last_step` of the log that is there, and the lines before its header.
  void read_older(int64_t last_step, std::string& head, std::string& rows) const {
    const std::string log = older(path_);
    if (!begins_as_ours(log))
      throw std::runtime_error(path_ +
                               ": is not a log of this program, which would write over it; move it away, or "
                               "choose another folder with -o");
    std::istringstream old(log);
    bool any = false;
    for (std::string row;
         std::getline(old, row) && !old.eof();) {  // a last line without its end is a half row
      if (row.rfind("# ", 0) == 0 && !any) {
        head += row + "\n";
        continue;
      }
      any = true;
      const auto commas = std::count(row.begin(), row.end(), ',');
      if (commas == 7) row += ",,,";  // of before there were floor and time
      if (commas == 9) row += ",";    // of before there was wait_ms
      if (row[0] >= '0' && row[0] <= '9' && (commas == 7 || commas == 9 || commas == 10) &&
          std::atoll(row.c_str()) <= last_step)
        rows += row + "\n";
    }
  }

  const std::string path_;
  std::string head_;     // up to the header
  std::string waiting_;  // rows that are not written yet
  int file_ = -1;
  bool failing_ = false;
};

}  // namespace gdn
