// What PPO trains on, from scores and log-probs, on the CPU; rlhf_fast/ops/ppo_advantages.py is the
// specification, rlhf_fast/ops/gae.py derives the recurrence.
//
// One pass a sequence, from its last token to its first: the reward, the scan of both lambdas, and
// the moments of the advantages. Each sequence's moments are merged in the order of the sequences,
// whoever computed them, so that results don't depend on the number of threads.
#include <vector>

#include "moments.h"
#include "whitening.h"
#include "scan.h"

namespace rlhf {
namespace {

// Tokens that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 8192;

template <typename F>
struct Sequence {
  const F* logprobs;
  const F* ref_logprobs;  // null: no KL reward
  const F* values;
  const uint8_t* mask;
  F* advantages;
  F* returns;
  F* rewards;
  int64_t length;
  F score, kl_coef, gamma;
  F lams[2];  // of the advantages, of the returns
};

// A vector of F in double precision.
RLHF_INLINE void widen(Double2 v, Double2 (&to)[1]) { to[0] = v; }
RLHF_INLINE void widen(Float4 v, Double2 (&to)[2]) {
  typedef float Float2 __attribute__((vector_size(8)));
  Float2 halves[2];
  std::memcpy(halves, &v, sizeof(v));
  for (int i = 0; i < 2; ++i) to[i] = __builtin_convertvector(halves[i], Double2);
}

// Two scans where the returns have a lambda of their own.
template <int kLambdas, typename F>
RLHF_INLINE Moments estimate(const Sequence<F> s) {
  using V = typename Vector<F>::type;
  constexpr int kLanes = Vector<F>::kLanes;
  F x[kLambdas] = {}, decay[kLambdas], pivot = 0;
  for (int i = 0; i < kLambdas; ++i) decay[i] = s.gamma * s.lams[i];
  Double2 sums[kLanes / 2] = {}, squares[kLanes / 2] = {};
  int64_t count = 0;
  walk<true, kLanes>(0, s.length, [&](int64_t t, auto n) RLHF_ALWAYS_INLINE {
    const Counts<F> counts(s.mask, t, n);
    if (counts.none()) {
      for (F* out : {s.advantages, s.returns, s.rewards}) store_some(out + t, V{}, n);
      return;
    }
    const V values = counts.select(load_some<V>(s.values + t, n), V{});
    V rewards = {};
    if (s.ref_logprobs != nullptr) {
      const V logprobs = load_some<V>(s.logprobs + t, n), ref = load_some<V>(s.ref_logprobs + t, n);
      rewards = counts.select(-s.kl_coef * (logprobs - ref), V{});
    }
    if (count == 0) {
      rewards[counts.last()] += s.score;
      pivot = rewards[counts.last()] - values[counts.last()];
    }
    count += counts.count();
    store_some(s.rewards + t, rewards, n);

    const V errors = rewards - values;
    V advantages[kLambdas];
    for (int i = 0; i < kLambdas; ++i) {
      V c = counts.select(V{} + decay[i], V{} + F(1));
      // With one product to a sum, compilers fuse the same ones whatever kLambdas is.
      V b = s.gamma * (values + s.lams[i] * errors);
      compose<true>(b, c);
      const V after = b + c * x[i];
      advantages[i] = errors + shift<true>(after, V{} + x[i]);
      x[i] = after[0];
    }
    const V returns = advantages[kLambdas - 1] + values;
    store_some(s.advantages + t, counts.select(advantages[0], V{}), n);
    store_some(s.returns + t, counts.select(returns, V{}), n);
    Double2 wide[kLanes / 2];
    widen(counts.select(advantages[0], V{} + pivot), wide);
    for (int i = 0; i < kLanes / 2; ++i) {
      const Double2 apart = wide[i] - double(pivot);
      sums[i] += apart;
      squares[i] += apart * apart;
    }
  });
  for (int i = 1; i < kLanes / 2; ++i) {
    sums[0] += sums[i];
    squares[0] += squares[i];
  }
  return {double(count), double(pivot), sums[0][0] + sums[0][1], squares[0][0] + squares[0][1]};
}

// target_clones does not take templates, hence a function per instance.
#define RLHF_ADVANTAGES(F)                                                       \
  RLHF_CLONES Moments advantages_of(const Sequence<F>& s) {                      \
    return s.lams[0] == s.lams[1] ? estimate<1>(s) : estimate<2>(s);             \
  }                                                                              \
  RLHF_CLONES int64_t counted(const uint8_t* mask, int64_t length, F) {          \
    int64_t count = 0;                                                           \
    for (int64_t t = 0; t < length; ++t) count += mask[t] != 0;                  \
    return count;                                                                \
  }                                                                              \
  RLHF_CLONES void whiten_row(F* x, const uint8_t* mask, int64_t length, double mean, \
                              double scale) {                                    \
    for (int64_t t = 0; t < length; ++t) {                                       \
      const F whitened = static_cast<F>((x[t] - mean) * scale);                  \
      x[t] = mask[t] != 0 ? whitened : F(0);                                     \
    }                                                                            \
  }
RLHF_ADVANTAGES(float)
RLHF_ADVANTAGES(double)
#undef RLHF_ADVANTAGES

}  // namespace

void ppo_advantages_forward(
    uint64_t scores, uint64_t logprobs, int64_t logprobs_stride, uint64_t ref_logprobs,
    int64_t ref_logprobs_stride, uint64_t values, int64_t values_stride, uint64_t mask,
    int64_t mask_stride, uint64_t gamma, double gamma_value, uint64_t lam, double lam_value,
    uint64_t value_lam, double value_lam_value, double adaptive_lam, double kl_coef,
    uint64_t finished, double missing_eos_penalty, uint64_t cu_seqlens, uint64_t advantages,
    uint64_t returns, uint64_t rewards, uint64_t moments, bool with_moments, int64_t sequences,
    int64_t length, bool fp64, int threads) {
  const Layout layout("ppo_advantages", sequences, length, cu_seqlens);
  std::vector<Moments> partial(sequences);
  auto compute = [&](auto zero) {
    using F = decltype(zero);
    const Coefficient<F> gammas(gamma, gamma_value), lams(lam, lam_value);
    const Coefficient<F> value_lams(value_lam, value_lam_value);
    const bool decoupled = value_lam != 0 || value_lam_value >= 0;
    const Rows<const F> in[] = {{logprobs, logprobs_stride},
                                {ref_logprobs, ref_logprobs_stride},
                                {values, values_stride}};
    const Rows<F> out[] = {{advantages, length}, {returns, length}, {rewards, length}};
    const Rows<const uint8_t> masks(mask, mask_stride);
    const F* all_scores = reinterpret_cast<const F*>(scores);
    const uint8_t* done = reinterpret_cast<const uint8_t*>(finished);
    threads = threads_for(layout.total(), kGrain,
                          static_cast<int>(std::min<int64_t>(threads, sequences)));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t tokens = layout.length_of(i);
      const uint8_t* counts = masks.of(layout, i);
      const bool missed = done != nullptr && done[i] == 0;
      F lambda = lams[i];
      if (adaptive_lam > 0) {
        const double n = static_cast<double>(counted(counts, tokens, F()));
        lambda = static_cast<F>(std::max(0.0, 1 - 1 / (adaptive_lam * std::max(n, 1.0))));
      }
      partial[i] = advantages_of(Sequence<F>{
          in[0].of(layout, i), in[1].of(layout, i), in[2].of(layout, i), counts,
          out[0].of(layout, i), out[1].of(layout, i), out[2].of(layout, i), tokens,
          missed ? all_scores[i] - F(missing_eos_penalty) : all_scores[i], F(kl_coef), gammas[i],
          {lambda, decoupled ? value_lams[i] : lambda}});
    }
  };
  fp64 ? compute(double{}) : compute(float{});
  Moments all = {};
  if (with_moments)
    for (const Moments& one : partial) all.merge(one);
  double* to = reinterpret_cast<double*>(moments);
  to[0] = all.count, to[1] = all.mean(), to[2] = all.spread();
}

void ppo_advantages_whiten(uint64_t advantages, uint64_t mask, int64_t mask_stride,
                           uint64_t moments, int64_t rows, int64_t length, bool fp64, int threads) {
  const double* from = reinterpret_cast<const double*>(moments);
  const double mean = from[1], scale = whitening_scale(from[0], from[2]);
  const uint8_t* counts = reinterpret_cast<const uint8_t*>(mask);
  // A packed batch is one row: cut up, it fills the machine too.
  const int64_t pieces = std::max<int64_t>(1, length / kGrain);
  threads = threads_for(rows * length, kGrain, threads);
  auto compute = [&](auto zero) {
    using F = decltype(zero);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < rows * pieces; ++k) {
      const int64_t row = k / pieces, begin = length * (k % pieces) / pieces;
      const int64_t end = length * (k % pieces + 1) / pieces;
      whiten_row(reinterpret_cast<F*>(advantages) + row * length + begin,
                 counts + row * mask_stride + begin, end - begin, mean, scale);
    }
  };
  fp64 ? compute(double{}) : compute(float{});
}

}  // namespace rlhf
