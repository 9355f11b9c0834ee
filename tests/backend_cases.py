"""Test parameters out of the backend table, and proof that a backend's launcher ran."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch

from rlhf_fast import backends

HAS_GPU = torch.cuda.is_available()


class Case(NamedTuple):
    """A backend's name and the device type to test it on."""

    backend: str
    device: str


def cases(op: str, *, reference: bool = True, interpreter: bool = True) -> list:
    """`pytest.param`s of `Case`, one per way to run `op`; what cannot run here skips, visibly.

    Args:
        op: A name of `backends.TABLE`.
        reference: Include the PyTorch reference.
        interpreter: Include Triton's interpreter, which is too slow for long inputs.
    """
    params = []
    if reference:
        params.append(pytest.param(Case("reference", "cpu"), id="reference"))
    for name, impl in backends.TABLE[op].items():
        if name == "cpp":
            skip = pytest.mark.skipif(impl.missing is not None, reason=str(impl.missing))
            params.append(pytest.param(Case(name, "cpu"), marks=skip, id=name))
            continue
        if name == "triton" and interpreter and not HAS_GPU:
            skip = pytest.mark.skipif(impl.missing is not None, reason=str(impl.missing))
            params.append(pytest.param(Case(name, "cpu"), marks=skip, id="triton-interpreter"))
        skip = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
        params.append(
            pytest.param(Case(name, "cuda"), marks=[pytest.mark.gpu, skip], id=f"{name}-gpu")
        )
    return params


def count_launches(monkeypatch: pytest.MonkeyPatch, op: str, backend: str) -> Counter[str]:
    """Counts the calls of `op`'s forward and backward launchers of `backend` from here on."""
    launches: Counter[str] = Counter()
    impl = backends.TABLE[op][backend]

    def counting(name: str):
        launcher = getattr(impl, name)

        def launch(*args):
            launches[name] += 1
            return launcher(*args)

        return launch

    counted = impl._replace(forward=counting("forward"), backward=counting("backward"))
    monkeypatch.setitem(backends.TABLE[op], backend, counted)
    return launches
