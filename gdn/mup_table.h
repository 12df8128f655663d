// ./train_gdn -mup_table json: the rules of mup.h for the model that the options describe, as numbers for other
// people's code (scripts/mup_groups.py makes PyTorch's parameter groups of them).
#pragma once

#include <cstdio>
#include <string>

#include "json.h"
#include "mup_names.h"
#include "parameters.h"
#include "settings.h"

namespace gdn {

// {"parametrization", "width", "base_width", "layers", "base_layers", "head_dim_k": the sizes,
//  "forward": {"logits", "readout", "branches"}: m_out; s; what each branch is multiplied by before it is added,
//  "wd_mode", "eps_mode": of the factors below,
//  "tensors": [{"name": flash-linear-attention's, "shape", "class": of mup.h,
//               "init": {"normal": its std} or {"uniform": half its range} or {"constant": 1} or null, the gates'
//                       time scales, which no size changes (gdn/parameters.h),
//               "adamw": {"lr", "weight_decay", "eps"}, "sgd": {"lr", "weight_decay"}: factors}]}
// A tensor's learning rate is lr times its factor; so is weight_decay, which a step of AdamW multiplies by that
// learning rate, and eps. Sources: mup.h, sections 3, 5, 6, 7.
inline Json mup_json(const ModelConfig& config, DecayMode decay_mode, EpsMode eps_mode) {
  const Mup m = config.mup();
  Json::Array tensors;
  for (const Tensor& t : make_parameter_table(config).tensors) {
    Json::Array shape;
    for (const int64_t n : t.shape) shape.emplace_back(n);
    const auto init = [&]() -> Json {
      if (drawn_from_a_normal(t.cls)) return Json::Object{{"normal", init_std(m, t.cls, t.fan_in)}};
      if (t.cls == TensorClass::conv) return Json::Object{{"uniform", conv_init_range(m)}};
      if (t.cls == TensorClass::gate_scalar) return Json();
      return Json::Object{{"constant", 1.0}};
    };
    const auto lr = [&](OptimizerKind optimizer) {
      return learning_rate_scale(m, optimizer, t.cls, t.fan_in);
    };
    const auto decay = [&](OptimizerKind optimizer) {
      return weight_decay_scale(m, optimizer, t.cls, decay_mode, t.fan_in);
    };
    constexpr OptimizerKind kAdamw = OptimizerKind::adamw, kSgd = OptimizerKind::sgd;
    tensors.push_back(
        Json::Object{{"name", t.name},
                     {"shape", std::move(shape)},
                     {"class", name(t.cls)},
                     {"init", init()},
                     {"adamw", Json::Object{{"lr", lr(kAdamw)},
                                            {"weight_decay", decay(kAdamw)},
                                            {"eps", epsilon_scale(m, t.cls, eps_mode, t.fan_in)}}},
                     {"sgd", Json::Object{{"lr", lr(kSgd)}, {"weight_decay", decay(kSgd)}}}});
  }
  return Json::Object{{"parametrization", name(m.parametrization)},
                      {"width", int64_t(config.width)},
                      {"base_width", int64_t(config.base_width)},
                      {"layers", int64_t(m.layers)},
                      {"base_layers", int64_t(m.base_layers)},
                      {"head_dim_k", int64_t(config.head_dim_k)},
                      {"forward", Json::Object{{"logits", logit_scale(m)},
                                               {"readout", readout_scale(m)},
                                               {"branches", residual_scale(m)}}},
                      {"wd_mode", name(decay_mode)},
                      {"eps_mode", name(eps_mode)},
                      {"tensors", std::move(tensors)}};
}

// Prints it, of the options' model (8 layers and GPT-2's vocabulary, where none are given) or that of -load.
inline void print_mup_table(Options& o, const OptionTable& table) {
  if (o.layers == 0) o.layers = 8;
  resolve_defaults(o, false);
  const ModelConfig config = o.load.empty()
                                 ? config_of_options(o, o.vocab_size ? o.vocab_size : 50257)
                                 : config_of_checkpoint(o, table, open_any_checkpoint(o.load), o.vocab_size);
  std::printf("%s\n", json_text(mup_json(config, o.decay_mode, o.eps_mode), true).c_str());
}

}  // namespace gdn
