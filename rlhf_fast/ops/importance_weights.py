"""Weights that correct for completions which another engine, or older weights, sampled."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import floating, number, one_of, same_shape, stats_dtype
from rlhf_fast.ops._sequences import check_layout, per_token, sequence_sum
from rlhf_fast.ops._softmax import exp_excess
from rlhf_fast.ops.kl_estimate import HUGE, MAX_LOG_RATIO
from rlhf_fast.ops.masked import global_sum, several_processes

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")


@torch.no_grad()
def importance_weights_reference(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    cu_seqlens: Tensor | None = None,
    across_processes: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`importance_weights` in PyTorch, arguments unchecked: what every backend must compute."""
    dtype = stats_dtype(old_logprobs.dtype)
    mask = mask != 0
    # Infinities become huge: the difference of two is not NaN.
    old, rollout = (x.to(dtype).clamp(-HUGE, HUGE) for x in (old_logprobs, rollout_logprobs))
    difference = torch.where(mask, old - rollout, 0.0)
    log_weight = difference
    if level != "token":
        total = sequence_sum(difference, cu_seqlens)
        if level == "geometric":
            total = total / sequence_sum(mask.to(dtype), cu_seqlens).clamp(min=1)
        log_weight = per_token(total, mask, cu_seqlens)
    raw = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounds = (0.0 if low is None else low, torch.inf if high is None else high)
    outside = mask & ((raw < bounds[0]) | (raw > bounds[1]))
    weights = raw.clamp(*bounds) if mode == "truncate" else torch.where(outside, 0.0, raw)
    weights = torch.where(mask, weights, 0.0)

    apart = difference.abs()
    # The 0 stands in for the largest of no tokens at all.
    largest = torch.cat([apart.flatten(), apart.new_zeros(1)]).amax()
    if across_processes and several_processes():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    summands = (
        torch.ones_like(difference),
        weights,
        weights.square(),
        outside,
        apart,
        apart.clamp(max=MAX_LOG_RATIO).exp(),
        (difference.exp() < 0.9) | (difference.exp() > 1.1),
        exp_excess(-difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)),
    )
    sums = torch.stack([torch.where(mask, x, 0.0).sum(dtype=torch.float64) for x in summands])
    sums = global_sum(sums, across_processes)
    count, total, squares = sums[:3].unbind()
    effective = torch.where(squares > 0, total.square() / (squares * count), 0.0)
    mean, _, share, distance, ratio, tokens, kl = (sums[1:] / count.clamp(min=1)).to(dtype).unbind()
    metrics = {
        "importance_weight_mean": mean,
        "importance_outside": share,
        "importance_effective_samples": effective.to(dtype),
        "mismatch_mean": distance,
        "mismatch_max": largest,
        "mismatch_ratio_mean": ratio,
        "mismatch_tokens": tokens,
        "mismatch_kl_k3": kl,
    }
    return weights, metrics


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    cu_seqlens: Tensor | None = None,
    across_processes: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """How much likelier a token was under the trainer's policy than where it was sampled.

    The policy loss assumes that `old_logprobs` sampled. Where another engine did, or older weights,
    its expectation is over the wrong distribution; multiplied by these weights (its
    `importance_weights`) it is right again, up to what the bounds cut off. A token's weight w is

    - `token`: `exp(old - rollout)`: little variance, ignores that prefixes differ too;
    - `sequence`: the product over the sequence's tokens, the exact weight, of large variance;
    - `geometric`: the sequence's geometric mean.

    `truncate` gives `min(max(w, low), high)` (truncated importance sampling: Ionides 2008; in RL
    with mismatched engines Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", with high = 2), `mask` gives w inside `[low, high]` and 0 outside
    (IcePop, Ling team 2025, at token level; Liu et al. 2025, "When Speed Kills Stability", at
    sequence level).

    A log-weight is bounded to +-20, infinite log-probs are taken as +-1e18, as in `policy_loss`.
    All are constants of a rollout: they are computed once and serve all epochs and micro-batches.

    Args:
        old_logprobs: `[B, T]`, or packed `[N]` with `cu_seqlens`: the trainer's log-probs of the
            sampled tokens, before any update on them; floating.
        rollout_logprobs: the same shape: the log-probs that the engine sampled them with.
        mask: the same shape, any dtype; nonzero where a token counts. Whatever lies under it
            touches nothing.
        level: token, sequence or geometric.
        mode: truncate or mask.
        low: least weight, >= 0; None for no bound.
        high: greatest weight, > 0, at least `low`; None for no bound but exp(20).
        cu_seqlens: `[B + 1]` int32 offsets of packed sequences, from 0 to N.
        across_processes: take the metrics over the tokens of all processes of torch.distributed's
            default group, where there is one; every process must then make the call. Weights are
            the same.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        (weights, metrics): weights of the shape of `old_logprobs`, fp32 (fp64 for fp64), 0 where a
        token does not count, without a gradient; metrics 0-d, over the tokens that count:

        - `importance_weight_mean`, of the weights returned; `importance_outside`, the share whose
          weight the bounds changed; `importance_effective_samples`, `(sum w)^2 / sum w^2` as a
          share of the tokens;
        - `mismatch_mean`, `mismatch_max`: of `|old - rollout|`; `mismatch_ratio_mean`: of its
          exponential; `mismatch_tokens`: share with a ratio outside `[0.9, 1.1]`;
          `mismatch_kl_k3`: estimate of KL(rollout || old).

    Raises:
        TypeError: an input is not floating.
        ValueError: shapes, devices or options do not fit.
    """
    op = "importance_weights"
    floating(op, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    same_shape(op, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    check_layout(op, "old_logprobs", old_logprobs, cu_seqlens)
    one_of(op, "level", level, LEVELS)
    one_of(op, "mode", mode, MODES)
    number(op, "low", low, low is None or low >= 0.0, "a number >= 0, or None")
    fits = high is None or (high > 0.0 and high >= (low or 0.0))
    number(op, "high", high, fits, "a number > 0 that is not below low, or None")
    resolve(op, old_logprobs.device, backend, old_logprobs.dtype)
    return importance_weights_reference(
        old_logprobs,
        rollout_logprobs,
        mask,
        level=level,
        mode=mode,
        low=low,
        high=high,
        cu_seqlens=cu_seqlens,
        across_processes=across_processes,
    )
