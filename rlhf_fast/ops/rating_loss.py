"""Losses of reward models on absolute ratings, such as 1 to 5 stars."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import floating, integral, one_of, require, stats_dtype
from rlhf_fast.ops._softmax import host_checks_run

KINDS = ("regression", "ordinal")


def rating_loss_reference(
    scores: Tensor, ratings: Tensor, *, kind: str = "regression", thresholds: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`rating_loss` in PyTorch, arguments unchecked: what every backend must compute."""
    scores = scores.to(stats_dtype(scores.dtype))
    if kind == "regression" or thresholds is None:
        target = ratings.to(scores.dtype)
        predicted, losses = scores, (scores - target).square()
        extra = {}
    else:
        losses = _ordinal_nll(scores, ratings.long(), thresholds.to(scores.dtype))
        target = ratings.to(scores.dtype)
        predicted = 1.0 + (scores[:, None] > thresholds).sum(1).to(scores.dtype)
        extra = {"accuracy": (predicted == target).to(scores.dtype)}
    metrics = {
        "mae": (predicted - target).abs(),
        "score_mean": scores,
        "rating_mean": target,
        **extra,
    }
    count = max(scores.numel(), 1)
    return losses.sum() / count, {name: x.detach().sum() / count for name, x in metrics.items()}


def _ordinal_nll(scores: Tensor, ratings: Tensor, thresholds: Tensor) -> Tensor:
    """`-log(sigmoid(a) - sigmoid(b))`, a and b the thresholds above and below, less the score.

    As `sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))`, it is a sum of three
    logs without cancellation, the third of which knows no score.
    """
    levels = thresholds.numel() + 1
    legal = (ratings >= 1) & (ratings <= levels)
    level = ratings.clamp(1, levels)
    upper = thresholds[(level - 1).clamp(max=levels - 2)] - scores
    lower = thresholds[(level - 2).clamp(min=0)] - scores
    below_upper = torch.where(level < levels, F.logsigmoid(upper), 0.0)
    above_lower = torch.where(level > 1, F.logsigmoid(-lower), 0.0)
    width = F.pad((-torch.expm1(-thresholds.diff())).log(), (1, 1))[level - 1]
    return torch.where(legal, -(below_upper + above_lower + width), torch.nan)


def rating_loss(
    scores: Tensor,
    ratings: Tensor,
    *,
    kind: str = "regression",
    thresholds: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of scores against ratings, averaged.

    - `regression`: `(score - rating)^2`; the score lives on the scale of the ratings.
    - `ordinal`: the cumulative-link (proportional-odds) model of McCullagh (1980):
      `P(rating <= k) = sigmoid(thresholds[k - 1] - score)`, the loss is `-log P(rating)`. Only the
      order of the ratings matters; scores are in logits. Exact for scores far from all thresholds
      and for thresholds that are close.

    To learn thresholds that stay increasing, learn the first and the logs of the steps, and pass
    `first + cumsum of exp(steps)`.

    Args:
        scores: `[B]`, floating.
        ratings: `[B]`; any number for `regression`, integers from 1 (worst) to K for `ordinal`.
        kind: regression or ordinal.
        thresholds: `[K - 1]` increasing, floating, may require a gradient; only for `ordinal`.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        (loss, metrics), fp32 (fp64 for fp64 `scores`), 0-d, means over the batch; 0 if it is empty.
        The metrics are detached: `mae` (of the score; for `ordinal` of the median rating that the
        model predicts), `score_mean`, `rating_mean`, and for `ordinal` `accuracy` of that median.

    Raises:
        TypeError: a dtype is not as said above.
        ValueError: shapes or options do not fit, ratings lie outside 1..K, or thresholds do not
            increase. The last two are values: on a GPU, where reading them would stall the stream,
            the loss becomes NaN (inf for equal thresholds) instead, and `RLHF_FAST_CHECK=1` brings
            the error back.
    """
    op = "rating_loss"
    floating(op, scores=scores, thresholds=thresholds)
    one_of(op, "kind", kind, KINDS)
    require(
        scores.dim() == 1 and scores.shape == ratings.shape and scores.device == ratings.device,
        f"{op}: scores has shape {list(scores.shape)} on {scores.device}, ratings "
        f"{list(ratings.shape)} on {ratings.device}; expected both [B], on one device",
    )
    if kind == "regression":
        require(
            thresholds is None,
            f"{op}: thresholds are given, but kind='regression' has none; take kind='ordinal', or "
            "leave them out",
        )
    else:
        _check_ordinal(op, scores, ratings, thresholds)
    resolve(op, scores.device, backend, scores.dtype)
    return rating_loss_reference(scores, ratings, kind=kind, thresholds=thresholds)


def _check_ordinal(op: str, scores: Tensor, ratings: Tensor, thresholds: Tensor | None) -> None:
    integral(op, ratings=ratings)
    if thresholds is None:
        raise ValueError(f"{op}: kind='ordinal' needs thresholds [K - 1] for ratings 1..K")
    require(
        thresholds.dim() == 1 and thresholds.numel() > 0 and thresholds.device == scores.device,
        f"{op}: thresholds has shape {list(thresholds.shape)} on {thresholds.device}; expected "
        f"[K - 1] with K >= 2, on {scores.device}",
    )
    if host_checks_run(scores.device):
        levels = thresholds.numel() + 1
        bounds = thresholds.tolist()
        require(
            all(a < b for a, b in zip(bounds, bounds[1:], strict=False)),
            f"{op}: thresholds {bounds} do not increase; order them, or learn their steps' logs",
        )
        outside = ratings[(ratings < 1) | (ratings > levels)]
        if outside.numel():
            raise ValueError(
                f"{op}: rating {int(outside[0])} lies outside 1..{levels}, the levels that "
                f"{levels - 1} thresholds part; correct the data or the number of thresholds"
            )
