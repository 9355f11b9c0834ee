"""pairwise_loss and ranking_loss against Bradley-Terry and Plackett-Luce, in plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from loss_truth import BF16, EPS, F16, F32, F64, INF, NAN, LossRunner
from reward_loss_cases import outcome, sigmoid, softplus
from truth import assert_budget, assert_same, gradients, leaf

from rlhf_fast.ops import pairwise_loss, ranking_loss, rating_loss


@pytest.fixture(params=cases("pairwise_loss"))
def pairwise(request, monkeypatch):
    return LossRunner(pairwise_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("ranking_loss"))
def ranking(request, monkeypatch):
    return LossRunner(ranking_loss, request.param, monkeypatch)


def pairwise_truth(chosen, rejected, margin, center, upstream=-1.7):
    pairs = list(zip(chosen.double().tolist(), rejected.double().tolist(), margin, strict=True))
    B = len(pairs)
    loss = math.fsum(softplus(r + m - c) + center * (c + r) ** 2 for c, r, m in pairs) / B
    slope = [-sigmoid(r + m - c) for c, r, m in pairs]
    pull = [2 * center * (c + r) for c, r, _ in pairs]
    up = upstream / B
    d_chosen = torch.tensor([(s + p) * up for s, p in zip(slope, pull, strict=True)], dtype=F64)
    d_rejected = torch.tensor([(p - s) * up for s, p in zip(slope, pull, strict=True)], dtype=F64)
    accuracy = sum((c > r) + 0.5 * (c == r) for c, r, _ in pairs) / B
    gap = math.fsum(c - r for c, r, _ in pairs) / B
    return loss, d_chosen, d_rejected, {"accuracy": accuracy, "gap_mean": gap}


GAPS = (0.0, 1e-7, 1e-3, 1.0, 15.0, 17.0, 20.0, 60.0, 87.0, 89.0, 100.0, 1000.0, 1e30)


@pytest.mark.parametrize("gap", [sign * gap for gap in GAPS for sign in (1, -1)])
def test_pairs_at_any_gap(pairwise, gap):
    """A pair far on the right side keeps a loss and a gradient down to the least number."""
    chosen, rejected = torch.tensor([gap]), torch.zeros(1)
    loss, metrics, found = outcome(pairwise, chosen, rejected, leaves=2)
    truth = pairwise_truth(chosen, rejected, [0.0], 0.0)
    close = {"rtol": 16 * EPS, "atol": 2e-38}
    for got, exact in zip(
        (loss[None], *found), (torch.tensor([truth[0]]), *truth[1:3]), strict=True
    ):
        torch.testing.assert_close(got.double(), exact.double(), **close)
    assert metrics["accuracy"] == truth[3]["accuracy"]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("margin", [None, 0.5, "each"])
@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("B", [1, 2, 33, 5000])
def test_pairs(pairwise, dtype, margin, center, B):
    chosen, rejected = (torch.randn(2, B, dtype=F64) * 3).to(dtype)
    rejected[: B // 4] = chosen[: B // 4]
    margins = torch.linspace(0, 2, B).to(dtype) if margin == "each" else margin
    held = margins.double().tolist() if margin == "each" else [margin or 0.0] * B
    loss, metrics, found = outcome(
        pairwise, chosen, rejected, leaves=2, margin=margins, center=center
    )
    truth = pairwise_truth(chosen, rejected, held, center)
    assert loss.dtype == (F64 if dtype == F64 else F32)
    assert_budget("loss", loss, torch.tensor(truth[0], dtype=F64))
    for got, exact in zip(found, truth[1:3], strict=True):
        assert got.dtype == dtype
        assert_budget("gradient", got, exact)
    assert abs(metrics["accuracy"] - truth[3]["accuracy"]) < 4 * EPS
    assert abs(metrics["gap_mean"] - truth[3]["gap_mean"]) < 16 * EPS * 3
    for name, scores in (("chosen_mean", chosen), ("rejected_mean", rejected)):
        assert abs(metrics[name] - scores.double().mean()) < 16 * EPS * 3


def test_no_pairs_and_broken_pairs(pairwise):
    for shape in ((0,), (0, 3)):
        loss, metrics, _ = outcome(pairwise, torch.zeros(shape), torch.zeros(shape), leaves=2)
        assert loss == 0 and all(value == 0 for value in metrics.values())
    loss, _, found = outcome(pairwise, torch.tensor([NAN, 1.0]), torch.zeros(2), leaves=2)
    assert loss.isnan() and found[0].isnan().tolist() == [True, False]


def test_offsets_of_both_scores_cancel(pairwise):
    chosen, rejected = (torch.randn(2, 50) * 64).round() / 64
    near, far = (outcome(pairwise, chosen + x, rejected + x, leaves=2) for x in (0.0, 1e4))
    assert_same("shifted", [near[0], *near[2]], [far[0], *far[2]])


def ranking_truth(scores, ranks, upstream=-1.7):
    """Sum over completions of -log of their share among those of their rank and worse."""
    losses, gradient = [], torch.zeros(scores.shape, dtype=F64)
    for b, (s, r) in enumerate(zip(scores.double().tolist(), ranks.tolist(), strict=True)):
        present = [k for k, rank in enumerate(r) if rank > 0]
        if len(present) < 2:
            continue
        total = []
        for i in present:
            rivals = [k for k in present if r[k] >= r[i]]
            top = max(s[k] for k in rivals)
            mass = math.fsum(math.exp(s[k] - top) for k in rivals)
            rest = math.fsum(math.exp(s[k] - top) for k in rivals if k != i)
            total.append(math.log1p(rest) if s[i] == top else top - s[i] + math.log(mass))
            for k in rivals:
                if k != i:
                    gradient[b, k] += math.exp(s[k] - top) / mass
                    gradient[b, i] -= math.exp(s[k] - top) / mass
        losses.append(math.fsum(total))
    count = max(len(losses), 1)
    return torch.tensor(math.fsum(losses) / count, dtype=F64), gradient * upstream / count


def naive_ranking(scores, ranks):
    """What people write, for lists without absent completions."""
    rivals = ranks[:, None, :] >= ranks[:, :, None]
    mass = scores[:, None, :].masked_fill(~rivals, -INF).logsumexp(-1)
    return (mass - scores).sum(-1).mean()


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("seed", range(8))
def test_rankings_with_ties_and_absent_completions(ranking, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    B, K = (1, 2, 5, 17)[seed % 4], (2, 1, 4, 9)[seed // 2]
    scores = (torch.randn(B, K, generator=generator, dtype=F64) * 4).to(dtype)
    ranks = torch.randint(-1, K + 3, (B, K), generator=generator)
    loss, _, (gradient,) = outcome(ranking, scores, ranks)
    truth, exact = ranking_truth(scores, ranks)
    assert_budget("loss", loss, truth, scale=8.0)
    assert_budget("gradient", gradient, exact, scale=1.7)
    scores[ranks <= 0] = NAN
    again = outcome(ranking, scores, ranks.int() * 7)
    assert_same("garbage, other names", [again[0], *again[2]], [loss, gradient])
    assert (gradient[ranks <= 0] == 0).all()


@pytest.mark.parametrize(
    "gaps", [(0.0, 1e-4, 3.0, -3.0, -20.0, -1000.0), (10.0, 17.0, 88.0)], ids=str
)
def test_a_ranking_of_two_is_a_pair(ranking, pairwise, gaps):
    for gap in gaps:
        scores = torch.tensor([[gap, 0.0], [0.5, gap]])
        loss, metrics, (gradient,) = outcome(ranking, scores, torch.tensor([[1, 2], [2, 1]]))
        chosen, rejected = torch.tensor([gap, gap]), torch.tensor([0.0, 0.5])
        pair, pair_metrics, found = outcome(pairwise, chosen, rejected, leaves=2)
        torch.testing.assert_close(loss, pair, rtol=16 * EPS, atol=1e-38)
        expected = torch.stack(
            [torch.stack([found[0][0], found[1][0]]), torch.stack([found[1][1], found[0][1]])]
        )
        torch.testing.assert_close(gradient, expected, rtol=16 * EPS, atol=1e-38)
        assert metrics["accuracy"] == pair_metrics["accuracy"]


def test_rankings_far_apart_and_far_away(ranking):
    ranks = torch.tensor([[1, 2, 3, 3], [4, 3, 2, 1]])
    near = torch.tensor([[3.0, 1.0, -2.0, 0.5]] * 2)
    for scores in (near + 8192, near - 8192):
        loss, _, (gradient,) = outcome(ranking, scores, ranks)
        held = leaf(scores)
        rival = naive_ranking(held, ranks)
        (d_rival,) = gradients(rival, [held], torch.tensor(-1.7))
        truth, exact = ranking_truth(scores, ranks)
        assert_budget("far loss", loss, truth, rival.detach())
        assert_budget("far gradient", gradient, exact, d_rival)
    apart = torch.tensor([[300.0, 100.0, -100.0, -300.0]] * 2)
    loss, metrics, (gradient,) = outcome(ranking, apart, ranks)
    truth, exact = ranking_truth(apart, ranks)
    assert_budget("loss", loss, truth)
    assert_budget("gradient", gradient, exact)
    assert abs(metrics["accuracy"] - 5 / 11) < EPS


def test_lists_that_say_nothing(ranking):
    scores = torch.full((3, 2), NAN)
    scores[0, 0] = 4.0
    ranks = torch.tensor([[1, 0], [-5, 0], [0, 0]])
    for rows in (slice(0, 3), slice(0, 0)):
        loss, metrics, (gradient,) = outcome(ranking, scores[rows], ranks[rows])
        assert loss == 0 and (gradient == 0).all() and metrics["accuracy"] == 0
    both = torch.cat([scores, torch.tensor([[1.0, 2.0]])])
    loss, _, _ = outcome(ranking, both, torch.cat([ranks, torch.tensor([[1, 2]])]))
    assert abs(loss - softplus(1.0)) < 4 * EPS


WRONG = [
    ("pairwise", "rejected", (torch.zeros(3), torch.zeros(4)), {}),
    ("pairwise", "chosen", (torch.zeros(3).int(), torch.zeros(3)), {}),
    ("pairwise", "margin", (torch.zeros(3), torch.zeros(3)), {"margin": torch.zeros(4)}),
    ("pairwise", "center", (torch.zeros(3), torch.zeros(3)), {"center": -0.1}),
    ("ranking", "ranks", (torch.zeros(3, 2), torch.zeros(3, 3).int()), {}),
    ("ranking", "ranks", (torch.zeros(3, 2), torch.zeros(3, 2)), {}),
    ("ranking", "scores", (torch.zeros(3).int(), torch.zeros(3).int()), {}),
    ("rating", "ratings", (torch.zeros(3), torch.zeros(4)), {}),
    ("rating", "kind", (torch.zeros(3), torch.zeros(3)), {"kind": "huber"}),
    ("rating", "thresholds", (torch.zeros(3), torch.ones(3).int()), {"kind": "ordinal"}),
    ("rating", "thresholds", (torch.zeros(3), torch.ones(3)), {"thresholds": torch.zeros(2)}),
]


@pytest.mark.parametrize(("op", "name", "tensors", "options"), WRONG)
def test_bad_arguments_are_named(op, name, tensors, options):
    with pytest.raises((TypeError, ValueError), match=name):
        {"pairwise": pairwise_loss, "ranking": ranking_loss, "rating": rating_loss}[op](
            *tensors, **options
        )
