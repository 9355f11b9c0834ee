"""From a value per token to one number: the aggregations that the losses share."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops._checks import number, require
from rlhf_fast.ops._sequences import sequence_sum

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")


def aggregate(
    x: Tensor,
    mask: Tensor,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Sums `x`, which is 0 where the boolean `mask` is False, and divides.

    The divisor is `normalizer`, or the number of tokens (of sequences with tokens for `seq-mean-*`)
    that count; where that is 0 the sum is 0 too, and 1 takes its place.
    """
    if aggregation in ("token-mean", "constant"):
        total, count = x.sum(), mask.sum()
    else:
        tokens = sequence_sum(mask.to(x.dtype), cu_seqlens)
        per_sequence = sequence_sum(x, cu_seqlens)
        if aggregation == "seq-mean-token-mean":
            per_sequence = per_sequence / tokens.clamp(min=1)
        total, count = per_sequence.sum(), (tokens > 0).sum()
    divisor = count if normalizer is None else normalizer
    if isinstance(divisor, Tensor):
        divisor = divisor.to(total.dtype)
        divisor = divisor.masked_fill(divisor == 0, 1.0)
    return total / divisor


def split_normalizer(
    normalizer: float | Tensor | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, float]:
    """`normalizer` as launchers take it: a 0-d tensor, or a number, 0 for the count at hand."""
    if isinstance(normalizer, Tensor):
        return normalizer.detach().to(device=device, dtype=dtype), 0.0
    if normalizer is not None and torch.compiler.is_compiling():
        # An opaque op binds a graph to the numbers that it is given, not to tensors.
        return torch.full((), normalizer, dtype=dtype, device=device), 0.0
    return None, float(normalizer or 0.0)


def check_normalizer(op: str, normalizer: float | Tensor | None) -> None:
    """Raises unless `normalizer` is None, a number > 0 or a 0-d tensor, whose value is not read."""
    if isinstance(normalizer, Tensor):
        require(
            normalizer.dim() == 0,
            f"{op}: normalizer has shape {list(normalizer.shape)}; expected a number or a 0-d "
            "tensor",
        )
        return
    fits = normalizer is None or normalizer > 0
    number(op, "normalizer", normalizer, fits, "a number > 0: what the summed loss is divided by")
