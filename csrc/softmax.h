// What the ops on rows of logits share: dtypes, vector exponentials, scaling, tiles of a row.
//
// Everything here is inlined into clones (see common.h), so loops are written to auto-vectorise:
// `omp simd`, no branches, no calls into libm.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "exponential.h"

namespace rlhf {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Statistics and arithmetic are fp32, or fp64 for fp64 logits.
template <typename T>
using Stat = std::conditional_t<std::is_same_v<T, double>, double, float>;

RLHF_INLINE float widen(float x) { return x; }
RLHF_INLINE double widen(double x) { return x; }
RLHF_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
RLHF_INLINE float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // The product moves the exponent to fp32's bias and is exact for denormals too.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // inf and NaN
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even, as torch does.
template <typename T>
RLHF_INLINE T narrow(Stat<T> x) {
  return x;
}
template <>
RLHF_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return {uint16_t((x == x ? rounded : 0x7fc00000) >> 16)};
}
template <>
RLHF_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, overflow
  // Adding 0.5 leaves the bits of an fp16 denormal at the low end of the mantissa.
  const uint32_t denormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? denormal : normal;
  return {uint16_t((magnitude >= 0x47800000 ? special : finite) | (bits >> 16 & 0x8000))};
}

// y = scale * l, or cap * tanh(scale * l / cap).
template <typename F>
struct Scaling {
  F scale, cap;

  Scaling(double scale, double softcap) : scale(F(scale)), cap(F(softcap)) {}
};

// With e = exp(-2 |x|), 1 - tanh |x| = 2 e / (1 + e) and tanh |x| = (1 - e) / (1 + e): the first is
// used where tanh is close to 1, so that what the quotient rounds is small.
template <bool kCapped, typename F>
RLHF_INLINE F scaled(F l, const Scaling<F>& s) {
  if constexpr (!kCapped) return l * s.scale;
  const F x = l * s.scale / s.cap;
  const Exponential<F> power(F(-2) * std::fabs(x));
  const F e = power.exp();
  const bool flat = e < F(0.3);
  const F quotient = (flat ? -2 * e : -power.expm1()) / (1 + e);
  return std::copysign((flat ? s.cap : F(0)) + s.cap * quotient, x);
}

// dy/dl over `scale`: 1 / cosh^2, in a form that keeps its bits where tanh is saturated.
template <bool kCapped, typename F>
RLHF_INLINE F slope(F l, const Scaling<F>& s) {
  if constexpr (!kCapped) return 1;
  const F e = Exponential<F>(F(-2) * std::fabs(l * s.scale / s.cap)).exp();
  return 4 * e / ((1 + e) * (1 + e));
}

// Rows are worked on in tiles that stay in the L1 cache between the loops over them. Buffers are
// filled up to whole vectors with -inf, which weighs nothing.
constexpr int64_t kTile = 512, kLanes = 16;
RLHF_INLINE int64_t whole(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// y of the next tile of a row with n > 0 logits to go; returns the largest (NaN is passed over: it
// shows in the sums). Gaps are taken from the buffer, in a loop of their own: as one expression, a
// multiply-add would leave out y's rounding, and the largest would lie next to the top instead of
// at it.
template <bool kCapped, typename T, typename F>
RLHF_INLINE F load_tile(const T* logits, int64_t n, const Scaling<F>& s, F* y) {
  const int64_t here = std::min(kTile, n), ahead = std::min(2 * kTile, n);
  F top = -kInf<F>;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < here; ++i) {
    const F v = scaled<kCapped>(widen(logits[i]), s);
    y[i] = v;
    top = v > top ? v : top;
  }
  for (int64_t i = here; i < whole(here); ++i) y[i] = -kInf<F>;
  // Fetched while this tile is computed with.
  for (int64_t i = here; i < ahead; i += 64 / sizeof(T)) __builtin_prefetch(logits + i);
  return top;
}

// Row i of a tensor whose rows are addressed at two levels, strides in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t inner, outer_stride, inner_stride;

  T* at(int64_t i) const { return data + i / inner * outer_stride + i % inner * inner_stride; }
};

// Of all rows, or one each.
template <typename F>
struct Temperature {
  const F* each;  // or null
  double all;

  double at(int64_t i) const { return each ? each[i] : all; }
};

template <typename T>
T* address(uint64_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

// Calls f with a null pointer to the logits' type, and whether there is a softcap as a type.
template <typename Function>
void dispatch(int dtype, double softcap, Function f) {
  auto typed = [&](auto* type) {
    if (softcap > 0) {
      f(type, std::true_type());
    } else {
      f(type, std::false_type());
    }
  };
  switch (dtype) {
    case 0: return typed(static_cast<float*>(nullptr));
    case 1: return typed(static_cast<double*>(nullptr));
    case 2: return typed(static_cast<BFloat16*>(nullptr));
    case 3: return typed(static_cast<Float16*>(nullptr));
    default: throw std::invalid_argument("dtype code " + std::to_string(dtype) + " is unknown");
  }
}

}  // namespace rlhf
