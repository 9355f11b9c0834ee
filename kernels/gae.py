"""Generalised advantage estimation in Triton; rlhf_fast/ops/gae.py derives the recurrences.

One program a sequence. It walks the sequence in blocks, in scan order (last token first in the
forward pass), and scans each block's affine maps x -> b + c x. Block sizes follow from shapes
alone and nothing is atomic, so results are deterministic. Lengths, strides and coefficients are
run-time values: new ones compile nothing.

Legend: B sequences, T tokens of a row, N packed tokens; fp32 or fp64 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._prims import (
    byte_mask,
    flat,
    on_device_of,
    register,
    scan,
    scan_block,
    sequence_of,
    unit_stride,
)
from rlhf_fast.kernels._schemas import SCHEMAS


@triton.jit(do_not_specialize=["first_stride", "second_stride", "mask_stride", "length"])
def _gae_kernel(
    FIRST,  # forward: rewards; backward: upstream gradient of advantages
    SECOND,  # forward: values; backward: upstream gradient of returns
    MASK,
    GAMMA,
    LAM,
    BOOTSTRAP,
    OFFSETS,
    OUT_FIRST,  # forward: advantages; backward: gradient of rewards
    OUT_SECOND,  # forward: returns; backward: gradient of values
    OUT_BOOTSTRAP,
    first_stride,
    second_stride,
    mask_stride,
    length,
    gamma_value: tl.float64,
    lam_value: tl.float64,
    FORWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    row, begin, tokens = sequence_of(OFFSETS, length)
    gamma = tl.full([], gamma_value, FIRST.dtype.element_ty)
    lam = tl.full([], lam_value, FIRST.dtype.element_ty)
    if GAMMA is not None:
        gamma = tl.load(GAMMA + sequence)
    if LAM is not None:
        lam = tl.load(LAM + sequence)
    decay = gamma * lam
    carry = gamma * 0.0
    if BOOTSTRAP is not None:
        carry = gamma * tl.load(BOOTSTRAP + sequence)

    lanes = tl.arange(0, BLOCK)
    start = tl.zeros([], tl.int64)
    while start < tokens:
        i = start + lanes  # position in scan order
        column = begin + (tokens - 1 - i if FORWARD else i)
        inside = i < tokens
        counts = inside
        if MASK is not None:
            counts = inside & (
                tl.load(MASK + row * mask_stride + column, mask=inside, other=0) != 0
            )
        first = tl.load(FIRST + row * first_stride + column, mask=counts, other=0.0)
        second = tl.load(SECOND + row * second_stride + column, mask=counts, other=0.0)

        if FORWARD:
            b = gamma * second + decay * (first - second)
        else:
            b = first + second
        x, carry = scan(b, tl.where(counts, decay, 1.0).to(b.dtype), carry, BLOCK)
        if FORWARD:
            out_first = (first - second) + x
            out_second = out_first + second
        else:
            out_first = first + second + decay * x
            out_second = second - out_first + gamma * x
        out = row * length + column
        tl.store(OUT_FIRST + out, tl.where(counts, out_first, 0.0), mask=inside)
        tl.store(OUT_SECOND + out, tl.where(counts, out_second, 0.0), mask=inside)
        start += BLOCK
    if not FORWARD:
        tl.store(OUT_BOOTSTRAP + sequence, gamma * carry)


def _launch(
    first: Tensor,
    second: Tensor,
    mask: Tensor | None,
    gamma: Tensor | None,
    lam: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    out_bootstrap: Tensor | None,
    numbers: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    sequences = _sequences(first, cu_seqlens)
    # Only a malformed cu_seqlens leaves tokens without any sequence.
    allocate = torch.empty if sequences else torch.zeros
    out_first, out_second = (
        allocate(first.shape, dtype=first.dtype, device=first.device) for _ in range(2)
    )
    if sequences == 0:
        return out_first, out_second
    first, second = unit_stride(first), unit_stride(second)
    mask = None if mask is None else byte_mask(mask)
    block, warps = scan_block(first, sequences)
    with on_device_of(first):
        _gae_kernel[(sequences,)](
            first,
            second,
            mask,
            *map(flat, (gamma, lam, bootstrap, cu_seqlens)),
            out_first,
            out_second,
            out_bootstrap,
            first.stride(0),
            second.stride(0),
            0 if mask is None else mask.stride(0),
            first.shape[-1],
            *numbers,
            FORWARD=out_bootstrap is None,
            BLOCK=block,
            num_warps=warps,
        )
    return out_first, out_second


def _sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


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
    numbers = gamma_value, lam_value
    return _launch(rewards, values, mask, gamma, lam, bootstrap, cu_seqlens, None, numbers)


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
    grads, numbers = (grad_advantages, grad_returns), (gamma_value, lam_value)
    grad_bootstrap = grad_advantages.new_empty(_sequences(grad_advantages, cu_seqlens))
    outputs = _launch(*grads, mask, gamma, lam, None, cu_seqlens, grad_bootstrap, numbers)
    return *outputs, grad_bootstrap


def _fake_forward(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def _fake_backward(
    grad: Tensor, grad_returns: Tensor, mask: Any, gamma: Any, lam: Any, cu_seqlens: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_forward(grad), grad.new_empty(_sequences(grad, cu_seqlens))


# Arguments as in rlhf_fast/compiled/gae.py.
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
