// Whitening on the GPU, in place, by moments that are known; rlhf_fast/ops/ppo_advantages.py calls
// it after those of all processes were merged.
#include "teams.cuh"
#include "whitening.h"

namespace rlhf {
namespace {

constexpr int kThreads = 256, kGroups = 4;  // of a thread

template <typename F>
struct Whitening {
  Layout layout;  // rows
  F* advantages;
  const uint8_t* mask;
  int64_t mask_stride, row_blocks;
  const double* moments;
};

template <typename F, bool kVector>
__global__ void __launch_bounds__(kThreads) whiten_kernel(const Whitening<F> a) {
  __shared__ double shared_scale;
  const double mean = a.moments[1];
  if (threadIdx.x == 0) shared_scale = whitening_scale(a.moments[0], a.moments[2]);
  __syncthreads();
  const double scale = shared_scale;
  const int64_t sequence = blockIdx.x / a.row_blocks;
  const int64_t length = a.layout.length;
  const Share s = whole<F>(a.layout, sequence, sequence * length, length);
  const int piece = int(blockIdx.x % a.row_blocks) * kGroups * kThreads;
  F* row = a.advantages + (s.start - s.skew);
  const uint8_t* mask = s.row(a.layout, a.mask, a.mask_stride);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const Group g = group_at<F, false>(s, piece + i * kThreads + int(threadIdx.x));
    const uint32_t counts = counted<F, kVector>(mask, g);
    Values<F> x = load<F, kVector>(row, g);
#pragma unroll
    for (int k = 0; k < kLanes<F>; ++k) x.lanes[k] = F((x.lanes[k] - mean) * scale);
    keep(x, counts);
    store<F, kVector>(row, g, x);
  }
}

}  // namespace

void ppo_advantages_whiten_cuda(uint64_t advantages, uint64_t mask, int64_t mask_stride,
                                uint64_t moments, int64_t rows, int64_t length, bool fp64,
                                int device, uint64_t stream) {
  if (rows == 0 || length == 0) return;
  if (mask_stride == length) length *= rows, rows = 1;  // no row has to end where a block does
  auto compute = [&](auto zero) {
    using F = decltype(zero);
    constexpr int64_t kPiece = int64_t(kGroups) * kThreads;
    const int64_t groups = (length + 2 * (kLanes<F> - 1)) / kLanes<F>;
    Whitening<F> a = {plan<F>(nullptr, rows, length, false), pointer<F>(advantages),
                      pointer<const uint8_t>(mask), mask_stride, (groups + kPiece - 1) / kPiece,
                      pointer<const double>(moments)};
    Alignment<F> alignment(a.layout);
    alignment.add(a.advantages, length);
    alignment.add(a.mask, mask_stride);
    const DeviceGuard guard(device, "ppo_advantages");
    launch("ppo_advantages", alignment.found() ? whiten_kernel<F, true> : whiten_kernel<F, false>,
           rows * a.row_blocks, kThreads, 1, stream, a);
  };
  fp64 ? compute(double{}) : compute(float{});
}

}  // namespace rlhf
