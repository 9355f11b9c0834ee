"""What the row kernels share: accurate elementary functions, row addressing, merging of sums.

Only `exp2` is taken from Triton in inner loops: on a GPU it is one instruction, and in the
interpreter it exists, which libdevice's functions do not. Kernels import these by name, not through
the module: Inductor copies a kernel's helpers into its own file, and finds them by their names.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

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


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


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


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
