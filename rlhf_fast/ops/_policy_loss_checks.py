"""What `policy_loss` asks of its arguments."""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_fast.ops._checks import floating, number, one_of, require, same_shape
from rlhf_fast.ops._policy_loss_kernel import KL_KINDS, RATIOS
from rlhf_fast.ops._reduce import AGGREGATIONS, check_normalizer
from rlhf_fast.ops._sequences import check_layout


def check_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    ratio: str,
    aggregation: str,
    normalizer: float | Tensor | None,
    importance_weights: Tensor | None,
    entropy: Tensor | None,
    entropy_coef: float,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    kl_unbiased_gradient: bool,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises as the docstring of `policy_loss` says."""
    op = "policy_loss"
    floating(
        op,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        importance_weights=importance_weights,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        kl=kl,
    )
    same_shape(
        op,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        kl=kl,
    )
    batch = check_layout(op, "logprobs", logprobs, cu_seqlens)
    for name, tensor in (("advantages", advantages), ("importance_weights", importance_weights)):
        if tensor is None:
            continue
        if tensor.shape not in (logprobs.shape, (batch,)) or tensor.device != logprobs.device:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)} on {tensor.device}; expected "
                f"{list(logprobs.shape)}, or [{batch}] for one per sequence, on {logprobs.device}"
            )
    one_of(op, "ratio", ratio, RATIOS)
    one_of(op, "aggregation", aggregation, AGGREGATIONS)
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        fits = bound is None or bound >= 0.0
        number(op, name, bound, fits, "a number >= 0, or None for no bound")
    fits = dual_clip is None or dual_clip > 1.0
    number(op, "dual_clip", dual_clip, fits, "a number > 1, or None")
    if dual_clip is not None and ratio not in ("token", "sequence"):
        raise ValueError(
            f"{op}: dual_clip={dual_clip} with ratio={ratio!r}, whose loss is not proportional to "
            "a ratio; leave dual_clip out"
        )
    require(
        aggregation != "constant" or normalizer is not None,
        f"{op}: aggregation='constant' divides by a constant of yours; pass it as normalizer, "
        "for instance sequences * maximal length",
    )
    check_normalizer(op, normalizer)
    for name, x in (("entropy_coef", entropy_coef), ("kl_coef", kl_coef)):
        number(op, name, x, -math.inf < x < math.inf, "a finite number")
    if entropy is None and entropy_coef != 0.0:
        raise ValueError(
            f"{op}: entropy_coef={entropy_coef} needs entropy; pass it, or entropy_coef=0"
        )
    _check_kl(op, ref_logprobs, kl, kl_coef, kl_kind, kl_unbiased_gradient)


def _check_kl(
    op: str,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    kl_coef: float,
    kl_kind: str,
    unbiased_gradient: bool,
) -> None:
    require(
        kl_kind != "k1" or unbiased_gradient,
        f"{op}: kl_kind='k1': on-policy the gradient of k1 in the loss is zero in expectation, it "
        "would only add noise; take k2 or kl_unbiased_gradient=True, or put k1 in the reward "
        "(ppo_advantages does)",
    )
    require(
        kl_kind in KL_KINDS,
        f"{op}: kl_kind={kl_kind!r} is unknown; choose one of 'k2', 'k3', or pass any other "
        "per-token KL, such as full_kl's, as kl",
    )
    require(
        ref_logprobs is None or kl is None,
        f"{op}: both ref_logprobs and kl are given; the KL is either estimated from the first or "
        "taken from the second: leave one out",
    )
    if ref_logprobs is None and kl is None and kl_coef != 0.0:
        raise ValueError(
            f"{op}: kl_coef={kl_coef} needs ref_logprobs or kl; pass one, or kl_coef=0"
        )
    require(
        ref_logprobs is not None or not unbiased_gradient,
        f"{op}: kl_unbiased_gradient is of the KL that ref_logprobs estimate; pass ref_logprobs, "
        "or leave it out",
    )
