// What a build holds for the GPU it runs on: asked of a kernel that is never launched.
#include "cuda_device.cuh"

namespace gdn {
namespace {

constexpr int kWgmmaThreads = 128;

// Its launch bound tells for which architecture the code was compiled that this GPU runs.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__global__ void __launch_bounds__(kWgmmaThreads) probe_kernel() {}
#else
__global__ void __launch_bounds__(2 * kWgmmaThreads) probe_kernel() {}
#endif

}  // namespace

cudaError_t has_code_for_gpu() noexcept {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}

std::string kernels_in_use() {
  cudaFuncAttributes attributes;
  cuda_check(cudaFuncGetAttributes(&attributes, probe_kernel));
  if (attributes.maxThreadsPerBlock == kWgmmaThreads) return "sm_90a, wgmma";
  int device = 0, major = 0;
  cuda_check(cudaGetDevice(&device));
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return std::string("portable, mma.sync") + (major == 9 ? " (build with GPU_ARCH=90a for wgmma)" : "");
}

}  // namespace gdn
