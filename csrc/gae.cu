// Generalised advantage estimation on the GPU; rlhf_fast/ops/gae.py derives the recurrences.
//
// Both passes scan affine maps (csrc/scan.cuh) over the tokens of a sequence: the forward from its
// last token to its first, the backward from first to last. Where sequences are cut into chunks, a
// first launch composes the map of each chunk, and in a second one each chunk's team composes those
// of the chunks before it, in order, to find the x that it starts from. Nothing is atomic.
#include "scan.cuh"

namespace rlhf {
namespace {

template <typename F>
struct Arguments {
  Layout layout;
  const F* first;       // forward: rewards; backward: upstream gradient of advantages
  const F* second;      // forward: values; backward: upstream gradient of returns
  const uint8_t* mask;  // null counts every token
  int64_t first_stride, second_stride, mask_stride;
  const F* gamma;  // null: gamma_value for every sequence
  const F* lam;    // null: lam_value
  F gamma_value, lam_value;
  const F* bootstrap;  // forward only; null is 0
  F* out_first;        // forward: advantages; backward: gradient of rewards
  F* out_second;       // forward: returns; backward: gradient of values
  F* out_bootstrap;    // backward only
  Maps<F, 1>* maps;    // of the chunks, a slot each
};

template <typename F, bool kForward, bool kVector, bool kCompose>
__global__ void __launch_bounds__(kMaxWarps* kWarp, sizeof(F) == 4 ? 4 : 2)
    gae_kernel(const Arguments<F> a) {
  using Map = Maps<F, 1>;
  constexpr int L = kLanes<F>;
  __shared__ Map shared[2][kMaxWarps];
  const Share s = share<F>(a.layout);
  if (s.idle || (kCompose && s.last)) return;  // nothing starts from what the last chunk leaves
  const Team team(a.layout.warps);
  const F gamma = a.gamma != nullptr ? a.gamma[s.sequence] : a.gamma_value;
  const F decay = gamma * (a.lam != nullptr ? a.lam[s.sequence] : a.lam_value);

  int buffer = 0;
  F x = kForward && a.bootstrap != nullptr ? gamma * a.bootstrap[s.sequence] : F(0);
  if (!kCompose && s.chunk > 0) {
    const Map* maps = a.maps + (s.slot - s.chunk);
    const int64_t stretch = (s.chunk + team.tile() - 1) / team.tile();
    Map before[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int64_t begin = team.group(row) * stretch, end = min(s.chunk, begin + stretch);
      before[row] = Map::identity();
#pragma unroll 4
      for (int64_t k = begin; k < end; ++k) before[row] = before[row].then(maps[k]);
    }
    x = scan_tile(team, before, shared[buffer]).apply(0, x);
    buffer ^= 1;
  }

  const F* first_row = s.row(a.layout, a.first, a.first_stride);
  const F* second_row = s.row(a.layout, a.second, a.second_stride);
  const uint8_t* mask_row = s.row(a.layout, a.mask, a.mask_stride);
  F* out_first_row = a.out_first + (s.start - s.skew);
  F* out_second_row = a.out_second + (s.start - s.skew);
  Map whole = Map::identity();
  for (int tile = s.begin; tile < s.end; tile += team.tile(), buffer ^= 1) {
    Group groups[kRows];
    uint32_t counts[kRows];
    Values<F> first[kRows], second[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      groups[row] = group_at<F, kForward>(s, tile + team.group(row));
      counts[row] = counted<F, kVector>(mask_row, groups[row]);
      first[row] = load<F, kVector>(first_row, groups[row]);
      second[row] = load<F, kVector>(second_row, groups[row]);
    }
    // What a token maps the carry to, and the k-th of a group in scan order.
    auto map = [&](F one, F other) {
      return kForward ? gamma * other + decay * (one - other) : one + other;
    };
    auto lane = [](int k) { return kForward ? L - 1 - k : k; };
    Map maps[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      keep(first[row], counts[row]);
      keep(second[row], counts[row]);
      maps[row] = Map::identity();
#pragma unroll
      for (int i = 0; i < L; ++i) {
        const int k = lane(i);
        if (counts[row] >> k & 1)
          maps[row] = maps[row].then({{map(first[row].lanes[k], second[row].lanes[k])}, {decay}});
      }
    }
    const Map all = scan_tile(team, maps, shared[buffer]);
    if constexpr (kCompose) {
      whole = whole.then(all);
    } else {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        F y = maps[row].apply(0, x);
        Values<F> out_first, out_second;
#pragma unroll
        for (int i = 0; i < L; ++i) {
          const int k = lane(i);
          const F one = first[row].lanes[k], other = second[row].lanes[k];
          const F after = map(one, other) + decay * y;
          out_first.lanes[k] = kForward ? (one - other) + y : after;
          out_second.lanes[k] =
              kForward ? out_first.lanes[k] + other : other - after + gamma * y;
          if (counts[row] >> k & 1) y = after;
        }
        keep(out_first, counts[row]);
        keep(out_second, counts[row]);
        store<F, kVector>(out_first_row, groups[row], out_first);
        store<F, kVector>(out_second_row, groups[row], out_second);
      }
      x = all.apply(0, x);
    }
  }
  if (!team.leads()) return;
  if (kCompose) a.maps[s.slot] = whole;
  if (!kCompose && !kForward && s.last) a.out_bootstrap[s.sequence] = gamma * x;
}

template <typename F, bool kForward, bool kVector>
void launch_gae(const Arguments<F>& a, int device, uint64_t stream) {
  const Layout& l = a.layout;
  const DeviceGuard guard(device, "gae");
  if (l.chunk != 0)
    launch("gae", gae_kernel<F, kForward, kVector, true>, l.blocks(), l.threads(), 1, stream, a);
  launch("gae", gae_kernel<F, kForward, kVector, false>, l.blocks(), l.threads(), 1, stream, a);
}

template <typename F, bool kForward>
void run(Arguments<F> a, int device, uint64_t stream) {
  if (a.layout.sequences == 0) return;
  Alignment<F> alignment(a.layout);
  alignment.add(a.first, a.first_stride);
  alignment.add(a.second, a.second_stride);
  alignment.add(a.mask, a.mask_stride);
  alignment.add(a.out_first, a.layout.length);
  alignment.add(a.out_second, a.layout.length);
  (alignment.found() ? launch_gae<F, kForward, true> : launch_gae<F, kForward, false>)(a, device,
                                                                                       stream);
}

}  // namespace

int64_t gae_scratch_cuda(bool packed, int64_t sequences, int64_t length, bool fp64) {
  auto elements = [&](auto zero) {
    using F = decltype(zero);
    const int32_t somewhere = 0;
    Layout layout = plan<F>(packed ? &somewhere : nullptr, sequences, length, true);
    layout.phase = kLanes<F> - 1;
    return layout.chunk == 0 ? 0 : layout.slots() * int64_t(sizeof(Maps<F, 1>) / sizeof(F));
  };
  return fp64 ? elements(double{}) : elements(float{});
}

void gae_forward_cuda(uint64_t rewards, int64_t rewards_stride, uint64_t values,
                      int64_t values_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                      double gamma_value, uint64_t lam, double lam_value, uint64_t bootstrap,
                      uint64_t cu_seqlens, uint64_t advantages, uint64_t returns, uint64_t maps,
                      int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream) {
  auto compute = [&](auto zero) {
    using F = decltype(zero);
    run<F, true>({plan<F>(pointer<const int32_t>(cu_seqlens), sequences, length, true),
                  pointer<const F>(rewards), pointer<const F>(values),
                  pointer<const uint8_t>(mask), rewards_stride, values_stride, mask_stride,
                  pointer<const F>(gamma), pointer<const F>(lam), F(gamma_value), F(lam_value),
                  pointer<const F>(bootstrap), pointer<F>(advantages), pointer<F>(returns), nullptr,
                  pointer<Maps<F, 1>>(maps)},
                 device, stream);
  };
  fp64 ? compute(double{}) : compute(float{});
}

void gae_backward_cuda(uint64_t grad_advantages, int64_t grad_advantages_stride,
                       uint64_t grad_returns, int64_t grad_returns_stride, uint64_t mask,
                       int64_t mask_stride, uint64_t gamma, double gamma_value, uint64_t lam,
                       double lam_value, uint64_t cu_seqlens, uint64_t grad_rewards,
                       uint64_t grad_values, uint64_t grad_bootstrap, uint64_t maps,
                       int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream) {
  auto compute = [&](auto zero) {
    using F = decltype(zero);
    run<F, false>({plan<F>(pointer<const int32_t>(cu_seqlens), sequences, length, true),
                   pointer<const F>(grad_advantages), pointer<const F>(grad_returns),
                   pointer<const uint8_t>(mask), grad_advantages_stride, grad_returns_stride,
                   mask_stride, pointer<const F>(gamma), pointer<const F>(lam), F(gamma_value),
                   F(lam_value), nullptr, pointer<F>(grad_rewards), pointer<F>(grad_values),
                   pointer<F>(grad_bootstrap), pointer<Maps<F, 1>>(maps)},
                  device, stream);
  };
  fp64 ? compute(double{}) : compute(float{});
}

}  // namespace rlhf
