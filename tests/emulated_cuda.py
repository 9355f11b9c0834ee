"""The CUDA kernels on CPU tensors, under the emulator of tests/emulator, in place of a GPU.

RLHF_FAST_EMULATED_CUDA names the folder of its build (`make test-emulated`). `backend="cuda"` then
runs on a CPU when it is asked for by name, as Triton's interpreter does: through the launchers in
rlhf_fast/compiled, which hand their pointers to the emulated `_cuda`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import backends, compiled
from rlhf_fast.compiled import _losses, _rows, ppo_advantages

BUILD = os.environ.get("RLHF_FAST_EMULATED_CUDA")
RACES = os.environ.get("RLHF_FAST_EMULATED_RACES") == "1"
"""Whether races are errors in all tests of the ops, which then take three times as long."""
ORDERS = ("in order", "reversed", "shuffled")


def library(name: str) -> ctypes.CDLL:
    """`_cuda` or `faults` of the build; each has an emulator of its own."""
    assert BUILD is not None
    found = ctypes.CDLL(str(Path(BUILD).resolve() / f"{name}.so"))
    found.emulator_launches.restype = ctypes.c_long
    found.emulator_configure.argtypes = [
        ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_bool, ctypes.c_bool, ctypes.c_bool
    ]  # fmt: skip
    return found


@contextmanager
def emulator(
    name: str = "_cuda",
    *,
    order: str = "in order",
    seed: int = 0,
    workers: int = 1,
    clusters: bool = True,
    races: bool | None = None,
    noise: bool = True,
) -> Iterator[None]:
    """Launches run as told: see tests/emulator/emulator.h."""
    configure = library(name).emulator_configure
    always = RACES and name == "_cuda"
    races = always if races is None else races
    configure(ORDERS.index(order), seed, workers, clusters, races, noise)
    try:
        yield
    finally:
        configure(0, 0, 1, True, always, True)


def launches() -> int:
    """Kernels that the emulator has run so far."""
    return library("_cuda").emulator_launches()


def devices() -> tuple[int, int]:
    """The device that is selected, and the one that was when the last kernel was launched."""
    _cuda = library("_cuda")
    return _cuda.emulator_device(), _cuda.emulator_launched_on()


def install() -> None:
    """Puts the emulated `_cuda` into the table of backends, for this process."""
    assert BUILD is not None
    path = Path(BUILD) / "_cuda.so"
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compiled.CUDA = module
    library("_cuda").emulator_configure(0, 0, 1, True, RACES, True)

    # One ticket for all, as on a stream: each launch must leave it at 0.
    ticket = torch.zeros(1, dtype=torch.int32)
    for user in (_losses, ppo_advantages):
        user.ticket = lambda device: ticket  # type: ignore[attr-defined]
    emulated = False
    on_gpu, runner = _rows.on_gpu, _rows.runner
    _rows.on_gpu = lambda x: emulated or on_gpu(x)
    _rows.runner = lambda x: (0, 0) if emulated else runner(x)

    def through_emulator(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            nonlocal emulated
            emulated, extension = True, compiled.C
            compiled.C = None
            try:
                return launcher(*args)
            finally:
                emulated, compiled.C = False, extension
                assert ticket.item() == 0, f"a launch left the ticket at {ticket.item()}"
                ticket.zero_()

        return launch

    for impls in backends.TABLE.values():
        if "cuda" in impls:
            impl = impls["cuda"]
            impls["cuda"] = impl._replace(
                forward=through_emulator(impl.forward),
                backward=through_emulator(impl.backward),
                missing=None,
                on_request=("cpu",),
            )
