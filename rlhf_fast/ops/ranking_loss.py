"""The Plackett-Luce loss of reward models on rankings of several completions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import floating, integral, require, same_shape, stats_dtype


def ranking_loss_reference(scores: Tensor, ranks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`ranking_loss` in PyTorch, arguments unchecked: what every backend must compute."""
    present = ranks > 0
    s = torch.where(present, scores.to(stats_dtype(scores.dtype)), 0.0)
    # [B, K, K], row i: the others that compete with i for its place, by their lead over it. Without
    # i itself: -log of its share is softplus of the others' logsumexp, and a sure winner keeps its
    # bits, as does a list with a common offset.
    itself = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    rivals = present[:, None, :] & (ranks[:, None, :] >= ranks[:, :, None]) & ~itself
    contested = present & rivals.any(2)
    leads = torch.where(rivals, s[:, None, :] - s[:, :, None], -torch.inf)
    leads = torch.where(contested[:, :, None], leads, 0.0)  # a finite logsumexp where none competes
    nll = torch.where(contested, -F.logsigmoid(-leads.logsumexp(2)), 0.0).sum(1)
    lists = (present.sum(1) > 1).sum().clamp(min=1)
    loss = nll.sum() / lists
    with torch.no_grad():
        better = present[:, :, None] & present[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
        agreement = 0.5 * (1.0 + (s[:, :, None] - s[:, None, :]).sign())
        metrics = {
            "accuracy": torch.where(better, agreement, 0.0).sum() / better.sum().clamp(min=1),
            "score_mean": s.sum() / present.sum().clamp(min=1),
        }
    return loss, metrics


def ranking_loss(
    scores: Tensor, ranks: Tensor, *, backend: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of a ranking: the best is drawn first, by softmax, then the next.

    `sum over i of (logsumexp of the scores ranked i or worse) - score_i` (Plackett 1975),
    averaged over the lists. With two completions it is `pairwise_loss`.

    Tied completions share a rank; each competes with all of its own rank and below (Breslow's
    treatment of ties, 1974), which does not depend on their order and draws their scores together.
    Ranks are only compared: 1, 2, 2, 5 is as good as 1, 2, 2, 3.

    Args:
        scores: `[B, K]`, floating.
        ranks: `[B, K]` int64 or int32, 1 for the best; <= 0 marks an absent completion (padding),
            whose score, NaN included, touches neither value nor gradient.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        (loss, metrics), fp32 (fp64 for fp64 `scores`), 0-d. Lists of fewer than two completions say
        nothing and are not in the mean; without any the loss is a differentiable 0. The metrics are
        detached: `accuracy` over all pairs of unequal rank (equal scores count half), `score_mean`.

    Raises:
        TypeError: `scores` is not floating or `ranks` not integral.
        ValueError: shapes or devices do not fit.
    """
    op = "ranking_loss"
    floating(op, scores=scores)
    integral(op, ranks=ranks)
    require(scores.dim() == 2, f"{op}: scores has shape {list(scores.shape)}; expected [B, K]")
    same_shape(op, scores=scores, ranks=ranks)
    resolve(op, scores.device, backend, scores.dtype)
    return ranking_loss_reference(scores, ranks)
