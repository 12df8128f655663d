// Where the time of one training step goes on the GPU: spans of the NVTX ranges (gdn/device.h) and of the
// kernels, written as Chrome trace events for ui.perfetto.dev, chrome://tracing and scripts/plot_step.py.
//
// CUPTI says when each kernel, copy and memset ran, and in which range it was launched; a range lasts from
// the start of its first kernel to the end of its last one, as Nsight Systems projects NVTX ranges onto the
// GPU. Where CUPTI cannot be used, ranges last from CUDA event to CUDA event, recorded where they begin and
// end; the trace then has no kernels, and the events add a microsecond or so each.
#pragma once

#if __has_include(<cupti.h>)
#include <cupti.h>
#include <dlfcn.h>
#endif
#include <cxxabi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gdn_kernels.cuh"

#include "gdn/json.h"

#include "dev/range_times.h"

namespace gdn {

#if __has_include(<cupti.h>)
// Ranges and kernels by CUPTI, which is loaded when it is asked for. One recording a program.
class KernelTimes {
 public:
  // Loads CUPTI and starts its records; ranges count from record() on. Throws one line where that fails.
  explicit KernelTimes(Cuda& dev) : dev_(dev) {
    const std::string library = "libcupti.so." + std::to_string(CUDART_VERSION / 1000);
    void* handle = dlopen(library.c_str(), RTLD_NOW);
    if (!handle)
      throw std::runtime_error("CUPTI: " + std::string(dlerror()) +
                               "; LD_LIBRARY_PATH may need the toolkit's extras/CUPTI/lib64");
    find(handle, "cuptiGetResultString", result_string_);
    find(handle, "cuptiActivityEnable", enable_);
    find(handle, "cuptiActivityDisable", disable_);
    find(handle, "cuptiActivityRegisterCallbacks", register_callbacks_);
    find(handle, "cuptiActivityPushExternalCorrelationId", push_id_);
    find(handle, "cuptiActivityPopExternalCorrelationId", pop_id_);
    find(handle, "cuptiActivityFlushAll", flush_);
    find(handle, "cuptiActivityGetNumDroppedRecords", dropped_records_);
    find(handle, "cuptiActivityGetNextRecord", records().next);
    check(register_callbacks_(take_buffer, read_buffer), "cuptiActivityRegisterCallbacks");
    for (const CUpti_ActivityKind kind : kKinds) check(enable_(kind), "cuptiActivityEnable");
  }
  ~KernelTimes() {
    dev_.on_range = nullptr;
    for (const CUpti_ActivityKind kind : kKinds) disable_(kind);
  }
  KernelTimes(const KernelTimes&) = delete;
  KernelTimes& operator=(const KernelTimes&) = delete;

  void record() {
    dev_.on_range = [this](const char* name, int layer) { name ? push(name, layer) : pop(); };
  }
  void pause() { dev_.on_range = nullptr; }

  // Waits for the device. The ranges in which something ran, then what ran in them in order of time.
  std::vector<Span> spans() {
    dev_.synchronize();
    check(id_status_, "cuptiActivityPushExternalCorrelationId");
    check(flush_(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "cuptiActivityFlushAll");
    size_t dropped = 0;
    check(dropped_records_(nullptr, 0, &dropped), "cuptiActivityGetNumDroppedRecords");
    if (dropped) throw std::runtime_error("CUPTI: " + std::to_string(dropped) + " records were dropped");
    const std::lock_guard<std::mutex> lock(records().mutex);
    std::vector<Span> kernels;
    for (const auto& [correlation, kernel] : records().kernels) {
      const auto range = records().range_of.find(correlation);
      if (range == records().range_of.end()) continue;
      kernels.push_back(kernel);
      kernels.back().parent = int(range->second);
      for (int i = kernels.back().parent; i >= 0; i = ranges_[i].parent) {
        ranges_[i].begin = std::min(ranges_[i].begin, kernel.begin);
        ranges_[i].end = std::max(ranges_[i].end, kernel.end);
      }
    }
    if (kernels.empty()) throw std::runtime_error("CUPTI: it recorded no kernels");
    std::sort(kernels.begin(), kernels.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    std::vector<Span> spans;
    std::vector<int> place(ranges_.size());
    const auto add = [&](Span span) {
      if (span.parent >= 0) span.parent = place[span.parent];
      spans.push_back(std::move(span));
    };
    for (size_t i = 0; i < ranges_.size(); i++) {
      place[i] = int(spans.size());
      if (ranges_[i].begin < kNever) add(ranges_[i]);
    }
    for (const Span& kernel : kernels) add(kernel);
    return spans;
  }

 private:
  static constexpr double kNever = std::numeric_limits<double>::infinity();
  // Launches carry the number of their range as CUPTI's external correlation id, which is attached to records
  // of calls of the runtime and the driver.
  static constexpr CUpti_ExternalCorrelationKind kIdKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
  static constexpr CUpti_ActivityKind kKinds[] = {
      CUPTI_ACTIVITY_KIND_RUNTIME, CUPTI_ACTIVITY_KIND_DRIVER, CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION,
      CUPTI_ACTIVITY_KIND_MEMCPY,  CUPTI_ACTIVITY_KIND_MEMSET, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL};

  // What CUPTI's callbacks, which may run on a thread of its own, have read.
  struct Records {
    decltype(&cuptiActivityGetNextRecord) next = nullptr;
    std::mutex mutex;
    std::map<uint32_t, uint64_t> range_of;           // by the correlation id of the launch
    std::vector<std::pair<uint32_t, Span>> kernels;  // with that id
    uint64_t origin = 0;                             // nanoseconds
  };
  static Records& records() {
    static Records& records = *new Records;  // never destroyed: CUPTI calls back until the program ends
    return records;
  }

  static void CUPTIAPI take_buffer(uint8_t** buffer, size_t* bytes, size_t* most_records) {
    *bytes = size_t(8) << 20;
    *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *bytes));
    if (!*buffer) *bytes = 0;
    *most_records = 0;  // as many as fit
  }
  static void CUPTIAPI read_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t filled) {
    Records& r = records();
    const std::lock_guard<std::mutex> lock(r.mutex);
    for (CUpti_Activity* record = nullptr; r.next(buffer, filled, &record) == CUPTI_SUCCESS;) {
      switch (record->kind) {
        case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION: {
          const auto& launch = *reinterpret_cast<CUpti_ActivityExternalCorrelation*>(record);
          if (launch.externalKind == kIdKind) r.range_of[launch.correlationId] = launch.externalId;
          break;
        }
        // later CUDA versions have longer records that begin as these do
        case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
          const auto& kernel = *reinterpret_cast<CUpti_ActivityKernel9*>(record);
          add(r, kernel, short_name(kernel.name));
          break;
        }
        case CUPTI_ACTIVITY_KIND_MEMCPY:
          add(r, *reinterpret_cast<CUpti_ActivityMemcpy5*>(record), "memcpy");
          break;
        case CUPTI_ACTIVITY_KIND_MEMSET:
          add(r, *reinterpret_cast<CUpti_ActivityMemset4*>(record), "memset");
          break;
        default:
          break;
      }
    }
    std::free(buffer);
  }
  template <class Record>
  static void add(Records& r, const Record& record, const std::string& name) {
    if (record.end == 0) return;  // it has no times
    if (!r.origin) r.origin = record.start;
    const auto microseconds = [&](uint64_t time) { return double(int64_t(time - r.origin)) / 1000; };
    r.kernels.push_back(
        {record.correlationId, {name, -1, -1, true, microseconds(record.start), microseconds(record.end)}});
  }
  // Of "void gdn::name<2, 3>(float*)" and its mangled form: "name".
  static std::string short_name(const char* mangled) {
    int status = 0;
    char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string name = demangled ? demangled : mangled;
    std::free(demangled);
    name = name.substr(0, name.find_first_of("<("));
    return name.substr(name.find_last_of(": ") + 1);
  }

  void push(const char* name, int layer) {
    ranges_.push_back({name, layer, innermost_, false, kNever, -kNever});
    innermost_ = int(ranges_.size()) - 1;
    if (id_status_ == CUPTI_SUCCESS) id_status_ = push_id_(kIdKind, uint64_t(innermost_));
  }
  void pop() {
    innermost_ = ranges_[innermost_].parent;
    uint64_t last = 0;
    if (id_status_ == CUPTI_SUCCESS) id_status_ = pop_id_(kIdKind, &last);
  }

  template <class Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string("CUPTI: has no ") + name);
  }
  void check(CUptiResult status, const char* call) const {
    if (status == CUPTI_SUCCESS) return;
    const char* reason = "unknown error";
    result_string_(status, &reason);
    throw std::runtime_error(std::string("CUPTI: ") + call + ": " + reason);
  }

  Cuda& dev_;
  std::vector<Span> ranges_;
  int innermost_ = -1;
  CUptiResult id_status_ = CUPTI_SUCCESS;
  decltype(&cuptiGetResultString) result_string_ = nullptr;
  decltype(&cuptiActivityEnable) enable_ = nullptr;
  decltype(&cuptiActivityDisable) disable_ = nullptr;
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks_ = nullptr;
  decltype(&cuptiActivityPushExternalCorrelationId) push_id_ = nullptr;
  decltype(&cuptiActivityPopExternalCorrelationId) pop_id_ = nullptr;
  decltype(&cuptiActivityFlushAll) flush_ = nullptr;
  decltype(&cuptiActivityGetNumDroppedRecords) dropped_records_ = nullptr;
};
#endif

struct Trace {
  std::vector<Span> spans;
  std::string source;  // "CUPTI" or "CUDA events"
};

// Traces one step. queue() queues a step, launch by launch, for only launches can be told apart by range, and
// finish() waits for the oldest one that is queued; two may be queued at once. The GPU is kept busy with a
// step ahead, so that no range waits for the host. Says on stderr why CUPTI was not used.
template <class Queue, class Finish>
Trace trace_step(Cuda& dev, const Queue& queue, const Finish& finish) {
#if __has_include(<cupti.h>)
  try {
    KernelTimes times(dev);
    queue();
    finish();
    queue();
    times.record();
    queue();
    times.pause();
    finish();
    finish();
    return {times.spans(), "CUPTI"};
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).rfind("CUPTI: ", 0) != 0) throw;
    std::fprintf(stderr, "%s; ranges alone, by CUDA events\n", error.what());
  }
#else
  std::fprintf(stderr, "compiled without cupti.h; ranges alone, by CUDA events\n");
#endif
  queue();
  RangeTimes times(dev);
  queue();
  Trace trace = {times.spans(), "CUDA events"};
  finish();
  finish();
  return trace;
}

// Writes Chrome trace events: a complete event ("X") a span, in microseconds from the first range's begin; of
// category "range" (thread 1) or "kernel" (thread 2), with the path of names and, inside a layer, its number.
// `about` goes into otherData.
inline void write_trace(const std::string& file, const Trace& trace, Json::Object about) {
  about.emplace_back("source", trace.source);
  const auto name_thread = [](int thread, const char* name) {
    return Json::Object{{"name", "thread_name"},
                        {"ph", "M"},
                        {"pid", 1},
                        {"tid", thread},
                        {"args", Json::Object{{"name", name}}}};
  };
  Json::Array events = {name_thread(1, "ranges"), name_thread(2, "kernels")};
  for (int i = 0; i < int(trace.spans.size()); i++) {
    const Span& span = trace.spans[i];
    int layered = i;
    while (layered >= 0 && trace.spans[layered].layer < 0) layered = trace.spans[layered].parent;
    Json::Object args = {{"path", path_of(trace.spans, i)}};
    if (layered >= 0) args.emplace_back("layer", trace.spans[layered].layer);
    const auto nanoseconds = [](double microseconds) { return std::round(1000 * microseconds) / 1000; };
    events.push_back(
        Json::Object{{"name", span.layer < 0 ? span.name : span.name + " " + std::to_string(span.layer)},
                     {"cat", span.kernel ? "kernel" : "range"},
                     {"ph", "X"},
                     {"pid", 1},
                     {"tid", span.kernel ? 2 : 1},
                     {"ts", nanoseconds(span.begin - trace.spans[0].begin)},
                     {"dur", nanoseconds(span.end - span.begin)},
                     {"args", std::move(args)}});
  }
  const std::string text =
      json_text(Json::Object{
          {"displayTimeUnit", "ms"}, {"otherData", std::move(about)}, {"traceEvents", std::move(events)}}) +
      "\n";
  std::FILE* out = std::fopen(file.c_str(), "w");
  if (!out) throw std::runtime_error("-trace " + file + ": cannot be written");
  bool failed = std::fwrite(text.data(), 1, text.size(), out) != text.size();
  failed |= std::fclose(out) != 0;
  if (failed) throw std::runtime_error("-trace " + file + ": cannot be written; is the disk full?");
}

}  // namespace gdn
