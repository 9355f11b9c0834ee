"""How a linear op goes through its logits: tiles, what is kept for the backward, and the cost.

In units of one product of N x D by D x V, with n gradients wanted (of hidden states and weights)
and a fraction r of the rows with an upstream gradient, `linear_logprobs` takes

    recompute 1 + (1 + n) r        keep 1 + n r        direct 2     (n = 1: a frozen head)

and `linear_kl`, with two sides, 2 + (2 + n) r, 2 + n r and 4. `direct` sums the gradient of the
hidden states in the forward, as flash attention sums its output: the backward only scales it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_fast.ops._checks import require, stats_dtype

# The most logits of a tile, and its most rows. Part of the numerics (a product's bits depend on its
# shape), so never derived from the memory at hand. On a CPU a tile stays in the cache; a GPU needs
# large products.
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
TILE_ROWS = {"cpu": 2048, "cuda": 8192}
COLUMN_MULTIPLE = 128
# Rows of a tile lie a multiple of so many elements apart: of 16 bytes in any dtype, as vector loads
# and the fast kernels of matrix products ask. A vocabulary may be odd (one padding token more).
STRIDE_MULTIPLE = 16


@dataclass(frozen=True)
class Tiles:
    """The grid of tiles over the logits `[rows, columns]`."""

    rows: int
    columns: int
    row_step: int
    column_step: int

    def row_slices(self) -> list[slice]:
        """Chunks of rows, from first to last."""
        return _slices(self.rows, self.row_step)

    def column_slices(self) -> list[slice]:
        """Slices of columns, from first to last."""
        return _slices(self.columns, self.column_step)

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.row_slices()) * len(self.column_slices())

    @property
    def slot(self) -> int:
        """Elements between the beginnings of two kept tiles: whole multiples of a cache line.

        Kept or not, a tile begins at the same alignment, on which a kernel's order may depend.
        """
        return _round_up(self.row_step * row_stride(self.column_step), COLUMN_MULTIPLE)


def row_stride(width: int) -> int:
    """Elements from one row of a tile with `width` columns to the next."""
    return _round_up(width, STRIDE_MULTIPLE)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def make_tiles(rows: int, columns: int, device_type: str) -> Tiles:
    """Near-equal tiles that hold at most what the device's tables above say."""
    kind = device_type if device_type in TILE_ROWS else "cpu"
    row_step = _even_step(rows, TILE_ROWS[kind], 1)
    widest = max(COLUMN_MULTIPLE, TILE_ELEMENTS[kind] // max(1, row_step))
    return Tiles(rows, columns, row_step, _even_step(columns, widest, COLUMN_MULTIPLE))


def _even_step(size: int, most: int, multiple: int) -> int:
    """A step that cuts `size` in as few parts as `most` allows, near equal, of whole multiples."""
    parts = max(1, -(-size // most))
    step = -(-size // parts)
    return max(1, min(_round_up(step, multiple), max(size, 1)))


@dataclass(frozen=True)
class LinearPlan:
    """What a call of a linear op will do.

    Attributes:
        route: "forward" (no gradient is wanted), "keep" (all logits are kept for the backward),
            "partial" (some are), "recompute" (none is) or "direct" (the gradient of the hidden
            states is summed in the forward and kept).
        tiles: The grid of tiles.
        kept_tiles: How many tiles are kept.
        bytes: Logits or sums held from the forward to the backward, and the tiles in work. Casts
            and copies of the hidden states come on top.
        products: Matrix products of N x D by D x V, forward and backward, if every row has an
            upstream gradient.
    """

    route: str
    tiles: Tiles
    kept_tiles: int
    bytes: int
    products: float


def make_plan(
    rows: int,
    columns: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    sides: int,
    needs: Sequence[bool],
    entropy_grad: bool,
    memory_budget: int | None,
) -> LinearPlan:
    """The cheapest route that fits `memory_budget`, if all rows have an upstream gradient.

    Args:
        rows: N.
        columns: V.
        width: D of the hidden states whose gradient may be summed in the forward.
        dtype: Of the statistics, fp32 or fp64.
        device: Where.
        sides: 1 for log-probs, 2 for a KL.
        needs: Which gradients are wanted: hidden states, weight and bias of each side in turn.
        entropy_grad: Whether the gradient of an entropy will come.
        memory_budget: Bytes, or None for half of what the device has free.
    """
    tiles = make_tiles(rows, columns, device.type)
    size = torch.finfo(dtype).bits // 8
    scratch = sides * tiles.slot * size
    if not any(needs):
        return LinearPlan("forward", tiles, 0, scratch, float(sides))
    if memory_budget is None:
        memory_budget = free_memory(device) // 2
    gradients = sum(needs[0::3]) + sum(needs[1::3])
    tile, direct = sides * tiles.slot * size, rows * width * size
    kept = tiles.count
    if kept * tile > memory_budget:
        # Only the gradient of the first side's hidden states can be summed in the forward, and
        # not that of an entropy.
        if needs[0] and not any(needs[1:]) and not entropy_grad and direct <= memory_budget:
            return LinearPlan("direct", tiles, 0, direct + 2 * scratch, 2.0 * sides)
        kept = memory_budget // tile
    share = kept / max(1, tiles.count)
    route = "keep" if kept == tiles.count else "partial" if kept else "recompute"
    return LinearPlan(
        route,
        tiles,
        kept,
        kept * tile + 2 * scratch,
        sides + gradients + sides * (1.0 - share),
    )


def plan_linear_logprobs(
    N: int,
    D: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    hidden_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    entropy_grad: bool = False,
    memory_budget: int | None = None,
) -> LinearPlan:
    """What `linear_logprobs` will do with N live rows of width D and a vocabulary of V.

    Args:
        N: Rows that are not ignored (or `live_rows.numel()`).
        D: Width of the hidden states.
        V: Rows of the head.
        dtype: Of the inputs.
        device: Where they are.
        hidden_grad: Whether the hidden states require a gradient.
        weight_grad: Whether the weight does.
        bias_grad: Whether the bias does.
        entropy_grad: As in `linear_logprobs`.
        memory_budget: As in `linear_logprobs`; None asks the device.

    Returns:
        Route, tiles, bytes and products.

    Raises:
        ValueError: A size is negative, or V or D is 0.
    """
    op = "plan_linear_logprobs"
    require(N >= 0 and D > 0 and V > 0, f"{op}: N={N}, D={D}, V={V}; expected N >= 0, D, V > 0")
    check_budget(op, memory_budget)
    return make_plan(
        N,
        V,
        D,
        stats_dtype(dtype),
        torch.device(device),
        sides=1,
        needs=(hidden_grad, weight_grad, bias_grad),
        entropy_grad=entropy_grad,
        memory_budget=memory_budget,
    )


def check_budget(op: str, memory_budget: int | None) -> None:
    """Raises unless `memory_budget` is None or a number of bytes >= 0."""
    require(
        memory_budget is None or memory_budget >= 0,
        f"{op}: memory_budget={memory_budget}; expected None or a number of bytes >= 0",
    )


def free_memory(device: torch.device) -> int:
    """Bytes that `device` can still give, 0 where that is unknown; respects a cgroup v2 limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            lines = (cgroup / "memory.stat").read_text().splitlines()
            cache = next(int(s.split()[1]) for s in lines if s.startswith("inactive_file "))
            used = int((cgroup / "memory.current").read_text()) - cache
            free = min(free, int(limit) - used)
    except (OSError, StopIteration):
        pass
    return max(0, free)
