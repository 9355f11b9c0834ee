"""Tensors between pages that may not be touched: what is out of bounds ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: Tensor, at_end: bool = True) -> Tensor:
    """A contiguous copy of `x` that ends where a guard page begins, or begins where one ends."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    inner = max(1, -(-size // page)) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + inner):
        assert _LIBC.mprotect(guard, page, 0) == 0
    begin = page + (inner - size if at_end else 0)
    if size == 0:
        return x.clone()
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape)
    return copy.copy_(x)


class Guarded(TorchDispatchMode):
    """While it is on, tensors that are allocated are guarded ones, filled with NaN or ones."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in _ALLOCATORS and result.is_contiguous():
            return guarded(result, self.at_end)
        return result


_ALLOCATORS = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "new_empty", "empty_like", "zeros", "new_zeros", "full")
}
