"""What `linear_logprobs` and `linear_kl` share: heads, their gradients, live rows, checks.

Tiles of logits are made by `product`, folded or differentiated by the row kernels of
`token_logprobs` or `full_kl`, and never joined. The backward goes slice by slice of the vocabulary
so that a slice of the weight's gradient is finished before the next begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.compiled._rows import LIBRARY
from rlhf_fast.ops._memory import fresh_like
from rlhf_fast.ops._plan import Tiles, row_stride
from rlhf_fast.ops._products import product

NO_TOKEN, NO_INDEX = -1, -2  # ids that match no column, and no token


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that products read: autocast's, if it is on, else the widest of the inputs."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return dtype


class Head:
    """One side of a linear op: hidden states [N, D] and the head that makes their logits.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`.
        bias: `[V]` or None.
        dtype: Of the logits and of all sums, fp32 or fp64.
        operand: What the products' inputs are rounded to.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        operand: torch.dtype,
    ) -> None:
        self.weight, self.bias, self.dtype, self.operand = weight, bias, dtype, operand
        # Only a GPU multiplies half precision into fp32; elsewhere rounded operands are widened.
        self.work = operand if hidden.device.type == "cuda" else dtype
        self.hidden = hidden.to(operand).to(self.work)

    def clear_rows(self, live: Tensor) -> None:
        """Makes the rows zero that are not live: what they hold must not reach the weight's
        gradient, not even as 0 * NaN."""
        self.hidden = self.hidden.masked_fill(~live.unsqueeze(-1), 0.0)

    def weight_slice(self, columns: slice) -> Tensor:
        """Rows `columns` of the weight, as products read them."""
        return self.weight[columns].to(self.operand).to(self.work)

    def logits(self, hidden: Tensor, weight: Tensor, columns: slice, out: Tensor) -> Tensor:
        """A tile of raw logits, written into `out`."""
        product(hidden, weight.t(), out)
        return out if self.bias is None else out.add_(self.bias[columns].to(self.dtype))


class Chunk(NamedTuple):
    """Rows that go through together; those of them that are live."""

    rows: slice
    live: Tensor | None
    """Their places within the chunk, or None if all are."""

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """What `x`, with N entries along `dim`, holds for the live rows."""
        x = x.narrow(dim, self.rows.start, self.rows.stop - self.rows.start)
        return x if self.live is None else x.index_select(dim, self.live)


def live_chunks(tiles: Tiles, live: Tensor | None) -> list[Chunk]:
    """The chunks with live rows; `live` is a bool mask [N] that is read once, None if all are."""
    chunks = tiles.row_slices()
    if live is None:
        return [Chunk(rows, None) for rows in chunks]
    counts = torch.stack([live[rows].sum() for rows in chunks]).tolist() if chunks else []
    found = []
    for rows, count in zip(chunks, counts, strict=True):
        if count == rows.stop - rows.start:
            found.append(Chunk(rows, None))
        elif count:
            # A stable sort puts the live rows first, in order, and needs no further read-back.
            order = live[rows].to(torch.int8).argsort(descending=True, stable=True)
            found.append(Chunk(rows, order[:count]))
    return found


def kept_tile(
    kept: Tensor, tiles: Tiles, kept_tiles: int, rows: slice, columns: slice
) -> Tensor | None:
    """The place of a tile in the flat buffer of kept logits; None for a tile that is not kept."""
    slices = len(tiles.column_slices())
    place = rows.start // tiles.row_step * slices + columns.start // tiles.column_step
    if place >= kept_tiles:
        return None
    return as_tile(kept[place * tiles.slot :], rows.stop - rows.start, columns)


def tile_place(
    kept: Tensor, scratch: Tensor, tiles: Tiles, kept_tiles: int, rows: slice, columns: slice
) -> Tensor:
    """Where the forward writes a tile: its place among the kept ones, or the scratch tile."""
    tile = kept_tile(kept, tiles, kept_tiles, rows, columns)
    return as_tile(scratch, rows.stop - rows.start, columns) if tile is None else tile


def scratch_tile(
    tiles: Tiles, dtype: torch.dtype, device: torch.device, needed: bool = True
) -> Tensor:
    """Flat memory for one tile, to be reused; none if no tile needs it."""
    return torch.empty(tiles.slot if needed else 0, dtype=dtype, device=device)


def as_tile(scratch: Tensor, height: int, columns: slice) -> Tensor:
    """The beginning of `scratch` as a tile `[height, width]`, whose rows lie a stride apart."""
    width = columns.stop - columns.start
    stride = row_stride(width)
    return scratch[: height * stride].view(height, stride)[:, :width]


class HeadGradients:
    """Sums the gradients of one head in the statistics' dtype, over slices and chunks.

    Args:
        head: What to differentiate.
        needs: Whether hidden states, weight and bias want a gradient.
        chunks: The chunks that come in every slice.
    """

    def __init__(self, head: Head, needs: Sequence[bool], chunks: list[Chunk]) -> None:
        self.head, self.needs, self.chunks = head, needs, chunks
        self.live_hidden = [chunk.of(head.hidden) for chunk in chunks]
        self._hidden: list[Tensor] = []
        if needs[0]:
            self._hidden = [fresh_like(h, head.dtype) for h in self.live_hidden]
        self._weight = fresh_like(head.weight) if needs[1] else None
        self._bias = None
        if needs[2] and head.bias is not None:
            self._bias = torch.zeros_like(head.bias, dtype=head.dtype)
        if self._weight is not None and not chunks:
            self._weight.zero_()
        self._sums: Tensor  # the weight's gradient in the current slice

    def add(self, i: int, columns: slice, weight: Tensor, grad: Tensor) -> None:
        """Adds what the gradient of a tile of logits gives; chunks in order within a slice.

        Args:
            i: The chunk.
            columns: The slice of the vocabulary.
            weight: Its rows of the weight, as products read them.
            grad: `[live rows of the chunk, columns]`.
        """
        if self._hidden:
            product(grad, weight, self._hidden[i], accumulate=columns.start > 0)
        if self._bias is not None:
            self._bias[columns] += grad.sum(dim=0, dtype=self.head.dtype)
        if self._weight is None:
            return
        target = self._weight[columns]
        if i == 0:
            rounded = target.dtype != self.head.dtype
            self._sums = fresh_like(target, self.head.dtype) if rounded else target
        product(grad.t(), self.live_hidden[i], self._sums, accumulate=i > 0)
        if i == len(self.chunks) - 1 and self._sums.dtype != target.dtype:
            target.copy_(self._sums)

    def result(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `hidden`, weight and bias in their dtypes; empty where none is wanted."""
        grad_hidden = hidden.new_zeros(hidden.shape if self.needs[0] else 0)
        for chunk, grad in zip(self.chunks, self._hidden, strict=bool(self.needs[0])):
            rows = grad_hidden[chunk.rows]
            if chunk.live is None:
                rows.copy_(grad)
            else:
                rows.index_copy_(0, chunk.live, grad.to(hidden.dtype))
        weight = hidden.new_empty(0) if self._weight is None else self._weight
        if self._bias is None or self.head.bias is None:
            return grad_hidden, weight, hidden.new_empty(0)
        return grad_hidden, weight, self._bias.to(self.head.bias.dtype)


def define_op(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `rlhf_fast::<name>`, opaque to `torch.compile`: its loops are not unrolled.

    It runs outside autograd and autocast: the caller has chosen the operands' dtype.
    """

    @functools.wraps(run)
    def implementation(*args: Any) -> Any:
        kind = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return run(*args)

    LIBRARY.define(name + schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rlhf_fast, name).default


def fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """One contiguous tensor like each of `inputs` that needs a gradient, else an empty one."""
    like = next(x for x in inputs if x is not None)
    return tuple(
        like.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip(inputs, needs, strict=True)
    )


def select_rows(x: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Entries `rows` of `x [N, ...]`; `x` itself where one of the two is None."""
    return x if x is None or rows is None else x.index_select(0, rows)


def spread_rows(x: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """`x`, whose entries are rows `rows` of N, with 0 in the others."""
    return x if rows is None else x.new_zeros(N).index_copy(0, rows, x)


def wants_grad(*tensors: Tensor | None) -> list[bool]:
    """Whether autograd will ask for the gradient of each of these."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]
