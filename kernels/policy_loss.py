"""The policy losses of PPO and its family in Triton; rlhf_fast/ops/policy_loss.py has the maths.

Forward: one launch finds the loss, its statistics and, but for the divisor, its gradient. Where
something is known only per sequence (its number of tokens, its mean log-ratio, its place in packed
tokens), a program walks a sequence, twice if that has to be summed first. Otherwise the programs
share the tokens evenly. Backward: one launch scales what the forward pass kept.

Legend: B sequences, T tokens of a row, N packed tokens; `rho` the ratio, `share` the weight of a
token in the loss times its divisor. All fp32.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._losses import (
    divisor_of,
    gradients,
    is_last,
    place,
    program,
    spans,
    totals,
)
from rlhf_fast.kernels._policy_terms import (
    COUNT,
    HUGE,
    MAX_LOG_RATIO,
    RATIO_MAX,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM,
    SEQUENCE,
    TERMS,
    bounded,
    counted,
    k3_estimate,
    kl_estimate,
    summed,
    surrogate,
)
from rlhf_fast.kernels._prims import (
    byte_mask,
    on_device_of,
    register,
    sequence_of,
    unit_stride,
)
from rlhf_fast.kernels._schemas import SCHEMAS
from rlhf_fast.kernels._ticket import ticket

RUN_TIME = [
    *("logprobs_stride", "old_stride", "advantages_stride", "mask_stride", "weights_stride"),
    *("entropy_stride", "ref_stride", "kl_stride", "length", "tokens", "span"),
]


@triton.jit(do_not_specialize=RUN_TIME)
def _forward_kernel(
    LOGPROBS,
    OLD,
    ADVANTAGES,
    MASK,
    WEIGHTS,
    ENTROPY,
    REF,
    KL,
    OFFSETS,
    NORMALIZER,
    LOSS,
    VALUES,
    GRAD,
    SHARES,
    PARTIALS,  # [TERMS, programs], in the order of the values
    TICKET,
    logprobs_stride,
    old_stride,
    advantages_stride,
    mask_stride,
    weights_stride,
    entropy_stride,
    ref_stride,
    kl_stride,
    length,
    tokens,
    span,
    normalizer,
    lower,
    upper,
    dual_clip,
    entropy_coef,
    kl_coef,
    RATIO: tl.constexpr,
    AGGREGATION: tl.constexpr,
    KL_KIND: tl.constexpr,
    UNBIASED: tl.constexpr,
    TOKEN_ADVANTAGES: tl.constexpr,
    TOKEN_WEIGHTS: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    program_id = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    SEQ_MEAN: tl.constexpr = AGGREGATION == SEQ_MEAN_TOKEN_MEAN or AGGREGATION == SEQ_MEAN_TOKEN_SUM
    if BY_SEQUENCE:
        row, begin, size = sequence_of(OFFSETS, length)
    else:
        row, begin = program_id * 0, program_id * span
        size = tl.minimum(begin + span, tokens) - begin

    # Of a sequence, what must be known before its first token is.
    sequence_tokens = tl.zeros([], tl.float32)
    exponent_mean = tl.zeros([], tl.float32)
    if RATIO == SEQUENCE or SEQ_MEAN:
        number, moved = zeros, zeros
        start = tl.zeros([], tl.int64)
        while start < size:
            column = begin + start + lanes
            inside = start + lanes < size
            counts = tl.load(MASK + row * mask_stride + column, mask=inside, other=0) != 0
            number += counts.to(tl.float32)
            if RATIO == SEQUENCE:
                new = counted(LOGPROBS, logprobs_stride, row, column, row, counts, True)
                moved += new - counted(OLD, old_stride, row, column, row, counts, True)
            start += BLOCK
        sequence_tokens = tl.sum(number, 0)
        exponent_mean = tl.div_rn(tl.sum(moved, 0), tl.maximum(sequence_tokens, 1.0))
    share = tl.full([], 1.0, tl.float32)
    statistics_share = share
    if SEQ_MEAN:
        statistics_share = tl.div_rn(share, tl.maximum(sequence_tokens, 1.0))
        if AGGREGATION == SEQ_MEAN_TOKEN_MEAN:
            share = statistics_share

    policy, entropy, divergence, low, high = zeros, zeros, zeros, zeros, zeros
    k1, k3, ratios, largest, number = zeros, zeros, zeros, zeros, zeros
    start = tl.zeros([], tl.int64)
    while start < size:
        inside = start + lanes < size
        if BY_SEQUENCE:
            at, column, owner = row, begin + start + lanes, program_id
        else:
            at, column = place(begin + start, lanes, length)
            owner = at
        counts = tl.load(MASK + at * mask_stride + column, mask=inside, other=0) != 0
        raw = tl.load(LOGPROBS + at * logprobs_stride + column, mask=counts, other=0.0)
        new = bounded(raw, HUGE)
        old = counted(OLD, old_stride, at, column, owner, counts, True)
        advantage = counted(
            ADVANTAGES, advantages_stride, at, column, owner, counts, TOKEN_ADVANTAGES
        )
        log_ratio = new - old
        exponent = exponent_mean + zeros if RATIO == SEQUENCE else log_ratio
        rho, loss, slope, below, above = surrogate(
            new, advantage, exponent, lower, upper, dual_clip, RATIO
        )
        if WEIGHTS is not None:
            weight = counted(WEIGHTS, weights_stride, at, column, owner, counts, TOKEN_WEIGHTS)
            loss, slope = loss * weight, slope * weight
        policy += tl.where(counts, loss, 0.0)
        if ENTROPY is not None:
            entropy += tl.load(ENTROPY + at * entropy_stride + column, mask=counts, other=0.0)
        if KL is not None:
            divergence += tl.load(KL + at * kl_stride + column, mask=counts, other=0.0)
        if REF is not None:
            ref = counted(REF, ref_stride, at, column, owner, counts, True)
            value, kl_slope = kl_estimate(new, old, ref, KL_KIND, UNBIASED)
            divergence += value
            slope += tl.where(kl_coef == 0.0, 0.0, kl_coef * kl_slope)

        moved = bounded(log_ratio, MAX_LOG_RATIO)
        excess, _ = k3_estimate(-moved)
        rho = tl.where(counts, rho, 0.0)
        low += below.to(tl.float32)
        high += above.to(tl.float32)
        k1 -= moved
        k3 += excess
        ratios += rho
        largest = tl.maximum(largest, rho)
        number += counts.to(tl.float32)
        out = at * length + column
        if GRAD is not None:
            # An infinite log-prob was bounded, and has no gradient.
            free = counts & (tl.abs(raw) <= HUGE)
            tl.store(GRAD + out, tl.where(free, slope * share, 0.0), mask=inside)
        if SHARES is not None:
            tl.store(SHARES + out, tl.where(counts, share, 0.0), mask=inside)
        start += BLOCK

    sums = summed(policy, entropy, divergence, low, high, k1, k3, ratios, number, zeros)
    term = tl.arange(0, 16)
    sums *= tl.where(term < 3, share, tl.where(term < RATIO_MAX, statistics_share, 1.0))
    ratio_sum = tl.sum(tl.where(term == RATIO_MAX - 1, sums, 0.0), 0)
    # The sum has kept a NaN that the maximum may have lost.
    largest = tl.where(ratio_sum == ratio_sum, tl.max(largest, 0), ratio_sum)
    sums = tl.where(term == RATIO_MAX, largest, sums)
    if SEQ_MEAN:
        sums = tl.where(term == COUNT, tl.minimum(sums, 1.0), sums)
    at = PARTIALS + term * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, sums, mask=term < TERMS)

    if is_last(TICKET):
        total = totals(PARTIALS, TERMS, RATIO_MAX, 16, SLOTS)
        count = tl.sum(tl.where(term == COUNT, total, 0.0), 0)
        divisor = divisor_of(count, NORMALIZER, normalizer)
        values = tl.where(term < RATIO_MAX, tl.div_rn(total, divisor + tl.zeros_like(total)), total)
        values = tl.where(term == COUNT, divisor, values)
        tl.store(VALUES + term, values, mask=term < TERMS)
        coefficient = tl.where(term == 1, -entropy_coef, tl.where(term == 2, kl_coef, 0.0))
        coefficient = tl.where(term == 0, 1.0, coefficient)
        # A term of no weight may be infinite.
        parts = tl.where(coefficient == 0.0, 0.0, coefficient * values)
        tl.store(LOSS, tl.sum(parts, 0))


def _forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    importance_weights: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    normalizer_value: float,
    ratio: int,
    aggregation: int,
    lower: float,
    upper: float,
    dual_clip: float,
    kl_kind: int,
    kl_unbiased_gradient: bool,
    entropy_coef: float,
    kl_coef: float,
    with_grad: bool,
    with_shares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = [logprobs, old_logprobs, advantages, byte_mask(mask), importance_weights]
    operands += [entropy, ref_logprobs, kl]
    per_token = [x is not None and x.shape == logprobs.shape for x in operands]
    operands = [unit_stride(x) if of else x for x, of in zip(operands, per_token, strict=True)]
    by_sequence = (
        ratio == SEQUENCE.value
        or aggregation in (SEQ_MEAN_TOKEN_MEAN.value, SEQ_MEAN_TOKEN_SUM.value)
        # Of packed tokens only their sequences' programs know whose they are.
        or (
            cu_seqlens is not None
            and any(x is not None and x.shape != logprobs.shape for x in operands)
        )
    )
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens = logprobs.numel()
    # Only a malformed cu_seqlens leaves tokens without any sequence.
    allocate = logprobs.new_empty if sequences else logprobs.new_zeros
    loss, values = logprobs.new_empty(()), logprobs.new_empty(TERMS.value)
    grad, shares = (allocate(logprobs.shape if w else 0) for w in (with_grad, with_shares))
    length = logprobs.shape[-1] if sequences else 0
    if sequences == 0:
        cu_seqlens, tokens = None, 0
    if by_sequence:
        programs, span = max(sequences, 1), 0
        options = program(tokens // programs)
    else:
        programs, span = spans(tokens)
        options = program(tokens)
    with on_device_of(logprobs):
        _forward_kernel[(programs,)](
            *operands,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            normalizer,
            loss,
            values,
            grad if with_grad else None,
            shares if with_shares else None,
            logprobs.new_empty((TERMS.value, programs)),
            ticket(logprobs.device),
            *(0 if x is None else x.stride(0) for x in operands),
            length,
            tokens,
            span,
            normalizer_value,
            lower,
            upper,
            None if dual_clip == math.inf else dual_clip,
            entropy_coef,
            kl_coef,
            RATIO=ratio,
            AGGREGATION=aggregation,
            KL_KIND=kl_kind,
            UNBIASED=kl_unbiased_gradient,
            TOKEN_ADVANTAGES=per_token[2],
            TOKEN_WEIGHTS=per_token[4],
            BY_SEQUENCE=by_sequence,
            **options,
        )
    return loss, values, grad, shares


def _backward(
    grad_loss: Tensor,
    values: Tensor,
    grad: Tensor,
    shares: Tensor,
    entropy_coef: float,
    kl_coef: float,
    for_logprobs: bool,
    for_entropy: bool,
    for_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = for_logprobs, for_entropy, for_kl
    return gradients(grad_loss, values, grad, shares, (entropy_coef, kl_coef), wanted)


def _fake_forward(logprobs: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, shares = (logprobs.new_empty(logprobs.shape if w else 0) for w in others[-2:])
    return logprobs.new_empty(()), logprobs.new_empty(TERMS.value), grad, shares


def _fake_backward(
    grad_loss: Tensor, values: Tensor, grad: Tensor, shares: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    like = zip((grad, shares, shares), others[-3:], strict=True)
    outputs = [x.new_empty(x.shape if wanted else 0) for x, wanted in like]
    return outputs[0], outputs[1], outputs[2]


forward = register(
    "policy_loss_forward",
    SCHEMAS["policy_loss_forward"],
    _forward,
    _fake_forward,
)
backward = register(
    "policy_loss_backward",
    SCHEMAS["policy_loss_backward"],
    _backward,
    _fake_backward,
)
