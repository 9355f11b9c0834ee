import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.rating_loss import rating_loss

THRESHOLDS = torch.tensor([-1.0, 0.5, 2.0, 2.25], dtype=torch.float64)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def level_probability(score, rating, thresholds):
    def cumulative(k):  # P(rating <= k)
        if k == 0:
            return 0.0
        if k == len(thresholds) + 1:
            return 1.0
        return 1 / (1 + math.exp(score - thresholds[k - 1]))

    return cumulative(rating) - cumulative(rating - 1)


def test_regression_is_the_mean_squared_error():
    scores = torch.tensor([1.0, 4.0, 2.5], dtype=torch.float64, requires_grad=True)
    loss, metrics = rating_loss(scores, torch.tensor([2, 4, 2]))
    assert loss.item() == pytest.approx((1.0 + 0.0 + 0.25) / 3)
    loss.backward()
    assert scores.grad.tolist() == pytest.approx([-2 / 3, 0.0, 1 / 3])
    got = {name: value.item() for name, value in metrics.items()}
    assert got == pytest.approx({"mae": 0.5, "score_mean": 2.5, "rating_mean": 8 / 3})


def test_ordinal_hand_worked():
    scores = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    thresholds = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    loss, metrics = rating_loss(
        scores, torch.tensor([1, 3, 1]), kind="ordinal", thresholds=thresholds
    )
    # At score 0: P(1) = 1/2, P(<= 2) = 3/4, so P(3) = 1/4; at score 3: P(1) = 1 / (1 + e^3).
    expected = (math.log(2) + math.log(4) + math.log(1 + math.exp(3.0))) / 3
    assert loss.item() == pytest.approx(expected)
    # Median levels 1 (the threshold is not exceeded), 1, 3: off by 0, 2 and 2.
    assert metrics["accuracy"].item() == pytest.approx(1 / 3)
    assert metrics["mae"].item() == pytest.approx(4 / 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-6, 6), st.integers(1, 5)), min_size=1, max_size=6))
def test_ordinal_agrees_with_the_cumulative_link_model(pairs):
    scores = torch.tensor([s for s, _ in pairs], dtype=torch.float64)
    ratings = torch.tensor([r for _, r in pairs])
    loss, _ = rating_loss(scores, ratings, kind="ordinal", thresholds=THRESHOLDS)
    expected = [-math.log(level_probability(s, r, THRESHOLDS.tolist())) for s, r in pairs]
    assert loss.item() == pytest.approx(sum(expected) / len(pairs), rel=1e-9)


def test_the_probabilities_of_all_levels_sum_to_one():
    for score in (-30.0, -1.0, 0.3, 40.0):
        losses = [
            rating_loss(
                torch.tensor([score], dtype=torch.float64),
                torch.tensor([level]),
                kind="ordinal",
                thresholds=THRESHOLDS,
            )[0].item()
            for level in range(1, 6)
        ]
        assert sum(math.exp(-x) for x in losses) == pytest.approx(1.0)


def test_two_levels_are_a_logistic_regression():
    scores, ratings = torch.randn(5, dtype=torch.float64), torch.tensor([1, 2, 2, 1, 2])
    loss, _ = rating_loss(
        scores, ratings, kind="ordinal", thresholds=torch.zeros(1, dtype=torch.float64)
    )
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, (ratings - 1).double())
    assert loss.item() == pytest.approx(expected.item())


def test_scores_far_from_every_threshold_keep_value_and_gradient_in_fp32():
    # The difference of the two sigmoids is 0 in fp32; its log is about -(1000 - 2).
    scores = torch.tensor([1000.0, -1000.0], requires_grad=True)
    loss, _ = rating_loss(
        scores, torch.tensor([2, 2]), kind="ordinal", thresholds=torch.tensor([-1.0, 2.0])
    )
    # -log(e^a - e^b) with a = 2 - 1000, b = -1 - 1000; and e^-b' - e^-a' with 999 and 1002.
    width = math.log(1 - math.exp(-3.0))
    assert loss.item() == pytest.approx((998 - width + 999 - width) / 2, rel=1e-6)
    loss.backward()
    assert scores.grad.tolist() == pytest.approx([0.5, -0.5])


def test_thresholds_that_are_close_keep_their_bits():
    gap = 3.3e-6
    loss, _ = rating_loss(
        torch.zeros(1), torch.tensor([2]), kind="ordinal", thresholds=torch.tensor([0.0, gap])
    )
    # The density of the logistic at 0 is 1/4.
    assert loss.item() == pytest.approx(-math.log(gap / 4), rel=1e-6)


def test_gradients_reach_scores_and_thresholds_and_match_finite_differences():
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    thresholds = THRESHOLDS.clone().requires_grad_()
    ratings = torch.tensor([1, 2, 3, 4, 5, 3])
    assert torch.autograd.gradcheck(
        lambda s, th: rating_loss(s, ratings, kind="ordinal", thresholds=th)[0],
        (scores, thresholds),
    )
    assert torch.autograd.gradcheck(lambda s: rating_loss(s, ratings)[0], (scores,))


@pytest.mark.parametrize("kind", ["regression", "ordinal"])
def test_an_empty_batch_gives_a_differentiable_zero(kind):
    scores = torch.zeros(0, requires_grad=True)
    thresholds = THRESHOLDS if kind == "ordinal" else None
    loss, metrics = rating_loss(
        scores, torch.zeros(0, dtype=torch.int64), kind=kind, thresholds=thresholds
    )
    loss.backward()
    assert loss.item() == 0.0
    assert all(m.item() == 0.0 for m in metrics.values())


def test_bad_arguments_are_named():
    scores, ratings = torch.zeros(3), torch.tensor([1, 2, 6])
    with pytest.raises(ValueError, match=r"rating 6 lies outside 1..5"):
        rating_loss(scores, ratings, kind="ordinal", thresholds=THRESHOLDS)
    with pytest.raises(ValueError, match=r"rating 0 lies outside 1..5"):
        rating_loss(scores, torch.tensor([1, 0, 2]), kind="ordinal", thresholds=THRESHOLDS)
    with pytest.raises(ValueError, match=r"thresholds \[1.0, 1.0\] do not increase"):
        rating_loss(scores, ratings, kind="ordinal", thresholds=torch.ones(2))
    with pytest.raises(ValueError, match=r"kind='ordinal' needs thresholds"):
        rating_loss(scores, ratings, kind="ordinal")
    with pytest.raises(ValueError, match=r"kind='regression' has none"):
        rating_loss(scores, ratings, thresholds=THRESHOLDS)
    with pytest.raises(ValueError, match=r"kind='huber' is unknown"):
        rating_loss(scores, ratings, kind="huber")
    with pytest.raises(TypeError, match=r"ratings has dtype torch.float32"):
        rating_loss(scores, ratings.float(), kind="ordinal", thresholds=THRESHOLDS)
    with pytest.raises(ValueError, match=r"expected both \[B\]"):
        rating_loss(scores, ratings[:2])
