"""Discounted sums of the rewards to come: what a scan gives where there is no critic."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import stats_dtype
from rlhf_fast.ops._scan_checks import check_scan
from rlhf_fast.ops.gae import gae_reference, scan


def discounted_returns_reference(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """The specification of `discounted_returns`: `gae` with lambda 1 of a critic that says 0."""
    return gae_reference(
        rewards,
        torch.zeros_like(rewards),
        mask,
        gamma=gamma,
        lam=1.0,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
    )[1]


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns `G_k = r_k + gamma G_{k+1}` of padded or packed sequences (Sutton and Barto, 3.9).

    Over the tokens that count, in order, with `bootstrap` after the last one. Differentiable once
    in `rewards` and `bootstrap`.

    Args:
        rewards: [B, T], or [N] with `cu_seqlens`; the reward of each token.
        mask: as in `gae`; gaps are stepped over.
        gamma: as in `gae`.
        cu_seqlens: as in `gae`.
        bootstrap: as in `gae`.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        Shaped like `rewards`, fp32 (fp64 for fp64 `rewards`), 0 where a token doesn't count.

    Raises:
        TypeError: A tensor's dtype is not as said above.
        ValueError: A shape, a device or a value is not.
        BackendUnavailable: The named backend cannot run.
    """
    op = "discounted_returns"
    check_scan(
        op, rewards, None, mask, gamma=gamma, lam=1.0, cu_seqlens=cu_seqlens, bootstrap=bootstrap
    )
    impl = resolve(op, rewards.device, backend, stats_dtype(rewards.dtype))
    if impl is None:
        return discounted_returns_reference(
            rewards, mask, gamma=gamma, cu_seqlens=cu_seqlens, bootstrap=bootstrap
        )
    # One row of zeros serves all sequences.
    values = rewards.new_zeros(rewards.shape[-1:]).expand(rewards.shape)
    return scan(
        impl,
        rewards,
        values,
        mask,
        gamma=gamma,
        lam=1.0,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
    )[1]
