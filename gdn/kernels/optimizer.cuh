// The optimizer: norm of all gradients, each tensor's with its weight (ParameterSpan, gdn/shapes.h), AdamW,
// SGD with Nesterov momentum, and the rounding of master weights.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gdn {

constexpr int kNormThreads = 256, kNormLoads = 4;  // 16-byte loads of a thread in flight
constexpr int kNormPiece = 4 * kNormLoads * kNormThreads;
constexpr int kUpdateThreads = 256, kUpdateBlocks = 4;  // blocks of a multiprocessor
constexpr int kUpdatePiece = 4 * 4 * kUpdateThreads;    // numbers of the arena a block takes at a time

// The first span at or after `from` that ends after number `at` of the arena; `count` when there is none.
__device__ inline int find_span(const ParameterSpan* spans, int from, int count, size_t at) {
  while (from < count) {
    const int middle = (from + count) / 2;
    if (spans[middle].offset + spans[middle].size > at)
      count = middle;
    else
      from = middle + 1;
  }
  return from;
}

// ---- norm -------------------------------------------------------------------------------------------------

__device__ inline double squared(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

// sums [blocks] = weighted sum of squares of each block's share of the arena. Blocks take pieces of it in
// turn, nearly all of them inside one tensor. Floor for the 171.2M parameters at d = 1024: 685 MB, 0.2279 ms
// at the copy rate. Reached, with the sum of the sums: 0.2265 ms (nothing is written, and reads alone are
// faster than a copy).
static __global__ void __launch_bounds__(kNormThreads)
    sum_of_squares_kernel(double* __restrict__ sums, const float* __restrict__ gradients,
                          const ParameterSpan* __restrict__ spans, int count) {
  __shared__ double shared[kNormThreads / 32];
  const size_t arena_end = count ? spans[count - 1].offset + spans[count - 1].size : 0;
  double sum = 0;
  int first = 0;
  for (size_t begin = size_t(blockIdx.x) * kNormPiece; begin < arena_end;
       begin += size_t(gridDim.x) * kNormPiece) {
    const size_t piece_end = begin + kNormPiece;
    if (spans[first].offset + spans[first].size <= begin) first = find_span(spans, first, count, begin);
    const ParameterSpan span = spans[first];
    if (span.offset <= begin && piece_end <= span.offset + span.size) {
      const float4* vectors = reinterpret_cast<const float4*>(gradients + begin) + threadIdx.x;
      float4 x[kNormLoads];
#pragma unroll
      for (int i = 0; i < kNormLoads; i++) x[i] = vectors[i * kNormThreads];
      double squares = 0;
#pragma unroll
      for (int i = 0; i < kNormLoads; i++) squares += squared(x[i]);
      sum += span.norm_weight * squares;
      continue;
    }
    for (int s = first; s < count && spans[s].offset < piece_end; s++) {
      const size_t end = min(spans[s].offset + spans[s].size, piece_end);
      for (size_t i = max(spans[s].offset, begin) + threadIdx.x; i < end; i += kNormThreads)
        sum += spans[s].norm_weight * (double(gradients[i]) * gradients[i]);
    }
  }
  sum = block_sum<kNormThreads / 32>(sum, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// norm = the square root of the sum of sums [count], in an order that depends on count alone. One block, some
// 1000 numbers: a launch's time, which is within the one given above.
static __global__ void __launch_bounds__(kNormThreads)
    norm_of_sums_kernel(float* __restrict__ norm, const double* __restrict__ sums, int count) {
  __shared__ double shared[kNormThreads / 32];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kNormThreads) sum += sums[i];
  sum = block_sum<kNormThreads / 32>(sum, shared);
  if (threadIdx.x == 0) *norm = float(sqrt(sum));
}

inline int global_norm_blocks(const Cuda& dev, size_t n) {
  return int(std::min(divide_up(n, size_t(kNormPiece)), size_t(8 * dev.sm_count))) + (n == 0);
}

size_t global_norm_scratch_bytes(Cuda& dev, size_t n) {
  return global_norm_blocks(dev, n) * sizeof(double);
}

void global_norm(Cuda& dev, float* norm, const float* gradients, size_t n, const ParameterSpan* spans,
                        int count, void* scratch) {
  Range<Cuda> range(dev, __func__);
  const int blocks = global_norm_blocks(dev, n);
  double* sums = static_cast<double*>(scratch);
  sum_of_squares_kernel<<<blocks, kNormThreads, 0, dev.stream>>>(sums, gradients, spans, count);
  launched("sum_of_squares");
  norm_of_sums_kernel<<<1, kNormThreads, 0, dev.stream>>>(norm, sums, blocks);
  launched("norm_of_sums");
}

// One number read, one written where the loss is not finite: a launch's time.
static __global__ void check_loss_kernel(float* norm, const double* loss) {
  if (!isfinite(*loss)) *norm = NAN;
}

void check_loss(Cuda& dev, float* norm, const double* loss) {
  Range<Cuda> range(dev, __func__);
  check_loss_kernel<<<1, 1, 0, dev.stream>>>(norm, loss);
  launched("check_loss");
}

// ---- update rules: one number's step ----------------------------------------------------------------------

struct AdamwRule {
  using Step = AdamwStep;
  static constexpr bool kSecondMoment = true;
  float learning_rate, beta1, beta2, epsilon, clip, correction1, correction2;

  __device__ static AdamwRule of(const AdamwStep& s) {
    return {s.learning_rate, s.beta1, s.beta2, s.epsilon, s.clip, float(s.correction1), float(s.correction2)};
  }

  __device__ void operator()(float& p, float& m, float& v, float gradient, float factor,
                             const ParameterSpan& s) const {
    const float lr = learning_rate * s.learning_rate_scale, decay = 1 - lr * s.weight_decay;
    const float g = factor * gradient;
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    p = decay * p - lr * (m / correction1) / (sqrtf(v / correction2) + epsilon);
  }
};

struct SgdRule {
  using Step = SgdStep;
  static constexpr bool kSecondMoment = false;
  float learning_rate, momentum, clip;

  __device__ static SgdRule of(const SgdStep& s) { return {s.learning_rate, s.momentum, s.clip}; }

  __device__ void operator()(float& p, float& m, float&, float gradient, float factor,
                             const ParameterSpan& s) const {
    const float lr = learning_rate * s.learning_rate_scale;
    const float g = factor * gradient + s.weight_decay * p;
    m = momentum * m + g;
    p -= lr * (g + momentum * m);
  }
};

// All tensors in one launch: blocks take pieces of the arena in turn and look up the spans that lie in them.
// A thread takes four numbers at a time, one by one where a span ends within the four.
// Floor for 171.2M parameters (d = 1024): AdamW 5.14 GB (16 bytes in, 14 out for each), 1.709 ms at the copy
// rate; SGD 3.77 GB, 1.253 ms. Reached: AdamW 1.827 ms, 94%; SGD 1.327 ms, 94%.
template <class Rule>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateBlocks)
    update_kernel(float* __restrict__ master, act* __restrict__ weights, float* __restrict__ moment1,
                  float* __restrict__ moment2, const float* __restrict__ gradients,
                  const ParameterSpan* __restrict__ spans, int count, const float* __restrict__ norm,
                  const typename Rule::Step* __restrict__ step) {
  const float length = *norm;
  if (!isfinite(length)) return;
  const Rule rule = Rule::of(*step);
  const float factor = rule.clip > 0 && length > rule.clip ? rule.clip / length : 1.0f;
  const size_t arena_end = spans[count - 1].offset + spans[count - 1].size;
  int first = 0;
  for (size_t begin = size_t(blockIdx.x) * kUpdatePiece; begin < arena_end;
       begin += size_t(gridDim.x) * kUpdatePiece) {
    first = find_span(spans, first, count, begin);
    for (int s = first; s < count && spans[s].offset < begin + kUpdatePiece; s++) {
      const ParameterSpan span = spans[s];
      const size_t span_end = span.offset + span.size, end = min(span_end, begin + kUpdatePiece);
      for (size_t i = begin + threadIdx.x * 4; i < end; i += 4 * kUpdateThreads) {
        if (i < span.offset) continue;
        if (i + 4 > span_end) {
          for (size_t j = i; j < span_end; j++) {
            float unused = 0;
            rule(master[j], moment1[j], Rule::kSecondMoment ? moment2[j] : unused, gradients[j], factor,
                 span);
            weights[j] = __float2bfloat16_rn(master[j]);
          }
          continue;
        }
        const float4 g = *reinterpret_cast<const float4*>(gradients + i);
        float4 p = *reinterpret_cast<const float4*>(master + i);
        float4 m = *reinterpret_cast<const float4*>(moment1 + i), v = make_float4(0, 0, 0, 0);
        if constexpr (Rule::kSecondMoment) v = *reinterpret_cast<const float4*>(moment2 + i);
        rule(p.x, m.x, v.x, g.x, factor, span);
        rule(p.y, m.y, v.y, g.y, factor, span);
        rule(p.z, m.z, v.z, g.z, factor, span);
        rule(p.w, m.w, v.w, g.w, factor, span);
        *reinterpret_cast<float4*>(master + i) = p;
        *reinterpret_cast<float4*>(moment1 + i) = m;
        if constexpr (Rule::kSecondMoment) *reinterpret_cast<float4*>(moment2 + i) = v;
        *reinterpret_cast<uint2*>(weights + i) = make_uint2(pack2(p.x, p.y), pack2(p.z, p.w));
      }
    }
  }
}

void adamw_update(Cuda& dev, float* master, act* weights, float* moment1, float* moment2,
                         const float* gradients, const ParameterSpan* spans, int count, const float* norm,
                         const AdamwStep* step) {
  Range<Cuda> range(dev, __func__);
  if (count == 0) return;
  update_kernel<AdamwRule><<<kUpdateBlocks * dev.sm_count, kUpdateThreads, 0, dev.stream>>>(
      master, weights, moment1, moment2, gradients, spans, count, norm, step);
  launched("adamw_update");
}

void sgd_update(Cuda& dev, float* master, act* weights, float* moment, const float* gradients,
                       const ParameterSpan* spans, int count, const float* norm, const SgdStep* step) {
  Range<Cuda> range(dev, __func__);
  if (count == 0) return;
  update_kernel<SgdRule><<<kUpdateBlocks * dev.sm_count, kUpdateThreads, 0, dev.stream>>>(
      master, weights, moment, nullptr, gradients, spans, count, norm, step);
  launched("sgd_update");
}

// ---- rounding ---------------------------------------------------------------------------------------------

// Four numbers a thread.
// Floor for the 171.2M parameters at d = 1024: 1.03 GB, 0.3418 ms at the copy rate. Reached: 0.3353 ms
// (two thirds of the bytes are reads, which are faster than a copy).
static __global__ void __launch_bounds__(kUpdateThreads)
    round_weights_kernel(act* __restrict__ weights, const float* __restrict__ master, size_t n) {
  const size_t i = (size_t(blockIdx.x) * kUpdateThreads + threadIdx.x) * 4;
  if (i + 4 <= n) {
    const float4 x = *reinterpret_cast<const float4*>(master + i);
    *reinterpret_cast<uint2*>(weights + i) = make_uint2(pack2(x.x, x.y), pack2(x.z, x.w));
  } else {
    for (size_t j = i; j < n; j++) weights[j] = __float2bfloat16_rn(master[j]);
  }
}

void round_weights(Cuda& dev, act* weights, const float* master, size_t n) {
  Range<Cuda> range(dev, __func__);
  if (n == 0) return;
  const unsigned blocks = unsigned(divide_up(n, size_t(4 * kUpdateThreads)));
  round_weights_kernel<<<blocks, kUpdateThreads, 0, dev.stream>>>(weights, master, n);
  launched("round_weights");
}

}  // namespace gdn
