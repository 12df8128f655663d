// The optimizer: norm of all gradients, each tensor's with its weight (ParameterSpan, gdn/shapes.h), AdamW,
// SGD with Nesterov momentum, and the rounding of master weights.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gdn {

constexpr int kNormThreads = 256, kNormLoads = 4;  // 16-byte loads of a thread in flight
constexpr int kNormBlocks = 8;                     // thread blocks of an SM
constexpr int kNormSumThreads = 1024;
constexpr int kUpdateThreads = 256, kUpdateBlocks = 4;  // thread blocks of an SM
constexpr int kUpdatePiece = 4 * 4 * kUpdateThreads;    // numbers of the arena a block takes at a time
static_assert(kArenaBlock % (32 * 4 * kNormLoads) == 0 && kArenaBlock % kUpdatePiece == 0, "");

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

// ---- partial sums -----------------------------------------------------------------------------------------

// Four numbers a thread. Floor for the 171.2M parameters at d = 1024: 2.05 GB.
static __global__ void __launch_bounds__(kUpdateThreads)
    add_gradients_kernel(float4* __restrict__ sum, const float4* __restrict__ x, size_t n,
                         double* __restrict__ loss_sum, const double* __restrict__ loss) {
  const size_t i = size_t(blockIdx.x) * kUpdateThreads + threadIdx.x;
  if (i == 0) *loss_sum += *loss;
  if (i >= n) return;
  float4 a = sum[i];
  const float4 b = x[i];
  a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
  sum[i] = a;
}

void add_gradients(Cuda& dev, float* sum, const float* x, size_t n, double* loss_sum, const double* loss) {
  Range<Cuda> range(dev, __func__);
  if (n % 4 != 0)
    throw std::logic_error("add_gradients: " + std::to_string(n) + " numbers, expected a multiple of 4");
  const unsigned blocks = unsigned(divide_up(n / 4 + (n == 0), size_t(kUpdateThreads)));
  add_gradients_kernel<<<blocks, kUpdateThreads, 0, dev.stream>>>(
      reinterpret_cast<float4*>(sum), reinterpret_cast<const float4*>(x), n / 4, loss_sum, loss);
  launched("add_gradients");
}

// As above, of pieces that stand `stride` numbers apart in `sum` and behind each other in x. All counts are of
// 16 bytes. blockIdx.y is the piece.
static __global__ void __launch_bounds__(kUpdateThreads)
    add_pieces_kernel(float4* __restrict__ sum, const float4* __restrict__ x, size_t piece, size_t stride) {
  const size_t i = size_t(blockIdx.x) * kUpdateThreads + threadIdx.x;
  if (i >= piece) return;
  float4* const to = sum + blockIdx.y * stride + i;
  const float4 b = x[blockIdx.y * piece + i];
  float4 a = *to;
  a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
  *to = a;
}

void add_pieces(Cuda& dev, float* sum, const float* x, int pieces, size_t piece, size_t stride) {
  Range<Cuda> range(dev, __func__);
  if (piece % 4 != 0 || stride % 4 != 0)
    throw std::logic_error("add_pieces: pieces of " + std::to_string(piece) + " numbers every " +
                           std::to_string(stride) + ", expected multiples of 4");
  if (pieces == 0 || piece == 0) return;
  const dim3 blocks(unsigned(divide_up(piece / 4, size_t(kUpdateThreads))), unsigned(pieces));
  add_pieces_kernel<<<blocks, kUpdateThreads, 0, dev.stream>>>(
      reinterpret_cast<float4*>(sum), reinterpret_cast<const float4*>(x), piece / 4, stride / 4);
  launched("add_pieces");
}

// A launch's time.
static __global__ void time_stamp_kernel(int64_t* nanoseconds) { *nanoseconds = global_timer(); }

void time_stamp(Cuda& dev, int64_t* nanoseconds) {
  time_stamp_kernel<<<1, 1, 0, dev.stream>>>(nanoseconds);
  launched("time_stamp");
}

// *sum = tree over x [n], n a power of two up to 1024: a number a thread.
static __global__ void __launch_bounds__(1024) sum_tree_kernel(double* sum, const double* x) {
  __shared__ double sums[1024];
  sums[threadIdx.x] = x[threadIdx.x];
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    __syncthreads();
    const double both = threadIdx.x < n ? sums[2 * threadIdx.x] + sums[2 * threadIdx.x + 1] : 0;
    __syncthreads();
    if (threadIdx.x < n) sums[threadIdx.x] = both;
  }
  if (threadIdx.x == 0) *sum = sums[0];
}

void sum_tree(Cuda& dev, double* sum, const double* x, int n) {
  Range<Cuda> range(dev, __func__);
  if (n < 1 || n > 1024 || (n & (n - 1)))
    throw std::logic_error("sum_tree: " + std::to_string(n) + " numbers, expected a power of two up to 1024");
  sum_tree_kernel<<<1, n, 0, dev.stream>>>(sum, x);
  launched("sum_tree");
}

// ---- norm -------------------------------------------------------------------------------------------------

__device__ inline double squared(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

// sums[k] = weighted sum of squares in block k of the arena. A warp does a block, so that it needs no barrier; nearly
// all blocks lie inside one tensor. Floor for the 171.2M parameters at d = 1024: 685 MB, 0.2279 ms at the copy rate.
static __global__ void __launch_bounds__(kNormThreads)
    sum_of_squares_kernel(double* __restrict__ sums, const float* __restrict__ gradients, ArenaRange range,
                          const ParameterSpan* __restrict__ spans, int count) {
  constexpr int kWarps = kNormThreads / 32;
  const int lane = threadIdx.x % 32;
  int first = 0;
  for (size_t begin = range.begin + (size_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kArenaBlock;
       begin < range.end; begin += size_t(gridDim.x) * kWarps * kArenaBlock) {
    const size_t block_end = begin + kArenaBlock;
    double sum = 0;
    first = find_span(spans, first, count, begin);
    const bool inside =
        first < count && spans[first].offset <= begin && block_end <= spans[first].offset + spans[first].size;
    if (inside) {
      const float4* vectors = reinterpret_cast<const float4*>(gradients + begin) + lane;
      for (int at = 0; at < int(kArenaBlock) / 4; at += 32 * kNormLoads) {
        float4 x[kNormLoads];
#pragma unroll
        for (int i = 0; i < kNormLoads; i++) x[i] = vectors[at + i * 32];
#pragma unroll
        for (int i = 0; i < kNormLoads; i++) sum += squared(x[i]);
      }
      sum *= spans[first].norm_weight;
    } else {
      for (int s = first; s < count && spans[s].offset < block_end; s++) {
        const size_t end = min(spans[s].offset + spans[s].size, block_end);
        for (size_t i = max(spans[s].offset, begin) + lane; i < end; i += 32)
          sum += spans[s].norm_weight * (double(gradients[i]) * gradients[i]);
      }
    }
    sum = lane_sum(sum);
    if (lane == 0) sums[begin / kArenaBlock] = sum;
  }
}

void sum_of_squares(Cuda& dev, double* sums, const float* gradients, const ArenaRange& range,
                    const ParameterSpan* spans, int count) {
  Range<Cuda> profiled(dev, __func__);
  if (range.size() == 0) return;
  const size_t warps = range.size() / kArenaBlock;
  const unsigned blocks =
      unsigned(std::min(divide_up(warps, size_t(kNormThreads / 32)), size_t(kNormBlocks * dev.sm_count)));
  sum_of_squares_kernel<<<blocks, kNormThreads, 0, dev.stream>>>(sums, gradients, range, spans, count);
  launched("sum_of_squares");
}

// norm = the square root of the sum of the blocks' sums. A thread takes every kNormSumThreads-th block of a group,
// counted from the group's beginning, so that zeros at a group's end change nothing. One thread block: 42,000 numbers
// at d = 1024, 0.3 MB.
static __global__ void __launch_bounds__(kNormSumThreads)
    norm_of_sums_kernel(float* __restrict__ norm, const double* __restrict__ sums,
                        const ArenaRange* __restrict__ groups, int count) {
  __shared__ double shared[kNormSumThreads / 32];
  double sum = 0;
  for (int g = 0; g < count; g++) {
    const size_t end = groups[g].end / kArenaBlock;
    for (size_t i = groups[g].begin / kArenaBlock + threadIdx.x; i < end; i += kNormSumThreads)
      sum += sums[i];
  }
  sum = block_sum<kNormSumThreads / 32>(sum, shared);
  if (threadIdx.x == 0) *norm = float(sqrt(sum));
}

void norm_of_sums(Cuda& dev, float* norm, const double* sums, const ArenaRange* groups, int count) {
  Range<Cuda> range(dev, __func__);
  norm_of_sums_kernel<<<1, kNormSumThreads, 0, dev.stream>>>(norm, sums, groups, count);
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
    p = decay * p - lr * (m / correction1) / (sqrtf(v / correction2) + epsilon * s.epsilon_scale);
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
                  float* __restrict__ moment2, const float* __restrict__ gradients, ArenaRange range,
                  const ParameterSpan* __restrict__ spans, int count, const float* __restrict__ norm,
                  const typename Rule::Step* __restrict__ step) {
  const float length = *norm;
  if (!isfinite(length)) return;
  const Rule rule = Rule::of(*step);
  const float factor = rule.clip > 0 && length > rule.clip ? rule.clip / length : 1.0f;
  master -= range.begin, weights -= range.begin, moment1 -= range.begin, gradients -= range.begin;
  if (Rule::kSecondMoment) moment2 -= range.begin;
  int first = 0;
  for (size_t begin = range.begin + size_t(blockIdx.x) * kUpdatePiece; begin < range.end;
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

// The whole arena fills the GPU; a rank's part of a layer may be less.
inline unsigned update_blocks(const Cuda& dev, const ArenaRange& range) {
  return unsigned(
      std::min(divide_up(range.size(), size_t(kUpdatePiece)), size_t(kUpdateBlocks * dev.sm_count)));
}

void adamw_update(Cuda& dev, float* master, act* weights, float* moment1, float* moment2,
                  const float* gradients, const ArenaRange& range, const ParameterSpan* spans, int count,
                  const float* norm, const AdamwStep* step) {
  Range<Cuda> profiled(dev, __func__);
  if (range.size() == 0) return;
  update_kernel<AdamwRule><<<update_blocks(dev, range), kUpdateThreads, 0, dev.stream>>>(
      master, weights, moment1, moment2, gradients, range, spans, count, norm, step);
  launched("adamw_update");
}

void sgd_update(Cuda& dev, float* master, act* weights, float* moment, const float* gradients,
                const ArenaRange& range, const ParameterSpan* spans, int count, const float* norm,
                const SgdStep* step) {
  Range<Cuda> profiled(dev, __func__);
  if (range.size() == 0) return;
  update_kernel<SgdRule><<<update_blocks(dev, range), kUpdateThreads, 0, dev.stream>>>(
      master, weights, moment, nullptr, gradients, range, spans, count, norm, step);
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
