// train_gdn's gated delta rule behind C functions, so that peer_ours.py runs it on the same tensors, with the same timing and
// the same float64 check as the peers:
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -diag-suppress 1675 -cudart shared -Xcompiler -fPIC -shared \
//     -I. dev/peers/ours_c.cu -o libgdn_ours.so -lcublasLt
#include <exception>
#include <string>

#include "gdn_kernels.cuh"

namespace {

std::string error;

gdn::Cuda& device(void* stream) {
  static gdn::Cuda device;
  static cudaStream_t own = device.stream;
  device.stream = stream ? static_cast<cudaStream_t>(stream) : own;
  return device;
}

gdn::MixerShape shape_of(const int* sizes) {
  gdn::MixerShape shape;
  shape.batch = sizes[0], shape.tokens = sizes[1];
  shape.heads_k = sizes[2], shape.heads_v = sizes[3];
  shape.head_dim_k = sizes[4], shape.head_dim_v = sizes[5];
  return shape;
}

template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return -1;
  }
}

}  // namespace

// Each returns 0, or -1 with one line in ours_error(). sizes: B, T, Hk, Hv, dk, dv. Arrays as in gdn_kernels.cuh.
extern "C" const char* ours_error() { return error.c_str(); }

extern "C" int ours_bytes(const int* sizes, long* saved, long* scratch) {
  return guarded([&] {
    *saved = long(gdn::gated_delta_rule_saved_bytes(device(nullptr), shape_of(sizes)));
    *scratch = long(gdn::gated_delta_rule_scratch_bytes(device(nullptr), shape_of(sizes)));
  });
}

// saved: nullptr where no backward follows
extern "C" int ours_forward(void* stream, const int* sizes, float s, void* o, void* saved, const void* qkv,
                            const float* g, const float* beta, void* scratch) {
  return guarded([&] {
    gdn::gated_delta_rule_forward(device(stream), static_cast<gdn::act*>(o), saved,
                                  static_cast<const gdn::act*>(qkv), g, beta, shape_of(sizes), s, scratch);
  });
}

extern "C" int ours_backward(void* stream, const int* sizes, float s, void* dqkv, float* dg, float* dbeta,
                             const void* d_o, const void* saved, const void* qkv, const float* g,
                             const float* beta, void* scratch) {
  return guarded([&] {
    gdn::gated_delta_rule_backward(device(stream), static_cast<gdn::act*>(dqkv), dg, dbeta,
                                   static_cast<const gdn::act*>(d_o), saved,
                                   static_cast<const gdn::act*>(qkv), g, beta, shape_of(sizes), s, scratch);
  });
}
