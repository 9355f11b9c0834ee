r"""`linear_kl`, tile by tile: as `_logprob_tiles`, with the logits of two heads side by side.

With the policy's head frozen and nothing else to differentiate, d KL / d hidden is summed in the
forward. Relative to the largest logits so far, with e_j = exp(gap_j), g_j = gap_j - ref_gap_j and
a_j = dz_j / dl_j,

    d KL / d hidden = sum_j a_j p_j (u_j - KL) W_j = A / (1 + S),
    A = sum_j a_j e_j (g_j - c) W_j,    c = E_p[g] = KL + log1p(S) - log1p(ref S),

c of the columns so far: a tile in half precision then rounds what is added up, not a g that c
cancels. With each slice, gaps and c move: A becomes e^alpha (A + (kappa + c_old - c_new) B) and
B = sum_j a_j e_j W_j becomes e^alpha B, with alpha the change of the policy's gaps and kappa that
of g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import compiled
from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops import token_logprobs
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
from rlhf_fast.ops.full_kl import REFERENCE


def _outputs(
    hidden: Tensor, weight: Tensor, operand: torch.dtype, kept_tiles: int, direct: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = hidden.shape[0], weight.shape[0]
    kept = 0
    if kept_tiles:
        kept = kept_tiles * make_tiles(rows, vocab, hidden.device.type).slot
    shapes = ((rows,), (5, rows), (2, kept), hidden.shape if direct else (0,))
    dtype, device = stats_dtype(operand), hidden.device
    kl, stats, logits, slopes = (compiled.fresh(s, dtype, device) for s in shapes)
    return kl, stats, logits, slopes


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    operand: torch.dtype,
    kept_tiles: int,
    direct: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    outputs = _outputs(hidden, weight, operand, kept_tiles, direct)
    kl, stats, kept, slopes = outputs
    impl = resolve("linear_kl", hidden.device, backend, stats.dtype) or REFERENCE
    assert impl.forward is not None
    scaling = Scaling(row_temperature, temperature, softcap, logit_scale)
    heads = (
        Head(hidden, weight, bias, stats.dtype, operand),
        Head(ref_hidden, ref_weight, ref_bias, stats.dtype, operand),
    )
    tiles = make_tiles(hidden.shape[0], weight.shape[0], hidden.device.type)
    all_kept = kept_tiles == tiles.count
    scratch = [scratch_tile(tiles, stats.dtype, hidden.device, not all_kept) for _ in heads]
    slope = scratch_tile(tiles, heads[0].work, hidden.device, direct)
    for rows in tiles.row_slices():
        part = scaling.rows(rows)
        state: Any = None
        directly = _Direct(impl, heads[0], part, slope, slopes[rows], backend) if direct else None
        for columns in tiles.column_slices():
            weights = [head.weight_slice(columns) for head in heads]
            pair = []
            for side, (head, weight_slice) in enumerate(zip(heads, weights, strict=True)):
                logits = tile_place(kept[side], scratch[side], tiles, kept_tiles, rows, columns)
                pair.append(head.logits(head.hidden[rows], weight_slice, columns, logits))
            kl[rows], state = impl.forward(*pair, *part, state)
            if directly is not None:
                directly.add(pair[0], pair[1], weights[0], columns, state)
        stats[:, rows] = state
        if directly is not None:
            directly.finish(state)
    return outputs


class _Direct:
    """Sums d KL / d hidden of a chunk of rows into `out [R, D]`, beside the forward."""

    def __init__(
        self,
        impl: Impl,
        head: Head,
        scaling: Scaling,
        scratch: Tensor,
        out: Tensor,
        backend: str | None,
    ) -> None:
        self.impl, self.head, self.scaling = impl, head, scaling
        self.scratch, self.out = scratch, out
        logp = resolve("linear_logprobs", out.device, backend, out.dtype)
        self.logp_impl = logp or token_logprobs.REFERENCE
        self.plain = torch.zeros_like(out)  # B; `out` holds A
        self.before: Tensor | None = None
        self.centre: Tensor  # c

    def add(
        self, logits: Tensor, ref_logits: Tensor, weight: Tensor, columns: slice, state: Tensor
    ) -> None:
        """Adds a slice of the vocabulary to A and B."""
        assert self.impl.backward is not None and self.logp_impl.backward is not None
        first = self.before is None
        centre = state[4] + state[1].log1p() - state[3].log1p()
        centre = torch.where(centre.isfinite(), centre, 0.0)  # a KL of +inf has no gradient
        if self.before is not None:
            self._rescale(self.before, state, self.centre - centre)
        self.centre = centre
        # The backward kernels, told that S = 0, write a_j e_j (g_j - "KL") and -(-a_j e_j).
        stats = torch.zeros_like(state)
        stats[0], stats[2], stats[4] = pivot(state[0]), pivot(state[2]), centre
        tile = as_tile(self.scratch, logits.shape[0], columns)
        ones = torch.ones_like(state[0])
        self.impl.backward(logits, ref_logits, stats, ones, *self.scaling, None, tile, None)
        product(tile, weight, self.out, accumulate=not first)
        nothing = torch.full(ones.shape, NO_TOKEN, device=ones.device)
        options = (*self.scaling, NO_INDEX, columns.start, None)
        self.logp_impl.backward(logits, nothing, stats[:4], -ones, None, *options, tile)
        product(tile, weight, self.plain, accumulate=not first)
        self.before = state

    def _rescale(self, before: Tensor, after: Tensor, fall: Tensor) -> None:
        alpha, beta = (self.scaling.divide(before[i] - pivot(after[i])) for i in (0, 2))
        # Not finite only where A and B are 0 or the row's KL is +inf.
        kappa = torch.nan_to_num(alpha - beta, nan=0.0, posinf=0.0, neginf=0.0)
        self.out.addcmul_((kappa + fall).unsqueeze(-1), self.plain)
        for total in (self.out, self.plain):
            total.mul_(alpha.exp().unsqueeze(-1))

    def finish(self, state: Tensor) -> None:
        """Normalises."""
        self.out.div_((1.0 + state[1]).unsqueeze(-1))
        self.out.masked_fill_((state[4] == math.inf).unsqueeze(-1), 0.0)


def _backward(
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    stats: Tensor,
    kept: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    operand: torch.dtype,
    kept_tiles: int,
    skip_dead: bool,
    needs: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, ...]:
    impl = resolve("linear_kl", hidden.device, backend, stats.dtype) or REFERENCE
    backward = impl.backward
    assert backward is not None
    heads = (
        Head(hidden, weight, bias, stats.dtype, operand),
        Head(ref_hidden, ref_weight, ref_bias, stats.dtype, operand),
    )
    wanted = (needs[:3], needs[3:])
    tiles = make_tiles(hidden.shape[0], weight.shape[0], hidden.device.type)
    live = grad_kl != 0
    chunks = live_chunks(tiles, live if skip_dead else None)
    if not skip_dead:
        for head in heads:
            head.clear_rows(live)
    gradients = [HeadGradients(h, n, chunks) for h, n in zip(heads, wanted, strict=True)]
    inputs = [
        (
            chunk.of(stats, 1),
            chunk.of(grad_kl),
            None if row_temperature is None else chunk.of(row_temperature),
            temperature,
            softcap,
            logit_scale,
        )
        for chunk in chunks
    ]
    all_kept = kept_tiles == tiles.count
    scratch = [scratch_tile(tiles, stats.dtype, hidden.device, not all_kept) for _ in heads]
    separate = heads[0].work != stats.dtype or kept_tiles > 0
    grad_scratch = [
        scratch_tile(tiles, head.work, hidden.device, any(need)) if separate else tile
        for head, tile, need in zip(heads, scratch, wanted, strict=True)
    ]

    def tile_pair(i: int, weights: list[Tensor], columns: slice) -> tuple[list[Tensor], bool]:
        """Both sides' logits of a chunk; True if they were kept, of all its rows."""
        kept_pair = [kept_tile(k, tiles, kept_tiles, chunks[i].rows, columns) for k in kept]
        if kept_pair[0] is not None and kept_pair[1] is not None:
            return [kept_pair[0], kept_pair[1]], True
        live = [g.live_hidden[i] for g in gradients]
        pair = [as_tile(s, live[0].shape[0], columns) for s in scratch]
        for side, head in enumerate(heads):
            head.logits(live[side], weights[side], columns, pair[side])
        return pair, False

    for columns in tiles.column_slices() if chunks else ():
        weights = [head.weight_slice(columns) for head in heads]
        for i, chunk in enumerate(chunks):
            pair, were_kept = tile_pair(i, weights, columns)
            height = gradients[0].live_hidden[i].shape[0]
            outs = [
                as_tile(tile, height, columns) if any(need) else None
                for tile, need in zip(grad_scratch, wanted, strict=True)
            ]
            backward(*pair, *inputs[i], chunk.live if were_kept else None, *outs)
            for side, out in enumerate(outs):
                if out is not None:
                    gradients[side].add(i, columns, weights[side], out)
    return *gradients[0].result(hidden), *gradients[1].result(ref_hidden)


def _fake_forward(hidden: Tensor, weight: Tensor, *options: object) -> tuple[Tensor, ...]:
    *_, operand, kept_tiles, direct, _ = options
    assert isinstance(operand, torch.dtype) and isinstance(kept_tiles, int)
    return _outputs(hidden, weight, operand, kept_tiles, bool(direct))


def _fake_backward(grad_kl: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return fake_gradients(inputs[:6], inputs[-2])


_HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, "
    "Tensor? ref_bias"
)
_OPTIONS = (
    "Tensor? row_temperature, float temperature, float softcap, float logit_scale, "
    "ScalarType operand, int kept_tiles"
)
forward = define_op(
    "linear_kl_forward",
    f"({_HEADS}, {_OPTIONS}, bool direct, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward = define_op(
    "linear_kl_backward",
    f"(Tensor grad_kl, {_HEADS}, Tensor stats, Tensor kept, {_OPTIONS}, bool skip_dead, "
    "bool[] needs, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
