// Generalised advantage estimation on the CPU; rlhf_fast/ops/gae.py derives the recurrences.
//
// Both passes scan affine maps over the tokens of a sequence: the forward from its last token to
// its first, the backward from first to last. A few long sequences are cut into segments: composed
// in a first pass, applied in a second.
#include <vector>

#include "scan.h"

namespace rlhf {
namespace {

// Tokens that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 16384;
// With fewer sequences than this the rows alone may not fill the machine. Cutting reads twice and
// depends on shapes only, never on the number of threads, so that results don't either.
constexpr int64_t kFewSequences = 8;
constexpr int64_t kSegment = 16384;

template <typename F>
struct Sequence {
  const F* first;       // forward: rewards; backward: upstream gradient of advantages
  const F* second;      // forward: values; backward: upstream gradient of returns
  const uint8_t* mask;  // null counts every token
  F* out_first;         // forward: advantages; backward: gradient of rewards
  F* out_second;        // forward: returns; backward: gradient of values
  F gamma, decay;       // decay = gamma * lam
};

// What one token adds and emits; V is a vector of F or F itself. x is the carry that reaches the
// token.
struct Forward {
  static constexpr bool kReverse = true;
  template <typename V, typename F>
  static RLHF_INLINE V map(V reward, V value, const Sequence<F>& s) {
    return s.gamma * value + s.decay * (reward - value);
  }
  template <typename V, typename F>
  static RLHF_INLINE void emit(V reward, V value, V x, const Sequence<F>&, V& first, V& second) {
    first = (reward - value) + x;
    second = first + value;
  }
};

struct Backward {
  static constexpr bool kReverse = false;
  template <typename V, typename F>
  static RLHF_INLINE V map(V grad_advantage, V grad_return, const Sequence<F>&) {
    return grad_advantage + grad_return;
  }
  template <typename V, typename F>
  static RLHF_INLINE void emit(V grad_advantage, V grad_return, V x, const Sequence<F>& s, V& first,
                               V& second) {
    first = grad_advantage + grad_return + s.decay * x;
    second = grad_return - first + s.gamma * x;
  }
};

// Scans tokens [begin, end) from carry x. kWrite: emit and return {x at the far end, -}; else
// return the segment's own map.
template <typename Op, bool kWrite, typename F>
RLHF_INLINE Carry<F> scan(const Sequence<F>& s, int64_t begin, int64_t end, F x) {
  using V = typename Vector<F>::type;
  constexpr int kLanes = Vector<F>::kLanes, kLast = Op::kReverse ? 0 : kLanes - 1;
  F product = 1;
  walk<Op::kReverse, kLanes>(begin, end, [&](int64_t t, auto n) RLHF_ALWAYS_INLINE {
    const Counts<F> counts(s.mask, t, n);
    if (counts.none()) {
      if constexpr (kWrite) {
        store_some(s.out_first + t, V{}, n);
        store_some(s.out_second + t, V{}, n);
      }
      return;
    }
    const V first = counts.select(load_some<V>(s.first + t, n), V{});
    const V second = counts.select(load_some<V>(s.second + t, n), V{});
    V b = Op::map(first, second, s), c = counts.select(V{} + s.decay, V{} + F(1));
    compose<Op::kReverse>(b, c);
    const V after = b + c * x;
    if constexpr (kWrite) {
      V out_first, out_second;
      Op::emit(first, second, shift<Op::kReverse>(after, V{} + x), s, out_first, out_second);
      store_some(s.out_first + t, counts.select(out_first, V{}), n);
      store_some(s.out_second + t, counts.select(out_second, V{}), n);
    }
    x = after[kLast];
    product *= c[kLast];
  });
  return {x, product};
}

// target_clones does not take templates, hence a function per instance.
#define RLHF_SCAN(NAME, OP, WRITE, F)                                                          \
  RLHF_CLONES Carry<F> NAME(const Sequence<F>& s, int64_t begin, int64_t end, F x, OP) {       \
    return scan<OP, WRITE>(s, begin, end, x);                                                  \
  }
RLHF_SCAN(apply, Forward, true, float)
RLHF_SCAN(apply, Forward, true, double)
RLHF_SCAN(apply, Backward, true, float)
RLHF_SCAN(apply, Backward, true, double)
RLHF_SCAN(summarise, Forward, false, float)
RLHF_SCAN(summarise, Forward, false, double)
RLHF_SCAN(summarise, Backward, false, float)
RLHF_SCAN(summarise, Backward, false, double)
#undef RLHF_SCAN

// sequence_at(i) gives the pointers of sequence i; last(i, x) receives the carry at its far end.
template <typename Op, typename F, typename SequenceAt, typename LengthOf, typename Start,
          typename Last>
void run(int64_t sequences, int64_t total, int threads, SequenceAt sequence_at, LengthOf length_of,
         Start start, Last last) {
  std::vector<Segment> segments;
  const bool cut = sequences < kFewSequences;
  segments.reserve(sequences);
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = length_of(i);
    const int64_t step = cut ? kSegment : std::max<int64_t>(length, 1);
    for (int64_t begin = 0; begin == 0 || begin < length; begin += step)
      segments.push_back({i, begin, std::min(begin + step, length)});
  }
  const int64_t count = segments.size();
  const bool any_cut = count > sequences;
  threads = threads_for(total, kGrain, static_cast<int>(std::min<int64_t>(threads, count)));

  std::vector<F> entry(count);
  if (any_cut) {
    std::vector<Carry<F>> carry(count);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; ++k) {
      const Segment& g = segments[k];
      carry[k] = summarise(sequence_at(g.sequence), g.begin, g.end, F(0), Op{});
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t k = Op::kReverse ? count - 1 - n : n;
      const int64_t before = Op::kReverse ? k + 1 : k - 1;
      const bool starts =
          n == 0 || segments[before].sequence != segments[k].sequence;
      entry[k] = starts ? start(segments[k].sequence)
                        : carry[before].b + carry[before].c * entry[before];
    }
  } else {
    for (int64_t k = 0; k < count; ++k) entry[k] = start(k);
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < count; ++k) {
    const Segment& g = segments[k];
    const Carry<F> out = apply(sequence_at(g.sequence), g.begin, g.end, entry[k], Op{});
    const bool ends = Op::kReverse ? g.begin == 0 : g.end == length_of(g.sequence);
    if (ends) last(g.sequence, out.b);
  }
}

template <typename Op, typename F, typename Start, typename Last>
void run_layout(const Layout& layout, Rows<const F> first, Rows<const F> second,
                Rows<const uint8_t> mask, Coefficient<F> gamma, Coefficient<F> lam,
                uint64_t out_first, uint64_t out_second, int threads, Start start, Last last) {
  const Rows<F> outs[] = {{out_first, layout.length}, {out_second, layout.length}};
  auto sequence_at = [&](int64_t i) {
    return Sequence<F>{first.of(layout, i),   second.of(layout, i),  mask.of(layout, i),
                       outs[0].of(layout, i), outs[1].of(layout, i), gamma[i],
                       gamma[i] * lam[i]};
  };
  run<Op, F>(layout.sequences, layout.total(), threads, sequence_at,
             [&](int64_t i) { return layout.length_of(i); }, start, last);
}

}  // namespace

void gae_forward(uint64_t rewards, int64_t rewards_stride, uint64_t values, int64_t values_stride,
                 uint64_t mask, int64_t mask_stride, uint64_t gamma, double gamma_value,
                 uint64_t lam, double lam_value, uint64_t bootstrap, uint64_t cu_seqlens,
                 uint64_t advantages, uint64_t returns, int64_t sequences, int64_t length,
                 bool fp64, int threads) {
  const Layout layout("gae", sequences, length, cu_seqlens);
  auto compute = [&](auto zero) {
    using F = decltype(zero);
    const Coefficient<F> gammas(gamma, gamma_value), bootstraps(bootstrap, 0);
    run_layout<Forward, F>(
        layout, {rewards, rewards_stride}, {values, values_stride}, {mask, mask_stride}, gammas,
        {lam, lam_value}, advantages, returns, threads,
        [&](int64_t i) { return gammas[i] * bootstraps[i]; }, [](int64_t, F) {});
  };
  fp64 ? compute(double{}) : compute(float{});
}

void gae_backward(uint64_t grad_advantages, int64_t grad_advantages_stride, uint64_t grad_returns,
                  int64_t grad_returns_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                  double gamma_value, uint64_t lam, double lam_value, uint64_t cu_seqlens,
                  uint64_t grad_rewards, uint64_t grad_values, uint64_t grad_bootstrap,
                  int64_t sequences, int64_t length, bool fp64, int threads) {
  const Layout layout("gae", sequences, length, cu_seqlens);
  auto compute = [&](auto zero) {
    using F = decltype(zero);
    const Coefficient<F> gammas(gamma, gamma_value);
    F* out = reinterpret_cast<F*>(grad_bootstrap);
    run_layout<Backward, F>(
        layout, {grad_advantages, grad_advantages_stride}, {grad_returns, grad_returns_stride},
        {mask, mask_stride}, gammas, {lam, lam_value}, grad_rewards, grad_values, threads,
        [](int64_t) { return F(0); }, [&](int64_t i, F x) { out[i] = gammas[i] * x; });
  };
  fp64 ? compute(double{}) : compute(float{});
}

}  // namespace rlhf
