"""From scores and log-probs to advantages in Triton; rlhf_fast/ops/ppo_advantages.py has the maths.

Forward: one launch, a program a sequence. It reads the mask for the tokens' number and the last one
that counts, then walks the sequence from its end, as kernels/gae.py does, and scans each block for
the advantages and, with a lambda of their own, the returns. Whitening is a second launch: it needs
the moments of all.

Legend: B sequences, T tokens of a row, N packed tokens; fp32 or fp64, the moments fp64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._losses import (
    BACKWARD_BLOCK,
    is_last,
    place,
    quotient,
    store_moments,
    total_moments,
)
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
from rlhf_fast.kernels._ticket import ticket

EPS = tl.constexpr(1e-8)
"""Under the root when whitening, as in rlhf_fast/ops/masked.py."""
SLOTS = tl.constexpr(256)  # programs whose moments are merged at once
RUN_TIME = ["logprobs_stride", "ref_stride", "values_stride", "mask_stride", "length"]


@triton.jit
def _coefficient(TENSOR, number, dtype: tl.constexpr):
    """gamma or lambda of this program's sequence: its own, or the number for all."""
    if TENSOR is not None:
        return tl.load(TENSOR + tl.program_id(0))
    else:
        return tl.full([], number, dtype)


@triton.jit
def _extent(MASK, tokens, BLOCK: tl.constexpr):
    """How many of a sequence's tokens count, and which is the last that does; -1 if none."""
    count = tl.zeros([], tl.int64)
    last = tl.full([], -1, tl.int64)
    start = tl.zeros([], tl.int64)
    while start < tokens:
        t = start + tl.arange(0, BLOCK)
        counts = tl.load(MASK + t, mask=t < tokens, other=0) != 0
        count += tl.sum(counts.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(counts, t, -1), 0))
        start += BLOCK
    return count, last


@triton.jit(do_not_specialize=RUN_TIME)
def _forward_kernel(
    SCORES,
    LOGPROBS,
    REF,
    VALUES,
    MASK,
    GAMMA,
    LAM,
    VALUE_LAM,
    FINISHED,
    OFFSETS,
    ADVANTAGES,
    RETURNS,
    REWARDS,
    MOMENTS,
    PARTIALS,  # [3, programs] fp64, or None for no moments
    TICKET,
    logprobs_stride,
    ref_stride,
    values_stride,
    mask_stride,
    length,
    gamma_value: tl.float64,
    lam_value: tl.float64,
    value_lam_value: tl.float64,
    alpha: tl.float64,
    kl_coef: tl.float64,
    penalty: tl.float64,
    ADAPTIVE: tl.constexpr,
    OWN_VALUE_LAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = VALUES.dtype.element_ty
    sequence = tl.program_id(0)
    row, begin, tokens = sequence_of(OFFSETS, length)
    number, last = _extent(MASK + row * mask_stride + begin, tokens, BLOCK)
    score = tl.load(SCORES + sequence)
    if FINISHED is not None:
        finished = tl.load(FINISHED + sequence) != 0
        score = tl.where(finished, score, score - tl.full([], penalty, dtype))
    gamma = _coefficient(GAMMA, gamma_value, dtype)
    if ADAPTIVE:
        tokens_scaled = tl.full([], alpha, dtype) * tl.maximum(number, 1).to(dtype)
        lam = tl.maximum(1.0 - quotient(tl.full([], 1.0, dtype), tokens_scaled), 0.0)
    else:
        lam = _coefficient(LAM, lam_value, dtype)
    decay = gamma * lam
    value_decay = decay
    if OWN_VALUE_LAM:
        value_decay = gamma * _coefficient(VALUE_LAM, value_lam_value, dtype)

    carry = gamma * 0.0
    value_carry = carry
    pivot = carry
    gaps = tl.zeros([BLOCK], tl.float64)
    squares = gaps
    start = tl.zeros([], tl.int64)
    while start < tokens:
        i = start + tl.arange(0, BLOCK)
        t = tokens - 1 - i
        column = begin + t
        inside = i < tokens
        counts = inside & (tl.load(MASK + row * mask_stride + column, mask=inside, other=0) != 0)
        value = tl.load(VALUES + row * values_stride + column, mask=counts, other=0.0)
        reward = tl.zeros([BLOCK], dtype)
        if REF is not None:
            log_ratio = tl.load(LOGPROBS + row * logprobs_stride + column, mask=counts, other=0.0)
            log_ratio -= tl.load(REF + row * ref_stride + column, mask=counts, other=0.0)
            reward = -tl.full([], kl_coef, dtype) * log_ratio
        reward = tl.where(t == last, reward + score, reward)

        gap = reward - value
        c = tl.where(counts, decay, 1.0).to(dtype)
        x, carry = scan(gamma * value + decay * gap, c, carry, BLOCK)
        advantage = gap + x
        returned = advantage + value
        if OWN_VALUE_LAM:
            c = tl.where(counts, value_decay, 1.0).to(dtype)
            x, value_carry = scan(gamma * value + value_decay * gap, c, value_carry, BLOCK)
            returned = (gap + x) + value
        out = row * length + column
        tl.store(ADVANTAGES + out, tl.where(counts, advantage, 0.0), mask=inside)
        tl.store(RETURNS + out, tl.where(counts, returned, 0.0), mask=inside)
        tl.store(REWARDS + out, tl.where(counts, reward, 0.0), mask=inside)
        if PARTIALS is not None:
            # Deviations from the one that comes first here: equal ones give exactly 0, and in fp64
            # it is near enough to the mean.
            pivot += tl.sum(tl.where(t == last, advantage, 0.0), 0)
            apart = tl.where(counts, advantage.to(tl.float64) - pivot.to(tl.float64), 0.0)
            gaps += apart
            squares += apart * apart
        start += BLOCK

    if PARTIALS is not None:
        count = tl.full([1, 1], number, tl.float64)
        shift = tl.sum(gaps, 0) / tl.maximum(count, 1.0)
        squared = tl.sum(squares, 0) - shift * shift * count
        squared = tl.where(squared < 0.0, 0.0, squared)
        store_moments(PARTIALS, count, pivot.to(tl.float64) + shift, squared)
        if is_last(TICKET):
            total, total_mean, total_squares = total_moments(PARTIALS, SLOTS, 1)
            at = MOMENTS + tl.arange(0, 1)[None, :]
            tl.store(at, total)
            tl.store(at + 1, total_mean)
            tl.store(at + 2, total_squares)
    else:
        entry = tl.arange(0, 4)
        tl.store(MOMENTS + entry, entry * 0.0, mask=(entry < 3) & (sequence == 0))


@triton.jit(do_not_specialize=["mask_stride", "length", "tokens"])
def _whiten_kernel(ADVANTAGES, MASK, MOMENTS, mask_stride, length, tokens, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = begin + lanes < tokens
    row, column = place(begin, lanes, length)
    counts = tl.load(MASK + row * mask_stride + column, mask=inside, other=0) != 0
    x = tl.load(ADVANTAGES + begin + lanes, mask=counts, other=0.0)
    count, mean, squares = tl.load(MOMENTS), tl.load(MOMENTS + 1), tl.load(MOMENTS + 2)
    scale = 1.0 / tl.sqrt(squares / tl.maximum(count - 1.0, 1.0) + EPS)
    # The mean in two numbers of the advantages' dtype: subtracting them in turn is exact enough.
    high = mean.to(x.dtype)
    low = (mean - high.to(tl.float64)).to(x.dtype)
    x = ((x - high) - low) * scale.to(x.dtype)
    tl.store(ADVANTAGES + begin + lanes, tl.where(counts, x, 0.0), mask=inside)


def _forward(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    gamma: Tensor | None,
    lam: Tensor | None,
    value_lam: Tensor | None,
    finished: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma_value: float,
    lam_value: float,
    value_lam_value: float,
    adaptive_lam: float,
    kl_coef: float,
    missing_eos_penalty: float,
    with_moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = scores.shape[0]
    # Only a malformed cu_seqlens leaves tokens without any sequence.
    allocate = values.new_empty if sequences else values.new_zeros
    outputs = [allocate(values.shape) for _ in range(3)]
    moments = allocate(3, dtype=torch.float64)
    if sequences:
        strided = [
            None if x is None else unit_stride(x)
            for x in (logprobs, ref_logprobs, values, byte_mask(mask))
        ]
        block, warps = scan_block(values, sequences)
        with on_device_of(values):
            _forward_kernel[(sequences,)](
                scores.contiguous(),
                *strided,
                *map(flat, (gamma, lam, value_lam)),
                None if finished is None else finished.contiguous().view(torch.uint8),
                flat(cu_seqlens),
                *outputs,
                moments,
                moments.new_empty((3, sequences)) if with_moments else None,
                ticket(values.device) if with_moments else None,
                *(0 if x is None else x.stride(0) for x in strided),
                values.shape[-1],
                gamma_value,
                lam_value,
                value_lam_value,
                adaptive_lam,
                kl_coef,
                missing_eos_penalty,
                ADAPTIVE=adaptive_lam > 0.0,
                OWN_VALUE_LAM=value_lam is not None or value_lam_value >= 0.0,
                BLOCK=block,
                num_warps=warps,
            )
    return outputs[0], outputs[1], outputs[2], moments


def _whiten(advantages: Tensor, mask: Tensor, moments: Tensor) -> None:
    tokens = advantages.numel()
    if tokens == 0:
        return
    mask = byte_mask(mask)
    with on_device_of(advantages):
        _whiten_kernel[(triton.cdiv(tokens, BACKWARD_BLOCK),)](
            advantages,
            mask,
            moments,
            mask.stride(0),
            mask.shape[-1],
            tokens,
            BLOCK=BACKWARD_BLOCK,
            num_warps=4,
        )


def _fake_forward(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Any, values: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, returns, rewards = (values.new_empty(values.shape) for _ in range(3))
    return advantages, returns, rewards, values.new_empty(3, dtype=torch.float64)


def _fake_whiten(advantages: Tensor, mask: Tensor, moments: Tensor) -> None:
    pass


forward = register(
    "ppo_advantages_forward",
    SCHEMAS["ppo_advantages_forward"],
    _forward,
    _fake_forward,
)
backward = register(
    "ppo_advantages_whiten",
    SCHEMAS["ppo_advantages_whiten"],
    _whiten,
    _fake_whiten,
)
