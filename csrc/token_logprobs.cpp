// Log-probs of given tokens and the entropy, from logits, on the CPU.
// rlhf_fast/ops/token_logprobs.py has the formulas.
#include "softmax.h"

namespace rlhf {
namespace {

// Logits that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 131072;

// Softmax statistics of a range of columns; the sums leave one instance of the largest y out.
struct RowState {
  double top = -kInf<double>;  // NaN once a NaN or +inf was seen
  double others = 0;           // sum of e^gap, gap = (y - top) / temperature
  double weighted = 0;         // sum of e^gap * gap

  // Refers the sums to a larger top, and counts the old one among the others.
  void raise(double new_top, double temperature) {
    const double gap = (top - new_top) / temperature, w = std::exp(gap);
    const bool any = w > 0;
    weighted = any ? w * (weighted + gap * (1 + others)) : 0;
    others = any ? w * (1 + others) : 0;
    top = new_top;
  }
};

// Adds a range of columns to a row's state.
template <bool kCapped, typename T, typename F>
RLHF_INLINE void scan(const T* logits, int64_t columns, const Scaling<F>& s, double temperature,
                      RowState& state) {
  alignas(64) F y[kTile];
  const F inverse = F(1 / temperature);
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t n = std::min(kTile, columns - begin);
    const F largest = load_tile<kCapped>(logits + begin, columns - begin, s, y);
    if (largest > state.top) {
      state.raise(largest, temperature);
      int64_t peak = 0;
      while (y[peak] != largest) ++peak;
      y[peak] = -kInf<F>;
    }
    // While nothing but -inf was seen, gaps to it would be NaN.
    const F top = state.top == -kInf<double> ? F(0) : F(state.top);
    F others = 0, weighted = 0;
    const int64_t padded = whole(n);
#pragma omp simd reduction(+ : others, weighted)
    for (int64_t i = 0; i < padded; ++i) {
      const Exponential<F> e((y[i] - top) * inverse);
      const F weight = e.exp();
      others += weight;
      weighted += weight * e.x;
    }
    if (others != others || largest == kInf<F>) state.top = kNaN<double>;
    state.others += others;
    state.weighted += weighted;
  }
}

// out = slope of the softcap * e^gap * (constant + linear * gap).
template <typename F>
struct Gradient {
  F top, inverse, constant, linear;
};

template <bool kCapped, typename T, typename F>
RLHF_INLINE void differentiate(const T* logits, int64_t columns, const Scaling<F>& s,
                               const Gradient<F>& g, T* out) {
  alignas(64) F y[kTile];
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t n = std::min(kTile, columns - begin);
    const T* from = logits + begin;
    T* to = out + begin;
    load_tile<kCapped>(from, columns - begin, s, y);
    // `out` may be the logits: each is read before its gradient is written.
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Exponential<F> e((y[i] - g.top) * g.inverse);
      const F grad = e.exp() * (g.constant + g.linear * e.x);
      to[i] = narrow<T>(grad * slope<kCapped>(widen(from[i]), s));
    }
  }
}

// One logit's y, and dy / dlogit over `scale`. Cloned like the loops over rows, so that a token
// that is the largest gets the very bits of the row's top.
template <typename F>
struct Point {
  F y, slope;
};

template <bool kCapped, typename F>
RLHF_INLINE Point<F> evaluate(F logit, const Scaling<F>& s) {
  return {scaled<kCapped>(logit, s), slope<kCapped>(logit, s)};
}

// target_clones does not take templates, hence functions per instance.
#define RLHF_INSTANCE(T, CAPPED)                                                                \
  RLHF_CLONES void scan_row(const T* logits, int64_t columns, const Scaling<Stat<T>>& s,        \
                            double temperature, RowState& state, std::bool_constant<CAPPED>) {  \
    scan<CAPPED>(logits, columns, s, temperature, state);                                       \
  }                                                                                             \
  RLHF_CLONES void differentiate_row(const T* logits, int64_t columns,                          \
                                     const Scaling<Stat<T>>& s, const Gradient<Stat<T>>& g,     \
                                     T* out, std::bool_constant<CAPPED>) {                      \
    differentiate<CAPPED>(logits, columns, s, g, out);                                          \
  }
#define RLHF_INSTANCES(T) RLHF_INSTANCE(T, false) RLHF_INSTANCE(T, true)
RLHF_INSTANCES(float)
RLHF_INSTANCES(double)
RLHF_INSTANCES(BFloat16)
RLHF_INSTANCES(Float16)
#undef RLHF_INSTANCES
#undef RLHF_INSTANCE
#define RLHF_POINT(F, CAPPED)                                                           \
  RLHF_CLONES Point<F> point(F logit, const Scaling<F>& s, std::bool_constant<CAPPED>) { \
    return evaluate<CAPPED>(logit, s);                                                  \
  }
RLHF_POINT(float, false)
RLHF_POINT(float, true)
RLHF_POINT(double, false)
RLHF_POINT(double, true)
#undef RLHF_POINT

template <typename F>
struct Options {
  Temperature<F> temperature;
  Scaling<F> scaling;
  int64_t ignore_index, first_column;
};

// log p of a token with this y. Exact where the token is the largest: the gap is 0.
double token_logprob(double y, double top, double others, double temperature) {
  return (y - top) / temperature - std::log1p(others);
}

template <typename T, typename Capped>
void forward(const Rows<const T>& logits, const int64_t* tokens, const Options<Stat<T>>& options,
             const Stat<T>* carry, Stat<T>* logprobs, Stat<T>* entropy, Stat<T>* stats,
             int64_t rows, int64_t columns, int threads, Capped capped) {
  using F = Stat<T>;
  const int64_t chunk = std::max<int64_t>(1, kGrain / columns);
  threads = threads_for(rows * columns, kGrain, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    if (tokens[i] == options.ignore_index) {
      logprobs[i] = entropy[i] = 0;
      for (int64_t k = 0; k < 4; ++k) stats[k * rows + i] = 0;
      continue;
    }
    RowState state;
    F target = kNaN<F>;
    if (carry != nullptr) {
      state = {carry[i], carry[rows + i], carry[2 * rows + i]};
      target = carry[3 * rows + i];
    }
    const T* row = logits.at(i);
    const double temperature = options.temperature.at(i);
    // As unsigned numbers, ids left of the range lie right of it.
    const uint64_t column = uint64_t(tokens[i]) - uint64_t(options.first_column);
    if (column < uint64_t(columns)) target = widen(row[column]);
    scan_row(row, columns, options.scaling, temperature, state, capped);

    if (target == target && std::isfinite(state.top)) {
      const double y = point(target, options.scaling, capped).y;
      logprobs[i] = token_logprob(y, state.top, state.others, temperature);
      entropy[i] = std::log1p(state.others) - state.weighted / (1 + state.others);
    } else {
      logprobs[i] = entropy[i] = kNaN<F>;
    }
    stats[i] = state.top;
    stats[rows + i] = state.others;
    stats[2 * rows + i] = state.weighted;
    stats[3 * rows + i] = target;
  }
}

template <typename T, typename Capped>
void backward(const Rows<const T>& logits, const int64_t* tokens, const Stat<T>* stats,
              const Stat<T>* grad_logprobs, const Stat<T>* grad_entropy,
              const Options<Stat<T>>& options, const int64_t* index, const Rows<T>& out,
              int64_t rows, int64_t columns, int threads, Capped capped) {
  using F = Stat<T>;
  const int64_t chunk = std::max<int64_t>(1, kGrain / columns);
  threads = threads_for(rows * columns, kGrain, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const double upstream = grad_logprobs ? grad_logprobs[i] : 0;
    const double upstream_entropy = grad_entropy ? grad_entropy[i] : 0;
    T* out_row = out.at(i);
    if (tokens[i] == options.ignore_index || (upstream == 0 && upstream_entropy == 0)) {
      std::memset(static_cast<void*>(out_row), 0, columns * sizeof(T));
      continue;
    }
    const double top = stats[i], others = stats[rows + i], weighted = stats[2 * rows + i];
    const F target = stats[3 * rows + i];
    if (target != target) {
      std::fill_n(out_row, columns, narrow<T>(target));
      continue;
    }
    const T* row = logits.at(index ? index[i] : i);
    const double temperature = options.temperature.at(i);
    const double factor = options.scaling.scale / temperature;  // dz / dy, and y's scale
    const double mean_gap = weighted / (1 + others);
    const double constant = -(upstream - upstream_entropy * mean_gap) / (1 + others) * factor;
    const double linear = -upstream_entropy / (1 + others) * factor;
    differentiate_row(row, columns, options.scaling,
                      {F(top), F(1 / temperature), F(constant), F(linear)}, out_row, capped);

    const uint64_t column = uint64_t(tokens[i]) - uint64_t(options.first_column);
    if (column >= uint64_t(columns)) continue;
    const Point<F> at = point(target, options.scaling, capped);
    const double logp = token_logprob(at.y, top, others, temperature);
    const double gap = (at.y - top) / temperature;
    double dz = -std::expm1(logp) * upstream;
    if (gap > -kInf<double>) dz -= std::exp(logp) * (gap - mean_gap) * upstream_entropy;
    out_row[column] = narrow<T>(F(dz * factor * at.slope));
  }
}

}  // namespace

void token_logprobs_forward(uint64_t logits, int64_t inner, int64_t outer_stride,
                            int64_t inner_stride, int dtype, uint64_t tokens,
                            uint64_t row_temperature, double temperature, double softcap,
                            double logit_scale, int64_t ignore_index, int64_t first_column,
                            uint64_t carry, uint64_t logprobs, uint64_t entropy, uint64_t stats,
                            int64_t rows, int64_t columns, int threads) {
  dispatch(dtype, softcap, [&](auto* type, auto capped) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = Stat<T>;
    forward(Rows<const T>{address<const T>(logits), inner, outer_stride, inner_stride},
            address<const int64_t>(tokens),
            Options<F>{{address<const F>(row_temperature), temperature},
                       {logit_scale, softcap},
                       ignore_index,
                       first_column},
            address<const F>(carry), address<F>(logprobs), address<F>(entropy), address<F>(stats),
            rows, columns, threads, capped);
  });
}

void token_logprobs_backward(uint64_t logits, int64_t inner, int64_t outer_stride,
                             int64_t inner_stride, int dtype, uint64_t tokens, uint64_t stats,
                             uint64_t grad_logprobs, uint64_t grad_entropy,
                             uint64_t row_temperature, double temperature, double softcap,
                             double logit_scale, int64_t ignore_index, int64_t first_column,
                             uint64_t index, uint64_t out, int64_t out_inner,
                             int64_t out_outer_stride, int64_t out_inner_stride, int out_dtype,
                             int64_t rows, int64_t columns, int threads) {
  if (out_dtype != dtype) throw std::invalid_argument("out must have the dtype of logits");
  dispatch(dtype, softcap, [&](auto* type, auto capped) {
    using T = std::remove_pointer_t<decltype(type)>;
    using F = Stat<T>;
    backward(Rows<const T>{address<const T>(logits), inner, outer_stride, inner_stride},
             address<const int64_t>(tokens), address<const F>(stats),
             address<const F>(grad_logprobs), address<const F>(grad_entropy),
             Options<F>{{address<const F>(row_temperature), temperature},
                        {logit_scale, softcap},
                        ignore_index,
                        first_column},
             address<const int64_t>(index),
             Rows<T>{address<T>(out), out_inner, out_outer_stride, out_inner_stride}, rows,
             columns, threads, capped);
  });
}

}  // namespace rlhf
