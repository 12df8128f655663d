// How arrays on GPUs travel between ranks (communicator.h): by NCCL, whose calls are queued on the GPU's
// stream and recorded in graphs, or staged through pinned host memory and MPI, which NCCL's absence or
// several ranks on one GPU ask for, and which the host waits for. The bits are the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "communicator.h"
#include "cuda_device.cuh"

namespace gdn {

template <>
class Exchange<Cuda> {
 public:
  // Throws one line where NCCL is asked for and cannot be had: it is not built in, or ranks share a GPU.
  Exchange(Cuda& dev, Communicator& c, ExchangeBy by);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Whether its calls may be recorded in a graph, and go on beside the layers.
  bool in_graph() const { return nccl_ != nullptr; }
  // For the program's first lines.
  std::string description() const;

  // As of the CPU.
  void swap(int partner, float* received, const float* data, int pieces, size_t piece, size_t stride);
  template <class T>
  void gather_parts(T* data, size_t part) {
    gather_bytes(data, part * sizeof(T));
  }
  // Runs calls on a stream of their own, behind what was queued before and beside what is queued next, until
  // join(), or until an event that they record is followed (device.h).
  template <class Calls>
  void beside(const Calls& calls) {
    wait_for(dev_.stream, beside_, before_);
    std::swap(dev_.stream, beside_);
    try {
      calls();
    } catch (...) {
      std::swap(dev_.stream, beside_);
      throw;
    }
    std::swap(dev_.stream, beside_);
  }
  // What is queued next waits for what was called beside.
  void join() { wait_for(beside_, dev_.stream, after_); }
  // Calls of gather_parts that may go at once.
  template <class Calls>
  void together(const Calls& calls) {
    begin_group();
    calls();
    end_group();
  }

 private:
  struct Nccl;
  // What is queued on `second` from now on waits for what is on `first`.
  static void wait_for(cudaStream_t first, cudaStream_t second, cudaEvent_t event) {
    cuda_check(cudaEventRecord(event, first));
    cuda_check(cudaStreamWaitEvent(second, event, 0));
  }
  void gather_bytes(void* data, size_t bytes);
  void begin_group();
  void end_group();
  void* host(std::unique_ptr<HostBuffer<Cuda, unsigned char>>& buffer, size_t& size, size_t bytes);

  Cuda& dev_;
  Communicator& c_;
  cudaStream_t beside_ = nullptr;
  cudaEvent_t before_ = nullptr, after_ = nullptr;
  std::unique_ptr<Nccl> nccl_;
  std::unique_ptr<HostBuffer<Cuda, unsigned char>> out_, in_;  // of what is staged
  size_t out_size_ = 0, in_size_ = 0;
};

}  // namespace gdn
