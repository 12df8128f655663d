// The gated delta rule of gdn_kernels.cuh.
#include "../../gdn_kernels.cuh"

#include "delta_rule.cuh"

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
// (dev/results/2026-11-29_h200_third).
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
  allow_shared_bytes(kernel, bytes, "the gated delta rule");
  const dim3 grid(shape.chunks(), shape.heads_v, shape.batch);
  kernel<<<grid, kPrepareThreads, bytes, device.stream>>>(to.matrices, to.gates, qkv, g, beta, sizes(shape),
                                                          s);
  launched("prepare_kernel");
}

// The most stages and copies of q and k that fit in `limit` bytes of shared memory; {0, 0} if none do. A
// third stage would reach two work tiles ahead where a tile is one step, and there are q and k of two.
inline GradientBuffers gradient_buffers(const MixerShape& shape, int PW, int limit) {
  const int group = shape.heads_v / shape.heads_k, dk = shape.head_dim_k;
  const int steps = group * ((dk + PW - 1) / PW) * ((shape.head_dim_v + kStep - 1) / kStep);
  for (const GradientBuffers buffers :
       {GradientBuffers{3, 2}, GradientBuffers{3, 1}, GradientBuffers{2, 2}, GradientBuffers{2, 1}})
    if (gradient_shared_bytes(dk, PW, group > 1, buffers) <= limit && (steps > 1 || buffers.stages == 2))
      return buffers;
  return {0, 0};
}

// Shared memory of each of `blocks` CTAs that share an SM, which reserves 1 KiB for each.
inline int shared_bytes_share(int blocks) { return (shared_bytes_limit() + 1024) / blocks - 1024; }

template <int PW>
void launch_gradients(Cuda& device, act* dqkv, float* dg, float* dbeta, const GradientInputs& in,
                      const MixerShape& shape, float s) {
  int blocks = gradient_blocks(PW);
  GradientBuffers buffers = gradient_buffers(shape, PW, shared_bytes_share(blocks));
  if (buffers.stages == 0) {
    blocks = 1;
    buffers = gradient_buffers(shape, PW, shared_bytes_limit());
  }
  const int bytes = gradient_shared_bytes(shape.head_dim_k, PW, shape.heads_v > shape.heads_k, buffers);
  allow_shared_bytes(gradients_kernel<PW>, bytes, "the gated delta rule");
  const int work_tiles = shape.chunks() * shape.heads_k * shape.batch;
  const int grid = std::min(work_tiles, blocks * device.sm_count);
  gradients_kernel<PW><<<grid, gradient_threads(PW), bytes, device.stream>>>(
      dqkv, dg, dbeta, in, sizes(shape), work_tiles, buffers, s);
  launched("gradients_kernel");
}

// Slices of dk as wide as shared memory allows.
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
  const auto fits = [&](int PW) { return gradient_buffers(shape, PW, shared_bytes_limit()).stages > 0; };
  if (dk <= 32) return launch_gradients<32>(device, dqkv, dg, dbeta, in, shape, s);
  if (dk <= 64 || !fits(96)) return launch_gradients<64>(device, dqkv, dg, dbeta, in, shape, s);
  if (dk <= 96 || (dk > 128 && dk <= 192) || !fits(128))
    return launch_gradients<96>(device, dqkv, dg, dbeta, in, shape, s);
  launch_gradients<128>(device, dqkv, dg, dbeta, in, shape, s);
}

}  // namespace delta_rule

// Layout of `saved`: states at the chunks' starts [B,Hv,chunks,dv,dk] and E [B,T,Hv,dv], fp16, and their
// exponents [B,Hv,chunks,dv/16]; N and P [B,Hv,chunks,2,64,64], fp16, and gates.
size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape& shape) {
  return delta_rule::saved_bytes(shape);
}

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
                                      const void* saved, const act* qkv, const float* /*g*/,
                                      const float* /*beta*/, const MixerShape& shape, float s,
                                      void* scratch) {
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
