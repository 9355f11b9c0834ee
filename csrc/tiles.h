// Masked tokens on the CPU, gathered into buffers that stay in the L1 cache: what does not count is
// 0 there, so that the loops over them need no mask. For code that is inlined into clones.
#pragma once

#include "common.h"

namespace rlhf {

// Buffers are filled up to whole vectors.
constexpr int64_t kTokenTile = 256, kTokenLanes = 16;

// 1 or 0 of n tokens, and 0 up to whole vectors.
template <typename F>
RLHF_INLINE int64_t gather_mask(const uint8_t* mask, int64_t n, F* counts) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) counts[i] = mask[i] != 0 ? F(1) : F(0);
  const int64_t padded = (n + kTokenLanes - 1) / kTokenLanes * kTokenLanes;
  for (int64_t i = n; i < padded; ++i) counts[i] = 0;
  return padded;
}

// Values of n tokens, those that don't count and those up to whole vectors as 0. Infinite ones
// stay so: `bounded` makes them huge.
template <typename F>
RLHF_INLINE void gather(const F* from, int64_t n, int64_t padded, const F* counts, F* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const F x = from[i];
    to[i] = counts[i] != 0 ? x : F(0);
  }
  for (int64_t i = n; i < padded; ++i) to[i] = 0;
}

template <typename F>
RLHF_INLINE void spread(F value, int64_t padded, const F* counts, F* to) {
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) to[i] = counts[i] != 0 ? value : F(0);
}

template <typename F>
RLHF_INLINE F sum(const F* x, int64_t padded) {
  F total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < padded; ++i) total += x[i];
  return total;
}

}  // namespace rlhf
