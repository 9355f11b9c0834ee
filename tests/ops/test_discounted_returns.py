"""discounted_returns: hand-computed numbers, the plain sum, and every backend against both."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import calls, cases

from rlhf_fast.ops.discounted_returns import discounted_returns

OP = "discounted_returns"


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`discounted_returns` through one backend."""
    yield from calls(OP, discounted_returns, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, dtype=torch.float64))
def run64(request, monkeypatch):
    """As `run`, where fp64 is computed."""
    yield from calls(OP, discounted_returns, request.param, monkeypatch)


def summed(rewards, mask, gamma, bootstrap):
    """The sum of sum_j gamma^(j - k) r_j over the tokens that count, [B, T] in fp64."""
    out = torch.zeros(rewards.shape, dtype=torch.float64)
    for b, keep in enumerate(mask):
        kept = keep.nonzero().flatten()
        r = torch.cat([rewards[b, kept], bootstrap[b : b + 1]]).double()
        for k, t in enumerate(kept.tolist()):
            out[b, t] = (gamma[b] ** torch.arange(len(kept) + 1 - k) * r[k:]).sum()
    return out


def sample(B, T, dtype=torch.float32):
    """Rewards with NaN where the mask with gaps is False, the mask, gamma and a bootstrap."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(B, T, generator=generator) < 0.7
    rewards = torch.randn(B, T, dtype=dtype, generator=generator)
    gamma = torch.linspace(0.5, 1, B, dtype=dtype)
    bootstrap = torch.randn(B, dtype=dtype, generator=generator)
    return torch.where(mask, rewards, math.nan), mask, gamma, bootstrap


def test_three_rewards_by_hand(run):
    returns = run(torch.tensor([[1.0, 2.0, 3.0]]), gamma=0.5, bootstrap=torch.tensor([8.0]))
    assert returns.tolist() == [[1 + 0.5 * 5.5, 2 + 0.5 * 7, 3 + 0.5 * 8]]


def test_without_options_it_is_the_sum_of_what_is_to_come(run):
    assert run(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[6.0, 5.0, 3.0]]


def test_a_gap_is_stepped_over(run):
    rewards = torch.tensor([[1.0, math.nan, 3.0, math.inf]])
    returns = run(rewards, torch.tensor([[1, 0, 1, 0]]), gamma=0.5)
    assert returns.tolist() == [[2.5, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("T", [1, 5, 33, 1030])
def test_gamma_and_bootstrap_of_each_sequence(run, T):
    rewards, mask, gamma, bootstrap = sample(3, T)
    returns = run(rewards, mask, gamma=gamma, bootstrap=bootstrap)
    truth = summed(rewards, mask, gamma.double(), bootstrap)
    assert returns.dtype == torch.float32
    tolerance = 2e-6 * truth.abs().max().clamp(min=1).item()
    torch.testing.assert_close(returns.double(), truth, rtol=0, atol=tolerance)
    assert (returns[~mask] == 0).all()


def test_packed_equals_padded(run):
    lengths = torch.tensor([5, 0, 1, 20, 4])
    rewards, mask, gamma, bootstrap = sample(5, 20)
    inside = torch.arange(20) < lengths[:, None]
    options = {"gamma": gamma, "bootstrap": bootstrap}
    padded = run(rewards, mask & inside, **options)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    packed = run(rewards[inside], mask[inside], cu_seqlens=cu_seqlens, **options)
    torch.testing.assert_close(packed, padded[inside])


def test_gradients_match_finite_differences(run64):
    rewards, mask, gamma, bootstrap = sample(3, 9, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (rewards.nan_to_num(0.5), bootstrap)]

    def of(rewards, bootstrap):
        return run64(rewards, mask, gamma=gamma, bootstrap=bootstrap)

    assert torch.autograd.gradcheck(of, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches_give_empty_results(run, shape):
    assert run(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_fp32(run, dtype):
    rewards = torch.randn(2, 20).to(dtype)
    returns = run(rewards, gamma=0.9)
    assert returns.dtype == torch.float32
    assert torch.equal(returns, run(rewards.float(), gamma=0.9))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"discounted_returns: rewards has shape \[3\]"):
        discounted_returns(torch.zeros(3))
    with pytest.raises(ValueError, match=r"discounted_returns: gamma=1.5; expected it in \[0, 1\]"):
        discounted_returns(torch.zeros(1, 3), gamma=1.5)
    with pytest.raises(TypeError, match="discounted_returns: rewards has dtype torch.int64"):
        discounted_returns(torch.zeros(1, 3, dtype=torch.int64))
