// Exact KL(policy || reference) of rows of logits, on the CPU. rlhf_fast/ops/full_kl.py has the
// formulas.
#include "softmax.h"

namespace rlhf {
namespace {

// Logits that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 65536;

// A gap of -inf is worked with as this one: far below where e^gap is 0, and differences of two
// such gaps are finite, so that 0 times one is 0.
template <typename F>
constexpr F kFloor = std::numeric_limits<F>::lowest() * F(0x1p-24);

// One term of the sum, >= 0: p u - p + q with u = log(p / q), without cancellation for u near 0.
template <typename F>
RLHF_INLINE F kl_term(F p, F q, F u) {
  const F near = p * (u * u * horner(Series<F>::kExcess, u));
  const F far = p * (u - 1) + q;
  return std::fabs(u) < 1 ? near : far;
}

// Softmax of a range of columns. As in RowState, `others` leaves one of the largest out.
struct Side {
  double top = -kInf<double>, others = 0;
};

// Two ranges of columns as one: the masses of both, referred to the larger of the tops.
struct Join {
  Side side;
  double gap[2], mass[2];

  Join(const Side& a, const Side& b, double temperature) {
    side.top = std::max(a.top, b.top);
    const Side* sides[] = {&a, &b};
    for (int i = 0; i < 2; ++i) {
      const double below = sides[i]->top - side.top;
      gap[i] = sides[i]->top == -kInf<double> ? -kInf<double> : below / temperature;
      mass[i] = std::exp(gap[i]) * (1 + sides[i]->others);
    }
    const bool first = a.top >= b.top;  // it holds the instance that is left out
    side.others = first ? a.others + mass[1] : b.others + mass[0];
  }
  double total() const { return mass[0] + mass[1]; }
};

struct KlState {
  Side policy, reference;
  double kl = 0;  // between the two distributions over the columns seen

  // The chain rule: KL within each range, weighted by the policy, plus KL between the shares that
  // the ranges have in both distributions. Nothing cancels.
  void merge(const KlState& other, double temperature) {
    const Join p(policy, other.policy, temperature);
    const Join q(reference, other.reference, temperature);
    const double kls[] = {kl, other.kl};
    const double masses[] = {1 + policy.others, 1 + other.policy.others};
    const double ref_masses[] = {1 + reference.others, 1 + other.reference.others};
    if (kl != kl || other.kl != other.kl) {
      kl = kNaN<double>;
    } else if (kl == kInf<double> || other.kl == kInf<double>) {
      kl = kInf<double>;
    } else {
      kl = 0;
      // Without a column that both allow there is nothing to compare yet.
      for (int i = 0; i < 2 && p.total() > 0 && q.total() > 0; ++i) {
        const double w = p.mass[i] / p.total(), v = q.mass[i] / q.total();
        const double x = p.gap[i] - q.gap[i] +
                         std::log(masses[i] / ref_masses[i] * (q.total() / p.total()));
        kl += w > 0 ? w * kls[i] + kl_term(w, v, x) : v;
      }
    }
    policy = p.side;
    reference = q.side;
  }
};

// Gaps and weights e^gap of the next tile of a row with n logits to go.
template <bool kCapped, typename T, typename F>
RLHF_INLINE Side weigh_tile(const T* logits, int64_t n, const Scaling<F>& s, F inverse, F* gap,
                            F* weight) {
  const F top = load_tile<kCapped>(logits, n, s, gap);
  const F base = top == -kInf<F> ? F(0) : top;
  const int64_t padded = whole(std::min(kTile, n));
  F others = 0;
  typename Series<F>::Bits tops = 0;  // as wide as F, so that one loop counts and adds
#pragma omp simd reduction(+ : others, tops)
  for (int64_t i = 0; i < padded; ++i) {
    const bool largest = gap[i] == base;
    const F g = (gap[i] - base) * inverse;
    const F e = Exponential<F>(g).exp();
    gap[i] = kFloor<F> > g ? kFloor<F> : g;
    weight[i] = e;
    others += largest ? F(0) : e;
    tops += largest;
  }
  if (tops > 1) others += tops - 1;
  if (top == kInf<F>) others = kNaN<F>;
  return {top, others};
}

template <bool kCapped, typename T, typename F>
RLHF_INLINE void scan(const T* logits, const T* ref_logits, int64_t columns, const Scaling<F>& s,
                      double temperature, KlState& state) {
  alignas(64) F gap[kTile], ref_gap[kTile], weight[kTile], ref_weight[kTile];
  const F inverse = F(1 / temperature);
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t n = columns - begin, padded = whole(std::min(kTile, n));
    KlState tile;
    tile.policy = weigh_tile<kCapped>(logits + begin, n, s, inverse, gap, weight);
    tile.reference = weigh_tile<kCapped>(ref_logits + begin, n, s, inverse, ref_gap, ref_weight);
    const F shift = F(std::log1p(tile.policy.others) - std::log1p(tile.reference.others));
    const F over = F(1 / (1 + tile.policy.others)), ref_over = F(1 / (1 + tile.reference.others));
    F kl = 0;
    typename Series<F>::Bits infinite = 0;
#pragma omp simd reduction(+ : kl) reduction(| : infinite)
    for (int64_t i = 0; i < padded; ++i) {
      kl += kl_term(weight[i] * over, ref_weight[i] * ref_over, gap[i] - ref_gap[i] - shift);
      infinite |= (gap[i] > kFloor<F>) & (ref_gap[i] == kFloor<F>);
    }
    tile.kl = infinite != 0 && kl == kl ? kInf<F> : kl;
    state.merge(tile, temperature);
  }
}

// With u = gap - ref_gap - shift: out = p (u - kl), ref_out = q - p, both times the factor.
template <typename F>
struct Gradient {
  F top, ref_top, inverse, shift, over, ref_over, kl, factor;
};

template <bool kCapped, typename T, typename F>
RLHF_INLINE void gaps(const T* logits, int64_t n, const Scaling<F>& s, F top, F inverse, F* gap) {
  load_tile<kCapped>(logits, n, s, gap);
  const int64_t padded = whole(std::min(kTile, n));
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) {
    const F g = (gap[i] - top) * inverse;
    gap[i] = kFloor<F> > g ? kFloor<F> : g;
  }
}

template <bool kCapped, typename T, typename F>
RLHF_INLINE void differentiate(const T* logits, const T* ref_logits, int64_t columns,
                               const Scaling<F>& s, const Gradient<F>& g, T* out, T* ref_out) {
  alignas(64) F gap[kTile], ref_gap[kTile];
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t n = std::min(kTile, columns - begin);
    gaps<kCapped>(logits + begin, columns - begin, s, g.top, g.inverse, gap);
    gaps<kCapped>(ref_logits + begin, columns - begin, s, g.ref_top, g.inverse, ref_gap);
    if (out != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const F p = Exponential<F>(gap[i]).exp() * g.over;
        const F grad = p * (gap[i] - ref_gap[i] - g.shift - g.kl) * g.factor;
        out[begin + i] = narrow<T>(grad * slope<kCapped>(widen(logits[begin + i]), s));
      }
    }
    if (ref_out != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const F u = gap[i] - ref_gap[i] - g.shift;
        const F p = Exponential<F>(gap[i]).exp() * g.over;
        const F q = Exponential<F>(ref_gap[i]).exp() * g.ref_over;
        const F near = p * Exponential<F>(-u).expm1();
        const F grad = (std::fabs(u) < 1 ? near : q - p) * g.factor;
        ref_out[begin + i] = narrow<T>(grad * slope<kCapped>(widen(ref_logits[begin + i]), s));
      }
    }
  }
}

// target_clones does not take templates, hence functions per instance.
#define RLHF_INSTANCE(T, CAPPED)                                                                 \
  RLHF_CLONES void scan_row(const T* logits, const T* ref_logits, int64_t columns,               \
                            const Scaling<Stat<T>>& s, double temperature, KlState& state,       \
                            std::bool_constant<CAPPED>) {                                        \
    scan<CAPPED>(logits, ref_logits, columns, s, temperature, state);                            \
  }                                                                                              \
  RLHF_CLONES void differentiate_row(const T* logits, const T* ref_logits, int64_t columns,      \
                                     const Scaling<Stat<T>>& s, const Gradient<Stat<T>>& g,      \
                                     T* out, T* ref_out, std::bool_constant<CAPPED>) {           \
    differentiate<CAPPED>(logits, ref_logits, columns, s, g, out, ref_out);                      \
  }
#define RLHF_INSTANCES(T) RLHF_INSTANCE(T, false) RLHF_INSTANCE(T, true)
RLHF_INSTANCES(float)
RLHF_INSTANCES(double)
RLHF_INSTANCES(BFloat16)
RLHF_INSTANCES(Float16)
#undef RLHF_INSTANCES
#undef RLHF_INSTANCE

template <typename F>
struct Options {
  Temperature<F> temperature;
  Scaling<F> scaling;
};

template <typename T, typename Capped>
void forward(const Rows<const T>& logits, const Rows<const T>& ref_logits,
             const Options<Stat<T>>& options, const Stat<T>* carry, Stat<T>* kl, Stat<T>* stats,
             int64_t rows, int64_t columns, int threads, Capped capped) {
  const int64_t chunk = std::max<int64_t>(1, kGrain / columns);
  threads = threads_for(rows * columns, kGrain, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    auto stat = [=](const auto* from, int64_t k) -> double { return from[k * rows + i]; };
    const double temperature = options.temperature.at(i);
    KlState state;
    scan_row(logits.at(i), ref_logits.at(i), columns, options.scaling, temperature, state, capped);
    if (carry != nullptr) {
      KlState before{{stat(carry, 0), stat(carry, 1)}, {stat(carry, 2), stat(carry, 3)},
                     stat(carry, 4)};
      before.merge(state, temperature);
      state = before;
    }
    const double values[] = {state.policy.top, state.policy.others, state.reference.top,
                             state.reference.others, state.kl};
    for (int64_t k = 0; k < 5; ++k) stats[k * rows + i] = values[k];
    kl[i] = state.policy.top == -kInf<double> ? kNaN<double> : state.kl;
  }
}

template <typename T, typename Capped>
void backward(const Rows<const T>& logits, const Rows<const T>& ref_logits, const Stat<T>* stats,
              const Stat<T>* grad_kl, const Options<Stat<T>>& options, const int64_t* index,
              const Rows<T>& out, const Rows<T>& ref_out, int64_t rows, int64_t columns,
              int threads, Capped capped) {
  using F = Stat<T>;
  const int64_t chunk = std::max<int64_t>(1, kGrain / columns);
  threads = threads_for(rows * columns, kGrain, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    T* out_row = out.data ? out.at(i) : nullptr;
    T* ref_out_row = ref_out.data ? ref_out.at(i) : nullptr;
    const F kl = stats[4 * rows + i];
    if (grad_kl[i] == 0 || kl == kInf<F>) {
      for (T* zero : {out_row, ref_out_row})
        if (zero) std::memset(static_cast<void*>(zero), 0, columns * sizeof(T));
      continue;
    }
    const int64_t row = index ? index[i] : i;
    const double temperature = options.temperature.at(i);
    const double others = stats[rows + i], ref_others = stats[3 * rows + i];
    const Gradient<F> g{stats[i],
                        stats[2 * rows + i],
                        F(1 / temperature),
                        F(std::log1p(others) - std::log1p(ref_others)),
                        F(1 / (1 + others)),
                        F(1 / (1 + ref_others)),
                        kl,
                        F(grad_kl[i] * options.scaling.scale / temperature)};
    differentiate_row(logits.at(row), ref_logits.at(row), columns, options.scaling, g, out_row,
                      ref_out_row, capped);
  }
}

}  // namespace

void full_kl_forward(uint64_t logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                     uint64_t ref_logits, int64_t ref_inner, int64_t ref_outer_stride,
                     int64_t ref_inner_stride, int dtype, uint64_t row_temperature,
                     double temperature, double softcap, double logit_scale, uint64_t carry,
                     uint64_t kl, uint64_t stats, int64_t rows, int64_t columns, int threads) {
  dispatch(dtype, softcap, [&](auto* type, auto capped) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = Stat<T>;
    forward(Rows<const T>{address<const T>(logits), inner, outer_stride, inner_stride},
            Rows<const T>{address<const T>(ref_logits), ref_inner, ref_outer_stride,
                          ref_inner_stride},
            Options<F>{{address<const F>(row_temperature), temperature}, {logit_scale, softcap}},
            address<const F>(carry), address<F>(kl), address<F>(stats), rows, columns, threads,
            capped);
  });
}

void full_kl_backward(uint64_t logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                      uint64_t ref_logits, int64_t ref_inner, int64_t ref_outer_stride,
                      int64_t ref_inner_stride, int dtype, uint64_t stats, uint64_t grad_kl,
                      uint64_t row_temperature, double temperature, double softcap,
                      double logit_scale, uint64_t index, uint64_t out, int64_t out_inner,
                      int64_t out_outer_stride, int64_t out_inner_stride, uint64_t ref_out,
                      int64_t ref_out_inner, int64_t ref_out_outer_stride,
                      int64_t ref_out_inner_stride, int out_dtype, int64_t rows, int64_t columns,
                      int threads) {
  if (out_dtype != dtype) throw std::invalid_argument("out must have the dtype of the logits");
  dispatch(dtype, softcap, [&](auto* type, auto capped) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = Stat<T>;
    backward(Rows<const T>{address<const T>(logits), inner, outer_stride, inner_stride},
             Rows<const T>{address<const T>(ref_logits), ref_inner, ref_outer_stride,
                           ref_inner_stride},
             address<const F>(stats), address<const F>(grad_kl),
             Options<F>{{address<const F>(row_temperature), temperature}, {logit_scale, softcap}},
             address<const int64_t>(index),
             Rows<T>{address<T>(out), out_inner, out_outer_stride, out_inner_stride},
             Rows<T>{address<T>(ref_out), ref_out_inner, ref_out_outer_stride,
                     ref_out_inner_stride},
             rows, columns, threads, capped);
  });
}

}  // namespace rlhf
