// A Gated Delta Network's forward and backward, written once over the device type: a list of layer calls that
// reads like the equations (Yang et al., arXiv 2412.06464; constants of Liu, Gu, arXiv 2606.04048, from
// mup.h).
//
//   x = embedding(tokens)
//   each layer:   x = x + mixer(rmsnorm(x));   x = x + mlp(rmsnorm(x))
//   loss = cross_entropy(logit_scale * rmsnorm(x) w_emb^T, targets)
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "parameters.h"

namespace gdn {

// Rows in ascending order of their token, ties in ascending order of row: what embedding_backward walks.
inline void sort_rows_by_token(int32_t* order, const int32_t* tokens, int rows, int vocab) {
  std::vector<int32_t> start(size_t(vocab) + 1);
  for (int m = 0; m < rows; m++) start[size_t(tokens[m]) + 1]++;
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int m = 0; m < rows; m++) order[start[size_t(tokens[m])]++] = m;
}

// What the recurrent form carries from token to token: per layer the last inputs of the short convolution
// [B,3,conv_channels] and the state [B,Hv,dk,dv]; its size does not depend on how many tokens came before.
template <class Device>
struct RecurrentState {
  RecurrentState(Device& dev, const ModelConfig& config, int batch) {
    const MixerShape shape = config.mixer_shape(batch, 1);
    for (int l = 0; l < config.layers; l++) {
      history.emplace_back(dev, size_t(batch) * (kConvTaps - 1) * shape.conv_channels(),
                           "convolution history");
      state.emplace_back(dev, size_t(batch) * shape.heads_v * shape.head_dim_k * shape.head_dim_v,
                         "recurrent state");
    }
    reset();
  }
  void reset() {
    for (auto& h : history) h.zero();
    for (auto& s : state) s.zero();
  }
  std::vector<Buffer<Device, typename Device::act>> history;
  std::vector<Buffer<Device, typename Device::real>> state;
};

enum class Use { training, inference };

// One model on one device for batches of up to `batch` sequences of `tokens` tokens, with all its
// activations.
template <class Device>
class Model {
 public:
  using real = typename Device::real;
  using act = typename Device::act;

  // What one layer's forward keeps for its backward.
  struct LayerActivations {
    Buffer<Device, act> x_in, h_attn, proj, qkv, o, y, x_mid, h_mlp, gate_up, swiglu;
    Buffer<Device, real> attn_rstd, rnorm, g, beta, o_rstd, mlp_rstd;
    Buffer<Device, unsigned char> delta_rule;  // what gated_delta_rule_forward saves
  };

  // In inference all layers share one set of activations and there is no backward.
  Model(Parameters<Device>& parameters, int batch, int tokens, Use use)
      : p_(parameters),
        dev_(parameters.dev),
        config_(parameters.config),
        shape_(config_.mixer_shape(batch, tokens)),
        max_rows_(shape_.rows()),
        logit_scale_(real(logit_scale(config_.mup()))),
        readout_scale_(real(readout_scale(config_.mup()))) {
    const size_t M = max_rows_, d = config_.width, I = config_.mlp_size, values = shape_.value_dim();
    const bool training = use == Use::training;
    layers_.resize(training ? config_.layers : 1);
    for (LayerActivations& a : layers_) {
      for (auto* x : {&a.x_in, &a.h_attn, &a.x_mid, &a.h_mlp}) *x = activations(M * d);
      a.proj = activations(M * shape_.columns());
      a.qkv = activations(M * shape_.conv_channels());
      a.o = activations(M * values);
      a.y = activations(M * values);
      a.gate_up = activations(M * 2 * I);
      a.swiglu = activations(M * I);
      a.attn_rstd = statistics(M);
      a.mlp_rstd = statistics(M);
      a.rnorm = statistics(M * 2 * config_.heads_k);
      for (auto* x : {&a.g, &a.beta, &a.o_rstd}) *x = statistics(M * config_.heads_v);
      a.delta_rule = bytes(gated_delta_rule_saved_bytes(dev_, shape_));
    }
    tokens_ = Buffer<Device, int32_t>(dev_, M, "tokens");
    targets_ = Buffer<Device, int32_t>(dev_, M, "targets");
    losses_ = statistics(M);
    loss_sum_ = statistics(1);
    branch_ = activations(M * d);
    x_out_ = activations(M * d);
    h_out_ = activations(M * d);
    out_rstd_ = statistics(M);
    // Logits in chunks of rows: at most 2^27 of them at a time (256 MiB in bf16), and never fewer than 64
    // rows.
    logit_rows_ = std::min<size_t>(M, std::max<size_t>(64, (size_t(1) << 27) / config_.padded_vocab));
    logits_ = activations(logit_rows_ * config_.padded_vocab);
    size_t scratch = gated_delta_rule_scratch_bytes(dev_, shape_);
    if (training) {
      order_ = Buffer<Device, int32_t>(dev_, M, "token order");
      dx_ = activations(M * d);
      dh_ = activations(M * d);
      dproj_ = activations(M * shape_.columns());
      dqkv_ = activations(M * shape_.conv_channels());
      d_o_ = activations(M * values);
      dy_ = activations(M * values);
      dgate_up_ = activations(M * 2 * I);
      dswiglu_ = activations(M * I);
      dg_ = statistics(M * config_.heads_v);
      dbeta_ = statistics(M * config_.heads_v);
      for (size_t need :
           {embedding_backward_scratch_bytes(dev_, int(M), int(d)),
            rmsnorm_backward_scratch_bytes(dev_, int(M), int(d)),
            short_conv_backward_scratch_bytes(dev_, shape_), gates_backward_scratch_bytes(dev_, shape_),
            output_norm_backward_scratch_bytes(dev_, shape_)})
        scratch = std::max(scratch, need);
    }
    scratch_ = bytes(scratch);
  }

  // Adds the gradient of loss_weight * (sum of the tokens' losses) to the parameters' gradients and returns
  // nothing: read the loss with loss_sum() when it is needed. tokens, targets [B,T] on the host.
  void forward_backward(const int32_t* tokens, const int32_t* targets, int batch, int length,
                        float loss_weight) {
    forward(tokens, batch, length, nullptr);
    upload_targets(targets);
    classify(loss_weight);
    backward(tokens);
  }

  // The sum of the tokens' losses, in nats, without gradients.
  void forward_loss(const int32_t* tokens, const int32_t* targets, int batch, int length) {
    forward(tokens, batch, length, nullptr);
    upload_targets(targets);
    classify(0);
  }

  // Sum over the last call's tokens of -ln p(target). Waits for the device.
  double loss_sum() {
    real sum = 0;
    dev_.download(&sum, loss_sum_.get(), sizeof(sum));
    return double(sum);
  }

  // Feeds tokens [B,T] (host) in the recurrent form, from and into `state`; logits [B,padded_vocab] (host) of
  // the last token of each sequence.
  void decode(const int32_t* tokens, int batch, int length, RecurrentState<Device>& state,
              std::vector<real>& logits) {
    forward(tokens, batch, length, &state);
    const int d = config_.width, V = config_.padded_vocab;
    if (logit_rows_ < size_t(batch)) throw std::logic_error("decode: more sequences than rows of logits");
    std::vector<act> row(V);
    logits.resize(size_t(batch) * V);
    for (int b = 0; b < batch; b++)
      linear_forward(dev_, logits_.get() + size_t(b) * V, h_out_.get() + (size_t(b + 1) * length - 1) * d,
                     p_.weights(p_.table.lm_head), 1, V, d, logit_scale_);
    for (int b = 0; b < batch; b++) {
      dev_.download(row.data(), logits_.get() + size_t(b) * V, V * sizeof(act));
      for (int v = 0; v < V; v++) logits[size_t(b) * V + v] = real(float_or_double(row[v]));
    }
  }

  const MixerShape& shape() const { return shape_; }
  const LayerActivations& layer(int l) const { return layers_[layers_.size() == 1 ? 0 : l]; }

 private:
  // a bf16 number has no implicit conversion to double in every context; float and double pass through
  static float float_or_double(float x) { return x; }
  static double float_or_double(double x) { return x; }

  Buffer<Device, act> activations(size_t n) { return {dev_, n, "activations"}; }
  Buffer<Device, real> statistics(size_t n) { return {dev_, n, "statistics"}; }
  Buffer<Device, unsigned char> bytes(size_t n) { return {dev_, n, "work space"}; }
  LayerActivations& at(int l) { return layers_[layers_.size() == 1 ? 0 : l]; }

  void upload_targets(const int32_t* targets) {
    dev_.upload(targets_.get(), targets, size_t(shape_.rows()) * sizeof(int32_t));
  }

  // With a state the mixers run token by token from it and leave it after the last token; else in chunks from
  // zero.
  void forward(const int32_t* tokens, int batch, int length, RecurrentState<Device>* state) {
    if (batch * length > max_rows_ || batch < 1 || length < 1)
      throw std::logic_error("Model: a batch of " + std::to_string(batch) + " x " + std::to_string(length) +
                             " tokens in a model made for " + std::to_string(max_rows_));
    shape_.batch = batch;
    shape_.tokens = length;
    const int M = shape_.rows(), d = config_.width;
    dev_.upload(tokens_.get(), tokens, size_t(M) * sizeof(int32_t));
    Range<Device> range(dev_, "forward");
    {
      Range<Device> r(dev_, "embedding");
      embedding_forward(dev_, at(0).x_in.get(), p_.weights(p_.table.embedding), tokens_.get(), M, d);
    }
    for (int l = 0; l < config_.layers; l++) {
      mixer_forward(l, state);
      mlp_forward(l);
    }
    Range<Device> r(dev_, "final norm");
    residual_rmsnorm_forward(dev_, x_out_.get(), h_out_.get(), out_rstd_.get(),
                             at(config_.layers - 1).x_mid.get(), branch_.get(),
                             p_.master(p_.table.final_norm), M, d);
  }

  // x_in = x_mid of the layer before + its mlp's output;  branch = mixer(rmsnorm(x_in))
  void mixer_forward(int l, RecurrentState<Device>* state) {
    Range<Device> range(dev_, "mixer forward");
    const LayerOffsets& w = p_.table.layers[l];
    LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width;
    if (l == 0)
      rmsnorm_forward(dev_, a.h_attn.get(), a.attn_rstd.get(), a.x_in.get(), p_.master(w.attn_norm), M, d);
    else
      residual_rmsnorm_forward(dev_, a.x_in.get(), a.h_attn.get(), a.attn_rstd.get(), at(l - 1).x_mid.get(),
                               branch_.get(), p_.master(w.attn_norm), M, d);
    linear_forward(dev_, a.proj.get(), a.h_attn.get(), p_.weights(w.in_proj), M, shape_.columns(), d);
    short_conv_forward(dev_, a.qkv.get(), a.rnorm.get(), a.proj.get(), p_.master(w.taps),
                       state ? state->history[l].get() : nullptr, shape_);
    gates_forward(dev_, a.g.get(), a.beta.get(), a.proj.get(), p_.master(w.A_log), p_.master(w.dt_bias),
                  shape_, real(config_.beta_max()));
    {
      Range<Device> r(dev_, "gated delta rule");
      if (state)
        gated_delta_rule_recurrent(dev_, a.o.get(), state->state[l].get(), a.qkv.get(), a.g.get(),
                                   a.beta.get(), shape_, readout_scale_);
      else
        gated_delta_rule_forward(dev_, a.o.get(), a.delta_rule.get(), a.qkv.get(), a.g.get(), a.beta.get(),
                                 shape_, readout_scale_, scratch_.get());
    }
    output_norm_forward(dev_, a.y.get(), a.o_rstd.get(), a.o.get(), a.proj.get(), p_.master(w.o_norm),
                        shape_);
    linear_forward(dev_, branch_.get(), a.y.get(), p_.weights(w.o_proj), M, d, shape_.value_dim());
  }

  // x_mid = x_in + the mixer's output;  branch = mlp(rmsnorm(x_mid))
  void mlp_forward(int l) {
    Range<Device> range(dev_, "mlp forward");
    const LayerOffsets& w = p_.table.layers[l];
    LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    residual_rmsnorm_forward(dev_, a.x_mid.get(), a.h_mlp.get(), a.mlp_rstd.get(), a.x_in.get(),
                             branch_.get(), p_.master(w.mlp_norm), M, d);
    linear_forward(dev_, a.gate_up.get(), a.h_mlp.get(), p_.weights(w.gate_up), M, 2 * I, d);
    swiglu_forward(dev_, a.swiglu.get(), a.gate_up.get(), M, I);
    linear_forward(dev_, branch_.get(), a.swiglu.get(), p_.weights(w.down), M, d, I);
  }

  // Logits, losses and, where loss_weight != 0, dh of the final norm and the head's weight gradient, in row
  // chunks.
  void classify(float loss_weight) {
    Range<Device> range(dev_, "classifier");
    const int M = shape_.rows(), d = config_.width, V = config_.padded_vocab;
    const size_t head = p_.table.lm_head;
    for (int first = 0; first < M; first += int(logit_rows_)) {
      const int rows = std::min(int(logit_rows_), M - first);
      const act* h = h_out_.get() + size_t(first) * d;
      linear_forward(dev_, logits_.get(), h, p_.weights(head), rows, V, d, logit_scale_);
      softmax_cross_entropy(dev_, logits_.get(), losses_.get() + first, targets_.get() + first, rows,
                            config_.vocab, V, real(loss_weight));
      if (loss_weight == 0) continue;
      linear_backward_input(dev_, dh_.get() + size_t(first) * d, logits_.get(), p_.weights(head), rows, V, d,
                            logit_scale_);
      linear_backward_weight(dev_, p_.gradients(head), logits_.get(), h, rows, V, d, logit_scale_);
    }
    sum_losses(dev_, loss_sum_.get(), losses_.get(), M);
  }

  // dx_ is the gradient of the residual stream; each branch adds its own on the way down.
  void backward(const int32_t* tokens) {
    Range<Device> range(dev_, "backward");
    const int M = shape_.rows(), d = config_.width;
    dev_.zero(dx_.get(), size_t(M) * d * sizeof(act));
    rmsnorm_backward(dev_, dx_.get(), p_.gradients(p_.table.final_norm), dh_.get(), x_out_.get(),
                     out_rstd_.get(), p_.master(p_.table.final_norm), M, d, scratch_.get());
    for (int l = config_.layers - 1; l >= 0; l--) {
      mlp_backward(l);
      mixer_backward(l);
    }
    Range<Device> r(dev_, "embedding backward");
    host_order_.resize(M);
    sort_rows_by_token(host_order_.data(), tokens, M, config_.padded_vocab);
    dev_.upload(order_.get(), host_order_.data(), size_t(M) * sizeof(int32_t));
    embedding_backward(dev_, p_.gradients(p_.table.embedding), dx_.get(), tokens_.get(), order_.get(), M, d,
                       scratch_.get());
  }

  void mlp_backward(int l) {
    Range<Device> range(dev_, "mlp backward");
    const LayerOffsets& w = p_.table.layers[l];
    LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    linear_backward_weight(dev_, p_.gradients(w.down), dx_.get(), a.swiglu.get(), M, d, I);
    linear_backward_input(dev_, dswiglu_.get(), dx_.get(), p_.weights(w.down), M, d, I);
    swiglu_backward(dev_, dgate_up_.get(), dswiglu_.get(), a.gate_up.get(), M, I);
    linear_backward_weight(dev_, p_.gradients(w.gate_up), dgate_up_.get(), a.h_mlp.get(), M, 2 * I, d);
    linear_backward_input(dev_, dh_.get(), dgate_up_.get(), p_.weights(w.gate_up), M, 2 * I, d);
    rmsnorm_backward(dev_, dx_.get(), p_.gradients(w.mlp_norm), dh_.get(), a.x_mid.get(), a.mlp_rstd.get(),
                     p_.master(w.mlp_norm), M, d, scratch_.get());
  }

  void mixer_backward(int l) {
    Range<Device> range(dev_, "mixer backward");
    const LayerOffsets& w = p_.table.layers[l];
    LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, values = shape_.value_dim();
    linear_backward_weight(dev_, p_.gradients(w.o_proj), dx_.get(), a.y.get(), M, d, values);
    linear_backward_input(dev_, dy_.get(), dx_.get(), p_.weights(w.o_proj), M, d, values);
    output_norm_backward(dev_, d_o_.get(), dproj_.get(), p_.gradients(w.o_norm), dy_.get(), a.o.get(),
                         a.o_rstd.get(), a.proj.get(), p_.master(w.o_norm), shape_, scratch_.get());
    {
      Range<Device> r(dev_, "gated delta rule backward");
      gated_delta_rule_backward(dev_, dqkv_.get(), dg_.get(), dbeta_.get(), d_o_.get(), a.delta_rule.get(),
                                a.qkv.get(), a.g.get(), a.beta.get(), shape_, readout_scale_, scratch_.get());
    }
    gates_backward(dev_, dproj_.get(), p_.gradients(w.A_log), p_.gradients(w.dt_bias), dg_.get(),
                   dbeta_.get(), a.g.get(), a.beta.get(), a.proj.get(), p_.master(w.A_log),
                   p_.master(w.dt_bias), shape_, real(config_.beta_max()), scratch_.get());
    short_conv_backward(dev_, dproj_.get(), p_.gradients(w.taps), dqkv_.get(), a.qkv.get(), a.rnorm.get(),
                        a.proj.get(), p_.master(w.taps), shape_, scratch_.get());
    linear_backward_weight(dev_, p_.gradients(w.in_proj), dproj_.get(), a.h_attn.get(), M, shape_.columns(),
                           d);
    linear_backward_input(dev_, dh_.get(), dproj_.get(), p_.weights(w.in_proj), M, shape_.columns(), d);
    rmsnorm_backward(dev_, dx_.get(), p_.gradients(w.attn_norm), dh_.get(), a.x_in.get(), a.attn_rstd.get(),
                     p_.master(w.attn_norm), M, d, scratch_.get());
  }

  Parameters<Device>& p_;
  Device& dev_;
  const ModelConfig config_;
  MixerShape shape_;
  const int max_rows_;
  const real logit_scale_, readout_scale_;  // m_out and s of mup.h
  std::vector<LayerActivations> layers_;
  Buffer<Device, int32_t> tokens_, targets_, order_;
  std::vector<int32_t> host_order_;
  Buffer<Device, act> branch_, x_out_, h_out_, logits_;
  Buffer<Device, real> losses_, loss_sum_, out_rstd_;
  size_t logit_rows_ = 0;
  Buffer<Device, act> dx_, dh_, dproj_, dqkv_, d_o_, dy_, dgate_up_, dswiglu_;
  Buffer<Device, real> dg_, dbeta_;
  Buffer<Device, unsigned char> scratch_;
};

}  // namespace gdn
