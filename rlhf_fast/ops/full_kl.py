"""Exact KL(policy || reference) of each token, from the logits of both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import differentiable_once, floating, require, same_shape, stats_dtype
from rlhf_fast.ops._softmax import (
    RowStatistics,
    check_scaling,
    exp_excess,
    row_statistics,
    scaled_logits,
    unscale_gradient,
)


def _ratio_terms(
    z: Tensor, z_stats: RowStatistics, r: Tensor, r_stats: RowStatistics
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities p and q, log-ratio u = log p - log q (0 where p is 0), and where |u| < 1.

    u is the difference of the two rows' gaps less that of their normalisers: equal rows give
    exactly 0, and a common offset of the logits never enters.
    """
    z_gap, r_gap = z - z_stats.top, r - r_stats.top
    shift = z_stats.log_normalizer - r_stats.log_normalizer
    possible = z > -math.inf
    u = torch.where(possible, z_gap - r_gap - shift, 0.0)
    p = z_gap.exp().div_(1.0 + z_stats.others)
    q = r_gap.exp().div_(1.0 + r_stats.others)
    return p, q, u, possible & (u.abs() < 1.0)


class _FullKL(torch.autograd.Function):
    """KL as a sum of terms that are all >= 0: p u - p + q, since p and q both sum to 1.

    Where |u| < 1 a term is p (exp(-u) - 1 + u), so nothing cancels when p is close to q; an error
    in the normalisers enters only squared. Gradients: p (u - KL) for z, and q - p for r.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        temperature: float | Tensor,
        softcap: float | None,
    ) -> Tensor:
        dtype = stats_dtype(torch.promote_types(logits.dtype, ref_logits.dtype))
        z = scaled_logits(logits, temperature, softcap, dtype)
        r = scaled_logits(ref_logits, temperature, softcap, dtype)
        z_stats, r_stats = row_statistics(z), row_statistics(r)
        p, q, u, near = _ratio_terms(z, z_stats, r, r_stats)
        terms = torch.where(near, p * exp_excess(u), p * (u - 1.0) + q)
        infinite = ((r == -math.inf) & (z > -math.inf)).any(dim=-1)
        kl = terms.sum(dim=-1).masked_fill_(infinite, math.inf)
        ctx.save_for_backward(logits, ref_logits, kl, *z_stats, *r_stats)
        ctx.temperature, ctx.softcap = temperature, softcap
        return kl.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        logits, ref_logits, kl, *saved = ctx.saved_tensors
        z_stats, r_stats = RowStatistics(*saved[:3]), RowStatistics(*saved[3:])
        z = scaled_logits(logits, ctx.temperature, ctx.softcap, kl.dtype)
        r = scaled_logits(ref_logits, ctx.temperature, ctx.softcap, kl.dtype)
        p, q, u, near = _ratio_terms(z, z_stats, r, r_stats)
        upstream, kl = grad_kl.unsqueeze(-1), kl.unsqueeze(-1)
        infinite = kl == math.inf
        grads: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            grad = (p * (u - kl)).mul_(upstream).masked_fill_(infinite, 0.0)
            grads[0] = unscale_gradient(grad, logits, ctx.temperature, ctx.softcap)
        if ctx.needs_input_grad[1]:
            grad = torch.where(near, p * u.neg().expm1(), q - p)
            grad = grad.mul_(upstream).masked_fill_(infinite, 0.0)
            grads[1] = unscale_gradient(grad, ref_logits, ctx.temperature, ctx.softcap)
        return grads[0], grads[1], None, None


def full_kl_reference(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`full_kl` in PyTorch, arguments unchecked; `softcap` caps the logits of both sides first."""
    kl: Tensor = _FullKL.apply(logits, ref_logits, temperature, softcap)
    return kl


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Exact KL(policy || reference) over the vocabulary, in nats, one number per row.

    `sum_j p_j (log p_j - log q_j)` with `p = softmax(logits / temperature)` and
    `q = softmax(ref_logits / temperature)`. Differentiable in both, once. Precise where p is close
    to q (equal logits give exactly 0) and where both are peaked; never negative.

    A token ruled out by the policy (logit -inf) adds nothing. One that the policy allows and the
    reference rules out makes the row +inf; such a row passes on no gradient. A policy row that is
    all -inf has no distribution and gives NaN.

    Args:
        logits: `[..., V]` of the policy, any floating dtype and strides.
        ref_logits: `[..., V]` of the reference; the dtype may differ.
        temperature: a number > 0, or a tensor that broadcasts to the rows `[...]`; a constant.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        `[...]` in fp32 (fp64 if one input is fp64).

    Raises:
        TypeError: an input is not floating.
        ValueError: shapes, devices or the temperature do not fit.
    """
    op = "full_kl"
    floating(op, logits=logits, ref_logits=ref_logits)
    same_shape(op, logits=logits, ref_logits=ref_logits)
    require(
        logits.ndim > 0 and logits.shape[-1] > 0,
        f"{op}: logits has shape {list(logits.shape)}; expected [..., V] with V > 0",
    )
    check_scaling(op, temperature, None, logits.shape[:-1], logits.device)
    resolve(op, logits.device, backend, logits.dtype)
    return full_kl_reference(logits, ref_logits, temperature=temperature)
