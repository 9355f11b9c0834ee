"""Inputs of gae, and its truth as the sum of the paper."""

from __future__ import annotations

import functools
import math

import torch

GARBAGE = (math.nan, math.inf, -math.inf)


def summed(rewards, values, mask=None, gamma=1.0, lam=0.95, bootstrap=None):
    """Advantages [B, T] in fp64 as the paper's sum over the tokens that count, O(T^2)."""
    B, T = rewards.shape
    mask = torch.ones(B, T, dtype=torch.bool) if mask is None else mask != 0
    gamma, lam = (torch.as_tensor(x, dtype=torch.float64).expand(B) for x in (gamma, lam))
    advantages = torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        kept = mask[row].nonzero().flatten()
        r, v = rewards[row, kept].double(), values[row, kept].double()
        last = torch.zeros(1) if bootstrap is None else bootstrap[row : row + 1]
        deltas = r + gamma[row] * torch.cat([v, last.double()])[1:] - v
        for k in range(len(kept)):
            weights = (gamma[row] * lam[row]) ** torch.arange(len(kept) - k, dtype=torch.float64)
            advantages[row, kept[k]] = (weights * deltas[k:]).sum()
    return advantages


def sample(B, T, *, keep=None, dtype=torch.float32, seed=0):
    """Rewards, values, mask, bootstrap; the mask has about `keep` True, None for no mask."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=dtype)
    mask = None if keep is None else torch.rand(B, T, generator=generator) < keep
    return normal(B, T), normal(B, T), mask, normal(B)


def with_garbage(x, mask):
    """`x` with NaN and infinities where the mask is False."""
    x = x.clone()
    hidden = (~mask).nonzero()
    for i, position in enumerate(hidden.tolist()):
        x[tuple(position)] = GARBAGE[i % len(GARBAGE)]
    return x
