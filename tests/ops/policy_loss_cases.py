"""Small batches for the tests of `policy_loss`."""

from __future__ import annotations

import torch

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
RATIOS = ("token", "sequence", "none", "cispo")


def batch(seed=0, sequences=4, length=5, spread=0.4):
    """Log-probs new and old, advantages per token and a mask, float64."""
    generator = torch.Generator().manual_seed(seed)
    new, moved, advantages = torch.randn(
        3, sequences, length, dtype=torch.float64, generator=generator
    )
    mask = torch.rand(sequences, length, generator=generator) < 0.65
    return new - 2, new - 2 + spread * moved, advantages, mask


def rows(mask, *tensors):
    """Each sequence's counting tokens as plain lists, sequences without any left out."""
    for b in range(mask.shape[0]):
        if mask[b].any():
            yield [t[b][mask[b]].tolist() for t in tensors]
