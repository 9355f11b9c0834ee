// The critic's loss, its statistics and gradient on the CPU; rlhf_fast/ops/value_loss.py has the
// formulas, value_loss.h those of one token.
#include "value_loss.h"

#include "sequences.h"
#include "tiles.h"

namespace rlhf {
namespace {

// Tokens that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 16384;
constexpr int64_t kSegment = 8192;

template <typename F>
struct Tokens {
  const F *values, *old, *returns;
  const uint8_t* mask;
  F* grad;  // or null
  int64_t count;
  F clip;
};

template <typename F>
RLHF_INLINE void add_deviations(const F* x, const F* counts, int64_t padded, F count, Moments& m) {
  const double pivot = m.pivot;
  double total = 0, squares = 0;
#pragma omp simd reduction(+ : total, squares)
  for (int64_t i = 0; i < padded; ++i) {
    const double d = counts[i] != 0 ? double(x[i]) - pivot : 0;
    total += d;
    squares += d * d;
  }
  m.count += count;
  m.sum += total;
  m.squares += squares;
}

// Adds the tile that begins with token `at`. Deviations are summed in fp64, as a common offset and
// its rounding must not matter; all else in F, tile by tile.
template <bool kClips, typename F>
RLHF_INLINE void add_tile(const Tokens<F>& s, int64_t at, ValueTotals& totals) {
  alignas(64) F counts[kTokenTile], value[kTokenTile], old[kTokenTile], grad[kTokenTile];
  alignas(64) F target[kTokenTile], rest[kTokenTile];
  const int64_t n = std::min(kTokenTile, s.count - at);
  const int64_t padded = gather_mask(s.mask + at, n, counts);
  gather(s.values + at, n, padded, counts, value);
  gather(s.old + at, n, padded, counts, old);
  gather(s.returns + at, n, padded, counts, target);
  F loss = 0, clipped = 0;
#pragma omp simd reduction(+ : loss, clipped)
  for (int64_t i = 0; i < padded; ++i) {
    const ValueTerm<F> term = value_term(kClips, value[i], old[i], target[i], s.clip);
    loss += term.loss;
    clipped += term.clipped;
    grad[i] = term.grad;
    rest[i] = target[i] - value[i];
  }
  if (s.grad != nullptr) std::memcpy(s.grad + at, grad, n * sizeof(F));
  const F count = sum(counts, padded);
  totals.loss += loss;
  totals.clipped += clipped;
  totals.values += sum(value, padded);
  totals.returns += sum(target, padded);
  add_deviations(target, counts, padded, count, totals.targets);
  add_deviations(rest, counts, padded, count, totals.errors);
}

template <typename F>
RLHF_INLINE ValueTotals add_segment(const Tokens<F>& s) {
  ValueTotals totals;
  // Any token that counts will do as a pivot.
  const void* found = std::memchr(s.mask, 1, s.count);
  const int64_t first = found ? static_cast<const uint8_t*>(found) - s.mask : 0;
  totals.targets.pivot = found ? s.returns[first] : F(0);
  totals.errors.pivot = found ? s.returns[first] - s.values[first] : F(0);
  for (int64_t at = 0; at < s.count; at += kTokenTile)
    s.clip < kInf<F> ? add_tile<true>(s, at, totals) : add_tile<false>(s, at, totals);
  return totals;
}

// target_clones does not take templates, hence functions per dtype.
RLHF_CLONES ValueTotals add(const Tokens<float>& s) { return add_segment(s); }
RLHF_CLONES ValueTotals add(const Tokens<double>& s) { return add_segment(s); }

}  // namespace

void value_loss_forward(uint64_t values, int64_t values_stride, uint64_t old_values,
                        int64_t old_stride, uint64_t returns, int64_t returns_stride,
                        uint64_t mask, int64_t mask_stride, uint64_t normalizer,
                        double normalizer_value, double clip, uint64_t loss, uint64_t out,
                        uint64_t grad, int64_t sequences, int64_t length, bool fp64,
                        int threads) {
  Layout layout("value_loss", sequences, length, 0);
  auto run = [&](auto zero) {
    using F = decltype(zero);
    const Operand<F> value(values, values_stride), old(old_values, old_stride),
        target(returns, returns_stride);
    const Operand<uint8_t> counts(mask, mask_stride);
    layout.flatten(value, old, target, counts);
    const std::vector<Segment> parts = layout.segments(kSegment);
    const int64_t count = parts.size();
    const int used =
        threads_for(layout.total(), kGrain, static_cast<int>(std::min<int64_t>(threads, count)));
    std::vector<ValueTotals> partial(count);
#pragma omp parallel for schedule(dynamic) num_threads(used) if (used > 1)
    for (int64_t k = 0; k < count; ++k) {
      const Segment& s = parts[k];
      partial[k] = add({value.at(s, false), old.at(s, false), target.at(s, false),
                        counts.at(s, false),
                        grad ? reinterpret_cast<F*>(grad) + layout.out(s) : nullptr,
                        s.end - s.begin, F(clip)});
    }
    ValueTotals totals;
    for (const ValueTotals& each : partial) totals.merge(each);
    double divisor = normalizer_value != 0 ? normalizer_value : totals.targets.count;
    if (normalizer != 0) divisor = *reinterpret_cast<const F*>(normalizer);
    finish(totals, divisor, reinterpret_cast<F*>(loss), reinterpret_cast<F*>(out));
  };
  fp64 ? run(double{}) : run(float{});
}

}  // namespace rlhf
