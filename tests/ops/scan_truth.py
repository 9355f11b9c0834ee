"""Float64 truth of the scans over sequences, one token after the other, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from loss_truth import F64, numbers, sequences
from torch import Tensor


class Scans(NamedTuple):
    """Results shaped like the rewards; gradients of rewards, values and bootstrap."""

    advantages: Tensor
    returns: Tensor
    d_rewards: Tensor
    d_values: Tensor
    d_bootstrap: Tensor
    scale: tuple[float, float]  # the largest discounted sums of absolute terms, forth and back


def each(x: float | Tensor, count: int) -> list[float]:
    """A coefficient for every sequence; a tensor's in its own precision."""
    return numbers(x) if isinstance(x, Tensor) and x.dim() else [float(x)] * count


def scan(
    rewards: Tensor,
    values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    upstream: tuple[Tensor, Tensor] | None = None,
    number: Callable[[float], Any] = float,
) -> Scans:
    """GAE (Schulman et al. 2016, eq. 16); without values the discounted sum of the rewards.

    With `number=numpy.float32` every step is rounded as a plain loop in PyTorch rounds it.
    """
    shape = rewards.shape
    mask = torch.ones(shape) if mask is None else mask
    rows = sequences(mask, cu_seqlens)
    r, v = (
        [number(x) for x in numbers(torch.zeros(shape) if y is None else y)]
        for y in (rewards, values)
    )
    up = [[number(x) for x in numbers(y)] for y in upstream or (torch.zeros(shape),) * 2]
    last = each(0.0 if bootstrap is None else bootstrap, len(rows))
    gammas, lams = each(gamma, len(rows)), each(1.0 if values is None else lam, len(rows))
    out = [[number(0)] * shape.numel() for _ in range(4)]
    advantages, returns, d_rewards, d_values = out
    d_bootstrap, forth, back = [0.0] * len(rows), 0.0, 0.0
    for k, row in enumerate(rows):
        g, decay = number(gammas[k]), number(gammas[k]) * number(lams[k])
        following, carry, size = number(last[k]), number(0), 0.0
        if values is None:
            carry, following = following, number(0)
        for i in reversed(row):
            carry = r[i] + g * following - v[i] + decay * carry
            size = abs(r[i]) + abs(g * following) + abs(v[i]) + decay * size
            following, advantages[i], returns[i] = v[i], carry, carry + v[i]
            forth = max(forth, size)
        carry, size = number(0), 0.0
        for i in row:
            d_values[i] = up[1][i] + g * carry
            carry = up[0][i] + up[1][i] + decay * carry
            size = abs(up[0][i]) + abs(up[1][i]) + decay * size
            back = max(back, size)
            d_rewards[i] = carry
            d_values[i] -= carry
        d_bootstrap[k] = float(g * carry) if row else 0.0
    tensors = (torch.tensor([float(x) for x in y], dtype=F64).view(shape) for y in out)
    return Scans(*tensors, torch.tensor(d_bootstrap, dtype=F64), (float(forth), float(back)))


def float32(x: float) -> Any:
    return numpy.float32(x)


class Advantages(NamedTuple):
    """Results of ppo_advantages, and what they are summed from at most."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    scale: float


def ppo_truth(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    adaptive_lam: float | None = None,
    whiten: bool = True,
    missing_eos_penalty: float | None = None,
    finished: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    number: Callable[[float], Any] = float,
) -> Advantages:
    """KL and score as rewards (Ziegler et al. 2019), GAE, whitening."""
    rows = sequences(mask, cu_seqlens)
    lp = numbers(logprobs)
    ref = lp if ref_logprobs is None or kl_coef == 0 else numbers(ref_logprobs)
    rewards = [0.0] * len(lp)
    ended = [True] * len(rows) if finished is None else (finished != 0).tolist()
    for row, score, end in zip(rows, numbers(scores), ended, strict=True):
        for i in row:
            if kl_coef:
                rewards[i] = float(-number(kl_coef) * (number(lp[i]) - number(ref[i])))
        if row:
            penalty = 0.0 if end or missing_eos_penalty is None else missing_eos_penalty
            rewards[row[-1]] = float(number(rewards[row[-1]]) + (number(score) - number(penalty)))
    shaped = torch.tensor(rewards, dtype=F64).view(logprobs.shape)
    if adaptive_lam is not None:
        lengths = [max(len(row), 1) for row in rows]
        lam = torch.tensor([max(0.0, 1 - 1 / (adaptive_lam * n)) for n in lengths], dtype=F64)
    options = {"gamma": gamma, "cu_seqlens": cu_seqlens, "number": number}
    found = scan(shaped, values, mask, lam=lam, **options)
    returns = found.returns
    if value_lam is not None:
        returns = scan(shaped, values, mask, lam=value_lam, **options).returns
    advantages = found.advantages
    if whiten:
        advantages = whitened(advantages, [i for row in rows for i in row], number)
    return Advantages(advantages, returns, shaped, found.scale[0])


def whitened(x: Tensor, at: list[int], number: Callable[[float], Any] = float) -> Tensor:
    held, out = [float(number(y)) for y in numbers(x)], [0.0] * x.numel()
    mean = float(number(math.fsum(held[i] for i in at) / max(len(at), 1)))
    rest = {i: float(number(held[i]) - number(mean)) for i in at}
    variance = math.fsum(y * y for y in rest.values()) / max(len(at) - 1, 1)
    for i in at:
        out[i] = float(number(rest[i]) / number(math.sqrt(variance + 1e-8)))
    return torch.tensor(out, dtype=F64).view(x.shape)
