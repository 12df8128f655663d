// Research options of mup.h: rules that were measured against its table, or are needed to measure it. None is
// a default. mup.h includes this file at its end; what is derived there is not repeated here.
//
// -gates output, aligned (under mup)  What no learning rate of a gate mends: da and db reach the residual
//   stream as W_a^T da and W_b^T db, Theta(1/d) for fixed heads, as large as all else there. So every update
//   before the gate has a part along the rows of W_a and W_b, which these meet aligned: d terms
//   Theta(d^-1/2), and a and b move by Theta(d^1/2) times that part's share. Output weights of [TP5], which
//   matrices of H rows are where H does not grow, start smaller,
//     std ~ fan-in^-1/2 (H/d)^1/2        d^-1 for fixed heads
//   so that a and b start at d^-1/2 (dt_bias and beta = sigmoid(0) give the gates their first values) and
//   become Theta(1) by their own update, while W_a^T da is Theta(d^-3/2). `output` is that; `aligned` has the
//   gradients of aligned signs, Theta(dv/d), too: SGD -1 for gates and 0 for their scalars with fixed heads.
//   Measured: dev/doc/transfer.md, 5.
// -gains hidden (under mup and mup0)  gains and taps like hidden weights, as the released code has them.
//   Measured: dev/doc/transfer.md, 4.
// -readout mup, sp (under any)  the s of mup, or of sp. With it mup and mup0 differ in the gates alone.
//   Measured: dev/doc/transfer.md, 11.
#pragma once

#include "../mup.h"

namespace gdn {

inline Growth chosen_growth(const Mup& m, TensorClass cls, FanIn fan_in) {
  const auto [r, r_H, r_k, r_v, r_I] = ratios(m);
  const bool is_vector = cls == TensorClass::conv || cls == TensorClass::gain ||
                         cls == TensorClass::output_gain || cls == TensorClass::final_gain;
  const bool as_hidden = is_vector && m.vectors == VectorRule::hidden;
  Growth c = growth(m, as_hidden ? TensorClass::hidden : cls, fan_in);
  const bool of_gate = cls == TensorClass::gate || cls == TensorClass::gate_scalar;
  if (of_gate && m.gates != GateRule::independent && m.parametrization == Parametrization::mup) {
    if (cls == TensorClass::gate) c.std = std::sqrt(1 / r * (r_H / r));
    if (m.gates == GateRule::aligned) c.gradient = r_v / r;
  }
  return with_depth(m, cls, c);
}

}  // namespace gdn
