// The policy loss, its statistics and gradient on the GPU; rlhf_fast/ops/policy_loss.py has the
// formulas, policy_loss.h those of one token.
//
// A block walks segments of sequences, whole ones twice where a token's loss depends on how many
// its sequence has or on their mean log-ratio. A thread sums its tokens in the tensors' dtype.
#include "policy_loss.h"

#include "slices.cuh"

namespace rlhf {
namespace {

template <typename F>
struct Arguments {
  Operand<F> fresh, old, advantage, weight, entropy, ref, kl;
  Operand<uint8_t> mask;
  Slices slices;
  Clipping<F> clip;
  int ratio, aggregation, kl_kind;
  bool kl_unbiased_gradient;
  double entropy_coef, kl_coef, normalizer_value;
  const F* normalizer;  // null: normalizer_value, or with 0 the count
  F *loss, *values;
  F *grad, *shares;  // or null
  void* partial;  // of each block
  unsigned* ticket;
};

// Of a sequence.
template <typename F>
struct Survey {
  F tokens = 0, log_ratio = 0;

  RLHF_PORTABLE void merge(const Survey& other) {
    tokens += other.tokens;
    log_ratio += other.log_ratio;
  }
};

// Whatever lies in a token that does not count is 0, what is infinite huge.
template <typename F>
RLHF_PORTABLE F counted(F x, bool counts) {
  return counts ? bounded(x, F(kHuge)) : F(0);
}

// For all threads of the block.
template <typename F>
RLHF_PORTABLE Survey<F> survey(const Arguments<F>& a, const Segment& s, Survey<F>* left) {
  const bool packed = a.slices.packed();
  const uint8_t* mask = a.mask.at(s, packed);
  const F *fresh = a.fresh.at(s, packed), *old = a.old.at(s, packed);
  Survey<F> found;
  for (int64_t t = threadIdx.x; t < s.end - s.begin; t += blockDim.x) {
    const bool counts = mask[t] != 0;
    found.tokens += counts ? F(1) : F(0);
    if (a.ratio != kSequence) continue;
    found.log_ratio += counted(fresh[t], counts) - counted(old[t], counts);
  }
  found = block_total(found, left);
  if (threadIdx.x == 0) left[0] = found;
  __syncthreads();
  found = left[0];
  __syncthreads();
  return found;
}

// Adds the segment's tokens of this thread up, and writes their gradients.
template <typename F>
RLHF_PORTABLE Totals<F> walk(const Arguments<F>& a, const Segment& s, SequenceRatio<F> of_sequence,
                             F share) {
  const bool packed = a.slices.packed();
  const uint8_t* mask = a.mask.at(s, packed);
  const F *fresh = a.fresh.at(s, packed), *old = a.old.at(s, packed);
  const F *advantage = a.advantage.at(s, packed), *weight = a.weight.at(s, packed);
  const F *entropy = a.entropy.at(s, packed), *ref = a.ref.at(s, packed), *kl = a.kl.at(s, packed);
  const int64_t out = a.slices.out(s);
  Totals<F> totals;
  for (int64_t t = threadIdx.x; t < s.end - s.begin; t += blockDim.x) {
    const bool counts = mask[t] != 0;
    const F raw = fresh[t], x = counted(raw, counts), log_ratio = x - counted(old[t], counts);
    const PolicyTerm<F> term =
        policy_term(a.ratio, x, log_ratio, of_sequence,
                    counted(advantage[a.advantage.per_sequence ? 0 : t], counts),
                    weight ? counted(weight[a.weight.per_sequence ? 0 : t], counts) : F(1), a.clip);
    F grad = term.grad;
    if (ref != nullptr) {
      const KlTerm<F> to_ref =
          kl_term(a.kl_kind, a.kl_unbiased_gradient, x, counted(ref[t], counts), log_ratio);
      totals.sums[kKl] += to_ref.value;
      // A term without weight may be NaN.
      if (a.kl_coef != 0) grad += F(a.kl_coef) * to_ref.grad;
    }
    if (kl != nullptr) totals.sums[kKl] += counts ? kl[t] : F(0);
    if (entropy != nullptr) totals.sums[kEntropy] += counts ? entropy[t] : F(0);
    totals.sums[kPolicy] += term.loss;
    totals.sums[kLow] += term.low;
    totals.sums[kHigh] += term.high;
    totals.sums[kK1Sum] += term.k1;
    totals.sums[kK3Sum] += term.k3;
    const F ratio = counts ? term.ratio : F(0);
    totals.sums[kRatioSum] += ratio;
    totals.largest = ratio > totals.largest ? ratio : totals.largest;
    totals.count += counts ? F(1) : F(0);
    // The bound on log-probs takes the gradient of what lies beyond it.
    const bool open = counts & (std::fabs(raw) <= F(kHuge));
    if (a.grad != nullptr) a.grad[out + t] = open ? grad * share : F(0);
    if (a.shares != nullptr) a.shares[out + t] = counts ? share : F(0);
  }
  return totals;
}

template <typename F, bool kBySequence>
__global__ void __launch_bounds__(kBlock) policy_loss_kernel(Arguments<F> a) {
  __shared__ Survey<F> surveys[kBlockWarps];
  __shared__ Totals<F> left[kBlockWarps];
  __shared__ Totals<double> left_of_grid[kBlockWarps];
  Totals<F> mine;
  for (int64_t i = blockIdx.x; i < a.slices.sequences * a.slices.parts; i += gridDim.x) {
    const Segment s = a.slices.segment(i);
    if constexpr (kBySequence) {
      const Survey<F> found = survey(a, s, surveys);
      const SequenceRatio<F> ratio =
          sequence_ratio(found.log_ratio / (found.tokens > 0 ? found.tokens : F(1)));
      Weights<F> weights(a.aggregation, found.tokens);
      Totals<F> totals = walk(a, s, ratio, weights.term);
      // Each of the block's threads has a part of the sums, the first one alone what is counted.
      if (threadIdx.x > 0) weights.count = 0;
      totals.scale(weights);
      mine.merge(totals);
    } else {
      mine.merge(walk(a, s, {F(1), true}, F(1)));
    }
  }
  a.slices.clear_outside(a.grad);
  a.slices.clear_outside(a.shares);

  mine = block_total(mine, left);
  Totals<double> wide;
  wide.merge(mine);
  reduce_grid(wide, a.partial, a.ticket, left_of_grid, [&](const Totals<double>& totals) {
    double divisor = a.normalizer_value != 0 ? a.normalizer_value : totals.count;
    if (a.normalizer != nullptr) divisor = *a.normalizer;
    finish(totals, divisor, a.entropy_coef, a.kl_coef, a.loss, a.values);
  });
}

}  // namespace

// Of the buffer that losses take as `partial`.
int64_t partial_bytes() { return kMostBlocks * kLeftBytes; }

void policy_loss_forward_cuda(
    uint64_t logprobs, int64_t logprobs_stride, uint64_t old_logprobs, int64_t old_stride,
    uint64_t advantages, int64_t advantages_stride, bool one_advantage, uint64_t mask,
    int64_t mask_stride, uint64_t weights, int64_t weights_stride, bool one_weight,
    uint64_t entropy, int64_t entropy_stride, uint64_t ref_logprobs, int64_t ref_stride,
    uint64_t kl, int64_t kl_stride, uint64_t cu_seqlens, uint64_t normalizer,
    double normalizer_value, int ratio, int aggregation, double lower, double upper,
    double dual_clip, int kl_kind, bool kl_unbiased_gradient, double entropy_coef, double kl_coef,
    uint64_t loss, uint64_t values, uint64_t grad, uint64_t shares, int64_t sequences,
    int64_t length, bool fp64, uint64_t partial, uint64_t ticket, int device, uint64_t stream) {
  const DeviceGuard guard(device, "policy_loss");
  auto run = [&](auto zero) {
    using F = decltype(zero);
    const Operand<F> fresh(logprobs, logprobs_stride), old(old_logprobs, old_stride),
        advantage(advantages, advantages_stride, one_advantage),
        weight(weights, weights_stride, one_weight), bonus(entropy, entropy_stride),
        ref(ref_logprobs, ref_stride), given(kl, kl_stride);
    const Operand<uint8_t> counts(mask, mask_stride);
    const bool by_sequence = is_by_sequence(ratio, aggregation);
    const Slices slices =
        by_sequence ? Slices(cu_seqlens, sequences, length, true)
                    : flat_slices(cu_seqlens, sequences, length, fresh, old, advantage, weight,
                                  bonus, ref, given, counts);
    const Arguments<F> arguments = {fresh,
                                    old,
                                    advantage,
                                    weight,
                                    bonus,
                                    ref,
                                    given,
                                    counts,
                                    slices,
                                    {F(lower), F(upper), F(dual_clip)},
                                    ratio,
                                    aggregation,
                                    kl_kind,
                                    kl_unbiased_gradient,
                                    entropy_coef,
                                    kl_coef,
                                    normalizer_value,
                                    pointer<const F>(normalizer),
                                    pointer<F>(loss),
                                    pointer<F>(values),
                                    pointer<F>(grad),
                                    pointer<F>(shares),
                                    pointer<void>(partial),
                                    pointer<unsigned>(ticket)};
    const auto kernel = by_sequence ? policy_loss_kernel<F, true> : policy_loss_kernel<F, false>;
    launch("policy_loss", kernel, slices.blocks(), slices.threads(), 1, stream, arguments);
  };
  fp64 ? run(double{}) : run(float{});
}

}  // namespace rlhf
