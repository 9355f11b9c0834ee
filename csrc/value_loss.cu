// The critic's loss, its statistics and gradient on the GPU; rlhf_fast/ops/value_loss.py has the
// formulas, value_loss.h those of one token.
#include "value_loss.h"

#include "slices.cuh"

namespace rlhf {
namespace {

template <typename F>
struct Arguments {
  Operand<F> values, old, returns;
  Operand<uint8_t> mask;
  Slices slices;
  F clip;
  double normalizer_value;
  const F* normalizer;  // null: normalizer_value, or with 0 the count
  F *loss, *out;
  F* grad;  // or null
  void* partial;  // of each block
  unsigned* ticket;
};

// One more number; the first that this thread has seen is its pivot.
RLHF_PORTABLE void add(Moments& m, double x) {
  m.pivot = m.count > 0 ? m.pivot : x;
  const double d = x - m.pivot;
  m.sum += d;
  m.squares += d * d;
  m.count += 1;
}

template <typename F>
__global__ void __launch_bounds__(kBlock) value_loss_kernel(Arguments<F> a) {
  __shared__ ValueTotals left[kBlockWarps];
  F loss = 0, clipped = 0, values = 0, returns = 0;
  ValueTotals mine;
  for (int64_t i = blockIdx.x; i < a.slices.sequences * a.slices.parts; i += gridDim.x) {
    const Segment s = a.slices.segment(i);
    const F *value = a.values.at(s, false), *old = a.old.at(s, false);
    const F* target = a.returns.at(s, false);
    const uint8_t* mask = a.mask.at(s, false);
    F* grad = a.grad != nullptr ? a.grad + a.slices.out(s) : nullptr;
    for (int64_t t = threadIdx.x; t < s.end - s.begin; t += blockDim.x) {
      const bool counts = mask[t] != 0;
      const F v = counts ? value[t] : F(0), r = counts ? target[t] : F(0);
      const ValueTerm<F> term =
          value_term(a.clip < INFINITY, v, counts ? old[t] : F(0), r, a.clip);
      if (grad != nullptr) grad[t] = term.grad;
      if (!counts) continue;
      loss += term.loss;
      clipped += term.clipped;
      values += v;
      returns += r;
      add(mine.targets, r);
      add(mine.errors, r - v);
    }
  }
  mine.loss = loss;
  mine.clipped = clipped;
  mine.values = values;
  mine.returns = returns;
  mine = block_total(mine, left);
  reduce_grid(mine, a.partial, a.ticket, left, [&](const ValueTotals& totals) {
    double divisor = a.normalizer_value != 0 ? a.normalizer_value : totals.targets.count;
    if (a.normalizer != nullptr) divisor = *a.normalizer;
    finish(totals, divisor, a.loss, a.out);
  });
}

}  // namespace

void value_loss_forward_cuda(uint64_t values, int64_t values_stride, uint64_t old_values,
                             int64_t old_stride, uint64_t returns, int64_t returns_stride,
                             uint64_t mask, int64_t mask_stride, uint64_t normalizer,
                             double normalizer_value, double clip, uint64_t loss, uint64_t out,
                             uint64_t grad, int64_t sequences, int64_t length, bool fp64,
                             uint64_t partial, uint64_t ticket, int device, uint64_t stream) {
  const DeviceGuard guard(device, "value_loss");
  auto run = [&](auto zero) {
    using F = decltype(zero);
    const Operand<F> value(values, values_stride), old(old_values, old_stride),
        target(returns, returns_stride);
    const Operand<uint8_t> counts(mask, mask_stride);
    const Slices slices = flat_slices(0, sequences, length, value, old, target, counts);
    const Arguments<F> arguments = {value,
                                    old,
                                    target,
                                    counts,
                                    slices,
                                    F(clip),
                                    normalizer_value,
                                    pointer<const F>(normalizer),
                                    pointer<F>(loss),
                                    pointer<F>(out),
                                    pointer<F>(grad),
                                    pointer<void>(partial),
                                    pointer<unsigned>(ticket)};
    launch("value_loss", value_loss_kernel<F>, slices.blocks(), slices.threads(), 1, stream,
           arguments);
  };
  fp64 ? run(double{}) : run(float{});
}

}  // namespace rlhf
