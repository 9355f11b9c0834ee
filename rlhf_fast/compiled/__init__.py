"""The compiled extensions: `_C` (CPU, C++ and OpenMP) and `_cuda`, and why one is absent.

Both are optional. They know no torch: the launchers in this package check tensors, hand over
pointers, sizes and strides, and register the result with `torch.library`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

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
