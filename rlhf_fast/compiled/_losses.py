"""What the losses' launchers share: where block sums meet on a GPU, and the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.compiled import _rows
from rlhf_fast.kernels._ticket import ticket


def scratch(x: Tensor) -> tuple[Tensor, ...]:
    """On a GPU, where blocks leave their sums, and the ticket that tells the last of them."""
    if not _rows.on_gpu(x):
        return ()
    partial = torch.empty(_rows.module(x).partial_bytes, dtype=torch.uint8, device=x.device)
    return partial, ticket(x.device)


def outputs(like: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    """Contiguous outputs of the shape of `like`, without elements where not wanted."""
    return tuple(
        torch.empty(like.shape if want else (0,), dtype=like.dtype, device=like.device)
        for want in wanted
    )


def scale(
    grad_loss: Tensor,
    divisor: Tensor,
    grad: Tensor,
    out: Tensor | None,
    shares: Tensor | None = None,
    first: tuple[float, Tensor | None] = (0.0, None),
    second: tuple[float, Tensor | None] = (0.0, None),
) -> None:
    """`out = grad * s` and `first = coefficient * shares * s` with `s = grad_loss / divisor`.

    One launch; what is None is left out, and 0 stays 0.
    """
    tokens = max(x.numel() for x in (out, first[1], second[1]) if x is not None)
    if tokens == 0:
        return
    _rows.module(grad).loss_backward(
        *map(_rows.address, (grad_loss, divisor, grad, out, shares)),
        first[0],
        _rows.address(first[1]),
        second[0],
        _rows.address(second[1]),
        tokens,
        grad.dtype == torch.float64,
        *_rows.runner(grad),
    )
