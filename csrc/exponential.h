// Vector exponentials: inlined into clones (see common.h), so without branches or calls into libm.
#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace rlhf {

template <typename To, typename From>
RLHF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename F>
constexpr F kInf = std::numeric_limits<F>::infinity();
template <typename F>
constexpr F kNaN = std::numeric_limits<F>::quiet_NaN();

// e^r - 1 = r + r^2 P(r) for |r| <= ln(2) / 2, and e^-u - 1 + u = u^2 Q(u) for |u| <= 1. In fp32
// minimax fits (relative errors 3.3e-9 of e^r and 4.3e-9), in fp64 Taylor's 1 / k!.
template <typename F>
struct Series;
template <>
struct Series<float> {
  using Bits = uint32_t;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kExp[] = {0.4999999305f, 0.1666651479f, 0.04166845678f, 0.008369418836f,
                                   0.001381314508f};
  static constexpr float kExcess[] = {0.4999999979f,    -0.1666666701f,   0.04166673454f,
                                      -0.008333310275f, 0.001388545198f,  -1.984402362e-4f,
                                      2.535482931e-5f,  -2.772283406e-6f};
};
template <>
struct Series<double> {
  using Bits = uint64_t;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kExp[] = {1. / 2,        1. / 6,         1. / 24,      1. / 120,
                                    1. / 720,      1. / 5040,      1. / 40320,   1. / 362880,
                                    1. / 3628800,  1. / 39916800,  1. / 479001600,
                                    1. / 6227020800};
  static constexpr double kExcess[] = {
      1. / 2,           -1. / 6,           1. / 24,           -1. / 120,
      1. / 720,         -1. / 5040,        1. / 40320,        -1. / 362880,
      1. / 3628800,     -1. / 39916800,    1. / 479001600,    -1. / 6227020800,
      1. / 87178291200, -1. / 1307674368000, 1. / 20922789888000, -1. / 355687428096000,
      1. / 6402373705728000};
};

template <int kFrom = 0, typename F, size_t kSize>
RLHF_INLINE F horner(const F (&c)[kSize], F x) {
  if constexpr (kFrom + 1 == kSize) {
    return c[kFrom];
  } else {
    return c[kFrom] + x * horner<kFrom + 1>(c, x);
  }
}

// e^x = power + power * excess, e^x - 1 = (power - 1) + power * excess; within about 1 ulp for
// x <= 88 (709 in fp64). Below -88.03 (-709.1), where e^x turns denormal, the power is 0. Then the
// factor x of e^x * x must stay finite: hence `x`, x clamped to what is still exact. NaN passes.
template <typename F>
struct Exponential {
  F x, power, excess;

  RLHF_INLINE explicit Exponential(F from) {
    using S = Series<F>;
    constexpr F kLowest = F(-S::kBias) * F(0.693147180559945309);
    // Added to a number of less than 2^22, it leaves the integer nearest, plus the exponent's bias,
    // in the lowest bits of the mantissa.
    constexpr F kRound = F(1.5) * F(typename S::Bits(1) << S::kMantissa) + F(S::kBias);
    x = kLowest > from ? kLowest : from;
    const F shifted = x * F(1.44269504088896341) + kRound;
    const F n = shifted - kRound;
    const F r = x - n * S::kLn2High - n * S::kLn2Low;
    power = bit_cast<F>(bit_cast<typename S::Bits>(shifted) << S::kMantissa);
    excess = r + r * r * horner(S::kExp, r);
  }
  RLHF_INLINE F exp() const { return power + power * excess; }
  RLHF_INLINE F expm1() const { return (power - 1) + power * excess; }
};

}  // namespace rlhf
