"""Every matrix product of the linear ops goes through here, and can be counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ProductCount:
    """What ran inside `count_products`."""

    calls: int = 0
    """Matrix products."""
    flops: int = 0
    """Their floating-point operations, two for a multiply-add."""


_counts: list[ProductCount] = []


@contextmanager
def count_products() -> Iterator[ProductCount]:
    """Counts the matrix products of the linear ops, forward and backward, until it exits.

    PyTorch's own counter (`torch.utils.flop_counter`) sees nothing inside an opaque op. Nested
    counters each count everything; those of all threads count together.

        with count_products() as counted:
            logprobs, entropy = linear_logprobs(hidden, weight, tokens)
        counted.flops / (2 * N * D * V)   # 1.0
    """
    count = ProductCount()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """`out = a @ b`, or `out += a @ b`; summed in the dtype of `out`, fp32 or fp64.

    Args:
        a: `[m, k]`, in the dtype of `out` or in half precision.
        b: `[k, n]`, the same.
        out: `[m, n]`.
        accumulate: add to `out` instead of overwriting it.
    """
    for count in _counts:
        count.calls += 1
        count.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if a.dtype == b.dtype != out.dtype and out.device.type == "cuda":
        # Tensor cores read half precision and leave their fp32 sums unrounded.
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
