"""The compiled extensions: `_C` (CPU, C++ and OpenMP) and `_cuda`, and why one is absent.

Both are optional. They know no torch: the launchers in this package check tensors, hand over
pointers, sizes and strides, and register the result with `torch.library`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

_HUGE = 1 << 22
"""Bytes from which a buffer holds whole huge pages wherever it starts."""
_REBUILD = "then reinstall: `pip install .` in a checkout, or `pip install -e .` while developing"


def _load(name: str, needs: str) -> tuple[ModuleType | None, str | None]:
    """Imports `rlhf_fast.<name>`; returns it, or None and the reason with its remedy."""
    if find_spec(f"rlhf_fast.{name}") is None:
        return None, f"rlhf_fast.{name} was not built at install time; install {needs}, {_REBUILD}"
    try:
        return import_module(f"rlhf_fast.{name}"), None
    except ImportError as error:
        return None, f"rlhf_fast.{name} is there but does not load ({error}); {_REBUILD}"


C, C_MISSING = _load("_C", "a C++17 compiler with OpenMP (g++ or clang)")
CUDA, CUDA_MISSING = _load("_cuda", "the CUDA toolkit (nvcc on the PATH) and a C++17 compiler")


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor for a kernel to fill, in huge pages where it is large.

    On a CPU the first touch of 4 KiB pages takes longer than computing what goes there.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if C is not None and out.device.type == "cpu" and not torch.compiler.is_compiling():
        if type(out) is Tensor and out.nbytes >= _HUGE:
            C.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
