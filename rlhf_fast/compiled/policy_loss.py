"""Launchers of csrc/policy_loss.{cpp,cu}, as `torch.ops.rlhf_fast.policy_loss_*`.

They trust `rlhf_fast.ops.policy_loss` for shapes, dtypes and devices. Tokens are [B, T], or [N]
with `cu_seqlens` [B + 1] int32; `advantages` and `importance_weights` may be [B]. Floating tensors
share one dtype, fp32 or fp64; `mask` is bool and True where a token counts. `grad` is the gradient
and `shares` the weight of a token's entropy and KL, both but for the divisor, which is the last of
`values` [10].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.compiled import _losses, _rows
from rlhf_fast.kernels._schemas import SCHEMAS

_VALUES = 10


def _forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    importance_weights: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    normalizer_value: float,
    ratio: int,
    aggregation: int,
    lower: float,
    upper: float,
    dual_clip: float,
    kl_kind: int,
    kl_unbiased_gradient: bool,
    entropy_coef: float,
    kl_coef: float,
    with_grad: bool,
    with_shares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _allocate(logprobs, with_grad, with_shares)
    batch = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    logprobs, old_logprobs, advantages, mask, importance_weights, entropy, ref_logprobs, kl = map(
        _rows.unit_stride,
        (logprobs, old_logprobs, advantages, mask, importance_weights, entropy, ref_logprobs, kl),
    )
    cu_seqlens = _rows.contiguous(cu_seqlens)
    scratch = _losses.scratch(logprobs)
    _rows.module(logprobs).policy_loss_forward(
        *_rows.token_rows(logprobs),
        *_rows.token_rows(old_logprobs),
        *_rows.token_rows(advantages),
        advantages.shape != logprobs.shape,
        *_rows.token_rows(mask),
        *_rows.token_rows(importance_weights),
        importance_weights is not None and importance_weights.shape != logprobs.shape,
        *_rows.token_rows(entropy),
        *_rows.token_rows(ref_logprobs),
        *_rows.token_rows(kl),
        *map(_rows.address, (cu_seqlens, normalizer)),
        normalizer_value,
        ratio,
        aggregation,
        lower,
        upper,
        dual_clip,
        kl_kind,
        kl_unbiased_gradient,
        entropy_coef,
        kl_coef,
        *map(_rows.address, outputs),
        batch,
        logprobs.shape[-1],
        logprobs.dtype == torch.float64,
        *map(_rows.address, scratch),
        *_rows.runner(logprobs),
    )
    return outputs


def _backward(
    grad_loss: Tensor,
    values: Tensor,
    grad: Tensor,
    shares: Tensor,
    entropy_coef: float,
    kl_coef: float,
    for_logprobs: bool,
    for_entropy: bool,
    for_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _fake_backward(
        grad_loss, values, grad, shares, entropy_coef, kl_coef, for_logprobs, for_entropy, for_kl
    )
    _losses.scale(
        grad_loss,
        values[-1],
        grad,
        grads[0],
        shares,
        (-entropy_coef, grads[1]),
        (kl_coef, grads[2]),
    )
    return grads


def _allocate(
    logprobs: Tensor, with_grad: bool, with_shares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, shares = _losses.outputs(logprobs, with_grad, with_shares)
    return logprobs.new_empty(()), logprobs.new_empty(_VALUES), grad, shares


def _fake_forward(logprobs: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(logprobs, *others[-2:])


def _fake_backward(
    grad_loss: Tensor,
    values: Tensor,
    grad: Tensor,
    shares: Tensor,
    entropy_coef: float,
    kl_coef: float,
    for_logprobs: bool,
    for_entropy: bool,
    for_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (grad_logprobs,) = _losses.outputs(grad, for_logprobs)
    grad_entropy, grad_kl = _losses.outputs(shares, for_entropy, for_kl)
    return grad_logprobs, grad_entropy, grad_kl


forward = _rows.register(
    "policy_loss_forward",
    SCHEMAS["policy_loss_forward"],
    _forward,
    _fake_forward,
)
backward = _rows.register(
    "policy_loss_backward",
    SCHEMAS["policy_loss_backward"],
    _backward,
    _fake_backward,
)
