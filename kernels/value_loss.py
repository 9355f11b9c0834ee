"""The critic's clipped squared error in Triton; rlhf_fast/ops/value_loss.py has the maths.

Forward: one launch finds the loss, its statistics and, but for the divisor, its gradient; its
programs share the tokens evenly. Backward: one launch scales that gradient. All fp32 or fp64, but
for the moments, which merge in fp64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._losses import (
    divisor_of,
    gradients,
    is_last,
    merged,
    moments,
    place,
    program,
    quotient,
    spans,
    store_moments,
    sum_of_lanes,
    total_moments,
    totals,
)
from rlhf_fast.kernels._prims import byte_mask, on_device_of, register, unit_stride
from rlhf_fast.kernels._schemas import SCHEMAS
from rlhf_fast.kernels._ticket import ticket

TERMS = tl.constexpr(4)  # sums of: loss, clipped tokens, values, returns
RUN_TIME = ["values_stride", "old_stride", "returns_stride", "mask_stride"]
RUN_TIME += ["length", "tokens", "span"]


@triton.jit
def _squared_error(value, old, target, clip):
    """The larger squared error, its derivative by `value`, whether the clipped one decides."""
    error = value - target
    free = error * error
    if clip is None:
        return free, 2.0 * error, tl.zeros(free.shape, tl.int1)
    else:
        lowest, highest = old - clip, old + clip
        outside = (value < lowest) | (value > highest)
        bounded = tl.maximum(value, lowest, propagate_nan=tl.PropagateNan.ALL)
        bounded = tl.minimum(bounded, highest, propagate_nan=tl.PropagateNan.ALL)
        held = (bounded - target) * (bounded - target)
        # Of a maximum of equals each has half of the gradient; inside the bounds both are free.
        kept = tl.where(free < held, 0.0, tl.where(free == held, 0.5, 1.0))
        slope = tl.where(outside, kept, 1.0).to(error.dtype) * (2.0 * error)
        larger = tl.maximum(free, held, propagate_nan=tl.PropagateNan.ALL)
        return larger, slope, held > free


@triton.jit(do_not_specialize=RUN_TIME)
def _forward_kernel(
    VALUES,
    OLD,
    RETURNS,
    MASK,
    NORMALIZER,
    LOSS,
    OUT,
    GRAD,
    PARTIALS,  # [TERMS, programs]
    MOMENTS,  # [2, 3, programs] fp64: of the returns, and of what the values miss of these
    TICKET,
    values_stride,
    old_stride,
    returns_stride,
    mask_stride,
    length,
    tokens,
    span,
    normalizer: tl.float64,
    clip: tl.float64,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    dtype: tl.constexpr = VALUES.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    begin = tl.program_id(0).to(tl.int64) * span
    size = tl.minimum(begin + span, tokens) - begin
    zeros = tl.zeros([BLOCK], dtype)
    losses, clipped, values, returns = zeros, zeros, zeros, zeros
    count = tl.zeros([1, 2], tl.float64)
    mean, squares = count, count

    start = tl.zeros([], tl.int64)
    while start < size:
        inside = start + lanes < size
        row, column = place(begin + start, lanes, length)
        counts = tl.load(MASK + row * mask_stride + column, mask=inside, other=0) != 0
        value = tl.load(VALUES + row * values_stride + column, mask=counts, other=0.0)
        target = tl.load(RETURNS + row * returns_stride + column, mask=counts, other=0.0)
        old = value
        if CLIP:
            old = tl.load(OLD + row * old_stride + column, mask=counts, other=0.0)
        loss, slope, decided = _squared_error(
            value, old, target, tl.full([], clip, dtype) if CLIP else None
        )
        losses += loss
        clipped += decided.to(dtype)
        values += value
        returns += target
        weights = tl.join(counts.to(dtype), counts.to(dtype))
        more = moments(tl.join(target, target - value), weights, tl.zeros_like(weights))
        count, mean, squares = merged(count, mean, squares, more[0], more[1], more[2])
        if GRAD is not None:
            at = row * length + column
            tl.store(GRAD + at, tl.where(counts, 0.5 * slope, 0.0), mask=inside)
        start += BLOCK

    sums = sum_of_lanes(tl.join(tl.join(losses, values), tl.join(clipped, returns)))
    term = tl.arange(0, TERMS)
    at = PARTIALS + term * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.reshape(sums, [TERMS]))
    store_moments(MOMENTS, count, mean, squares)

    if is_last(TICKET):
        total = totals(PARTIALS, TERMS, -1, TERMS, SLOTS)
        numbers, _, all_squares = total_moments(MOMENTS, SLOTS, 2)
        first = tl.arange(0, 2)[None, :] == 0
        number = tl.sum(tl.sum(tl.where(first, numbers, 0.0), 1), 0).to(dtype)
        spread = tl.sum(tl.sum(tl.where(first, all_squares, 0.0), 1), 0)
        missed = tl.sum(tl.sum(tl.where(first, 0.0, all_squares), 1), 0)
        divisor = divisor_of(number, NORMALIZER, normalizer)
        means = quotient(total, divisor + tl.zeros_like(total))
        tl.store(LOSS, 0.5 * tl.sum(tl.where(term == 0, means, 0.0), 0))
        unexplained = missed / tl.where(spread > 0.0, spread, 1.0)
        explained = tl.where(spread > 0.0, 1.0 - unexplained, 0.0).to(dtype)
        # The clipped fraction, then, from term 2 on, after the explained variance.
        tl.store(OUT + tl.where(term == 1, 0, term), means, mask=term > 0)
        tl.store(OUT + 1, explained * quotient(number, divisor))
        tl.store(OUT + TERMS, divisor)


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
    loss, out = values.new_empty(()), values.new_empty(TERMS.value + 1)
    grad = values.new_empty(values.shape if with_grad else 0)
    operands = [*map(_rows, (values, old_values, returns)), byte_mask(_rows(mask))]
    tokens = values.numel()
    programs, span = spans(tokens)
    with on_device_of(values):
        _forward_kernel[(programs,)](
            *operands,
            normalizer,
            loss,
            out,
            grad if with_grad else None,
            values.new_empty((TERMS.value, programs)),
            values.new_empty((2, 3, programs), dtype=torch.float64),
            ticket(values.device),
            *(x.stride(0) for x in operands),
            operands[0].shape[1],
            tokens,
            span,
            normalizer_value,
            clip,
            CLIP=clip != math.inf,
            **program(tokens),
        )
    return loss, out, grad


def _rows(x: Tensor) -> Tensor:
    """`x` as rows of tokens that lie side by side; one row unless it is a matrix."""
    return unit_stride(x if x.dim() == 2 else x.reshape(1, -1))


def _backward(grad_loss: Tensor, out: Tensor, grad: Tensor) -> Tensor:
    return gradients(grad_loss, out, grad)[0]


def _fake_forward(values: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad = values.new_empty(values.shape if others[-1] else 0)
    return values.new_empty(()), values.new_empty(TERMS.value + 1), grad


def _fake_backward(grad_loss: Tensor, out: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


forward = register(
    "value_loss_forward",
    SCHEMAS["value_loss_forward"],
    _forward,
    _fake_forward,
)
backward = register(
    "value_loss_backward",
    SCHEMAS["value_loss_backward"],
    _backward,
    _fake_backward,
)
