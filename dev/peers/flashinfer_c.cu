// FlashInfer's gated delta rule for Hopper (forward only) behind one C function, for peer_flashinfer.py. Its sources come from
// its wheel and are not kept here:
//
//   pip download --no-deps flashinfer-python==0.6.13 && unzip -q flashinfer_python-*.whl -d FI
//   D=FI/flashinfer/data; nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -DFLAT_SM90A_ENABLED -DNDEBUG \
//     -DCUTLASS_ENABLE_GDC_FOR_SM90=1 --expt-relaxed-constexpr --expt-extended-lambda -cudart shared -Xcompiler -fPIC -shared \
//     -I$D/include -I$D/cutlass/include -I$D/cutlass/tools/util/include dev/peers/flashinfer_c.cu -o libgdn_fi_sm90.so
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <exception>

#include "flashinfer/flat/prefill/prefill_kernel_delta_rule_sm90.cuh"

// q, k [n,heads_k,128], v, o [n,heads_v,128] bf16 of `sequences` sequences one after another, alpha (the decay exp(g)) and
// beta [n,heads_v] float32, bounds [sequences+1] int64, state [sequences,heads_v,128,128] float32 (the final states, always
// written), workspace: 128 bytes a multiprocessor. heads_v > heads_k only. 0, or -1 where it refuses.
extern "C" int gdn_fi(void* o, void* state, const void* q, const void* k, const void* v, const void* alpha,
                      const void* beta, const void* bounds, void* workspace, int sequences, int heads_k,
                      int heads_v, int head_dim, long n, float scale, int multiprocessors, void* stream) {
  if (head_dim != 128 || heads_v <= heads_k) return -1;
  try {
    flat::launch_delta_rule_prefill_kernel_gbai<true, true, true, false, false, cutlass::arch::Sm90>(
        static_cast<cudaStream_t>(stream), static_cast<nv_bfloat16*>(o), static_cast<float*>(state),
        static_cast<const nv_bfloat16*>(q), static_cast<const nv_bfloat16*>(k),
        static_cast<const nv_bfloat16*>(v), static_cast<const float*>(nullptr),
        static_cast<const float*>(alpha), static_cast<const float*>(beta),
        static_cast<const int64_t*>(bounds), static_cast<uint8_t*>(workspace), sequences, heads_k, heads_k,
        heads_v, heads_v, head_dim, n, scale, multiprocessors, static_cast<float*>(nullptr),
        static_cast<const int64_t*>(nullptr), 0);
  } catch (const std::exception&) {
    return -1;
  }
  return 0;
}
