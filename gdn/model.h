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

// Each row's steps since its document began, with a token `separator`, or else its sequence. tokens [B,T].
inline void document_positions(int32_t* position, const int32_t* tokens, int batch, int length,
                               int separator) {
  for (int m = 0; m < batch * length; m++)
    position[m] = m % length == 0 || tokens[m] == separator ? 0 : position[m - 1] + 1;
}

// A batch as the device gets it, in one piece: `packed` [4,B*T] = tokens, targets, the rows sorted by token,
// and document_positions.
constexpr int kPackedRows = 4;
inline void pack_batch(int32_t* packed, const int32_t* tokens, const int32_t* targets, int batch, int length,
                       int vocab, int separator) {
  const int rows = batch * length;
  std::copy_n(tokens, rows, packed);
  std::copy_n(targets, rows, packed + rows);
  sort_rows_by_token(packed + 2 * size_t(rows), tokens, rows, vocab);
  document_positions(packed + 3 * size_t(rows), tokens, batch, length, separator);
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

constexpr int kNoSeparator = -1;  // documents are not masked

// What a training model computes again in the backward, by extra work, instead of keeping it for every layer;
// the gradients keep their bits.
enum class Recompute {
  nothing,
  convolution,  // qkv, from proj
  layers,       // everything but each layer's input
};

// One model on one device for batches of up to `batch` sequences of `tokens` tokens, with all its
// activations.
template <class Device>
class Model {
 public:
  using real = typename Device::real;
  using act = typename Device::act;
  static constexpr const char* kRemedy = "lower -b (sequences in a micro-batch) or raise -recompute";

  // What one layer's forward leaves for its backward. The inputs of the other three Linears (both norms'
  // outputs, the gated o and swiglu) are not among it: the backward of what made them gives them again.
  struct LayerActivations {
    act *x_in, *proj, *qkv, *o, *x_mid, *gate_up;
    real *attn_rstd, *rnorm, *g, *beta, *o_rstd, *mlp_rstd;
    unsigned char* delta_rule;  // what gated_delta_rule_forward saves
  };

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
        readout_scale_(real(config_.readout_scale())) {
    const size_t M = max_rows_, d = config_.width, I = config_.mlp_size, values = shape_.value_dim();
    const bool training = use == Use::training;
    // In inference all layers share one set of activations; in training what is computed again is shared.
    const bool share_all = !training || recompute == Recompute::layers;
    const bool share_qkv = share_all || recompute == Recompute::convolution;
    for (int l = 0; l < config_.layers; l++) {
      const LayerActivations* first = l ? &layers_[0] : nullptr;
      const auto pick = [&](bool share, auto LayerActivations::*member, size_t n, auto make) {
        return share && first ? first->*member : make(n);
      };
      const auto a = [&](size_t n) { return activations(n); };
      const auto s = [&](size_t n) { return statistics(n); };
      using L = LayerActivations;
      L x;
      x.x_in = pick(!training, &L::x_in, M * d, a);
      x.x_mid = pick(share_all, &L::x_mid, M * d, a);
      x.proj = pick(share_all, &L::proj, M * shape_.columns(), a);
      x.o = pick(share_all, &L::o, M * values, a);
      x.gate_up = pick(share_all, &L::gate_up, M * 2 * I, a);
      x.qkv = pick(share_qkv, &L::qkv, M * shape_.conv_channels(), a);
      x.attn_rstd = pick(share_all, &L::attn_rstd, M, s);
      x.mlp_rstd = pick(share_all, &L::mlp_rstd, M, s);
      x.rnorm = pick(share_all, &L::rnorm, M * 2 * config_.heads_k, s);
      x.g = pick(share_all, &L::g, M * config_.heads_v, s);
      x.beta = pick(share_all, &L::beta, M * config_.heads_v, s);
      x.o_rstd = pick(share_all, &L::o_rstd, M * config_.heads_v, s);
      x.delta_rule = pick(share_all, &L::delta_rule, gated_delta_rule_saved_bytes(dev_, shape_),
                          [&](size_t n) { return keep(bytes_, n, "delta rule states"); });
      layers_.push_back(x);
    }
    batch_ = Buffer<Device, int32_t>(dev_, kPackedRows * M, "tokens", kRemedy);
    losses_ = statistics(M);
    loss_sum_ = Buffer<Device, double>(dev_, 1, "statistics", kRemedy);
    branch_ = x_out_ = activations(M * d);
    out_rstd_ = statistics(M);
    // Logits in chunks of rows: at most 2^27 of them at a time (256 MiB in bf16), and never fewer than 64
    // rows.
    logit_rows_ = std::min<size_t>(M, std::max<size_t>(64, (size_t(1) << 27) / config_.padded_vocab));
    // Logits and the layers' work space are never needed at the same time.
    size_t scratch = std::max(gated_delta_rule_scratch_bytes(dev_, shape_),
                              logit_rows_ * config_.padded_vocab * sizeof(act));
    // The inputs of the Linears behind a norm, gate or swiglu are dead when those have run: all share one
    // piece of memory.
    size_t passing = M * std::max({d, values, I});
    if (training) {
      // So do the mixer's backward and the mlp's, which take turns.
      const auto aligned = [](size_t n) { return (n + 63) / 64 * 64; };
      const size_t proj = aligned(M * shape_.columns()), qkv = aligned(M * shape_.conv_channels());
      const size_t gate_up = aligned(M * 2 * I);
      passing = std::max({passing, proj + qkv + M * values, gate_up + M * I});
      h_ = dproj_ = dgate_up_ = keep(acts_, passing, "activation gradients");
      y_ = dqkv_ = dproj_ + proj;  // y has been read when dqkv is written
      d_o_ = dy_ = dqkv_ + qkv;
      swiglu_ = dswiglu_ = dgate_up_ + gate_up;
      dx_ = keep(acts_, M * d, "activation gradients");
      dh_ = branch_;  // a branch's output lives in the forward, its input's gradient in the backward
      dg_ = statistics(M * config_.heads_v);
      dbeta_ = statistics(M * config_.heads_v);
      for (size_t need : {embedding_backward_scratch_bytes(dev_, int(M), int(d)),
                          rmsnorm_backward_scratch_bytes(dev_, int(M), int(d)),
                          short_conv_gates_backward_scratch_bytes(dev_, shape_),
                          output_norm_backward_scratch_bytes(dev_, shape_)})
        scratch = std::max(scratch, need);
    } else {
      h_ = y_ = swiglu_ = activations(passing);
    }
    scratch_ = keep(bytes_, scratch, "work space");
    logits_ = reinterpret_cast<act*>(scratch_);
  }

  // Adds the gradient of loss_weight * (sum of the tokens' losses) to the parameters' gradients and returns
  // nothing: read the loss with loss_sum() when it is needed. tokens, targets [B,T] on the host.
  void forward_backward(const int32_t* tokens, const int32_t* targets, int batch, int length,
                        float loss_weight) {
    std::vector<int32_t> packed(kPackedRows * size_t(batch) * length);
    pack_batch(packed.data(), tokens, targets, batch, length, config_.padded_vocab, separator_);
    upload_batch(packed.data(), batch, length);
    zero_loss();
    forward_backward(loss_weight);
  }

  // The same in parts. `packed` [4,B*T] (pack_batch) may be pinned memory, and is then read later.
  void upload_batch(const int32_t* packed, int batch, int length) {
    set_shape(batch, length);
    dev_.upload(tokens_, packed, kPackedRows * size_t(shape_.rows()) * sizeof(int32_t));
  }
  // The token that starts a document where the chunked form masks them: state and convolution then see
  // nothing before it.
  int separator() const { return separator_; }
  void zero_loss() { loss_sum_.zero(); }
  // Of the batch uploaded last. Launches and touches no host memory; its loss is added to the sum since zero_loss().
  void forward_backward(float loss_weight) {
    forward(nullptr);
    classify(loss_weight);
    backward();
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
    zero_loss();
    forward(nullptr);
    classify(0);
  }

  // Sum over the last call's tokens of -ln p(target). Waits for the device.
  double loss_sum() {
    double sum = 0;
    dev_.download(&sum, device_loss_sum(), sizeof(sum));
    return sum;
  }
  const double* device_loss_sum() const { return loss_sum_.get(); }

  // What the last forward left in layer l: valid until the next call, and with Recompute::nothing for all layers.
  const LayerActivations& layer(int l) const { return layers_[l]; }

  // Feeds tokens [B,T] (host) in the recurrent form, from and into `state`; logits [B,padded_vocab] (host) of
  // the last token of each sequence.
  void decode(const int32_t* tokens, int batch, int length, RecurrentState<Device>& state,
              std::vector<real>& logits) {
    upload_tokens(tokens, batch, length);
    forward(&state);
    const int d = config_.width, V = config_.padded_vocab;
    if (logit_rows_ < size_t(batch)) throw std::logic_error("decode: more sequences than rows of logits");
    std::vector<act> row(V);
    logits.resize(size_t(batch) * V);
    for (int b = 0; b < batch; b++)
      linear_forward(dev_, logits_ + size_t(b) * V, h_ + (size_t(b + 1) * length - 1) * d,
                     p_.weights(p_.table.lm_head), 1, V, d, logit_scale_);
    for (int b = 0; b < batch; b++) {
      dev_.download(row.data(), logits_ + size_t(b) * V, V * sizeof(act));
      for (int v = 0; v < V; v++) logits[size_t(b) * V + v] = real(float_or_double(row[v]));
    }
  }

 private:
  // a bf16 number has no implicit conversion to double in every context; float and double pass through
  static float float_or_double(float x) { return x; }
  static double float_or_double(double x) { return x; }

  // Memory that lives as long as the model.
  template <class T>
  T* keep(std::vector<Buffer<Device, T>>& owners, size_t n, const char* what) {
    owners.emplace_back(dev_, n, what, kRemedy);
    return owners.back().get();
  }
  act* activations(size_t n) { return keep(acts_, n, "activations"); }
  real* statistics(size_t n) { return keep(reals_, n, "statistics"); }
  const LayerActivations& at(int l) const { return layers_[l]; }

  void set_shape(int batch, int length) {
    if (batch * length > max_rows_ || batch < 1 || length < 1)
      throw std::logic_error("Model: a batch of " + std::to_string(batch) + " x " + std::to_string(length) +
                             " tokens in a model made for " + std::to_string(max_rows_));
    shape_.batch = batch;
    shape_.tokens = length;
    tokens_ = batch_.get();
    targets_ = tokens_ + shape_.rows();
    order_ = targets_ + shape_.rows();
    position_ = order_ + shape_.rows();
  }

  void upload_tokens(const int32_t* tokens, int batch, int length) {
    set_shape(batch, length);
    dev_.upload(tokens_, tokens, size_t(shape_.rows()) * sizeof(int32_t));
  }

  // With a state the mixers run token by token from it and leave it after the last token; else in chunks from
  // zero.
  void forward(RecurrentState<Device>* state) {
    const int M = shape_.rows(), d = config_.width;
    Range<Device> range(dev_, "forward");
    {
      Range<Device> r(dev_, "embedding");
      embedding_forward(dev_, at(0).x_in, p_.weights(p_.table.embedding), tokens_, M, d);
    }
    for (int l = 0; l < config_.layers; l++) {
      mixer_forward(l, state);
      mlp_forward(l);
    }
    Range<Device> r(dev_, "final norm");
    residual_rmsnorm_forward(dev_, x_out_, h_, out_rstd_, at(config_.layers - 1).x_mid, branch_,
                             p_.master(p_.table.final_norm), M, d);
  }

  // x_in = x_mid of the layer before + its mlp's output
  void mixer_forward(int l, RecurrentState<Device>* state) {
    Range<Device> range(dev_, "mixer forward", l);
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width;
    if (l == 0)
      rmsnorm_forward(dev_, h_, a.attn_rstd, a.x_in, p_.master(w.attn_norm), M, d);
    else
      residual_rmsnorm_forward(dev_, a.x_in, h_, a.attn_rstd, at(l - 1).x_mid, branch_,
                               p_.master(w.attn_norm), M, d);
    mixer_branch(l, state);
  }

  // branch = mixer(h)
  void mixer_branch(int l, RecurrentState<Device>* state) {
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width;
    linear_forward(dev_, a.proj, h_, p_.weights(w.in_proj), M, shape_.columns(), d);
    convolve(l, state ? state->history[l].get() : nullptr);
    {
      Range<Device> r(dev_, "gated delta rule");
      if (state)
        gated_delta_rule_recurrent(dev_, a.o, state->state[l].get(), a.qkv, a.g, a.beta, shape_,
                                   readout_scale_);
      else
        gated_delta_rule_forward(dev_, a.o, a.delta_rule, a.qkv, a.g, a.beta, shape_, readout_scale_,
                                 scratch_);
    }
    output_norm_forward(dev_, y_, a.o_rstd, a.o, a.proj, p_.master(w.o_norm), shape_);
    linear_forward(dev_, branch_, y_, p_.weights(w.o_proj), M, d, shape_.value_dim());
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

  // branch = mlp(rmsnorm(x_mid))
  void mlp_forward(int l) {
    Range<Device> range(dev_, "mlp forward", l);
    mlp_inner(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    swiglu_forward(dev_, swiglu_, at(l).gate_up, M, I);
    linear_forward(dev_, branch_, swiglu_, p_.weights(p_.table.layers[l].down), M, d, I);
  }

  // x_mid = x_in + the mixer's output;  gate_up = (W_gate h, W_up h),  h = rmsnorm(x_mid)
  void mlp_inner(int l) {
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    residual_rmsnorm_forward(dev_, a.x_mid, h_, a.mlp_rstd, a.x_in, branch_, p_.master(w.mlp_norm), M, d);
    linear_forward(dev_, a.gate_up, h_, p_.weights(w.gate_up), M, 2 * I, d);
  }

  // From x_in all that the layer's forward left for its backward.
  void recompute_layer(int l) {
    Range<Device> range(dev_, "layer again", l);
    const LayerActivations& a = at(l);
    rmsnorm_forward(dev_, h_, a.attn_rstd, a.x_in, p_.master(p_.table.layers[l].attn_norm), shape_.rows(),
                    config_.width);
    mixer_branch(l, nullptr);
    mlp_inner(l);
  }

  // Logits and losses and, where loss_weight != 0, the head's weight gradient and, in the place of h, the
  // gradient of h, in row chunks.
  void classify(float loss_weight) {
    Range<Device> range(dev_, "classifier");
    const int M = shape_.rows(), d = config_.width, V = config_.padded_vocab;
    const size_t head = p_.table.lm_head;
    for (int first = 0; first < M; first += int(logit_rows_)) {
      const int rows = std::min(int(logit_rows_), M - first);
      act* h = h_ + size_t(first) * d;
      linear_forward(dev_, logits_, h, p_.weights(head), rows, V, d, logit_scale_);
      softmax_cross_entropy(dev_, logits_, losses_ + first, targets_ + first, rows, config_.vocab, V,
                            real(loss_weight));
      if (loss_weight == 0) continue;
      linear_backward_weight(dev_, p_.gradients(head), logits_, h, rows, V, d, logit_scale_);
      linear_backward_input(dev_, h, logits_, p_.weights(head), rows, V, d, logit_scale_);
    }
    sum_losses(dev_, loss_sum_.get(), losses_, M);
  }

  // dx_ is the gradient of the residual stream; each branch adds its own on the way down.
  void backward() {
    Range<Device> range(dev_, "backward");
    const int M = shape_.rows(), d = config_.width;
    dev_.zero(dx_, size_t(M) * d * sizeof(act));
    act* const nowhere = nullptr;
    rmsnorm_backward(dev_, dx_, p_.gradients(p_.table.final_norm), nowhere, h_, x_out_, out_rstd_,
                     p_.master(p_.table.final_norm), M, d, scratch_);
    for (int l = config_.layers - 1; l >= 0; l--) {
      if (recompute_ == Recompute::layers) recompute_layer(l);
      mlp_backward(l);
      mixer_backward(l);
    }
    Range<Device> r(dev_, "embedding backward");
    embedding_backward(dev_, p_.gradients(p_.table.embedding), dx_, tokens_, order_, M, d, scratch_);
  }

  void mlp_backward(int l) {
    Range<Device> range(dev_, "mlp backward", l);
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, I = config_.mlp_size;
    linear_backward_input(dev_, dswiglu_, dx_, p_.weights(w.down), M, d, I);
    swiglu_backward(dev_, dgate_up_, swiglu_, dswiglu_, a.gate_up, M, I);
    linear_backward_weight(dev_, p_.gradients(w.down), dx_, swiglu_, M, d, I);
    linear_backward_input(dev_, dh_, dgate_up_, p_.weights(w.gate_up), M, 2 * I, d);
    act* h = dh_;  // in the place of its gradient
    rmsnorm_backward(dev_, dx_, p_.gradients(w.mlp_norm), h, dh_, a.x_mid, a.mlp_rstd, p_.master(w.mlp_norm),
                     M, d, scratch_);
    linear_backward_weight(dev_, p_.gradients(w.gate_up), dgate_up_, h, M, 2 * I, d);
  }

  void mixer_backward(int l) {
    Range<Device> range(dev_, "mixer backward", l);
    const LayerOffsets& w = p_.table.layers[l];
    const LayerActivations& a = at(l);
    const int M = shape_.rows(), d = config_.width, values = shape_.value_dim();
    linear_backward_input(dev_, dy_, dx_, p_.weights(w.o_proj), M, d, values);
    output_norm_backward(dev_, d_o_, dproj_, p_.gradients(w.o_norm), y_, dy_, a.o, a.o_rstd, a.proj,
                         p_.master(w.o_norm), shape_, scratch_);
    linear_backward_weight(dev_, p_.gradients(w.o_proj), dx_, y_, M, d, values);
    if (recompute_ == Recompute::convolution) convolve(l, nullptr);
    {
      Range<Device> r(dev_, "gated delta rule backward");
      gated_delta_rule_backward(dev_, dqkv_, dg_, dbeta_, d_o_, a.delta_rule, a.qkv, a.g, a.beta, shape_,
                                readout_scale_, scratch_);
    }
    short_conv_gates_backward(dev_, dproj_, p_.gradients(w.taps), p_.gradients(w.A_log),
                              p_.gradients(w.dt_bias), dqkv_, dg_, dbeta_, a.rnorm, a.g, a.beta, a.proj,
                              p_.master(w.taps), p_.master(w.A_log), p_.master(w.dt_bias), shape_,
                              real(config_.beta_max()), scratch_, masked_position());
    linear_backward_input(dev_, dh_, dproj_, p_.weights(w.in_proj), M, shape_.columns(), d);
    act* h = dh_;
    rmsnorm_backward(dev_, dx_, p_.gradients(w.attn_norm), h, dh_, a.x_in, a.attn_rstd,
                     p_.master(w.attn_norm), M, d, scratch_);
    linear_backward_weight(dev_, p_.gradients(w.in_proj), dproj_, h, M, shape_.columns(), d);
  }

  Parameters<Device>& p_;
  Device& dev_;
  const ModelConfig config_;
  MixerShape shape_;
  const int max_rows_;
  const Recompute recompute_;
  const int separator_;
  const real logit_scale_, readout_scale_;  // m_out and s of mup.h
  std::vector<LayerActivations> layers_;
  Buffer<Device, int32_t> batch_;  // tokens, targets, order, position [M] of the batch, one behind the other
  int32_t *tokens_ = nullptr, *targets_ = nullptr, *order_ = nullptr, *position_ = nullptr;
  // A branch's output; once it is added to the stream of the last layer, that. A norm's output; the gated o.
  act *branch_ = nullptr, *x_out_ = nullptr, *h_ = nullptr, *y_ = nullptr, *swiglu_ = nullptr;
  act* logits_ = nullptr;
  Buffer<Device, double> loss_sum_;
  real *losses_ = nullptr, *out_rstd_ = nullptr;
  size_t logit_rows_ = 0;
  act *dx_ = nullptr, *dh_ = nullptr, *dproj_ = nullptr, *dqkv_ = nullptr, *d_o_ = nullptr, *dy_ = nullptr;
  act *dgate_up_ = nullptr, *dswiglu_ = nullptr;
  real *dg_ = nullptr, *dbeta_ = nullptr;
  unsigned char* scratch_ = nullptr;
  std::vector<Buffer<Device, act>> acts_;  // the memory behind all of these
  std::vector<Buffer<Device, real>> reals_;
  std::vector<Buffer<Device, unsigned char>> bytes_;
};

}  // namespace gdn
