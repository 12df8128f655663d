// The activations of a model on one device: which buffer holds what, and which buffers share memory.
//
// Of each layer (LayerActivations), kept from the layer's forward to its backward:
//
//   buffer      | what forward holds                            | what backward holds
//   x_in        | the layer's input                             | the same
//   attn_rstd   | 1 / root mean square of x_in's rows           | the same
//   proj        | W_in rmsnorm(x_in): q~ k~ v~ z a b            | the same
//   qkv         | convolved and normalised q, k, v              | the same (computed again:
//   Recompute::convolution) rnorm, g, beta | norms of q and k; gates                    | the same delta_rule
//   | what gated_delta_rule_forward saves           | the same o, o_rstd   | the delta rule's output | the
//   same x_mid       | x_in + the mixer's output                     | the same mlp_rstd, gate_up | W_gate h
//   and W_up h, h = rmsnorm(x_mid) | the same
//
// In inference all layers share one set of them. In training Recompute::convolution shares qkv, and
// Recompute::layers everything but x_in: the backward computes it again.
//
// Of the whole model. Buffers in one line below each other share memory:
//
//   buffer            | what forward holds                    | what backward holds
//   branch, x_out, dh | a branch's output; after the last     | gradient of a branch's input, then that input
//                     | layer the final stream                | (the norm's output) itself
//   h, dproj, dgate_up| a norm's output: a branch's input     | h: gradient of the final norm's output; then
//                     |                                       | gradients of proj and of gate_up, by turns
//   y, dqkv           | the gated and normalised o            | the same, then the gradient of qkv
//   d_o, dy           |                                       | gradient of y, then of o
//   swiglu, dswiglu   | swiglu's output                       | its gradient, then the output again
//   dx                |                                       | gradient of the residual stream
//   dg, dbeta         |                                       | gradients of the gates
//   losses, loss_sum  | losses of the tokens, their sum       |
//   scratch, logits   | work space of a layer; logits of some | work space of a layer
//                     | rows, then their gradients            |
//   batch             | tokens, targets, order, position      | the same
//
// (In inference h, y and swiglu are one buffer. In training dproj, dqkv and d_o lie behind each other,
// dgate_up and dswiglu too, and the two groups share memory: the mixer's backward and the MLP's take turns.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "batch.h"
#include "parameters.h"

namespace gdn {

enum class Use { training, inference };

// What a training model computes again in the backward, by extra work, instead of keeping it for every layer;
// the gradients keep their bits.
enum class Recompute {
  nothing,
  convolution,  // qkv, from proj
  layers,       // everything but each layer's input
};

// What one layer's forward leaves for its backward. The inputs of the other three Linears (both norms'
// outputs, the gated o and swiglu) are not among it: the backward of what made them gives them again.
template <class Device>
struct LayerActivations {
  typename Device::act *x_in, *proj, *qkv, *o, *x_mid, *gate_up;
  typename Device::real *attn_rstd, *rnorm, *g, *beta, *o_rstd, *mlp_rstd;
  unsigned char* delta_rule;  // what gated_delta_rule_forward saves
};

template <class Device>
class Activations {
 public:
  using real = typename Device::real;
  using act = typename Device::act;
  static constexpr const char* kRemedy = "lower -b (sequences in a micro-batch) or raise -recompute";

  // Memory for batches of up to `shape`'s rows. Throws one line when the device has too little.
  Activations(Device& dev, const ModelConfig& config, const MixerShape& shape, Use use, Recompute recompute)
      : dev_(dev) {
    const size_t M = shape.rows(), d = config.width, I = config.mlp_size, values = shape.value_dim();
    const bool training = use == Use::training;
    // In inference all layers share one set of activations; in training what is computed again is shared.
    const bool share_all = !training || recompute == Recompute::layers;
    const bool share_qkv = share_all || recompute == Recompute::convolution;
    for (int l = 0; l < config.layers; l++) {
      const LayerActivations<Device>* first = l ? &layers[0] : nullptr;
      const auto pick = [&](bool share, auto LayerActivations<Device>::*member, size_t n, auto make) {
        return share && first ? first->*member : make(n);
      };
      const auto a = [&](size_t n) { return activations(n); };
      const auto s = [&](size_t n) { return statistics(n); };
      using L = LayerActivations<Device>;
      L x;
      x.x_in = pick(!training, &L::x_in, M * d, a);
      x.x_mid = pick(share_all, &L::x_mid, M * d, a);
      x.proj = pick(share_all, &L::proj, M * shape.columns(), a);
      x.o = pick(share_all, &L::o, M * values, a);
      x.gate_up = pick(share_all, &L::gate_up, M * 2 * I, a);
      x.qkv = pick(share_qkv, &L::qkv, M * shape.conv_channels(), a);
      x.attn_rstd = pick(share_all, &L::attn_rstd, M, s);
      x.mlp_rstd = pick(share_all, &L::mlp_rstd, M, s);
      x.rnorm = pick(share_all, &L::rnorm, M * 2 * config.heads_k, s);
      x.g = pick(share_all, &L::g, M * config.heads_v, s);
      x.beta = pick(share_all, &L::beta, M * config.heads_v, s);
      x.o_rstd = pick(share_all, &L::o_rstd, M * config.heads_v, s);
      x.delta_rule = pick(share_all, &L::delta_rule, gated_delta_rule_saved_bytes(dev_, shape),
                          [&](size_t n) { return keep(bytes_, n, "delta rule states"); });
      layers.push_back(x);
    }
    batch = Buffer<Device, int32_t>(dev_, kPackedRows * M, "tokens", kRemedy);
    losses = statistics(M);
    loss_sum = Buffer<Device, double>(dev_, 1, "statistics", kRemedy);
    branch = x_out = activations(M * d);
    out_rstd = statistics(M);
    // Logits in chunks of rows: at most 2^27 of them at a time (256 MiB in bf16), and never fewer than 64
    // rows.
    logit_rows = std::min<size_t>(M, std::max<size_t>(64, (size_t(1) << 27) / config.padded_vocab));
    // Logits and the layers' work space are never needed at the same time.
    size_t scratch_bytes =
        std::max(gated_delta_rule_scratch_bytes(dev_, shape), logit_rows * config.padded_vocab * sizeof(act));
    // The inputs of the Linears behind a norm, gate or swiglu are dead when those have run: all share one
    // piece of memory.
    size_t passing = M * std::max({d, values, I});
    if (training) {
      // So do the mixer's backward and the mlp's, which take turns.
      const auto aligned = [](size_t n) { return (n + 63) / 64 * 64; };
      const size_t proj_size = aligned(M * shape.columns()), qkv_size = aligned(M * shape.conv_channels());
      const size_t gate_up_size = aligned(M * 2 * I);
      passing = std::max({passing, proj_size + qkv_size + M * values, gate_up_size + M * I});
      h = dproj = dgate_up = keep(acts_, passing, "activation gradients");
      y = dqkv = dproj + proj_size;  // y has been read when dqkv is written
      d_o = dy = dqkv + qkv_size;
      swiglu = dswiglu = dgate_up + gate_up_size;
      dx = keep(acts_, M * d, "activation gradients");
      dh = branch;  // a branch's output lives in the forward, its input's gradient in the backward
      dg = statistics(M * config.heads_v);
      dbeta = statistics(M * config.heads_v);
      for (size_t need : {embedding_backward_scratch_bytes(dev_, int(M), int(d)),
                          rmsnorm_backward_scratch_bytes(dev_, int(M), int(d)),
                          short_conv_gates_backward_scratch_bytes(dev_, shape),
                          output_norm_backward_scratch_bytes(dev_, shape)})
        scratch_bytes = std::max(scratch_bytes, need);
    } else {
      h = y = swiglu = activations(passing);
    }
    scratch = keep(bytes_, scratch_bytes, "work space");
    logits = reinterpret_cast<act*>(scratch);
  }

  std::vector<LayerActivations<Device>> layers;
  Buffer<Device, int32_t> batch;  // tokens, targets, order, position [M] of the batch, one behind the other
  act *branch = nullptr, *x_out = nullptr, *h = nullptr, *y = nullptr, *swiglu = nullptr;
  act* logits = nullptr;
  Buffer<Device, double> loss_sum;
  real *losses = nullptr, *out_rstd = nullptr;
  size_t logit_rows = 0;  // that logits holds
  act *dx = nullptr, *dh = nullptr, *dproj = nullptr, *dqkv = nullptr, *d_o = nullptr, *dy = nullptr;
  act *dgate_up = nullptr, *dswiglu = nullptr;
  real *dg = nullptr, *dbeta = nullptr;
  unsigned char* scratch = nullptr;

 private:
  // Memory that lives as long as the model.
  template <class T>
  T* keep(std::vector<Buffer<Device, T>>& owners, size_t n, const char* what) {
    owners.emplace_back(dev_, n, what, kRemedy);
    return owners.back().get();
  }
  act* activations(size_t n) { return keep(acts_, n, "activations"); }
  real* statistics(size_t n) { return keep(reals_, n, "statistics"); }

  Device& dev_;
  std::vector<Buffer<Device, act>> acts_;  // the memory behind all of these
  std::vector<Buffer<Device, real>> reals_;
  std::vector<Buffer<Device, unsigned char>> bytes_;
};

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

}  // namespace gdn
