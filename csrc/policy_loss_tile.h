// A tile of tokens of the policy loss on the CPU, in loops that auto-vectorise; see policy_loss.h.
#pragma once

#include "policy_loss.h"
#include "tiles.h"

namespace rlhf {

template <typename F>
struct PolicyOptions {
  int ratio, aggregation, kl_kind;
  bool kl_unbiased_gradient;
  Clipping<F> clip;
  F kl_coef;
};

// One segment: pointers to its first token, or to the sequence's value.
template <typename F>
struct PolicyTokens {
  const F *fresh, *old, *advantage, *weight, *entropy, *ref, *kl;  // weight to kl: or null
  const uint8_t* mask;
  F *grad, *shares;  // or null
  bool one_advantage, one_weight;
  int64_t count;
  SequenceRatio<F> ratio;
  F share;  // the sequence's weight in the loss
};

template <typename F>
struct PolicyTile {
  alignas(64) F counts[kTokenTile], fresh[kTokenTile], old[kTokenTile], advantage[kTokenTile];
  alignas(64) F weight[kTokenTile], other[kTokenTile], grad[kTokenTile];
};

template <int kRatio, typename F>
RLHF_INLINE void add_policy(PolicyTile<F>& t, int64_t padded, SequenceRatio<F> of_sequence,
                            const Clipping<F>& clip, Totals<F>& totals) {
  F loss = 0, k1 = 0, k3 = 0, low = 0, high = 0, ratio = 0, largest = 0;
#pragma omp simd reduction(+ : loss, k1, k3, low, high, ratio) reduction(max : largest)
  for (int64_t i = 0; i < padded; ++i) {
    const F fresh = bounded(t.fresh[i], F(kHuge));
    const F log_ratio = fresh - bounded(t.old[i], F(kHuge));
    const PolicyTerm<F> term =
        policy_term(kRatio, fresh, log_ratio, of_sequence, bounded(t.advantage[i], F(kHuge)),
                    bounded(t.weight[i], F(kHuge)), clip);
    const F counted = t.counts[i] != 0 ? term.ratio : F(0);
    loss += term.loss;
    k1 += term.k1;
    k3 += term.k3;
    low += term.low;
    high += term.high;
    ratio += counted;
    largest = counted > largest ? counted : largest;
    t.grad[i] = term.grad;
  }
  totals.sums[kPolicy] = loss;
  totals.sums[kK1Sum] = k1;
  totals.sums[kK3Sum] = k3;
  totals.sums[kLow] = low;
  totals.sums[kHigh] = high;
  totals.sums[kRatioSum] = ratio;
  totals.largest = largest;
}

template <int kKind, bool kUnbiased, typename F>
RLHF_INLINE void add_kl(PolicyTile<F>& t, int64_t padded, F coefficient, Totals<F>& totals) {
  F kl = 0;
#pragma omp simd reduction(+ : kl)
  for (int64_t i = 0; i < padded; ++i) {
    const F fresh = bounded(t.fresh[i], F(kHuge));
    const F log_ratio = fresh - bounded(t.old[i], F(kHuge));
    const KlTerm<F> term =
        kl_term(kKind, kUnbiased, fresh, bounded(t.other[i], F(kHuge)), log_ratio);
    kl += term.value;
    // A term without weight may be NaN.
    t.grad[i] += coefficient != 0 ? coefficient * term.grad : F(0);
  }
  totals.sums[kKl] = kl;
}

template <typename F>
RLHF_INLINE Totals<F> add_tile(const PolicyTokens<F>& s, const PolicyOptions<F>& o, int64_t at,
                               PolicyTile<F>& t) {
  const int64_t n = std::min(kTokenTile, s.count - at);
  const int64_t padded = gather_mask(s.mask + at, n, t.counts);
  gather(s.fresh + at, n, padded, t.counts, t.fresh);
  gather(s.old + at, n, padded, t.counts, t.old);
  if (s.one_advantage) {
    spread(*s.advantage, padded, t.counts, t.advantage);
  } else {
    gather(s.advantage + at, n, padded, t.counts, t.advantage);
  }
  if (s.weight == nullptr || s.one_weight) {
    spread(s.weight ? *s.weight : F(1), padded, t.counts, t.weight);
  } else {
    gather(s.weight + at, n, padded, t.counts, t.weight);
  }
  Totals<F> totals;
  switch (o.ratio) {
    case kToken: add_policy<kToken>(t, padded, s.ratio, o.clip, totals); break;
    case kSequence: add_policy<kSequence>(t, padded, s.ratio, o.clip, totals); break;
    case kNone: add_policy<kNone>(t, padded, s.ratio, o.clip, totals); break;
    default: add_policy<kCispo>(t, padded, s.ratio, o.clip, totals);
  }
  totals.count = sum(t.counts, padded);
  if (s.entropy != nullptr) {
    gather(s.entropy + at, n, padded, t.counts, t.other);
    totals.sums[kEntropy] = sum(t.other, padded);
  }
  if (s.kl != nullptr) {
    gather(s.kl + at, n, padded, t.counts, t.other);
    totals.sums[kKl] = sum(t.other, padded);
  }
  if (s.ref != nullptr) {
    gather(s.ref + at, n, padded, t.counts, t.other);
    switch (o.kl_kind * 2 + o.kl_unbiased_gradient) {
      case kK1 * 2 + 1: add_kl<kK1, true>(t, padded, o.kl_coef, totals); break;
      case kK2 * 2: add_kl<kK2, false>(t, padded, o.kl_coef, totals); break;
      case kK2 * 2 + 1: add_kl<kK2, true>(t, padded, o.kl_coef, totals); break;
      case kK3 * 2: add_kl<kK3, false>(t, padded, o.kl_coef, totals); break;
      case kK3 * 2 + 1: add_kl<kK3, true>(t, padded, o.kl_coef, totals); break;
      default: add_kl<kK1, false>(t, padded, o.kl_coef, totals);
    }
  }
  if (s.grad != nullptr) {
    F* grad = s.grad + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      // The bound on log-probs takes the gradient of what lies beyond it.
      const F scaled = t.grad[i] * s.share, fresh = t.fresh[i];
      const F open = std::fabs(fresh) <= F(kHuge) ? scaled : F(0);
      grad[i] = t.counts[i] != 0 ? open : F(0);
    }
  }
  if (s.shares != nullptr) {
    F* shares = s.shares + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) shares[i] = t.counts[i] * s.share;
  }
  return totals;
}

}  // namespace rlhf
