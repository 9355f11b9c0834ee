"""From scores and log-probs to what PPO trains on: KL reward, GAE, returns, whitening."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops._checks import floating, number, same_shape, stats_dtype
from rlhf_fast.ops._scan_checks import check_coefficients, check_per_sequence
from rlhf_fast.ops._sequences import check_layout, is_last_token, per_token, sequence_sum
from rlhf_fast.ops.gae import gae_reference, split_coefficient
from rlhf_fast.ops.masked import masked_whiten_reference, merge_moments, several_processes


@torch.no_grad()
def ppo_advantages_reference(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    adaptive_lam: float | None = None,
    whiten: bool = True,
    missing_eos_penalty: float | None = None,
    finished: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ppo_advantages` in PyTorch, arguments unchecked: what every backend must compute."""
    dtype = stats_dtype(logprobs.dtype)
    mask = mask != 0
    scores, values = scores.to(dtype), values.to(dtype)
    logprobs = torch.where(mask, logprobs.to(dtype), 0.0)
    if missing_eos_penalty is not None and finished is not None:
        scores = torch.where(finished != 0, scores, scores - missing_eos_penalty)
    rewards = torch.zeros_like(logprobs)
    if ref_logprobs is not None and kl_coef != 0.0:
        log_ratio = logprobs - torch.where(mask, ref_logprobs.to(dtype), 0.0)
        rewards = -kl_coef * log_ratio
    last = is_last_token(mask, cu_seqlens)
    rewards = rewards + torch.where(last, per_token(scores, mask, cu_seqlens), 0.0)
    if adaptive_lam is not None:
        tokens = sequence_sum(mask.to(dtype), cu_seqlens).clamp(min=1)
        lam = (1.0 - 1.0 / (adaptive_lam * tokens)).clamp(min=0.0)

    def estimate(coefficient: float | Tensor) -> tuple[Tensor, Tensor]:
        return gae_reference(
            rewards, values, mask, gamma=gamma, lam=coefficient, cu_seqlens=cu_seqlens
        )

    advantages, returns = estimate(lam)
    if value_lam is not None:
        returns = estimate(value_lam)[1]
    if whiten:
        advantages = masked_whiten_reference(advantages, mask)
    return advantages, returns, rewards


@torch.no_grad()
def _run_kernel(
    impl: Impl,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float | Tensor,
    lam: float | Tensor,
    value_lam: float | Tensor | None,
    adaptive_lam: float | None,
    whiten: bool,
    missing_eos_penalty: float | None,
    finished: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ppo_advantages` of checked arguments: one launch, and one more that whitens."""
    assert impl.forward is not None and impl.backward is not None
    dtype = stats_dtype(logprobs.dtype)
    if kl_coef == 0.0:
        ref_logprobs = None
    if missing_eos_penalty is None:
        finished = None
    mask = mask if mask.dtype == torch.bool else mask != 0
    gammas, gamma_value = split_coefficient(gamma, dtype)
    lams, lam_value = split_coefficient(lam, dtype)
    value_lams, value_lam_value = split_coefficient(-1.0 if value_lam is None else value_lam, dtype)
    advantages, returns, rewards, moments = impl.forward(
        scores.to(dtype),
        logprobs.to(dtype),
        None if ref_logprobs is None else ref_logprobs.to(dtype),
        values.to(dtype),
        mask,
        gammas,
        lams,
        value_lams,
        None if finished is None else finished != 0,
        None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        gamma_value,
        lam_value,
        value_lam_value,
        adaptive_lam or 0.0,
        float(kl_coef),
        float(missing_eos_penalty or 0.0),
        whiten,
    )
    if whiten:
        if several_processes():
            moments = merge_moments(moments)
        impl.backward(advantages, mask, moments)
    return advantages, returns, rewards


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    adaptive_lam: float | None = None,
    whiten: bool = True,
    missing_eos_penalty: float | None = None,
    finished: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rewards, advantages and returns of scored completions.

    The reward of a token is `-kl_coef * (logprobs - ref_logprobs)`, the k1 estimate, the only one
    whose place is the reward; on the last token that counts comes the sequence's score (Ziegler et
    al. 2019, eq. 2; Stiennon et al. 2020). Then `gae`, returns = advantages + values, and, after
    the returns, `masked_whiten` of the advantages over the whole batch of all processes.

    A sequence none of whose tokens count has no token for its score to sit on: it contributes
    nothing. All three results are constants: no gradient flows through them.

    Args:
        scores: `[B]`, one per completion.
        logprobs: `[B, T]`, or packed `[N]` with `cu_seqlens`: the sampled tokens' log-probs under
            the policy that sampled.
        ref_logprobs: the same under the reference; may be None with `kl_coef=0`.
        values: the same shape: the critic's estimates.
        mask: the same shape, any dtype; nonzero where a token counts. Gaps (tool output) are
            carried over. What lies under it touches nothing.
        kl_coef: weight of the KL reward, >= 0; 0 leaves it out.
        gamma: discount in [0, 1], a float or `[B]`.
        lam: GAE's lambda in [0, 1], a float or `[B]`.
        value_lam: lambda of the returns, if it is another one (decoupled GAE: Yuan et al. 2025,
            arXiv:2503.01491, and VAPO, arXiv:2504.05118, with 1); None takes `lam`.
        adaptive_lam: alpha > 0 of the length-adaptive lambda (VAPO, with 0.05): a sequence of n
            tokens that count gets `max(0, 1 - 1 / (alpha n))` for its advantages, in place of
            `lam`; with `value_lam` None its returns too.
        whiten: whether the advantages are whitened; then every process must make the call.
        missing_eos_penalty: *subtracted* from the score of completions that did not finish, as in
            TRL. The code of the 2019 and TL;DR papers *replaces* that score (by -1) instead; for
            that, replace it in `scores` and leave the penalty out.
        finished: `[B]`, nonzero where the completion ended with its end-of-sequence token.
        cu_seqlens: `[B + 1]` int32 offsets of packed sequences, from 0 to N.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        (advantages, returns, rewards), each of the shape of `logprobs`, fp32 (fp64 for fp64
        `logprobs`); exactly 0 where a token does not count.

    Raises:
        TypeError: a tensor's dtype is not as said above.
        ValueError: shapes, devices or options do not fit.
    """
    op = "ppo_advantages"
    floating(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    same_shape(op, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, mask=mask)
    batch = check_layout(op, "logprobs", logprobs, cu_seqlens)
    check_per_sequence(op, batch, logprobs, scores=scores, finished=finished)
    check_coefficients(op, batch, logprobs, gamma=gamma, lam=lam, value_lam=value_lam)
    number(op, "kl_coef", kl_coef, 0.0 <= kl_coef < math.inf, "a finite number >= 0")
    if ref_logprobs is None and kl_coef != 0.0:
        raise ValueError(f"{op}: kl_coef={kl_coef} needs ref_logprobs; pass them, or kl_coef=0")
    if missing_eos_penalty is not None and finished is None:
        raise ValueError(
            f"{op}: missing_eos_penalty={missing_eos_penalty} needs finished [B]: which "
            "completions ended with their end-of-sequence token"
        )
    fits = missing_eos_penalty is None or -math.inf < missing_eos_penalty < math.inf
    number(op, "missing_eos_penalty", missing_eos_penalty, fits, "a finite number, or None")
    fits = adaptive_lam is None or adaptive_lam > 0.0
    number(op, "adaptive_lam", adaptive_lam, fits, "alpha > 0 (VAPO: 0.05), or None")
    impl = resolve(op, logprobs.device, backend, stats_dtype(logprobs.dtype))
    compute = ppo_advantages_reference if impl is None else partial(_run_kernel, impl)
    return compute(
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask,
        kl_coef=kl_coef,
        gamma=gamma,
        lam=lam,
        value_lam=value_lam,
        adaptive_lam=adaptive_lam,
        whiten=whiten,
        missing_eos_penalty=missing_eos_penalty,
        finished=finished,
        cu_seqlens=cu_seqlens,
    )
