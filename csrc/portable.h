// Formulas that the C++ and the CUDA kernel of an op share.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define RLHF_PORTABLE __device__ __forceinline__
#else
#include "exponential.h"
#define RLHF_PORTABLE inline __attribute__((always_inline))
#endif

namespace rlhf {

// x within [-limit, limit]; NaN passes, as in torch's clamp, but not in fmin and fmax.
template <typename F>
RLHF_PORTABLE F bounded(F x, F limit) {
  x = x < -limit ? -limit : x;
  return x > limit ? limit : x;
}

template <typename F>
struct Powers {
  F exp, expm1, excess;  // e^x, e^x - 1, and e^x - 1 - x, which is x^2 / 2 near 0
};

// For x <= 88; none of the three cancels. What is not used costs nothing.
template <typename F>
RLHF_PORTABLE Powers<F> powers(F x) {
#if defined(__CUDACC__)
  const F expm1 = ::expm1(x);
  // Where the first term left out, x^4 / 360 of the value, is below one rounding.
  constexpr F kSmall = sizeof(F) == 4 ? F(0.08) : F(5.3e-4);
  const F series =
      F(0.5) * x * x * (1 + x * F(1. / 3) * (1 + x * F(1. / 4) * (1 + x * F(1. / 5))));
  return {::exp(x), expm1, std::fabs(x) < kSmall ? series : expm1 - x};
#else
  const Exponential<F> e(x);
  const F series = x * x * horner(Series<F>::kExcess, -x);
  return {e.exp(), e.expm1(), std::fabs(x) < 1 ? series : e.expm1() - x};
#endif
}

}  // namespace rlhf
