"""Launchers of csrc/kl.{cpp,cu}, as `torch.ops.rlhf_fast.full_kl_*`.

They see a range of columns of both logits and trust their callers for shapes and devices. `stats`
[5, N] holds, for the columns seen so far, the largest scaled logit and the sum of `exp(gap)`
without it, the same two of the reference, and the KL between the distributions over those columns;
`carry` is the stats of the columns before. fp32, or fp64 if either logits are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.compiled import _rows


def _forward(
    logits: Tensor,
    ref_logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    carry: Tensor | None,
) -> tuple[Tensor, Tensor]:
    outputs = kl, stats = _fake_forward(logits, ref_logits)
    if kl.numel() == 0:
        return outputs
    logits, ref_logits = _one_dtype(logits, ref_logits)
    row_temperature = _rows.contiguous(row_temperature, stats.dtype)
    carry = _rows.contiguous(carry, stats.dtype)
    _rows.module(logits).full_kl_forward(
        *_rows.rows(logits),
        *_rows.rows(ref_logits),
        _rows.DTYPES[logits.dtype],
        _rows.address(row_temperature),
        temperature,
        softcap,
        logit_scale,
        *map(_rows.address, (carry, kl, stats)),
        kl.numel(),
        logits.shape[-1],
        *_rows.runner(logits),
    )
    return outputs


def _backward(
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    grad_kl: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    rows: Tensor | None,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    if grad_kl.numel() == 0:
        return
    dtype = _rows.stats_dtype(logits, ref_logits)
    logits, ref_logits = _one_dtype(logits, ref_logits)
    stats, grad_kl, row_temperature = (
        _rows.contiguous(x, dtype) for x in (stats, grad_kl, row_temperature)
    )
    rows = _rows.contiguous(rows, torch.int64)
    # Kernels write one dtype, on a CPU that of the logits; any other goes through a copy.
    dtypes = {x.dtype for x in (out, ref_out) if x is not None}
    direct = len(dtypes) == 1 and _rows.on_gpu(logits)
    out_dtype = dtypes.pop() if direct else logits.dtype
    written = [
        x if x is None or x.dtype == out_dtype else torch.empty_like(x, dtype=out_dtype)
        for x in (out, ref_out)
    ]
    _rows.module(logits).full_kl_backward(
        *_rows.rows(logits),
        *_rows.rows(ref_logits),
        _rows.DTYPES[logits.dtype],
        *map(_rows.address, (stats, grad_kl, row_temperature)),
        temperature,
        softcap,
        logit_scale,
        _rows.address(rows),
        *_rows.rows(written[0]),
        *_rows.rows(written[1]),
        _rows.DTYPES[out_dtype],
        grad_kl.numel(),
        logits.shape[-1],
        *_rows.runner(logits),
    )
    for wanted, x in zip((out, ref_out), written, strict=True):
        if wanted is not None and x is not None and x is not wanted:
            wanted.copy_(x)


def _one_dtype(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype, rows readable."""
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    return _rows.readable(logits.to(dtype)), _rows.readable(ref_logits.to(dtype))


def _fake_forward(logits: Tensor, ref_logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = _rows.stats_dtype(logits, ref_logits)
    kl = torch.empty(logits.shape[:-1], dtype=dtype, device=logits.device)
    # Tensor.numel, unlike Size.numel, leaves a compiled graph open to other lengths.
    return kl, kl.new_empty((5, kl.numel()))


forward = _rows.register(
    "full_kl_forward",
    "(Tensor logits, Tensor ref_logits, Tensor? row_temperature, float temperature, "
    "float softcap, float logit_scale, Tensor? carry) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward = _rows.register(
    "full_kl_backward",
    "(Tensor logits, Tensor ref_logits, Tensor stats, Tensor grad_kl, Tensor? row_temperature, "
    "float temperature, float softcap, float logit_scale, Tensor? rows, Tensor(a!)? out, "
    "Tensor(b!)? ref_out) -> ()",
    _backward,
    lambda *_: None,
)
