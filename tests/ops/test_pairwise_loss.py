import math

import pytest
import torch

from rlhf_fast.ops.pairwise_loss import pairwise_loss


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def test_hand_worked_loss_gradient_and_metrics():
    chosen = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    loss, metrics = pairwise_loss(chosen, rejected)
    # Gaps 2, -1, 0: log(1 + e^-2), log(1 + e), log 2.
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.e) + math.log(2)) / 3
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    sigmoid = [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1)), 0.5]
    assert chosen.grad.tolist() == pytest.approx([-s / 3 for s in sigmoid])
    got = {name: value.item() for name, value in metrics.items()}
    # One right, one wrong, one tie that counts half.
    want = {"accuracy": 0.5, "gap_mean": 1 / 3, "chosen_mean": 1.0, "rejected_mean": 2 / 3}
    assert got == pytest.approx(want)


def test_margin_and_centring_enter_as_published():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    margin = torch.tensor([1.0, 0.0])
    loss, metrics = pairwise_loss(chosen, rejected, margin=margin, center=0.1)
    terms = math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2.0))
    # (2 + .5)^2 = 6.25 and (-1 + 1)^2 = 0.
    assert loss.item() == pytest.approx(terms / 2 + 0.1 * 6.25 / 2)
    assert metrics["accuracy"].item() == 0.5
    one = pairwise_loss(chosen, rejected, margin=0.7)[0]
    each = pairwise_loss(chosen, rejected, margin=torch.tensor([0.7, 0.7]))[0]
    assert one.item() == pytest.approx(each.item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gaps_of_a_thousand_are_exact(dtype):
    chosen = torch.tensor([500.0, -500.0], dtype=dtype, requires_grad=True)
    loss, _ = pairwise_loss(chosen, -chosen.detach())
    assert loss.item() == 500.0  # (0 + 1000) / 2
    loss.backward()
    assert chosen.grad.tolist() == [0.0, -0.5]


def test_gradients_match_finite_differences():
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    margin = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: pairwise_loss(s[0], s[1], margin=margin, center=0.05)[0], (scores,)
    )


def test_an_empty_batch_gives_a_differentiable_zero():
    chosen = torch.zeros(0, requires_grad=True)
    loss, metrics = pairwise_loss(chosen, torch.zeros(0), center=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(m.item() == 0.0 for m in metrics.values())


def test_bad_arguments_are_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"rejected has shape \[2\], but chosen has \[3\]"):
        pairwise_loss(x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"margin has shape \[2\]"):
        pairwise_loss(x, x, margin=torch.zeros(2))
    with pytest.raises(ValueError, match=r"center=-1"):
        pairwise_loss(x, x, center=-1)
    with pytest.raises(TypeError, match=r"chosen has dtype torch.int64"):
        pairwise_loss(torch.zeros(3, dtype=torch.int64), x)
