"""Launchers of csrc/gae.cpp and csrc/gae.cu, registered as `torch.ops.rlhf_fast.gae_*`.

They trust `rlhf_fast.ops.gae` for shapes, dtypes and devices. `rewards`, `values`, `mask` are
[B, T], or [N] with `cu_seqlens` [B + 1] int32; `gamma`, `lam`, `bootstrap` are [B], and where
`gamma` or `lam` is None a number stands for all. Floating tensors share one dtype, fp32 or fp64;
`mask` is bool and True where a token counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.compiled import _rows
from rlhf_fast.compiled._rows import (
    address,
    contiguous,
    register,
    sequences,
    token_rows,
    unit_stride,
    unwritten,
)
from rlhf_fast.kernels._schemas import SCHEMAS


def _forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: Tensor | None,
    lam: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma_value: float,
    lam_value: float,
) -> tuple[Tensor, Tensor]:
    rewards, values, mask = map(unit_stride, (rewards, values, mask))
    gamma, lam, bootstrap, cu_seqlens = map(contiguous, (gamma, lam, bootstrap, cu_seqlens))
    advantages, returns = unwritten(2, rewards, cu_seqlens)
    maps, sizes = _maps_and_sizes(rewards, cu_seqlens)
    _rows.module(rewards).gae_forward(
        *token_rows(rewards),
        *token_rows(values),
        *token_rows(mask),
        *(address(gamma), gamma_value, address(lam), lam_value),
        *map(address, (bootstrap, cu_seqlens, advantages, returns, *maps)),
        *sizes,
        *_rows.runner(rewards),
    )
    return advantages, returns


def _backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor | None,
    gamma: Tensor | None,
    lam: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma_value: float,
    lam_value: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_advantages, grad_returns, mask = map(unit_stride, (grad_advantages, grad_returns, mask))
    gamma, lam, cu_seqlens = map(contiguous, (gamma, lam, cu_seqlens))
    grad_rewards, grad_values = unwritten(2, grad_advantages, cu_seqlens)
    grad_bootstrap = grad_advantages.new_empty(sequences(grad_advantages, cu_seqlens))
    maps, sizes = _maps_and_sizes(grad_advantages, cu_seqlens)
    _rows.module(grad_advantages).gae_backward(
        *token_rows(grad_advantages),
        *token_rows(grad_returns),
        *token_rows(mask),
        *(address(gamma), gamma_value, address(lam), lam_value),
        *map(address, (cu_seqlens, grad_rewards, grad_values, grad_bootstrap, *maps)),
        *sizes,
        *_rows.runner(grad_advantages),
    )
    return grad_rewards, grad_values, grad_bootstrap


def _maps_and_sizes(
    x: Tensor, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, int, bool]]:
    """Sequences, length of the time dimension, whether the floats are fp64; and on a GPU memory
    for the maps of the chunks into which long sequences are cut."""
    sizes = (sequences(x, cu_seqlens), x.shape[-1], x.dtype == torch.float64)
    if not _rows.on_gpu(x):
        return (), sizes
    return (x.new_empty(_rows.module(x).gae_scratch(cu_seqlens is not None, *sizes)),), sizes


def _fake_forward(rewards: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return unwritten(2, rewards)


def _fake_backward(
    grad_advantages: Tensor, grad_returns: Tensor, mask: Any, gamma: Any, lam: Any, cu: Any, *_: Any
) -> tuple[Tensor, ...]:
    bootstraps = sequences(grad_advantages, cu)
    return *unwritten(2, grad_advantages), grad_advantages.new_empty(bootstraps)


forward = register(
    "gae_forward",
    SCHEMAS["gae_forward"],
    _forward,
    _fake_forward,
)
backward = register(
    "gae_backward",
    SCHEMAS["gae_backward"],
    _backward,
    _fake_backward,
)
