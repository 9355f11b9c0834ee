"""Inputs of linear_kl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def problem(rows: int = 8, vocab: int = 11, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden [N, 4], weight, bias, and ref_hidden [N, 3], ref_weight, ref_bias."""
    shapes = [(rows, 4), (vocab, 4), (vocab,), (rows, 3), (vocab, 3), (vocab,)]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def of(function: Any, inputs: Any, **options: Any) -> Tensor:
    """`function` of six tensors in the order of `problem`."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = inputs
    biases = {"bias": bias, "ref_bias": ref_bias}
    return function(hidden, weight, ref_hidden, ref_weight, **biases, **options)
