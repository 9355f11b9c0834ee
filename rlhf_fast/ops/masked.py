"""Mean, variance and whitening over the elements that count."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import floating, same_shape, stats_dtype

EPS = 1e-8
"""Added to the variance under the root when whitening (Ziegler et al. 2019, their code)."""


class _Moments(NamedTuple):
    mean: Tensor
    variance: Tensor


class _AllReduce(torch.autograd.Function):
    """The sum over processes: each one's share takes part in all of their results.

    Torch's own differentiable form is deprecated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad)


def several_processes() -> bool:
    """Whether torch.distributed's default group has any but this one: vLLM makes one of one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_sum(x: Tensor, across_processes: bool) -> Tensor:
    """Sums `x` over the processes of the default group; differentiable."""
    return _AllReduce.apply(x) if across_processes and several_processes() else x


def _moments(x: Tensor, mask: Tensor, across_processes: bool) -> _Moments:
    """Mean and unbiased variance, fp64, by the corrected two-pass algorithm.

    The second pass sums the residuals too, which removes the rounding of the first mean (Chan,
    Golub and LeVeque 1983): a constant `x` has variance 0 and whitens to 0.
    """
    x = torch.where(mask, x, 0.0).double()
    ones = mask.to(x.dtype)
    count, total = global_sum(torch.stack([ones.sum(), x.sum()]), across_processes).unbind()
    count = count.clamp(min=1)
    mean = total / count
    centred = torch.where(mask, x - mean, 0.0)
    sums = torch.stack([centred.sum(), centred.square().sum()])
    residual, squares = global_sum(sums, across_processes).unbind()
    squares = (squares - residual * residual / count).clamp(min=0)
    return _Moments(mean + residual / count, squares / (count - 1).clamp(min=1))


def merge_moments(moments: Tensor) -> Tensor:
    """Moments of all processes from each one's own.

    Args:
        moments: fp64 `[3]`: count, mean, sum of squared deviations from the mean.

    Returns:
        The same of everything (Chan, Golub and LeVeque 1983), equal bits in every process.
    """
    gathered = [torch.empty_like(moments) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, moments)
    counts, means, squares = torch.stack(gathered).unbind(1)
    total = counts.sum()
    # Weighed around one of the means, equal ones merge without a rounding.
    pivot = means[counts.argmax()]
    mean = pivot + (counts * (means - pivot)).sum() / total.clamp(min=1)
    return torch.stack([total, mean, (squares + counts * (means - mean).square()).sum()])


def masked_mean_reference(x: Tensor, mask: Tensor, *, across_processes: bool = False) -> Tensor:
    """`masked_mean` in PyTorch, arguments unchecked: what every backend must compute."""
    return _moments(x, mask != 0, across_processes).mean.to(stats_dtype(x.dtype))


def masked_var_reference(x: Tensor, mask: Tensor, *, across_processes: bool = False) -> Tensor:
    """`masked_var` in PyTorch, arguments unchecked: what every backend must compute."""
    return _moments(x, mask != 0, across_processes).variance.to(stats_dtype(x.dtype))


def masked_whiten_reference(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, across_processes: bool = True
) -> Tensor:
    """`masked_whiten` in PyTorch, arguments unchecked: what every backend must compute."""
    mask = mask != 0
    mean, variance = _moments(x, mask, across_processes)
    whitened = (torch.where(mask, x, 0.0).double() - mean) * (variance + EPS).rsqrt()
    whitened = torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)
    return whitened.to(stats_dtype(x.dtype))


def masked_mean(
    x: Tensor, mask: Tensor, *, across_processes: bool = False, backend: str | None = None
) -> Tensor:
    """Mean of the elements of `x` that count.

    Args:
        x: any shape, floating. What lies under the mask (NaN, inf) touches neither value nor
            gradient.
        mask: same shape, any dtype; nonzero where an element counts.
        across_processes: take the mean over all processes of torch.distributed's default group,
            where there is one; every process must then make the call.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        0-d, fp32 (fp64 for fp64 `x`), differentiable in `x`; 0 if nothing counts.

    Raises:
        TypeError: `x` is not floating.
        ValueError: `x` and `mask` differ in shape or device.
    """
    _check("masked_mean", x, mask, backend)
    return masked_mean_reference(x, mask, across_processes=across_processes)


def masked_var(
    x: Tensor, mask: Tensor, *, across_processes: bool = False, backend: str | None = None
) -> Tensor:
    """Unbiased variance (divisor n - 1) of the elements of `x` that count.

    Two passes, not E[x^2] - E[x]^2: a large mean costs no bits.

    Args:
        x: as in `masked_mean`.
        mask: as in `masked_mean`.
        across_processes: as in `masked_mean`.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        0-d, fp32 (fp64 for fp64 `x`), differentiable in `x`; 0 if at most one element counts.

    Raises:
        TypeError: `x` is not floating.
        ValueError: `x` and `mask` differ in shape or device.
    """
    _check("masked_var", x, mask, backend)
    return masked_var_reference(x, mask, across_processes=across_processes)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    across_processes: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Scales what counts to unit variance: `(x - mean) / sqrt(var + 1e-8)`.

    Mean and unbiased variance are those of the whole batch: they are summed over the processes of
    torch.distributed's default group where there is one, so that a batch split over processes
    whitens as it would in one. Every process must then make the call. `shift_mean=False` adds the
    mean back and only rescales around it, as Ziegler et al. (2019) do with rewards.

    Args:
        x: as in `masked_mean`.
        mask: as in `masked_mean`.
        shift_mean: True moves the mean to 0, False keeps it.
        across_processes: False takes the statistics of this process alone.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        The shape of `x`, fp32 (fp64 for fp64 `x`), differentiable in `x` (through other processes'
        statistics too, if `x` requires a gradient in all of them); exactly 0 where nothing counts.
        A single element, or equal ones, become 0, or the mean if that is kept.

    Raises:
        TypeError: `x` is not floating.
        ValueError: `x` and `mask` differ in shape or device.
    """
    _check("masked_whiten", x, mask, backend)
    return masked_whiten_reference(
        x, mask, shift_mean=shift_mean, across_processes=across_processes
    )


def _check(op: str, x: Tensor, mask: Tensor, backend: str | None) -> None:
    floating(op, x=x)
    same_shape(op, x=x, mask=mask)
    resolve(op, x.device, backend, x.dtype)
