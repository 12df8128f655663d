// A device is the first argument of every layer. It says which number types the layers use, owns the memory,
// and carries what the calls need (a stream, a matrix-product handle). There are two:
//
//   Cpu<Real>   plain loops with OpenMP; Real = float to train, double to check gradients      (this file)
//   Cuda        one NVIDIA GPU: bf16 activations, fp32 statistics, state and gradients (gdn/cuda_device.cuh)
//
// Both have
//   using real   statistics, recurrent state, gradients of parameters, master weights, optimizer moments
//   using act    activations, gradients of activations, and the weights that enter matrix products
//   void* allocate(bytes, what, remedy), release(p)         throws one line when there is not enough memory
//   allocated                                               bytes asked for so far, by what they are for
//   upload / download / copy / zero(…), synchronize()       ordered after the layers called before
//   allocate_host(bytes), release_host(p)                   host memory the device reads and writes by itself
//   download_later(…)                  into such memory; there when an event recorded after it has been waited for
//   Event, record(event), wait(event), seconds(from, to)    a point in the device's work, and the time between two
//   follow(event)                      what is called from now on runs behind that point of another stream
//   Graph, replay(graph, calls)        runs the layers that calls() calls; on the GPU from the third time on as one
//                                      recorded graph, so calls() must always call the same with the same arguments
//   range_push(name, layer), range_pop()                    profiler ranges (NVTX on the GPU, nothing on the CPU)
#pragma once

#include <malloc.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

namespace gdn {

// A device has less memory than was asked for.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline size_t physical_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && page > 0 ? size_t(pages) * size_t(page) : SIZE_MAX;
}

template <class Real>
struct Cpu {
  using real = Real;
  using act = Real;
  static constexpr bool is_gpu = false;
  std::map<std::string, size_t> allocated;

  // `bytes` of uninitialised host memory, aligned to 64 bytes; `what` and `remedy` go into the error.
  void* allocate(size_t bytes, const char* what, const char* remedy) {
    void* p = nullptr;
    // More than the machine has is refused here: the kernel would grant it, and kill the process that uses it.
    const size_t memory = physical_memory();
    if (bytes > memory || in_use_ > memory - bytes || posix_memalign(&p, 64, bytes ? bytes : 64) != 0)
      throw OutOfMemory("out of memory: " + std::to_string(bytes >> 20) + " MiB asked for " + what + "; " +
                        remedy);
    allocated[what] += bytes;
    in_use_ += malloc_usable_size(p);
    return p;
  }
  void release(void* p) {
    in_use_ -= malloc_usable_size(p);
    std::free(p);
  }
  void upload(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
  void download(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
  void download_later(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
  void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
  void zero(void* p, size_t bytes) { std::memset(p, 0, bytes); }
  void synchronize() {}

  void* allocate_host(size_t bytes) {
    void* p = bytes <= physical_memory() ? std::malloc(bytes ? bytes : 1) : nullptr;
    if (!p) throw std::runtime_error("out of memory: " + std::to_string(bytes >> 20) + " MiB on the host");
    return p;
  }
  void release_host(void* p) { std::free(p); }

  struct Event {
    std::chrono::steady_clock::time_point at;
  };
  void record(Event& event) { event.at = std::chrono::steady_clock::now(); }
  void wait(const Event&) {}
  void follow(const Event&) {}
  double seconds(const Event& from, const Event& to) {
    return std::chrono::duration<double>(to.at - from.at).count();
  }

  struct Graph {};
  template <class Calls>
  void replay(Graph&, const Calls& calls) {
    calls();
  }

  void range_push(const char*, int) {}
  void range_pop() {}

 private:
  size_t in_use_ = 0;  // bytes
};

// Owns `size` elements of T on a device.
template <class Device, class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device& device, size_t size, const char* what,
         const char* remedy = "lower -b (sequences a micro-batch)")
      : device_(&device),
        data_(static_cast<T*>(device.allocate(size * sizeof(T), what, remedy))),
        size_(size) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_) device_->release(data_);
  }
  T* get() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void zero() { device_->zero(data_, bytes()); }

 private:
  void swap(Buffer& other) {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  Device* device_ = nullptr;
  T* data_ = nullptr;
  size_t size_ = 0;
};

// Owns `size` elements of T of host memory that the device reads and writes by itself.
template <class Device, class T>
class HostBuffer {
 public:
  HostBuffer(Device& device, size_t size)
      : device_(device), data_(static_cast<T*>(device.allocate_host(size * sizeof(T)))) {}
  ~HostBuffer() { device_.release_host(data_); }
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;
  T* get() const { return data_; }

 private:
  Device& device_;
  T* data_;
};

// Names a phase, a function or, with its number, a layer or a group of the arena in a profiler's timeline for
// as long as it lives.
template <class Device>
class Range {
 public:
  Range(Device& device, const char* name, int layer = -1) : device_(device) {
    device_.range_push(name, layer);
  }
  ~Range() { device_.range_pop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  Device& device_;
};

}  // namespace gdn
