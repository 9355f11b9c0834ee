"""What makes a loss one launch: partial sums in fixed slots, which the last program to finish adds.

Which program that is changes no bit: it reads the slots in their order. The counter that tells it
is an integer, and 0 again when the launch ends.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._prims import INTERPRETED, on_device_of

LARGE = 1024
"""Lanes of a program for long runs of tokens."""
PROGRAMS = 1024
"""At most so many share a batch's tokens: what the last one must add stays small."""
BACKWARD_BLOCK = 1024


@triton.jit
def is_last(TICKET):
    """Whether all other programs of the launch have stored their partial sums, and this one its.

    Stores of all threads are made before the barrier, which comes before the release of the
    counter; who acquires the last count may read them, though not from a line of L1 of before.
    """
    tl.debug_barrier()
    last = tl.atomic_add(TICKET, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(TICKET, 0)
    return last


@triton.jit
def sum_of_lanes(x):
    """The sum of x [BLOCK, ...] over its lanes, [...]."""
    if INTERPRETED:
        # What is a tree on a GPU is a plain loop here, and its roundings grow with its length.
        x = tl.sum(tl.reshape(x, [32, x.shape[0] // 32, *x.shape[1:]]), 1)
    return tl.sum(x, 0)


@triton.jit
def totals(PARTIALS, terms, LARGEST: tl.constexpr, TERMS: tl.constexpr, SLOTS: tl.constexpr):
    """[TERMS] sums of [terms, programs] partial ones; of term LARGEST the maximum."""
    programs = tl.num_programs(0)
    term = tl.arange(0, TERMS)
    total = tl.zeros([TERMS, SLOTS], PARTIALS.dtype.element_ty)
    for start in range(0, programs, SLOTS):
        slot = start + tl.arange(0, SLOTS)[None, :]
        there = (slot < programs) & (term[:, None] < terms)
        at = PARTIALS + term[:, None] * programs + slot
        x = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        larger = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL)
        total = tl.where(term[:, None] == LARGEST, larger, total + x)
    sums = tl.sum(total, 1)
    # The maximum over lanes forgets a NaN, the sum doesn't.
    largest = tl.where(sums == sums, tl.max(total, 1), sums)
    return tl.where(term == LARGEST, largest, sums)


@triton.jit
def moments(x, weights, squares):
    """Number, mean and sum of squared deviations from it of K columns, fp64 [1, K].

    Deviations are taken from one of the elements, then from their mean: equal ones give exactly 0,
    and a common offset costs no bit.

    Args:
        x: [BLOCK, K] elements, or means of sets of them.
        weights: [BLOCK, K] how many elements a set has; where 0, x may be anything.
        squares: [BLOCK, K] sums of squared deviations within the sets.
    """
    some = weights > 0.0
    count = sum_of_lanes(weights)[None, :]
    pivot = tl.max(tl.where(some, x, -float("inf")), 0, keep_dims=True)
    pivot = tl.where(count > 0.0, pivot, 0.0)
    gaps = tl.where(some, x - pivot, 0.0)
    shift = sum_of_lanes(weights * gaps)[None, :] / tl.maximum(count, 1.0)
    gaps -= shift
    squares = sum_of_lanes(tl.where(some, squares + weights * gaps * gaps, 0.0))[None, :]
    mean = pivot.to(tl.float64) + shift.to(tl.float64)
    return count.to(tl.float64), mean, squares.to(tl.float64)


@triton.jit
def merged(count, mean, squares, other_count, other_mean, other_squares):
    """The moments of two sets together (Chan, Golub and LeVeque 1983)."""
    total = count + other_count
    part = other_count / tl.maximum(total, 1.0)
    gap = other_mean - mean
    return total, mean + gap * part, squares + other_squares + gap * gap * count * part


@triton.jit
def store_moments(PARTIALS, count, mean, squares):
    """Moments fp64 [1, K] into this program's slot of PARTIALS [K, 3, programs]."""
    programs = tl.num_programs(0)
    at = PARTIALS + tl.program_id(0) + 3 * programs * tl.arange(0, count.shape[1])[None, :]
    tl.store(at, count)
    tl.store(at + programs, mean)
    tl.store(at + 2 * programs, squares)


@triton.jit
def total_moments(PARTIALS, SLOTS: tl.constexpr, K: tl.constexpr):
    """Moments of everything, fp64 [1, K], from those of all programs."""
    programs = tl.num_programs(0)
    count = tl.zeros([1, K], tl.float64)
    mean, squares = count, count
    for start in range(0, programs, SLOTS):
        slot = start + tl.arange(0, SLOTS)[:, None]
        at = PARTIALS + slot + 3 * programs * tl.arange(0, K)[None, :]
        there = (slot < programs) & (tl.arange(0, K)[None, :] < K)
        counts = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        means = tl.load(at + programs, mask=there, other=0.0, cache_modifier=".cg")
        inner = tl.load(at + 2 * programs, mask=there, other=0.0, cache_modifier=".cg")
        more = moments(means, counts, inner)
        count, mean, squares = merged(count, mean, squares, more[0], more[1], more[2])
    return count, mean, squares


@triton.jit
def place(first, lanes, length):
    """Row and column of the tokens from number `first` on, in rows of `length`; both int64.

    Lanes divide in the width of `length`, int32 as a rule: a division of int64 is a slow one.
    """
    row = first // length
    column = (first - row * length).to(length.dtype) + lanes
    below = column // length
    return row + below.to(tl.int64), (column - below * length).to(tl.int64)


@triton.jit
def quotient(a, b):
    """a / b to one rounding, which in fp32 takes more than `/`."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def divisor_of(count, NORMALIZER, normalizer):
    """What sums are divided by: the tensor, the number unless it is 0, else the count; never 0."""
    if NORMALIZER is not None:
        divisor = tl.load(NORMALIZER)
    else:
        divisor = tl.full([], normalizer, count.dtype)
        divisor = tl.where(divisor == 0.0, count, divisor)
    return tl.where(divisor == 0.0, 1.0, divisor)


@triton.jit
def _scaled(grad, scale):
    """What has no gradient has none of an infinite loss either."""
    return tl.where(grad == 0.0, 0.0, grad * scale)


@triton.jit(do_not_specialize=["count"])
def _gradient_kernel(
    GRAD_LOSS,
    DIVISOR,
    GRAD,
    SHARES,
    OUT,
    OUT_ENTROPY,
    OUT_KL,
    entropy_coef,
    kl_coef,
    count,
    AT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    scale = quotient(tl.load(GRAD_LOSS), tl.load(DIVISOR + AT))
    if OUT is not None:
        grad = tl.load(GRAD + i, mask=inside, other=0.0)
        tl.store(OUT + i, _scaled(grad, scale), mask=inside)
    if SHARES is not None:
        share = tl.load(SHARES + i, mask=inside, other=0.0)
        if OUT_ENTROPY is not None:
            tl.store(OUT_ENTROPY + i, _scaled(-entropy_coef * share, scale), mask=inside)
        if OUT_KL is not None:
            tl.store(OUT_KL + i, _scaled(kl_coef * share, scale), mask=inside)


def gradients(
    grad_loss: Tensor,
    divisor: Tensor,
    grad: Tensor,
    shares: Tensor | None = None,
    coefficients: tuple[float, float] = (0.0, 0.0),
    wanted: tuple[bool, bool, bool] = (True, False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log-probs (or values), entropy and KL; empty ones where they aren't wanted.

    Args:
        grad_loss: 0-d upstream gradient.
        divisor: what the loss was divided by is its last element.
        grad: that of the loss times the divisor, contiguous; not read unless the first is wanted.
        shares: weights of the entropy and the KL of each token; not read unless these are.
        coefficients: of entropy and KL.
        wanted: which of the three.
    """
    shares = shares if wanted[1] or wanted[2] else None
    like = grad if shares is None else shares
    outputs = [like.new_empty(like.shape if w else 0) for w in wanted]
    if like.numel() > 0 and any(wanted):
        with on_device_of(like):
            _gradient_kernel[(triton.cdiv(like.numel(), BACKWARD_BLOCK),)](
                grad_loss,
                divisor,
                grad,
                shares,
                *(x if w else None for x, w in zip(outputs, wanted, strict=True)),
                *coefficients,
                like.numel(),
                AT=divisor.numel() - 1,
                BLOCK=BACKWARD_BLOCK,
                num_warps=4,
            )
    return outputs[0], outputs[1], outputs[2]


def program(tokens: int) -> dict[str, int]:
    """Launch options of a program that walks some `tokens`; SLOTS is as many as it adds at once."""
    block, warps = (64, 2) if tokens <= 64 else (256, 4) if tokens <= 256 else (LARGE, 8)
    return {"BLOCK": block, "SLOTS": 64 * warps, "num_warps": warps}


def spans(tokens: int) -> tuple[int, int]:
    """How many programs share `tokens`, at least one, and how many each takes."""
    span = triton.cdiv(triton.cdiv(tokens, LARGE), PROGRAMS) * LARGE or LARGE
    return max(triton.cdiv(tokens, span), 1), span
