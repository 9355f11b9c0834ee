"""The policy-gradient losses of PPO and its family, with the statistics one watches."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import stats_dtype
from rlhf_fast.ops._policy_loss_checks import check_policy_loss
from rlhf_fast.ops._policy_loss_kernel import run_kernel
from rlhf_fast.ops._reduce import aggregate
from rlhf_fast.ops._sequences import per_token, sequence_sum
from rlhf_fast.ops._softmax import exp_excess
from rlhf_fast.ops.kl_estimate import HUGE, MAX_LOG_RATIO, kl_estimate_reference


def policy_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k2",
    kl_unbiased_gradient: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` in PyTorch, arguments unchecked: what every backend must compute."""
    dtype = stats_dtype(logprobs.dtype)
    mask = mask != 0

    def counted(x: Tensor) -> Tensor:
        """`x` in every token that counts, one value a token; 0 elsewhere, whatever was there.

        Infinities become huge: unlike theirs, its differences, sums and 0-fold are not NaN.
        """
        if x.shape != mask.shape:
            x = per_token(x, mask, cu_seqlens)
        return torch.where(mask, x.to(dtype), 0.0).clamp(-HUGE, HUGE)

    def mean(x: Tensor, how: str = aggregation) -> Tensor:
        return aggregate(torch.where(mask, x, 0.0), mask, how, normalizer, cu_seqlens)

    new, old = counted(logprobs), counted(old_logprobs.detach())
    advantage = counted(advantages.detach())
    log_ratio = new - old
    exponent = log_ratio
    if ratio == "sequence":
        tokens = sequence_sum(mask.to(dtype), cu_seqlens).clamp(min=1)
        of_sequence = sequence_sum(log_ratio.detach(), cu_seqlens) / tokens
        # The sequence's value in each token, with that token's own derivative.
        exponent = per_token(of_sequence, mask, cu_seqlens) + (new - new.detach())
    rho = exponent.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    lower = 0.0 if clip_low is None else 1.0 - clip_low
    upper = math.inf if clip_high is None else 1.0 + clip_high
    clipped = rho.clamp(lower, upper)
    below, above = rho < lower, rho > upper

    if ratio == "none":
        loss = -advantage * new
        below, above = torch.zeros_like(mask), torch.zeros_like(mask)
    elif ratio == "cispo":
        loss = -advantage * clipped.detach() * new
    else:
        loss = torch.maximum(-advantage * rho, -advantage * clipped)
        below, above = below & (advantage < 0), above & (advantage > 0)
        if dual_clip is not None:
            loss = torch.where(advantage < 0, loss.clamp(max=-advantage * dual_clip), loss)
    if importance_weights is not None:
        loss = loss * counted(importance_weights.detach())

    policy = mean(loss)
    total = policy
    terms = {"policy_loss": policy}
    if entropy is not None:
        terms["entropy"] = mean(entropy.to(dtype))
        if entropy_coef != 0.0:
            total = total - entropy_coef * terms["entropy"]
    if ref_logprobs is not None:
        kl = kl_estimate_reference(
            new,
            counted(ref_logprobs.detach()),
            kind=kl_kind,
            old_logprobs=old if kl_unbiased_gradient else None,
            unbiased_gradient=kl_unbiased_gradient,
        )
    if kl is not None:
        terms["kl_ref"] = mean(kl.to(dtype))
        if kl_coef != 0.0:
            total = total + kl_coef * terms["kl_ref"]

    with torch.no_grad():
        # A per-sequence sum of clipped tokens says nothing: statistics are means over its tokens.
        how = "seq-mean-token-mean" if aggregation == "seq-mean-token-sum" else aggregation
        moved = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        metrics = {name: term.detach() for name, term in terms.items()}
        metrics["clip_fraction_low"] = mean(below.to(dtype), how)
        metrics["clip_fraction_high"] = mean(above.to(dtype), how)
        metrics["approx_kl_k1"] = mean(-moved, how)
        metrics["approx_kl_k3"] = mean(exp_excess(-moved), how)
        metrics["ratio_mean"] = mean(rho, how)
        # The 0 stands in for the largest of no tokens at all.
        ratios = torch.where(mask, rho, 0.0).flatten()
        metrics["ratio_max"] = torch.cat([ratios, ratios.new_zeros(1)]).amax()
    return total, metrics


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k2",
    kl_unbiased_gradient: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss over the tokens that count, and its statistics.

    With A the advantage, `rho = exp(logprobs - old_logprobs)` and
    `clip(rho) = min(max(rho, 1 - clip_low), 1 + clip_high)`, a token's loss is, by `ratio`:

    - `token`: `max(-A rho, -A clip(rho))` (PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7;
      unequal bounds: DAPO, Yu et al. 2025, arXiv:2503.14476).
    - `sequence`: the same with the sequence's geometric-mean ratio, `exp(mean of the tokens' log
      rho)`, as the value in each of its tokens and the token's own derivative (the GSPO-token form
      of Zheng et al. 2025, arXiv:2507.18071; with one advantage per sequence and
      `seq-mean-token-mean` it is GSPO in value and gradient).
    - `none`: `-A logprobs` (REINFORCE): nothing is clipped.
    - `cispo`: `-A sg(clip(rho)) logprobs`, sg a constant (CISPO, MiniMax 2025,
      arXiv:2506.13585): no token loses its gradient.

    `dual_clip` = c bounds the loss of tokens with A < 0 by `-A c` (Ye et al. 2020,
    arXiv:1912.09729). `importance_weights` then multiply the token's loss. The result is

        aggregated token loss - entropy_coef * aggregated entropy + kl_coef * aggregated KL,

    all three aggregated alike:

    - `token-mean`: sum over tokens / number of tokens (PPO, DAPO).
    - `seq-mean-token-mean`: mean over sequences of the mean over their tokens (GRPO).
    - `seq-mean-token-sum`: mean over sequences of the sum over their tokens.
    - `constant`: sum over tokens / `normalizer` (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    Sequences without a token that counts are not in any mean; if no token counts at all the loss is
    a differentiable 0. Log-ratios are bounded to +-20 (no gradient beyond) in ratios and in the
    statistics, and log-probs, advantages and weights to +-1e18, infinite ones too, so that a ratio
    is never NaN; a ratio exactly at a bound has its full gradient. Only
    `logprobs`, `entropy` and `kl` get gradients; all else is constant.

    The KL to the reference is `kl_estimate` of `ref_logprobs`; any other, such as the exact one of
    `full_kl`, is given ready-made in `kl`, like `entropy`. On-policy, k2's gradient is that of the
    reverse KL and k3's that of the forward KL; off-policy neither is. `kl_unbiased_gradient=True`
    keeps the value and takes the reverse KL's gradient, corrected for tokens that the old policy
    sampled, in its place. Without it k1 is refused: its gradient, the score function, has
    expectation zero; it belongs in the reward.

    Args:
        logprobs: `[B, T]`, or packed `[N]` with `cu_seqlens`: the tokens' log-probs, floating.
        old_logprobs: the same when they were sampled.
        advantages: the same shape, or `[B]` for one per sequence. In packed form, one per token is
            understood where N = B.
        mask: the same shape, any dtype; nonzero where a token counts. Whatever lies under it (NaN,
            inf) touches neither value nor gradient.
        clip_low: distance of the lower bound from 1; None for no lower bound.
        clip_high: distance of the upper bound from 1; None for no upper bound.
        dual_clip: c > 1, or None; only with the ratios `token` and `sequence`.
        ratio: token, sequence, none or cispo.
        aggregation: one of the four above.
        normalizer: divisor to use instead of the count at hand, a number > 0 or a 0-d tensor. Give
            each micro-batch the whole batch's count (of tokens for token-mean, of sequences with
            tokens for seq-mean-*) and their losses add up to the whole batch's. A tensor of 0
            stands for 1. Required for `constant`.
        importance_weights: same shape as `logprobs`, or `[B]`: constant multipliers of the token's
            policy loss, such as truncated rollout/trainer ratios; 0 drops a token's policy loss,
            not its place in the mean.
        entropy: same shape as `logprobs`, for the bonus and the metric.
        entropy_coef: weight of the entropy bonus.
        ref_logprobs: same shape: the tokens' log-probs under the reference.
        kl: same shape: a KL to the reference per token, instead of `ref_logprobs`.
        kl_coef: weight of the KL.
        kl_kind: k2 or k3, with `kl_unbiased_gradient` also k1; of `ref_logprobs`.
        kl_unbiased_gradient: see `kl_estimate`, with `old_logprobs` as those that sampled.
        cu_seqlens: `[B + 1]` int32 offsets of packed sequences, from 0 to N.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        (loss, metrics), fp32 (fp64 for fp64 `logprobs`), 0-d, on the input's device: nothing waits
        for them. The loss is differentiable once. The metrics are detached:

        - `policy_loss`, `entropy` and `kl_ref` (where given): the terms of the loss;
        - `clip_fraction_low`, `clip_fraction_high`: tokens whose ratio lies beyond the bound and
          whose loss the bound decides (A < 0 low, A > 0 high; with `cispo` any A; `none`: 0);
        - `approx_kl_k1`, `approx_kl_k3`: estimates of KL(old || new), whatever `ratio` is;
        - `ratio_mean`, `ratio_max`: of rho before clipping (`sequence`: of the sequence's).

        All but `ratio_max` are aggregated as the loss is (statistics of `seq-mean-token-sum` as
        `seq-mean-token-mean`) with the same `normalizer`, so they add up over micro-batches;
        `ratio_max` is a maximum. With `constant` they are sums / `normalizer` too: multiply by
        `normalizer` / number of tokens for means over tokens.

    Raises:
        TypeError: a tensor is not floating, or `cu_seqlens` not integral.
        ValueError: shapes, devices or options do not fit.
    """
    check_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio=ratio,
        aggregation=aggregation,
        normalizer=normalizer,
        importance_weights=importance_weights,
        entropy=entropy,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl=kl,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        kl_unbiased_gradient=kl_unbiased_gradient,
        cu_seqlens=cu_seqlens,
    )
    impl = resolve("policy_loss", logprobs.device, backend, stats_dtype(logprobs.dtype))
    compute = policy_loss_reference if impl is None else partial(run_kernel, impl)
    return compute(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio=ratio,
        aggregation=aggregation,
        normalizer=normalizer,
        importance_weights=importance_weights,
        entropy=entropy,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl=kl,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        kl_unbiased_gradient=kl_unbiased_gradient,
        cu_seqlens=cu_seqlens,
    )
