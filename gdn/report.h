// What a training run says: one line a step on standard output (on a terminal a live line, kept at
// validations), and log.csv with the columns step,split,loss,lr,grad_norm,ms,tokens_per_s,sol.
#pragma once

#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace gdn {

struct StepReport {
  int64_t step = 0, steps = 0;
  double loss = 0,
         floor = NAN;  // nats per token; floor: the entropy of the built-in stories, NaN where unknown
  double learning_rate = 0, norm = 0, milliseconds = 0, tokens_per_second = 0;
  double speed_of_light = 0;  // share of the peak, 0 to 1
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
  std::istringstream fields(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));  // a name may hold spaces
  std::string field;
  for (int i = 3; i <= 22; i++) fields >> field;  // 22: ticks from boot to start
  timespec now = {};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec) -
         double(std::atoll(field.c_str())) / double(sysconf(_SC_CLK_TCK));
}

class Reporter {
 public:
  Reporter() : terminal_(isatty(STDOUT_FILENO)) {}

  void step(const StepReport& r) {
    // ETA from a running mean over about the last 20 steps
    mean_ms_ = mean_ms_ == 0 ? r.milliseconds : mean_ms_ + 0.05 * (r.milliseconds - mean_ms_);
    char floor[32] = "", line[256];
    if (std::isfinite(r.floor)) std::snprintf(floor, sizeof floor, " (floor %.4f)", r.floor);
    std::snprintf(
        line, sizeof line,
        "step %lld/%lld  loss %.4f%s  lr %.3e  norm %.3f  %.1f ms  %.0f tokens/s  %.1f%% of speed-of-light  "
        "eta %s",
        (long long)r.step, (long long)r.steps, r.loss, floor, r.learning_rate, r.norm, r.milliseconds,
        r.tokens_per_second, 100 * r.speed_of_light,
        clock_text(double(r.steps - r.step) * mean_ms_ / 1000).c_str());
    if (terminal_)
      std::printf("\r\033[K%.*s", columns() - 1, line);
    else
      std::printf("%s\n", line);
    std::fflush(stdout);
    live_ = terminal_;
  }

  // A line that stays.
  void say(const std::string& line) {
    if (live_) std::printf("\n");
    live_ = false;
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  }

 private:
  // The terminal's width, so that the live line never wraps.
  static int columns() {
    winsize size = {};
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col : 256;
  }

  const bool terminal_;
  bool live_ = false;
  double mean_ms_ = 0;
};

class CsvLog {
 public:
  static constexpr const char* kHeader = "step,split,loss,lr,grad_norm,ms,tokens_per_s,sol";

  // Opens path; of an older log the rows up to step `last_step` stay, so that a resumed run continues it.
  CsvLog(const std::string& path, int64_t last_step) : path_(path) {
    std::vector<std::string> rows;
    std::ifstream old(path);
    for (std::string row; std::getline(old, row);)
      if (row != kHeader && !row.empty() && std::atoll(row.c_str()) <= last_step) rows.push_back(row);
    old.close();
    const std::string fresh = path + ".tmp";  // the old log stays whole until the new one is
    file_ = std::fopen(fresh.c_str(), "w");
    if (!file_) throw std::runtime_error(path + ": cannot be written; choose another folder with -o");
    write(kHeader);
    for (const std::string& row : rows) write(row);
    if (failed_ || std::rename(fresh.c_str(), path.c_str()) != 0)
      throw std::runtime_error(path + ": cannot be written; is the disk full?");
  }
  ~CsvLog() { std::fclose(file_); }
  CsvLog(const CsvLog&) = delete;
  CsvLog& operator=(const CsvLog&) = delete;

  void train(const StepReport& r) {
    char row[256];
    std::snprintf(row, sizeof row, "%lld,train,%.6f,%.6e,%.6f,%.3f,%.1f,%.4f", (long long)r.step, r.loss,
                  r.learning_rate, r.norm, r.milliseconds, r.tokens_per_second, r.speed_of_light);
    write(row);
  }
  // Columns that a validation does not have stay empty.
  void validation(int64_t step, double loss) {
    char row[64];
    std::snprintf(row, sizeof row, "%lld,val,%.6f,,,,,", (long long)step, loss);
    write(row);
  }
  bool failed() const { return failed_; }  // a row could not be written (a full disk)

 private:
  void write(const std::string& row) {
    if (std::fprintf(file_, "%s\n", row.c_str()) < 0 || std::fflush(file_) != 0) failed_ = true;
  }

  const std::string path_;
  std::FILE* file_ = nullptr;
  bool failed_ = false;
};

}  // namespace gdn
