"""Argument checks shared by the public ops: they run before any backend sees a tensor.

Every message says which op and which argument, what was given, and what is expected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def require(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def number(op: str, name: str, value: Any, fits: bool, expected: str) -> None:
    """Raises unless the number `value` fits.

    Only then is there a message: under `torch.compile` a number that varies has no text.
    """
    if not fits:
        raise ValueError(f"{op}: {name}={value}; expected {expected}")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Raises `TypeError` for a tensor that is not of a floating dtype; `None` passes."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; expected a floating dtype")


def integral(op: str, **tensors: Tensor | None) -> None:
    """Raises `TypeError` for a tensor that is not int32 or int64; `None` passes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; expected int64 or int32")


def same_shape(op: str, **tensors: Tensor | None) -> None:
    """Raises unless all given tensors share the first one's shape and device; `None` passes."""
    first, like = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if like is None:
            first, like = name, tensor
            continue
        # Every op comes here: a message that nobody reads would cost more than the check.
        if tensor.shape != like.shape:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, but {first} has "
                f"{list(like.shape)}; they must be equal"
            )
        if tensor.device != like.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, but {first} is on {like.device}; "
                "move them to one device"
            )


def one_of(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    require(
        value in choices,
        f"{op}: {name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}",
    )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an `autograd.Function` that has no second derivative.

    Torch's `once_differentiable` lets a gradient of a gradient through as zero where the upstream
    gradient is a constant; here `create_graph=True` raises.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "this op is differentiable once, so create_graph=True cannot work; take a second "
                "derivative through plain PyTorch"
            )
        with torch.no_grad():
            return backward(ctx, *grads)

    return checked


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are computed and returned in: fp64 for fp64 input, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
