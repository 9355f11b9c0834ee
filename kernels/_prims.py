"""What the kernels share: accurate elementary functions, addressing, merging of sums, scans.

Only `exp2` is taken from Triton in inner loops: on a GPU it is one instruction, and in the
interpreter it exists, which libdevice's functions do not. Kernels import these by name, not through
the module: Inductor copies a kernel's helpers into its own file, and finds them by their names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Arguments that vary from call to call: none of their values may cost a compilation.
RUN_TIME = [
    *("inner", "outer_stride", "inner_stride", "rows", "columns", "pieces"),
    *("ref_inner", "ref_outer_stride", "ref_inner_stride"),
    *("out_inner", "out_outer_stride", "out_inner_stride"),
    *("ref_out_inner", "ref_out_outer_stride", "ref_out_inner_stride"),
    *("ignore_index", "first_column"),
]
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Exponents of 2 below this give 0, and so does this one: it stands in for -inf, so that e * gap is
# 0 where e is 0, not NaN.
FLOOR = tl.constexpr(-200.0)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LIBRARY = torch.library.Library("rlhf_fast", "FRAGMENT")


@triton.jit
def exp(x):
    """To some |x| roundings."""
    return tl.exp2(x * LOG2E)


@triton.jit
def exp_of_any(x):
    """exp(x) of fp32 x < 88 to 3 roundings, however large |x| is; 0 below -150."""
    x = tl.where(x < -150.0, -150.0, x)
    power = tl.floor(x * LOG2E + 0.5)
    # Of ln 2 first 9 bits, so that their product is exact, then what they leave.
    rest = (x - power * 0.693359375) + power * 2.12194440e-4
    return tl.exp2(power) * tl.exp2(rest * LOG2E)


@triton.jit
def exp_excess(u):
    """exp(-u) - 1 + u for |u| <= 1, to 4 roundings of its value; ~ u^2 / 2 near 0."""
    s = 2.49607801e-05
    s = s * u - 2.03254865e-04
    s = s * u + 1.38913363e-03
    s = s * u - 8.33093002e-03
    s = s * u + 4.16665152e-02
    s = s * u - 1.66666955e-01
    s = s * u + 0.5
    return u * u * s


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 1.0, exp_excess(-x) + x, exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0."""
    u = 1.0 + x
    # What the rounding of u did to a small logarithm is taken back by x / (u - 1).
    small = tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))
    return tl.where(x < 1.0, small, tl.log(u))


@triton.jit
def log_ratio(a, b):
    """log((1 + a) / (1 + b)) for a, b >= 0, without the roundings of two logarithms."""
    x = log1p(tl.abs(a - b) / (1.0 + tl.minimum(a, b)))
    return tl.where(a < b, -x, x)


@triton.jit
def tanh(x):
    """Written so that no kernel can fuse it differently: a row's top is the same number in all."""
    t = x * x
    s = tl.fma(t, -6.28755149e-03, 2.10817326e-02)
    s = tl.fma(s, t, -5.38549535e-02)
    s = tl.fma(s, t, 1.33326143e-01)
    s = tl.fma(s, t, -3.33333194e-01)
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.55, tl.fma(x, t * s, x), tl.where(x < 0.0, -far, far))


@triton.jit
def scaled(logits, logit_scale, softcap):
    """y of raw logits, in fp32: scaled and capped (unless None), not divided by a temperature.

    The fma rounds y: a plain product would be fused into the subtraction of the row's top, and the
    top's own gap would not be exactly 0.
    """
    y = logits.to(tl.float32)
    if logit_scale is not None:
        y = tl.fma(y, logit_scale, 0.0)
    if softcap is not None:
        y = tl.fma(tanh(y / softcap), softcap, 0.0)
    return y


@triton.jit
def unscaled(grad, logits, logit_scale, softcap):
    """The gradient of y turned into that of raw logits, but for the factor `logit_scale`."""
    if softcap is not None:
        y = logits.to(tl.float32)
        if logit_scale is not None:
            y = y * logit_scale
        # 1 / cosh^2 is 1 - tanh^2 without its cancellation.
        s = exp(-2.0 * tl.abs(y / softcap))
        grad = grad * (4.0 * s / ((1.0 + s) * (1.0 + s)))
    return grad


@triton.jit
def finite(top):
    """What to subtract from logits of which `top` is the largest: 0 for -inf, so that exp is 0."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 `x` rounded to `dtype`; of a bfloat16 the interpreter would cut the bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def row_start(row, inner, outer_stride, inner_stride, VECTOR: tl.constexpr):
    """Elements in front of a row, a multiple of VECTOR; int64."""
    outer = row // inner
    start = outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride
    return tl.multiple_of(start, VECTOR)


@triton.jit
def sequence_of(OFFSETS, length):
    """Row, first column and number of tokens of this program's sequence, int64.

    Padded sequences are rows of `length` columns; packed ones, which OFFSETS bound, lie in one row.
    There the first begins at 0 and the last ends at `length`, whatever the offsets say: every token
    is in a sequence, so every output is written, and nothing beyond is.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.zeros([], tl.int64)
    end = begin + length
    if OFFSETS is not None:
        first = tl.load(OFFSETS + row).to(tl.int64)
        last = tl.load(OFFSETS + row + 1).to(tl.int64)
        begin = tl.where(row == 0, begin, tl.minimum(tl.maximum(first, 0), end))
        last = tl.minimum(tl.maximum(last, begin), end)
        end = tl.where(row == tl.num_programs(0) - 1, end, last)
        row = row * 0
    return row, begin, end - begin


@triton.jit
def _then(b0, c0, before_b0, before_c0, b1, c1, before_b1, before_c1):
    """Composes two runs of tokens, the second after the first.

    Each is the map of the whole run (b, c) and that of the run without its last token (before_*),
    which gives the carry that reaches a token out of an inclusive scan.
    """
    return b1 + c1 * b0, c1 * c0, before_b1 + before_c1 * b0, before_c1 * c0


@triton.jit
def scan(b, c, carry, BLOCK: tl.constexpr):
    """Runs `carry` through the maps x -> b + c x of a block: what reaches each token, and the end.

    Args:
        b, c: [BLOCK].
        carry: what reaches the first one.
    """
    zero = tl.zeros_like(b)
    b, c, before_b, before_c = tl.associative_scan((b, c, zero, zero + 1.0), 0, _then)
    last = tl.arange(0, BLOCK) == BLOCK - 1
    return before_b + before_c * carry, tl.sum(tl.where(last, b + c * carry, 0.0), 0)


@triton.jit
def merged_top(tops, others, temperature, PIECES: tl.constexpr):
    """Largest logit and the others' sum of rows, from those of their pieces.

    Args:
        tops, others: [R, PIECES]; -inf and 0 in a piece with nothing in it.
        temperature: [R].

    Returns:
        top [R], others [R], and for each piece [R, PIECES] its gap (its top over temperature, less
        the row's; finite) and weight exp(gap), 0 where it is empty.
    """
    top = tl.max(tops, 1)
    pieces = tl.arange(0, PIECES)[None, :]
    # One largest logit of the row, in the first piece that holds it, is left out.
    lead = tl.min(tl.where(tops == top[:, None], pieces, PIECES), 1)
    empty = tops == -float("inf")
    gaps = tl.where(empty, FLOOR, (tops - top[:, None]) / temperature[:, None])
    weights = tl.where(empty, 0.0, exp(gaps))
    left_out = tl.where(pieces == lead[:, None], 0.0, 1.0)
    return top, tl.sum(weights * (left_out + others), 1), gaps, weights


class Rows(NamedTuple):
    """Rows of a tensor [..., V]."""

    tensor: Tensor
    layout: tuple[int, int, int]
    """inner, outer stride, inner stride: what `row_start` takes."""


def rows_of(x: Tensor) -> Rows:
    """Addresses the rows of `x`; copies it only where two strides and unit columns do not do."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    levels: list[tuple[int, int]] = []  # (rows, stride), innermost first
    for dim in range(x.dim() - 2, -1, -1):
        size, stride = x.shape[dim], x.stride(dim)
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        elif size != 1:
            levels.append((size, stride))
    if len(levels) > 2:
        return rows_of(x.contiguous())
    inner, inner_stride = levels[0] if levels else (1, 0)
    outer_stride = levels[1][1] if len(levels) == 2 else 0
    return Rows(x, (inner, outer_stride, inner_stride))


def vector(*tensors: Rows) -> int:
    """Power of 2 up to 8 that divides the starts of all rows and their length.

    8 bf16 or twice 4 fp32 are a 16-byte access; that base addresses allow it Triton sees itself.
    """
    numbers = [n for x in tensors for n in (x.tensor.shape[-1], *x.layout[1:])]
    return next(power for power in (8, 4, 2, 1) if not any(n % power for n in numbers))


def slots(pieces: int) -> int:
    """Room, a power of 2, for a row's pieces and a carry; the same for all usual vocabularies."""
    return max(128, triton.next_power_of_2(pieces + 1))


def flat(x: Tensor | None) -> Tensor | None:
    """`x`, None or not, as a contiguous vector."""
    return None if x is None else x.contiguous().view(-1)


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its tokens lie side by side (rows may be anywhere), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def scan_block(tokens: Tensor, sequences: int) -> tuple[int, int]:
    """Lanes and warps of a program that scans a sequence, by the mean length."""
    length = tokens.numel() // sequences
    return (64, 1) if length <= 64 else (256, 2) if length <= 256 else (1024, 8)


def byte_mask(mask: Tensor) -> Tensor:
    """A boolean mask as bytes, its tokens side by side."""
    return unit_stride(mask).view(torch.uint8)


def register(name: str, schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Makes `torch.ops.rlhf_fast.triton_<name>` of a launcher.

    torch.compile takes such an op as it is. Into a plain launcher it would look, and neither the
    fp64 numbers that its kernel is declared to take nor a counter that outlives the call survive.
    """
    name = f"triton_{name}"
    LIBRARY.define(name + schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, launcher, key)
    torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rlhf_fast, name).default


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
