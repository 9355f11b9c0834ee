import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.pairwise_loss import pairwise_loss
from rlhf_fast.ops.ranking_loss import ranking_loss


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def plackett_luce(scores, ranks):
    """Draws the ranking from urns, best first; ties see all of their own rank (Breslow)."""
    nll = 0.0
    for score, rank in zip(scores, ranks, strict=True):
        if rank > 0:
            urn = [s for s, r in zip(scores, ranks, strict=True) if r >= rank]
            nll += math.log(sum(math.exp(s) for s in urn)) - score
    return nll


def test_hand_worked_list_of_three():
    scores = torch.tensor([[math.log(2.0), math.log(5.0), math.log(3.0)]], dtype=torch.float64)
    loss, metrics = ranking_loss(scores, torch.tensor([[3, 1, 2]]))
    # 5 of 10, then 3 of 5, then 2 of 2.
    assert loss.item() == pytest.approx(-math.log(0.5 * 0.6))
    assert metrics["accuracy"].item() == 1.0
    loss, metrics = ranking_loss(scores, torch.tensor([[1, 3, 2]]))
    # 2 of 10, then 3 of 8; every pair is the wrong way round.
    assert loss.item() == pytest.approx(-math.log(0.2 * 3 / 8))
    assert metrics["accuracy"].item() == 0.0
    assert metrics["score_mean"].item() == pytest.approx(math.log(30.0) / 3)


def test_the_probabilities_of_all_rankings_sum_to_one():
    scores = torch.randn(4, dtype=torch.float64)
    rankings = list(itertools.permutations((1, 2, 3, 4)))
    losses = [ranking_loss(scores[None], torch.tensor([r]))[0].item() for r in rankings]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)


def test_two_completions_are_bradley_terry():
    scores = torch.randn(6, 2, dtype=torch.float64)
    loss, metrics = ranking_loss(scores, torch.tensor([[1, 2]]).expand(6, 2))
    pair_loss, pair_metrics = pairwise_loss(scores[:, 0], scores[:, 1])
    assert loss.item() == pytest.approx(pair_loss.item())
    assert metrics["accuracy"].item() == pytest.approx(pair_metrics["accuracy"].item())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-5, 5), st.integers(-1, 4)), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_ties_and_padding_agree_with_the_urn_model(rows):
    scores = [[s for s, _ in row] for row in rows]
    ranks = [[r for _, r in row] for row in rows]
    lists = sum(sum(r > 0 for r in row) > 1 for row in ranks)
    expected = sum(map(plackett_luce, scores, ranks)) / max(lists, 1)
    x = torch.tensor(scores, dtype=torch.float64)
    x = torch.where(torch.tensor(ranks) > 0, x, math.nan).requires_grad_()
    loss, _ = ranking_loss(x, torch.tensor(ranks))
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    loss.backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[torch.tensor(ranks) <= 0] == 0).all()


def test_order_and_numbering_of_a_ranking_do_not_matter():
    scores = torch.randn(3, 5, dtype=torch.float64)
    ranks = torch.tensor([[1, 2, 2, 4, 0], [5, 3, 1, 1, 2], [0, 0, 1, 0, 2]])
    loss, _ = ranking_loss(scores, ranks)
    order = torch.randperm(5)
    assert ranking_loss(scores[:, order], ranks[:, order])[0].item() == pytest.approx(loss.item())
    stretched = torch.where(ranks > 0, ranks * 10 - 3, -8)
    assert ranking_loss(scores, stretched)[0].item() == pytest.approx(loss.item())


def test_a_tie_draws_the_scores_together():
    scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss, metrics = ranking_loss(scores, torch.tensor([[1, 1]]))
    loss.backward()
    # 2 p - 1 with p = e / (1 + e).
    p = math.e / (1 + math.e)
    assert scores.grad[0].tolist() == pytest.approx([2 * p - 1, 1 - 2 * p])
    assert metrics["accuracy"].item() == 0.0


def test_gaps_of_a_thousand_are_exact():
    scores = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    assert ranking_loss(scores, torch.tensor([[1, 2, 3]]))[0].item() == 0.0
    loss, _ = ranking_loss(scores, torch.tensor([[3, 2, 1]]))
    assert loss.item() == 3000.0
    loss.backward()
    assert scores.grad.tolist() == [[2.0, -1.0, -1.0]]


def test_gradients_match_finite_differences():
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[1, 2, 3, 4], [2, 1, 2, 0], [0, 0, 0, 1]])
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, ranks)[0], (scores,))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_ranked_gives_a_differentiable_zero(shape):
    scores = torch.full(shape, math.nan, requires_grad=True)
    loss, metrics = ranking_loss(scores, torch.zeros(shape, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(scores.grad, torch.zeros(shape))
    assert all(m.item() == 0.0 for m in metrics.values())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"scores has shape \[3\]; expected \[B, K\]"):
        ranking_loss(torch.zeros(3), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ranks has shape \[2, 2\], but scores has \[2, 3\]"):
        ranking_loss(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"ranks has dtype torch.float32"):
        ranking_loss(torch.zeros(2, 3), torch.ones(2, 3))
