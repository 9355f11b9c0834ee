"""What the benchmarks share: how a call is timed, its peak memory, and the tables.

A round on a CPU is wall time, allocating and freeing what the call returns included. On a GPU it is
the time between two CUDA events. Each round's set-up queues work ahead of the first one (inputs
restored, the L2 cache flushed), and the host's own time hides behind it; pytest-benchmark's columns
hold the wait for that work too, the Markdown tables don't.

Peak memory is what a call adds to what was there before it: resident pages at the kernel's
high-water mark on a CPU (whoever allocates them: torch, MKL, our C++), the caching allocator's on a
GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from _bars import Bar, Row, verdicts
from torch import Tensor

from rlhf_fast import backends

GPU = "cuda"
FLUSHED_BYTES = 1 << 30  # many times any L2; 0.2 ms of an H200 for the host to run ahead
SCALES = {"MB": 1e6, "GFLOP": 1e9, "tokens": 1.0}

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@dataclass
class Report:
    """The rows of one benchmark file, by table.

    Attributes:
        floor: The best rate (work over best time) of these is the most that this machine gives.
        unit: Of the work: "MB", "GFLOP" or "tokens".
        rivals: Who gets a column of ratios.
        bars: What we ask.
    """

    floor: tuple[str, ...]
    unit: str
    rivals: tuple[str, ...]
    bars: tuple[Bar, ...] = ()
    tables: dict[str, dict[str, Row]] = field(default_factory=lambda: defaultdict(dict))

    def measure(
        self,
        benchmark: Any,
        title: str,
        name: str,
        run: Callable[[], object],
        *,
        device: str,
        work: float,
        rounds: int,
        warmup: int = 1,
        setup: Callable[[], None] = lambda: None,
        returned: int = 0,
    ) -> None:
        """Times `run` after `setup`, `rounds` times, and adds it to the table `title`.

        Args:
            work: Bytes or FLOPs that the op cannot avoid, or tokens that it makes.
            returned: Bytes of the gradients that `run` allocates and returns.
        """
        if device == GPU:
            times = gpu_rounds(benchmark, run, setup, rounds, warmup)
        else:
            benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=warmup)
            times = benchmark.stats.stats.data
        setup()
        peak = peak_memory(run, device)
        self.tables[title][name] = row = Row(median(times), min(times), work, peak, returned)
        # Beside the table: a run that is killed has said what it found.
        took = f"median {_ms(row.median)} ms, best {_ms(row.best)} ms"
        print(f"\n{title}: {name}: {took}, peak {_mb(row)} MB", flush=True)

    def markdown(self) -> str:
        return "\n\n".join(self._table(title) for title in self.tables)

    def _table(self, title: str) -> str:
        rows = self.tables[title]
        rivals = [name for name in self.rivals if name in rows]
        head = ["", "median, ms", "best, ms"]
        head += [f"{rival} / this, median (best)" for rival in rivals]
        head += [f"must do, {self.unit}", f"{self.unit}/s, best"]
        head += ["share of floor, best", "peak, MB (less gradients)"]
        top, fastest = max(((rows[n].rate, n) for n in self.floor if n in rows), default=(0, ""))
        scale = SCALES[self.unit]
        lines = [head, ["---"] * len(head)]
        for name, row in rows.items():
            cells = [name, _ms(row.median), _ms(row.best)]
            for rival in rivals:
                by_median, by_best = rows[rival].median / row.median, rows[rival].best / row.best
                cells.append(f"{by_median:.2f} ({by_best:.2f})")
            cells += [f"{x / scale:.4g}" for x in (row.work, row.rate)]
            cells.append(f"{row.rate / top:.0%}" if top else "-")
            lines.append([*cells, _mb(row)])
        text = f"## {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        if top:
            text += f"\n\nFloor: {fastest}, at {top / scale:.4g} {self.unit}/s.\n"
        asked = [line for bar in self.bars if bar.where in title for line in verdicts(bar, rows)]
        return text + "".join(f"\n- {line}" for line in asked)


class Rows:
    """Figures of whole runs, a row each; rows of a table have the same columns."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)

    def add(self, title: str, name: str, row: dict[str, float]) -> None:
        self.tables[title][name] = row
        print(f"\n{title}: {name}: {row}", flush=True)

    def markdown(self) -> str:
        return "\n\n".join(map(self._table, self.tables))

    def _table(self, title: str) -> str:
        rows = self.tables[title]
        columns = list(next(iter(rows.values())))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        lines += [[name, *(f"{row[c]:.4g}" for c in columns)] for name, row in rows.items()]
        return f"## {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def _mb(row: Row) -> str:
    return "-" if row.peak is None else f"{row.peak / 1e6:.1f} ({row.scratch / 1e6:.1f})"


def gpu_rounds(
    benchmark: Any,
    run: Callable[[], object],
    setup: Callable[[], None],
    rounds: int,
    warmup: int,
) -> list[float]:
    """Seconds of each round between CUDA events, warm-up left out."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=GPU)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []

    def prepare() -> None:
        setup()
        flushed.zero_()

    def timed() -> None:
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)

    benchmark.pedantic(timed, setup=prepare, rounds=rounds, warmup_rounds=warmup)
    return times[-rounds:]


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes that `run` has at its peak on top of what is there; None where that can't be read.

    It must have run before: what a first call sets up for good (thread pools, workspaces) does not
    count.
    """
    if device == GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Freed pages that glibc still holds would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(s.split()[1]) * 1024 for s in lines if s.startswith(f"{name}:"))


PRODUCTS = ("product: logits", "product: d hidden")


def product(name: str, hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    """One of `PRODUCTS`, into memory that is there already: 2 N D V FLOPs.

    The second one writes little, where a CPU's first is held up by the logits that it writes.
    """
    logits, out = hidden @ weight.T, torch.empty_like(hidden)
    if name == PRODUCTS[0]:
        return lambda: torch.mm(hidden, weight.T, out=logits)
    return lambda: torch.mm(logits, weight, out=out)


def place(device: str, threads: int) -> str:
    """Sets torch's threads; the device in words, with torch's version."""
    torch.set_num_threads(threads)
    where = torch.cuda.get_device_name() if device == GPU else f"{threads} thread(s)"
    if device != GPU and os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        where += ", huge pages for torch"
    return f"{where}, torch {torch.__version__}"


def versions(*distributions: str) -> str:
    """Of those that are installed, in words."""
    found = []
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def require_backend(op: str, backend: str) -> None:
    """Skips, with the reason, where `backend` cannot run `op`."""
    if backend == "reference":
        return
    impl = backends.TABLE[op].get(backend)
    if impl is None:
        pytest.skip(f"{op} has no backend {backend}")
    if impl.missing is not None:
        pytest.skip(impl.missing)


def check(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises unless `got` is as near to `expected` as `tolerance`, relative, in norm."""
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, not {expected.shape}"
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error <= tolerance, f"{what} is {error:.2g} off the reference, relative"
