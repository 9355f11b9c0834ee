"""Generalised advantage estimation in Triton; rlhf_fast/ops/gae.py derives the recurrences.

One program a sequence. It walks the sequence in blocks, in scan order (last token first in the
forward pass), and scans each block's affine maps x -> b + c x. Block sizes follow from shapes
alone and nothing is atomic, so results are deterministic. Lengths and strides are run-time values:
a new length compiles nothing.

Legend: B sequences, T tokens of a row, N packed tokens; fp32 or fp64 throughout.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _then(b0, c0, before_b0, before_c0, b1, c1, before_b1, before_c1):
    """Composes two runs of tokens, the second after the first.

    Each is the map of the whole run (b, c) and that of the run without its last token (before_*),
    which gives the carry that reaches a token out of an inclusive scan.
    """
    return b1 + c1 * b0, c1 * c0, before_b1 + before_c1 * b0, before_c1 * c0


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
    FORWARD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(OFFSETS + sequence).to(tl.int64), 0), length)
        end = tl.minimum(tl.maximum(tl.load(OFFSETS + sequence + 1).to(tl.int64), begin), length)
        tokens = end - begin
        first_row = begin
        second_row = begin
        mask_row = begin
        out_row = begin
    else:
        tokens = tl.zeros([], tl.int64) + length
        first_row = sequence * first_stride
        second_row = sequence * second_stride
        mask_row = sequence * mask_stride
        out_row = sequence * length
    gamma = tl.load(GAMMA + sequence)
    decay = gamma * tl.load(LAM + sequence)
    carry = gamma * 0.0
    if HAS_BOOTSTRAP:
        carry = gamma * tl.load(BOOTSTRAP + sequence)

    lanes = tl.arange(0, BLOCK)
    start = tl.zeros([], tl.int64)
    while start < tokens:
        i = start + lanes  # position in scan order
        t = tokens - 1 - i if FORWARD else i
        inside = i < tokens
        counts = inside
        if HAS_MASK:
            counts = inside & (tl.load(MASK + mask_row + t, mask=inside, other=0) != 0)
        first = tl.load(FIRST + first_row + t, mask=counts, other=0.0)
        second = tl.load(SECOND + second_row + t, mask=counts, other=0.0)

        if FORWARD:
            b = gamma * second + decay * (first - second)
        else:
            b = first + second
        c = tl.where(counts, decay, 1.0).to(b.dtype)
        identity_b = tl.zeros_like(b)
        b, c, before_b, before_c = tl.associative_scan(
            (b, c, identity_b, identity_b + 1.0), 0, _then
        )
        x = before_b + before_c * carry
        if FORWARD:
            out_first = (first - second) + x
            out_second = out_first + second
        else:
            out_first = first + second + decay * x
            out_second = second - out_first + gamma * x
        out_first = tl.where(counts, out_first, 0.0)
        out_second = tl.where(counts, out_second, 0.0)
        tl.store(OUT_FIRST + out_row + t, out_first, mask=inside)
        tl.store(OUT_SECOND + out_row + t, out_second, mask=inside)
        carry = tl.sum(tl.where(lanes == BLOCK - 1, b + c * carry, 0.0), 0)
        start += BLOCK
    if not FORWARD:
        tl.store(OUT_BOOTSTRAP + sequence, gamma * carry)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    forward_pass: bool,
    first: Tensor,
    second: Tensor,
    mask: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    out_bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    first, second = _unit_stride(first), _unit_stride(second)
    # Zeros, not empty, where a malformed cu_seqlens may leave tokens out.
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    out_first, out_second = (
        allocate(first.shape, dtype=first.dtype, device=first.device) for _ in range(2)
    )
    sequences = gamma.numel()
    if sequences == 0:
        return out_first, out_second
    byte_mask = gamma if mask is None else _unit_stride(mask).view(torch.uint8)
    length = first.shape[-1]
    block = 256 if length <= 256 else 1024
    on_gpu = first.device.type == "cuda"
    with torch.cuda.device(first.device) if on_gpu else contextlib.nullcontext():
        _gae_kernel[(sequences,)](
            first,
            second,
            byte_mask,
            gamma.contiguous(),
            lam.contiguous(),
            gamma if bootstrap is None else bootstrap.contiguous(),
            gamma if cu_seqlens is None else cu_seqlens.contiguous(),
            out_first,
            out_second,
            gamma if out_bootstrap is None else out_bootstrap,
            first.stride(0),
            second.stride(0),
            byte_mask.stride(0),
            length,
            FORWARD=forward_pass,
            HAS_MASK=mask is not None,
            HAS_BOOTSTRAP=bootstrap is not None,
            PACKED=cu_seqlens is not None,
            BLOCK=block,
            num_warps=4,
        )
    return out_first, out_second


def forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns); arguments as in rlhf_fast/compiled/gae.py."""
    return _launch(True, rewards, values, mask, gamma, lam, bootstrap, cu_seqlens, None)


def backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (rewards, values, bootstrap)."""
    grad_bootstrap = torch.empty_like(gamma)
    grad_rewards, grad_values = _launch(
        False, grad_advantages, grad_returns, mask, gamma, lam, None, cu_seqlens, grad_bootstrap
    )
    return grad_rewards, grad_values, grad_bootstrap
