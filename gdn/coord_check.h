// The coordinate check: how large activations, gradients and updates are after 0, 1, 2, 4 and 8 steps on one
// fixed batch. Over models of several widths these sizes tell whether a parametrization does what mup.h
// derives (Yang et al., arXiv 2203.03466, section D.1; here with the recurrent state and the gates of Liu,
// Gu, arXiv 2606.04048). The size of a vector v of n coordinates is its root mean square, |v| / n^1/2.
//
// Activations, one row of each per layer but the first and the last:
//   embedding                     rows of W_emb
//   q', k', v'                    after the convolution and silu, before q and k are scaled to length 1
//   a, b, alpha, beta             the gates' inputs, and the gates
//   S                             the recurrent state after the last token
//   o, o_normalized               the readout s S^T q, and behind its norm (before the output gate)
//   mixer, mlp, block             the two branches' outputs before (L0/L)^alpha, and the residual stream behind
//                                 them
//   logits                        of up to 256 tokens spread over the batch
// Also the root mean square of each one's change since step 0.
//
// Gradients "grad:NAME" and updates "update:NAME" of tensor NAME (the last part of its name in a checkpoint).
// An update's size is that of the change it makes in the tensor's output: (W_t - W_0) x, with today's input
// x, for matrices; for vectors, which multiply or add to their channel, the size of w_t - w_0 itself. W_emb
// as input is not among them: the embedding's change is its update. Where W_emb is the head too,
// "update:lm_head" is that of the logits of tokens that the batch does not have as input: the rows of the
// others were also moved as an embedding, by what h is not aligned with, which adds a part d^-1/2 (under SGD
// with embeddings of kBaseStd the larger one at d = 128 and 256) to the output's Theta(1). "grad:dt_bias" is
// the gradient at the gate's input a, summed over tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model.h"
#include "optimizer.h"

namespace gdn {

constexpr int kCoordSteps[] = {0, 1, 2, 4, 8};

// ---- What mup.h derives, as slopes of log(size) against log(d) -------------------------------------------
//
// The one table that test_coord_check.cpp and scripts/coord_check.py judge by: a slope may leave its range by
// the judge's tolerance. The derivation is for widths far above the number of tokens: in (W_t - W_0) x the
// update that token t made meets the input of another token s through x_t . x_s, of which d coordinates with
// independent signs make a part d^-1/2. With M tokens these parts add up to (M/d)^1/2 of the token's own, so
// that a batch of M > d tokens shows slopes down to -1/2 where the limit is 0.

struct SlopeRange {
  double low = NAN, high = NAN;  // NaN: not judged
};
struct ExpectedSlopes {
  SlopeRange rms, change;
};

// Slopes against L of models of one width, layers compared at the same share of the depth, for depth alpha 1 or 1/2
// (mup.h, section 7), while the embedding is most of the stream. Tensors in blocks change their output by
// rho^(alpha - 1), the others by Theta(1). The stream stays bounded; where the branches are as large as the
// embedding it falls as their sum does, rho^(1/2 - alpha). Its change is aligned over layers, Theta(1), but for a part
// with independent signs, rho^-1/2, which shows while L is small. Sizes inside a branch do not depend on L; how they
// change follows from the two and is not judged, nor are S, o and alpha, which are of a few heads' time scales, drawn
// anew in each layer.
inline ExpectedSlopes expected_depth_slopes(const std::string& activation, double alpha) {
  const SlopeRange none, constant = {0, 0};
  if (activation.rfind("grad:", 0) == 0 || activation == "S" || activation == "o" || activation == "alpha")
    return {none, none};
  if (activation == "update:lm_head" || activation == "update:norm") return {constant, none};
  if (activation.rfind("update:", 0) == 0) return {{alpha - 1, alpha - 1}, none};
  if (activation == "embedding") return {constant, constant};
  if (activation == "block") return {{0.5 - alpha, 0}, {-0.5, 0}};
  if (activation == "logits") return {constant, {-0.5, 0}};
  return {constant, none};
}

// A head's gates, what they are computed from, and the updates of their tensors.
inline bool of_gates(const std::string& activation) {
  for (const char* name :
       {"a", "b", "alpha", "beta", "update:a_proj", "update:b_proj", "update:A_log", "update:dt_bias"})
    if (activation == name) return true;
  return false;
}

inline ExpectedSlopes expected_slopes(const std::string& activation, int layer, int step,
                                      bool fixed_head_size, GateRule gates, OptimizerKind optimizer) {
  const bool is_gradient = activation.rfind("grad:", 0) == 0, is_update = activation.rfind("update:", 0) == 0;
  const double half_dk = fixed_head_size ? 0 : 0.5;  // the slope of dk^1/2
  if (is_gradient) return {};
  // Gates as output weights (-gates output, aligned: mup_research.h), with a number of heads that does not
  // grow: a and b start at d^-1/2, as logits do, and change by Theta(1) through their own weights, by d^-1/2
  // through their input. With the learning rate of aligned signs SGD moves their weights by Theta(1) where
  // the signs are aligned indeed, by d^-1/2 where they are not yet.
  if (gates != GateRule::independent && !fixed_head_size && of_gates(activation)) {
    const SlopeRange falls = {-0.5, 0}, stays = {0, 0};
    if (is_update) return {gates == GateRule::aligned && optimizer == OptimizerKind::sgd ? falls : stays, {}};
    return {activation == "a" || activation == "b" ? falls : stays, falls};
  }
  if (is_update) return {{0, 0}, {}};  // (ii) of mup.h
  // k has coordinates dk^-1/2, and so have the writes k u^T
  if (activation == "S") return {{-half_dk, -half_dk}, {-half_dk, -half_dk}};
  // s S^T q is Theta(1) while q and the keys are independent, and dk^1/2 once they are aligned. At step 0
  // they are independent but for the mean of silu (measured: 0.1).
  if (activation == "o") return {{0, step == 0 ? half_dk / 5 : half_dk}, {0, half_dk}};
  // Start at d^-1/2 where h and the rows of W_emb do not align. Their change is ΔW h, Theta(1)
  // (update:lm_head), and W Δh, which is d^-1/2 until W and h are aligned.
  if (activation == "logits") return {{-0.5, 0}, {-0.5, 0}};
  // The same alignment moves q . k from dk^-1/2 to Theta(1): while that is small against its final size, the
  // normalized o, and all that hears of it, change by dk^1/2 times the step; the norm ends that.
  const bool hears_of_o = layer > 0 || activation == "o_normalized" || activation == "mixer" ||
                          activation == "mlp" || activation == "block";
  return {{0, 0}, {0, hears_of_o ? half_dk : 0}};
}

// ---- Measuring --------------------------------------------------------------------------------------------

struct CoordRow {
  int step = 0, layer = -1;  // layer -1: of no layer
  std::string activation;
  double rms = 0, change = NAN;  // change since step 0; NaN: not of this row
};

inline double root_mean_square(const std::vector<float>& v) {
  double sum = 0;
  for (const float x : v) sum += double(x) * double(x);
  return v.empty() ? 0 : std::sqrt(sum / double(v.size()));
}

// Takes the sizes of one model. It needs the model's activations of layer() and the layers themselves: what a
// training model shares between layers or computes again is computed here, into memory of its own.
template <class Device>
class CoordProbe {
 public:
  using real = typename Device::real;
  using act = typename Device::act;

  // For a batch of `batch` sequences of `length` tokens, `tokens` [B,T]. W_0 are the parameters' values now.
  CoordProbe(Parameters<Device>& parameters, int batch, int length, const std::vector<int32_t>& tokens)
      : p_(parameters),
        dev_(parameters.dev),
        config_(parameters.config),
        shape_(config_.mixer_shape(batch, length)),
        start_(download(parameters.master(), parameters.table.size)) {
    const size_t M = shape_.rows(), d = config_.width, I = config_.mlp_size, V = config_.padded_vocab;
    const size_t columns = shape_.columns(), values = shape_.value_dim();
    constexpr int kMostLogitRows = 256;
    const std::set<int32_t> inputs(tokens.begin(), tokens.end());
    for (int v = 0; v < config_.vocab; v++)
      if (!config_.tied || inputs.count(v) == 0) pure_outputs_.push_back(v);
    for (int i = 0; i < std::min(shape_.rows(), kMostLogitRows); i++)
      logit_rows_.push_back(int(int64_t(i) * shape_.rows() / std::min(shape_.rows(), kMostLogitRows)));
    const size_t sampled = logit_rows_.size(), largest = std::max({columns, values, 2 * I, V}) * d;
    x_ = activations(M * d);
    h_ = activations(M * d);
    branch_ = activations(M * d);
    value_ = activations(M * values);
    inner_ = activations(M * I);
    sample_ = activations(sampled * d);
    out_ = activations(std::max(M * std::max({columns, 2 * I, d}), sampled * V));
    change_ = statistics(largest);
    rounded_change_ = activations(largest);
    rstd_ = statistics(M * config_.heads_v);
    state_ = statistics(size_t(batch) * config_.heads_v * config_.head_dim_k * config_.head_dim_v);
  }

  // Appends the sizes of the activations of the model's last forward and, but at step 0, of the updates so
  // far. Call it first at step 0, which the changes refer to.
  void activations_and_updates(int step, const Model<Device>& model, std::vector<CoordRow>& rows) {
    step_ = step;
    rows_ = &rows;
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size, L = config_.layers;
    const ParameterTable& table = p_.table;
    record(-1, "embedding", download(model.layer(0).x_in, size_t(M) * d));
    rmsnorm_forward(dev_, h_.get(), rstd_.get(), model.layer(0).x_in, p_.master(table.layers[0].attn_norm), M,
                    d);
    for (int l = 0; l < L; l++) {
      const LayerOffsets& w = table.layers[l];
      const typename Model<Device>::LayerActivations& a = model.layer(l);
      update(l, {"q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj"},
             {shape_.key_dim(), shape_.key_dim(), shape_.value_dim(), shape_.value_dim(), config_.heads_v,
              config_.heads_v},
             w.in_proj, h_.get(), M, shape_.columns(), d);
      mixer(l, a);
      output_norm_forward(dev_, value_.get(), rstd_.get(), a.o, a.proj, p_.master(w.o_norm), shape_);
      linear_forward(dev_, branch_.get(), value_.get(), p_.weights(w.o_proj), M, d, shape_.value_dim());
      record(l, "mixer", download(branch_.get(), size_t(M) * d));
      update(l, {"o_proj"}, {d}, w.o_proj, value_.get(), M, d, shape_.value_dim());

      rmsnorm_forward(dev_, h_.get(), rstd_.get(), a.x_mid, p_.master(w.mlp_norm), M, d);
      swiglu_forward(dev_, inner_.get(), a.gate_up, M, I);
      linear_forward(dev_, branch_.get(), inner_.get(), p_.weights(w.down), M, d, I);
      record(l, "mlp", download(branch_.get(), size_t(M) * d));
      linear_forward(dev_, branch_.get(), inner_.get(), p_.weights(w.down), M, d, I,
                     real(residual_scale(config_.mup())));
      update(l, {"gate_proj", "up_proj"}, {I, I}, w.gate_up, h_.get(), M, 2 * I, d);
      update(l, {"down_proj"}, {d}, w.down, inner_.get(), M, d, I);

      const size_t next_norm = l + 1 < L ? table.layers[l + 1].attn_norm : table.final_norm;
      residual_rmsnorm_forward(dev_, x_.get(), h_.get(), rstd_.get(), a.x_mid, branch_.get(),
                               p_.master(next_norm), M, d);
      record(l, "block", download(x_.get(), size_t(M) * d));
    }
    logits();
    if (step_ > 0)
      for (const Tensor& t : table.tensors)
        if (is_vector(t)) {
          std::vector<float> now = download(p_.master(t.offset), t.size);
          for (size_t i = 0; i < t.size; i++) now[i] -= start_[t.offset + i];
          rows_->push_back({step_, layer_of(t), "update:" + short_name(t), root_mean_square(now)});
        }
  }

  // Appends the sizes of the gradients that lie in the parameters' arena.
  void gradients(int step, std::vector<CoordRow>& rows) {
    for (const Tensor& t : p_.table.tensors)
      rows.push_back({step, layer_of(t), "grad:" + short_name(t),
                      root_mean_square(download(p_.gradients(t.offset), t.size))});
  }

 private:
  static constexpr const char* kRemedy = "lower -B (sequences in the check's batch)";

  Buffer<Device, act> activations(size_t n) { return {dev_, n, "coordinate check", kRemedy}; }
  Buffer<Device, real> statistics(size_t n) { return {dev_, n, "coordinate check", kRemedy}; }

  template <class T>
  std::vector<T> raw(const T* data, size_t n) {
    std::vector<T> host(n);
    dev_.download(host.data(), data, n * sizeof(T));
    return host;
  }
  template <class T>
  std::vector<float> download(const T* data, size_t n) {
    const std::vector<T> host = raw(data, n);
    std::vector<float> values(n);
    std::transform(host.begin(), host.end(), values.begin(), [](T x) { return float(x); });
    return values;
  }

  // Columns [first, first + count) of a matrix with `stride` columns.
  static std::vector<float> columns(const std::vector<float>& matrix, int stride, int first, int count) {
    std::vector<float> part;
    part.reserve(matrix.size() / stride * count);
    for (size_t row = 0; row < matrix.size(); row += stride)
      part.insert(part.end(), matrix.begin() + row + first, matrix.begin() + row + first + count);
    return part;
  }

  static bool is_vector(const Tensor& t) {
    return t.cls == TensorClass::conv || t.cls == TensorClass::gate_scalar || t.cls == TensorClass::gain ||
           t.cls == TensorClass::output_gain || t.cls == TensorClass::final_gain;
  }
  // "model.layers.3.attn.q_proj.weight": layer 3, "q_proj"
  static int layer_of(const Tensor& t) {
    const std::string start = "model.layers.";
    return t.name.rfind(start, 0) == 0 ? std::stoi(t.name.substr(start.size())) : -1;
  }
  static std::string short_name(const Tensor& t) {
    std::string name = t.name;
    const std::string ending = ".weight";
    if (name.size() > ending.size() && name.compare(name.size() - ending.size(), ending.size(), ending) == 0)
      name.resize(name.size() - ending.size());
    return name.substr(name.rfind('.') + 1);
  }

  void record(int layer, const std::string& activation, std::vector<float> now) {
    CoordRow row{step_, layer, activation, root_mean_square(now), 0};
    std::vector<float>& first = first_[{layer, activation}];
    if (step_ == 0) {
      first = std::move(now);
    } else {
      for (size_t i = 0; i < now.size(); i++) now[i] -= first[i];
      row.change = root_mean_square(now);
    }
    rows_->push_back(row);
  }

  // What lies between the mixer's projections and its output norm.
  void mixer(int l, const typename Model<Device>::LayerActivations& a) {
    const int M = shape_.rows(), Hk = shape_.heads_k, Hv = shape_.heads_v, dk = shape_.head_dim_k,
              dv = shape_.head_dim_v, keys = shape_.key_dim(), values = shape_.value_dim();
    const std::vector<float> proj = download(a.proj, size_t(M) * shape_.columns());
    record(l, "a", columns(proj, shape_.columns(), shape_.a_column(), Hv));
    record(l, "b", columns(proj, shape_.columns(), shape_.b_column(), Hv));
    const std::vector<float> qkv = download(a.qkv, size_t(M) * shape_.conv_channels());
    const std::vector<float> rnorm = download(a.rnorm, size_t(M) * 2 * Hk);
    for (const int which : {0, 1}) {  // q = q' rnorm, k = k' rnorm
      std::vector<float> x = columns(qkv, shape_.conv_channels(), which * keys, keys);
      for (int m = 0; m < M; m++)
        for (int c = 0; c < keys; c++)
          x[size_t(m) * keys + c] /= rnorm[size_t(m) * 2 * Hk + which * Hk + c / dk];
      record(l, which ? "k'" : "q'", std::move(x));
    }
    record(l, "v'", columns(qkv, shape_.conv_channels(), 2 * keys, values));
    std::vector<float> alpha = download(a.g, size_t(M) * Hv);
    for (float& x : alpha) x = std::exp(x);
    record(l, "alpha", std::move(alpha));
    record(l, "beta", download(a.beta, size_t(M) * Hv));
    state_.zero();
    gated_delta_rule_recurrent(dev_, value_.get(), state_.get(), a.qkv, a.g, a.beta, shape_,
                               real(config_.readout_scale()));
    record(l, "S", download(state_.get(), state_.size()));
    std::vector<float> o = download(a.o, size_t(M) * values);
    record(l, "o", o);
    output_norm_forward(dev_, value_.get(), rstd_.get(), a.o, a.proj, p_.master(p_.table.layers[l].o_norm),
                        shape_);
    const std::vector<float> rstd = download(rstd_.get(), size_t(M) * Hv);
    const std::vector<float> gain = download(p_.master(p_.table.layers[l].o_norm), dv);
    for (size_t i = 0; i < o.size(); i++) o[i] *= rstd[i / dv] * gain[i % dv];
    record(l, "o_normalized", std::move(o));
  }

  // h_ is the final norm's output.
  void logits() {
    const int d = config_.width, V = config_.padded_vocab, rows = int(logit_rows_.size());
    const std::vector<act> h = raw(h_.get(), size_t(shape_.rows()) * d);
    std::vector<act> sampled;
    for (const int m : logit_rows_)
      sampled.insert(sampled.end(), h.begin() + size_t(m) * d, h.begin() + size_t(m + 1) * d);
    dev_.upload(sample_.get(), sampled.data(), sampled.size() * sizeof(act));
    const real scale = real(logit_scale(config_.mup()));
    linear_forward(dev_, out_.get(), sample_.get(), p_.weights(p_.table.lm_head), rows, V, d, scale);
    record(-1, "logits", columns(download(out_.get(), size_t(rows) * V), V, 0, config_.vocab));
    if (step_ == 0 || pure_outputs_.empty()) return;
    const std::vector<float> y = output_change(p_.table.lm_head, sample_.get(), rows, V, d, scale);
    std::vector<float> pure;
    for (int row = 0; row < rows; row++)
      for (const int v : pure_outputs_) pure.push_back(y[size_t(row) * V + v]);
    rows_->push_back({step_, -1, "update:lm_head", root_mean_square(pure)});
  }

  // scale (W_t - W_0) x^T of the matrix [out,in] at `offset`, as [rows,out], for inputs x [rows,in].
  std::vector<float> output_change(size_t offset, const act* x, int rows, int out, int in, real scale = 1) {
    const size_t n = size_t(out) * in;
    std::vector<real> change = raw(p_.master(offset), n);
    for (size_t i = 0; i < n; i++) change[i] -= start_[offset + i];
    dev_.upload(change_.get(), change.data(), n * sizeof(real));
    round_weights(dev_, rounded_change_.get(), change_.get(), n);
    linear_forward(dev_, out_.get(), x, rounded_change_.get(), rows, out, in, scale);
    return download(out_.get(), size_t(rows) * out);
  }

  // The change that the tensors `names`, which stand behind each other as rows of one matrix [out,in] at
  // `offset` and have `sizes` rows each, make in their outputs for inputs x [rows,in].
  void update(int layer, const std::vector<std::string>& names, const std::vector<int>& sizes, size_t offset,
              const act* x, int rows, int out, int in) {
    if (step_ == 0) return;
    const std::vector<float> y = output_change(offset, x, rows, out, in);
    int first = 0;
    for (size_t i = 0; i < names.size(); first += sizes[i++])
      rows_->push_back(
          {step_, layer, "update:" + names[i], root_mean_square(columns(y, out, first, sizes[i]))});
  }

  Parameters<Device>& p_;
  Device& dev_;
  const ModelConfig config_;
  const MixerShape shape_;
  const std::vector<float> start_;                                   // W_0
  std::map<std::pair<int, std::string>, std::vector<float>> first_;  // activations at step 0
  std::vector<int> logit_rows_;
  std::vector<int> pure_outputs_;  // tokens whose row of the head has moved as an output alone
  Buffer<Device, act> x_, h_, branch_, value_, inner_, sample_, out_, rounded_change_;
  Buffer<Device, real> change_, rstd_, state_;
  int step_ = 0;
  std::vector<CoordRow>* rows_ = nullptr;
};

// Trains a model on one batch, tokens and targets [B,T] on the host, at a constant learning rate, and returns
// the sizes at kCoordSteps. `start` gives the parameters their first values: without it they come from the
// seed. Throws one line when the loss or the gradient is not finite.
template <class Device>
std::vector<CoordRow> coordinate_check(Device& dev, const ModelConfig& config,
                                       const OptimizerConfig& optimizer_config, double learning_rate,
                                       uint64_t seed, const std::vector<int32_t>& tokens,
                                       const std::vector<int32_t>& targets, int batch, int length,
                                       int last_step = kCoordSteps[std::size(kCoordSteps) - 1],
                                       const std::function<void(Parameters<Device>&)>& start = {}) {
  Parameters<Device> parameters(dev, config);
  parameters.allocate_gradients();
  if (start)
    start(parameters);
  else
    parameters.initialize(seed);
  Optimizer<Device> optimizer(parameters, optimizer_config);
  Model<Device> model(parameters, batch, length, Use::training);
  CoordProbe<Device> probe(parameters, batch, length, tokens);
  std::vector<CoordRow> rows;
  const auto require_finite = [&](int step, const char* what, double x) {
    if (!std::isfinite(x))
      throw std::runtime_error("-coord_check at width " + std::to_string(config.width) + ": after " +
                               std::to_string(step) + " steps the " + what + " is not finite; lower -lr");
  };
  for (int step = 0; step <= last_step; step++) {
    const bool due = std::find(std::begin(kCoordSteps), std::end(kCoordSteps), step) != std::end(kCoordSteps);
    if (due) {
      model.forward_loss(tokens.data(), targets.data(), batch, length);
      probe.activations_and_updates(step, model, rows);
    }
    parameters.zero_gradients();
    model.forward_backward(tokens.data(), targets.data(), batch, length,
                           float(1.0 / (double(batch) * length)));
    require_finite(step, "loss", model.loss_sum());
    if (due) probe.gradients(step, rows);
    if (step < last_step) require_finite(step, "gradient", optimizer.step(step + 1, learning_rate));
  }
  return rows;
}

// Writes the rows as CSV to the file `path`, to standard output where that is empty; a field that a row does
// not have stays empty. Throws one line when the file cannot be written.
inline void write_coord_rows(const std::string& path, const std::vector<CoordRow>& rows,
                             const ModelConfig& config, OptimizerKind optimizer, uint64_t seed) {
  const auto number = [](double x) {
    char text[32] = "";
    if (!std::isnan(x)) std::snprintf(text, sizeof text, "%.6g", x);
    return std::string(text);
  };
  std::string csv =
      "param,optimizer,growth,width,layers,depth_alpha,seed,step,layer,activation,rms,rms_change_since_step_"
      "0,"
      "rms_slope_min,rms_slope_max,change_slope_min,change_slope_max,"
      "rms_depth_slope_min,rms_depth_slope_max,change_depth_slope_min,change_depth_slope_max\n";
  const std::string start = std::string(name(config.parametrization)) + "," + name(optimizer) + "," +
                            (config.fixed_head_size ? "heads" : "head_dim") + "," +
                            std::to_string(config.width) + "," + std::to_string(config.layers) + "," +
                            name(config.depth) + "," + std::to_string(seed) + ",";
  for (const CoordRow& row : rows) {
    const ExpectedSlopes e =
        expected_slopes(row.activation, row.layer, row.step, config.fixed_head_size, config.gates, optimizer);
    const ExpectedSlopes of_depth = expected_depth_slopes(row.activation, depth_alpha(config.mup()));
    csv += start + std::to_string(row.step) + "," + (row.layer < 0 ? "" : std::to_string(row.layer)) + "," +
           row.activation + "," + number(row.rms) + "," + number(row.change) + "," + number(e.rms.low) + "," +
           number(e.rms.high) + "," + number(e.change.low) + "," + number(e.change.high) + "," +
           number(of_depth.rms.low) + "," + number(of_depth.rms.high) + "," + number(of_depth.change.low) +
           "," + number(of_depth.change.high) + "\n";
  }
  std::FILE* file = path.empty() ? stdout : std::fopen(path.c_str(), "w");
  bool good = file && std::fwrite(csv.data(), 1, csv.size(), file) == csv.size() && std::fflush(file) == 0;
  if (file && !path.empty()) good = std::fclose(file) == 0 && good;
  if (!good)
    throw std::runtime_error((path.empty() ? "standard output" : "-o " + path) +
                             ": cannot be written, expected a place for a CSV file");
}

}  // namespace gdn
