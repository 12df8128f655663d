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
//   upload / download / zero(…), synchronize()       ordered after the layers called before
//   range_push(name), range_pop()                           profiler ranges (NVTX on the GPU, nothing on the
//   CPU)
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

namespace gdn {

template <class Real>
struct Cpu {
  using real = Real;
  using act = Real;
  static constexpr bool is_gpu = false;
  std::map<std::string, size_t> allocated;

  // `bytes` of uninitialised host memory, aligned to 64 bytes; `what` and `remedy` go into the error.
  void* allocate(size_t bytes, const char* what, const char* remedy) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, bytes ? bytes : 64) != 0)
      throw std::runtime_error("out of memory: " + std::to_string(bytes >> 20) + " MiB asked for " + what +
                               "; " + remedy);
    allocated[what] += bytes;
    return p;
  }
  void release(void* p) { std::free(p); }
  void upload(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
  void download(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
  void zero(void* p, size_t bytes) { std::memset(p, 0, bytes); }
  void synchronize() {}
  void range_push(const char*) {}
  void range_pop() {}
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

// Names a layer or phase in a profiler's timeline for as long as it lives.
template <class Device>
class Range {
 public:
  Range(Device& device, const char* name) : device_(device) { device_.range_push(name); }
  ~Range() { device_.range_pop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  Device& device_;
};

}  // namespace gdn
