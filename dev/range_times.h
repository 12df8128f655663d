// The NVTX ranges (gdn/device.h) of queued work as spans of the GPU's time, by CUDA events recorded where
// they begin and end. An event takes the GPU a microsecond or so.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "gdn_kernels.cuh"

namespace gdn {

// A range or a kernel. Times are in microseconds, from any one point.
struct Span {
  std::string name;
  int layer = -1;   // ranges of a layer
  int parent = -1;  // the range around it, which comes before it in the vector of spans
  bool kernel = false;
  double begin = 0, end = 0;
};

// The names of spans[i] and the ranges around it, "outer / inner"; "" for i = -1.
inline std::string path_of(const std::vector<Span>& spans, int i) {
  if (i < 0) return "";
  const std::string outer = path_of(spans, spans[i].parent);
  return outer.empty() ? spans[i].name : outer + " / " + spans[i].name;
}

// Ranges by CUDA events. What fails between construction and the times asked for is thrown with those.
class RangeTimes {
 public:
  explicit RangeTimes(Cuda& dev) : dev_(dev) {
    mark();
    dev_.on_range = [this](const char* name, int layer) { name ? push(name, layer) : pop(); };
  }
  ~RangeTimes() {
    dev_.on_range = nullptr;
    for (const Mark& mark : marks_) cudaEventDestroy(mark.event);
  }
  RangeTimes(const RangeTimes&) = delete;
  RangeTimes& operator=(const RangeTimes&) = delete;

  // Ends the recording and waits for the device. Times count from the construction.
  std::vector<Span> spans() {
    const std::vector<double> at = times();
    std::vector<Span> spans = ranges_;
    for (size_t i = 0; i < spans.size(); i++) {
      spans[i].begin = at[first_mark_[i]];
      spans[i].end = at[last_mark_[i]];
    }
    return spans;
  }

  // Ends the recording and waits for the device. Milliseconds in which a range was the innermost open one,
  // summed by path, in the order in which the paths were first met.
  std::vector<std::pair<std::string, double>> own_milliseconds() {
    const std::vector<double> at = times();
    std::vector<std::pair<std::string, double>> sums;
    std::map<std::string, size_t> place;
    for (size_t i = 1; i < marks_.size(); i++) {
      const std::string path = path_of(ranges_, marks_[i].innermost);
      const auto [found, first] = place.emplace(path, sums.size());
      if (first) sums.emplace_back(path, 0);
      sums[found->second].second += (at[i] - at[i - 1]) / 1000;
    }
    return sums;
  }

 private:
  struct Mark {
    cudaEvent_t event;
    int innermost;  // the range that was the innermost one until here
  };

  void push(const char* name, int layer) {
    mark();
    ranges_.push_back({name, layer, innermost_});
    innermost_ = int(ranges_.size()) - 1;
    first_mark_.push_back(marks_.size() - 1);
    last_mark_.push_back(marks_.size() - 1);
  }
  void pop() {
    mark();
    last_mark_[innermost_] = marks_.size() - 1;
    innermost_ = ranges_[innermost_].parent;
  }
  void mark() {
    cudaEvent_t event = nullptr;
    if (status_ == cudaSuccess) status_ = cudaEventCreate(&event);
    if (status_ != cudaSuccess) return;
    marks_.push_back({event, innermost_});
    status_ = cudaEventRecord(event, dev_.stream);
  }
  std::vector<double> times() {
    dev_.on_range = nullptr;
    cuda_check(status_);
    cuda_check(cudaEventSynchronize(marks_.back().event));
    std::vector<double> at;
    for (const Mark& mark : marks_) {
      float milliseconds = 0;
      cuda_check(cudaEventElapsedTime(&milliseconds, marks_[0].event, mark.event));
      at.push_back(1000 * double(milliseconds));
    }
    return at;
  }

  Cuda& dev_;
  cudaError_t status_ = cudaSuccess;
  std::vector<Span> ranges_;
  std::vector<size_t> first_mark_, last_mark_;  // of each range
  std::vector<Mark> marks_;
  int innermost_ = -1;
};

}  // namespace gdn
