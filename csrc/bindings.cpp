// rlhf_fast._C: tensors arrive as data pointers and strides in elements; Python has checked them.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cstdint>

namespace rlhf {
void gae_forward(uint64_t rewards, int64_t rewards_stride, uint64_t values, int64_t values_stride,
                 uint64_t mask, int64_t mask_stride, uint64_t gamma, double gamma_value,
                 uint64_t lam, double lam_value, uint64_t bootstrap, uint64_t cu_seqlens,
                 uint64_t advantages, uint64_t returns, int64_t sequences, int64_t length,
                 bool fp64, int threads);
void gae_backward(uint64_t grad_advantages, int64_t grad_advantages_stride, uint64_t grad_returns,
                  int64_t grad_returns_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                  double gamma_value, uint64_t lam, double lam_value, uint64_t cu_seqlens,
                  uint64_t grad_rewards, uint64_t grad_values, uint64_t grad_bootstrap,
                  int64_t sequences, int64_t length, bool fp64, int threads);
void ppo_advantages_forward(
    uint64_t scores, uint64_t logprobs, int64_t logprobs_stride, uint64_t ref_logprobs,
    int64_t ref_logprobs_stride, uint64_t values, int64_t values_stride, uint64_t mask,
    int64_t mask_stride, uint64_t gamma, double gamma_value, uint64_t lam, double lam_value,
    uint64_t value_lam, double value_lam_value, double adaptive_lam, double kl_coef,
    uint64_t finished, double missing_eos_penalty, uint64_t cu_seqlens, uint64_t advantages,
    uint64_t returns, uint64_t rewards, uint64_t moments, bool with_moments, int64_t sequences,
    int64_t length, bool fp64, int threads);
void ppo_advantages_whiten(uint64_t advantages, uint64_t mask, int64_t mask_stride,
                           uint64_t moments, int64_t rows, int64_t length, bool fp64, int threads);
void token_logprobs_forward(uint64_t logits, int64_t inner, int64_t outer_stride,
                            int64_t inner_stride, int dtype, uint64_t tokens,
                            uint64_t row_temperature, double temperature, double softcap,
                            double logit_scale, int64_t ignore_index, int64_t first_column,
                            uint64_t carry, uint64_t logprobs, uint64_t entropy, uint64_t stats,
                            int64_t rows, int64_t columns, int threads);
void token_logprobs_backward(uint64_t logits, int64_t inner, int64_t outer_stride,
                             int64_t inner_stride, int dtype, uint64_t tokens, uint64_t stats,
                             uint64_t grad_logprobs, uint64_t grad_entropy,
                             uint64_t row_temperature, double temperature, double softcap,
                             double logit_scale, int64_t ignore_index, int64_t first_column,
                             uint64_t index, uint64_t out, int64_t out_inner,
                             int64_t out_outer_stride, int64_t out_inner_stride, int out_dtype,
                             int64_t rows, int64_t columns, int threads);
void full_kl_forward(uint64_t logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                     uint64_t ref_logits, int64_t ref_inner, int64_t ref_outer_stride,
                     int64_t ref_inner_stride, int dtype, uint64_t row_temperature,
                     double temperature, double softcap, double logit_scale, uint64_t carry,
                     uint64_t kl, uint64_t stats, int64_t rows, int64_t columns, int threads);
void full_kl_backward(uint64_t logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                      uint64_t ref_logits, int64_t ref_inner, int64_t ref_outer_stride,
                      int64_t ref_inner_stride, int dtype, uint64_t stats, uint64_t grad_kl,
                      uint64_t row_temperature, double temperature, double softcap,
                      double logit_scale, uint64_t index, uint64_t out, int64_t out_inner,
                      int64_t out_outer_stride, int64_t out_inner_stride, uint64_t ref_out,
                      int64_t ref_out_inner, int64_t ref_out_outer_stride,
                      int64_t ref_out_inner_stride, int out_dtype, int64_t rows, int64_t columns,
                      int threads);

void policy_loss_forward(uint64_t logprobs, int64_t logprobs_stride, uint64_t old_logprobs,
                         int64_t old_stride, uint64_t advantages, int64_t advantages_stride,
                         bool one_advantage, uint64_t mask, int64_t mask_stride, uint64_t weights,
                         int64_t weights_stride, bool one_weight, uint64_t entropy,
                         int64_t entropy_stride, uint64_t ref_logprobs, int64_t ref_stride,
                         uint64_t kl, int64_t kl_stride, uint64_t cu_seqlens, uint64_t normalizer,
                         double normalizer_value, int ratio, int aggregation, double lower,
                         double upper, double dual_clip, int kl_kind, bool kl_unbiased_gradient,
                         double entropy_coef, double kl_coef, uint64_t loss, uint64_t values,
                         uint64_t grad, uint64_t shares, int64_t sequences, int64_t length,
                         bool fp64, int threads);
void value_loss_forward(uint64_t values, int64_t values_stride, uint64_t old_values,
                        int64_t old_stride, uint64_t returns, int64_t returns_stride,
                        uint64_t mask, int64_t mask_stride, uint64_t normalizer,
                        double normalizer_value, double clip, uint64_t loss, uint64_t out,
                        uint64_t grad, int64_t sequences, int64_t length, bool fp64,
                        int threads);
void loss_backward(uint64_t grad_loss, uint64_t divisor, uint64_t grad, uint64_t out,
                   uint64_t shares, double first_coef, uint64_t first_out, double second_coef,
                   uint64_t second_out, int64_t tokens, bool fp64, int threads);

// Asks for huge pages where whole ones fit: the first touch of a fresh buffer is then a fault per
// 2 MiB instead of one per 4 KiB. A hint; the kernel may refuse it.
void advise_huge_pages([[maybe_unused]] uint64_t address, [[maybe_unused]] uint64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uint64_t kPage = uint64_t(1) << 21;
  const uint64_t begin = (address + kPage - 1) / kPage * kPage;
  const uint64_t end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
}  // namespace rlhf

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("gae_forward", &rlhf::gae_forward, Unlocked());
  m.def("gae_backward", &rlhf::gae_backward, Unlocked());
  m.def("ppo_advantages_forward", &rlhf::ppo_advantages_forward, Unlocked());
  m.def("ppo_advantages_whiten", &rlhf::ppo_advantages_whiten, Unlocked());
  m.def("token_logprobs_forward", &rlhf::token_logprobs_forward, Unlocked());
  m.def("token_logprobs_backward", &rlhf::token_logprobs_backward, Unlocked());
  m.def("full_kl_forward", &rlhf::full_kl_forward, Unlocked());
  m.def("full_kl_backward", &rlhf::full_kl_backward, Unlocked());
  m.def("policy_loss_forward", &rlhf::policy_loss_forward, Unlocked());
  m.def("value_loss_forward", &rlhf::value_loss_forward, Unlocked());
  m.def("loss_backward", &rlhf::loss_backward, Unlocked());
  m.def("advise_huge_pages", &rlhf::advise_huge_pages);
}
