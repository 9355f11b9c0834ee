r"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

Over the tokens of a sequence that count, in order,

    delta_k = r_k + gamma V_{k+1} - V_k,    A_k = delta_k + gamma lam A_{k+1},    R_k = A_k + V_k,

with V after the last one = `bootstrap` and A after it = 0. Tokens that don't count are stepped
over: the next value and the running advantage pass through them, so that deleting them changes
nothing for the others.

Kernels fold both carries into one, x_{k+1} = gamma V_{k+1} + gamma lam A_{k+1}, which makes the
recurrence a scan of affine maps in one scalar:

    A_k = (r_k - V_k) + x_{k+1},    x_k = gamma V_k + gamma lam (r_k - V_k) + gamma lam x_{k+1},

and the identity where a token doesn't count. Its adjoint runs forward in time. With g_k the
gradient that reaches A_k directly (upstream of A_k plus upstream of R_k),

    u_k = g_k + gamma lam u_{k-1},  u_0 = 0,
    dL/dr_k = u_k,    dL/dV_k = dL/dR_k - u_k + gamma u_{k-1},    dL/dbootstrap = gamma u_last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops import _checks


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
    check_cu_seqlens(cu_seqlens, total)
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    steps = torch.arange(longest, device=cu_seqlens.device)
    index = cu_seqlens[:-1, None] + steps
    return index.clamp(max=max(total - 1, 0)), steps < lengths[:, None]


def check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    """Raises unless `cu_seqlens` rises from 0 to `total`; reads it, so it stalls a GPU's stream."""
    bounds = cu_seqlens.tolist()
    _checks.require(
        bounds[0] == 0 and bounds[-1] == total and bounds == sorted(bounds),
        f"gae: cu_seqlens must rise from 0 to the {total} packed tokens, not fall, and end there; "
        f"it starts {bounds[:4]} and ends at {bounds[-1]}",
    )


def _per_sequence(value: float | Tensor, batch: int, like: Tensor) -> Tensor:
    """`value` as [B] in the dtype and on the device of `like`."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return torch.full((batch,), value, dtype=like.dtype, device=like.device)


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
        gamma: Tensor,
        lam: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert impl.forward is not None
        ctx.impl = impl
        ctx.save_for_backward(mask, gamma, lam, cu_seqlens)
        return impl.forward(rewards, values, mask, gamma, lam, bootstrap, cu_seqlens)

    @staticmethod
    @_checks.differentiable_once
    def backward(ctx: Any, grad_advantages: Tensor, grad_returns: Tensor) -> tuple[Any, ...]:
        mask, gamma, lam, cu_seqlens = ctx.saved_tensors
        rewards, values, bootstrap = ctx.impl.backward(
            grad_advantages, grad_returns, mask, gamma, lam, cu_seqlens
        )
        bootstrap = bootstrap if ctx.needs_input_grad[3] else None
        return None, rewards, values, bootstrap, None, None, None, None


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
        gamma: Discount, in [0, 1]; a float, or [B] for one per sequence.
        lam: GAE's lambda, in [0, 1]; a float, or [B] for one per sequence.
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
    _check(rewards, values, mask, gamma, lam, cu_seqlens, bootstrap)
    dtype = _checks.stats_dtype(torch.promote_types(rewards.dtype, values.dtype))
    impl = resolve("gae", rewards.device, backend, dtype)
    if impl is None:
        return gae_reference(
            rewards,
            values,
            mask,
            gamma=gamma,
            lam=lam,
            cu_seqlens=cu_seqlens,
            bootstrap=bootstrap,
        )
    rewards, values = rewards.to(dtype), values.to(dtype)
    batch = rewards.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    advantages, returns = _Gae.apply(
        impl,
        rewards,
        values,
        None if bootstrap is None else bootstrap.to(dtype),
        mask if mask is None or mask.dtype == torch.bool else mask != 0,
        _per_sequence(gamma, batch, rewards),
        _per_sequence(lam, batch, rewards),
        None if cu_seqlens is None else cu_seqlens.to(torch.int32),
    )
    return advantages, returns


def _check(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> None:
    _checks.floating("gae", rewards=rewards, values=values, bootstrap=bootstrap)
    _checks.same_shape("gae", rewards=rewards, values=values, mask=mask)
    if cu_seqlens is None:
        _checks.require(
            rewards.dim() == 2,
            f"gae: rewards has shape {list(rewards.shape)}; expected [B, T], "
            "or [N] together with cu_seqlens",
        )
        batch = rewards.shape[0]
    else:
        _checks.integral("gae", cu_seqlens=cu_seqlens)
        _checks.require(
            rewards.dim() == 1 and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0,
            f"gae: with cu_seqlens {list(cu_seqlens.shape)} rewards has shape "
            f"{list(rewards.shape)}; expected [B + 1] and [N]",
        )
        _checks.require(
            rewards.numel() < 2**31,
            f"gae: {rewards.numel()} packed tokens overflow int32 offsets; pass fewer at a time",
        )
        batch = cu_seqlens.numel() - 1
    for name, coefficient in (("gamma", gamma), ("lam", lam)):
        if not isinstance(coefficient, Tensor):
            _checks.require(
                0.0 <= coefficient <= 1.0, f"gae: {name}={coefficient!r}; expected it in [0, 1]"
            )
            continue
        _checks.floating("gae", **{name: coefficient})
        _checks.require(
            not coefficient.requires_grad,
            f"gae: {name} requires a gradient, but gae is differentiable in rewards, values and "
            f"bootstrap only; pass {name}.detach()",
        )
    for name, vector in (("gamma", gamma), ("lam", lam), ("bootstrap", bootstrap)):
        if isinstance(vector, Tensor):
            _checks.require(
                vector.shape == (batch,) and vector.device == rewards.device,
                f"gae: {name} has shape {list(vector.shape)} on {vector.device}; expected one "
                f"element per sequence, [{batch}], on {rewards.device}",
            )
    if cu_seqlens is not None:
        _checks.require(
            cu_seqlens.device == rewards.device,
            f"gae: cu_seqlens is on {cu_seqlens.device}; expected {rewards.device}",
        )
