"""What vLLM changes in the process that it runs in, and how it is kept."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def gpus() -> Sequence[int]:
    """Devices whose generators are there to be kept."""
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps what vLLM's start changes process-wide.

    It seeds all generators with 0, resets the precision of fp32 products, leaves variables in the
    environment that child processes inherit, and freezes the garbage collector's heap; on a CPU it
    exchanges `torch.set_num_threads` for a function that does nothing. Its own variables stay.
    """
    python, arrays, environment = random.getstate(), numpy.random.get_state(), dict(os.environ)
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    frozen = gc.get_freeze_count()
    try:
        with torch.random.fork_rng(gpus()):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        if not frozen:
            gc.unfreeze()
        for name in os.environ.keys() | environment.keys():
            if not name.startswith("VLLM_"):
                _put(name, environment.get(name))


@contextmanager
def in_this_process() -> Iterator[None]:
    """vLLM's core without a process of its own: weights pass by reference, memory is shared."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        _put(name, before)


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def default_group_kept() -> Iterator[None]:
    """vLLM ends with all process groups of the process, the trainer's among them."""
    destroy = torch.distributed.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_others
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def free_cache(device: torch.device) -> None:
    """Gives back what torch's allocator keeps of a GPU: vLLM takes its memory from the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
