"""Launchers of csrc/token_logprobs.{cpp,cu}, as `torch.ops.rlhf_fast.token_logprobs_*`.

They see the columns `[first_column, first_column + w)` of logits and trust their callers for
shapes and devices. `stats` [4, N] holds, for the columns seen so far, the largest scaled logit, the
sums of `exp(gap)` and `exp(gap) * gap` without it, and the token's raw logit (NaN while its column
has not been seen); `carry` is the stats of the columns before. fp32, or fp64 for fp64 logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.compiled import _rows


def _forward(
    logits: Tensor,
    tokens: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    first_column: int,
    carry: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = logprobs, entropy, stats = _fake_forward(logits, tokens)
    if tokens.numel() == 0:
        return outputs
    logits = _rows.readable(logits)
    tokens = _rows.contiguous(tokens, torch.int64)
    row_temperature = _rows.contiguous(row_temperature, stats.dtype)
    carry = _rows.contiguous(carry, stats.dtype)
    _rows.module(logits).token_logprobs_forward(
        *_rows.rows(logits),
        _rows.DTYPES[logits.dtype],
        *map(_rows.address, (tokens, row_temperature)),
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        first_column,
        *map(_rows.address, (carry, logprobs, entropy, stats)),
        tokens.numel(),
        logits.shape[-1],
        *_rows.runner(logits),
    )
    return outputs


def _backward(
    logits: Tensor,
    tokens: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    first_column: int,
    rows: Tensor | None,
    out: Tensor,
) -> None:
    if tokens.numel() == 0:
        return
    dtype = _rows.stats_dtype(logits)
    logits = _rows.readable(logits)
    tokens, rows = (_rows.contiguous(x, torch.int64) for x in (tokens, rows))
    stats, grad_logprobs, grad_entropy, row_temperature = (
        _rows.contiguous(x, dtype) for x in (stats, grad_logprobs, grad_entropy, row_temperature)
    )
    _rows.module(logits).token_logprobs_backward(
        *_rows.rows(logits),
        _rows.DTYPES[logits.dtype],
        *map(_rows.address, (tokens, stats, grad_logprobs, grad_entropy, row_temperature)),
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        first_column,
        _rows.address(rows),
        *_rows.rows(out),
        _rows.DTYPES[out.dtype],
        tokens.numel(),
        logits.shape[-1],
        *_rows.runner(logits),
    )


def _fake_forward(logits: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _rows.stats_dtype(logits)
    logprobs, entropy, stats = (
        torch.empty(shape, dtype=dtype, device=logits.device)
        for shape in (tokens.shape, tokens.shape, (4, tokens.numel()))
    )
    return logprobs, entropy, stats


forward = _rows.register(
    "token_logprobs_forward",
    "(Tensor logits, Tensor tokens, Tensor? row_temperature, float temperature, float softcap, "
    "float logit_scale, int ignore_index, int first_column, Tensor? carry) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward = _rows.register(
    "token_logprobs_backward",
    "(Tensor logits, Tensor tokens, Tensor stats, Tensor? grad_logprobs, Tensor? grad_entropy, "
    "Tensor? row_temperature, float temperature, float softcap, float logit_scale, "
    "int ignore_index, int first_column, Tensor? rows, Tensor(a!) out) -> ()",
    _backward,
    lambda *_: None,
)
