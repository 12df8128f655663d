// The gated delta rule of gdn_kernels.cuh.
#include "../../../gdn_kernels.cuh"

#include <algorithm>
#include <type_traits>

#include "delta_rule.cuh"
#include "sm80/gradients.cuh"
#include "sm90/gradients.cuh"
#include "solve.cuh"

namespace gdn {
namespace delta_rule {

constexpr int kRecurrentParts = 8, kRecurrentThreads = 128;
constexpr int kRecurrentColumns = kRecurrentThreads / kRecurrentParts, kRecurrentRows = 256 / kRecurrentParts;

// Sum over the eight lanes that share a column of the state.
__device__ inline float sum_of_parts(float x) {
  x = sum_of_quad(x);
  return x + __shfl_xor_sync(~0u, x, 4);
}

// The recurrence of gdn/cpu_delta_rule.h, token by token; state [B,Hv,dk,dv] fp32 in and out. One CTA: 16
// columns of dv of a value head. Eight lanes share a column of the state, each with every eighth row in
// registers.
//
// Lower bound for one token (B=32, H=6, dk=128, dv=256): the state, read and written, 50 MB. H200: 0.035 ms
// (dev/results/delta_rule_speed).
static __global__ void __launch_bounds__(kRecurrentThreads)
    recurrent_kernel(act* o, float* state, const act* qkv, const float* g, const float* beta, Sizes size,
                     float s) {
  constexpr int kParts = kRecurrentParts, kRows = kRecurrentRows;
  __shared__ float q[kParts * kRows], k[kParts * kRows];
  const int h = blockIdx.y, b = blockIdx.z, hk = size.key_head(h), part = threadIdx.x % kParts;
  const int column = blockIdx.x * kRecurrentColumns + threadIdx.x / kParts;
  const bool active = column < size.dv;
  float* column_state = state + (int64_t(b) * size.heads_v + h) * size.dk * size.dv + column;
  float S[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++)
    S[i] = active && kParts * i + part < size.dk ? column_state[int64_t(kParts * i + part) * size.dv] : 0.f;
  for (int t = 0; t < size.tokens; t++) {
    const int64_t row = int64_t(b) * size.tokens + t, gate = row * size.heads_v + h;
    const act* inputs = qkv + row * size.channels;
    __syncthreads();
    for (int i = threadIdx.x; i < kParts * kRows; i += kRecurrentThreads) {
      q[i] = i < size.dk ? __bfloat162float(inputs[size.q_column(hk) + i]) : 0.f;
      k[i] = i < size.dk ? __bfloat162float(inputs[size.k_column(hk) + i]) : 0.f;
    }
    __syncthreads();
    const float decay = expf(g[gate]), v = active ? __bfloat162float(inputs[size.v_column(h) + column]) : 0.f;
    float predicted = 0.f, out = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      S[i] *= decay;
      predicted += S[i] * k[kParts * i + part];
    }
    const float u = beta[gate] * (v - sum_of_parts(predicted));
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      S[i] += k[kParts * i + part] * u;
      out += S[i] * q[kParts * i + part];
    }
    out = s * sum_of_parts(out);
    if (active && part == 0) o[gate * size.dv + column] = __float2bfloat16_rn(out);
  }
#pragma unroll
  for (int i = 0; i < kRows; i++)
    if (active && kParts * i + part < size.dk) column_state[int64_t(kParts * i + part) * size.dv] = S[i];
}

void prepare(Cuda& device, const act* qkv, const float* g, const float* beta, const MixerShape& shape,
             float s, const Prepared& to) {
  const bool warpgroup = has_wgmma();
  const int dk = shape.head_dim_k,
            bytes = warpgroup ? prepare_shared_bytes<true>(dk) : prepare_shared_bytes<false>(dk);
  const auto kernel = warpgroup ? prepare_sm90_kernel : prepare_kernel;
  allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
  const dim3 grid(shape.chunks(), shape.heads_v, shape.batch);
  kernel<<<grid, kPrepareThreads, bytes, device.stream>>>(to.matrices, to.gates, qkv, g, beta, sizes(shape),
                                                          s);
  launched("prepare_kernel");
}

template <int PW, bool kCompact>
void launch_gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const GradientInputs& in,
                      const MixerShape& shape, float s, const GradientPlan& plan) {
  allow_shared_bytes(device, gradients_kernel<PW, kCompact>, plan.bytes, "the gated delta rule");
  const int work_tiles = shape.chunks() * shape.heads_k * shape.batch;
  const int grid = std::min(work_tiles, plan.ctas * device.sm_count);
  gradients_kernel<PW, kCompact><<<grid, gradient_threads(PW), plan.bytes, device.stream>>>(
      dqkv, dg, dbeta, in, sizes(shape), work_tiles, plan.buffers, s);
  launched("gradients_kernel");
}

// TMA descriptor of a tensor of 16-bit elements: sizes, columns first; strides, in elements, of all
// dimensions but the columns. Boxes have 64 columns and 64 in dimension `rows`, 128-byte swizzle.
template <int kRank>
CUtensorMap tensor_map(const void* at, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                       int rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                &found));
#else
    cuda_check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "the CUDA driver has no cuTensorMapEncodeTiled; expected a driver of 12.0 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t size[kRank], stride[kRank - 1];
  cuuint32_t box[kRank], step[kRank];
  for (int i = 0; i < kRank; i++) {
    size[i] = sizes[i];
    box[i] = i == 0 || i == rows ? 64 : 1;
    step[i] = 1;
  }
  for (int i = 0; i < kRank - 1; i++) stride[i] = strides[i] * sizeof(__half);
  CUtensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank, const_cast<void*>(at), size,
                                 stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(status)) +
                             " for a tensor of " + std::to_string(sizes[0]) + " columns");
  return map;
}

// True if gradients_sm90_kernel supports these head sizes.
inline bool has_sm90_gradients(const MixerShape& shape) {
  const int widest = shape.heads_v > shape.heads_k ? 128 : 256;
  return shape.head_dim_k <= widest && shape.head_dim_v % 64 == 0;
}

template <int kTiles, bool kGrouped>
void launch_sm90_gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const GradientInputs& in,
                           const MixerShape& shape, const Sizes& size, float s) {
  const int64_t dk = shape.head_dim_k, dv = shape.head_dim_v, T = shape.tokens, B = shape.batch;
  const int64_t C = shape.conv_channels(), values = shape.value_dim();
  const auto keys = [&](const act* at) {
    return tensor_map<4>(at, {dk, 2 * shape.heads_k, T, B}, {dk, C, T * C}, 2);
  };
  const auto value_tensor = [&](const void* at) {
    return tensor_map<4>(at, {dv, shape.heads_v, T, B}, {dv, values, T * values}, 2);
  };
  const auto states = [&](const __half* at) {
    return tensor_map<3>(at, {dk, dv, B * shape.heads_v * shape.chunks()}, {dk, dk * dv}, 1);
  };
  const GradientTensors tensors = {keys(in.qkv),
                                   keys(dqkv),
                                   value_tensor(in.d_o),
                                   value_tensor(in.saved.E),
                                   value_tensor(in.adjoints.x),
                                   states(in.saved.states),
                                   states(in.adjoints.d_states)};
  const GateInputs gates = {in.gates, in.saved.exponents, in.adjoints.exponents};
  constexpr int bytes = GradientLayout<kTiles, kGrouped>::kBytes;
  const auto kernel = gradients_sm90_kernel<kTiles, kGrouped>;
  allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
  const int work_tiles = shape.chunks() * shape.heads_k * shape.batch;
  kernel<<<std::min(work_tiles, device.sm_count), kGradientThreads, bytes, device.stream>>>(
      tensors, dg, dbeta, gates, size, work_tiles, s);
  launched("gradients_sm90_kernel");
}

void gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o, const Saved& saved,
               const act* qkv, const MixerShape& shape, float s, const float* gates, void* scratch) {
  const GradientInputs in = {qkv, d_o, saved, adjoints_at(scratch, shape), gates};
  const int dk = shape.head_dim_k;
  if (has_wgmma() && has_sm90_gradients(shape)) {
    const auto launch = [&](auto tiles, auto grouped) {
      launch_sm90_gradients<decltype(tiles)::value, decltype(grouped)::value>(device, dqkv, dg, dbeta, in,
                                                                              shape, sizes(shape), s);
    };
    const auto with_group = [&](auto tiles) {
      if (shape.heads_v > shape.heads_k) return launch(tiles, std::true_type());
      launch(tiles, std::false_type());
    };
    if (dk <= 64) return with_group(std::integral_constant<int, 1>());
    if (dk <= 128) return with_group(std::integral_constant<int, 2>());
    return launch(std::integral_constant<int, 4>(), std::false_type());
  }
  const GradientPlan plan = gradient_plan(shape, device.shared_bytes);
  if (plan.compact) {
    if (has_wgmma()) throw std::runtime_error("GDN_SHARED_BYTES: code for sm_90a has no kernels for less");
    return launch_gradients<kCompactColumns, true>(device, dqkv, dg, dbeta, in, shape, s, plan);
  }
  if (plan.columns == 32) return launch_gradients<32, false>(device, dqkv, dg, dbeta, in, shape, s, plan);
  if (plan.columns == 64) return launch_gradients<64, false>(device, dqkv, dg, dbeta, in, shape, s, plan);
  if (plan.columns == 96) return launch_gradients<96, false>(device, dqkv, dg, dbeta, in, shape, s, plan);
  launch_gradients<128, false>(device, dqkv, dg, dbeta, in, shape, s, plan);
}

}  // namespace delta_rule

// Layout of `saved`: states at the chunks' starts [B,Hv,chunks,dv,dk] and E [B,T,Hv,dv], fp16, and their
// exponents [B,Hv,chunks,dv/16]; N and P [B,Hv,chunks,2,64,64], fp16, and gates.
size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape& shape) { return delta_rule::saved_bytes(shape); }

size_t gated_delta_rule_scratch_bytes(Cuda& device, const MixerShape& shape) {
  return delta_rule::scratch_before_splits(shape) + delta_rule::transitions_bytes(device, shape) +
         delta_rule::boundary_states_bytes(device, shape);
}

// o [B,T,Hv,dv] from S_0 = 0. saved may be null when no backward follows.
void gated_delta_rule_forward(Cuda& device, act* o, void* saved, const act* qkv, const float* g,
                              const float* beta, const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const delta_rule::Prepared prepared = delta_rule::prepared_at(saved, scratch, shape);
  const delta_rule::Splits splits = delta_rule::splits_at(device, scratch, shape);
  delta_rule::prepare(device, qkv, g, beta, shape, s, prepared);
  if (splits.count > 1) {
    delta_rule::forward_states(device, qkv, shape, prepared, splits, true);
    delta_rule::merge_splits(device, shape, splits, false);
  }
  delta_rule::forward_pass(device, o, delta_rule::saved_at(saved, shape), qkv, shape, s, prepared, splits);
}

// dqkv [B,T,C], dg, dbeta [B,T,Hv] from d_o [B,T,Hv,dv] and what the forward saved.
void gated_delta_rule_backward(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o,
                               const void* saved, const act* qkv, const float* /*g*/, const float* /*beta*/,
                               const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const delta_rule::Saved forward = delta_rule::saved_at(const_cast<void*>(saved), shape);
  const delta_rule::Prepared prepared = delta_rule::prepared_at(const_cast<void*>(saved), nullptr, shape);
  const delta_rule::Splits splits = delta_rule::splits_at(device, scratch, shape);
  if (splits.count > 1) {  // transitions again: kept, they would take memory in every layer of every model
    delta_rule::forward_states(device, qkv, shape, prepared, splits, false);
    delta_rule::backward_states(device, d_o, qkv, shape, s, prepared, splits);
    delta_rule::merge_splits(device, shape, splits, true);
  }
  delta_rule::backward_pass(device, dqkv, d_o, qkv, shape, s, prepared, splits, scratch);
  delta_rule::gradients(device, dqkv, dg, dbeta, d_o, forward, qkv, shape, s, prepared.gates, scratch);
}

// Token by token from and into state [B,Hv,dk,dv] fp32.
void gated_delta_rule_recurrent(Cuda& device, act* o, float* state, const act* qkv, const float* g,
                                const float* beta, const MixerShape& shape, float s) {
  Range<Cuda> range(device, __func__);
  const delta_rule::Sizes size = delta_rule::sizes(shape);
  if (shape.rows() == 0) return;
  const dim3 grid((shape.head_dim_v + delta_rule::kRecurrentColumns - 1) / delta_rule::kRecurrentColumns,
                  shape.heads_v, shape.batch);
  delta_rule::recurrent_kernel<<<grid, delta_rule::kRecurrentThreads, 0, device.stream>>>(o, state, qkv, g,
                                                                                          beta, size, s);
  launched("recurrent_kernel");
}

}  // namespace gdn
