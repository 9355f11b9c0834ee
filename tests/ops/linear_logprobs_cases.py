"""Inputs of linear_logprobs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def problem(
    rows: int = 8, dim: int = 4, vocab: int = 11, dtype: Any = torch.float64
) -> list[Tensor]:
    """hidden, weight, bias (all of which require grad) and tokens with some ignored."""
    hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
    tokens = torch.randint(0, vocab, (rows,))
    tokens[1::5] = -100
    bias = torch.randn(vocab).to(dtype)
    return [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), tokens]
