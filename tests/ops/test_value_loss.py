import math
import statistics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast import ops


def test_hand_worked_loss_gradient_and_metrics(value_loss):
    values = torch.tensor([[1.0, 1.0, 0.1], [-1.0, 9.0, math.nan]], requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])
    returns = torch.tensor([[2.0, 0.0, 0.5], [-3.0, math.inf, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss, metrics = value_loss(values, old, returns, mask)
    # Clipped values .2 .2 .1 -.2:
    #   v=1,  R=2:   1     against (.2 - 2)^2  = 3.24 -> clipped, no gradient
    #   v=1,  R=0:   1     against (.2 - 0)^2  = .04  -> gradient 1 / 4
    #   v=.1, R=.5:  .16   against the same           -> gradient -.4 / 4
    #   v=-1, R=-3:  4     against (-.2 + 3)^2 = 7.84 -> clipped, no gradient
    assert loss.item() == pytest.approx(0.5 * (3.24 + 1.0 + 0.16 + 7.84) / 4)
    loss.backward()
    expected = torch.tensor([[0.0, 0.25, -0.1], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(values.grad, expected)
    assert metrics["value_clip_fraction"].item() == 0.5
    assert metrics["value_mean"].item() == pytest.approx(1.1 / 4)
    assert metrics["return_mean"].item() == pytest.approx(-0.5 / 4)
    errors, targets = [1.0, -1.0, 0.4, -2.0], [2.0, 0.0, 0.5, -3.0]
    explained = 1 - statistics.variance(errors) / statistics.variance(targets)
    assert metrics["explained_variance"].item() == pytest.approx(explained)


def test_without_clipping_it_is_half_the_mean_squared_error(value_loss):
    values, old, returns = torch.randn(3, 2, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    loss, metrics = value_loss(values, old, returns, mask, clip=None)
    assert loss.item() == pytest.approx(0.5 * ((values - returns)[mask] ** 2).mean().item())
    assert metrics["value_clip_fraction"].item() == 0.0


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**31), st.sampled_from([None, 0.0, 0.2, 1.0]))
def test_random_masks_agree_with_a_loop_over_tokens(value_loss, seed, clip):
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, 3, 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 4, generator=generator) < 0.6
    total = 0.0
    for b in range(3):
        for t in range(4):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                near = v if clip is None else max(o - clip, min(v, o + clip))
                total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
    expected = total / max(int(mask.sum()), 1)
    garbage = values.masked_fill(~mask, math.nan)
    assert value_loss(garbage, old, returns, mask, clip=clip)[0].item() == pytest.approx(expected)
    packed = value_loss(values[mask], old[mask], returns[mask], mask[mask], clip=clip)[0]
    assert packed.item() == pytest.approx(expected)


def test_micro_batches_add_up_to_the_whole_batch(value_loss):
    values, old, returns = torch.randn(3, 6, 5, dtype=torch.float64)
    mask = torch.rand(6, 5) < 0.5
    whole, metrics = value_loss(values, old, returns, mask)
    pieces = [
        value_loss(values[i], old[i], returns[i], mask[i], normalizer=mask.sum())
        for i in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(loss.item() for loss, _ in pieces) == pytest.approx(whole.item())
    for name in ("value_clip_fraction", "value_mean", "return_mean"):
        assert sum(m[name].item() for _, m in pieces) == pytest.approx(metrics[name].item())
    own = [
        value_loss(values[i], old[i], returns[i], mask[i])[1]["explained_variance"].item()
        * mask[i].sum().item()
        for i in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    total = sum(m["explained_variance"].item() for _, m in pieces)
    assert total == pytest.approx(sum(own) / mask.sum().item())


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one(value_loss):
    returns, ones = torch.randn(2, 6, dtype=torch.float64), torch.ones(2, 6)
    perfect = value_loss(returns, returns, returns, ones)[1]["explained_variance"]
    flat = torch.zeros_like(returns)
    constant = value_loss(flat, flat, returns, ones)[1]["explained_variance"]
    no_spread = value_loss(returns, returns, flat, ones)[1]["explained_variance"]
    assert (perfect.item(), constant.item(), no_spread.item()) == (1.0, 0.0, 0.0)


def test_gradients_match_finite_differences_and_reach_the_values_only(value_loss):
    values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    old = (values.detach() + torch.randn(2, 5) * 0.3).requires_grad_()
    returns = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, old.detach(), returns.detach(), mask)[0], (values,)
    )
    value_loss(values, old, returns, mask)[0].backward()
    assert old.grad is None and returns.grad is None


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (0,)])
def test_nothing_that_counts_gives_a_differentiable_zero(value_loss, shape):
    values = torch.full(shape, math.nan, requires_grad=True)
    loss, metrics = value_loss(values, values, values, torch.zeros(shape))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(values.grad, torch.zeros(shape))
    assert all(m.item() == 0.0 and not m.requires_grad for m in metrics.values())


def test_bad_arguments_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"returns has shape \[3\], but values has \[2, 3\]"):
        ops.value_loss(x, x, torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"clip=-0.2; expected a number >= 0"):
        ops.value_loss(x, x, x, x, clip=-0.2)
    with pytest.raises(ValueError, match=r"normalizer=0; expected a number > 0"):
        ops.value_loss(x, x, x, x, normalizer=0)
    with pytest.raises(ValueError, match=r"normalizer has shape \[2\]"):
        ops.value_loss(x, x, x, x, normalizer=torch.ones(2))
