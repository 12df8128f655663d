// libgdn.so: gdn/library.h over the layers of cpu_layers.h.
#include "library.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_layers.h"
#ifdef GDN_CUDA
#include "library_cuda.h"
#endif

namespace gdn {
namespace {

thread_local std::string last_error;

// 0, or -1 with what `work` threw as the thread's last error.
template <class Work>
int guarded(const char* function, const Work& work) noexcept {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    last_error = std::string(function) + ": out of memory";
  } catch (const std::exception& e) {
    last_error = std::string(function) + ": " + e.what();
  } catch (...) {
    last_error = std::string(function) + ": unknown error";
  }
  return -1;
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string text(int64_t x) { return std::to_string(x); }

template <class Struct>
void check_struct(const Struct* x) {
  if (!x) refuse("the struct is null");
  if (x->size != sizeof(Struct))
    refuse("a struct of " + text(int64_t(x->size)) + " bytes; this library's has " + text(sizeof(Struct)));
}

void at_least(const char* name, int64_t value, int64_t least) {
  if (value < least) refuse(std::string(name) + " " + text(value) + ", expected at least " + text(least));
}

template <class T>
void present(const char* name, const T* data) {
  if (!data) refuse(std::string(name) + " is null");
}
void present(const char* name, const gdn_tensor& tensor) { present(name, tensor.data); }

// Calls work with a number of the call's type.
template <class Work>
void with_type(int32_t device, int32_t type, const Work& work) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  if (type < 0 || type > GDN_FLOAT16) refuse("type " + text(type) + ", expected 0 to 3 (gdn_type)");
  if (device == GDN_ON_CUDA) refuse("device CUDA: this layer computes on the CPU alone");
  if (device != GDN_ON_CPU) refuse("device " + text(device) + ", expected 0 (CPU) or 1 (CUDA)");
  if (type == GDN_FLOAT32) return work(float());
  if (type == GDN_FLOAT64) return work(double());
  refuse(std::string("type ") + names[type] + " on the CPU, expected float32 or float64");
}

// A function of a layer that the CPU alone computes.
template <class Struct, class Work>
int on_cpu(const char* function, const Struct* x, const Work& work) noexcept {
  return guarded(function, [&] {
    check_struct(x);
    with_type(x->device, x->type, work);
  });
}

// Batch, tokens and documents of a call.
template <class Call>
void check_sequences(const Call& x) {
  at_least("batch", x.batch, 0);
  at_least("tokens", x.tokens, 0);
  constexpr int64_t most = std::numeric_limits<int>::max();
  if (x.batch > most || x.tokens > most / std::max<int64_t>(x.batch, 1))
    refuse("batch " + text(x.batch) + " x tokens " + text(x.tokens) + ", expected at most " + text(most));
  if (!x.cu_seqlens) {
    if (x.sequences != x.batch)
      refuse("sequences " + text(x.sequences) + " without cu_seqlens, expected the batch, " + text(x.batch));
    return;
  }
  if (x.batch != 1) refuse("batch " + text(x.batch) + " with cu_seqlens, expected 1");
  at_least("sequences", x.sequences, 0);
  const int64_t n = x.sequences;
  if (x.cu_seqlens[0] != 0) refuse("cu_seqlens[0] is " + text(x.cu_seqlens[0]) + ", expected 0");
  for (int64_t i = 0; i < n; i++)
    if (x.cu_seqlens[i + 1] < x.cu_seqlens[i])
      refuse("cu_seqlens[" + text(i + 1) + "] is " + text(x.cu_seqlens[i + 1]) + " after " +
             text(x.cu_seqlens[i]) + ", expected ascending numbers");
  if (x.cu_seqlens[n] != x.tokens)
    refuse("cu_seqlens ends with " + text(x.cu_seqlens[n]) + ", expected the number of tokens, " +
           text(x.tokens));
}

template <class Call>
void check_heads(const Call& x) {
  at_least("heads_k", x.heads_k, 1);
  at_least("heads_v", x.heads_v, 1);
  at_least("head_dim_k", x.head_dim_k, 1);
  at_least("head_dim_v", x.head_dim_v, 1);
  if (x.heads_v % x.heads_k != 0)
    refuse("heads_v " + text(x.heads_v) + ", expected a multiple of heads_k, " + text(x.heads_k));
  constexpr int kMost = 1 << 15;  // products of two sizes are then ints
  for (const int32_t size : {x.heads_k, x.heads_v, x.head_dim_k, x.head_dim_v})
    if (size > kMost) refuse("a size of " + text(size) + ", expected at most " + text(kMost));
}

template <class Real>
Strided<Real> strided(const gdn_tensor& x) {
  return {static_cast<Real*>(x.data), x.stride[0], x.stride[1], x.stride[2], x.stride[3]};
}

template <class Real>
StridedState<Real> strided_state(const gdn_tensor& x) {
  return {static_cast<Real*>(x.data), x.stride[0], x.stride[1], x.stride[2], x.stride[3]};
}

// ---- gated delta rule

// Sizes and documents alone.
template <class Real>
DeltaRuleCall<Real> sized_call(const gdn_delta_rule& x) {
  check_sequences(x);
  check_heads(x);
  DeltaRuleCall<Real> call;
  call.heads_k = x.heads_k, call.heads_v = x.heads_v;
  call.head_dim_k = x.head_dim_k, call.head_dim_v = x.head_dim_v;
  if (x.cu_seqlens)
    call.set_documents(x.cu_seqlens, x.sequences);
  else
    call.set_rows(x.batch, int(x.tokens));
  return call;
}

template <class Real>
DeltaRuleCall<Real> delta_rule_of(const gdn_delta_rule& x) {
  DeltaRuleCall<Real> call = sized_call<Real>(x);
  if (x.batch * x.tokens > 0) {
    present("q", x.q), present("k", x.k), present("v", x.v);
    present("g", x.g), present("beta", x.beta);
  }
  call.s = Real(x.scale);
  call.normalized = x.normalized != 0;
  call.q = strided<const Real>(x.q);
  call.k = strided<const Real>(x.k);
  call.v = strided<const Real>(x.v);
  call.g = strided<const Real>(x.g);
  call.beta = strided<const Real>(x.beta);
  call.initial_state = strided_state<const Real>(x.initial_state);
  return call;
}

// ---- gated delta rule on the GPU

enum class Pass { forward, backward, recurrent };

#ifdef GDN_CUDA

// Makes a GPU the current one for as long as it lives.
class CurrentGpu {
 public:
  explicit CurrentGpu(int number) {
    cuda_check(cudaGetDevice(&before_));
    if (number != before_) cuda_check(cudaSetDevice(number));
    changed_ = number != before_;
  }
  ~CurrentGpu() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentGpu(const CurrentGpu&) = delete;
  CurrentGpu& operator=(const CurrentGpu&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

std::string strides_text(const gdn_tensor& x) {
  return "strides " + text(x.stride[0]) + ", " + text(x.stride[1]) + ", " + text(x.stride[2]) + ", " +
         text(x.stride[3]);
}

// [B,T,heads,columns] bf16
CudaRows cuda_rows(const char* name, const gdn_tensor& x, const gdn_delta_rule& call) {
  present(name, x);
  const auto fits = [](int64_t stride) {
    return stride % 8 == 0 && stride >= 0 && stride <= std::numeric_limits<int>::max();
  };
  if (x.stride[3] != 1 || !fits(x.stride[1]) || !fits(x.stride[2]) ||
      (call.batch > 1 && x.stride[0] != call.tokens * x.stride[1]) ||
      reinterpret_cast<uintptr_t>(x.data) % 16 != 0)
    refuse(std::string(name) + " has " + strides_text(x) +
           " or does not begin on 16 bytes; the GPU reads T s, s, h, 1, s and h multiples of 8");
  return {x.data, int(x.stride[1]), int(x.stride[2])};
}

void require_dense(const char* name, const gdn_tensor& x, const int64_t (&shape)[4], int dimensions) {
  int64_t step = 1;
  for (int i = dimensions; i-- > 0; step *= shape[i])
    if (shape[i] > 1 && x.stride[i] != step)
      refuse(std::string(name) + " has " + strides_text(x) + ", expected a dense tensor");
}

float* cuda_gate(const char* name, const gdn_tensor& x, const gdn_delta_rule& call) {
  present(name, x);
  require_dense(name, x, {call.batch, call.tokens, call.heads_v, 1}, 3);
  return static_cast<float*>(x.data);
}

// A state, or null: dense as [N,Hv,dv,dk], or with `keys_first` as [N,Hv,dk,dv].
float* cuda_state(const char* name, const gdn_tensor& x, const gdn_delta_rule& call, bool keys_first) {
  if (!x.data) return nullptr;
  gdn_tensor order = x;
  if (!keys_first) std::swap(order.stride[2], order.stride[3]);
  const int64_t dk = call.head_dim_k, dv = call.head_dim_v;
  require_dense(name, order, {call.sequences, call.heads_v, keys_first ? dk : dv, keys_first ? dv : dk}, 4);
  return static_cast<float*>(x.data);
}

void check_cuda(const gdn_delta_rule& x) {
  check_sequences(x);
  check_heads(x);
  if (x.type != GDN_BFLOAT16) refuse("type " + text(x.type) + " on the GPU, expected 2 (bfloat16)");
  if (x.normalized) refuse("normalized on the GPU, expected 0");
}

MixerShape cuda_shape(const gdn_delta_rule& x, int64_t batch, int64_t tokens) {
  MixerShape shape;
  shape.batch = int(batch), shape.tokens = int(tokens);
  shape.heads_k = x.heads_k, shape.heads_v = x.heads_v;
  shape.head_dim_k = x.head_dim_k, shape.head_dim_v = x.head_dim_v;
  return shape;
}

// Calls work(shape, first token, sequence, offset in saved) for each document, or once for all rows together.
template <class Work>
void for_each_call(Cuda& device, const gdn_delta_rule& x, const Work& work) {
  if (!x.cu_seqlens) return work(cuda_shape(x, x.batch, x.tokens), 0, 0, 0);
  size_t offset = 0;
  for (int64_t n = 0; n < x.sequences; n++) {
    const MixerShape shape = cuda_shape(x, 1, x.cu_seqlens[n + 1] - x.cu_seqlens[n]);
    work(shape, x.cu_seqlens[n], n, offset);
    offset += shape.tokens ? gated_delta_rule_saved_bytes(device, shape) : 0;
  }
}

void cuda_bytes(const gdn_delta_rule& x, size_t* saved, size_t* scratch) {
  check_cuda(x);
  const CurrentGpu current(x.device_number);
  Cuda device(x.device_number, static_cast<cudaStream_t>(x.stream));
  *saved = *scratch = 0;
  for_each_call(device, x, [&](const MixerShape& shape, int64_t, int64_t, size_t offset) {
    if (shape.rows() == 0) return;
    *saved = offset + gated_delta_rule_saved_bytes(device, shape);
    *scratch = std::max(*scratch, gated_delta_rule_scratch_bytes(device, shape));
  });
}

void cuda_delta_rule(const gdn_delta_rule& x, Pass pass) {
  check_cuda(x);
  if (x.cu_seqlens == nullptr && x.batch * x.tokens == 0)
    refuse("no tokens, expected at least one on the GPU");
  const CurrentGpu current(x.device_number);
  Cuda device(x.device_number, static_cast<cudaStream_t>(x.stream));
  const bool backward = pass == Pass::backward, recurrent = pass == Pass::recurrent;
  const int64_t state_size = int64_t(x.heads_v) * x.head_dim_k * x.head_dim_v;
  CudaDeltaRule whole;
  whole.s = float(x.scale);
  whole.q = cuda_rows("q", x.q, x), whole.k = cuda_rows("k", x.k, x), whole.v = cuda_rows("v", x.v, x);
  whole.g = cuda_gate("g", x.g, x), whole.beta = cuda_gate("beta", x.beta, x);
  whole.o = backward ? cuda_rows("d_o", x.d_o, x) : cuda_rows("o", x.o, x);
  whole.initial_state = cuda_state("initial_state", x.initial_state, x, recurrent);
  whole.final_state = cuda_state("final_state", x.final_state, x, recurrent);
  if (backward) {
    whole.dq = cuda_rows("dq", x.dq, x), whole.dk = cuda_rows("dk", x.dk, x),
    whole.dv = cuda_rows("dv", x.dv, x);
    whole.dg = cuda_gate("dg", x.dg, x), whole.dbeta = cuda_gate("dbeta", x.dbeta, x);
    whole.d_final_state = cuda_state("d_final_state", x.d_final_state, x, false);
    whole.d_initial_state = cuda_state("d_initial_state", x.d_initial_state, x, false);
    present("saved", x.saved);
  }
  if (recurrent) {
    present("final_state", x.final_state);
    require_dense("o", x.o, {x.batch, x.tokens, x.heads_v, x.head_dim_v}, 4);
  } else {
    present("scratch", x.scratch);
  }
  const auto advance = [](CudaRows& rows, int64_t tokens) {
    if (rows.data) rows.data = static_cast<act*>(rows.data) + tokens * rows.row;
  };
  const auto copy_state = [&](float* to, const float* from, int64_t count) {
    const size_t bytes = size_t(count * state_size) * sizeof(float);
    if (!to || to == from) return;
    if (from)
      device.copy(to, from, bytes);
    else
      device.zero(to, bytes);
  };
  for_each_call(device, x, [&](const MixerShape& shape, int64_t first, int64_t n, size_t offset) {
    CudaDeltaRule call = whole;
    call.shape = shape;
    for (CudaRows* rows : {&call.q, &call.k, &call.v, &call.o, &call.dq, &call.dk, &call.dv})
      advance(*rows, first);
    const auto at = [&](auto*& p, int64_t step) {
      if (p) p += step;
    };
    const int64_t gate = first * x.heads_v, state = n * state_size;
    at(call.g, gate), at(call.beta, gate), at(call.dg, gate), at(call.dbeta, gate);
    at(call.initial_state, state), at(call.final_state, state);
    at(call.d_final_state, state), at(call.d_initial_state, state);
    call.saved = x.saved ? static_cast<char*>(x.saved) + offset : nullptr;
    call.scratch = x.scratch;
    const int64_t count = x.cu_seqlens ? 1 : x.batch;
    if (shape.rows() == 0) {  // a document of no tokens hands its state on
      if (backward)
        copy_state(call.d_initial_state, call.d_final_state, count);
      else
        copy_state(call.final_state, call.initial_state, count);
    } else if (recurrent) {
      copy_state(call.final_state, call.initial_state, count);
      delta_rule_recurrent(device, call, call.final_state);
    } else if (backward) {
      delta_rule_backward(device, call);
    } else {
      delta_rule_forward(device, call);
    }
  });
}

#else

[[noreturn]] void no_gpu() { refuse("device CUDA: this library was built without nvcc"); }
void cuda_bytes(const gdn_delta_rule&, size_t*, size_t*) { no_gpu(); }
void cuda_delta_rule(const gdn_delta_rule&, Pass) { no_gpu(); }

#endif

// ---- short convolution

template <class Call>
std::vector<DeltaRuleSequence> sequences_of(const Call& x) {
  DeltaRuleCall<float> call;
  if (x.cu_seqlens)
    call.set_documents(x.cu_seqlens, x.sequences);
  else
    call.set_rows(x.batch, int(x.tokens));
  return call.sequences;
}

// Rows of channels [B,T,C], the channels side by side.
template <class Real>
Strided<Real> rows_of(const char* name, const gdn_tensor& x) {
  if (x.data && x.stride[2] != 1)
    refuse(std::string(name) + " has stride " + text(x.stride[2]) + " in its last dimension, expected 1");
  return {static_cast<Real*>(x.data), x.stride[0], x.stride[1], 0, 1};
}

// Calls work(seq, n, t) for each token of each document, in parallel.
template <class Work>
void for_each_token(const std::vector<DeltaRuleSequence>& sequences, const Work& work) {
  for (size_t n = 0; n < sequences.size(); n++)
#pragma omp parallel for schedule(static)
    for (int t = 0; t < sequences[n].tokens; t++) work(sequences[n], n, t);
}

void check(const gdn_short_conv& x) {
  check_sequences(x);
  at_least("channels", x.channels, 1);
  if (x.channels > 1 << 24) refuse("channels " + text(x.channels) + ", expected at most " + text(1 << 24));
  present("taps", x.taps);
}

// Inputs of token t: rows of x, and before the document those of history [N,3,C] (empty: zeros).
template <class Real>
void conv_inputs(const Real* (&inputs)[kConvTaps], const Strided<const Real>& x,
                 const std::vector<Real>& history, const DeltaRuleSequence& seq, size_t n, int t, int C) {
  constexpr int kBefore = kConvTaps - 1;
  for (int j = 0; j < kConvTaps; j++) {
    const int from = t - kBefore + j;
    inputs[j] = from >= 0         ? x.at(seq.row, seq.first + from, 0)
                : history.empty() ? nullptr
                                  : &history[(n * kBefore + size_t(from + kBefore)) * size_t(C)];
  }
}

template <class Real>
void convolve_forward(const gdn_short_conv& call) {
  check(call);
  constexpr int kBefore = kConvTaps - 1;
  const int C = int(call.channels);
  const auto sequences = sequences_of(call);
  const auto x = rows_of<const Real>("x", call.x);
  const auto y = rows_of<Real>("y", call.y);
  if (call.batch * call.tokens > 0) present("x", call.x), present("y", call.y);
  const Real* taps = static_cast<const Real*>(call.taps);
  std::vector<Real> history;
  const auto state = [&](const gdn_tensor& at, size_t n, int j) {
    return static_cast<Real*>(at.data) + int64_t(n) * at.stride[0] + j * at.stride[1];
  };
  if (call.initial_state.data) {
    history.resize(sequences.size() * kBefore * size_t(C));
    for (size_t n = 0; n < sequences.size(); n++)
      for (int j = 0; j < kBefore; j++)
        gather(&history[(n * kBefore + size_t(j)) * size_t(C)], state(call.initial_state, n, j),
               call.initial_state.stride[2], C);
  }
  for_each_token(sequences, [&](const DeltaRuleSequence& seq, size_t n, int t) {
    const Real* inputs[kConvTaps];
    conv_inputs(inputs, x, history, seq, n, t, C);
    Real* out = y.at(seq.row, seq.first + t, 0);
    short_conv_row(out, inputs, taps, C);
#pragma omp simd
    for (int c = 0; c < C; c++) out[c] = silu(out[c]);
  });
  if (!call.final_state.data) return;
  const std::vector<Real> zeros(static_cast<size_t>(C));
  for (size_t n = 0; n < sequences.size(); n++) {
    const Real* inputs[kConvTaps];
    conv_inputs(inputs, x, history, sequences[n], n, sequences[n].tokens,
                C);  // of the token that would follow
    for (int j = 0; j < kBefore; j++)
      scatter(state(call.final_state, n, j), call.final_state.stride[2], inputs[j] ? inputs[j] : zeros.data(),
              C);
  }
}

template <class Real>
void convolve_backward(const gdn_short_conv& call) {
  check(call);
  if (call.initial_state.data) refuse("initial_state in a backward call, expected null");
  const int C = int(call.channels), K = kConvTaps;
  const auto sequences = sequences_of(call);
  const auto x = rows_of<const Real>("x", call.x), dy = rows_of<const Real>("dy", call.dy);
  const auto dx = rows_of<Real>("dx", call.dx);
  if (call.batch * call.tokens > 0) present("x", call.x), present("dy", call.dy), present("dx", call.dx);
  const Real* taps = static_cast<const Real*>(call.taps);
  std::vector<Real> du(size_t(call.batch * call.tokens) * size_t(C));  // gradient of u
  const auto du_of = [&](const DeltaRuleSequence& seq, int t) {
    return &du[size_t(seq.row * call.tokens + seq.first + t) * size_t(C)];
  };
  for_each_token(sequences, [&](const DeltaRuleSequence& seq, size_t n, int t) {
    const Real* inputs[kConvTaps];
    conv_inputs(inputs, x, {}, seq, n, t, C);
    Real* u = du_of(seq, t);
    short_conv_row(u, inputs, taps, C);
    const Real* gradient = dy.at(seq.row, seq.first + t, 0);
#pragma omp simd
    for (int c = 0; c < C; c++) u[c] = gradient[c] * silu_derivative(u[c]);
  });
  for_each_token(sequences, [&](const DeltaRuleSequence& seq, size_t, int t) {
    const Real* readers[kConvTaps];
    for (int j = 0; j < K; j++) readers[j] = t + K - 1 - j < seq.tokens ? du_of(seq, t + K - 1 - j) : nullptr;
    short_conv_row(dx.at(seq.row, seq.first + t, 0), readers, taps, C);
  });
  Real* dtaps = static_cast<Real*>(call.dtaps);
  if (!dtaps) return;
  std::fill_n(dtaps, size_t(C) * K, Real(0));
#pragma omp parallel for schedule(static)
  for (int c0 = 0; c0 < C; c0 += 16)
    for (const DeltaRuleSequence& seq : sequences)
      for (int t = 0; t < seq.tokens; t++)
        for (int j = std::max(0, K - 1 - t); j < K; j++) {
          const Real *gradient = du_of(seq, t), *input = x.at(seq.row, seq.first + t - (K - 1) + j, 0);
          for (int c = c0; c < std::min(c0 + 16, C); c++) dtaps[c * K + j] += gradient[c] * input[c];
        }
}

// ---- gated norm

void check(const gdn_gated_norm& x) {
  at_least("rows", x.rows, 0);
  at_least("width", x.width, 1);
  present("weight", x.weight);
}

template <class Real>
struct Rows {
  Real* data;
  int64_t step;
  Real* operator[](int64_t r) const { return data + r * step; }
};

template <class Real>
Rows<Real> norm_rows(const char* name, const gdn_tensor& x, int64_t rows) {
  if (rows > 0) present(name, x);
  if (x.data && x.stride[1] != 1)
    refuse(std::string(name) + " has stride " + text(x.stride[1]) + " in its last dimension, expected 1");
  return {static_cast<Real*>(x.data), x.stride[0]};
}

template <class Real>
Real reciprocal_size(const Real* x, int n, double eps) {
  return 1 / std::sqrt(dot(x, x, n) / n + Real(eps));
}

template <class Real>
void gated_norm_forward(const gdn_gated_norm& call) {
  check(call);
  const auto x = norm_rows<const Real>("x", call.x, call.rows),
             z = norm_rows<const Real>("z", call.z, call.rows);
  const auto y = norm_rows<Real>("y", call.y, call.rows);
  const Real* weight = static_cast<const Real*>(call.weight);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < call.rows; r++)
    output_norm_head(y[r], x[r], z[r], weight, reciprocal_size(x[r], call.width, call.eps), call.width);
}

template <class Real>
void gated_norm_backward(const gdn_gated_norm& call) {
  check(call);
  const int n = call.width;
  const auto x = norm_rows<const Real>("x", call.x, call.rows),
             z = norm_rows<const Real>("z", call.z, call.rows),
             dy = norm_rows<const Real>("dy", call.dy, call.rows);
  const auto dx = norm_rows<Real>("dx", call.dx, call.rows), dz = norm_rows<Real>("dz", call.dz, call.rows);
  const Real* weight = static_cast<const Real*>(call.weight);
  std::vector<Real> rstd(static_cast<size_t>(call.rows));
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < call.rows; r++) rstd[size_t(r)] = reciprocal_size(x[r], n, call.eps);
  if (Real* dweight = static_cast<Real*>(call.dweight)) {
#pragma omp parallel for schedule(static)
    for (int c = 0; c < n; c++) {
      Real sum = 0;
      for (int64_t r = 0; r < call.rows; r++) sum += x[r][c] * rstd[size_t(r)] * dy[r][c] * silu(z[r][c]);
      dweight[c] = sum;
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < call.rows; r++)
    output_norm_head_backward(dx[r], dz[r], dy[r], x[r], z[r], weight, rstd[size_t(r)], n);
}

// ---- mixer

// Everything between h and y.
template <class Real>
struct Mixer {
  const gdn_mixer& call;
  Cpu<Real> dev;
  MixerShape shape;
  DeltaRuleCall<Real> delta_rule;
  std::vector<int32_t> position;
  std::vector<Real> in_proj, proj, qkv, rnorm, g, beta, o, rstd, normed, saved;

  static const Real* read(const char* name, const void* data) {
    present(name, data);
    return static_cast<const Real*>(data);
  }

  explicit Mixer(const gdn_mixer& x) : call(x) {
    check_sequences(x);
    check_heads(x);
    at_least("width", x.width, 1);
    if (x.batch == 0 || x.tokens == 0) refuse("a mixer of no tokens");
    shape.batch = int(x.batch), shape.tokens = int(x.tokens);
    shape.heads_k = x.heads_k, shape.heads_v = x.heads_v;
    shape.head_dim_k = x.head_dim_k, shape.head_dim_v = x.head_dim_v;
    const size_t M = size_t(shape.rows()), P = size_t(shape.columns()), d = size_t(x.width);
    position.resize(M);
    for (const DeltaRuleSequence& seq : sequences_of(x))
      for (int t = 0; t < seq.tokens; t++) position[size_t(seq.row * x.tokens + seq.first + t)] = t;
    in_proj.assign(P * d, Real(0));
    for (const Weight& w : weights()) std::copy_n(read(w.name, w.value), w.rows * d, &in_proj[w.first * d]);
    proj.resize(M * P);
    qkv.resize(M * size_t(shape.conv_channels()));
    rnorm.resize(M * 2 * size_t(shape.heads_k));
    g.resize(M * size_t(shape.heads_v)), beta = g, rstd = g;
    o.resize(M * size_t(shape.value_dim())), normed = o;
  }

  struct Weight {  // rows [first, first + rows) of in_proj
    const char* name;
    const void* value;
    void* gradient;
    size_t first, rows;
  };
  std::vector<Weight> weights() const {
    const size_t keys = size_t(shape.key_dim()), values = size_t(shape.value_dim()),
                 H = size_t(shape.heads_v);
    return {{"w_q", call.w_q, call.dw_q, 0, keys},
            {"w_k", call.w_k, call.dw_k, keys, keys},
            {"w_v", call.w_v, call.dw_v, 2 * keys, values},
            {"w_z", call.w_z, call.dw_z, size_t(shape.z_column()), values},
            {"w_a", call.w_a, call.dw_a, size_t(shape.a_column()), H},
            {"w_b", call.w_b, call.dw_b, size_t(shape.b_column()), H}};
  }

  void forward(Real* y) {
    const int M = shape.rows(), d = call.width;
    linear_forward(dev, proj.data(), read("h", call.h), in_proj.data(), M, shape.columns(), d);
    short_conv_forward(dev, qkv.data(), rnorm.data(), proj.data(), read("taps", call.taps),
                       static_cast<Real*>(nullptr), shape, position.data());
    gates_forward(dev, g.data(), beta.data(), proj.data(), read("A_log", call.A_log),
                  read("dt_bias", call.dt_bias), shape, Real(call.beta_max));
    delta_rule = delta_rule_call<Real>(qkv.data(), g.data(), beta.data(), shape, Real(call.scale));
    delta_rule.sequences = sequences_of(call);
    saved.resize(delta_rule.saved_size());
    delta_rule_forward(delta_rule, values_tensor(o.data(), shape), {}, saved.data());
    const int n = shape.head_dim_v;
    const Real* w_norm = read("w_norm", call.w_norm);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < int64_t(M) * shape.heads_v; i++) {
      rstd[size_t(i)] = reciprocal_size(&o[size_t(i * n)], n, call.norm_eps);
      output_norm_head(&normed[size_t(i * n)], &o[size_t(i * n)], z_of(i), w_norm, rstd[size_t(i)], n);
    }
    if (y) linear_forward(dev, y, normed.data(), read("w_o", call.w_o), M, d, shape.value_dim());
  }

  // z of head i % Hv of row i / Hv
  const Real* z_of(int64_t i) const {
    const int64_t row = i / shape.heads_v, head = i % shape.heads_v;
    return &proj[size_t(row * shape.columns() + shape.z_column() + head * shape.head_dim_v)];
  }

  void backward() {
    const int M = shape.rows(), d = call.width, values = shape.value_dim(), P = shape.columns();
    const Real *h = read("h", call.h), *dy = read("dy", call.dy), *w_o = read("w_o", call.w_o);
    std::vector<Real> d_normed(normed.size()), d_o(o.size()), dproj(proj.size()), dqkv(qkv.size()),
        dg(g.size()), dbeta(g.size());
    linear_backward_input(dev, d_normed.data(), dy, w_o, M, d, values);
    if (call.dw_o) {
      Real* to = static_cast<Real*>(call.dw_o);
      std::fill_n(to, size_t(d) * size_t(values), Real(0));
      linear_backward_weight(dev, to, dy, normed.data(), M, d, values);
    }
    std::vector<Real> dw_norm(size_t(shape.head_dim_v)), again(normed.size());
    output_norm_backward(dev, d_o.data(), dproj.data(), dw_norm.data(), again.data(), d_normed.data(),
                         o.data(), rstd.data(), proj.data(), read("w_norm", call.w_norm), shape, nullptr);
    delta_rule_backward(delta_rule, delta_rule_gradients(dqkv.data(), dg.data(), dbeta.data(), shape),
                        values_tensor<const Real>(d_o.data(), shape), {}, saved.data());
    std::vector<Real> dtaps(size_t(shape.conv_channels()) * kConvTaps), dA_log(size_t(shape.heads_v)),
        ddt_bias(size_t(shape.heads_v));
    short_conv_backward(dev, dproj.data(), dtaps.data(), dqkv.data(), rnorm.data(), proj.data(),
                        read("taps", call.taps), shape, nullptr, position.data());
    gates_backward(dev, dproj.data(), dA_log.data(), ddt_bias.data(), dg.data(), dbeta.data(), g.data(),
                   beta.data(), proj.data(), read("A_log", call.A_log), read("dt_bias", call.dt_bias), shape,
                   Real(call.beta_max), nullptr);
    put(call.dtaps, dtaps), put(call.dA_log, dA_log), put(call.ddt_bias, ddt_bias),
        put(call.dw_norm, dw_norm);
    if (call.dh)
      linear_backward_input(dev, static_cast<Real*>(call.dh), dproj.data(), in_proj.data(), M, P, d);
    std::vector<Real> d_in_proj(in_proj.size());
    linear_backward_weight(dev, d_in_proj.data(), dproj.data(), h, M, P, d);
    for (const Weight& w : weights())
      if (w.gradient)
        std::copy_n(&d_in_proj[w.first * size_t(d)], w.rows * size_t(d), static_cast<Real*>(w.gradient));
  }

  static void put(void* to, const std::vector<Real>& x) {
    if (to) std::copy_n(x.data(), x.size(), static_cast<Real*>(to));
  }
};

}  // namespace
}  // namespace gdn

// ---- the C functions

extern "C" {

#define GDN_API __attribute__((visibility("default")))

GDN_API const char* gdn_last_error(void) { return gdn::last_error.c_str(); }

GDN_API int gdn_has_cuda(void) {
#ifdef GDN_CUDA
  return 1;
#else
  return 0;
#endif
}

GDN_API int gdn_delta_rule_bytes(const gdn_delta_rule* x, size_t* saved, size_t* scratch) {
  return gdn::guarded(__func__, [&] {
    gdn::check_struct(x);
    gdn::present("saved", saved), gdn::present("scratch", scratch);
    if (x->device == GDN_ON_CUDA) return gdn::cuda_bytes(*x, saved, scratch);
    gdn::with_type(x->device, x->type, [&](auto real) {
      *saved = sizeof real * gdn::sized_call<decltype(real)>(*x).saved_size();
      *scratch = 0;
    });
  });
}

GDN_API int gdn_delta_rule_forward(const gdn_delta_rule* x) {
  return gdn::guarded(__func__, [&] {
    gdn::check_struct(x);
    if (x->device == GDN_ON_CUDA) return gdn::cuda_delta_rule(*x, gdn::Pass::forward);
    gdn::with_type(x->device, x->type, [&](auto real) {
      using Real = decltype(real);
      const auto call = gdn::delta_rule_of<Real>(*x);
      if (x->batch * x->tokens > 0) gdn::present("o", x->o);
      gdn::delta_rule_forward(call, gdn::strided<Real>(x->o), gdn::strided_state<Real>(x->final_state),
                              static_cast<Real*>(x->saved));
    });
  });
}

GDN_API int gdn_delta_rule_backward(const gdn_delta_rule* x) {
  return gdn::guarded(__func__, [&] {
    gdn::check_struct(x);
    if (x->device == GDN_ON_CUDA) return gdn::cuda_delta_rule(*x, gdn::Pass::backward);
    gdn::with_type(x->device, x->type, [&](auto real) {
      using Real = decltype(real);
      const auto call = gdn::delta_rule_of<Real>(*x);
      if (x->batch * x->tokens > 0) {
        gdn::present("d_o", x->d_o), gdn::present("saved", x->saved);
        gdn::present("dq", x->dq), gdn::present("dk", x->dk), gdn::present("dv", x->dv);
        gdn::present("dg", x->dg), gdn::present("dbeta", x->dbeta);
      }
      const gdn::DeltaRuleGradients<Real> to = {
          gdn::strided<Real>(x->dq),    gdn::strided<Real>(x->dk),
          gdn::strided<Real>(x->dv),    gdn::strided<Real>(x->dg),
          gdn::strided<Real>(x->dbeta), gdn::strided_state<Real>(x->d_initial_state)};
      gdn::delta_rule_backward(call, to, gdn::strided<const Real>(x->d_o),
                               gdn::strided_state<const Real>(x->d_final_state),
                               static_cast<const Real*>(x->saved));
    });
  });
}

GDN_API int gdn_delta_rule_recurrent(const gdn_delta_rule* x) {
  return gdn::guarded(__func__, [&] {
    gdn::check_struct(x);
    if (x->device == GDN_ON_CUDA) return gdn::cuda_delta_rule(*x, gdn::Pass::recurrent);
    gdn::with_type(x->device, x->type, [&](auto real) {
      using Real = decltype(real);
      const auto call = gdn::delta_rule_of<Real>(*x);
      if (x->batch * x->tokens > 0) gdn::present("o", x->o);
      gdn::delta_rule_recurrent(call, gdn::strided<Real>(x->o), gdn::strided_state<Real>(x->final_state));
    });
  });
}

GDN_API int gdn_short_conv_forward(const gdn_short_conv* x) {
  return gdn::on_cpu(__func__, x, [&](auto real) { gdn::convolve_forward<decltype(real)>(*x); });
}

GDN_API int gdn_short_conv_backward(const gdn_short_conv* x) {
  return gdn::on_cpu(__func__, x, [&](auto real) { gdn::convolve_backward<decltype(real)>(*x); });
}

GDN_API int gdn_gated_norm_forward(const gdn_gated_norm* x) {
  return gdn::on_cpu(__func__, x, [&](auto real) { gdn::gated_norm_forward<decltype(real)>(*x); });
}

GDN_API int gdn_gated_norm_backward(const gdn_gated_norm* x) {
  return gdn::on_cpu(__func__, x, [&](auto real) { gdn::gated_norm_backward<decltype(real)>(*x); });
}

GDN_API int gdn_mixer_forward(const gdn_mixer* x) {
  return gdn::on_cpu(__func__, x, [&](auto real) {
    using Real = decltype(real);
    gdn::present("y", x->y);
    gdn::Mixer<Real>(*x).forward(static_cast<Real*>(x->y));
  });
}

GDN_API int gdn_mixer_backward(const gdn_mixer* x) {
  return gdn::on_cpu(__func__, x, [&](auto real) {
    using Real = decltype(real);
    gdn::Mixer<Real> mixer(*x);
    mixer.forward(static_cast<Real*>(x->y));
    mixer.backward();
  });
}

}  // extern "C"
