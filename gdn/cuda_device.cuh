// One NVIDIA GPU as a device (device.h): bf16 activations, fp32 statistics, state and gradients. Everything
// runs in order on one stream. Every CUDA and cuBLASLt call is checked; a failure throws one line.
#pragma once

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device.h"

namespace gdn {

inline void throw_if_failed(cudaError_t status, const char* expression, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + expression + ": " +
                           cudaGetErrorString(status));
}

inline void throw_if_failed(cublasStatus_t status, const char* expression, const char* file, int line) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + expression + ": " +
                           cublasLtGetStatusString(status));
}

#define cuda_check(expression) ::gdn::throw_if_failed((expression), #expression, __FILE__, __LINE__)

// To be called after every kernel launch.
inline void launched(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("launch of ") + kernel + ": " + cudaGetErrorString(status));
}

// Whether this build holds machine code for the GPU (gdn/cuda_device.cu).
cudaError_t has_code_for_gpu() noexcept;

// Which kernels run on the GPU, for the program's first lines: "sm_90a, wgmma", or "portable, mma.sync" with what
// would make them faster where something would.
std::string kernels_in_use();

// A matrix product of one shape as cuBLASLt wants it described, with the algorithm chosen for it
// (linear.cuh).
struct MatmulPlan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};
};

struct Cuda {
  using real = float;
  using act = __nv_bfloat16;
  static constexpr bool is_gpu = true;
  static constexpr size_t kWorkspaceBytes = size_t(32) << 20;

  cudaStream_t stream = nullptr;
  bool owns_stream = true;
  cublasLtHandle_t cublaslt = nullptr;
  void* workspace = nullptr;  // [kWorkspaceBytes], of the matrix products
  std::string name, uuid;
  int sm_count = 0, device_count = 0;
  // Shared memory a block may have. Tests lower it, as the environment's GDN_SHARED_BYTES does (never below 99
  // KiB), to run what a GPU with less of it runs.
  int shared_bytes = 0;
  size_t memory_bytes = 0;
  std::map<std::string, size_t> allocated;  // bytes asked for so far, by what they are for
  std::map<std::tuple<int, int, int, int>, MatmulPlan>
      matmul_plans;  // by kind of product and its three sizes
  // Called with each range that begins, and with a null name as it ends. It throws nothing: ranges end in
  // destructors.
  std::function<void(const char* name, int layer)> on_range;

  // GPU number `local_rank` of this host, counted round where there are fewer.
  explicit Cuda(int local_rank = 0) {
    const std::string reason = unavailable();
    if (!reason.empty()) throw std::runtime_error("no usable GPU: " + reason);
    cuda_check(cudaGetDeviceCount(&device_count));
    const int number = local_rank % device_count;
    cuda_check(cudaSetDevice(number));
    cudaDeviceProp properties;
    cuda_check(cudaGetDeviceProperties(&properties, number));
    name = properties.name;
    uuid.assign(properties.uuid.bytes, sizeof properties.uuid.bytes);
    sm_count = properties.multiProcessorCount;
    shared_bytes = lowered_shared_bytes(int(properties.sharedMemPerBlockOptin));
    memory_bytes = properties.totalGlobalMem;
    try {
      cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      cuda_check(cublasLtCreate(&cublaslt));
      workspace = allocate(kWorkspaceBytes, "work space", "free memory on the GPU");
    } catch (...) {
      destroy();
      throw;
    }
  }
  // Work on somebody else's stream of GPU `number`, which is the current one, in layers without matrix products of
  // cuBLASLt (gdn/library.cpp). Allocates nothing.
  Cuda(int number, cudaStream_t others) : stream(others), owns_stream(false) {
    const Limits limits = limits_of(number);
    sm_count = limits.sm_count;
    shared_bytes = lowered_shared_bytes(limits.shared_bytes);
  }
  ~Cuda() { destroy(); }
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;

  // Why no Cuda can be constructed here; empty where one can.
  static std::string unavailable() {
    const cudaError_t status = unavailable_reason();
    if (status == cudaSuccess) return "";
    if (status == cudaErrorInsufficientDriver) {
      int driver = 0, runtime = 0;
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      if (driver == 0) return "there is no NVIDIA driver here";
      return "the driver supports CUDA " + version(driver) + ", this build needs " + version(runtime);
    }
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
      return "GPU 0 is not of the architecture this program was compiled for";
    return cudaGetErrorString(status);
  }

  // Whether a Cuda can be constructed here; never throws.
  static bool available() noexcept { return unavailable_reason() == cudaSuccess; }

  // `bytes` of uninitialised GPU memory, aligned to 256 bytes; `what` and `remedy` go into the error.
  void* allocate(size_t bytes, const char* what, const char* remedy) {
    void* p = nullptr;
    const cudaError_t status = cudaMalloc(&p, bytes ? bytes : 256);
    if (status == cudaSuccess) {
      allocated[what] += bytes;
      return p;
    }
    if (status != cudaErrorMemoryAllocation) cuda_check(status);
    cudaGetLastError();  // running out of memory is not sticky; do not blame the next launch for it
    size_t free_bytes = 0, total_bytes = 0;
    cuda_check(cudaMemGetInfo(&free_bytes, &total_bytes));
    throw OutOfMemory("out of GPU memory: " + mebibytes(bytes) + " asked for " + what + ", " +
                      mebibytes(free_bytes) + " of " + mebibytes(total_bytes) + " free; " + remedy);
  }
  // Unchecked: it runs in destructors, often because an exception with the real error is on its way up.
  void release(void* p) noexcept { cudaFree(p); }

  // Ordered on the stream. Pageable host memory may be reused on return, pinned memory after synchronize().
  void upload(void* device, const void* host, size_t bytes) {
    cuda_check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream));
  }
  // Returns when the bytes have arrived.
  void download(void* host, const void* device, size_t bytes) {
    cuda_check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream));
    synchronize();
  }
  // Host memory must be pinned, and not be read before an event recorded afterwards has been waited for.
  void download_later(void* host, const void* device, size_t bytes) {
    cuda_check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream));
  }
  void copy(void* to, const void* from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
  }
  void zero(void* p, size_t bytes) { cuda_check(cudaMemsetAsync(p, 0, bytes, stream)); }
  void synchronize() { cuda_check(cudaStreamSynchronize(stream)); }

  // Pinned host memory.
  void* allocate_host(size_t bytes) {
    void* p = nullptr;
    cuda_check(cudaMallocHost(&p, bytes ? bytes : 1));
    return p;
  }
  void release_host(void* p) noexcept {
    cudaStreamSynchronize(stream);  // a copy may still be on its way
    cudaFreeHost(p);
  }

  struct Event {
    cudaEvent_t event = nullptr;
    Event() = default;
    ~Event() {
      if (event) cudaEventDestroy(event);
    }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
  };
  void record(Event& e) {
    if (!e.event) cuda_check(cudaEventCreate(&e.event));
    cuda_check(cudaEventRecord(e.event, stream));
  }
  void wait(const Event& e) { cuda_check(cudaEventSynchronize(e.event)); }
  void follow(const Event& e) { cuda_check(cudaStreamWaitEvent(stream, e.event, 0)); }
  // Both events have been reached.
  double seconds(const Event& from, const Event& to) {
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, from.event, to.event));
    return double(ms) / 1000;
  }

  struct Graph {
    cudaGraphExec_t executable = nullptr;
    size_t nodes = 0;  // kernels, copies and the like
    bool warm = false;
    Graph() = default;
    ~Graph() {
      if (executable) cudaGraphExecDestroy(executable);
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
  };
  // The first time calls() simply runs: kernels are loaded then, and algorithms chosen. The second time it is
  // recorded; from then on the recording runs. calls() launches on the stream and touches no host memory.
  template <class Calls>
  void replay(Graph& graph, const Calls& calls) {
    if (!graph.warm) {
      calls();
      graph.warm = true;
      return;
    }
    if (!graph.executable) record_graph(graph, calls);
    cuda_check(cudaGraphLaunch(graph.executable, stream));
  }

  void range_push(const char* range, int layer) {
    nvtxRangePushA(layer < 0 ? range : (std::string(range) + " " + std::to_string(layer)).c_str());
    if (on_range) on_range(range, layer);
  }
  void range_pop() {
    if (on_range) on_range(nullptr, -1);
    nvtxRangePop();
  }

 private:
  template <class Calls>
  void record_graph(Graph& graph, const Calls& calls) {
    cudaGraph_t recorded = nullptr;
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      calls();
    } catch (...) {
      cudaStreamEndCapture(stream, &recorded);
      if (recorded) cudaGraphDestroy(recorded);
      cudaGetLastError();  // the exception says what was wrong
      throw;
    }
    cuda_check(cudaStreamEndCapture(stream, &recorded));
    cudaError_t status = cudaGraphGetNodes(recorded, nullptr, &graph.nodes);
    if (status == cudaSuccess) status = cudaGraphInstantiate(&graph.executable, recorded, 0);
    cudaGraphDestroy(recorded);
    cuda_check(status);
  }

  struct Limits {
    int sm_count = 0, shared_bytes = 0;
  };
  // Of GPU `number`, asked once a process. Any thread may call.
  static Limits limits_of(int number) {
    static std::mutex mutex;
    static std::map<int, Limits> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(number);
    if (found != known.end()) return found->second;
    Limits limits;
    cuda_check(cudaDeviceGetAttribute(&limits.sm_count, cudaDevAttrMultiProcessorCount, number));
    cuda_check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number));
    return known[number] = limits;
  }

  static int lowered_shared_bytes(int bytes) {
    constexpr int kLeast = 99 * 1024;
    const char* lower = std::getenv("GDN_SHARED_BYTES");
    if (!lower) return bytes;
    char* end = nullptr;
    const long value = std::strtol(lower, &end, 10);
    if (*lower == 0 || *end != 0 || value < kLeast || value > bytes)
      throw std::runtime_error("GDN_SHARED_BYTES is '" + std::string(lower) + "'; expected " +
                               std::to_string(kLeast) + " to this GPU's " + std::to_string(bytes));
    return int(value);
  }

  static std::string mebibytes(size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

  static cudaError_t unavailable_reason() noexcept {
    int devices = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    if (status == cudaSuccess && devices == 0) status = cudaErrorNoDevice;
    if (status == cudaSuccess) status = has_code_for_gpu();
    cudaGetLastError();  // asking is not an error
    return status;
  }

  static std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

  void destroy() noexcept {
    for (auto& [key, plan] : matmul_plans) {
      cublasLtMatrixLayoutDestroy(plan.a);
      cublasLtMatrixLayoutDestroy(plan.b);
      cublasLtMatrixLayoutDestroy(plan.d);
      cublasLtMatmulDescDestroy(plan.product);
    }
    if (workspace) release(workspace);
    if (cublaslt) cublasLtDestroy(cublaslt);
    if (stream && owns_stream) cudaStreamDestroy(stream);
  }
};

using act = Cuda::act;  // in the signatures of the GPU's layers

}  // namespace gdn
