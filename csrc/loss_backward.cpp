// The gradients of a loss that its forward pass found but for what comes from above, on the CPU.
#include <algorithm>

#include "common.h"

namespace rlhf {
namespace {

// Tokens that keep a thread busy for much longer than it takes to wake it.
constexpr int64_t kGrain = 65536, kChunk = 16384;

// 0 stays 0, whatever the factor is.
template <typename F>
RLHF_INLINE void scale(const F* from, int64_t n, F factor, F* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] == 0 ? F(0) : from[i] * factor;
}

// target_clones does not take templates, hence functions per dtype.
RLHF_CLONES void scale_chunk(const float* from, int64_t n, float factor, float* to) {
  scale(from, n, factor, to);
}
RLHF_CLONES void scale_chunk(const double* from, int64_t n, double factor, double* to) {
  scale(from, n, factor, to);
}

template <typename F>
void scale_all(uint64_t from, int64_t tokens, F factor, uint64_t to, int threads) {
  if (to == 0) return;
  threads = threads_for(tokens, kGrain, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t begin = 0; begin < tokens; begin += kChunk)
    scale_chunk(reinterpret_cast<const F*>(from) + begin, std::min(kChunk, tokens - begin), factor,
                reinterpret_cast<F*>(to) + begin);
}

}  // namespace

void loss_backward(uint64_t grad_loss, uint64_t divisor, uint64_t grad, uint64_t out,
                   uint64_t shares, double first_coef, uint64_t first_out, double second_coef,
                   uint64_t second_out, int64_t tokens, bool fp64, int threads) {
  auto run = [&](auto zero) {
    using F = decltype(zero);
    const F factor =
        *reinterpret_cast<const F*>(grad_loss) / *reinterpret_cast<const F*>(divisor);
    // No coefficient, no gradient, though the factor be infinite.
    const F first = first_coef == 0 ? F(0) : F(first_coef) * factor;
    const F second = second_coef == 0 ? F(0) : F(second_coef) * factor;
    scale_all(grad, tokens, factor, out, threads);
    scale_all(shares, tokens, first, first_out, threads);
    scale_all(shares, tokens, second, second_out, threads);
  };
  fp64 ? run(double{}) : run(float{});
}

}  // namespace rlhf
