"""Where a gradient may be written: over its input, or into fresh memory."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import compiled


def fresh_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of the shape and on the device of `x`."""
    return compiled.fresh(x.shape, dtype or x.dtype, x.device)


def owns_its_rows(logits: Tensor) -> bool:
    """Whether a kernel may write over `logits [..., V]`: no two elements share memory.

    False under `torch.compile`, which cannot see the write, and for layouts that no kernel
    addresses without a copy.
    """
    if torch.compiler.is_compiling() or logits.ndim > 3 or logits.stride(-1) != 1:
        return False
    reach = logits.shape[-1]
    dims = range(logits.ndim - 1)
    for dim in sorted(dims, key=lambda dim: logits.stride(dim)):
        if logits.shape[dim] > 1:
            if logits.stride(dim) < reach:
                return False
            reach = logits.stride(dim) * (logits.shape[dim] - 1) + reach
    return True
