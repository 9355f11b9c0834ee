r"""`linear_logprobs`, tile by tile: the loops around the products and the row kernels.

Forward: a product makes a tile of logits, the row kernel of `token_logprobs` folds it into the
statistics of its rows. Backward: the tile is kept, or made again; the row kernel turns it into
dL/dl, which two products carry to weight and hidden states.

With a frozen head the gradient of a hidden state is linear in one upstream number,

    d logp / d hidden = sum_j (dz_j / dl_j) (d logp / d z_j) W_j
                      = a_t (-expm1(logp)) W_t - (sum_{j != t} a_j e_j W_j) / (1 + S)

with a_j = dz_j / dl_j and e_j = exp(z_j - z_max). `_Direct` sums it beside the statistics, rescaled
whenever the largest logit grows, and the backward is a product with a number per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import compiled
from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops._checks import stats_dtype
from rlhf_fast.ops._linear import (
    NO_INDEX,
    NO_TOKEN,
    Head,
    HeadGradients,
    as_tile,
    define_op,
    fake_gradients,
    kept_tile,
    live_chunks,
    scratch_tile,
    tile_place,
)
from rlhf_fast.ops._plan import make_tiles
from rlhf_fast.ops._products import product
from rlhf_fast.ops._softmax import Scaling, pivot
from rlhf_fast.ops.token_logprobs import REFERENCE


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    operand: torch.dtype,
    kept_tiles: int,
    direct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = hidden.shape[0], weight.shape[0]
    kept = 0
    if kept_tiles:
        kept = kept_tiles * make_tiles(rows, vocab, hidden.device.type).slot
    shapes = ((rows,), (rows,), (4, rows), (kept,), hidden.shape if direct else (0,))
    dtype, device = stats_dtype(operand), hidden.device
    first, second, third, fourth, fifth = (compiled.fresh(shape, dtype, device) for shape in shapes)
    return first, second, third, fourth, fifth


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    operand: torch.dtype,
    kept_tiles: int,
    direct: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    outputs = _outputs(hidden, weight, operand, kept_tiles, direct)
    logprobs, entropy, stats, kept, slopes = outputs
    impl = resolve("linear_logprobs", hidden.device, backend, stats.dtype) or REFERENCE
    assert impl.forward is not None
    scaling = Scaling(row_temperature, temperature, softcap, logit_scale)
    head = Head(hidden, weight, bias, stats.dtype, operand)
    tiles = make_tiles(hidden.shape[0], weight.shape[0], hidden.device.type)
    scratch = scratch_tile(tiles, stats.dtype, hidden.device, kept_tiles < tiles.count)
    separate = direct and head.work != stats.dtype
    e = scratch_tile(tiles, head.work, hidden.device) if separate else scratch
    for rows in tiles.row_slices():
        ids, part = tokens[rows], scaling.rows(rows)
        state: Any = None
        directly = _Direct(impl, head, ids, part, e, slopes[rows]) if direct else None
        for columns in tiles.column_slices():
            weight_slice = head.weight_slice(columns)
            logits = tile_place(kept, scratch, tiles, kept_tiles, rows, columns)
            head.logits(head.hidden[rows], weight_slice, columns, logits)
            options = (*part, ignore_index, columns.start)
            logprobs[rows], entropy[rows], state = impl.forward(logits, ids, *options, state)
            if directly is not None:
                directly.add(logits, weight_slice, columns, state)
        stats[:, rows] = state
        if directly is not None:
            directly.finish(logprobs[rows], state, ids == ignore_index)
    return outputs


class _Direct:
    """Sums d logprobs / d hidden of a chunk of rows into `out [R, D]`, beside the forward."""

    def __init__(
        self, impl: Impl, head: Head, tokens: Tensor, scaling: Scaling, scratch: Tensor, out: Tensor
    ) -> None:
        self.impl, self.head, self.tokens, self.scaling = impl, head, tokens, scaling
        self.scratch, self.out = scratch, out
        self.top: Tensor | None = None

    def add(self, logits: Tensor, weight: Tensor, columns: slice, state: Tensor) -> None:
        """Adds a slice: `out` is then sum a_j e_j W_j, relative to the largest logit so far."""
        assert self.impl.backward is not None
        # The backward kernel of logp writes -p_j; with S = 0 in its statistics that is -e_j.
        stats = torch.zeros_like(state)
        stats[0] = top = pivot(state[0])
        upstream, nothing = torch.full_like(top, -1.0), torch.full_like(self.tokens, NO_TOKEN)
        e = as_tile(self.scratch, self.tokens.shape[0], columns)
        options = (*self.scaling, NO_INDEX, columns.start, None)
        self.impl.backward(logits, nothing, stats, upstream, None, *options, e)
        column = self.tokens - columns.start
        here = (column >= 0) & (column < logits.shape[1])
        index = torch.where(here, column, 0).unsqueeze(-1)
        e.scatter_(-1, index, e.gather(-1, index).masked_fill_(here.unsqueeze(-1), 0.0))
        if self.top is not None:
            self.out.mul_(self.scaling.divide(self.top - top).exp_().unsqueeze(-1))
        product(e, weight, self.out, accumulate=self.top is not None)
        # -inf as long as nothing was possible: the sum is 0 then, and stays it.
        self.top = state[0].clone()

    def finish(self, logprobs: Tensor, state: Tensor, ignored: Tensor) -> None:
        """Normalises, and adds the token's own term."""
        dtype = self.out.dtype
        known = torch.where(state[3].isnan(), 0, self.tokens)
        weight = self.head.weight[torch.where(ignored, 0, known)]
        weight = weight.to(self.head.operand).to(dtype)
        at_token = -logprobs.expm1() * self.scaling.slope(state[3], dtype)
        at_token = self.scaling.divide(at_token).unsqueeze(-1) * weight
        total = at_token - self.out / (1.0 + state[1]).unsqueeze(-1)
        self.out.copy_(total.masked_fill_(ignored.unsqueeze(-1), 0.0))


def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    stats: Tensor,
    kept: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    operand: torch.dtype,
    kept_tiles: int,
    skip_dead: bool,
    needs: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    impl = resolve("linear_logprobs", hidden.device, backend, stats.dtype) or REFERENCE
    backward = impl.backward
    assert backward is not None
    scaling = Scaling(row_temperature, temperature, softcap, logit_scale)
    head = Head(hidden, weight, bias, stats.dtype, operand)
    tiles = make_tiles(hidden.shape[0], weight.shape[0], hidden.device.type)
    upstream = [g for g in (grad_logprobs, grad_entropy) if g is not None]
    live = torch.stack([g != 0 for g in upstream]).any(dim=0) & (tokens != ignore_index)
    chunks = live_chunks(tiles, live if skip_dead else None)
    if not skip_dead:
        head.clear_rows(live)
    gradients = HeadGradients(head, needs, chunks)
    inputs = [
        (
            chunk.of(tokens),
            chunk.of(stats, 1),
            *(None if g is None else chunk.of(g) for g in (grad_logprobs, grad_entropy)),
            None if row_temperature is None else chunk.of(row_temperature),
            *scaling[1:],
            ignore_index,
        )
        for chunk in chunks
    ]
    scratch = scratch_tile(tiles, stats.dtype, hidden.device, kept_tiles < tiles.count)
    separate = head.work != stats.dtype or kept_tiles > 0
    grad_scratch = scratch_tile(tiles, head.work, hidden.device) if separate else scratch

    for columns in tiles.column_slices() if chunks else ():
        weight_slice = head.weight_slice(columns)
        for i, chunk in enumerate(chunks):
            live_hidden, index = gradients.live_hidden[i], chunk.live
            logits = kept_tile(kept, tiles, kept_tiles, chunk.rows, columns)
            if logits is None:
                logits, index = as_tile(scratch, live_hidden.shape[0], columns), None
                head.logits(live_hidden, weight_slice, columns, logits)
            grad = as_tile(grad_scratch, live_hidden.shape[0], columns)
            backward(logits, *inputs[i], columns.start, index, grad)
            gradients.add(i, columns, weight_slice, grad)
    return gradients.result(hidden)


def _fake_forward(hidden: Tensor, weight: Tensor, *options: object) -> tuple[Tensor, ...]:
    *_, operand, kept_tiles, direct, _ = options
    assert isinstance(operand, torch.dtype) and isinstance(kept_tiles, int)
    return _outputs(hidden, weight, operand, kept_tiles, bool(direct))


def _fake_backward(grad_logprobs: Tensor, grad_entropy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return fake_gradients(inputs[:3], inputs[-2])


_OPTIONS = (
    "Tensor? row_temperature, float temperature, float softcap, float logit_scale, "
    "int ignore_index, ScalarType operand, int kept_tiles"
)
forward = define_op(
    "linear_logprobs_forward",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, {_OPTIONS}, bool direct, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward = define_op(
    "linear_logprobs_backward",
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    f"Tensor tokens, Tensor stats, Tensor kept, {_OPTIONS}, bool skip_dead, bool[] needs, "
    "str? backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
