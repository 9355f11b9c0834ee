// The gradients of a loss that its forward pass found but for what comes from above, on the GPU.
#include "launch.cuh"

namespace rlhf {
namespace {

constexpr int kThreads = 256, kItems = 4;
constexpr int64_t kBackwardBlocks = 4096;

template <typename F>
struct Arguments {
  const F *grad_loss, *divisor, *grad, *shares;
  F *out, *first_out, *second_out;  // or null
  F first_coef, second_coef;
  int64_t tokens;
};

// No coefficient, no gradient, though the factor be infinite; and 0 stays 0.
template <typename F>
__device__ F product(F x, F factor) {
  return x == 0 ? F(0) : x * factor;
}

template <typename F>
__global__ void __launch_bounds__(kThreads) loss_backward_kernel(Arguments<F> a) {
  const F factor = *a.grad_loss / *a.divisor;
  const F first = product(a.first_coef, factor), second = product(a.second_coef, factor);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.tokens;
       i += int64_t(gridDim.x) * kThreads) {
    if (a.out != nullptr) a.out[i] = product(a.grad[i], factor);
    if (a.first_out != nullptr) a.first_out[i] = product(a.shares[i], first);
    if (a.second_out != nullptr) a.second_out[i] = product(a.shares[i], second);
  }
}

}  // namespace

void loss_backward_cuda(uint64_t grad_loss, uint64_t divisor, uint64_t grad, uint64_t out,
                        uint64_t shares, double first_coef, uint64_t first_out, double second_coef,
                        uint64_t second_out, int64_t tokens, bool fp64, int device,
                        uint64_t stream) {
  if (tokens == 0) return;
  const DeviceGuard guard(device, "loss_backward");
  constexpr int64_t kShare = kThreads * kItems;
  const int64_t blocks = std::min(kBackwardBlocks, (tokens + kShare - 1) / kShare);
  auto run = [&](auto zero) {
    using F = decltype(zero);
    launch("loss_backward", loss_backward_kernel<F>, blocks, kThreads, 1, stream,
           Arguments<F>{pointer<const F>(grad_loss), pointer<const F>(divisor),
                        pointer<const F>(grad), pointer<const F>(shares), pointer<F>(out),
                        pointer<F>(first_out), pointer<F>(second_out), F(first_coef),
                        F(second_coef), tokens});
  };
  fp64 ? run(double{}) : run(float{});
}

}  // namespace rlhf
