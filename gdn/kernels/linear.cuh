// Linear layers: three matrix products through cuBLASLt, bf16 in, fp32 accumulated, 2 M out in FLOP each:
//   y = scale x w^T        dx = scale dy w        dw += scale dy^T x
// TFLOP/s at M = 32768, d = 1024 on an NVIDIA H100 (dev/results/layer_speed/h100_d1024.txt):
//   out x in                 forward    dx    dw
//   4624 x 1024  q k v z a b   707      728   705
//   1024 x 1536  mixer out     686      624   719
//   5632 x 1024  gate up       670      700   681
//   1024 x 2816  down          716      618   641
//   50304 x 1024 logits        662      720   705
#pragma once

#include "common.cuh"

namespace gdn {

enum class Product { kForward, kBackwardInput, kBackwardWeight };

inline cublasLtMatrixLayout_t matrix_layout(cudaDataType_t type, int rows, int columns) {
  cublasLtMatrixLayout_t layout = nullptr;
  cuda_check(cublasLtMatrixLayoutCreate(&layout, type, rows, columns, rows));
  return layout;
}

// cuBLASLt is column-major: to it, a dense row-major array X [r,c] is the matrix X^T with c rows and leading
// dimension c. So each product is asked for transposed, with the factors in the opposite order (M = rows; '
// marks what is given to cuBLASLt, transposed by it where op says so):
//   y  = x w^T     y^T  [out,M]  = (w')^T  x'       w'  is w^T  [in,out], x' is x^T  [in,M]
//   dx = dy w      dx^T [in,M]   = w'      dy'      w'  is w^T  [in,out], dy' is dy^T [out,M]
//   dw = dy^T x    dw^T [in,out] = x'      (dy')^T  x'  is x^T  [in,M],   dy' is dy^T [out,M]
inline MatmulPlan make_matmul_plan(Cuda& dev, Product product, int rows, int out, int in) {
  MatmulPlan plan;
  const cublasOperation_t transpose = CUBLAS_OP_T;
  cuda_check(cublasLtMatmulDescCreate(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  if (product == Product::kForward) {
    cuda_check(cublasLtMatmulDescSetAttribute(plan.product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                              sizeof(transpose)));
    plan.a = matrix_layout(CUDA_R_16BF, in, out);
    plan.b = matrix_layout(CUDA_R_16BF, in, rows);
    plan.d = matrix_layout(CUDA_R_16BF, out, rows);
  } else if (product == Product::kBackwardInput) {
    plan.a = matrix_layout(CUDA_R_16BF, in, out);
    plan.b = matrix_layout(CUDA_R_16BF, out, rows);
    plan.d = matrix_layout(CUDA_R_16BF, in, rows);
  } else {
    cuda_check(cublasLtMatmulDescSetAttribute(plan.product, CUBLASLT_MATMUL_DESC_TRANSB, &transpose,
                                              sizeof(transpose)));
    plan.a = matrix_layout(CUDA_R_16BF, in, rows);
    plan.b = matrix_layout(CUDA_R_16BF, out, rows);
    plan.d = matrix_layout(CUDA_R_32F, in, out);
  }

  cublasLtMatmulPreference_t preference = nullptr;
  cuda_check(cublasLtMatmulPreferenceCreate(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    cuda_check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(Cuda::kWorkspaceBytes));
  // Where the inner dimension is split, its parts go to the workspace in fp32 and a second step adds them in
  // a fixed order. The other schemes add into the output, or round the parts to bf16.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         uint32_t(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  // What every array has. The choice must not depend on where the first caller's arrays happen to lie.
  for (const auto alignment :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    prefer(alignment, uint32_t(16));
  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(dev.cublaslt, plan.product, plan.a, plan.b,
                                                               plan.d, plan.d, preference, 1, &best, &found);
  cuda_check(cublasLtMatmulPreferenceDestroy(preference));
  cuda_check(status);
  if (found == 0)
    throw std::runtime_error("cuBLASLt has no algorithm for a Linear of " + std::to_string(rows) +
                             " rows, out " + std::to_string(out) + ", in " + std::to_string(in));
  plan.algorithm = best.algo;
  return plan;
}

// d = scale * op(a) op(b) + beta * d
inline void matmul(Cuda& dev, Product product, void* d, const act* a, const act* b, int rows, int out, int in,
                   float scale, float beta) {
  if (rows == 0) return;
  require_multiple_of_8(out, "the output width of a Linear");
  require_multiple_of_8(in, "the input width of a Linear");
  const std::tuple<int, int, int, int> key(int(product), rows, out, in);
  auto plan = dev.matmul_plans.find(key);
  if (plan == dev.matmul_plans.end())
    plan = dev.matmul_plans.emplace(key, make_matmul_plan(dev, product, rows, out, in)).first;
  const MatmulPlan& p = plan->second;
  cuda_check(cublasLtMatmul(dev.cublaslt, p.product, &scale, a, p.a, b, p.b, &beta, d, p.d, d, p.d,
                            &p.algorithm, dev.workspace, Cuda::kWorkspaceBytes, dev.stream));
}

void linear_forward(Cuda& dev, act* y, const act* x, const act* w, int rows, int out, int in, float scale) {
  Range<Cuda> range(dev, __func__);
  matmul(dev, Product::kForward, y, w, x, rows, out, in, scale, 0);
}

void linear_backward_input(Cuda& dev, act* dx, const act* dy, const act* w, int rows, int out, int in,
                           float scale) {
  Range<Cuda> range(dev, __func__);
  matmul(dev, Product::kBackwardInput, dx, w, dy, rows, out, in, scale, 0);
}

void linear_backward_weight(Cuda& dev, float* dw, const act* dy, const act* x, int rows, int out, int in,
                            float scale) {
  Range<Cuda> range(dev, __func__);
  matmul(dev, Product::kBackwardWeight, dw, x, dy, rows, out, in, scale, 1);
}

}  // namespace gdn
