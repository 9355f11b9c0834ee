r"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

Over the tokens of a sequence that count, in order,

    delta_k = r_k + gamma V_{k+1} - V_k,    A_k = delta_k + gamma lam A_{k+1},    R_k = A_k + V_k,

with V after the last one = `bootstrap` and A after it = 0. Tokens that don't count are stepped
over: the next value and the running advantage pass through them, so that deleting them changes
nothing for the others.

Kernels fold both carries into one, x_{k+1} = gamma V_{k+1} + gamma lam A_{k+1}, which makes the
recurrence a scan of affine maps in one scalar:

    A_k = (r_k - V_k) + x_{k+1},    x_k = gamma V_k + gamma lam (r_k - V_k) + gamma lam x_{k+1},

and the identity where a token doesn't count. The carry's rounding is one of the larger of the two:
advantages that are small beside their values are exact to a rounding of the *values*.

The adjoint runs forward in time. With g_k the gradient that reaches A_k directly (upstream of A_k
plus upstream of R_k),

    u_k = g_k + gamma lam u_{k-1},  u_0 = 0,
    dL/dr_k = u_k,    dL/dV_k = dL/dR_k - u_k + gamma u_{k-1},    dL/dbootstrap = gamma u_last.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops import _checks
from rlhf_fast.ops._scan_checks import check_scan


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of `gae`: same arguments, same results, one step a token."""
    dtype = _checks.stats_dtype(torch.promote_types(rewards.dtype, values.dtype))
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    rewards = torch.where(keep, rewards.to(dtype), 0.0)
    values = torch.where(keep, values.to(dtype), 0.0)
    if cu_seqlens is not None:
        index, inside = _padded_index(cu_seqlens, rewards.numel())
        advantages, returns = gae_reference(
            rewards[index],
            values[index],
            keep[index] & inside,
            gamma=gamma,
            lam=lam,
            bootstrap=bootstrap,
        )
        return advantages[inside], returns[inside]
    batch = rewards.shape[0]
    gamma, lam = (_per_sequence(x, batch, rewards) for x in (gamma, lam))
    next_value = rewards.new_zeros(batch) if bootstrap is None else bootstrap.to(dtype)
    advantage = rewards.new_zeros(batch)
    columns: list[Tensor] = []
    steps = zip(rewards.unbind(1), values.unbind(1), keep.unbind(1), strict=True)
    for reward, value, counts in reversed(list(steps)):  # each [B]
        delta = reward + gamma * next_value - value
        advantage = torch.where(counts, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(counts, value, next_value)
        columns.append(advantage)
    scanned = torch.stack(columns[::-1], dim=1) if columns else rewards
    advantages = torch.where(keep, scanned, 0.0)
    return advantages, advantages + values


def _padded_index(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Token index [B, T] of packed sequences laid out as rows, and whether each is inside one."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    steps = torch.arange(longest, device=cu_seqlens.device)
    index = cu_seqlens[:-1, None] + steps
    return index.clamp(max=max(total - 1, 0)), steps < lengths[:, None]


def _per_sequence(value: float | Tensor, batch: int, like: Tensor) -> Tensor:
    """`value` as [B] in the dtype and on the device of `like`."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return torch.full((batch,), value, dtype=like.dtype, device=like.device)


def split_coefficient(value: float | Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """gamma or lambda as launchers take it: a tensor, one a sequence, or a number for all.

    A number goes to the kernel as it is: a tensor made of it would be a launch of its own.
    """
    return (value.to(dtype), 0.0) if isinstance(value, Tensor) else (None, float(value))


class _Gae(torch.autograd.Function):
    """Any backend's `gae`: forward and backward call the pair of launchers they were handed."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: Impl,
        rewards: Tensor,
        values: Tensor,
        bootstrap: Tensor | None,
        mask: Tensor | None,
        gamma: Tensor | None,
        lam: Tensor | None,
        cu_seqlens: Tensor | None,
        numbers: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        assert impl.forward is not None
        ctx.impl, ctx.numbers = impl, numbers
        ctx.save_for_backward(mask, gamma, lam, cu_seqlens)
        return impl.forward(rewards, values, mask, gamma, lam, bootstrap, cu_seqlens, *numbers)

    @staticmethod
    @_checks.differentiable_once
    def backward(ctx: Any, grad_advantages: Tensor, grad_returns: Tensor) -> tuple[Any, ...]:
        mask, gamma, lam, cu_seqlens = ctx.saved_tensors
        rewards, values, bootstrap = ctx.impl.backward(
            grad_advantages, grad_returns, mask, gamma, lam, cu_seqlens, *ctx.numbers
        )
        bootstrap = bootstrap if ctx.needs_input_grad[3] else None
        return None, rewards, values, bootstrap, *[None] * 5


def scan(
    impl: Impl,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gae` of checked arguments through the launchers of `impl`."""
    dtype = _checks.stats_dtype(torch.promote_types(rewards.dtype, values.dtype))
    gammas, gamma_value = split_coefficient(gamma, dtype)
    lams, lam_value = split_coefficient(lam, dtype)
    advantages, returns = _Gae.apply(
        impl,
        rewards.to(dtype),
        values.to(dtype),
        None if bootstrap is None else bootstrap.to(dtype),
        mask if mask is None or mask.dtype == torch.bool else mask != 0,
        gammas,
        lams,
        None if cu_seqlens is None else cu_seqlens.to(torch.int32),
        (gamma_value, lam_value),
    )
    return advantages, returns


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns of padded or packed sequences.

    Differentiable once in `rewards`, `values` and `bootstrap`. Statistics are fp32, or fp64 if
    `rewards` or `values` is. What lies under the mask, NaN and inf included, touches neither
    results nor gradients.

    Args:
        rewards: [B, T], or [N] with `cu_seqlens`; the reward of each token.
        values: Same shape; the critic's estimate before each token.
        mask: Same shape, any dtype; nonzero where a token counts. None counts all. Gaps are
            allowed anywhere: deleting the tokens that don't count changes nothing for the others.
        gamma: Discount, in [0, 1]; a float, or [B] for one per sequence (on a GPU its values are
            not checked unless RLHF_FAST_CHECK=1: the host would have to wait for them).
        lam: GAE's lambda; as gamma.
        cu_seqlens: [B + 1] int32 offsets of packed sequences, from 0 to N. On a GPU the host does
            not read it: offsets out of range are clamped, with unspecified results.
        bootstrap: [B] value after the last token of a sequence that was cut off; None is 0.
        backend: "cuda", "triton", "cpp", "reference", or None for the first that fits.

    Returns:
        (advantages, returns), shaped like `rewards`, returns = advantages + values; both exactly 0
        where a token doesn't count.

    Raises:
        TypeError: A tensor's dtype is not what is said above.
        ValueError: A shape, a device or a value is not.
        BackendUnavailable: The named backend cannot run.
    """
    check_scan(
        "gae", rewards, values, mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
    )  # fmt: skip
    dtype = _checks.stats_dtype(torch.promote_types(rewards.dtype, values.dtype))
    impl = resolve("gae", rewards.device, backend, dtype)
    compute = gae_reference if impl is None else partial(scan, impl)
    return compute(
        rewards,
        values,
        mask,
        gamma=gamma,
        lam=lam,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
    )
