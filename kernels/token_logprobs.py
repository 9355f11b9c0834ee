"""Log-prob of given tokens and entropy, in Triton; rlhf_fast/ops/token_logprobs.py has the maths.

Forward: one program of one warp for each piece of a row, PIECE columns wide. It walks the piece in
blocks, with a running largest logit `top` and, for each lane, sums over all others. Nearly all
blocks have no larger logit than `top` and cost some 10 instructions an element; in one that has, it
is left out of the sums. A warp waits for no other, and its next blocks are on their way meanwhile.
A second kernel merges the pieces of each row. Where a piece ends follows from V alone: how many
rows there are changes no bit.

Backward: one read and one write of each element, in such pieces too.

Legend: N rows, V columns; y scaled and capped logits, gap (y - top) / temperature, of which inner
loops hold the exponent of 2; `others` sums exp(gap) and `weighted` exp(gap) * gap. All fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._prims import (
    FLOOR,
    LN2,
    LOG2E,
    RUN_TIME,
    cast,
    expm1,
    finite,
    flat,
    log1p,
    merged_top,
    on_device_of,
    row_start,
    rows_of,
    scaled,
    slots,
    unscaled,
    vector,
)

PIECE = tl.constexpr(16384)  # columns of a forward program
DEPTH = tl.constexpr(4)  # rows of lanes in a block
BACKWARD_PIECE = tl.constexpr(8192)
BACKWARD_DEPTH = tl.constexpr(2)
LANES = tl.constexpr(256)  # 8 bf16, one 16-byte load, for each thread of a warp
STAGES = tl.constexpr(3)  # blocks of a piece in flight or in use, in shared memory
ROWS = tl.constexpr(4)  # of a merging program


@triton.jit
def _fold(y, top, others, weighted, shared, shared_weighted, scale):
    """Takes a block into the state of a piece.

    The state's sums over all but one largest element are `shared` plus the lanes of `others`, and
    likewise for `weighted`; a NaN stays in them, whatever the maximum makes of it.
    """
    block_top = tl.max(tl.max(y, 0), 0)
    if block_top > top:
        fall = tl.maximum((top - block_top) * scale, FLOOR)
        weight = tl.exp2(fall)
        largest = (y == block_top).to(tl.float32)
        gaps = tl.maximum((y - block_top) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(gaps) - largest
        weighted = weight * (weighted + fall * others) + tl.sum(e * gaps, 0)
        others = weight * others + tl.sum(e, 0)
        # Here the former largest one joins, and the ties of the new one.
        shared_weighted = weight * (shared_weighted + fall * (1.0 + shared))
        shared = weight * (1.0 + shared) + (tl.sum(tl.sum(largest, 0), 0) - 1.0)
        top = block_top
    else:
        gaps = tl.maximum((y - finite(top)) * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(gaps)
        weighted += tl.sum(e * gaps, 0)
        others += tl.sum(e, 0)
    return top, others, weighted, shared, shared_weighted


@triton.jit(do_not_specialize=RUN_TIME)
def _pieces_kernel(
    LOGITS,
    TOKENS,
    ROW_TEMPERATURE,
    PIECES,  # [3, N, pieces]: top, others, weighted
    inner,
    outer_stride,
    inner_stride,
    rows,
    columns,
    pieces,
    ignore_index,
    temperature,
    softcap,
    logit_scale,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // pieces
    if tl.load(TOKENS + row) == ignore_index:
        return
    if ROW_TEMPERATURE is not None:
        temperature = tl.load(ROW_TEMPERATURE + row)
    scale = LOG2E / temperature
    begin = (program - row * pieces) * PIECE
    size = tl.minimum(columns - begin, PIECE)
    piece = LOGITS + (row_start(row, inner, outer_stride, inner_stride, VECTOR) + begin)
    at = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]

    top = tl.full([], -float("inf"), tl.float32)
    others = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    shared = tl.zeros([], tl.float32)
    shared_weighted = tl.zeros([], tl.float32)
    whole = size // (DEPTH * LANES) * (DEPTH * LANES)
    for start in tl.range(0, whole, DEPTH * LANES, num_stages=STAGES):
        y = scaled(tl.load(piece + start + at), logit_scale, softcap)
        top, others, weighted, shared, shared_weighted = _fold(
            y, top, others, weighted, shared, shared_weighted, scale
        )
    rest = tl.multiple_of(size - whole, VECTOR)
    if rest > 0:
        y = scaled(tl.load(piece + whole + at, mask=at < rest), logit_scale, softcap)
        y = tl.where(at < rest, y, -float("inf"))
        top, others, weighted, shared, shared_weighted = _fold(
            y, top, others, weighted, shared, shared_weighted, scale
        )
    count = (tl.zeros([], tl.int64) + rows) * pieces
    tl.store(PIECES + program, top)
    tl.store(PIECES + count + program, shared + tl.sum(others, 0))
    tl.store(PIECES + 2 * count + program, (shared_weighted + tl.sum(weighted, 0)) * LN2)


@triton.jit(do_not_specialize=RUN_TIME)
def _merge_kernel(
    LOGITS,
    TOKENS,
    ROW_TEMPERATURE,
    PIECES,
    CARRY,
    LOGPROBS,
    ENTROPY,
    STATS,
    inner,
    outer_stride,
    inner_stride,
    rows,
    columns,
    pieces,
    ignore_index,
    first_column,
    temperature,
    softcap,
    logit_scale,
    SLOTS: tl.constexpr,  # pieces of a row, and in front of them what is carried in
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    token = tl.load(TOKENS + row, mask=inside, other=0).to(tl.int64)
    counts = inside & (token != ignore_index)
    row_temperature = tl.zeros([ROWS], tl.float32) + temperature
    if ROW_TEMPERATURE is not None:
        row_temperature = tl.load(ROW_TEMPERATURE + row, mask=counts, other=1.0)

    slot = tl.arange(0, SLOTS)[None, :]
    computed = counts[:, None] & (slot > 0) & (slot <= pieces)
    at = PIECES + row[:, None].to(tl.int64) * pieces + (slot - 1)
    count = (tl.zeros([], tl.int64) + rows) * pieces
    top = tl.load(at, mask=computed, other=-float("inf"))
    others = tl.load(at + count, mask=computed, other=0.0)
    weighted = tl.load(at + 2 * count, mask=computed, other=0.0)
    column = token - first_column
    here = counts & (column >= 0) & (column < columns)
    at = LOGITS + row_start(row, inner, outer_stride, inner_stride, 1) + column
    target = tl.where(here, tl.load(at, mask=here, other=0.0).to(tl.float32), float("nan"))
    size = tl.zeros([], tl.int64) + rows
    if CARRY is not None:
        first = counts[:, None] & (slot == 0)
        at = CARRY + row[:, None] + slot
        top = tl.where(first, tl.load(at, mask=first, other=0.0), top)
        others = tl.where(first, tl.load(at + size, mask=first, other=0.0), others)
        weighted = tl.where(first, tl.load(at + 2 * size, mask=first, other=0.0), weighted)
        carried = tl.load(CARRY + 3 * size + row, mask=counts, other=0.0)
        target = tl.where(here, target, carried)

    masses = 1.0 + others
    top, others, gaps, weights = merged_top(top, others, row_temperature, SLOTS)
    weighted = tl.sum(weights * (weighted + gaps * masses), 1)
    log_normalizer = log1p(others)
    logprob = (scaled(target, logit_scale, softcap) - top) / row_temperature - log_normalizer
    entropy = log_normalizer - weighted / (1.0 + others)
    # A row that is all -inf has no distribution, a token that is no column no log-prob.
    missing = (top == -float("inf")) | (target != target)
    logprob = tl.where(missing, float("nan"), logprob)
    entropy = tl.where(missing, float("nan"), entropy)
    tl.store(LOGPROBS + row, tl.where(counts, logprob, 0.0), mask=inside)
    tl.store(ENTROPY + row, tl.where(counts, entropy, 0.0), mask=inside)
    tl.store(STATS + row, tl.where(counts, top, 0.0), mask=inside)
    tl.store(STATS + size + row, tl.where(counts, others, 0.0), mask=inside)
    tl.store(STATS + 2 * size + row, tl.where(counts, weighted, 0.0), mask=inside)
    tl.store(STATS + 3 * size + row, tl.where(counts, target, 0.0), mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _backward_kernel(
    LOGITS,
    TOKENS,
    STATS,
    GRAD_LOGPROBS,
    GRAD_ENTROPY,
    ROW_TEMPERATURE,
    INDEX,
    OUT,
    inner,
    outer_stride,
    inner_stride,
    out_inner,
    out_outer_stride,
    out_inner_stride,
    rows,
    columns,
    pieces,
    ignore_index,
    first_column,
    temperature,
    softcap,
    logit_scale,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // pieces
    begin = (program - row * pieces) * BACKWARD_PIECE
    size = tl.multiple_of(tl.minimum(columns - begin, BACKWARD_PIECE), VECTOR)
    out = OUT + (row_start(row, out_inner, out_outer_stride, out_inner_stride, VECTOR) + begin)
    at = tl.arange(0, BACKWARD_DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]

    token = tl.load(TOKENS + row).to(tl.int64)
    of_logprob = tl.zeros([], tl.float32)
    of_entropy = tl.zeros([], tl.float32)
    if GRAD_LOGPROBS is not None:
        of_logprob = tl.load(GRAD_LOGPROBS + row)
    if GRAD_ENTROPY is not None:
        of_entropy = tl.load(GRAD_ENTROPY + row)
    count = tl.zeros([], tl.int64) + rows
    top = tl.load(STATS + row)
    others = tl.load(STATS + count + row)
    weighted = tl.load(STATS + 2 * count + row)
    target = tl.load(STATS + 3 * count + row)
    if ROW_TEMPERATURE is not None:
        temperature = tl.load(ROW_TEMPERATURE + row)
    if INDEX is not None:
        row = tl.load(INDEX + row)

    if (token == ignore_index) | ((of_logprob == 0.0) & (of_entropy == 0.0)):
        zeros = tl.zeros([BACKWARD_DEPTH, LANES], OUT.dtype.element_ty)
        for start in range(0, size, BACKWARD_DEPTH * LANES):
            inside = start + at < size
            tl.store(out + start + at, zeros, mask=inside)
        return

    scale = LOG2E / temperature
    chain = 1.0 / temperature
    if logit_scale is not None:
        chain *= logit_scale
    inverse = 1.0 / (1.0 + others)
    target_gap = scaled(target, logit_scale, softcap) - top
    logprob = target_gap / temperature - log1p(others)
    # out = exp(gap) (plain + slope gap); at the token 1 - p is written as -expm1(logprob).
    of_mean = of_entropy * weighted * inverse * inverse * chain
    plain = tl.where(target == target, of_mean - of_logprob * inverse * chain, target)
    slope = -of_entropy * inverse * chain * LN2
    target_gap = tl.maximum(target_gap * scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    at_token = tl.exp2(target_gap) * (of_mean + slope * target_gap)
    at_token -= of_logprob * expm1(logprob) * chain
    token_at = token - first_column - begin
    token_at = tl.where((token_at >= 0) & (token_at < size), token_at, -1).to(tl.int32)

    piece = LOGITS + (row_start(row, inner, outer_stride, inner_stride, VECTOR) + begin)
    for start in tl.range(0, size, BACKWARD_DEPTH * LANES, num_stages=STAGES):
        inside = start + at < size
        logit = tl.load(piece + start + at, mask=inside)
        gaps = (scaled(logit, logit_scale, softcap) - top) * scale
        if GRAD_ENTROPY is not None:
            gaps = tl.maximum(gaps, FLOOR, propagate_nan=tl.PropagateNan.ALL)
            grad = tl.exp2(gaps) * (plain + slope * gaps)
        else:
            grad = tl.exp2(gaps) * plain
        grad = tl.where(at == token_at - start, at_token, grad)
        grad = unscaled(grad, logit, logit_scale, softcap)
        tl.store(out + start + at, cast(grad, OUT.dtype.element_ty), mask=inside)


def forward(
    logits: Tensor,
    tokens: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    first_column: int,
    carry: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, stats); arguments as in rlhf_fast/compiled/token_logprobs.py."""
    ids = tokens.contiguous().view(-1)
    rows, columns = ids.numel(), logits.shape[-1]
    logprobs, entropy = (ids.new_empty(tokens.shape, dtype=torch.float32) for _ in range(2))
    stats = logprobs.new_empty((4, rows))
    if rows == 0:
        return logprobs, entropy, stats
    source, row_temperature = rows_of(logits), flat(row_temperature)
    pieces = (columns + PIECE.value - 1) // PIECE.value
    partial = stats.new_empty((3, rows, pieces))
    scaling = (temperature, softcap or None, None if logit_scale == 1.0 else logit_scale)
    with on_device_of(logits):
        _pieces_kernel[(rows * pieces,)](
            source.tensor,
            ids,
            row_temperature,
            partial,
            *source.layout,
            rows,
            columns,
            pieces,
            ignore_index,
            *scaling,
            VECTOR=vector(source),
            num_warps=1,
        )
        _merge_kernel[((rows + ROWS.value - 1) // ROWS.value,)](
            source.tensor,
            ids,
            row_temperature,
            partial,
            flat(carry),
            logprobs,
            entropy,
            stats,
            *source.layout,
            rows,
            columns,
            pieces,
            ignore_index,
            first_column,
            *scaling,
            SLOTS=slots(pieces),
            num_warps=4,
        )
    return logprobs, entropy, stats


def backward(
    logits: Tensor,
    tokens: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    first_column: int,
    rows: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the gradient of `logits` into `out`, which may be `logits` itself."""
    ids = tokens.contiguous().view(-1)
    count, columns = ids.numel(), logits.shape[-1]
    if count == 0:
        return
    source, target = rows_of(logits), rows_of(out)
    assert target.tensor is out, "out needs unit column stride and at most two row strides"
    pieces = (columns + BACKWARD_PIECE.value - 1) // BACKWARD_PIECE.value
    with on_device_of(logits):
        _backward_kernel[(count * pieces,)](
            source.tensor,
            ids,
            stats.contiguous(),
            flat(grad_logprobs),
            flat(grad_entropy),
            flat(row_temperature),
            flat(rows),
            out,
            *source.layout,
            *target.layout,
            count,
            columns,
            pieces,
            ignore_index,
            first_column,
            temperature,
            softcap or None,
            None if logit_scale == 1.0 else logit_scale,
            VECTOR=vector(source, target),
            num_warps=1,
        )
