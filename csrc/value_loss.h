// One token of the critic's loss, and what comes of all of them, for the C++ and the CUDA kernel.
// rlhf_fast/ops/value_loss.py has the formulas.
#pragma once

#include "moments.h"

namespace rlhf {

template <typename F>
struct ValueTerm {
  F loss, grad;  // of half the squared error
  F clipped;     // 1 where the loss is that of the clipped value
};

// Selects are written so that NaN passes. Without `clips` the old value may be anything.
template <typename F>
RLHF_PORTABLE ValueTerm<F> value_term(bool clips, F value, F old, F target, F clip) {
  const F lower = old - clip, upper = old + clip;
  const F raised = value < lower ? lower : value;
  const F capped = raised > upper ? upper : raised;
  const F near = clips ? (old == old ? capped : old) : value;
  const F error = (value - target) * (value - target);
  const F clipped = (near - target) * (near - target);
  // A tie beyond the bounds: half of it is the free value's, as in torch.
  const F tied = clipped == error && near != value ? F(0.5) : F(1);
  const F slope = clipped > error ? F(0) : tied;
  const F larger = clipped > error ? clipped : error;
  return {F(0.5) * (near == near ? larger : near), slope * (value - target),
          clipped > error ? F(1) : F(0)};
}

// Sums of any number of tokens.
struct ValueTotals {
  double loss = 0, clipped = 0, values = 0, returns = 0;
  Moments targets, errors;  // of the return, and of the return - value

  RLHF_PORTABLE void merge(const ValueTotals& other) {
    loss += other.loss;
    clipped += other.clipped;
    values += other.values;
    returns += other.returns;
    targets.merge(other.targets);
    errors.merge(other.errors);
  }
};

// The loss and `out`; a divisor of 0 stands for 1.
template <typename F>
RLHF_PORTABLE void finish(const ValueTotals& t, double divisor, F* loss, F* out) {
  divisor = divisor == 0 ? 1 : divisor;
  const double spread = t.targets.variance();
  const double explained = spread > 0 ? 1 - t.errors.variance() / spread : 0;
  *loss = F(t.loss / divisor);
  out[0] = F(t.clipped / divisor);
  out[1] = F(explained * (t.targets.count / divisor));
  out[2] = F(t.values / divisor);
  out[3] = F(t.returns / divisor);
  out[4] = F(divisor);
}

}  // namespace rlhf
