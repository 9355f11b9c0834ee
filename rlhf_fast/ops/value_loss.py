"""The critic's squared error, clipped around its earlier estimate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops._checks import (
    differentiable_once,
    floating,
    number,
    same_shape,
    stats_dtype,
)
from rlhf_fast.ops._reduce import aggregate, check_normalizer, split_normalizer
from rlhf_fast.ops.masked import masked_var_reference

METRICS = ("value_clip_fraction", "explained_variance", "value_mean", "return_mean")
"""What a launcher's `out` [5] holds, in order; the last one is the divisor."""


def value_loss_reference(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`value_loss` in PyTorch, arguments unchecked: what every backend must compute."""
    dtype = stats_dtype(values.dtype)
    mask = mask != 0
    value, old, target = (
        torch.where(mask, x.to(dtype), 0.0) for x in (values, old_values.detach(), returns.detach())
    )

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, mask, normalizer=normalizer)

    error = (value - target).square()
    bounded = value if clip is None else value.clamp(old - clip, old + clip)
    clipped = (bounded - target).square()
    loss = 0.5 * mean(torch.maximum(error, clipped))

    with torch.no_grad():
        spread = masked_var_reference(target, mask)
        unexplained = masked_var_reference(target - value, mask)
        explained = torch.where(spread > 0, 1.0 - unexplained / spread, 0.0)
        metrics = {
            "value_clip_fraction": mean((clipped > error).to(dtype)),
            # Times this batch's share of the normaliser, 1 without one.
            "explained_variance": explained * mean(mask.to(dtype)),
            "value_mean": mean(value),
            "return_mean": mean(target),
        }
    return loss, metrics


class _ValueLoss(torch.autograd.Function):
    """Any backend's `value_loss`; keeps the gradient, but for its divisor, and the statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: Impl,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        mask: Tensor,
        normalizer: Tensor | None,
        normalizer_value: float,
        clip: float,
    ) -> tuple[Tensor, Tensor]:
        assert impl.forward is not None
        loss, out, grad = impl.forward(
            values,
            old_values,
            returns,
            mask,
            normalizer,
            normalizer_value,
            clip,
            ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(out, grad)
        ctx.impl = impl
        ctx.mark_non_differentiable(out)
        ctx.set_materialize_grads(False)  # zeros for `out` would be a launch of their own
        return loss, out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad_loss is None:
            return (None,) * 8
        out, grad = ctx.saved_tensors
        return None, ctx.impl.backward(grad_loss, out, grad), *[None] * 6


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic, averaged over the tokens that count.

    A token's loss is `0.5 * max((v - R)^2, (clip(v, old - c, old + c) - R)^2)` (Schulman et al.'s
    PPO code, and Ziegler et al. 2019): a value that ran further than `c` from its earlier estimate,
    and toward the return, gets no gradient. Gradients reach `values` only; if no token counts, the
    loss is a differentiable 0.

    Args:
        values: any shape, floating: the critic's estimates now.
        old_values: same shape: the estimates when the advantages were computed.
        returns: same shape: the targets.
        mask: same shape, any dtype; nonzero where a token counts. Whatever lies under it (NaN, inf)
            touches neither value nor gradient.
        clip: c >= 0, in units of the reward; None for the plain squared error.
        normalizer: divisor to use instead of the number of tokens at hand, a number > 0 or a 0-d
            tensor: with the whole batch's count the losses of its micro-batches add up. A tensor
            of 0 stands for 1.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        (loss, metrics), fp32 (fp64 for fp64 `values`), 0-d; the metrics are detached:

        - `value_clip_fraction`: tokens whose loss the clipping decides;
        - `explained_variance`: `1 - var(returns - values) / var(returns)` of the *new* values,
          unbiased; 0 where the returns do not vary;
        - `value_mean`, `return_mean`.

        With `normalizer` they add up over micro-batches, `explained_variance` to the mean of the
        micro-batches' own, weighted by their tokens: that is not the whole batch's.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit.
    """
    op = "value_loss"
    floating(op, values=values, old_values=old_values, returns=returns)
    same_shape(op, values=values, old_values=old_values, returns=returns, mask=mask)
    number(op, "clip", clip, clip is None or clip >= 0.0, "a number >= 0, or None")
    check_normalizer(op, normalizer)
    dtype = stats_dtype(values.dtype)
    impl = resolve(op, values.device, backend, dtype)
    if impl is None:
        return value_loss_reference(
            values, old_values, returns, mask, clip=clip, normalizer=normalizer
        )
    loss, out = _ValueLoss.apply(
        impl,
        values.to(dtype),
        old_values.detach().to(dtype),
        returns.detach().to(dtype),
        mask if mask.dtype == torch.bool else mask != 0,
        *split_normalizer(normalizer, dtype, values.device),
        math.inf if clip is None else float(clip),
    )
    return loss, dict(zip(METRICS, out.unbind(), strict=False))
