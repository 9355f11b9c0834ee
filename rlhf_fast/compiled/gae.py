"""Launchers of csrc/gae.cpp and csrc/gae.cu, registered as `torch.ops.rlhf_fast.gae_*`.

They trust `rlhf_fast.ops.gae` for shapes, dtypes and devices. `rewards`, `values`, `mask` are
[B, T], or [N] with `cu_seqlens` [B + 1] int32; `gamma`, `lam`, `bootstrap` are [B]. Floating
tensors share one dtype, fp32 or fp64; `mask` is bool and True where a token counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.compiled._rows import address, contiguous, module, register, runner


def _forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rewards, values, mask = map(_unit_stride, (rewards, values, mask))
    gamma, lam, bootstrap, cu_seqlens = map(contiguous, (gamma, lam, bootstrap, cu_seqlens))
    advantages, returns = _outputs(rewards, cu_seqlens)
    module(rewards).gae_forward(
        *_rows(rewards),
        *_rows(values),
        *_rows(mask),
        *map(address, (gamma, lam, bootstrap, cu_seqlens, advantages, returns)),
        *_sizes(rewards, gamma),
        *runner(rewards),
    )
    return advantages, returns


def _backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_advantages, grad_returns, mask = map(_unit_stride, (grad_advantages, grad_returns, mask))
    gamma, lam, cu_seqlens = map(contiguous, (gamma, lam, cu_seqlens))
    grad_rewards, grad_values = _outputs(grad_advantages, cu_seqlens)
    grad_bootstrap = torch.empty_like(gamma)
    module(gamma).gae_backward(
        *_rows(grad_advantages),
        *_rows(grad_returns),
        *_rows(mask),
        *map(address, (gamma, lam, cu_seqlens, grad_rewards, grad_values, grad_bootstrap)),
        *_sizes(grad_advantages, gamma),
        *runner(gamma),
    )
    return grad_rewards, grad_values, grad_bootstrap


def _unit_stride(x: Any) -> Any:
    """`x` itself if its tokens lie side by side (rows may be anywhere), else a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _outputs(like: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two contiguous outputs; zeroed where a malformed `cu_seqlens` could leave tokens out."""
    unread = cu_seqlens is not None and like.device.type != "cpu"
    allocate = torch.zeros if unread else torch.empty
    first, second = (allocate(like.shape, dtype=like.dtype, device=like.device) for _ in range(2))
    return first, second


def _rows(x: Tensor | None) -> tuple[int, int]:
    """Data pointer (0 for None) and the elements from one row to the next."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _sizes(x: Tensor, gamma: Tensor) -> tuple[int, int, bool]:
    """Sequences, length of the time dimension, and whether the floats are fp64."""
    return gamma.numel(), x.shape[-1], x.dtype == torch.float64


def _fake_forward(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(rewards, None)


def _fake_backward(
    grad_advantages: Tensor, grad_returns: Tensor, mask: Any, gamma: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return *_outputs(grad_advantages, None), torch.empty_like(gamma)


forward = register(
    "gae_forward",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor gamma, Tensor lam, Tensor? bootstrap, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward = register(
    "gae_backward",
    "(Tensor grad_advantages, Tensor grad_returns, Tensor? mask, Tensor gamma, Tensor lam, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
