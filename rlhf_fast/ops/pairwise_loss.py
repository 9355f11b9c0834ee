"""The Bradley-Terry loss of reward models on preference pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import floating, number, same_shape, stats_dtype


def pairwise_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    center: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`pairwise_loss` in PyTorch, arguments unchecked: what every backend must compute."""
    dtype = stats_dtype(chosen.dtype)
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    if isinstance(margin, Tensor):
        margin = margin.to(dtype)
    pairs = max(chosen.numel(), 1)
    gap = chosen - rejected
    losses = -F.logsigmoid(gap if margin is None else gap - margin)
    loss = losses.sum() / pairs
    if center != 0.0:
        loss = loss + center * (chosen + rejected).square().sum() / pairs
    with torch.no_grad():
        metrics = {
            "accuracy": 0.5 * (1.0 + gap.sign()).sum() / pairs,
            "gap_mean": gap.sum() / pairs,
            "chosen_mean": chosen.sum() / pairs,
            "rejected_mean": rejected.sum() / pairs,
        }
    return loss, metrics


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    center: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`mean(-log sigmoid(chosen - rejected - margin)) + center * mean((chosen + rejected)^2)`.

    The negative log-likelihood of Bradley and Terry (1952) as Ouyang et al. (2022,
    arXiv:2203.02155, eq. 1) train with it; the margin is Llama 2's (Touvron et al. 2023,
    arXiv:2307.09288, eq. 2), the centring term Eisenstein et al.'s (2023, arXiv:2312.09244). Exact
    at any gap: neither exp nor log overflows.

    Args:
        chosen: `[B]` (or any shape), floating: scores of the preferred completions.
        rejected: same shape: scores of the others.
        margin: how far apart the scores should be, a number or one per pair; None is 0.
        center: weight of the term that keeps the scores around 0.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        (loss, metrics), fp32 (fp64 for fp64 `chosen`), 0-d, means over the pairs; 0 without any.
        The metrics are detached: `accuracy` (chosen > rejected, whatever the margin; a tie counts
        half), `gap_mean` (chosen - rejected), `chosen_mean`, `rejected_mean`.

    Raises:
        TypeError: the scores are not floating.
        ValueError: shapes or devices differ, or `center` is negative.
    """
    op = "pairwise_loss"
    floating(op, chosen=chosen, rejected=rejected)
    same_shape(
        op,
        chosen=chosen,
        rejected=rejected,
        margin=margin if isinstance(margin, Tensor) else None,
    )
    number(op, "center", center, center >= 0.0, "a number >= 0")
    resolve(op, chosen.device, backend, chosen.dtype)
    return pairwise_loss_reference(chosen, rejected, margin=margin, center=center)
