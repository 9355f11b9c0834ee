"""Exact KL(policy || reference) of each row, in Triton; rlhf_fast/ops/full_kl.py has the maths.

Forward: one program for each piece of a row, which it holds in registers: first the normalisers of
both sides over the piece, then the piece's own KL as a sum of terms >= 0. A second kernel merges
the pieces of each row by the chain rule of KL, where nothing cancels either:

    kl = sum_i w_i kl_i + KL(w || v),    w_i, v_i the piece's share of policy and reference.

Backward: one read of both logits and one write of each gradient, from the row's statistics.

Legend: N rows, V columns; y (policy) and r (reference) scaled and capped logits, gap (y - top) /
temperature; `others` sums exp(gap) over all but one largest logit; u = log p - log q. All fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._prims import (
    LOG2E,
    RUN_TIME,
    cast,
    exp_excess,
    finite,
    flat,
    log_ratio,
    merged_top,
    on_device_of,
    row_start,
    rows_of,
    scaled,
    slots,
    unscaled,
    vector,
)

LANES = tl.constexpr(1024)  # 8 bf16, one 16-byte load, for each thread of 4 warps
DEPTH = tl.constexpr(2)  # rows of lanes in a piece
BACKWARD_PIECE = tl.constexpr(8192)  # columns of a backward program, which is one warp
BACKWARD_LANES = tl.constexpr(256)
BACKWARD_DEPTH = tl.constexpr(2)
STAGES = tl.constexpr(3)  # blocks of a piece in flight or in use, in shared memory
ROWS = tl.constexpr(4)  # of a merging program


@triton.jit
def _terms(p, q, u):
    """Summands of KL, p u - p + q, none below 0; that of p = 0 is q, whatever u is."""
    near = p * exp_excess(u)
    far = p * (u - 1.0) + q
    return tl.where(p == 0.0, q, tl.where(tl.abs(u) < 1.0, near, far))


@triton.jit
def _normalizer(y, scale):
    """Top of a block [DEPTH, LANES], exp(gap), and its sum with one largest element left out."""
    top = tl.max(tl.max(y, 0), 0)
    e = tl.exp2((y - finite(top)) * scale)
    others = tl.sum(tl.sum(e, 0), 0) - 1.0
    if others < 1.0:
        # Little is left of a confident block's sum: summed again without the largest element.
        largest = (y == top).to(tl.float32)
        ties = tl.sum(tl.sum(largest, 0), 0) - 1.0
        others = ties + tl.sum(tl.sum(e - largest, 0), 0)
    return top, e, tl.where(top == -float("inf"), others * 0.0, others)


@triton.jit(do_not_specialize=RUN_TIME)
def _pieces_kernel(
    LOGITS,
    REF_LOGITS,
    ROW_TEMPERATURE,
    PIECES,  # [5, N, pieces]: top, others, the reference's top and others, KL
    inner,
    outer_stride,
    inner_stride,
    ref_inner,
    ref_outer_stride,
    ref_inner_stride,
    rows,
    columns,
    pieces,
    temperature,
    softcap,
    logit_scale,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // pieces
    begin = (program - row * pieces) * (DEPTH * LANES)
    if ROW_TEMPERATURE is not None:
        temperature = tl.load(ROW_TEMPERATURE + row)
    at = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    logits = LOGITS + (row_start(row, inner, outer_stride, inner_stride, VECTOR) + begin)
    ref_start = row_start(row, ref_inner, ref_outer_stride, ref_inner_stride, VECTOR) + begin
    ref_logits = REF_LOGITS + ref_start
    rest = tl.multiple_of(columns - begin, VECTOR)
    if rest >= DEPTH * LANES:
        y = scaled(tl.load(logits + at), logit_scale, softcap)
        r = scaled(tl.load(ref_logits + at), logit_scale, softcap)
    else:
        inside = at < rest
        y = scaled(tl.load(logits + at, mask=inside), logit_scale, softcap)
        r = scaled(tl.load(ref_logits + at, mask=inside), logit_scale, softcap)
        y = tl.where(inside, y, -float("inf"))
        r = tl.where(inside, r, -float("inf"))

    scale = LOG2E / temperature
    top, e, others = _normalizer(y, scale)
    ref_top, ref_e, ref_others = _normalizer(r, scale)
    falls = (y - finite(top)) - (r - finite(ref_top))
    u = falls * (1.0 / temperature) - log_ratio(others, ref_others)
    p = e * (1.0 / (1.0 + others))
    q = ref_e * (1.0 / (1.0 + ref_others))
    kl = tl.sum(_terms(p, q, u), 0)
    # Allowed by the policy alone, even where p is 0 for being small; max passes over NaN, which is
    # what two -inf make.
    kl = tl.where(tl.max(falls, 0) == float("inf"), float("inf"), kl)
    count = (tl.zeros([], tl.int64) + rows) * pieces
    tl.store(PIECES + program, top)
    tl.store(PIECES + count + program, others)
    tl.store(PIECES + 2 * count + program, ref_top)
    tl.store(PIECES + 3 * count + program, ref_others)
    tl.store(PIECES + 4 * count + program, tl.sum(kl, 0))


@triton.jit(do_not_specialize=RUN_TIME)
def _merge_kernel(
    ROW_TEMPERATURE,
    PIECES,
    CARRY,
    KL,
    STATS,
    rows,
    pieces,
    temperature,
    SLOTS: tl.constexpr,  # pieces of a row, and in front of them what is carried in
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row_temperature = tl.zeros([ROWS], tl.float32) + temperature
    if ROW_TEMPERATURE is not None:
        row_temperature = tl.load(ROW_TEMPERATURE + row, mask=inside, other=1.0)

    slot = tl.arange(0, SLOTS)[None, :]
    computed = inside[:, None] & (slot > 0) & (slot <= pieces)
    at = PIECES + row[:, None].to(tl.int64) * pieces + (slot - 1)
    count = (tl.zeros([], tl.int64) + rows) * pieces
    top = tl.load(at, mask=computed, other=-float("inf"))
    others = tl.load(at + count, mask=computed, other=0.0)
    ref_top = tl.load(at + 2 * count, mask=computed, other=-float("inf"))
    ref_others = tl.load(at + 3 * count, mask=computed, other=0.0)
    kl = tl.load(at + 4 * count, mask=computed, other=0.0)
    size = tl.zeros([], tl.int64) + rows
    if CARRY is not None:
        first = inside[:, None] & (slot == 0)
        at = CARRY + row[:, None] + slot
        top = tl.where(first, tl.load(at, mask=first, other=0.0), top)
        others = tl.where(first, tl.load(at + size, mask=first, other=0.0), others)
        ref_top = tl.where(first, tl.load(at + 2 * size, mask=first, other=0.0), ref_top)
        ref_others = tl.where(first, tl.load(at + 3 * size, mask=first, other=0.0), ref_others)
        kl = tl.where(first, tl.load(at + 4 * size, mask=first, other=0.0), kl)

    w, v = 1.0 + others, 1.0 + ref_others
    shifts = log_ratio(others, ref_others)
    top, others, gaps, weights = merged_top(top, others, row_temperature, SLOTS)
    ref_top, ref_others, ref_gaps, ref_weights = merged_top(
        ref_top, ref_others, row_temperature, SLOTS
    )
    w = weights * w / (1.0 + others)[:, None]
    v = ref_weights * v / (1.0 + ref_others)[:, None]
    # Differences of like things first: pieces with equal logits give exactly 0.
    u = (gaps - ref_gaps) + (shifts - log_ratio(others, ref_others)[:, None])
    infinite = tl.max(kl, 1) == float("inf")
    within = tl.where((w == 0.0) | (kl == float("inf")), 0.0, w * kl)
    kl = tl.sum(within + _terms(w, v, u), 1) + tl.where(infinite, float("inf"), 0.0)
    kl = tl.where(top == -float("inf"), float("nan"), kl)
    tl.store(KL + row, kl, mask=inside)
    tl.store(STATS + row, top, mask=inside)
    tl.store(STATS + size + row, others, mask=inside)
    tl.store(STATS + 2 * size + row, ref_top, mask=inside)
    tl.store(STATS + 3 * size + row, ref_others, mask=inside)
    tl.store(STATS + 4 * size + row, kl, mask=inside)


@triton.jit(do_not_specialize=RUN_TIME)
def _backward_kernel(
    LOGITS,
    REF_LOGITS,
    STATS,
    GRAD_KL,
    ROW_TEMPERATURE,
    INDEX,
    OUT,
    REF_OUT,
    inner,
    outer_stride,
    inner_stride,
    ref_inner,
    ref_outer_stride,
    ref_inner_stride,
    out_inner,
    out_outer_stride,
    out_inner_stride,
    ref_out_inner,
    ref_out_outer_stride,
    ref_out_inner_stride,
    rows,
    columns,
    pieces,
    temperature,
    softcap,
    logit_scale,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // pieces
    begin = (program - row * pieces) * BACKWARD_PIECE
    size = tl.multiple_of(tl.minimum(columns - begin, BACKWARD_PIECE), VECTOR)
    at = tl.arange(0, BACKWARD_DEPTH)[:, None] * BACKWARD_LANES
    at = at + tl.arange(0, BACKWARD_LANES)[None, :]
    out = row_start(row, out_inner, out_outer_stride, out_inner_stride, VECTOR) + begin
    ref_out = (
        row_start(row, ref_out_inner, ref_out_outer_stride, ref_out_inner_stride, VECTOR) + begin
    )

    upstream = tl.load(GRAD_KL + row)
    count = tl.zeros([], tl.int64) + rows
    top = tl.load(STATS + row)
    others = tl.load(STATS + count + row)
    ref_top = tl.load(STATS + 2 * count + row)
    ref_others = tl.load(STATS + 3 * count + row)
    kl = tl.load(STATS + 4 * count + row)
    if ROW_TEMPERATURE is not None:
        temperature = tl.load(ROW_TEMPERATURE + row)
    if INDEX is not None:
        row = tl.load(INDEX + row)

    if (upstream == 0.0) | (kl == float("inf")):
        zeros = tl.zeros([BACKWARD_DEPTH, BACKWARD_LANES], tl.float32)
        for start in range(0, size, BACKWARD_DEPTH * BACKWARD_LANES):
            inside = start + at < size
            if OUT is not None:
                tl.store(OUT + (out + start) + at, zeros.to(OUT.dtype.element_ty), mask=inside)
            if REF_OUT is not None:
                ref_zeros = zeros.to(REF_OUT.dtype.element_ty)
                tl.store(REF_OUT + (ref_out + start) + at, ref_zeros, mask=inside)
        return

    scale = LOG2E / temperature
    chain = upstream / temperature
    if logit_scale is not None:
        chain *= logit_scale
    # A NaN of the row reaches all of it, even what is -inf in a policy without finite logits.
    p_factor = tl.where(kl == kl, chain / (1.0 + others), kl)
    q_factor = chain / (1.0 + ref_others)
    shift = log_ratio(others, ref_others)
    top = finite(top)
    ref_top = finite(ref_top)
    logits = LOGITS + (row_start(row, inner, outer_stride, inner_stride, VECTOR) + begin)
    ref_start = row_start(row, ref_inner, ref_outer_stride, ref_inner_stride, VECTOR) + begin
    ref_logits = REF_LOGITS + ref_start
    for start in tl.range(0, size, BACKWARD_DEPTH * BACKWARD_LANES, num_stages=STAGES):
        inside = start + at < size
        logit = tl.load(logits + start + at, mask=inside)
        ref_logit = tl.load(ref_logits + start + at, mask=inside)
        fall = scaled(logit, logit_scale, softcap) - top
        ref_fall = scaled(ref_logit, logit_scale, softcap) - ref_top
        # Finite, for callers that ask for p u in rows that the reference rules out.
        u = (fall - ref_fall) * (1.0 / temperature) - shift
        u = tl.minimum(u, 1e30, propagate_nan=tl.PropagateNan.ALL)
        p = tl.exp2(fall * scale) * p_factor
        if OUT is not None:
            grad = tl.where(p == 0.0, 0.0, p * (u - kl))
            grad = cast(unscaled(grad, logit, logit_scale, softcap), OUT.dtype.element_ty)
            tl.store(OUT + (out + start) + at, grad, mask=inside)
        if REF_OUT is not None:
            q = tl.exp2(ref_fall * scale) * q_factor
            grad = tl.where(tl.abs(u) < 1.0, p * (exp_excess(u) - u), q - p)
            grad = cast(unscaled(grad, ref_logit, logit_scale, softcap), REF_OUT.dtype.element_ty)
            tl.store(REF_OUT + (ref_out + start) + at, grad, mask=inside)


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    carry: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(kl, stats); arguments as in rlhf_fast/compiled/full_kl.py."""
    kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    rows, columns = kl.numel(), logits.shape[-1]
    stats = kl.new_empty((5, rows))
    if rows == 0:
        return kl, stats
    policy, reference = rows_of(logits), rows_of(ref_logits)
    row_temperature = flat(row_temperature)
    piece = DEPTH.value * LANES.value
    pieces = (columns + piece - 1) // piece
    partial = kl.new_empty((5, rows, pieces))
    with on_device_of(logits):
        _pieces_kernel[(rows * pieces,)](
            policy.tensor,
            reference.tensor,
            row_temperature,
            partial,
            *policy.layout,
            *reference.layout,
            rows,
            columns,
            pieces,
            temperature,
            softcap or None,
            None if logit_scale == 1.0 else logit_scale,
            VECTOR=vector(policy, reference),
            num_warps=4,
        )
        _merge_kernel[((rows + ROWS.value - 1) // ROWS.value,)](
            row_temperature,
            partial,
            flat(carry),
            kl,
            stats,
            rows,
            pieces,
            temperature,
            SLOTS=slots(pieces),
            num_warps=4,
        )
    return kl, stats


def backward(
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    grad_kl: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    rows: Tensor | None,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """Writes the gradients that are wanted; each may go over its own logits."""
    count, columns = grad_kl.numel(), logits.shape[-1]
    if count == 0 or (out is None and ref_out is None):
        return
    policy, reference = rows_of(logits), rows_of(ref_logits)
    policy_out = policy if out is None else rows_of(out)
    reference_out = reference if ref_out is None else rows_of(ref_out)
    for given, used in ((out, policy_out), (ref_out, reference_out)):
        assert given is None or used.tensor is given, (
            "outputs need unit column stride and at most two row strides"
        )
    pieces = (columns + BACKWARD_PIECE.value - 1) // BACKWARD_PIECE.value
    with on_device_of(logits):
        _backward_kernel[(count * pieces,)](
            policy.tensor,
            reference.tensor,
            stats.contiguous(),
            flat(grad_kl),
            flat(row_temperature),
            flat(rows),
            out,
            ref_out,
            *policy.layout,
            *reference.layout,
            *policy_out.layout,
            *reference_out.layout,
            count,
            columns,
            pieces,
            temperature,
            softcap or None,
            None if logit_scale == 1.0 else logit_scale,
            VECTOR=vector(policy, reference, policy_out, reference_out),
            num_warps=1,
        )
