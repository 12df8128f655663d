// A Gated Delta Network's forward and backward, written once over the device type: a list of layer calls that
// reads like the equations (Yang et al., arXiv 2412.06464; constants of Liu, Gu, arXiv 2606.04048, from
// mup.h).
//
//   x = embedding(tokens)
//   each layer:   x = x + r mixer(rmsnorm(x));   x = x + r mlp(rmsnorm(x))      r = (L0/L)^alpha, residual_scale
//   loss = cross_entropy(logit_scale * rmsnorm(x) w_emb^T, targets)
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "activations.h"
#include "batch.h"
#include "parameters.h"

namespace gdn {

// What a pass over the layers tells of the groups of the arena (ParameterTable), of each group once. Either may
// be empty.
struct GroupCalls {
  std::function<void(int group)> read;      // the first launch that reads its weights comes next
  std::function<void(int group)> complete;  // the last launch that adds to its gradients has been made
};

// One model on one device for batches of up to `batch` sequences of `tokens` tokens, with all its
// activations.
template <class Device>
class Model {
 public:
  using real = typename Device::real;
  using act = typename Device::act;
  using LayerActivations = gdn::LayerActivations<Device>;

  Model(Parameters<Device>& parameters, int batch, int tokens, Use use,
        Recompute recompute = Recompute::nothing, int separator = kNoSeparator)
      : p_(parameters),
        dev_(parameters.dev),
        config_(parameters.config),
        shape_(config_.mixer_shape(batch, tokens)),
        max_rows_(shape_.rows()),
        recompute_(recompute),
        separator_(separator),
        logit_scale_(real(logit_scale(config_.mup()))),
        readout_scale_(real(config_.readout_scale())),
        residual_scale_(real(residual_scale(config_.mup()))),
        acts_(dev_, config_, shape_, use, recompute) {}

 private:
  const LayerActivations& at(int l) const { return acts_.layers[l]; }

  // ---- forward and backward, layer call by layer call

  // With a state the mixers run token by token from it and leave it after the last token; else in chunks from
  // zero.
  void forward(RecurrentState<Device>* state, const GroupCalls& calls = {}) {
    const int M = shape_.rows(), d = config_.width;
    const auto read = [&](int group) {
      if (calls.read) calls.read(group);
    };
    Range<Device> range(dev_, "forward");
    read(p_.table.embedding_group());
    {
      Range<Device> r(dev_, "embedding");
      embedding_forward(dev_, at(0).x_in, p_.weights(p_.table.embedding), tokens_, M, d);
    }
    read(p_.table.vectors_group());
    for (int l = 0; l < config_.layers; l++) {
      read(p_.table.layer_group(l));
      mixer_forward(l, state);
      mlp_forward(l);
    }
    Range<Device> r(dev_, "final norm");
    residual_rmsnorm_forward(dev_, acts_.x_out, acts_.h, acts_.out_rstd, at(config_.layers - 1).x_mid,
                             acts_.branch, p_.master(p_.table.final_norm), M, d);
  }

  // x_in = x_mid of the layer before + its mlp's output
  void mixer_forward(int l, RecurrentState<Device>* state) {
    Range<Device> range(dev_, "mixer forward", l);
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width;
    if (l == 0)
      rmsnorm_forward(dev_, acts_.h, a.attn_rstd, a.x_in, p_.master(w.attn_norm), M, d);
    else
      residual_rmsnorm_forward(dev_, a.x_in, acts_.h, a.attn_rstd, at(l - 1).x_mid, acts_.branch,
                               p_.master(w.attn_norm), M, d);
    mixer_branch(l, state);
  }

  // branch = r mixer(h)
  void mixer_branch(int l, RecurrentState<Device>* state) {
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width;
    linear_forward(dev_, a.proj, acts_.h, p_.weights(w.in_proj), M, shape_.columns(), d);
    convolve(l, state ? state->history[l].get() : nullptr);
    {
      Range<Device> r(dev_, "gated delta rule");
      if (state)
        gated_delta_rule_recurrent(dev_, a.o, state->state[l].get(), a.qkv, a.g, a.beta, shape_,
                                   readout_scale_);
      else
        gated_delta_rule_forward(dev_, a.o, a.delta_rule, a.qkv, a.g, a.beta, shape_, readout_scale_,
                                 acts_.scratch);
    }
    output_norm_forward(dev_, acts_.y, a.o_rstd, a.o, a.proj, p_.master(w.o_norm), shape_);
    linear_forward(dev_, acts_.branch, acts_.y, p_.weights(w.o_proj), M, d, shape_.value_dim(),
                   residual_scale_);
  }

  // qkv, g and beta from proj
  void convolve(int l, act* history) {
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    short_conv_gates_forward(dev_, a.qkv, a.rnorm, a.g, a.beta, a.proj, p_.master(w.taps), p_.master(w.A_log),
                             p_.master(w.dt_bias), history, shape_, real(config_.beta_max()),
                             history ? nullptr : masked_position());
  }

  const int32_t* masked_position() const { return separator_ == kNoSeparator ? nullptr : position_; }

  // branch = r mlp(rmsnorm(x_mid))
  void mlp_forward(int l) {
    Range<Device> range(dev_, "mlp forward", l);
    mlp_inner(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    swiglu_forward(dev_, acts_.swiglu, at(l).gate_up, M, I);
    linear_forward(dev_, acts_.branch, acts_.swiglu, p_.weights(p_.table.layers[l].down), M, d, I,
                   residual_scale_);
  }

  // x_mid = x_in + the mixer's output;  gate_up = (W_gate h, W_up h),  h = rmsnorm(x_mid)
  void mlp_inner(int l) {
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    residual_rmsnorm_forward(dev_, a.x_mid, acts_.h, a.mlp_rstd, a.x_in, acts_.branch, p_.master(w.mlp_norm),
                             M, d);
    linear_forward(dev_, a.gate_up, acts_.h, p_.weights(w.gate_up), M, 2 * I, d);
  }

  // From x_in all that the layer's forward left for its backward.
  void recompute_layer(int l) {
    Range<Device> range(dev_, "layer again", l);
    const LayerActivations& a = at(l);
    rmsnorm_forward(dev_, acts_.h, a.attn_rstd, a.x_in, p_.master(p_.table.layers[l].attn_norm),
                    shape_.rows(), config_.width);
    mixer_branch(l, nullptr);
    mlp_inner(l);
  }

  // Logits and losses and, where loss_weight != 0, the head's weight gradient and, in the place of h, the
  // gradient of h, in row chunks.
  // The sum of the losses is added to *loss_sum (device memory).
  void classify(float loss_weight, double* loss_sum) {
    Range<Device> range(dev_, "classifier");
    const int M = shape_.rows(), d = config_.width, V = config_.padded_vocab;
    const size_t head = p_.table.lm_head;
    for (int first = 0; first < M; first += int(acts_.logit_rows)) {
      const int rows = std::min(int(acts_.logit_rows), M - first);
      act* h = acts_.h + size_t(first) * d;
      linear_forward(dev_, acts_.logits, h, p_.weights(head), rows, V, d, logit_scale_);
      softmax_cross_entropy(dev_, acts_.logits, acts_.losses + first, targets_ + first, rows, config_.vocab,
                            V, real(loss_weight));
      if (loss_weight == 0) continue;
      linear_backward_weight(dev_, p_.gradients(head), acts_.logits, h, rows, V, d, logit_scale_);
      linear_backward_input(dev_, h, acts_.logits, p_.weights(head), rows, V, d, logit_scale_);
    }
    sum_losses(dev_, loss_sum, acts_.losses, M);
  }

  // acts_.dx is the gradient of the residual stream; each branch adds its own on the way down.
  void backward(const GroupCalls& calls) {
    const auto complete = [&](int group) {
      if (calls.complete) calls.complete(group);
    };
    Range<Device> range(dev_, "backward");
    const int M = shape_.rows(), d = config_.width;
    dev_.zero(acts_.dx, size_t(M) * d * sizeof(act));
    act* const nowhere = nullptr;
    rmsnorm_backward(dev_, acts_.dx, p_.gradients(p_.table.final_norm), nowhere, acts_.h, acts_.x_out,
                     acts_.out_rstd, p_.master(p_.table.final_norm), M, d, acts_.scratch);
    for (int l = config_.layers - 1; l >= 0; l--) {
      if (recompute_ == Recompute::layers) recompute_layer(l);
      mlp_backward(l);
      mixer_backward(l);
      complete(p_.table.layer_group(l));
    }
    {
      Range<Device> r(dev_, "embedding backward");
      embedding_backward(dev_, p_.gradients(p_.table.embedding), acts_.dx, tokens_, order_, M, d,
                         acts_.scratch);
    }
    complete(p_.table.embedding_group());
    complete(p_.table.vectors_group());
  }

  void mlp_backward(int l) {
    Range<Device> range(dev_, "mlp backward", l);
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    linear_backward_input(dev_, acts_.dswiglu, acts_.dx, p_.weights(w.down), M, d, I, residual_scale_);
    swiglu_backward(dev_, acts_.dgate_up, acts_.swiglu, acts_.dswiglu, a.gate_up, M, I);
    linear_backward_weight(dev_, p_.gradients(w.down), acts_.dx, acts_.swiglu, M, d, I, residual_scale_);
    linear_backward_input(dev_, acts_.dh, acts_.dgate_up, p_.weights(w.gate_up), M, 2 * I, d);
    act* h = acts_.dh;  // in the place of its gradient
    rmsnorm_backward(dev_, acts_.dx, p_.gradients(w.mlp_norm), h, acts_.dh, a.x_mid, a.mlp_rstd,
                     p_.master(w.mlp_norm), M, d, acts_.scratch);
    linear_backward_weight(dev_, p_.gradients(w.gate_up), acts_.dgate_up, h, M, 2 * I, d);
  }

  void mixer_backward(int l) {
    Range<Device> range(dev_, "mixer backward", l);
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, values = shape_.value_dim();
    linear_backward_input(dev_, acts_.dy, acts_.dx, p_.weights(w.o_proj), M, d, values, residual_scale_);
    output_norm_backward(dev_, acts_.d_o, acts_.dproj, p_.gradients(w.o_norm), acts_.y, acts_.dy, a.o,
                         a.o_rstd, a.proj, p_.master(w.o_norm), shape_, acts_.scratch);
    linear_backward_weight(dev_, p_.gradients(w.o_proj), acts_.dx, acts_.y, M, d, values, residual_scale_);
    if (recompute_ == Recompute::convolution) convolve(l, nullptr);
    {
      Range<Device> r(dev_, "gated delta rule backward");
      gated_delta_rule_backward(dev_, acts_.dqkv, acts_.dg, acts_.dbeta, acts_.d_o, a.delta_rule, a.qkv, a.g,
                                a.beta, shape_, readout_scale_, acts_.scratch);
    }
    short_conv_gates_backward(dev_, acts_.dproj, p_.gradients(w.taps), p_.gradients(w.A_log),
                              p_.gradients(w.dt_bias), acts_.dqkv, acts_.dg, acts_.dbeta, a.rnorm, a.g,
                              a.beta, a.proj, p_.master(w.taps), p_.master(w.A_log), p_.master(w.dt_bias),
                              shape_, real(config_.beta_max()), acts_.scratch, masked_position());
    linear_backward_input(dev_, acts_.dh, acts_.dproj, p_.weights(w.in_proj), M, shape_.columns(), d);
    act* h = acts_.dh;
    rmsnorm_backward(dev_, acts_.dx, p_.gradients(w.attn_norm), h, acts_.dh, a.x_in, a.attn_rstd,
                     p_.master(w.attn_norm), M, d, acts_.scratch);
    linear_backward_weight(dev_, p_.gradients(w.in_proj), acts_.dproj, h, M, shape_.columns(), d);
  }

 public:
  // ---- a batch

  // Adds the gradient of loss_weight * (sum of the tokens' losses) to the parameters' gradients and returns
  // nothing: read the loss with loss_sum() when it is needed. tokens, targets [B,T] on the host.
  void forward_backward(const int32_t* tokens, const int32_t* targets, int batch, int length,
                        float loss_weight) {
    std::vector<int32_t> packed(kPackedRows * size_t(batch) * length);
    pack_batch(packed.data(), tokens, targets, batch, length, config_.padded_vocab, separator_);
    upload_batch(packed.data(), batch, length);
    acts_.loss_sum.zero();
    forward_backward(loss_weight, acts_.loss_sum.get());
  }

  // The same in parts. `packed` [4,B*T] (pack_batch) may be pinned memory, and is then read later.
  void upload_batch(const int32_t* packed, int batch, int length) {
    set_shape(batch, length);
    dev_.upload(tokens_, packed, kPackedRows * size_t(shape_.rows()) * sizeof(int32_t));
  }
  // The token that starts a document where the chunked form masks them: state and convolution then see
  // nothing before it.
  int separator() const { return separator_; }
  // Of the batch uploaded last. Launches and touches no host memory; the sum of its tokens' losses is added to
  // *loss_sum (device memory). `calls` are made between the launches.
  void forward_backward(float loss_weight, double* loss_sum, const GroupCalls& calls = {}) {
    forward(nullptr, calls);
    if (calls.read && !config_.tied) calls.read(p_.table.head_group());
    classify(loss_weight, loss_sum);
    if (calls.complete && !config_.tied) calls.complete(p_.table.head_group());
    backward(calls);
  }

  // The sum of the tokens' losses, in nats, without gradients.
  void forward_loss(const int32_t* tokens, const int32_t* targets, int batch, int length) {
    upload_tokens(tokens, batch, length);
    dev_.upload(targets_, targets, size_t(shape_.rows()) * sizeof(int32_t));
    if (separator_ != kNoSeparator) {
      std::vector<int32_t> position(size_t(shape_.rows()));
      document_positions(position.data(), tokens, batch, length, separator_);
      dev_.upload(position_, position.data(), position.size() * sizeof(int32_t));
    }
    acts_.loss_sum.zero();
    forward(nullptr);
    classify(0, acts_.loss_sum.get());
  }

  // Sum over the last call's tokens of -ln p(target). Waits for the device.
  double loss_sum() {
    double sum = 0;
    dev_.download(&sum, acts_.loss_sum.get(), sizeof(sum));
    return sum;
  }

  // What the last forward left in layer l: valid until the next call, and with Recompute::nothing for all
  // layers.
  const LayerActivations& layer(int l) const { return acts_.layers[l]; }

  // Feeds tokens [B,T] (host) in the recurrent form, from and into `state`; logits [B,padded_vocab] (host) of
  // the last token of each sequence.
  void decode(const int32_t* tokens, int batch, int length, RecurrentState<Device>& state,
              std::vector<real>& logits) {
    upload_tokens(tokens, batch, length);
    forward(&state);
    const int d = config_.width, V = config_.padded_vocab;
    if (acts_.logit_rows < size_t(batch))
      throw std::logic_error("decode: more sequences than rows of logits");
    std::vector<act> row(V);
    logits.resize(size_t(batch) * V);
    for (int b = 0; b < batch; b++)
      linear_forward(dev_, acts_.logits + size_t(b) * V, acts_.h + (size_t(b + 1) * length - 1) * d,
                     p_.weights(p_.table.lm_head), 1, V, d, logit_scale_);
    for (int b = 0; b < batch; b++) {
      dev_.download(row.data(), acts_.logits + size_t(b) * V, V * sizeof(act));
      for (int v = 0; v < V; v++) logits[size_t(b) * V + v] = real(float_or_double(row[v]));
    }
  }

 private:
  // a bf16 number has no implicit conversion to double in every context; float and double pass through
  static float float_or_double(float x) { return x; }
  static double float_or_double(double x) { return x; }

  void set_shape(int batch, int length) {
    if (batch * length > max_rows_ || batch < 1 || length < 1)
      throw std::logic_error("Model: a batch of " + std::to_string(batch) + " x " + std::to_string(length) +
                             " tokens in a model made for " + std::to_string(max_rows_));
    shape_.batch = batch;
    shape_.tokens = length;
    tokens_ = acts_.batch.get();
    targets_ = tokens_ + shape_.rows();
    order_ = targets_ + shape_.rows();
    position_ = order_ + shape_.rows();
  }

  void upload_tokens(const int32_t* tokens, int batch, int length) {
    set_shape(batch, length);
    dev_.upload(tokens_, tokens, size_t(shape_.rows()) * sizeof(int32_t));
  }

  Parameters<Device>& p_;
  Device& dev_;
  const ModelConfig config_;
  MixerShape shape_;
  const int max_rows_;
  const Recompute recompute_;
  const int separator_;
  const real logit_scale_, readout_scale_, residual_scale_;  // m_out, s and rho^-alpha of mup.h
  int32_t *tokens_ = nullptr, *targets_ = nullptr, *order_ = nullptr, *position_ = nullptr;  // of the batch
  Activations<Device> acts_;
};

}  // namespace gdn
