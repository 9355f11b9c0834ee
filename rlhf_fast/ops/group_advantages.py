"""Advantages of completions relative to the others of the same prompt: no critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops import masked
from rlhf_fast.ops._checks import floating, integral, one_of, require, stats_dtype

KINDS = ("grpo", "rloo", "dr_grpo", "reinforce++")
GRPO_EPS = 1e-6
"""Added to a group's standard deviation; the paper has none, verl's default is this."""


def group_advantages_reference(
    rewards: Tensor, group_size: int | Sequence[int] | Tensor, *, kind: str = "grpo"
) -> Tensor:
    """`group_advantages` in PyTorch, arguments unchecked: what every backend must compute."""
    x = rewards.to(stats_dtype(rewards.dtype))
    if isinstance(group_size, int):
        grid = x.reshape(-1, group_size)
        inside, size = torch.ones_like(grid, dtype=torch.bool), x.new_full((1, 1), group_size)
    else:
        grid, inside, size = _grid(x, _sizes(group_size))
    centred = torch.where(inside, grid - grid.sum(1, keepdim=True) / size, 0.0)
    # Equal rewards carry no preference. The mean's rounding must not make one up.
    equal = (~inside | (grid == grid[:, :1])).all(1, keepdim=True)
    centred = torch.where(equal, 0.0, centred)
    if kind == "grpo":
        squares = centred.double().square().sum(1, keepdim=True)  # of 1e20, say, in fp32: inf
        deviation = torch.where(equal, 1.0, squares / (size - 1).clamp(min=1)).sqrt()
        centred = centred / (deviation.to(x.dtype) + GRPO_EPS)
    elif kind == "rloo":
        centred = centred * size / (size - 1).clamp(min=1)
    # Rows of `grid` are groups in order, so what is inside lies in the order of `rewards`.
    advantages = centred.flatten() if isinstance(group_size, int) else centred[inside]
    if kind == "reinforce++":
        # Groups are centred, so the batch mean is 0 but for rounding, and is not subtracted: that
        # keeps the zeros exact.
        variance = masked.masked_var_reference(
            advantages, torch.ones_like(advantages), across_processes=True
        )
        advantages = advantages * (variance + masked.EPS).rsqrt()
    return advantages


def group_advantages(
    rewards: Tensor,
    group_size: int | Sequence[int] | Tensor,
    *,
    kind: str = "grpo",
    backend: str | None = None,
) -> Tensor:
    """Compares each reward with its group's: the completions of one prompt, which lie together.

    With mean and standard deviation (unbiased) over the n rewards of a group:

    - `grpo`: `(r - mean) / (std + 1e-6)` (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).
    - `dr_grpo`: `r - mean` (Liu et al. 2025, arXiv:2503.20783).
    - `rloo`: r less the mean of the n - 1 *others*, `(r - mean) * n / (n - 1)` (Ahmadian et al.
      2024, arXiv:2402.14740).
    - `reinforce++`: the "-baseline" form of REINFORCE++ (Hu et al. 2025, arXiv:2501.03262):
      `r - mean`, then divided by the deviation over the whole batch of completions, across the
      processes of torch.distributed where there are any: every process must then make the call.
      Groups must not be split between processes. (verl and OpenRLHF whiten over tokens instead:
      `masked_whiten` of `dr_grpo`'s advantages, spread over the tokens.)

    A group of equal rewards, and so a group of one, gives exactly 0 with every kind.

    Args:
        rewards: `[B]`, floating, sorted by group.
        group_size: n; or the `[G]` sizes of unequal groups, which sum to B, as a sequence or an
            integer tensor. On a GPU unequal sizes stall the stream, one n for all does not.
        kind: grpo, rloo, dr_grpo or reinforce++.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        `[B]` advantages, fp32 (fp64 for fp64 rewards), differentiable in `rewards`.

    Raises:
        TypeError: `rewards` is not floating or `group_size` not integral.
        ValueError: `kind` is unknown, or the groups do not add up to B.
    """
    op = "group_advantages"
    floating(op, rewards=rewards)
    one_of(op, "kind", kind, KINDS)
    require(rewards.dim() == 1, f"{op}: rewards has shape {list(rewards.shape)}; expected [B]")
    if isinstance(group_size, Tensor):
        integral(op, group_size=group_size)
        require(
            group_size.dim() == 1,
            f"{op}: group_size has shape {list(group_size.shape)}; expected [G], or an int",
        )
    batch = rewards.numel()
    if isinstance(group_size, int) and not isinstance(group_size, bool):
        if group_size < 1 or batch % group_size:
            raise ValueError(
                f"{op}: {batch} rewards do not divide into groups of {group_size}; give the sizes "
                "of unequal groups as a list"
            )
    else:
        sizes = _sizes(group_size)
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes):
            raise TypeError(
                f"{op}: group_size={group_size!r}; expected an int, or the groups' sizes as a "
                "sequence of ints or an integer tensor"
            )
        if min(sizes, default=1) < 1 or sum(sizes) != batch:
            raise ValueError(
                f"{op}: group_size {sizes[:8]} sums to {sum(sizes)}; expected sizes >= 1 that sum "
                f"to the {batch} rewards"
            )
    resolve(op, rewards.device, backend, rewards.dtype)
    return group_advantages_reference(rewards, group_size, kind=kind)


def _sizes(group_size: int | Sequence[int] | Tensor) -> list[int]:
    if isinstance(group_size, Tensor):
        return group_size.tolist()
    return list(group_size) if isinstance(group_size, Sequence) else [group_size]


def _grid(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of `x` as rows [G, largest], what is inside one, and their sizes [G, 1]."""
    lengths = torch.tensor(sizes, device=x.device, dtype=torch.int64)[:, None]
    inside = torch.arange(max(sizes, default=0), device=x.device) < lengths
    grid = x.new_zeros(inside.shape).masked_scatter(inside, x)
    return grid, inside, lengths.to(x.dtype)
