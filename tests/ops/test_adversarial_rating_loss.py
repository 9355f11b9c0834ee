"""rating_loss against McCullagh's cumulative link model, in plain floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from backend_cases import cases
from loss_truth import EPS, F16, F32, F64, INF, NAN, LossRunner
from reward_loss_cases import outcome, sigmoid, softplus
from truth import assert_budget, gradients, leaf

from rlhf_fast.ops import rating_loss


@pytest.fixture(params=cases("rating_loss"))
def rating(request, monkeypatch):
    return LossRunner(rating_loss, request.param, monkeypatch)


def ordinal_truth(scores, ratings, thresholds, upstream=-1.7):
    """-log(sigmoid(b - s) - sigmoid(a - s)), b the threshold above the rating, a that below."""
    t, B = [-INF, *thresholds.double().tolist(), INF], len(ratings)
    losses, d_scores, d_thresholds, size = [], [], [0.0] * len(t), 0.0
    for s, k in zip(scores.double().tolist(), ratings.tolist(), strict=True):
        a, b = t[int(k) - 1] - s, t[int(k)] - s
        if a == -INF:
            losses.append(softplus(-b))
            above, below = -sigmoid(-b), 0.0
        elif b == INF:
            losses.append(softplus(a))
            above, below = 0.0, sigmoid(a)
        else:  # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
            gap = t[int(k)] - t[int(k) - 1]
            losses.append(softplus(-b) + softplus(a) - math.log(-math.expm1(-gap)))
            inverse = 1 / math.expm1(gap) if gap < 700 else 0.0
            above, below = -sigmoid(-b) - inverse, sigmoid(a) + inverse
        d_scores.append(-(above + below))
        d_thresholds[int(k)] += above
        d_thresholds[int(k) - 1] += below
        size += abs(above) + abs(below)
    up = upstream / B
    return (
        torch.tensor(math.fsum(losses) / B, dtype=F64),
        torch.tensor(d_scores, dtype=F64) * up,
        torch.tensor(d_thresholds[1:-1], dtype=F64) * up,
        size * abs(up),
    )


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("steps", [(1.0, 0.5, 2.0), (1e-3, 1e-3, 1e-3), (50.0, 100.0, 1e-2), ()])
def test_ordinal_ratings(rating, steps, spread, dtype):
    thresholds = torch.tensor([-0.7, *steps], dtype=F64).cumsum(0).to(dtype)
    ratings = torch.arange(40) % (len(steps) + 2) + 1
    scores = torch.linspace(-1, 1, 40).roll(7).to(dtype) * spread
    held = leaf(thresholds)
    loss, metrics, (d_scores,) = outcome(rating, scores, ratings, kind="ordinal", thresholds=held)
    truth = ordinal_truth(scores, ratings, thresholds)
    assert_budget("loss", loss, truth[0])
    assert_budget("d scores", d_scores, truth[1], scale=4 * 1.7 / 40)
    loss, _ = rating(scores, ratings.int(), kind="ordinal", thresholds=held)
    (d_thresholds,) = gradients(loss, [held], torch.tensor(-1.7, dtype=dtype))
    assert_budget("d thresholds", d_thresholds, truth[2], scale=truth[3])
    median = 1 + (scores[:, None] > thresholds).sum(1)
    assert abs(metrics["mae"] - (median - ratings).abs().double().mean()) < 8 * EPS * len(
        thresholds
    )
    assert abs(metrics["accuracy"] - (median == ratings).double().mean()) < 4 * EPS
    for name, numbers in (("score_mean", scores), ("rating_mean", ratings)):
        assert abs(metrics[name] - numbers.double().mean()) < 8 * EPS * (spread + 5)


def test_probabilities_of_all_ratings_sum_to_one(rating):
    thresholds = torch.tensor([-1.0, 0.0, 0.01, 4.0])
    for score in (-30.0, -1.0, 0.005, 2.0, 50.0):
        losses = [
            rating(torch.tensor([score]), torch.tensor([k]), kind="ordinal", thresholds=thresholds)[
                0
            ].item()
            for k in range(1, 6)
        ]
        assert abs(math.fsum(math.exp(-x) for x in losses) - 1) < 64 * EPS


def test_regression(rating):
    for dtype, offset in itertools.product((F16, F32, F64), (0.0, 1024.0)):
        scores, ratings = torch.randn(33).to(dtype) + offset, torch.arange(33) % 5 + offset
        loss, metrics, (gradient,) = outcome(rating, scores, ratings)
        off = scores.double() - ratings.double()
        assert_budget("loss", loss, off.square().mean())
        assert_budget("gradient", gradient, 2 * off / 33 * -1.7)
        assert abs(metrics["mae"] - off.abs().mean()) < 8 * EPS * 5
    loss, metrics, _ = outcome(rating, torch.zeros(0), torch.zeros(0))
    assert loss == 0 and all(value == 0 for value in metrics.values())


ORDINAL = [
    ("rating", torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0])),
    ("rating", torch.tensor([1, 4, 2]), torch.tensor([0.0, 1.0])),
    ("ratings", torch.tensor([1, 1.5, 2]), torch.tensor([0.0, 1.0])),
    ("ratings", torch.tensor([1, NAN, 2]), torch.tensor([0.0, 1.0])),
    ("thresholds", torch.tensor([1, 1, 2]), torch.tensor([1.0, 1.0])),
    ("thresholds", torch.tensor([1, 1, 2]), torch.tensor([1.0, 0.0])),
    ("thresholds", torch.tensor([1, 1, 2]), torch.tensor([0.0, NAN])),
    ("thresholds", torch.tensor([1, 1, 2]), torch.zeros(1, 2)),
    ("thresholds", torch.tensor([1, 1, 2]), torch.tensor([0, 1])),
]


@pytest.mark.parametrize(("name", "ratings", "thresholds"), ORDINAL)
def test_bad_ratings_and_thresholds_are_named(name, ratings, thresholds):
    with pytest.raises((TypeError, ValueError), match=name):
        rating_loss(torch.zeros(3), ratings, kind="ordinal", thresholds=thresholds)
