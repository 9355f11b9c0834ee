"""Launchers of csrc/value_loss.{cpp,cu}, as `torch.ops.rlhf_fast.value_loss_*`.

They trust `rlhf_fast.ops.value_loss` for shapes, dtypes and devices. Floating tensors share one
dtype, fp32 or fp64, and with `mask`, bool and True where a token counts, one shape. `grad` is the
gradient but for the divisor, which is the last of `out` [5].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.compiled import _losses, _rows
from rlhf_fast.kernels._schemas import SCHEMAS

_OUT = 5


def _forward(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    normalizer_value: float,
    clip: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake_forward(
        values, old_values, returns, mask, normalizer, normalizer_value, clip, with_grad
    )
    if values.dim() == 2:
        values, old_values, returns, mask = map(
            _rows.unit_stride, (values, old_values, returns, mask)
        )
    else:
        values, old_values, returns, mask = (
            x.reshape(1, -1).contiguous() for x in (values, old_values, returns, mask)
        )
    scratch = _losses.scratch(values)
    _rows.module(values).value_loss_forward(
        *_rows.token_rows(values),
        *_rows.token_rows(old_values),
        *_rows.token_rows(returns),
        *_rows.token_rows(mask),
        _rows.address(normalizer),
        normalizer_value,
        clip,
        *map(_rows.address, outputs),
        *values.shape,
        values.dtype == torch.float64,
        *map(_rows.address, scratch),
        *_rows.runner(values),
    )
    return outputs


def _backward(grad_loss: Tensor, out: Tensor, grad: Tensor) -> Tensor:
    grad_values = torch.empty_like(grad)
    _losses.scale(grad_loss, out[-1], grad, grad_values)
    return grad_values


def _fake_forward(values: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    (grad,) = _losses.outputs(values, others[-1])
    return values.new_empty(()), values.new_empty(_OUT), grad


forward = _rows.register(
    "value_loss_forward",
    SCHEMAS["value_loss_forward"],
    _forward,
    _fake_forward,
)
backward = _rows.register(
    "value_loss_backward",
    SCHEMAS["value_loss_backward"],
    _backward,
    lambda grad_loss, out, grad: torch.empty_like(grad),
)
