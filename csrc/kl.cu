// Exact KL(policy || reference) of rows of logits, on the GPU. rlhf_fast/ops/full_kl.py has the
// formulas, softmax.cuh the sums.
//
// Forward: one read of both logits. A warp holds a tile of columns in registers: it first adds the
// tile to both normalisers, then adds the terms of the sum, which need them. What it had before
// joins as if it were one more column, by the chain rule of KL; so do the ranges of warps and
// blocks. Log-ratios u, and KL within a warp, are in bits.
#include "kl.cuh"

namespace rlhf {
namespace {

constexpr const char* kOp = "full_kl";

template <typename T>
struct Forward {
  Options options;
  Rows<const T> logits, ref_logits;
  const float* carry;  // null: these are the first columns
  float *kl, *stats;
  int parts;  // blocks that share a row
};

// The state of the columns of a range that this warp takes: by their number, as in
// token_logprobs.cu, and not by where they lie.
template <bool kPlain, bool kAligned, typename T>
RLHF_DEVICE KlState scan(const T* logits, const T* ref_logits, int columns,
                         const Scaling& scaling, float unit) {
  constexpr int kLanes = 16 / sizeof(T), kPacks = 2, kTile = kPacks * kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int packs = columns / kLanes;
  WarpKl sums;

  // The next tile's loads are in flight while this one is worked on.
  Pack<T, kLanes> next[kPacks] = {}, ref_next[kPacks] = {};
  int left = packs - warp * kTile;  // packs from this warp's tile on
  const int start = (warp * kTile + lane) * kLanes;
  const T *from = logits + start, *ref_from = ref_logits + start;
  auto fetch = [&] {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * kWarp + lane >= left) continue;
      next[k].load(from + k * kWarp * kLanes, kAligned);
      ref_next[k].load(ref_from + k * kWarp * kLanes, kAligned);
    }
  };
  fetch();
  while (left > 0) {
    float y[kPacks * kLanes], ref_y[kPacks * kLanes];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      next[k].read(y + k * kLanes);
      ref_next[k].read(ref_y + k * kLanes);
    }
    const int here = left;
    left -= kWarps * kTile;
    from += kWarps * kTile * kLanes, ref_from += kWarps * kTile * kLanes;
    fetch();
    scale<kPlain>(scaling, y);
    scale<kPlain>(scaling, ref_y);
    if (here < kTile) {
#pragma unroll
      for (int i = 0; i < kPacks * kLanes; ++i)
        if (i / kLanes * kWarp + lane >= here) y[i] = ref_y[i] = -kInf;
    }
    sums.add(y, ref_y, unit, lane);
  }
  if (warp == 0) {
    const int last = packs * kLanes + lane;
    const bool has = last < columns;
    float y[] = {has ? scaled<kPlain>(scaling, widen(logits[last])) : -kInf};
    float ref_y[] = {has ? scaled<kPlain>(scaling, widen(ref_logits[last])) : -kInf};
    sums.add(y, ref_y, unit, lane);
  }
  return sums.state();
}

template <bool kPlain, typename T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const Forward<T> a) {
  const Options& o = a.options;
  const uint32_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const float temperature = o.temperature_of(row);
  const Range range(o.columns, a.parts, part);
  const float unit = kLog2E / temperature;
  const T *from = a.logits.at(row) + range.begin, *ref_from = a.ref_logits.at(row) + range.begin;
  const KlState of_warp =
      is_aligned(from) && is_aligned(ref_from)
          ? scan<kPlain, true>(from, ref_from, range.size, o.scaling, unit)
          : scan<kPlain, false>(from, ref_from, range.size, o.scaling, unit);
  auto merge_at = [=](const KlState& x, const KlState& y) { return merge(x, y, temperature); };
  KlState state = combine(of_warp, a.parts, KlState{-kInf, 0, -kInf, 0, 0}, merge_at);
  if (part != 0 || threadIdx.x != 0) return;

  if (a.carry != nullptr) {
    const float* carry = a.carry + row;
    const KlState before = {carry[0], carry[o.rows], carry[2 * o.rows], carry[3 * o.rows],
                            carry[4 * o.rows]};
    state = merge(before, state, temperature);
  }
  a.stats[row] = state.top;
  a.stats[o.rows + row] = state.others;
  a.stats[2 * o.rows + row] = state.ref_top;
  a.stats[3 * o.rows + row] = state.ref_others;
  a.stats[4 * o.rows + row] = state.kl;
  a.kl[row] = fabsf(state.top) < kInf && state.ref_top < kInf ? state.kl : kNaN;
}

template <typename T, typename O>
struct Backward {
  Options options;
  Rows<const T> logits, ref_logits;
  const float *stats, *grad_kl;
  const int64_t* index;  // null: row i of both logits for row i
  Rows<O> out, ref_out;  // null data: not wanted
  int parts;
};

// G p (u - kl) for the policy's logits, G (q - p) for the reference's; u = log(p / q), in nats.
struct Gradient {
  float level, ref_level, inverse, shift, kl;
  float share, ref_share;  // G dz/dl / (1 + others): what e^gap has to be multiplied with

  // Replaces logits by their gradients; both are needed for either.
  template <bool kPlain, int N>
  RLHF_DEVICE void apply(const Scaling& s, bool with_ref, float (&l)[N], float (&ref_l)[N]) const {
    const float unit = inverse * kLog2E;
    float y[N], ref_y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = l[i], ref_y[i] = ref_l[i];
    scale<kPlain>(s, y);
    scale<kPlain>(s, ref_y);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float below = max_nan(y[i] - level, kFloor);
      const float ref_below = max_nan(ref_y[i] - ref_level, kFloor);
      const float p = exp2_fast(below * unit) * share, u = (below - ref_below) * inverse - shift;
      float grad = p * (u - kl);
      if (ref_below == kFloor) grad = 0;  // only the policy allows it: kl is +inf in the end
      if constexpr (!kPlain) grad *= slope(s, l[i]);
      l[i] = grad;
      if (!with_ref) continue;
      float ref_grad = exp2_fast(ref_below * unit) * ref_share - p;
      const float bits = u * kLog2E;
      if (fabsf(bits) < kNear) ref_grad = p * (kLn2 * excess(bits) - u);
      if constexpr (!kPlain) ref_grad *= slope(s, ref_l[i]);
      ref_l[i] = ref_grad;
    }
  }
};

constexpr int kOutPacks = 4;
template <typename T, typename O>
using ShareOf = Share<kLanesOf<T, O>, kOutPacks>;

template <bool kPlain, typename T, typename O>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward<T, O> a) {
  constexpr int kLanes = kLanesOf<T, O>;
  const Options& o = a.options;
  const uint32_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  O* const out = a.out.data ? a.out.at(row) : nullptr;
  O* const ref_out = a.ref_out.data ? a.ref_out.at(row) : nullptr;
  const ShareOf<T, O> share(out ? out : ref_out, o.columns, part);
  const int head = share.span.head, end = share.end;
  const bool out_aligned = is_aligned(out + head), ref_out_aligned = is_aligned(ref_out + head);

  const float kl = a.stats[4 * o.rows + row], upstream = a.grad_kl[row];
  const bool without_gradient = upstream == 0 || kl == kInf;
  if (without_gradient || a.stats[row] == -kInf) {
    // A policy row that rules out everything has no distribution: NaN.
    float fill[kLanes];
    for (float& x : fill) x = without_gradient ? 0.0f : nanf("");
    Pack<O, kLanes> pack;
    pack.write(fill);
#pragma unroll
    for (int k = 0; k < kOutPacks; ++k) {
      if (!share.has(k)) break;
      if (out) pack.store(out + share.column(k), out_aligned);
      if (ref_out) pack.store(ref_out + share.column(k), ref_out_aligned);
    }
    if (end >= 0 && out) out[end] = narrow<O>(fill[0]);
    if (end >= 0 && ref_out) ref_out[end] = narrow<O>(fill[0]);
    return;
  }

  const uint32_t source = a.index ? static_cast<uint32_t>(a.index[row]) : row;
  const T *logits = a.logits.at(source), *ref_logits = a.ref_logits.at(source);
  const bool aligned = is_aligned(logits + head), ref_aligned = is_aligned(ref_logits + head);
  Pack<T, kLanes> loaded[kOutPacks], ref_loaded[kOutPacks];
#pragma unroll
  for (int k = 0; k < kOutPacks; ++k) {
    if (!share.has(k)) break;
    loaded[k].load(logits + share.column(k), aligned);
    ref_loaded[k].load(ref_logits + share.column(k), ref_aligned);
  }

  const float others = a.stats[o.rows + row], ref_others = a.stats[3 * o.rows + row];
  const float temperature = o.temperature_of(row);
  const float factor = upstream * o.scaling.scale / temperature;
  const Gradient gradient = {level(a.stats[row]),
                             level(a.stats[2 * o.rows + row]),
                             1 / temperature,
                             log2_ratio(others, ref_others) * kLn2,
                             kl,
                             factor / (1 + others),
                             factor / (1 + ref_others)};
#pragma unroll
  for (int k = 0; k < kOutPacks; ++k) {
    if (!share.has(k)) break;
    float l[kLanes], ref_l[kLanes];
    loaded[k].read(l);
    ref_loaded[k].read(ref_l);
    gradient.template apply<kPlain>(o.scaling, ref_out != nullptr, l, ref_l);
    Pack<O, kLanes> result;
    result.write(l);
    if (out) result.store(out + share.column(k), out_aligned);
    result.write(ref_l);
    if (ref_out) result.store(ref_out + share.column(k), ref_out_aligned);
  }
  if (end >= 0) {
    float l[] = {widen(logits[end])}, ref_l[] = {widen(ref_logits[end])};
    gradient.template apply<kPlain>(o.scaling, ref_out != nullptr, l, ref_l);
    if (out) out[end] = narrow<O>(l[0]);
    if (ref_out) ref_out[end] = narrow<O>(ref_l[0]);
  }
}

}  // namespace

void full_kl_forward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                          int64_t inner_stride, uint64_t ref_logits, int64_t ref_inner,
                          int64_t ref_outer_stride, int64_t ref_inner_stride, int dtype,
                          uint64_t row_temperature, double temperature, double softcap,
                          double logit_scale, uint64_t carry, uint64_t kl, uint64_t stats,
                          int64_t rows, int64_t columns, int device, uint64_t stream) {
  if (rows == 0) return;
  const Options o(kOp, row_temperature, temperature, softcap, logit_scale, rows, columns);
  const DeviceGuard guard(device, kOp);
  const int parts = parts_of_a_row(kOp, rows, columns, device);
  dispatch(kOp, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Forward<T> a = {
        o,
        Rows<const T>(logits, inner, outer_stride, inner_stride),
        Rows<const T>(ref_logits, ref_inner, ref_outer_stride, ref_inner_stride),
        pointer<const float>(carry),
        pointer<float>(kl),
        pointer<float>(stats),
        parts};
    launch(kOp, o.scaling.plain() ? forward_kernel<true, T> : forward_kernel<false, T>,
           rows * parts, kThreads, parts, stream, a);
  });
}

void full_kl_backward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                           int64_t inner_stride, uint64_t ref_logits, int64_t ref_inner,
                           int64_t ref_outer_stride, int64_t ref_inner_stride, int dtype,
                           uint64_t stats, uint64_t grad_kl, uint64_t row_temperature,
                           double temperature, double softcap, double logit_scale, uint64_t index,
                           uint64_t out, int64_t out_inner, int64_t out_outer_stride,
                           int64_t out_inner_stride, uint64_t ref_out, int64_t ref_out_inner,
                           int64_t ref_out_outer_stride, int64_t ref_out_inner_stride,
                           int out_dtype, int64_t rows, int64_t columns, int device,
                           uint64_t stream) {
  if (rows == 0 || columns == 0 || (out == 0 && ref_out == 0)) return;
  const Options o(kOp, row_temperature, temperature, softcap, logit_scale, rows, columns);
  const DeviceGuard guard(device, kOp);
  dispatch(kOp, dtype, out_dtype, [&](auto* type, auto* out_type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using O = std::remove_pointer_t<decltype(out_type)>;
    const int64_t parts = ShareOf<T, O>::parts(columns);
    const Backward<T, O> a = {
        o,
        Rows<const T>(logits, inner, outer_stride, inner_stride),
        Rows<const T>(ref_logits, ref_inner, ref_outer_stride, ref_inner_stride),
        pointer<const float>(stats),
        pointer<const float>(grad_kl),
        pointer<const int64_t>(index),
        Rows<O>(out, out_inner, out_outer_stride, out_inner_stride),
        Rows<O>(ref_out, ref_out_inner, ref_out_outer_stride, ref_out_inner_stride),
        static_cast<int>(parts)};
    launch(kOp, o.scaling.plain() ? backward_kernel<true, T, O> : backward_kernel<false, T, O>,
           rows * parts, kThreads, 1, stream, a);
  });
}

}  // namespace rlhf
