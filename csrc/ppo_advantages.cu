// What PPO trains on, from scores and log-probs, on the GPU; rlhf_fast/ops/ppo_advantages.py is the
// specification, rlhf_fast/ops/gae.py derives the recurrence.
//
// A team of threads walks a sequence (csrc/scan.cuh), from its last token to its first, after a
// first look at its mask. Unlike csrc/gae.cu it never cuts one: a rollout has sequences enough for
// a GPU, and a few very long ones only leave part of it idle. The last block to finish merges the
// sequences' moments, in order.
#include "moments.h"
#include "reduce.cuh"
#include "scan.cuh"
#include "ticket.cuh"

namespace rlhf {
namespace {

template <typename F>
struct Arguments {
  Layout layout;
  const F* scores;
  const F* logprobs;
  const F* ref_logprobs;  // null: no KL reward
  const F* values;
  const uint8_t* mask;
  int64_t logprobs_stride, ref_stride, values_stride, mask_stride;
  const F* gamma;  // null, here and below: the value is every sequence's
  const F* lam;
  const F* value_lam;
  F gamma_value, lam_value, value_lam_value;
  double adaptive_lam;
  F kl_coef;
  const uint8_t* finished;  // null: all
  F missing_eos_penalty;
  F* advantages;
  F* returns;
  F* rewards;
  double* moments;
  bool with_moments;
  Moments* partial;  // of each sequence
  unsigned* ticket;
};

// How many tokens of a sequence count, and the last one's lane, from its first group's first on.
struct Seen {
  int64_t count, last;
};

template <typename F, bool kVector>
RLHF_DEVICE Seen look(const Share& s, const Team& team, const uint8_t* row) {
  __shared__ Seen warps[kMaxWarps];
  Seen seen = {0, -1};
  for (int i = team.warp * kWarp + team.lane; i < s.groups; i += team.warps * kWarp) {
    const Group g = group_at<F, true>(s, i);
    const uint32_t counts = counted<F, kVector>(row, g);
    seen.count += __popc(counts);
    if (counts != 0)
      seen.last = max(seen.last, int64_t(g.index) * kLanes<F> + (31 - __clz(counts)));
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    seen.count += __shfl_xor_sync(~0u, seen.count, step);
    seen.last = max(seen.last, __shfl_xor_sync(~0u, seen.last, step));
  }
  if (team.warps == 1) return seen;
  if (team.lane == 0) warps[team.warp] = seen;
  __syncthreads();
  seen = {0, -1};
  for (int w = 0; w < team.warps; ++w) {
    seen.count += warps[w].count;
    seen.last = max(seen.last, warps[w].last);
  }
  return seen;
}

// Sums over the team, in a fixed order, for its first thread.
RLHF_DEVICE void add_up(const Team& team, double& sum, double& squares) {
  __shared__ double warps[2][kMaxWarps];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
    squares += __shfl_xor_sync(~0u, squares, step);
  }
  if (team.warps == 1) return;
  if (team.lane == 0) warps[0][team.warp] = sum, warps[1][team.warp] = squares;
  __syncthreads();
  for (int w = 1; team.leads() && w < team.warps; ++w) sum += warps[0][w], squares += warps[1][w];
}

// Two scans where the returns have a lambda of their own. The team's first thread gets the moments.
template <typename F, int kLambdas, bool kVector>
RLHF_DEVICE Moments estimate(const Arguments<F>& a, const Share& s, const Team& team) {
  using Map = Maps<F, kLambdas>;
  constexpr int L = kLanes<F>;
  __shared__ Map shared[2][kMaxWarps];
  const F* logprobs = s.row(a.layout, a.logprobs, a.logprobs_stride);
  const F* ref_logprobs = s.row(a.layout, a.ref_logprobs, a.ref_stride);
  const F* values = s.row(a.layout, a.values, a.values_stride);
  const uint8_t* mask = s.row(a.layout, a.mask, a.mask_stride);
  F* outs[] = {a.advantages + (s.start - s.skew), a.returns + (s.start - s.skew),
               a.rewards + (s.start - s.skew)};
  const Seen seen = look<F, kVector>(s, team, mask);

  const F gamma = a.gamma != nullptr ? a.gamma[s.sequence] : a.gamma_value;
  F lams[kLambdas], decay[kLambdas], x[kLambdas];
  lams[0] = a.lam != nullptr ? a.lam[s.sequence] : a.lam_value;
  if (a.adaptive_lam > 0)
    lams[0] = F(max(0.0, 1 - 1 / (a.adaptive_lam * max(double(seen.count), 1.0))));
  if constexpr (kLambdas == 2)
    lams[1] = a.value_lam != nullptr ? a.value_lam[s.sequence] : a.value_lam_value;
  for (int i = 0; i < kLambdas; ++i) decay[i] = gamma * lams[i], x[i] = 0;
  F score = a.scores[s.sequence];
  if (a.finished != nullptr && a.finished[s.sequence] == 0) score -= a.missing_eos_penalty;

  auto reward_of = [&](F logprob, F ref_logprob, bool last) {
    const F kl = ref_logprobs != nullptr ? -a.kl_coef * (logprob - ref_logprob) : F(0);
    return last ? kl + score : kl;
  };
  // Nothing comes after the last token: its advantage is what lies between reward and value.
  const bool none = seen.count == 0, has_ref = ref_logprobs != nullptr && !none;
  const double pivot = none ? 0
                            : reward_of(has_ref ? logprobs[seen.last] : F(0),
                                        has_ref ? ref_logprobs[seen.last] : F(0), true) -
                                  values[seen.last];
  const int last_group = none ? -1 : int(seen.last / L), last_lane = int(seen.last % L);
  double sum = 0, squares = 0;
  int buffer = 0;
  for (int tile = 0; tile < s.end; tile += team.tile(), buffer ^= 1) {
    Group groups[kRows];
    uint32_t counts[kRows];
    Values<F> reward[kRows], ref[kRows], value[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      groups[row] = group_at<F, true>(s, tile + team.group(row));
      counts[row] = counted<F, kVector>(mask, groups[row]);
      value[row] = load<F, kVector>(values, groups[row]);
      if (ref_logprobs == nullptr) continue;
      reward[row] = load<F, kVector>(logprobs, groups[row]);
      ref[row] = load<F, kVector>(ref_logprobs, groups[row]);
    }
    Map maps[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      keep(value[row], counts[row]);
      maps[row] = Map::identity();
#pragma unroll
      for (int k = L - 1; k >= 0; --k) {
        const bool counts_here = counts[row] >> k & 1;
        const bool last = groups[row].index == last_group && k == last_lane;
        F& r = reward[row].lanes[k];
        r = counts_here ? reward_of(r, ref[row].lanes[k], last) : F(0);
        if (!counts_here) continue;
        const F v = value[row].lanes[k];
        Map map;
#pragma unroll
        for (int i = 0; i < kLambdas; ++i) {
          map.b[i] = gamma * (v + lams[i] * (r - v));
          map.c[i] = decay[i];
        }
        maps[row] = maps[row].then(map);
      }
      store<F, kVector>(outs[2], groups[row], reward[row]);
    }
    const Map all = scan_tile(team, maps, shared[buffer]);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      F y[kLambdas];
#pragma unroll
      for (int i = 0; i < kLambdas; ++i) y[i] = maps[row].apply(i, x[i]);
      Values<F> advantage, returned;
#pragma unroll
      for (int k = L - 1; k >= 0; --k) {
        const F r = reward[row].lanes[k], v = value[row].lanes[k];
        advantage.lanes[k] = returned.lanes[k] = 0;
        if (!(counts[row] >> k & 1)) continue;
        advantage.lanes[k] = (r - v) + y[0];
        returned.lanes[k] = ((r - v) + y[kLambdas - 1]) + v;
        const double apart = advantage.lanes[k] - pivot;
        sum += apart;
        squares += apart * apart;
#pragma unroll
        for (int i = 0; i < kLambdas; ++i)
          y[i] = gamma * (v + lams[i] * (r - v)) + decay[i] * y[i];
      }
      store<F, kVector>(outs[0], groups[row], advantage);
      store<F, kVector>(outs[1], groups[row], returned);
    }
#pragma unroll
    for (int i = 0; i < kLambdas; ++i) x[i] = all.apply(i, x[i]);
  }
  add_up(team, sum, squares);
  return {double(seen.count), double(pivot), sum, squares};
}

template <typename F, int kLambdas, bool kVector>
__global__ void __launch_bounds__(kMaxWarps* kWarp, sizeof(F) == 4 ? 4 - kLambdas : 1)
    advantages_kernel(const Arguments<F> a) {
  __shared__ Moments left[kWarp];
  const Share s = share<F>(a.layout);
  const Team team(a.layout.warps);
  // A block of several warps has a sequence for sure, so that none of its threads waits in vain.
  if (!s.idle) {
    const Moments own = estimate<F, kLambdas, kVector>(a, s, team);
    if (team.leads()) a.partial[s.sequence] = own;
  }
  if (!a.with_moments) {
    if (blockIdx.x == 0 && threadIdx.x < 3) a.moments[threadIdx.x] = 0;
    return;
  }
  if (!last_block(a.ticket)) return;
  const int64_t stretch = (a.layout.sequences + blockDim.x - 1) / blockDim.x;
  const int64_t begin = threadIdx.x * stretch, end = min(a.layout.sequences, begin + stretch);
  Moments all = {};
  for (int64_t i = begin; i < end; ++i) all.merge(a.partial[i]);
  all = block_total(all, left);
  if (threadIdx.x != 0) return;
  a.moments[0] = all.count;
  a.moments[1] = all.mean();
  a.moments[2] = all.spread();
}

template <typename F, bool kVector>
void launch_advantages(const Arguments<F>& a, int device, uint64_t stream) {
  const bool decoupled = a.value_lam != nullptr || a.value_lam_value >= 0;
  const DeviceGuard guard(device, "ppo_advantages");
  launch("ppo_advantages",
         decoupled ? advantages_kernel<F, 2, kVector> : advantages_kernel<F, 1, kVector>,
         a.layout.blocks(), a.layout.threads(), 1, stream, a);
}

}  // namespace

void ppo_advantages_forward_cuda(
    uint64_t scores, uint64_t logprobs, int64_t logprobs_stride, uint64_t ref_logprobs,
    int64_t ref_logprobs_stride, uint64_t values, int64_t values_stride, uint64_t mask,
    int64_t mask_stride, uint64_t gamma, double gamma_value, uint64_t lam, double lam_value,
    uint64_t value_lam, double value_lam_value, double adaptive_lam, double kl_coef,
    uint64_t finished, double missing_eos_penalty, uint64_t cu_seqlens, uint64_t advantages,
    uint64_t returns, uint64_t rewards, uint64_t moments, uint64_t partial, uint64_t ticket,
    bool with_moments, int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream) {
  if (sequences == 0) return;
  auto compute = [&](auto zero) {
    using F = decltype(zero);
    Arguments<F> a = {
        plan<F>(pointer<const int32_t>(cu_seqlens), sequences, length, false),
        pointer<const F>(scores),
        pointer<const F>(logprobs),
        pointer<const F>(ref_logprobs),
        pointer<const F>(values),
        pointer<const uint8_t>(mask),
        logprobs_stride,
        ref_logprobs_stride,
        values_stride,
        mask_stride,
        pointer<const F>(gamma),
        pointer<const F>(lam),
        pointer<const F>(value_lam),
        F(gamma_value),
        F(lam_value),
        F(value_lam_value),
        adaptive_lam,
        F(kl_coef),
        pointer<const uint8_t>(finished),
        F(missing_eos_penalty),
        pointer<F>(advantages),
        pointer<F>(returns),
        pointer<F>(rewards),
        pointer<double>(moments),
        with_moments,
        pointer<Moments>(partial),
        pointer<unsigned>(ticket),
    };
    Alignment<F> alignment(a.layout);
    alignment.add(a.logprobs, logprobs_stride);
    alignment.add(a.ref_logprobs, ref_logprobs_stride);
    alignment.add(a.values, values_stride);
    alignment.add(a.mask, mask_stride);
    alignment.add(a.advantages, length);
    alignment.add(a.returns, length);
    alignment.add(a.rewards, length);
    (alignment.found() ? launch_advantages<F, true> : launch_advantages<F, false>)(a, device,
                                                                                   stream);
  };
  fp64 ? compute(double{}) : compute(float{});
}

}  // namespace rlhf
