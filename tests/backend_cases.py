"""Test parameters out of the backend table, and proof that a backend's launcher ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulated_cuda
import pytest
import torch

from rlhf_fast import backends

HAS_GPU = torch.cuda.is_available()


class Case(NamedTuple):
    """A backend's name and the device type to test it on."""

    backend: str
    device: str


def cases(
    op: str,
    *,
    reference: bool = True,
    interpreter: bool = True,
    dtype: torch.dtype | None = None,
) -> list:
    """`pytest.param`s of `Case`, one per way to run `op`; what cannot run here skips, visibly.

    Where RLHF_FAST_EMULATED_CUDA is set the CUDA kernels run in their emulator, not on a GPU.

    Args:
        op: A name of `backends.TABLE`.
        reference: Include the PyTorch reference.
        interpreter: Include Triton's interpreter, which is too slow for long inputs.
        dtype: Leave out backends that do not compute in this dtype.
    """
    params = []
    if reference:
        params.append(pytest.param(Case("reference", "cpu"), id="reference"))
    for name, impl in backends.TABLE[op].items():
        if dtype is not None and dtype not in impl.dtypes:
            continue
        if name == "cpp":
            skip = pytest.mark.skipif(impl.missing is not None, reason=str(impl.missing))
            params.append(pytest.param(Case(name, "cpu"), marks=skip, id=name))
            continue
        if name == "triton" and interpreter and not HAS_GPU:
            skip = pytest.mark.skipif(impl.missing is not None, reason=str(impl.missing))
            params.append(pytest.param(Case(name, "cpu"), marks=skip, id="triton-interpreter"))
        if name == "cuda" and emulated_cuda.BUILD is not None:
            marks = pytest.mark.emulated
            params.append(pytest.param(Case(name, "cpu"), marks=marks, id="cuda-emulated"))
            continue
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


def calls(
    op: str, function: Callable[..., Any], case: Case, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """A fixture's generator: `function` through one backend, arguments moved to its device.

    Results are brought back to the CPU. At the end the backend's launcher must have run.
    """
    counts = None
    if case.backend != "reference":
        counts = count_launches(monkeypatch, op, case.backend)

    def call(*args: Any, **options: Any) -> Any:
        args = tuple(to_device(x, case.device) for x in args)
        options = {name: to_device(x, case.device) for name, x in options.items()}
        return to_cpu(function(*args, backend=case.backend, **options))

    call.case = case  # type: ignore[attr-defined]
    yield call
    assert counts is None or counts["forward"] > 0, f"{case.backend} was never launched"


def to_device(x: Any, device: str) -> Any:
    """`x` on `device`, a view still as a view with the same strides; no tensor: `x` itself."""
    if not isinstance(x, torch.Tensor) or x.device.type == device:
        return x
    return x.to(device) if x._base is None else _MovedView.apply(x, device)


class _MovedView(torch.autograd.Function):
    """A view on another device; its base, which need not require a gradient, is no way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, device: str) -> torch.Tensor:
        assert x._base is not None
        return x._base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.cpu(), None


def to_cpu(result: Any) -> Any:
    """What an op returned, a tensor or tuples and dicts of them, on the CPU."""
    if isinstance(result, torch.Tensor):
        return result.cpu()
    if isinstance(result, dict):
        return {name: to_cpu(x) for name, x in result.items()}
    return tuple(map(to_cpu, result))


# CUPTI's own doings, which not all versions of torch keep apart from the GPU's.
OVERHEAD = ("Activity Buffer Request", "Buffer Flush", "Command Buffer Full", "Instrumentation")
OVERHEAD += ("Lazy Function Loading", "Resource", "Runtime Triggered Module Loading")


def done_on_gpu(run: Callable[[], object]) -> list[str]:
    """Names of what `run` has the GPU do, in order; an error if the host waits for any of it."""
    # The tests' deterministic mode writes NaN into fresh memory, a launch for each.
    torch.use_deterministic_algorithms(False)
    run()  # compiles, and makes what lives on
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == on_gpu]
    return [name for name in names if not name.startswith(OVERHEAD)]
