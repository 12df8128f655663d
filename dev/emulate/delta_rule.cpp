// The gated delta rule in the emulator (run.py), against the CPU's layer in double: o and all gradients; and
// cut into splits against not cut: these, and what the passes leave for gradients_kernel.
#include <cstdio>
#include <limits>
#include <random>

#include "gdn/cpu_layers.h"
#include "gdn/kernels/delta_rule/sm80/gradients.cuh"
#include "gdn/kernels/delta_rule/sm80/passes.cuh"
#include "gdn/kernels/delta_rule/sm90/gradients.cuh"
#include "gdn/kernels/delta_rule/sm90/passes.cuh"
#include "gdn/kernels/delta_rule/solve.cuh"

#include "gdn/tests/relative_error.h"

namespace gdn {
namespace delta_rule {
alignas(1024) unsigned char shared[1 << 18];  // what kernels name by extern
alignas(1024) unsigned char tiles[1 << 18];
}  // namespace delta_rule
}  // namespace gdn

namespace {

using namespace gdn;
using namespace gdn::delta_rule;
using Doubles = std::vector<double>;
auto& wgmma_tiles = gdn::delta_rule::tiles;  // gdn::tiles is a namespace of the CPU's matrix products

struct Inputs {
  std::vector<act> qkv, d_o;
  std::vector<float> g, beta;
  std::vector<float> initial_state, d_final_state;  // [B,Hv,dv,dk]; empty: none
};

// What the kernels write, as numbers. Those before kOutputs come out of the layer.
enum {
  kO,
  kDq,
  kDk,
  kDv,
  kDg,
  kDbeta,
  kFinal,
  kDInitial,
  kOutputs,
  kStates = kOutputs,
  kErrors,
  kDStates,
  kX,
  kResults
};
const char* const kNames[kResults] = {
    "o", "dq", "dk", "dv", "dg", "dbeta", "final_state", "d_initial_state", "states", "E", "dS", "X"};
struct Results {
  Doubles of[kResults];
};

Inputs random_inputs(const MixerShape& shape, float decay) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  Inputs in;
  for (int m = 0; m < shape.rows(); m++) {
    std::vector<float> row(size_t(shape.conv_channels()));
    for (float& x : row) x = normal(random);
    for (int h = 0; h < 2 * shape.heads_k; h++) {  // q and k of length 1
      float* head = row.data() + h * shape.head_dim_k;
      float squares = 0;
      for (int i = 0; i < shape.head_dim_k; i++) squares += head[i] * head[i];
      for (int i = 0; i < shape.head_dim_k; i++) head[i] /= std::sqrt(squares);
    }
    for (float x : row) in.qkv.push_back(__float2bfloat16_rn(x));
  }
  for (int i = 0; i < shape.rows() * shape.value_dim(); i++)
    in.d_o.push_back(__float2bfloat16_rn(normal(random)));
  for (int i = 0; i < shape.rows() * shape.heads_v; i++) {
    const bool remembers = decay > 0.25f && i % shape.heads_v % 2;  // a head beside one that forgets
    in.g.push_back(-decay * uniform(random) * (remembers ? 1.f / 64 : 1.f));
    in.beta.push_back(uniform(random));
  }
  return in;
}

template <class T>
Doubles to_double(const std::vector<T>& x) {
  Doubles y;
  for (T v : x) {
    if constexpr (std::is_same_v<T, act>)
      y.push_back(__bfloat162float(v));
    else
      y.push_back(double(v));
  }
  return y;
}

// Columns [first, end) of rows [M, columns].
Doubles columns_of(const Doubles& x, int columns, int first, int end) {
  Doubles part;
  for (size_t i = 0; i < x.size(); i++)
    if (int(i % size_t(columns)) >= first && int(i % size_t(columns)) < end) part.push_back(x[i]);
  return part;
}

Results outputs(const MixerShape& shape, const Doubles& o, const Doubles& dqkv, const Doubles& dg,
                const Doubles& dbeta, const Doubles& final_state, const Doubles& d_initial_state) {
  const int C = shape.conv_channels(), keys = shape.key_dim();
  return {{o, columns_of(dqkv, C, 0, keys), columns_of(dqkv, C, keys, 2 * keys),
           columns_of(dqkv, C, 2 * keys, C), dg, dbeta, final_state, d_initial_state}};
}

// [B,T,heads,columns] in memory of its own, with gaps behind each head and each row.
struct Separate {
  int heads, columns, head_stride, row_stride;
  std::vector<act> data;
  Separate(const MixerShape& shape, int heads, int columns, int head_gap, int row_gap)
      : heads(heads),
        columns(columns),
        head_stride(columns + head_gap),
        row_stride(heads * head_stride + row_gap),
        data(size_t(shape.rows()) * row_stride, __float2bfloat16_rn(1e30f)) {}
  HeadRows<act> at() { return {data.data(), row_stride, head_stride}; }
};

// Copies [B,T,heads,columns]; to and from as HeadRows.
template <class From>
void copy_heads(const HeadRows<act>& to, const HeadRows<From>& from, int rows, int heads, int columns) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t h = 0; h < heads; h++)
      for (int i = 0; i < columns; i++)
        to.at[m * to.row_stride + h * to.head_stride + i] =
            from.at[m * from.row_stride + h * from.head_stride + i];
}

// groups: a block's warpgroups in the passes, 0: the kernels on mma.sync, as on a GPU where a block may have
// shared_bytes bytes of shared memory. separate: q, k, v, o and their gradients are tensors with strides of
// their own; else q, k, v are parts of one.
template <int DK>
Results run(const MixerShape& shape, const Inputs& in, int split_chunks, int groups, int shared_bytes,
            bool separate = false) {
  const bool warpgroups = groups > 0;
  const int dk = shape.head_dim_k, dv = shape.head_dim_v, H = shape.heads_v, chunks = shape.chunks();
  const Sizes size = {shape.tokens, shape.heads_k, H, dk, dv, chunks, H / shape.heads_k};
  const size_t count = size_t(shape.batch) * H * chunks;
  const float s = 1 / std::sqrt(float(dk)), unset = std::numeric_limits<float>::quiet_NaN();

  Splits splits = {divide_up(chunks, split_chunks), split_chunks, nullptr, nullptr};
  const size_t heads = size_t(shape.batch) * H * splits.count;
  std::vector<float> boundary_states(heads * dv * dk, unset), transitions(heads * 2 * dk * dk, unset);
  splits.boundary_states = boundary_states.data(), splits.transitions = transitions.data();

  std::vector<__half> matrices(count * 2 * kMatrixElements), states(count * dk * dv), d_states(states.size());
  std::vector<__half> errors(in.d_o.size()), x(in.d_o.size());
  std::vector<float> gates(count * kGates);
  std::vector<int> exponents(count * dv / 16), d_exponents(exponents.size());
  std::vector<act> o(in.d_o.size()), dqkv(in.qkv.size());
  const Saved saved = {states.data(), errors.data(), exponents.data()};
  const Adjoints adjoints = {d_states.data(), x.data(), d_exponents.data()};
  Qkv<const act> qkv = unpacked(in.qkv.data(), shape);
  Qkv<act> d_qkv = unpacked(dqkv.data(), shape);
  HeadRows<const act> d_o = dense_values(in.d_o.data(), shape);
  HeadRows<act> out = dense_values(o.data(), shape);
  const int Hk = shape.heads_k, rows = shape.rows();
  Separate q_own(shape, Hk, dk, 0, 8), k_own(shape, Hk, dk, 16, 0), v_own(shape, H, dv, 8, 24),
      d_o_own(shape, H, dv, 0, 40), o_own(shape, H, dv, 24, 0), dq_own(shape, Hk, dk, 8, 8),
      dk_own(shape, Hk, dk, 0, 16), dv_own(shape, H, dv, 40, 8);
  if (separate) {
    const auto own = [&](Separate& to, const HeadRows<const act>& from) {
      copy_heads(to.at(), from, rows, to.heads, to.columns);
      const HeadRows<act> at = to.at();
      return HeadRows<const act>{at.at, at.row_stride, at.head_stride};
    };
    qkv = {own(q_own, qkv.q), own(k_own, qkv.k), own(v_own, qkv.v)};
    d_o = own(d_o_own, d_o);
    d_qkv = {dq_own.at(), dk_own.at(), dv_own.at()};
    out = o_own.at();
  }
  const Prepared prepared = {matrices.data(), gates.data()};
  const PrepareInputs prepare_inputs = {qkv.q, qkv.k, in.g.data(), in.beta.data()};
  std::vector<float> final_state(size_t(shape.batch) * H * dv * dk, unset), d_initial_state(final_state);
  const auto begin = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
  const PassInputs forward = {qkv.q,           qkv.k,        qkv.v,
                              matrices.data(), gates.data(), {begin(in.initial_state), final_state.data()}};
  const PassInputs backward = {
      qkv.q, qkv.k, d_o, matrices.data(), gates.data(), {begin(in.d_final_state), d_initial_state.data()}};

  std::memset(shared, 0x7f, sizeof shared);  // large numbers, if anybody read them
  std::memset(wgmma_tiles, 0x7f, sizeof wgmma_tiles);
  const unsigned h = unsigned(H), b = unsigned(shape.batch), n = unsigned(splits.count);
  emulator::shared_memory = wgmma_tiles;  // of prepare_kernel
  emulator::launch({unsigned(chunks), h, b}, kPrepareThreads, [&] {
    if (warpgroups)
      prepare_sm90_kernel(prepared, prepare_inputs, size, s);
    else
      prepare_kernel(prepared, prepare_inputs, size, s);
  });
  emulator::shared_memory = warpgroups ? wgmma_tiles : shared;
  const PassPlan plan = pass_plan(shape, 1, 1, shared_bytes);
  if (!warpgroups && plan.bytes > shared_bytes) throw std::logic_error("a plan that does not fit");
  // f with a constant: the plan's stages
  const auto with_stages = [&](const auto& f) {
    if constexpr (has_one_stage_passes(DK))
      if (plan.stages == 1) return f(std::integral_constant<int, 1>());
    f(std::integral_constant<int, 2>());
  };
  const int warps = warpgroups ? 4 : plan.warps, threads = 32 * warps;
  const unsigned slices_v = unsigned(divide_up(dv, 16 * warps)),
                 slices_k = unsigned(divide_up(dk, 16 * warps));
  const emulator::Dim join = {unsigned(divide_up(dv, kMergeRows)), h, b};
  if (n > 1) {
    emulator::launch({slices_v + slices_k, h, b * (n - 1)}, threads, [&] {
      if (warpgroups)
        forward_state_sm90_kernel<DK>(forward, size, splits, int(slices_v));
      else
        with_stages([&](auto stages) {
          forward_state_kernel<DK, decltype(stages)::value>(forward, size, splits, int(slices_v));
        });
    });
    emulator::launch(join, kMergeThreads,
                     [&] { merge_splits_kernel<merge_columns(DK), false>(splits, size); });
  }
  const unsigned slices = groups == 2 ? unsigned(divide_up(dv, 128)) : slices_v;
  const int in_block = warpgroups ? pass_schedule(DK, groups).threads() : threads;
  emulator::launch({slices, h, b * n}, in_block, [&] {
    if (groups == 2)
      forward_pass_sm90_kernel<DK, 2>(forward, out, saved, size, splits, s);
    else if (warpgroups)
      forward_pass_sm90_kernel<DK, 1>(forward, out, saved, size, splits, s);
    else
      with_stages([&](auto stages) {
        forward_pass_kernel<DK, decltype(stages)::value>(forward, out, saved, size, splits, s);
      });
  });
  std::fill(boundary_states.begin(), boundary_states.end(), unset);
  std::fill(transitions.begin(), transitions.end(), unset);
  if (n > 1) {
    emulator::launch({slices_k, h, b * (n - 1)}, threads, [&] {  // transitions alone
      if (warpgroups)
        forward_state_sm90_kernel<DK>(forward, size, splits, 0);
      else
        with_stages([&](auto stages) {
          forward_state_kernel<DK, decltype(stages)::value>(forward, size, splits, 0);
        });
    });
    emulator::launch({slices_v, h, b * (n - 1)}, warpgroups ? pass_schedule(DK, 1).threads() : threads, [&] {
      if (warpgroups)
        backward_pass_sm90_kernel<DK, 1, true>(backward, {}, {}, size, splits, s);
      else
        with_stages([&](auto stages) {
          backward_pass_kernel<DK, decltype(stages)::value, true>(backward, {}, {}, size, splits, s);
        });
    });
    emulator::launch(join, kMergeThreads,
                     [&] { merge_splits_kernel<merge_columns(DK), true>(splits, size); });
  }
  emulator::launch({slices, h, b * n}, in_block, [&] {
    if (groups == 2)
      backward_pass_sm90_kernel<DK, 2, false>(backward, d_qkv.v, adjoints, size, splits, s);
    else if (warpgroups)
      backward_pass_sm90_kernel<DK, 1, false>(backward, d_qkv.v, adjoints, size, splits, s);
    else
      with_stages([&](auto stages) {
        backward_pass_kernel<DK, decltype(stages)::value, false>(backward, d_qkv.v, adjoints, size, splits,
                                                                 s);
      });
  });

  const auto state = [&](const std::vector<__half>& of, const std::vector<int>& e) {
    Doubles y;
    for (size_t i = 0; i < of.size(); i++) y.push_back(std::ldexp(__half2float(of[i]), -e[i / dk / 16]));
    return y;
  };
  const auto value = [&](const std::vector<__half>& of, const std::vector<int>& e) {
    Doubles y;
    for (size_t i = 0; i < of.size(); i++) {
      const size_t j = i % dv, head = i / dv % H, t = i / dv / H % shape.tokens,
                   at = i / dv / H / shape.tokens;
      y.push_back(
          std::ldexp(__half2float(of[i]), -e[(((at * H + head) * chunks + t / kChunk) * dv + j) / 16]));
    }
    return y;
  };
  const GradientInputs gradient_inputs = {qkv.q, qkv.k, d_o, saved, adjoints, gates.data()};
  std::vector<float> dg(in.g.size(), unset), dbeta(in.g.size(), unset);
  const int work_tiles = chunks * shape.heads_k * shape.batch;
  // Hopper's kernel where it takes these sizes
  const auto launch_sm90_gradients = [&](auto tiles_k, auto grouped) {
    constexpr int kTiles = decltype(tiles_k)::value;
    constexpr bool kGrouped = decltype(grouped)::value;
    const int64_t T = shape.tokens;
    const auto map = [](const void* at, int rank, int rows, std::array<int64_t, 4> sizes,
                        std::array<int64_t, 4> strides) {
      CUtensorMap m = {static_cast<unsigned char*>(const_cast<void*>(at)), rank, rows, {}, {}};
      for (int i = 0; i < rank; i++) m.size[i] = sizes[size_t(i)], m.stride[i] = strides[size_t(i)];
      return m;
    };
    const auto heads = [&](const auto& x, int64_t columns, int64_t count) {
      return map(x.at, 4, 2, {columns, count, T, shape.batch},
                 {1, x.head_stride, x.row_stride, T * x.row_stride});
    };
    const auto keys = [&](const auto& x) { return heads(x, dk, shape.heads_k); };
    const auto values = [&](const auto& x) { return heads(x, dv, H); };
    const auto state_tensor = [&](const void* at) {
      return map(at, 3, 1, {dk, dv, int64_t(count), 1}, {1, dk, int64_t(dk) * dv, 0});
    };
    const GradientTensors tensors = {keys(qkv.q),
                                     keys(qkv.k),
                                     keys(d_qkv.q),
                                     keys(d_qkv.k),
                                     values(d_o),
                                     values(dense_values(errors.data(), shape)),
                                     values(dense_values(x.data(), shape)),
                                     state_tensor(states.data()),
                                     state_tensor(d_states.data())};
    const GateInputs gate_inputs = {gates.data(), exponents.data(), d_exponents.data()};
    if (GradientLayout<kTiles, kGrouped>::kBytes > int(sizeof wgmma_tiles)) std::abort();
    emulator::shared_memory = wgmma_tiles;
    emulator::launch({unsigned(std::min(work_tiles, 2)), 1, 1}, kGradientThreads, [&] {
      gradients_sm90_kernel<kTiles, kGrouped>(tensors, dg.data(), dbeta.data(), gate_inputs, size, work_tiles,
                                              s);
    });
  };
  if (warpgroups && dv % 64 == 0 && (H == shape.heads_k || dk <= 128)) {
    constexpr int kTiles = DK <= 64 ? 1 : DK <= 128 ? 2 : 4;
    using Tiles = std::integral_constant<int, kTiles>;
    if constexpr (kTiles <= 2)
      H > shape.heads_k ? launch_sm90_gradients(Tiles(), std::true_type())
                        : launch_sm90_gradients(Tiles(), std::false_type());
    else
      launch_sm90_gradients(Tiles(), std::false_type());
  } else {
    emulator::shared_memory = shared;
    const GradientPlan plan = gradient_plan(shape, shared_bytes);
    if (plan.bytes > shared_bytes) throw std::logic_error("a plan that does not fit");
    const auto launch = [&](auto columns, auto compact) {
      constexpr int PW = decltype(columns)::value;
      emulator::launch({unsigned(std::min(work_tiles, 2)), 1, 1}, gradient_threads(PW), [&] {
        gradients_kernel<PW, decltype(compact)::value>({d_qkv.q, d_qkv.k, dg.data(), dbeta.data()},
                                                       gradient_inputs, size, work_tiles, plan.buffers, s);
      });
    };
    constexpr int kWide = DK <= 128 ? DK : DK == 192 ? 96 : 128;
    if (plan.compact)
      launch(std::integral_constant<int, kCompactColumns>(), std::true_type());
    else if (plan.columns == kWide)
      launch(std::integral_constant<int, kWide>(), std::false_type());
    else
      throw std::logic_error("a plan of another width");
  }

  if (separate) {
    const Qkv<act> packed = unpacked(dqkv.data(), shape);
    copy_heads(packed.q, d_qkv.q, rows, Hk, dk);
    copy_heads(packed.k, d_qkv.k, rows, Hk, dk);
    copy_heads(packed.v, d_qkv.v, rows, H, dv);
    copy_heads(dense_values(o.data(), shape), out, rows, H, dv);
  }
  Results results = outputs(shape, to_double(o), to_double(dqkv), to_double(dg), to_double(dbeta),
                            to_double(final_state), to_double(d_initial_state));
  results.of[kStates] = state(states, exponents), results.of[kErrors] = value(errors, exponents);
  results.of[kDStates] = state(d_states, d_exponents), results.of[kX] = value(x, d_exponents);
  return results;
}

int failures = 0;
void expect(bool good, const char* what, const char* name, double error, double bound) {
  if (good) return;
  failures++;
  std::printf("  FAILED: %s, %s: error %.2e, expected at most %.2e\n", what, name, error, bound);
}

template <int DK>
void check(int batch, int tokens, int heads_k, int heads_v, int dk, int dv, int split_chunks, float decay,
           bool states = false) {
  MixerShape shape;
  shape.batch = batch, shape.tokens = tokens, shape.heads_k = heads_k, shape.heads_v = heads_v;
  shape.head_dim_k = dk, shape.head_dim_v = dv;
  Inputs in = random_inputs(shape, decay);
  const size_t state_size = size_t(batch) * size_t(heads_v) * size_t(dv) * size_t(dk);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (size_t i = 0; states && i < state_size; i++) {  // a pass that begins with a state is not split
    in.initial_state.push_back(normal(random));
    in.d_final_state.push_back(normal(random));
  }

  Cpu<double> cpu;
  const Doubles qkv = to_double(in.qkv), g = to_double(in.g), beta = to_double(in.beta),
                d_o = to_double(in.d_o);
  Doubles o(d_o.size()), dqkv(qkv.size()), dg(g.size()), dbeta(g.size());
  Doubles kept(gated_delta_rule_saved_bytes(cpu, shape) / sizeof(double));
  const double s = 1 / std::sqrt(float(dk));
  const Doubles initial = to_double(in.initial_state), d_final = to_double(in.d_final_state);
  Doubles final_state(state_size), d_initial(state_size);
  const auto state_tensor = [&](auto* at) {  // [B,Hv,dv,dk]
    return StridedState<std::remove_pointer_t<decltype(at)>>{at, int64_t(heads_v) * dk * dv, int64_t(dk) * dv,
                                                             1, dk};
  };
  DeltaRuleCall<double> call = delta_rule_call(qkv.data(), g.data(), beta.data(), shape, s);
  if (states) call.initial_state = state_tensor(initial.data());
  DeltaRuleGradients<double> to = delta_rule_gradients(dqkv.data(), dg.data(), dbeta.data(), shape);
  to.d_initial_state = state_tensor(d_initial.data());
  delta_rule_forward(call, values_tensor(o.data(), shape), state_tensor(final_state.data()), kept.data());
  delta_rule_backward(call, to, values_tensor(d_o.data(), shape),
                      states ? state_tensor(d_final.data()) : StridedState<const double>(), kept.data());
  const Results reference = outputs(shape, o, dqkv, dg, dbeta, final_state, d_initial);

  PassPlan pass = {};
  GradientPlan gradients = {};
  Results first_cut;  // by the kernels on mma.sync with most shared memory
  const struct {
    const char* name;
    int groups, shared_bytes;
  } variants[] = {{"mma.sync", 0, kSharedBytes227},
                  {"mma.sync, 163 KiB", 0, kSharedBytes163},
                  {"mma.sync, 99 KiB", 0, kSharedBytes99},
                  {"wgmma", 1, kSharedBytes227},
                  {"wgmma, 2", 2, kSharedBytes227}};
  for (const auto& variant : variants) {
    const int groups = variant.groups, shared_bytes = variant.shared_bytes;
    const bool less = shared_bytes < kSharedBytes227;
    if (groups == 2 && dv <= 64) continue;
    std::printf("%s B=%d T=%d Hk=%d Hv=%d dk=%d dv=%d, decay %g:\n", variant.name, batch, tokens, heads_k,
                heads_v, dk, dv, double(decay));
    if (groups == 0) {
      const PassPlan p = pass_plan(shape, 1, 1, shared_bytes);
      const GradientPlan g = gradient_plan(shape, shared_bytes);
      std::printf("  passes: %d warps, stages %d; gradients: %d columns%s, stages %d, q and k %d\n", p.warps,
                  p.stages, g.columns, g.compact ? ", compact" : "", g.buffers.stages, g.buffers.keys);
      if (p.bytes == pass.bytes && g.bytes == gradients.bytes) {
        std::printf("  as with more shared memory\n");
        continue;
      }
      pass = p, gradients = g;
    }
    const auto in_splits_of = [&](int chunks) {
      emulator::late = true;
      const Results late = run<DK>(shape, in, chunks, groups, shared_bytes);
      emulator::late = false;
      const Results results = run<DK>(shape, in, chunks, groups, shared_bytes);
      for (int i = 0; i < kResults; i++) {
        const bool same = std::memcmp(late.of[i].data(), results.of[i].data(), 8 * results.of[i].size()) == 0;
        const double error = same ? 0 : relative_error(late.of[i], results.of[i]);
        expect(same, "copies and products late against at once", kNames[i], error, 0);
      }
      return results;
    };
    const Results cut = in_splits_of(split_chunks), whole = less ? cut : in_splits_of(shape.chunks());
    std::printf(" ");
    for (int i = 0; i < kOutputs; i++)
      std::printf(" %s %.2e", kNames[i], relative_error(whole.of[i], reference.of[i]));
    std::printf("\n  in %d splits:", divide_up(shape.chunks(), split_chunks));
    for (int i = 0; i < kResults; i++)
      std::printf(" %s %.1e", kNames[i], relative_error(cut.of[i], whole.of[i]));
    std::printf("\n");
    for (int i = 0; i < kOutputs; i++) {
      // 1.66e-3 is what rounding to bf16 alone costs; gdn/tests/test_cuda_delta_rule.cu allows twice that
      const double bound = 1.3 * 1.66e-3;
      for (const Results* results : {&whole, &cut}) {
        const double error = relative_error(results->of[i], reference.of[i]);
        expect(error <= bound, results == &whole ? "not cut" : "cut", kNames[i], error, bound);
      }
    }
    for (int i = 0; i < kResults; i++) {
      const double error = relative_error(cut.of[i], whole.of[i]), bound = i < kOutputs ? 1.4e-3 : 7e-4;
      expect(error <= bound, "cut against not cut", kNames[i], error, bound);
    }
    if (!less) {
      const Results apart = run<DK>(shape, in, split_chunks, groups, shared_bytes, true);
      for (int i = 0; i < kResults; i++) {
        const bool same = std::memcmp(apart.of[i].data(), cut.of[i].data(), 8 * cut.of[i].size()) == 0;
        expect(same, "separate tensors against packed rows", kNames[i],
               same ? 0 : relative_error(apart.of[i], cut.of[i]), 0);
      }
    }
    // Sums have the same order, however much shared memory there is, but those of dg. In dq and dk numbers
    // below fp16's normal range depend on the scale factor of dqk and dkk, whose bound covers other blocks.
    if (groups == 0 && !less) first_cut = cut;
    for (int i = 0; i < kResults && less; i++) {
      const bool same = std::memcmp(cut.of[i].data(), first_cut.of[i].data(), 8 * cut.of[i].size()) == 0;
      const double error = same ? 0 : relative_error(cut.of[i], first_cut.of[i]);
      const double bound = i == kDg || i == kDq || i == kDk ? 1e-5 : 0;
      expect(same || (bound > 0 && error <= bound), "less shared memory against more", kNames[i], error,
             bound);
    }
    std::fflush(stdout);
  }
}

// What the kernels take for granted of __hmax2 and __hmin2: of two zeros +0 is the larger, in either order.
void check_zeros() {
  const auto bits = [](__half2 x) { return x.x.bits; };
  const __half2 plus = __float2half2_rn(0.f), minus = __hneg2(plus);
  expect(bits(__hmax2(plus, minus)) == 0 && bits(__hmax2(minus, plus)) == 0, "__hmax2", "+0 and -0", 1, 0);
  expect(bits(__hmin2(plus, minus)) == 0x8000 && bits(__hmin2(minus, plus)) == 0x8000, "__hmin2", "+0 and -0",
         1, 0);
}

// split_memory against a loop over the chunks: more than a warp's lanes of them, either direction, a decay to 0, NaN.
void check_memory() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const Sizes size = {0, 1, 1, 16, 16, 100, 1};
  std::vector<float> gates(size_t(size.chunks) * kGates, nan);
  const auto log_decay = [&](int chunk) -> float& {
    return gates[size_t(chunk) * kGates + kCumulativeLogDecay * kChunk + kChunk - 1];
  };
  std::mt19937 random(3);
  for (const float scale : {0.f, 0.1f, 0.5f, 0.9f, 3.f, 40.f, inf, nan})
    for (const int count : {1, 4, 31, 32, 33, 64, 90})
      for (const int step : {1, -1}) {
        for (int i = 0; i < size.chunks; i++)
          log_decay(i) = -scale * (scale > 1 ? 1.f : std::uniform_real_distribution<float>(0, 1)(random));
        const int first = step > 0 ? 5 : 95;
        Memory expected = {count, true}, found = {};
        double sum = 0;
        for (int i = 0; i < count && expected.all; i++)
          if ((sum += double(log_decay(first + i * step))) < double(kForgotten)) expected = {i + 1, false};
        emulator::launch({1, 1, 1}, 32, [&] {
          const Memory memory = split_memory(chunk_log_decay(gates.data(), size, 0, 0, first), step, count);
          if (threadIdx.x == 31) found = memory;
        });
        expect(found.chunks == expected.chunks && found.all == expected.all, "split_memory", "chunks",
               found.chunks, expected.chunks);
      }
}

}  // namespace

int main() {
  check_zeros();
  check_memory();
  check<32>(1, 300, 1, 1, 32, 64, 1, 0.02f);
  check<32>(2, 500, 1, 2, 16, 48, 2, 0.02f);  // ragged, grouped value heads, fewer columns than a slice has
  check<64>(1, 330, 1, 1, 64, 80, 2, 1.f);
  check<96>(1, 330, 1, 1, 80, 16, 2, 0.001f);
  check<96>(1, 200, 1, 2, 80, 112, 2, 0.3f);
  check<128>(1, 400, 1, 1, 128, 128, 2, 0.01f);
  check<128>(2, 40, 1, 1, 128, 128, 1, 0.01f);
  check<128>(1, 190, 1, 1, 112, 128, 1, 0.01f);
  check<128>(1, 150, 1, 1, 128, 144, 2,
             8.f);  // the state fades within a chunk; warps and warpgroups without columns
  check<128>(1, 800, 1, 2, 128, 64, 4,
             0.5f);  // of four chunks two are remembered in one head, all in the other
  check<64>(1, 900, 2, 2, 64, 64, 5, 0.3f);
  check<192>(1, 270, 1, 1, 176, 64, 1, 0.01f);
  check<256>(1, 270, 1, 1, 256, 32, 2, 0.01f);
  check<64>(2, 100, 1, 2, 48, 80, 2, 0.02f, true);  // from and to states
  check<128>(1, 150, 1, 1, 128, 144, 3, 0.01f, true);
  check<256>(1, 70, 1, 1, 256, 32, 2, 0.01f, true);
  check<128>(1, 130, 1, 2, 128, 64, 1, 0.01f);  // with 99 KiB: one stage, and the compact gradients kernel
  check<192>(1, 130, 1, 2, 192, 80, 1, 0.01f);
  check<256>(1, 130, 1, 2, 256, 64, 1, 0.01f);
  std::printf("%s\n", failures == 0 ? "all as expected" : "FAILED");
  return failures != 0;
}
