"""`policy_loss` by a backend's kernels: one launch forward, which finds the gradient, one back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import Impl
from rlhf_fast.ops._checks import differentiable_once, stats_dtype
from rlhf_fast.ops._reduce import AGGREGATIONS, split_normalizer

RATIOS = ("token", "sequence", "none", "cispo")
KL_KINDS = ("k1", "k2", "k3")
METRICS = (
    *("policy_loss", "entropy", "kl_ref", "clip_fraction_low", "clip_fraction_high"),
    *("approx_kl_k1", "approx_kl_k3", "ratio_mean", "ratio_max"),
)
"""What a launcher's `values` [10] hold, in order; the last one is the divisor."""


class _PolicyLoss(torch.autograd.Function):
    """Any backend's `policy_loss`; keeps the gradient, but for its divisor, and the values."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: Impl,
        logprobs: Tensor,
        entropy: Tensor | None,
        kl: Tensor | None,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        importance_weights: Tensor | None,
        ref_logprobs: Tensor | None,
        cu_seqlens: Tensor | None,
        normalizer: Tensor | None,
        options: tuple[Any, ...],
        coefficients: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        assert impl.forward is not None
        needs = ctx.needs_input_grad[1:4]
        loss, values, grad, shares = impl.forward(
            logprobs, old_logprobs, advantages, mask, importance_weights, entropy, ref_logprobs,
            kl, cu_seqlens, normalizer, *options, *coefficients, needs[0], needs[1] or needs[2],
        )  # fmt: skip
        ctx.save_for_backward(values, grad, shares)
        ctx.impl, ctx.needs, ctx.coefficients = impl, needs, coefficients
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)  # zeros for `values` would be a launch of their own
        return loss, values

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad_loss is None:
            return (None,) * 13
        values, grad, shares = ctx.saved_tensors
        grads = ctx.impl.backward(grad_loss, values, grad, shares, *ctx.coefficients, *ctx.needs)
        kept = (g if needed else None for g, needed in zip(grads, ctx.needs, strict=True))
        return None, *kept, *[None] * 9


def run_kernel(
    impl: Impl,
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of checked arguments through the launchers of `impl`."""
    dtype = stats_dtype(logprobs.dtype)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype)

    divisor, divisor_value = split_normalizer(normalizer, dtype, logprobs.device)
    options = (
        divisor_value,
        RATIOS.index(ratio),
        AGGREGATIONS.index(aggregation),
        0.0 if clip_low is None else 1.0 - clip_low,
        math.inf if clip_high is None else 1.0 + clip_high,
        math.inf if dual_clip is None else float(dual_clip),
        KL_KINDS.index(kl_kind),
        kl_unbiased_gradient,
    )
    # What has no weight in the loss is measured, and has no gradient, not one of zeros.
    if entropy is not None and entropy_coef == 0.0:
        entropy = entropy.detach()
    if kl is not None and kl_coef == 0.0:
        kl = kl.detach()
    loss, values = _PolicyLoss.apply(
        impl,
        logprobs.to(dtype),
        None if entropy is None else entropy.to(dtype),
        None if kl is None else kl.to(dtype),
        constant(old_logprobs),
        constant(advantages),
        mask if mask.dtype == torch.bool else mask != 0,
        constant(importance_weights),
        constant(ref_logprobs),
        None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        divisor,
        options,
        (float(entropy_coef), float(kl_coef)),
    )
    metrics = dict(zip(METRICS, values.unbind(), strict=False))
    if entropy is None:
        del metrics["entropy"]
    if ref_logprobs is None and kl is None:
        del metrics["kl_ref"]
    return loss, metrics
