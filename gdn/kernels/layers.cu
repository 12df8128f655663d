// The layers of gdn_kernels.cuh but the gated delta rule (delta_rule.cu), compiled as one: a file by itself costs
// nvcc four seconds before it comes to a kernel.
#include "../../gdn_kernels.cuh"

#include "classifier.cuh"
#include "embedding.cuh"
#include "initial_values.cuh"
#include "linear.cuh"
#include "optimizer.cuh"
#include "output_norm.cuh"
#include "rmsnorm.cuh"
#include "short_conv.cuh"
#include "swiglu.cuh"
