// Rows of logits on the GPU: dtypes, 16-byte loads and stores, scaling, which thread takes what.
#pragma once

#include <cmath>
#include <limits>

#include "intrinsics.cuh"
#include "launch.cuh"

namespace rlhf {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f with a null pointer to the logits' type; codes as in rlhf_fast/compiled/_rows.py.
template <typename Function>
void dispatch(const char* op, int dtype, Function f) {
  switch (dtype) {
    case 0: return f(static_cast<float*>(nullptr));
    case 2: return f(static_cast<BFloat16*>(nullptr));
    case 3: return f(static_cast<Float16*>(nullptr));
    default:
      throw std::invalid_argument(std::string(op) + ": dtype code " + std::to_string(dtype) +
                                  "; on a GPU logits are fp32, bf16 or fp16 (codes 0, 2 and 3)");
  }
}

// The same with the gradient's type: that of the logits, or a narrower one.
template <typename Function>
void dispatch(const char* op, int dtype, int out_dtype, Function f) {
  dispatch(op, dtype, [&](auto* type) {
    if (dtype == out_dtype) return f(type, type);
    if constexpr (sizeof(*type) == 4) {
      return dispatch(op, out_dtype, [&](auto* out_type) { f(type, out_type); });
    }
    throw std::invalid_argument(std::string(op) + ": gradients of dtype code " +
                                std::to_string(out_dtype) + " for logits of dtype code " +
                                std::to_string(dtype) + "; expected the same, or narrower ones");
  });
}

// A 32-bit word of logits as numbers, and back, rounding to nearest even.
template <typename T>
RLHF_DEVICE void unpack(uint32_t word, float* to);
template <>
RLHF_DEVICE void unpack<float>(uint32_t word, float* to) {
  to[0] = __uint_as_float(word);
}
template <>
RLHF_DEVICE void unpack<BFloat16>(uint32_t word, float* to) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}
template <>
RLHF_DEVICE void unpack<Float16>(uint32_t word, float* to) {
  unpack_fp16(word, to);
}

template <typename T>
RLHF_DEVICE uint32_t pack(const float* from);
template <>
RLHF_DEVICE uint32_t pack<float>(const float* from) {
  return __float_as_uint(from[0]);
}
template <>
RLHF_DEVICE uint32_t pack<BFloat16>(const float* from) {
  return pack_bf16(from);
}
template <>
RLHF_DEVICE uint32_t pack<Float16>(const float* from) {
  return pack_fp16(from);
}

template <typename T>
RLHF_DEVICE uint32_t bits(T x) {
  if constexpr (sizeof(T) == 2) {
    return x.bits;
  } else {
    return __float_as_uint(x);
  }
}
template <typename T>
RLHF_DEVICE float widen(T x) {
  float pair[2];
  unpack<T>(bits(x), pair);
  return pair[0];
}
template <typename T>
RLHF_DEVICE T narrow(float x) {
  if constexpr (sizeof(T) == 2) {
    const float pair[] = {x, 0};
    return {static_cast<uint16_t>(pack<T>(pair))};
  } else {
    return x;
  }
}

// A thread's unit of work: neighbouring elements, 16 bytes of the narrower tensor.
template <typename T, int kLanes>
struct Pack {
  static constexpr int kPerWord = 4 / sizeof(T), kWords = kLanes / kPerWord;
  uint32_t words[kWords];

  // No aligned element is read twice, so none should push others out of the caches. Elements that
  // are not aligned come one by one: those beside the first have to find their line there.
  RLHF_DEVICE void load(const T* from, bool aligned) {
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from + i * kPerWord));
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[i] = bits(from[i * kPerWord]);
        if (kPerWord == 2) words[i] |= bits(from[i * kPerWord + 1]) << 16;
      }
    }
  }
  RLHF_DEVICE void store(T* to, bool aligned) const {
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        *reinterpret_cast<uint4*>(to + i * kPerWord) =
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    } else {
      float elements[kLanes];
      read(elements);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) to[i] = narrow<T>(elements[i]);
    }
  }
  RLHF_DEVICE void read(float* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) unpack<T>(words[i], to + i * kPerWord);
  }
  RLHF_DEVICE void write(const float* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = pack<T>(from + i * kPerWord);
  }
};

template <typename T>
RLHF_DEVICE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A range of a row: packs at 16-byte boundaries, and the elements before and after them, fewer
// than two packs.
struct Span {
  int head, packs, ends, lanes;

  template <typename T>
  RLHF_DEVICE Span(const T* begin, int elements, int lanes) : lanes(lanes) {
    const int misplaced = static_cast<int>(-reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T));
    head = min(misplaced, elements);
    packs = (elements - head) / lanes;
    ends = elements - packs * lanes;
  }
  // Where the i-th of the `ends` is.
  RLHF_DEVICE int end(int i) const { return i < head ? i : i + packs * lanes; }
};

// Elements of the narrower of two tensors in 16 bytes.
template <typename T, typename O>
constexpr int kLanesOf = 16 / (sizeof(T) < sizeof(O) ? sizeof(T) : sizeof(O));

// What a thread of a backward kernel writes of a row: packs, and one of the elements at the ends.
// Block `part` takes the part-th kPacks * kThreads packs.
template <int kLanes, int kPacks>
struct Share {
  Span span;
  int first, end;  // end is -1 for none

  template <typename O>
  RLHF_DEVICE Share(const O* out, int columns, int part) : span(out, columns, kLanes) {
    const int thread = threadIdx.x;
    first = part * (kPacks * kThreads) + thread;
    end = part == 0 && thread < span.ends ? span.end(thread) : -1;
  }
  RLHF_DEVICE bool has(int k) const { return first + k * kThreads < span.packs; }
  RLHF_DEVICE int column(int k) const { return span.head + (first + k * kThreads) * kLanes; }
  static int64_t parts(int64_t columns) {
    constexpr int64_t kColumns = kPacks * kThreads * kLanes;
    return (columns + kColumns - 1) / kColumns;
  }
};

// y of logits: scale * l, or cap * tanh(scale * l / cap).
struct Scaling {
  float scale, cap, inner;  // cap is 0 for none; inner = scale / cap
  float bits;               // 2 inner, for exponents of 2

  Scaling(double scale, double softcap)
      : scale(float(scale)),
        cap(float(softcap)),
        inner(softcap > 0 ? float(scale / softcap) : 0),
        bits(softcap > 0 ? float(2 / std::log(2.0) * scale / softcap) : 0) {}
  bool plain() const { return scale == 1 && cap == 0; }
};

// (1 - tanh |x|) / 2 of the softcap's tanh x, without cancellation where that is saturated.
RLHF_DEVICE float missing(const Scaling& s, float l) {
  const float e = exp2_fast(-fabsf(l * s.bits));
  return e / (1 + e);
}

// cap * tanh(x): near 0 l * scale * tanh(x) / x, by a minimax fit of relative error 7e-9, else the
// cap less what is missing. Both round less often than x, tanhf and its product with the cap.
RLHF_DEVICE float capped(const Scaling& s, float l) {
  const float x = l * s.inner, square = x * x, y = l * s.scale;
  float excess = -0.00574301044f;
  excess = excess * square + 0.020671485f;
  excess = excess * square - 0.053749118f;
  excess = excess * square + 0.133315489f;
  excess = excess * square - 0.333332866f;
  return fabsf(x) < 0.6f ? y + excess * square * y
                         : copysignf(s.cap - 2 * s.cap * missing(s, l), x);
}

template <bool kPlain, int N>
RLHF_DEVICE void scale(const Scaling& s, float (&x)[N]) {
  if constexpr (kPlain) return;
  if (s.cap > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = capped(s, x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= s.scale;
  }
}

template <bool kPlain>
RLHF_DEVICE float scaled(const Scaling& s, float l) {
  float y[] = {l};
  scale<kPlain>(s, y);
  return y[0];
}

// dy/dl over `scale`: 1 / cosh^2, in a form that keeps its bits where tanh is saturated.
RLHF_DEVICE float slope(const Scaling& s, float l) {
  if (s.cap == 0) return 1;
  const float share = missing(s, l);
  return 4 * (share - share * share);
}

// Row i of a tensor whose rows are addressed at two levels, strides in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t outer_stride, inner_stride;
  uint32_t inner;

  Rows(uint64_t data, int64_t inner, int64_t outer_stride, int64_t inner_stride)
      : data(pointer<T>(data)),
        outer_stride(outer_stride),
        inner_stride(inner_stride),
        inner(static_cast<uint32_t>(std::min<int64_t>(inner, UINT32_MAX))) {}
  RLHF_DEVICE T* at(uint32_t i) const {
    const uint32_t outer = i < inner ? 0 : i / inner;  // mostly 0, and a division takes long
    return data + outer * outer_stride + (i - outer * inner) * inner_stride;
  }
};

// What all rows have in common, and their temperatures.
struct Options {
  const float* row_temperature;  // null: `temperature` for all rows
  float temperature;
  Scaling scaling;
  int64_t rows;
  int columns;

  Options(const char* op, uint64_t row_temperature, double temperature, double softcap,
          double logit_scale, int64_t rows, int64_t columns)
      : row_temperature(pointer<const float>(row_temperature)),
        temperature(static_cast<float>(temperature)),
        scaling(logit_scale, softcap),
        rows(rows),
        columns(static_cast<int>(columns)) {
    constexpr int64_t kMost = 1 << 30;
    if (columns > kMost)
      throw std::invalid_argument(std::string(op) + ": " + std::to_string(columns) +
                                  " columns exceed " + std::to_string(kMost) +
                                  "; pass them in slices");
  }
  RLHF_DEVICE float temperature_of(int64_t i) const {
    return row_temperature ? row_temperature[i] : temperature;
  }
};

}  // namespace rlhf
