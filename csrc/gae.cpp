// Generalised advantage estimation on the CPU; rlhf_fast/ops/gae.py derives the recurrences.
//
// Both passes scan affine maps x -> b + c x over the tokens of a sequence: the forward from its
// last token to its first, the backward from first to last. A token that doesn't count is the
// identity. One token after the other, the scan waits for one multiply-add per token; so a vector
// of tokens is composed first, which does not wait for x, and then applied to x in one step. A few
// long sequences are cut into segments: composed in a first pass, applied in a second.
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"

namespace rlhf {
namespace {

// Tokens that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 16384;
// With fewer sequences than this the rows alone may not fill the machine. Cutting reads twice and
// depends on shapes only, never on the number of threads, so that results don't either.
constexpr int64_t kFewSequences = 8;
constexpr int64_t kSegment = 16384;

template <typename F>
struct Carry {  // the map x -> b + c x
  F b, c;
};

template <typename F>
struct Sequence {
  const F* first;       // forward: rewards; backward: upstream gradient of advantages
  const F* second;      // forward: values; backward: upstream gradient of returns
  const uint8_t* mask;  // null counts every token
  F* out_first;         // forward: advantages; backward: gradient of rewards
  F* out_second;        // forward: returns; backward: gradient of values
  F gamma, decay;       // decay = gamma * lam
};

#if defined(__clang__)
#define RLHF_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define RLHF_SHUFFLE2(a, b, i, j) __builtin_shufflevector(a, b, i, j)
#else
#define RLHF_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, Vector<float>::mask{i, j, k, l})
#define RLHF_SHUFFLE2(a, b, i, j) __builtin_shuffle(a, b, Vector<double>::mask{i, j})
#endif

using Float4 = Vector<float>::type;
using Double2 = Vector<double>::type;

// Lane i of shift(v, fill) holds the lane scanned just before i; the first one holds fill.
template <bool kReverse>
RLHF_INLINE Float4 shift(Float4 v, Float4 fill) {
  return kReverse ? RLHF_SHUFFLE4(v, fill, 1, 2, 3, 4) : RLHF_SHUFFLE4(v, fill, 4, 0, 1, 2);
}
template <bool kReverse>
RLHF_INLINE Double2 shift(Double2 v, Double2 fill) {
  return kReverse ? RLHF_SHUFFLE2(v, fill, 1, 2) : RLHF_SHUFFLE2(v, fill, 2, 0);
}

// Replaces each lane's map by its composition with all lanes scanned before it.
template <bool kReverse>
RLHF_INLINE void compose(Float4& b, Float4& c) {
  const Float4 zero = {}, one = {1, 1, 1, 1};
  b += c * shift<kReverse>(b, zero);
  c *= shift<kReverse>(c, one);
  if constexpr (kReverse) {
    b += c * RLHF_SHUFFLE4(b, zero, 2, 3, 4, 4);
    c *= RLHF_SHUFFLE4(c, one, 2, 3, 4, 4);
  } else {
    b += c * RLHF_SHUFFLE4(b, zero, 4, 4, 0, 1);
    c *= RLHF_SHUFFLE4(c, one, 4, 4, 0, 1);
  }
}
template <bool kReverse>
RLHF_INLINE void compose(Double2& b, Double2& c) {
  const Double2 zero = {}, one = {1, 1};
  b += c * shift<kReverse>(b, zero);
  c *= shift<kReverse>(c, one);
}

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
  using M = typename Vector<F>::mask;
  constexpr int W = Vector<F>::kLanes;
  constexpr bool kReverse = Op::kReverse;
  const int64_t blocks_end = begin + (end - begin) / W * W;
  F product = 1;

  auto one_token = [&](int64_t t) {
    if (s.mask != nullptr && s.mask[t] == 0) {
      if constexpr (kWrite) s.out_first[t] = s.out_second[t] = 0;
      return;
    }
    const F first = s.first[t], second = s.second[t];
    if constexpr (kWrite) Op::emit(first, second, x, s, s.out_first[t], s.out_second[t]);
    x = Op::map(first, second, s) + s.decay * x;
    product *= s.decay;
  };
  auto one_block = [&](int64_t t) {
    // Whole bytes of a bool mask: all 0 where padding is, all 1 almost everywhere else.
    constexpr uint32_t kOnes = W == 4 ? 0x01010101u : 0x0101u;
    uint32_t bits = kOnes;
    if (s.mask != nullptr) {
      bits = 0;
      std::memcpy(&bits, s.mask + t, W);
    }
    if (bits == 0) {
      if constexpr (kWrite) {
        store(s.out_first + t, V{});
        store(s.out_second + t, V{});
      }
      return;
    }
    const bool all = bits == kOnes;
    V first = load<V>(s.first + t), second = load<V>(s.second + t);
    V c = V{} + s.decay;
    M counts = M{} - 1;
    if (!all) {
      for (int i = 0; i < W; ++i) counts[i] = s.mask[t + i] != 0 ? -1 : 0;
      first = counts ? first : V{};
      second = counts ? second : V{};
      c = counts ? c : V{} + F(1);
    }
    V b = Op::map(first, second, s);
    compose<kReverse>(b, c);
    const V after = b + c * x;
    if constexpr (kWrite) {
      V out_first, out_second;
      Op::emit(first, second, shift<kReverse>(after, V{} + x), s, out_first, out_second);
      if (!all) {
        out_first = counts ? out_first : V{};
        out_second = counts ? out_second : V{};
      }
      store(s.out_first + t, out_first);
      store(s.out_second + t, out_second);
    }
    x = after[kReverse ? 0 : W - 1];
    product *= c[kReverse ? 0 : W - 1];
  };

  if constexpr (kReverse) {
    for (int64_t t = end - 1; t >= blocks_end; --t) one_token(t);
    for (int64_t t = blocks_end - W; t >= begin; t -= W) one_block(t);
  } else {
    for (int64_t t = begin; t < blocks_end; t += W) one_block(t);
    for (int64_t t = blocks_end; t < end; ++t) one_token(t);
  }
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

struct Segment {
  int64_t sequence, begin, end;
};

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

// Rows of a padded tensor, or slices of a packed one.
struct Layout {
  int64_t sequences, length;
  const int32_t* offsets;

  Layout(int64_t sequences, int64_t length, uint64_t offsets)
      : sequences(sequences), length(length), offsets(reinterpret_cast<const int32_t*>(offsets)) {
    if (this->offsets == nullptr) return;
    bool good = this->offsets[0] == 0 && this->offsets[sequences] == length;
    for (int64_t i = 0; i < sequences; ++i) good &= this->offsets[i] <= this->offsets[i + 1];
    if (!good)
      throw std::invalid_argument("gae: cu_seqlens must rise from 0 to the " +
                                  std::to_string(length) +
                                  " packed tokens, not fall, and end there");
  }
  int64_t total() const { return offsets ? length : sequences * length; }
  int64_t length_of(int64_t i) const { return offsets ? offsets[i + 1] - offsets[i] : length; }
  int64_t start(int64_t i, int64_t stride) const { return offsets ? offsets[i] : i * stride; }
};

template <typename Op, typename F, typename Start, typename Last>
void run_layout(const Layout& layout, uint64_t first, int64_t first_stride, uint64_t second,
                int64_t second_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                uint64_t lam, uint64_t out_first, uint64_t out_second, int threads, Start start,
                Last last) {
  const F* gammas = reinterpret_cast<const F*>(gamma);
  const F* lams = reinterpret_cast<const F*>(lam);
  auto sequence_at = [&](int64_t i) {
    const int64_t out = layout.start(i, layout.length);
    return Sequence<F>{
        reinterpret_cast<const F*>(first) + layout.start(i, first_stride),
        reinterpret_cast<const F*>(second) + layout.start(i, second_stride),
        mask ? reinterpret_cast<const uint8_t*>(mask) + layout.start(i, mask_stride) : nullptr,
        reinterpret_cast<F*>(out_first) + out,
        reinterpret_cast<F*>(out_second) + out,
        gammas[i],
        gammas[i] * lams[i],
    };
  };
  run<Op, F>(layout.sequences, layout.total(), threads, sequence_at,
             [&](int64_t i) { return layout.length_of(i); }, start, last);
}

template <typename F>
void forward(const Layout& layout, uint64_t rewards, int64_t rewards_stride, uint64_t values,
             int64_t values_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
             uint64_t lam, uint64_t bootstrap, uint64_t advantages, uint64_t returns,
             int threads) {
  const F* gammas = reinterpret_cast<const F*>(gamma);
  const F* bootstraps = reinterpret_cast<const F*>(bootstrap);
  run_layout<Forward, F>(
      layout, rewards, rewards_stride, values, values_stride, mask, mask_stride, gamma, lam,
      advantages, returns, threads,
      [&](int64_t i) { return bootstraps ? gammas[i] * bootstraps[i] : F(0); },
      [](int64_t, F) {});
}

template <typename F>
void backward(const Layout& layout, uint64_t grad_advantages, int64_t grad_advantages_stride,
              uint64_t grad_returns, int64_t grad_returns_stride, uint64_t mask,
              int64_t mask_stride, uint64_t gamma, uint64_t lam, uint64_t grad_rewards,
              uint64_t grad_values, uint64_t grad_bootstrap, int threads) {
  const F* gammas = reinterpret_cast<const F*>(gamma);
  F* out = reinterpret_cast<F*>(grad_bootstrap);
  run_layout<Backward, F>(
      layout, grad_advantages, grad_advantages_stride, grad_returns, grad_returns_stride, mask,
      mask_stride, gamma, lam, grad_rewards, grad_values, threads,
      [](int64_t) { return F(0); }, [&](int64_t i, F x) { out[i] = gammas[i] * x; });
}

}  // namespace

void gae_forward(uint64_t rewards, int64_t rewards_stride, uint64_t values, int64_t values_stride,
                 uint64_t mask, int64_t mask_stride, uint64_t gamma, uint64_t lam,
                 uint64_t bootstrap, uint64_t cu_seqlens, uint64_t advantages, uint64_t returns,
                 int64_t sequences, int64_t length, bool fp64, int threads) {
  const Layout layout(sequences, length, cu_seqlens);
  (fp64 ? forward<double> : forward<float>)(layout, rewards, rewards_stride, values, values_stride,
                                            mask, mask_stride, gamma, lam, bootstrap, advantages,
                                            returns, threads);
}

void gae_backward(uint64_t grad_advantages, int64_t grad_advantages_stride, uint64_t grad_returns,
                  int64_t grad_returns_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                  uint64_t lam, uint64_t cu_seqlens, uint64_t grad_rewards, uint64_t grad_values,
                  uint64_t grad_bootstrap, int64_t sequences, int64_t length, bool fp64,
                  int threads) {
  const Layout layout(sequences, length, cu_seqlens);
  (fp64 ? backward<double> : backward<float>)(
      layout, grad_advantages, grad_advantages_stride, grad_returns, grad_returns_stride, mask,
      mask_stride, gamma, lam, grad_rewards, grad_values, grad_bootstrap, threads);
}

}  // namespace rlhf
