// One token of the policy loss, and what comes of all of them, for the C++ and the CUDA kernel.
// rlhf_fast/ops/policy_loss.py has the formulas, and the cases at their edges.
//
// Selects are written so that NaN passes. Arguments that choose a formula are constants wherever a
// loop is to be free of branches.
#pragma once

#include "portable.h"

namespace rlhf {

// As numbered by rlhf_fast/ops/_policy_loss_kernel.py and _reduce.py.
enum Ratio : int { kToken, kSequence, kNone, kCispo };
enum Aggregation : int { kTokenMean, kSeqMeanTokenMean, kSeqMeanTokenSum, kConstant };
enum KlKind : int { kK1, kK2, kK3 };

// Whether the sequence that a token is of makes a difference to its loss.
inline bool is_by_sequence(int ratio, int aggregation) {
  return ratio == kSequence || aggregation == kSeqMeanTokenMean || aggregation == kSeqMeanTokenSum;
}

constexpr double kHuge = 1e18;        // stands in for an infinite log-prob
constexpr double kMaxLogRatio = 20.;  // bounds log-ratios before they are exponentiated

template <typename F>
struct Clipping {
  F lower, upper, dual;  // dual is inf for none
};

template <typename F>
struct PolicyTerm {
  F loss, grad;  // grad by the log-prob
  F ratio;       // before clipping
  F k1, k3;      // estimates of KL(old || new)
  F low, high;   // 1 where the ratio is beyond the bound, and the bound decides
};

// What kSequence has in each token, of the mean log-ratio; `moves`: with a derivative.
template <typename F>
struct SequenceRatio {
  F ratio;
  bool moves;
};

template <typename F>
RLHF_PORTABLE SequenceRatio<F> sequence_ratio(F log_ratio) {
  return {powers(bounded(log_ratio, F(kMaxLogRatio))).exp,
          std::fabs(log_ratio) <= F(kMaxLogRatio)};
}

// `log_ratio` is fresh - old; `of_sequence` is for kSequence alone.
template <typename F>
RLHF_PORTABLE PolicyTerm<F> policy_term(int kind, F fresh, F log_ratio,
                                        SequenceRatio<F> of_sequence, F advantage, F weight,
                                        const Clipping<F>& clip) {
  const F moved = bounded(log_ratio, F(kMaxLogRatio));
  const Powers<F> power = powers(moved);
  const F ratio = kind == kSequence ? of_sequence.ratio : power.exp;
  const F raised = ratio < clip.lower ? clip.lower : ratio;
  const F clipped = raised > clip.upper ? clip.upper : raised;
  PolicyTerm<F> t = {0, 0, ratio, -moved, power.excess, 0, 0};
  if (kind == kNone) {
    t.grad = -advantage;
    t.loss = t.grad * fresh;
  } else if (kind == kCispo) {
    t.grad = -advantage * clipped;
    t.loss = t.grad * fresh;
    t.low = ratio < clip.lower ? F(1) : F(0);
    t.high = ratio > clip.upper ? F(1) : F(0);
  } else {
    const F free = -advantage * ratio, bound = -advantage * clipped;
    const F larger = bound > free ? bound : free;
    // A tie beyond the bounds is one of rounding; half of it is the free one's, as in torch.
    const F tied = bound == free && ratio != clipped ? F(0.5) : F(1);
    const F slope = bound > free ? F(0) : tied;
    const F most = -advantage * clip.dual;
    const bool is_dual = (advantage < 0) & (larger > most);
    const bool moves =
        kind == kSequence ? of_sequence.moves : std::fabs(log_ratio) <= F(kMaxLogRatio);
    t.loss = is_dual ? most : larger;
    t.grad = moves & !is_dual ? slope * free : F(0);
    t.low = (ratio < clip.lower) & (advantage < 0) ? F(1) : F(0);
    t.high = (ratio > clip.upper) & (advantage > 0) ? F(1) : F(0);
  }
  t.loss *= weight;
  t.grad *= weight;
  return t;
}

template <typename F>
struct KlTerm {
  F value, grad;
};

// The estimate of KL(policy || reference) of ops/kl_estimate.py.
template <typename F>
RLHF_PORTABLE KlTerm<F> kl_term(int kind, bool unbiased_gradient, F fresh, F ref, F log_ratio) {
  const F u = fresh - ref;
  KlTerm<F> t = {u, 1};
  if (kind == kK2) t = {F(0.5) * u * u, u};
  if (kind == kK3) {
    const Powers<F> power = powers(u < F(-kMaxLogRatio) ? F(kMaxLogRatio) : -u);
    t = {power.excess, u >= F(-kMaxLogRatio) ? -power.expm1 : F(0)};
  }
  if (unbiased_gradient) {
    const F most = log_ratio > F(kMaxLogRatio) ? F(kMaxLogRatio) : log_ratio;
    t.grad = u * powers(most).exp;
  }
  return t;
}

// In the order of METRICS in rlhf_fast/ops/_policy_loss_kernel.py. The first kTerms are terms of
// the loss, the others statistics.
enum Sum : int { kPolicy, kEntropy, kKl, kLow, kHigh, kK1Sum, kK3Sum, kRatioSum, kSums };
constexpr int kTerms = 3, kValues = kSums + 2;

// What sums of a sequence with this many tokens that count weigh in those of all.
template <typename S>
struct Weights {
  S term = 1, statistic = 1, count;  // count: in the divisor

  RLHF_PORTABLE Weights(int aggregation, S tokens) : count(tokens) {
    if (aggregation == kTokenMean || aggregation == kConstant) return;
    statistic = tokens > 0 ? 1 / tokens : S(0);
    term = aggregation == kSeqMeanTokenMean ? statistic : S(1);
    count = tokens > 0 ? S(1) : S(0);
  }
};

// Sums of any number of tokens. `largest` is that of the ratios, where none is NaN.
template <typename S>
struct Totals {
  S sums[kSums] = {}, largest = 0, count = 0;

  template <typename T>
  RLHF_PORTABLE void merge(const Totals<T>& other) {
    for (int k = 0; k < kSums; ++k) sums[k] += other.sums[k];
    largest = other.largest > largest ? S(other.largest) : largest;
    count += other.count;
  }
  RLHF_PORTABLE void scale(const Weights<S>& weights) {
    for (int k = 0; k < kSums; ++k) sums[k] *= k < kTerms ? weights.term : weights.statistic;
    count = weights.count;
  }
};

// The loss and `values`; a divisor of 0 stands for 1.
template <typename F>
RLHF_PORTABLE void finish(const Totals<double>& t, double divisor, double entropy_coef,
                          double kl_coef, F* loss, F* values) {
  divisor = divisor == 0 ? 1 : divisor;
  double means[kSums];
  for (int k = 0; k < kSums; ++k) {
    means[k] = t.sums[k] / divisor;
    values[k] = F(means[k]);
  }
  // Ratios are positive and bounded: their sum is NaN if one is.
  values[kSums] = t.sums[kRatioSum] == t.sums[kRatioSum] ? F(t.largest) : F(t.sums[kRatioSum]);
  values[kSums + 1] = F(divisor);
  // A term without weight may be infinite.
  double total = means[kPolicy];
  if (entropy_coef != 0) total -= entropy_coef * means[kEntropy];
  if (kl_coef != 0) total += kl_coef * means[kKl];
  *loss = F(total);
}

}  // namespace rlhf
