// Scans of affine maps x -> b + c x over the tokens of a sequence on the CPU.
//
// One token after the other, a scan waits for one multiply-add per token; so a vector of tokens is
// composed first, which does not wait for x, and then applied to x in one step. A token that
// doesn't count is the identity.
#pragma once

#include <type_traits>

#include "common.h"
#include "sequences.h"

namespace rlhf {

template <typename F>
struct Carry {  // the map x -> b + c x
  F b, c;
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

// Calls body(t, n) for the vectors of tokens [t, t + n) that make up [begin, end), in scan order.
// n is a constant but for the tokens that are left over at the end.
template <bool kReverse, int kLanes, typename Body>
RLHF_INLINE void walk(int64_t begin, int64_t end, Body body) {
  constexpr std::integral_constant<int, kLanes> whole;
  const int rest = static_cast<int>((end - begin) % kLanes);
  const int64_t tail = end - rest;
  if (kReverse && rest != 0) body(tail, rest);
  if constexpr (kReverse) {
    for (int64_t t = tail - kLanes; t >= begin; t -= kLanes) body(t, whole);
  } else {
    for (int64_t t = begin; t < tail; t += kLanes) body(t, whole);
  }
  if (!kReverse && rest != 0) body(tail, rest);
}

// The first n lanes of a vector; the others are 0.
template <typename V, typename F, typename N>
RLHF_INLINE V load_some(const F* p, N n) {
  constexpr int kLanes = sizeof(V) / sizeof(F);
  if (n == kLanes) return load<V>(p);
  V v = {};
  for (int i = 0; i < kLanes - 1; ++i)
    if (i < n) v[i] = p[i];
  return v;
}
template <typename V, typename F, typename N>
RLHF_INLINE void store_some(F* p, V v, N n) {
  constexpr int kLanes = sizeof(V) / sizeof(F);
  if (n == kLanes) return store(p, v);
  for (int i = 0; i < kLanes - 1; ++i)
    if (i < n) p[i] = v[i];
}

// Which of the tokens [t, t + n) count; a null mask counts every token.
template <typename F>
class Counts {
  using M = typename Vector<F>::mask;
  static constexpr int kLanes = Vector<F>::kLanes;
  using Word = std::conditional_t<kLanes == 4, uint32_t, uint16_t>;
  static constexpr uint32_t kOnes = kLanes == 4 ? 0x01010101u : 0x0101u;
  // Whole bytes of a bool mask: all 0 where padding is, all 1 almost everywhere else.
  uint32_t bits_ = kOnes;
  M lanes_ = {};

 public:
  template <typename N>
  RLHF_INLINE Counts(const uint8_t* mask, int64_t t, N n) {
    if (mask == nullptr) {
      if (n < kLanes) bits_ &= (1u << 8 * n) - 1;
    } else if (n == kLanes) {
      Word word;
      std::memcpy(&word, mask + t, kLanes);
      bits_ = word;
    } else {
      bits_ = 0;
      for (int i = 0; i < n; ++i) bits_ |= uint32_t(mask[t + i]) << 8 * i;
    }
    if (all()) return;
    M one;
    for (int i = 0; i < kLanes; ++i) one[i] = 1 << 8 * i;
    lanes_ = ((M{} + bits_) & one) != 0;
  }
  RLHF_INLINE bool all() const { return __builtin_expect(bits_ == kOnes, 1); }
  RLHF_INLINE bool none() const { return bits_ == 0; }
  RLHF_INLINE int count() const { return __builtin_popcount(bits_); }
  RLHF_INLINE int last() const { return (31 - __builtin_clz(bits_)) / 8; }
  template <typename V>
  RLHF_INLINE V select(V counted, V other) const {
    return all() ? counted : lanes_ ? counted : other;
  }
};

// A coefficient of each sequence, or one of all.
template <typename F>
struct Coefficient {
  const F* each;
  F all;

  Coefficient(uint64_t each, double all)
      : each(reinterpret_cast<const F*>(each)), all(static_cast<F>(all)) {}
  F operator[](int64_t i) const { return each != nullptr ? each[i] : all; }
};

// Tokens of a tensor whose rows begin `stride` elements apart; null where there is no tensor.
template <typename F>
struct Rows {
  F* data;
  int64_t stride;

  Rows(uint64_t address, int64_t stride) : data(reinterpret_cast<F*>(address)), stride(stride) {}
  F* of(const Layout& layout, int64_t i) const {
    return data == nullptr ? nullptr : data + layout.start(i, stride);
  }
};

}  // namespace rlhf
