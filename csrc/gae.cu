// Generalised advantage estimation on the GPU; rlhf_fast/ops/gae.py derives the recurrences.
//
// One block a sequence. It walks the sequence in chunks of kItems tokens a thread, in scan order
// (last token first in the forward pass): each thread composes its tokens' affine maps, a warp
// scans its threads' maps by shuffles, and the carry goes through the warps' maps in order. The
// chunk size follows from shapes alone and nothing is atomic, so results are deterministic.
#include "launch.cuh"

namespace rlhf {
namespace {

constexpr int kItems = 4;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kPackedThreads = 256;

template <typename F>
struct Tensors {
  const F* first;       // forward: rewards; backward: upstream gradient of advantages
  const F* second;      // forward: values; backward: upstream gradient of returns
  const uint8_t* mask;  // null counts every token
  const F* gamma;
  const F* lam;
  const F* bootstrap;  // forward only; null is 0
  const int32_t* offsets;
  F* out_first;      // forward: advantages; backward: gradient of rewards
  F* out_second;     // forward: returns; backward: gradient of values
  F* out_bootstrap;  // backward only
  int64_t first_stride, second_stride, mask_stride;
  int64_t length;
};

template <typename F>
struct Map {  // x -> b + c x
  F b, c;
};

// `later` after `earlier`, in scan order.
template <typename F>
__device__ Map<F> then(Map<F> earlier, Map<F> later) {
  return {later.b + later.c * earlier.b, later.c * earlier.c};
}

template <typename F, bool kForward>
__global__ void gae_kernel(Tensors<F> a) {
  __shared__ Map<F> warp_maps[2][kMaxThreads / kWarp];
  const int64_t sequence = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;

  int64_t length = a.length, first_row = sequence * a.first_stride;
  int64_t second_row = sequence * a.second_stride, mask_row = sequence * a.mask_stride;
  int64_t out_row = sequence * a.length;
  if (a.offsets != nullptr) {
    const int64_t begin = max(int64_t(0), min(int64_t(a.offsets[sequence]), a.length));
    const int64_t end = max(begin, min(int64_t(a.offsets[sequence + 1]), a.length));
    length = end - begin;
    first_row = second_row = mask_row = out_row = begin;
  }
  const F gamma = a.gamma[sequence], decay = gamma * a.lam[sequence];
  F carry = kForward && a.bootstrap != nullptr ? gamma * a.bootstrap[sequence] : F(0);

  int buffer = 0;
  for (int64_t chunk = 0; chunk < length; chunk += int64_t(blockDim.x) * kItems, buffer ^= 1) {
    const int64_t begin = chunk + int64_t(threadIdx.x) * kItems;
    F first[kItems], second[kItems];
    bool counts[kItems];
    Map<F> own = {0, 1};
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = begin + k;  // position in scan order
      const int64_t t = kForward ? length - 1 - i : i;
      counts[k] = i < length && (a.mask == nullptr || a.mask[mask_row + t] != 0);
      first[k] = counts[k] ? a.first[first_row + t] : F(0);
      second[k] = counts[k] ? a.second[second_row + t] : F(0);
      const F b = kForward ? gamma * second[k] + decay * (first[k] - second[k])
                           : first[k] + second[k];
      if (counts[k]) own = then(own, Map<F>{b, decay});
    }

    Map<F> scanned = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const Map<F> other = {__shfl_up_sync(~0u, scanned.b, step),
                            __shfl_up_sync(~0u, scanned.c, step)};
      if (lane >= step) scanned = then(other, scanned);
    }
    if (lane == kWarp - 1) warp_maps[buffer][warp] = scanned;
    // The other buffer is read in the next chunk, so one barrier a chunk is enough.
    __syncthreads();
    F warp_carry = carry;
    for (int w = 0; w < warps; ++w) {
      if (w == warp) warp_carry = carry;
      carry = warp_maps[buffer][w].b + warp_maps[buffer][w].c * carry;
    }
    const Map<F> before = {__shfl_up_sync(~0u, scanned.b, 1), __shfl_up_sync(~0u, scanned.c, 1)};
    F x = lane == 0 ? warp_carry : before.b + before.c * warp_carry;

#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = begin + k;
      if (i >= length) continue;
      const int64_t t = out_row + (kForward ? length - 1 - i : i);
      if (!counts[k]) {
        a.out_first[t] = a.out_second[t] = F(0);
        continue;
      }
      if constexpr (kForward) {
        const F advantage = (first[k] - second[k]) + x;
        a.out_first[t] = advantage;
        a.out_second[t] = advantage + second[k];
        x = gamma * second[k] + decay * (first[k] - second[k]) + decay * x;
      } else {
        const F u = first[k] + second[k] + decay * x;
        a.out_first[t] = u;
        a.out_second[t] = second[k] - u + gamma * x;
        x = u;
      }
    }
  }
  if (!kForward && threadIdx.x == 0) a.out_bootstrap[sequence] = gamma * carry;
}

template <typename F, bool kForward>
void launch_gae(const Tensors<F>& tensors, int64_t sequences, int device, uint64_t stream) {
  if (sequences == 0) return;
  const int64_t wanted = tensors.offsets != nullptr ? int64_t(kPackedThreads)
                                                    : (tensors.length + kItems - 1) / kItems;
  const int64_t whole_warps = (wanted + kWarp - 1) / kWarp * kWarp;
  const int threads =
      static_cast<int>(std::clamp<int64_t>(whole_warps, kWarp, kMaxThreads));
  const DeviceGuard guard(device, "gae");
  launch("gae", gae_kernel<F, kForward>, sequences, threads, 1, stream, tensors);
}

template <typename F>
Tensors<F> tensors(uint64_t first, int64_t first_stride, uint64_t second, int64_t second_stride,
                   uint64_t mask, int64_t mask_stride, uint64_t gamma, uint64_t lam,
                   uint64_t bootstrap, uint64_t offsets, uint64_t out_first, uint64_t out_second,
                   uint64_t out_bootstrap, int64_t length) {
  return {pointer<const F>(first),
          pointer<const F>(second),
          pointer<const uint8_t>(mask),
          pointer<const F>(gamma),
          pointer<const F>(lam),
          pointer<const F>(bootstrap),
          pointer<const int32_t>(offsets),
          pointer<F>(out_first),
          pointer<F>(out_second),
          pointer<F>(out_bootstrap),
          first_stride,
          second_stride,
          mask_stride,
          length};
}

}  // namespace

void gae_forward_cuda(uint64_t rewards, int64_t rewards_stride, uint64_t values,
                      int64_t values_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                      uint64_t lam, uint64_t bootstrap, uint64_t cu_seqlens, uint64_t advantages,
                      uint64_t returns, int64_t sequences, int64_t length, bool fp64, int device,
                      uint64_t stream) {
  auto run = [&](auto zero) {
    using F = decltype(zero);
    launch_gae<F, true>(
        tensors<F>(rewards, rewards_stride, values, values_stride, mask, mask_stride, gamma, lam,
                   bootstrap, cu_seqlens, advantages, returns, 0, length),
        sequences, device, stream);
  };
  fp64 ? run(double{}) : run(float{});
}

void gae_backward_cuda(uint64_t grad_advantages, int64_t grad_advantages_stride,
                       uint64_t grad_returns, int64_t grad_returns_stride, uint64_t mask,
                       int64_t mask_stride, uint64_t gamma, uint64_t lam, uint64_t cu_seqlens,
                       uint64_t grad_rewards, uint64_t grad_values, uint64_t grad_bootstrap,
                       int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream) {
  auto run = [&](auto zero) {
    using F = decltype(zero);
    launch_gae<F, false>(
        tensors<F>(grad_advantages, grad_advantages_stride, grad_returns, grad_returns_stride,
                   mask, mask_stride, gamma, lam, 0, cu_seqlens, grad_rewards, grad_values,
                   grad_bootstrap, length),
        sequences, device, stream);
  };
  fp64 ? run(double{}) : run(float{});
}

}  // namespace rlhf
