// Log-probs of given tokens and the entropy, from logits, on the GPU.
// rlhf_fast/ops/token_logprobs.py has the formulas, softmax.cuh the sums.
//
// Forward: a block a row, or a cluster of them, one read of each logit. Backward: a block for each
// range of a row, one read and one write; rows without an upstream gradient are only written.
#include "softmax.cuh"

namespace rlhf {
namespace {

constexpr const char* kOp = "token_logprobs";

struct Tokens {
  const int64_t* ids;
  int64_t ignore_index, first_column;

  RLHF_DEVICE bool ignored(int64_t i) const { return ids[i] == ignore_index; }
  // Where the token of row i is in these columns; -1 if elsewhere. As unsigned numbers, ids left of
  // the range lie right of it.
  RLHF_DEVICE int column(int64_t i, int columns) const {
    const uint64_t column = uint64_t(ids[i]) - uint64_t(first_column);
    return column < uint64_t(columns) ? int(column) : -1;
  }
};

template <typename T>
struct Forward {
  Options options;
  Tokens tokens;
  Rows<const T> logits;
  const float* carry;  // null: these are the first columns
  float *logprobs, *entropy, *stats;
  int parts;  // blocks that share a row

  RLHF_DEVICE void write(int64_t i, float logprob, float mean, RowSums state, float target) const {
    logprobs[i] = logprob;
    entropy[i] = mean;
    stats[i] = state.top;
    stats[options.rows + i] = state.others;
    stats[2 * options.rows + i] = state.weighted;
    stats[3 * options.rows + i] = target;
  }
};

// The state of the columns of a range that this warp takes. Which ones depends on their number
// alone, not on where they lie, and so a row's bits do not either.
template <bool kPlain, bool kAligned, typename T>
RLHF_DEVICE RowSums scan(const T* logits, int columns, const Scaling& scaling, float unit) {
  constexpr int kLanes = 16 / sizeof(T), kPacks = 4, kTile = kPacks * kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int packs = columns / kLanes;
  WarpSums sums;
  auto add = [&](const auto& y) {
    constexpr int kCount = sizeof(y) / sizeof(float);
    const bool raised = sums.raise(y, unit, lane);
    float powers[kCount], sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float gap = max_nan(sums.below(y[i]) * unit, kFloor);
      powers[i] = exp2_fast(gap);
      sum += powers[i];
      sums.weighted += powers[i] * gap;
    }
    sums.add(powers, sum, raised, lane);
  };

  // The next tile's loads are in flight while this one is worked on.
  Pack<T, kLanes> next[kPacks] = {};
  int left = packs - warp * kTile;  // packs from this warp's tile on
  const T* from = logits + (warp * kTile + lane) * kLanes;
  auto fetch = [&] {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (k * kWarp + lane < left) next[k].load(from + k * kWarp * kLanes, kAligned);
  };
  fetch();
  while (left > 0) {
    float y[kPacks * kLanes];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) next[k].read(y + k * kLanes);
    const int here = left;
    left -= kWarps * kTile;
    from += kWarps * kTile * kLanes;
    fetch();
    scale<kPlain>(scaling, y);
    if (here < kTile) {
#pragma unroll
      for (int i = 0; i < kPacks * kLanes; ++i)
        if (i / kLanes * kWarp + lane >= here) y[i] = -kInf;
    }
    add(y);
  }
  if (warp == 0) {
    const int last = packs * kLanes + lane;
    float y[] = {last < columns ? scaled<kPlain>(scaling, widen(logits[last])) : -kInf};
    add(y);
  }
  return {sums.top, warp_sum(sums.others), warp_sum(sums.weighted) * kLn2};
}

template <bool kPlain, typename T>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(const Forward<T> a) {
  const Options& o = a.options;
  const uint32_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const bool first = part == 0 && threadIdx.x == 0;
  if (a.tokens.ignored(row)) {
    if (first) a.write(row, 0, 0, {0, 0, 0}, 0);
    return;
  }
  const float temperature = o.temperature_of(row);
  const Range range(o.columns, a.parts, part);
  const T* from = a.logits.at(row) + range.begin;
  const float unit = kLog2E / temperature;
  const RowSums of_warp = is_aligned(from) ? scan<kPlain, true>(from, range.size, o.scaling, unit)
                                           : scan<kPlain, false>(from, range.size, o.scaling, unit);
  auto merge_at = [=](RowSums x, RowSums y) { return merge(x, y, temperature); };
  RowSums state = combine(of_warp, a.parts, RowSums{-kInf, 0, 0}, merge_at);
  if (!first) return;

  const int column = a.tokens.column(row, o.columns);
  float target = kNaN;
  if (a.carry != nullptr) {
    const float* carry = a.carry + row;
    state = merge({carry[0], carry[o.rows], carry[2 * o.rows]}, state, temperature);
    target = carry[3 * o.rows];
  }
  if (column >= 0) target = widen(a.logits.at(row)[column]);
  const float normalizer = log1pf(state.others);
  const bool defined = target == target && fabsf(state.top) < kInf;
  const float gap = (scaled<kPlain>(o.scaling, target) - state.top) / temperature;
  a.write(row, defined ? gap - normalizer : kNaN,
          defined ? normalizer - state.weighted / (1 + state.others) : kNaN, state, target);
}

template <typename T, typename O>
struct Backward {
  Options options;
  Tokens tokens;
  Rows<const T> logits;
  const float *stats, *grad_logprobs, *grad_entropy;  // null gradients are 0
  const int64_t* index;                               // null: row i of logits for row i
  Rows<O> out;
  int parts;
};

constexpr int kOutPacks = 4;
template <typename T, typename O>
using ShareOf = Share<kLanesOf<T, O>, kOutPacks>;

template <bool kPlain, typename T, typename O>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward<T, O> a) {
  constexpr int kLanes = kLanesOf<T, O>;
  const Options& o = a.options;
  const uint32_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const float upstream = a.grad_logprobs ? a.grad_logprobs[row] : 0;
  const float upstream_entropy = a.grad_entropy ? a.grad_entropy[row] : 0;
  O* out = a.out.at(row);
  const ShareOf<T, O> share(out, o.columns, part);

  if (a.tokens.ignored(row) || (upstream == 0 && upstream_entropy == 0)) {
#pragma unroll
    for (int k = 0; k < kOutPacks; ++k)
      if (share.has(k)) Pack<O, kLanes>{}.store(out + share.column(k), true);
    if (share.end >= 0) out[share.end] = O{};
    return;
  }

  const T* logits = a.logits.at(a.index ? static_cast<uint32_t>(a.index[row]) : row);
  const bool aligned = is_aligned(logits + share.span.head);
  Pack<T, kLanes> loaded[kOutPacks];
#pragma unroll
  for (int k = 0; k < kOutPacks; ++k)
    if (share.has(k)) loaded[k].load(logits + share.column(k), aligned);
  const float last = share.end >= 0 ? widen(logits[share.end]) : 0;

  const float top = a.stats[row], others = a.stats[o.rows + row];
  const float weighted = a.stats[2 * o.rows + row], target = a.stats[3 * o.rows + row];
  const float temperature = o.temperature_of(row), unit = kLog2E / temperature;
  const float factor = o.scaling.scale / temperature;  // dz / dl, but for the slope of the softcap
  const float norm = 1 / (1 + others), mean = weighted * norm;
  // 2^gap (constant + linear gap); a row whose token has no column becomes NaN.
  const float linear = -upstream_entropy * norm * factor * kLn2;
  const float constant =
      target == target ? (upstream_entropy * mean - upstream) * norm * factor : kNaN;
  auto gradient = [&](float l, float y) {
    const float gap = max_nan((y - top) * unit, kFloor);
    float grad = exp2_fast(gap) * (constant + linear * gap);
    if constexpr (!kPlain) grad *= slope(o.scaling, l);
    return grad;
  };

  const int column = target == target ? a.tokens.column(row, o.columns) : -1;
  bool has_token = share.end >= 0 && share.end == column;
#pragma unroll
  for (int k = 0; k < kOutPacks; ++k) {
    if (!share.has(k)) break;
    float l[kLanes], y[kLanes];
    loaded[k].read(l);
    loaded[k].read(y);
    scale<kPlain>(o.scaling, y);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) y[i] = gradient(l[i], y[i]);
    Pack<O, kLanes> result;
    result.write(y);
    result.store(out + share.column(k), true);
    has_token |= unsigned(column - share.column(k)) < unsigned(kLanes);
  }
  if (share.end >= 0)
    out[share.end] = narrow<O>(gradient(last, scaled<kPlain>(o.scaling, last)));

  // The token's own, over what this thread has just written there: 1 - p would cancel.
  if (!has_token) return;
  const float gap = max_nan((scaled<kPlain>(o.scaling, target) - top) / temperature, kFloor);
  const float logprob = gap - log1pf(others);
  const float dz = -expm1f(logprob) * upstream - expf(logprob) * (gap - mean) * upstream_entropy;
  out[column] = narrow<O>(dz * factor * slope(o.scaling, target));
}

}  // namespace

void token_logprobs_forward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                                 int64_t inner_stride, int dtype, uint64_t tokens,
                                 uint64_t row_temperature, double temperature, double softcap,
                                 double logit_scale, int64_t ignore_index, int64_t first_column,
                                 uint64_t carry, uint64_t logprobs, uint64_t entropy,
                                 uint64_t stats, int64_t rows, int64_t columns, int device,
                                 uint64_t stream) {
  if (rows == 0) return;
  const Options o(kOp, row_temperature, temperature, softcap, logit_scale, rows, columns);
  const DeviceGuard guard(device, kOp);
  const int parts = parts_of_a_row(kOp, rows, columns, device);
  dispatch(kOp, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Forward<T> a = {o,
                          {pointer<const int64_t>(tokens), ignore_index, first_column},
                          Rows<const T>(logits, inner, outer_stride, inner_stride),
                          pointer<const float>(carry),
                          pointer<float>(logprobs),
                          pointer<float>(entropy),
                          pointer<float>(stats),
                          parts};
    launch(kOp, o.scaling.plain() ? forward_kernel<true, T> : forward_kernel<false, T>,
           rows * parts, kThreads, parts, stream, a);
  });
}

void token_logprobs_backward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                                  int64_t inner_stride, int dtype, uint64_t tokens, uint64_t stats,
                                  uint64_t grad_logprobs, uint64_t grad_entropy,
                                  uint64_t row_temperature, double temperature, double softcap,
                                  double logit_scale, int64_t ignore_index, int64_t first_column,
                                  uint64_t index, uint64_t out, int64_t out_inner,
                                  int64_t out_outer_stride, int64_t out_inner_stride,
                                  int out_dtype, int64_t rows, int64_t columns, int device,
                                  uint64_t stream) {
  if (rows == 0 || columns == 0) return;
  const Options o(kOp, row_temperature, temperature, softcap, logit_scale, rows, columns);
  const DeviceGuard guard(device, kOp);
  dispatch(kOp, dtype, out_dtype, [&](auto* type, auto* out_type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using O = std::remove_pointer_t<decltype(out_type)>;
    const int64_t parts = ShareOf<T, O>::parts(columns);
    const Backward<T, O> a = {o,
                              {pointer<const int64_t>(tokens), ignore_index, first_column},
                              Rows<const T>(logits, inner, outer_stride, inner_stride),
                              pointer<const float>(stats),
                              pointer<const float>(grad_logprobs),
                              pointer<const float>(grad_entropy),
                              pointer<const int64_t>(index),
                              Rows<O>(out, out_inner, out_outer_stride, out_inner_stride),
                              static_cast<int>(parts)};
    launch(kOp, o.scaling.plain() ? backward_kernel<true, T, O> : backward_kernel<false, T, O>,
           rows * parts, kThreads, 1, stream, a);
  });
}

}  // namespace rlhf
