// The policy loss, its statistics and gradient on the CPU; rlhf_fast/ops/policy_loss.py has the
// formulas, policy_loss.h those of one token.
//
// Segments of sequences go to the threads. A tile of one is summed in the tensors' dtype, all else
// in fp64.
#include "policy_loss_tile.h"
#include "sequences.h"

namespace rlhf {
namespace {

// Tokens that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 16384;
constexpr int64_t kSegment = 8192;

template <typename F>
RLHF_INLINE Totals<double> add_segment(const PolicyTokens<F>& s, const PolicyOptions<F>& o) {
  Totals<double> totals;
  PolicyTile<F> tile;
  for (int64_t at = 0; at < s.count; at += kTokenTile) totals.merge(add_tile(s, o, at, tile));
  return totals;
}

// What the first of two passes over a sequence finds.
struct Survey {
  int64_t tokens = 0;
  double log_ratio = 0;
};

template <typename F>
RLHF_INLINE Survey survey_segment(const PolicyTokens<F>& s, bool log_ratios) {
  Survey found;
  PolicyTile<F> t;
  for (int64_t at = 0; at < s.count; at += kTokenTile) {
    const int64_t n = std::min(kTokenTile, s.count - at);
    const int64_t padded = gather_mask(s.mask + at, n, t.counts);
    found.tokens += int64_t(sum(t.counts, padded));
    if (!log_ratios) continue;
    gather(s.fresh + at, n, padded, t.counts, t.fresh);
    gather(s.old + at, n, padded, t.counts, t.old);
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i)
      t.other[i] = bounded(t.fresh[i], F(kHuge)) - bounded(t.old[i], F(kHuge));
    found.log_ratio += sum(t.other, padded);
  }
  return found;
}

// target_clones does not take templates, hence functions per dtype.
#define RLHF_INSTANCE(F)                                                                \
  RLHF_CLONES Totals<double> add(const PolicyTokens<F>& s, const PolicyOptions<F>& o) { \
    return add_segment(s, o);                                                           \
  }                                                                                     \
  RLHF_CLONES Survey survey(const PolicyTokens<F>& s, bool log_ratios) {                \
    return survey_segment(s, log_ratios);                                               \
  }
RLHF_INSTANCE(float)
RLHF_INSTANCE(double)
#undef RLHF_INSTANCE

template <typename F>
struct Inputs {
  Operand<F> fresh, old, advantage, weight, entropy, ref, kl;
  Operand<uint8_t> mask;
  F *grad, *shares;

  PolicyTokens<F> tokens(const Layout& layout, const Segment& s) const {
    const bool packed = layout.packed();
    return {fresh.at(s, packed),
            old.at(s, packed),
            advantage.at(s, packed),
            weight.at(s, packed),
            entropy.at(s, packed),
            ref.at(s, packed),
            kl.at(s, packed),
            mask.at(s, packed),
            grad ? grad + layout.out(s) : nullptr,
            shares ? shares + layout.out(s) : nullptr,
            advantage.per_sequence,
            weight.per_sequence,
            s.end - s.begin,
            {1, true},
            1};
  }
};

template <typename F>
Totals<double> forward(Layout layout, const Inputs<F>& in, const PolicyOptions<F>& o, int threads) {
  const bool by_sequence = is_by_sequence(o.ratio, o.aggregation);
  if (!by_sequence)
    layout.flatten(in.fresh, in.old, in.advantage, in.weight, in.entropy, in.ref, in.kl, in.mask);
  const std::vector<Segment> parts = layout.segments(kSegment);
  const int64_t count = parts.size();
  const int useful = static_cast<int>(std::min<int64_t>(threads, count));
  threads = threads_for(layout.total(), kGrain, useful);

  std::vector<Survey> surveys(by_sequence ? layout.sequences : 0);
  if (by_sequence) {
    std::vector<Survey> found(count);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; ++k)
      found[k] = survey(in.tokens(layout, parts[k]), o.ratio == kSequence);
    for (int64_t k = 0; k < count; ++k) {
      surveys[parts[k].sequence].tokens += found[k].tokens;
      surveys[parts[k].sequence].log_ratio += found[k].log_ratio;
    }
  }

  std::vector<Totals<double>> partial(count);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < count; ++k) {
    PolicyTokens<F> tokens = in.tokens(layout, parts[k]);
    if (by_sequence) {
      const Survey& s = surveys[parts[k].sequence];
      tokens.ratio = sequence_ratio(F(s.log_ratio / double(std::max<int64_t>(s.tokens, 1))));
      tokens.share = F(Weights<double>(o.aggregation, double(s.tokens)).term);
    }
    partial[k] = add(tokens, o);
  }

  Totals<double> totals, of_sequence;
  for (int64_t k = 0; k < count; ++k) {
    of_sequence.merge(partial[k]);
    if (k + 1 < count && parts[k + 1].sequence == parts[k].sequence) continue;
    of_sequence.scale({o.aggregation, of_sequence.count});
    totals.merge(of_sequence);
    of_sequence = {};
  }
  return totals;
}

}  // namespace

void policy_loss_forward(uint64_t logprobs, int64_t logprobs_stride, uint64_t old_logprobs,
                         int64_t old_stride, uint64_t advantages, int64_t advantages_stride,
                         bool one_advantage, uint64_t mask, int64_t mask_stride, uint64_t weights,
                         int64_t weights_stride, bool one_weight, uint64_t entropy,
                         int64_t entropy_stride, uint64_t ref_logprobs, int64_t ref_stride,
                         uint64_t kl, int64_t kl_stride, uint64_t cu_seqlens, uint64_t normalizer,
                         double normalizer_value, int ratio, int aggregation, double lower,
                         double upper, double dual_clip, int kl_kind, bool kl_unbiased_gradient,
                         double entropy_coef, double kl_coef, uint64_t loss, uint64_t values,
                         uint64_t grad, uint64_t shares, int64_t sequences, int64_t length,
                         bool fp64, int threads) {
  const Layout layout("policy_loss", sequences, length, cu_seqlens);
  auto run = [&](auto zero) {
    using F = decltype(zero);
    const Inputs<F> inputs = {{logprobs, logprobs_stride},
                              {old_logprobs, old_stride},
                              {advantages, advantages_stride, one_advantage},
                              {weights, weights_stride, one_weight},
                              {entropy, entropy_stride},
                              {ref_logprobs, ref_stride},
                              {kl, kl_stride},
                              {mask, mask_stride},
                              reinterpret_cast<F*>(grad),
                              reinterpret_cast<F*>(shares)};
    const PolicyOptions<F> options = {ratio,
                                aggregation,
                                kl_kind,
                                kl_unbiased_gradient,
                                {F(lower), F(upper), F(dual_clip)},
                                F(kl_coef)};
    const Totals<double> totals = forward(layout, inputs, options, threads);
    double divisor = normalizer_value != 0 ? normalizer_value : totals.count;
    if (normalizer != 0) divisor = *reinterpret_cast<const F*>(normalizer);
    finish(totals, divisor, entropy_coef, kl_coef, reinterpret_cast<F*>(loss),
           reinterpret_cast<F*>(values));
  };
  fp64 ? run(double{}) : run(float{});
}

}  // namespace rlhf
