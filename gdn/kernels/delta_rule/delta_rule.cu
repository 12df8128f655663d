// The gated delta rule of gdn_kernels.cuh.
#include "../../../gdn_kernels.cuh"
#include "../../library_cuda.h"

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
    recurrent_kernel(act* o, float* state, Qkv<const act> in, const float* g, const float* beta, Sizes size,
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
    const act *q_row = in.q.head(hk) + row * in.q.row_stride, *k_row = in.k.head(hk) + row * in.k.row_stride;
    const act* v_row = in.v.head(h) + row * in.v.row_stride;
    __syncthreads();
    for (int i = threadIdx.x; i < kParts * kRows; i += kRecurrentThreads) {
      q[i] = i < size.dk ? __bfloat162float(q_row[i]) : 0.f;
      k[i] = i < size.dk ? __bfloat162float(k_row[i]) : 0.f;
    }
    __syncthreads();
    const float decay = expf(g[gate]), v = active ? __bfloat162float(v_row[column]) : 0.f;
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

void prepare(Cuda& device, const DeltaRulePlan& plan, const PrepareInputs& in) {
  const int dk = plan.size.dk,
            bytes = plan.wgmma ? prepare_shared_bytes<true>(dk) : prepare_shared_bytes<false>(dk);
  const auto kernel = plan.wgmma ? prepare_sm90_kernel : prepare_kernel;
  allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
  const dim3 grid(plan.size.chunks, plan.size.heads_v, plan.shape.batch);
  kernel<<<grid, kPrepareThreads, bytes, device.stream>>>(plan.prepared, in, plan.size, plan.s);
  launched("prepare_kernel");
}

// Work tiles of the gradients kernels.
inline int work_tiles(const DeltaRulePlan& plan) {
  return plan.size.chunks * plan.size.heads_k * plan.shape.batch;
}

template <int PW, bool kCompact>
void launch_gradients(Cuda& device, const DeltaRulePlan& plan, const GradientOutputs& out,
                      const GradientInputs& in) {
  const GradientPlan& schedule = plan.gradients;
  const int tiles = work_tiles(plan);
  allow_shared_bytes(device, gradients_kernel<PW, kCompact>, schedule.bytes, "the gated delta rule");
  gradients_kernel<PW, kCompact>
      <<<std::min(tiles, schedule.ctas * device.sm_count), gradient_threads(PW), schedule.bytes,
         device.stream>>>(out, in, plan.size, tiles, schedule.buffers, plan.s);
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
void launch_sm90_gradients(Cuda& device, const DeltaRulePlan& plan, const GradientOutputs& out,
                           const GradientInputs& in) {
  const int64_t dk = plan.size.dk, dv = plan.size.dv, T = plan.size.tokens, B = plan.shape.batch;
  const auto heads = [&](const auto& x, int64_t columns, int64_t count) {
    return tensor_map<4>(x.at, {columns, count, T, B}, {x.head_stride, x.row_stride, T * x.row_stride}, 2);
  };
  const auto keys = [&](const auto& x) { return heads(x, dk, plan.size.heads_k); };
  const auto values = [&](const auto& x) { return heads(x, dv, plan.size.heads_v); };
  const auto states = [&](const __half* at) {
    return tensor_map<3>(at, {dk, dv, B * plan.size.heads_v * plan.size.chunks}, {dk, dk * dv}, 1);
  };
  const GradientTensors tensors = {keys(in.q),
                                   keys(in.k),
                                   keys(out.dq),
                                   keys(out.dk),
                                   values(in.d_o),
                                   values(dense_values(in.saved.E, plan.shape)),
                                   values(dense_values(in.adjoints.x, plan.shape)),
                                   states(in.saved.states),
                                   states(in.adjoints.d_states)};
  const GateInputs gates = {in.gates, in.saved.exponents, in.adjoints.exponents};
  constexpr int bytes = GradientLayout<kTiles, kGrouped>::kBytes;
  const auto kernel = gradients_sm90_kernel<kTiles, kGrouped>;
  allow_shared_bytes(device, kernel, bytes, "the gated delta rule");
  const int tiles = work_tiles(plan);
  kernel<<<std::min(tiles, device.sm_count), kGradientThreads, bytes, device.stream>>>(
      tensors, out.dg, out.dbeta, gates, plan.size, tiles, plan.s);
  launched("gradients_sm90_kernel");
}

void gradients(Cuda& device, const DeltaRulePlan& plan, const GradientOutputs& out,
               const GradientInputs& in) {
  const int dk = plan.size.dk;
  const bool grouped = plan.size.value_heads_per_key > 1;
  if (plan.wgmma && has_sm90_gradients(plan.shape)) {
    const auto launch = grouped ? (dk <= 64 ? launch_sm90_gradients<1, true> : launch_sm90_gradients<2, true>)
                        : dk <= 64  ? launch_sm90_gradients<1, false>
                        : dk <= 128 ? launch_sm90_gradients<2, false>
                                    : launch_sm90_gradients<4, false>;
    return launch(device, plan, out, in);
  }
  const GradientPlan& schedule = plan.gradients;
  if (schedule.compact && plan.wgmma)
    throw std::runtime_error("GDN_SHARED_BYTES: code for sm_90a has no kernels for less shared memory");
  const auto launch = schedule.compact         ? launch_gradients<kCompactColumns, true>
                      : schedule.columns == 32 ? launch_gradients<32, false>
                      : schedule.columns == 64 ? launch_gradients<64, false>
                      : schedule.columns == 96 ? launch_gradients<96, false>
                                               : launch_gradients<128, false>;
  launch(device, plan, out, in);
}

}  // namespace delta_rule

// Layout of `saved`: states at the chunks' starts [B,Hv,chunks,dv,dk] and E [B,T,Hv,dv], fp16, and their
// exponents [B,Hv,chunks,dv/16]; N and P [B,Hv,chunks,2,64,64], fp16, and gates.
size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape& shape) { return delta_rule::saved_bytes(shape); }

size_t gated_delta_rule_scratch_bytes(Cuda& device, const MixerShape& shape) {
  return delta_rule::scratch_before_splits(shape) + delta_rule::transitions_bytes(device, shape) +
         delta_rule::boundary_states_bytes(device, shape);
}

namespace delta_rule {
namespace {

template <class T>
HeadRows<T> head_rows(const CudaRows& x) {
  return {static_cast<T*>(x.data), x.row, x.head};
}

Qkv<const act> inputs_of(const CudaDeltaRule& x) {
  return {head_rows<const act>(x.q), head_rows<const act>(x.k), head_rows<const act>(x.v)};
}

// A pass that begins with a given state is not split: the splits' states are merged from zero.
Splits splits_of(const Cuda& device, const CudaDeltaRule& x, const float* begin) {
  return begin ? Splits{1, x.shape.chunks(), nullptr, nullptr} : splits_at(device, x.scratch, x.shape);
}

CudaDeltaRule of_packed_rows(const act* qkv, act* dqkv, const act* o, const float* g, const float* beta,
                             const MixerShape& shape, float s, void* saved, void* scratch) {
  const int C = shape.conv_channels(), dk = shape.head_dim_k, dv = shape.head_dim_v, keys = shape.key_dim();
  const auto rows = [&](const act* at, int offset, int head) {
    return CudaRows{at ? const_cast<act*>(at) + offset : nullptr, C, head};
  };
  CudaDeltaRule x;
  x.shape = shape, x.s = s;
  x.q = rows(qkv, 0, dk), x.k = rows(qkv, keys, dk), x.v = rows(qkv, 2 * keys, dv);
  x.dq = rows(dqkv, 0, dk), x.dk = rows(dqkv, keys, dk), x.dv = rows(dqkv, 2 * keys, dv);
  x.o = {const_cast<act*>(o), shape.value_dim(), dv};
  x.g = g, x.beta = beta;
  x.saved = saved, x.scratch = scratch;
  return x;
}

}  // namespace
}  // namespace delta_rule

void delta_rule_forward(Cuda& device, const CudaDeltaRule& x) {
  using namespace delta_rule;
  sizes(x.shape);
  if (x.shape.rows() == 0) return;
  const DeltaRulePlan plan = make_plan(device, x.shape, x.s, prepared_at(x.saved, x.scratch, x.shape),
                                       splits_of(device, x, x.initial_state));
  const Qkv<const act> qkv = inputs_of(x);
  prepare(device, plan, {qkv.q, qkv.k, x.g, x.beta});
  if (plan.splits.count > 1) {
    forward_states(device, plan, qkv, true);
    merge_splits(device, plan, false);
  }
  forward_pass(device, plan, head_rows<act>(x.o), saved_at(x.saved, x.shape), qkv,
               {x.initial_state, x.final_state});
}

void delta_rule_backward(Cuda& device, const CudaDeltaRule& x) {
  using namespace delta_rule;
  sizes(x.shape);
  if (x.shape.rows() == 0) return;
  const DeltaRulePlan plan = make_plan(device, x.shape, x.s, prepared_at(x.saved, nullptr, x.shape),
                                       splits_of(device, x, x.d_final_state));
  const Qkv<const act> qkv = inputs_of(x);
  const HeadRows<const act> output_gradient = head_rows<const act>(x.o);
  const Adjoints adjoints = adjoints_at(x.scratch, x.shape);
  if (plan.splits.count >
      1) {  // transitions again: kept, they would take memory in every layer of every model
    forward_states(device, plan, qkv, false);
    backward_states(device, plan, qkv, output_gradient);
    merge_splits(device, plan, true);
  }
  backward_pass(device, plan, head_rows<act>(x.dv), adjoints, qkv, output_gradient,
                {x.d_final_state, x.d_initial_state});
  gradients(device, plan, {head_rows<act>(x.dq), head_rows<act>(x.dk), x.dg, x.dbeta},
            {qkv.q, qkv.k, output_gradient, saved_at(x.saved, x.shape), adjoints, plan.prepared.gates});
}

void delta_rule_recurrent(Cuda& device, const CudaDeltaRule& x, float* state) {
  using namespace delta_rule;
  const Sizes size = sizes(x.shape);
  if (x.shape.rows() == 0) return;
  const dim3 grid(divide_up(size.dv, kRecurrentColumns), size.heads_v, x.shape.batch);
  recurrent_kernel<<<grid, kRecurrentThreads, 0, device.stream>>>(static_cast<act*>(x.o.data), state,
                                                                  inputs_of(x), x.g, x.beta, size, x.s);
  launched("recurrent_kernel");
}

// o [B,T,Hv,dv] from S_0 = 0. saved may be null when no backward follows.
void gated_delta_rule_forward(Cuda& device, act* o, void* saved, const act* packed, const float* g,
                              const float* beta, const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  delta_rule_forward(device,
                     delta_rule::of_packed_rows(packed, nullptr, o, g, beta, shape, s, saved, scratch));
}

// dqkv [B,T,C], dg, dbeta [B,T,Hv] from d_o [B,T,Hv,dv] and what the forward saved.
void gated_delta_rule_backward(Cuda& device, act* dqkv, float* dg, float* dbeta, const act* d_o,
                               const void* saved, const act* packed, const float* g, const float* beta,
                               const MixerShape& shape, float s, void* scratch) {
  Range<Cuda> range(device, __func__);
  CudaDeltaRule x =
      delta_rule::of_packed_rows(packed, dqkv, d_o, g, beta, shape, s, const_cast<void*>(saved), scratch);
  x.dg = dg, x.dbeta = dbeta;
  delta_rule_backward(device, x);
}

// Token by token from and into state [B,Hv,dk,dv] fp32.
void gated_delta_rule_recurrent(Cuda& device, act* o, float* state, const act* packed, const float* g,
                                const float* beta, const MixerShape& shape, float s) {
  Range<Cuda> range(device, __func__);
  delta_rule_recurrent(
      device, delta_rule::of_packed_rows(packed, nullptr, o, g, beta, shape, s, nullptr, nullptr), state);
}

}  // namespace gdn
