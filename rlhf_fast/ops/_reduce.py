"""From a value per token to one number: the aggregations that the losses share."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops._checks import require
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


def check_normalizer(op: str, normalizer: float | Tensor | None) -> None:
    """Raises unless `normalizer` is None, a number > 0 or a 0-d tensor, whose value is not read."""
    if isinstance(normalizer, Tensor):
        require(
            normalizer.dim() == 0,
            f"{op}: normalizer has shape {list(normalizer.shape)}; expected a number or a 0-d "
            "tensor",
        )
    else:
        require(
            normalizer is None or normalizer > 0,
            f"{op}: normalizer={normalizer}; expected a number > 0: what the summed loss is "
            "divided by",
        )
