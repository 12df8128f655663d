// The GPU's delta rule on tensors of their own, from and to states: what gdn/library.cpp calls, and what the
// layer of gdn_kernels.cuh is on packed rows.
#pragma once

#include "../gdn_kernels.cuh"

namespace gdn {

// bf16 [B,T,heads,columns] in GPU memory: strides in elements from row b T + t to the next and from head to
// head, multiples of 8, as is the beginning; columns side by side.
struct CudaRows {
  void* data = nullptr;
  int row = 0, head = 0;
};

// One call. States are fp32 [B,Hv,dv,dk], null where there are none; g, beta, dg, dbeta [B,T,Hv] float,
// dense.
struct CudaDeltaRule {
  MixerShape shape;
  float s = 1;
  CudaRows q, k, v;
  const float *g = nullptr, *beta = nullptr;
  CudaRows o;  // in the backward its gradient
  const float* initial_state = nullptr;
  float* final_state = nullptr;
  const float* d_final_state = nullptr;
  float* d_initial_state = nullptr;
  CudaRows dq, dk, dv;
  float *dg = nullptr, *dbeta = nullptr;
  // gated_delta_rule_saved_bytes and gated_delta_rule_scratch_bytes
  void *saved = nullptr, *scratch = nullptr;
};

void delta_rule_forward(Cuda&, const CudaDeltaRule&);
void delta_rule_backward(Cuda&, const CudaDeltaRule&);
// Token by token; state [B,Hv,dk,dv] is read and updated, o is dense.
void delta_rule_recurrent(Cuda&, const CudaDeltaRule&, float* state);

}  // namespace gdn
