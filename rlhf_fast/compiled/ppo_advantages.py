"""Launchers of csrc/ppo_advantages.cpp and .cu, as `torch.ops.rlhf_fast.ppo_advantages_*`.

They trust `rlhf_fast.ops.ppo_advantages` for shapes, dtypes and devices. `logprobs`,
`ref_logprobs`, `values`, `mask` are [B, T], or [N] with `cu_seqlens` [B + 1] int32; `scores`,
`gamma`, `lam`, `value_lam` and the bool `finished` are [B], and where a coefficient is None a
number stands for all (a negative `value_lam_value` for none). Floating tensors share one dtype,
fp32 or fp64; `mask` is bool and True where a token counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.compiled import _rows
from rlhf_fast.compiled._rows import (
    address,
    contiguous,
    register,
    sequences,
    token_rows,
    unit_stride,
    unwritten,
)
from rlhf_fast.kernels._schemas import SCHEMAS
from rlhf_fast.kernels._ticket import ticket


def _forward(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    gamma: Tensor | None,
    lam: Tensor | None,
    value_lam: Tensor | None,
    finished: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma_value: float,
    lam_value: float,
    value_lam_value: float,
    adaptive_lam: float,
    kl_coef: float,
    missing_eos_penalty: float,
    with_moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = map(unit_stride, (logprobs, ref_logprobs, values, mask))
    logprobs, ref_logprobs, values, mask = tokens
    per_sequence = map(contiguous, (scores, gamma, lam, value_lam, finished, cu_seqlens))
    scores, gamma, lam, value_lam, finished, cu_seqlens = per_sequence
    advantages, returns, rewards = unwritten(3, logprobs, cu_seqlens)
    batch = sequences(logprobs, cu_seqlens)
    moments = _moments(logprobs, batch)
    scratch: tuple[Tensor, ...] = ()
    if _rows.on_gpu(logprobs):
        scratch = (moments.new_empty(4 * batch), ticket(logprobs.device))
    _rows.module(logprobs).ppo_advantages_forward(
        address(scores),
        *token_rows(logprobs),
        *token_rows(ref_logprobs),
        *token_rows(values),
        *token_rows(mask),
        *(address(gamma), gamma_value, address(lam), lam_value),
        *(address(value_lam), value_lam_value, adaptive_lam),
        *(kl_coef, address(finished), missing_eos_penalty),
        *map(address, (cu_seqlens, advantages, returns, rewards, moments, *scratch)),
        with_moments,
        *(batch, logprobs.shape[-1], logprobs.dtype == torch.float64),
        *_rows.runner(logprobs),
    )
    return advantages, returns, rewards, moments


def _moments(like: Tensor, batch: int) -> Tensor:
    # Without a sequence nothing is launched that would write them.
    allocate = torch.empty if batch else torch.zeros
    return allocate(3, dtype=torch.float64, device=like.device)


def _whiten(advantages: Tensor, mask: Tensor, moments: Tensor) -> None:
    mask = unit_stride(mask)
    rows = advantages.shape[0] if advantages.dim() == 2 else 1
    _rows.module(advantages).ppo_advantages_whiten(
        advantages.data_ptr(),
        *token_rows(mask),
        moments.data_ptr(),
        *(rows, advantages.shape[-1], advantages.dtype == torch.float64),
        *_rows.runner(advantages),
    )


def _fake_forward(scores: Tensor, logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *unwritten(3, logprobs), _moments(logprobs, 1)


def _fake_whiten(advantages: Tensor, mask: Tensor, moments: Tensor) -> None:
    return None


forward = register(
    "ppo_advantages_forward",
    SCHEMAS["ppo_advantages_forward"],
    _forward,
    _fake_forward,
)
whiten = backward = register(
    "ppo_advantages_whiten",
    SCHEMAS["ppo_advantages_whiten"],
    _whiten,
    _fake_whiten,
)
