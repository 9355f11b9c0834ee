// rlhf_fast._cuda: as bindings.cpp, with a device index and a stream in place of the threads.
#include <pybind11/pybind11.h>

#include <cstdint>

namespace rlhf {
int64_t gae_scratch_cuda(bool packed, int64_t sequences, int64_t length, bool fp64);
void gae_forward_cuda(uint64_t rewards, int64_t rewards_stride, uint64_t values,
                      int64_t values_stride, uint64_t mask, int64_t mask_stride, uint64_t gamma,
                      double gamma_value, uint64_t lam, double lam_value, uint64_t bootstrap,
                      uint64_t cu_seqlens, uint64_t advantages, uint64_t returns, uint64_t maps,
                      int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream);
void gae_backward_cuda(uint64_t grad_advantages, int64_t grad_advantages_stride,
                       uint64_t grad_returns, int64_t grad_returns_stride, uint64_t mask,
                       int64_t mask_stride, uint64_t gamma, double gamma_value, uint64_t lam,
                       double lam_value, uint64_t cu_seqlens, uint64_t grad_rewards,
                       uint64_t grad_values, uint64_t grad_bootstrap, uint64_t maps,
                       int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream);
void ppo_advantages_forward_cuda(
    uint64_t scores, uint64_t logprobs, int64_t logprobs_stride, uint64_t ref_logprobs,
    int64_t ref_logprobs_stride, uint64_t values, int64_t values_stride, uint64_t mask,
    int64_t mask_stride, uint64_t gamma, double gamma_value, uint64_t lam, double lam_value,
    uint64_t value_lam, double value_lam_value, double adaptive_lam, double kl_coef,
    uint64_t finished, double missing_eos_penalty, uint64_t cu_seqlens, uint64_t advantages,
    uint64_t returns, uint64_t rewards, uint64_t moments, uint64_t partial, uint64_t ticket,
    bool with_moments, int64_t sequences, int64_t length, bool fp64, int device, uint64_t stream);
void ppo_advantages_whiten_cuda(uint64_t advantages, uint64_t mask, int64_t mask_stride,
                                uint64_t moments, int64_t rows, int64_t length, bool fp64,
                                int device, uint64_t stream);
void token_logprobs_forward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                                 int64_t inner_stride, int dtype, uint64_t tokens,
                                 uint64_t row_temperature, double temperature, double softcap,
                                 double logit_scale, int64_t ignore_index, int64_t first_column,
                                 uint64_t carry, uint64_t logprobs, uint64_t entropy,
                                 uint64_t stats, int64_t rows, int64_t columns, int device,
                                 uint64_t stream);
void token_logprobs_backward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                                  int64_t inner_stride, int dtype, uint64_t tokens, uint64_t stats,
                                  uint64_t grad_logprobs, uint64_t grad_entropy,
                                  uint64_t row_temperature, double temperature, double softcap,
                                  double logit_scale, int64_t ignore_index, int64_t first_column,
                                  uint64_t index, uint64_t out, int64_t out_inner,
                                  int64_t out_outer_stride, int64_t out_inner_stride, int out_dtype,
                                  int64_t rows, int64_t columns, int device, uint64_t stream);
void full_kl_forward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                          int64_t inner_stride, uint64_t ref_logits, int64_t ref_inner,
                          int64_t ref_outer_stride, int64_t ref_inner_stride, int dtype,
                          uint64_t row_temperature, double temperature, double softcap,
                          double logit_scale, uint64_t carry, uint64_t kl, uint64_t stats,
                          int64_t rows, int64_t columns, int device, uint64_t stream);
void full_kl_backward_cuda(uint64_t logits, int64_t inner, int64_t outer_stride,
                           int64_t inner_stride, uint64_t ref_logits, int64_t ref_inner,
                           int64_t ref_outer_stride, int64_t ref_inner_stride, int dtype,
                           uint64_t stats, uint64_t grad_kl, uint64_t row_temperature,
                           double temperature, double softcap, double logit_scale, uint64_t index,
                           uint64_t out, int64_t out_inner, int64_t out_outer_stride,
                           int64_t out_inner_stride, uint64_t ref_out, int64_t ref_out_inner,
                           int64_t ref_out_outer_stride, int64_t ref_out_inner_stride,
                           int out_dtype, int64_t rows, int64_t columns, int device,
                           uint64_t stream);
int64_t partial_bytes();
void policy_loss_forward_cuda(
    uint64_t logprobs, int64_t logprobs_stride, uint64_t old_logprobs, int64_t old_stride,
    uint64_t advantages, int64_t advantages_stride, bool one_advantage, uint64_t mask,
    int64_t mask_stride, uint64_t weights, int64_t weights_stride, bool one_weight,
    uint64_t entropy, int64_t entropy_stride, uint64_t ref_logprobs, int64_t ref_stride,
    uint64_t kl, int64_t kl_stride, uint64_t cu_seqlens, uint64_t normalizer,
    double normalizer_value, int ratio, int aggregation, double lower, double upper,
    double dual_clip, int kl_kind, bool kl_unbiased_gradient, double entropy_coef, double kl_coef,
    uint64_t loss, uint64_t values, uint64_t grad, uint64_t shares, int64_t sequences,
    int64_t length, bool fp64, uint64_t partial, uint64_t ticket, int device, uint64_t stream);
void value_loss_forward_cuda(uint64_t values, int64_t values_stride, uint64_t old_values,
                             int64_t old_stride, uint64_t returns, int64_t returns_stride,
                             uint64_t mask, int64_t mask_stride, uint64_t normalizer,
                             double normalizer_value, double clip, uint64_t loss, uint64_t out,
                             uint64_t grad, int64_t sequences, int64_t length, bool fp64,
                             uint64_t partial, uint64_t ticket, int device, uint64_t stream);
void loss_backward_cuda(uint64_t grad_loss, uint64_t divisor, uint64_t grad, uint64_t out,
                        uint64_t shares, double first_coef, uint64_t first_out, double second_coef,
                        uint64_t second_out, int64_t tokens, bool fp64, int device,
                        uint64_t stream);
}  // namespace rlhf

PYBIND11_MODULE(_cuda, m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("architectures") = RLHF_CUDA_ARCHITECTURES;
  m.def("gae_scratch", &rlhf::gae_scratch_cuda);
  m.def("gae_forward", &rlhf::gae_forward_cuda, Unlocked());
  m.def("gae_backward", &rlhf::gae_backward_cuda, Unlocked());
  m.def("ppo_advantages_forward", &rlhf::ppo_advantages_forward_cuda, Unlocked());
  m.def("ppo_advantages_whiten", &rlhf::ppo_advantages_whiten_cuda, Unlocked());
  m.def("token_logprobs_forward", &rlhf::token_logprobs_forward_cuda, Unlocked());
  m.def("token_logprobs_backward", &rlhf::token_logprobs_backward_cuda, Unlocked());
  m.def("full_kl_forward", &rlhf::full_kl_forward_cuda, Unlocked());
  m.def("full_kl_backward", &rlhf::full_kl_backward_cuda, Unlocked());
  m.attr("partial_bytes") = rlhf::partial_bytes();
  m.def("policy_loss_forward", &rlhf::policy_loss_forward_cuda, Unlocked());
  m.def("value_loss_forward", &rlhf::value_loss_forward_cuda, Unlocked());
  m.def("loss_backward", &rlhf::loss_backward_cuda, Unlocked());
}
