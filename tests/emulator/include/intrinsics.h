// csrc/intrinsics.cuh in C++. It is included before every source, so that its guard keeps the
// original out.
#ifndef RLHF_INTRINSICS_CUH
#define RLHF_INTRINSICS_CUH

#include "cuda_runtime.h"

namespace rlhf {

// A number in [-1, 1] that depends on x alone: how much of its allowance an approximation is off.
inline double noise(float x) {
  if (!emulator::machine.noise) return 0;
  uint32_t hash = __float_as_uint(x) * 2654435761u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  return hash * 0x1p-31 - 1;
}

// Within 2 ulp, the final rounding included. Denormal numbers are 0, as arguments and as results.
inline float exp2_fast(float x) {
  if (std::fabs(x) < 0x1p-126f) return 1;
  double y = std::exp2(double(x));
  if (y > 0 && y < INFINITY) y += noise(x) * std::ldexp(1.5, std::ilogb(y) - 23);
  return y < 0x1p-126 ? 0 : float(y);
}
// Within 2^-22, absolute below 1 and relative above.
inline float log2_fast(float x) {
  if (x == 1) return 0;
  const double y = std::log2(std::fabs(x) < 0x1p-126f ? 0 : double(x));
  return float(y + noise(x) * 0x1p-22 * std::max(1.0, std::fabs(y)));
}
inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

inline void unpack_fp16(uint32_t word, float* to) {
  for (int i = 0; i < 2; ++i) {
    const int bits = word >> 16 * i & 0xffff, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double x = exponent > 0 ? std::ldexp(1024 + mantissa, exponent - 25)
                            : std::ldexp(mantissa, -24);
    if (exponent == 31) x = mantissa > 0 ? NAN : INFINITY;
    to[i] = float(bits >> 15 ? -x : x);
  }
}
inline uint32_t pack_fp16(const float* from) {
  uint32_t word = 0;
  for (int i = 0; i < 2; ++i) {
    const double x = std::fabs(from[i]);
    uint32_t bits;
    if (x != x) {
      bits = 0x7fff;
    } else {
      // nearbyint rounds to nearest even; what it carries over raises the exponent.
      const int exponent = x < 0x1p-14 ? -14 : std::min(std::ilogb(x), 16);
      const double mantissa = std::nearbyint(std::ldexp(std::min(x, 0x1p16), 10 - exponent));
      bits = uint32_t((exponent + 14) << 10) + uint32_t(mantissa);
      bits = std::min(bits, 0x7c00u);
    }
    word |= (bits | (std::signbit(from[i]) && x == x ? 0x8000u : 0)) << 16 * i;
  }
  return word;
}
inline uint32_t pack_bf16(const float* from) {
  uint32_t word = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = __float_as_uint(from[i]);
    const uint32_t rounded = from[i] != from[i] ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    word |= rounded << 16 * i;
  }
  return word;
}

}  // namespace rlhf

#endif  // RLHF_INTRINSICS_CUH
