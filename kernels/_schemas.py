"""Signatures of the launchers, one for all backends: what `torch.library` is told of them."""

from __future__ import annotations

SCHEMAS = {
    "gae_forward": (
        "(Tensor rewards, Tensor values, Tensor? mask, Tensor? gamma, Tensor? lam, Tensor? "
        "bootstrap, Tensor? cu_seqlens, float gamma_value, float lam_value) -> (Tensor, Tensor)"
    ),
    "gae_backward": (
        "(Tensor grad_advantages, Tensor grad_returns, Tensor? mask, Tensor? gamma, Tensor? lam, "
        "Tensor? cu_seqlens, float gamma_value, float lam_value) -> (Tensor, Tensor, Tensor)"
    ),
    "policy_loss_forward": (
        "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? "
        "importance_weights, Tensor? entropy, Tensor? ref_logprobs, Tensor? kl, Tensor? "
        "cu_seqlens, Tensor? normalizer, float normalizer_value, int ratio, int aggregation, "
        "float lower, float upper, float dual_clip, int kl_kind, bool kl_unbiased_gradient, float "
        "entropy_coef, float kl_coef, bool with_grad, bool with_shares) -> (Tensor, Tensor, "
        "Tensor, Tensor)"
    ),
    "policy_loss_backward": (
        "(Tensor grad_loss, Tensor values, Tensor grad, Tensor shares, float entropy_coef, float "
        "kl_coef, bool for_logprobs, bool for_entropy, bool for_kl) -> (Tensor, Tensor, Tensor)"
    ),
    "value_loss_forward": (
        "(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? normalizer, "
        "float normalizer_value, float clip, bool with_grad) -> (Tensor, Tensor, Tensor)"
    ),
    "value_loss_backward": ("(Tensor grad_loss, Tensor out, Tensor grad) -> Tensor"),
    "ppo_advantages_forward": (
        "(Tensor scores, Tensor logprobs, Tensor? ref_logprobs, Tensor values, Tensor mask, "
        "Tensor? gamma, Tensor? lam, Tensor? value_lam, Tensor? finished, Tensor? cu_seqlens, "
        "float gamma_value, float lam_value, float value_lam_value, float adaptive_lam, float "
        "kl_coef, float missing_eos_penalty, bool with_moments) -> (Tensor, Tensor, Tensor, "
        "Tensor)"
    ),
    "ppo_advantages_whiten": ("(Tensor(a!) advantages, Tensor mask, Tensor moments) -> ()"),
}
