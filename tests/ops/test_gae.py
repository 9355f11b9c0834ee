"""gae: hand-computed numbers, the sums of the paper, and every backend against both.

Long sequences have a file of their own, test_gae_long.py.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from backend_cases import Case, cases, count_launches
from gae_cases import sample, summed, with_garbage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.gae import gae, gae_reference


@pytest.fixture(params=cases("gae"))
def run(request, monkeypatch):
    """`gae` through one backend on its device; at the end its launcher must have run."""
    yield from _runner(request.param, monkeypatch)


def _runner(case: Case, monkeypatch):
    counts = None
    if case.backend != "reference":
        counts = count_launches(monkeypatch, "gae", case.backend)

    def call(*tensors, **options):
        move = functools.partial(_to, device=case.device)
        options = {name: move(value) for name, value in options.items()}
        return gae(*map(move, tensors), backend=case.backend, **options)

    call.device = case.device
    yield call
    assert counts is None or counts["forward"] > 0, f"{case.backend} was never launched"


def _to(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def assert_matches(run, rewards, values, mask=None, *, tolerance=2e-6, **options):
    """Both results against the sums; tolerance is per unit of the largest advantage."""
    expected = summed(rewards, values, mask, **options)
    advantages, returns = run(rewards, values, mask, **options)
    kept = torch.ones_like(expected, dtype=torch.bool) if mask is None else mask != 0
    scale = expected.abs().max().clamp(min=1.0).item() if expected.numel() else 1.0
    torch.testing.assert_close(advantages.cpu().double(), expected, rtol=0, atol=tolerance * scale)
    expected_returns = torch.where(kept, expected + torch.where(kept, values, 0).double(), 0)
    torch.testing.assert_close(
        returns.cpu().double(), expected_returns, rtol=0, atol=tolerance * scale
    )
    assert (advantages.cpu()[~kept] == 0).all() and (returns.cpu()[~kept] == 0).all()


def test_three_tokens_by_hand(run):
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])
    advantages, returns = run(rewards, values, gamma=0.5, lam=0.5, bootstrap=torch.tensor([8.0]))
    # deltas: 1 + 2.5 - 4, 2 + 3 - 5, 3 + 4 - 6; each next one weighs a quarter
    assert advantages.tolist() == [[-0.5 + 0.25 * 0.25, 0.25, 1.0]]
    assert returns.tolist() == [[3.5625, 5.25, 7.0]]


def test_a_gap_by_hand(run):
    nan = math.nan
    rewards, values = torch.tensor([[1.0, nan, 3.0, nan]]), torch.tensor([[4.0, nan, 6.0, nan]])
    mask = torch.tensor([[1, 0, 1, 0]])
    advantages, returns = run(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.0 - 0.25 * 3.0, 0.0, -3.0, 0.0]]
    assert returns.tolist() == [[3.25, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 31, 130, 1029, 2500])
@pytest.mark.parametrize("keep", [None, 0.7])
def test_matches_the_sum_over_deltas(run, T, keep):
    rewards, values, mask, bootstrap = sample(3, T, keep=keep, seed=T)
    if mask is not None:
        rewards, values = with_garbage(rewards, mask), with_garbage(values, mask)
    assert_matches(run, rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap)


def test_lam_one_is_monte_carlo_minus_value(run):
    rewards, values, _, bootstrap = sample(2, 40)
    advantages, returns = run(rewards, values, gamma=0.9, lam=1.0, bootstrap=bootstrap)
    for t in range(40):
        discounts = 0.9 ** torch.arange(41 - t)
        outcome = (torch.cat([rewards[:, t:], bootstrap[:, None]], 1) * discounts).sum(1)
        torch.testing.assert_close(advantages[:, t].cpu(), outcome - values[:, t])
        torch.testing.assert_close(returns[:, t].cpu(), outcome)


def test_lam_zero_is_the_one_step_error(run):
    rewards, values, _, bootstrap = sample(2, 40)
    advantages, _ = run(rewards, values, gamma=0.9, lam=0.0, bootstrap=bootstrap)
    following = torch.cat([values[:, 1:], bootstrap[:, None]], 1)
    torch.testing.assert_close(advantages.cpu(), rewards + 0.9 * following - values)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=13, max_size=13), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    seed=st.integers(0, 1000),
)
def test_deleting_tokens_that_do_not_count_changes_nothing(run, rows, gamma, lam, seed):
    mask = torch.tensor(rows)
    rewards, values, _, bootstrap = sample(*mask.shape, seed=seed)
    advantages, returns = run(
        with_garbage(rewards, mask),
        with_garbage(values, mask),
        mask,
        gamma=gamma,
        lam=lam,
        bootstrap=bootstrap,
    )
    for row, kept in enumerate(mask):
        alone = (rewards[row, kept][None], values[row, kept][None])
        expected = run(*alone, gamma=gamma, lam=lam, bootstrap=bootstrap[row : row + 1])
        torch.testing.assert_close(advantages[row, kept.to(run.device)], expected[0][0])
        torch.testing.assert_close(returns[row, kept.to(run.device)], expected[1][0])


@pytest.mark.parametrize("keep", [None, 0.6])
def test_packed_equals_padded(run, keep):
    lengths = [5, 0, 1, 70, 4]
    rewards, values, mask, bootstrap = sample(len(lengths), max(lengths), keep=keep)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    counts = inside if mask is None else inside & mask
    options = {"gamma": torch.linspace(0.9, 1.0, 5), "lam": 0.9, "bootstrap": bootstrap}
    padded = run(rewards, values, counts, **options)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = run(
        rewards[inside],
        values[inside],
        None if mask is None else mask[inside],
        cu_seqlens=cu_seqlens,
        **options,
    )
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other[inside.to(run.device)])


def test_gamma_and_lam_per_sequence(run):
    rewards, values, mask, bootstrap = sample(4, 33, keep=0.8)
    gamma, lam = torch.tensor([1.0, 0.9, 0.5, 0.0]), torch.tensor([0.0, 0.95, 1.0, 0.3])
    assert_matches(run, rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)


def test_a_number_is_as_good_as_a_tensor_of_it(run):
    rewards, values, mask, bootstrap = sample(4, 33, keep=0.8)
    options = {"bootstrap": bootstrap}
    expected = run(rewards, values, mask, gamma=0.75, lam=0.5, **options)
    gamma, lam = torch.full((4,), 0.75), torch.full((4,), 0.5)
    for mixed in ({"gamma": gamma, "lam": lam}, {"gamma": 0.75, "lam": lam}):
        for one, other in zip(
            run(rewards, values, mask, **mixed, **options), expected, strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.uint8, torch.float32])
def test_any_nonzero_in_the_mask_counts(run, mask_dtype):
    rewards, values, mask, _ = sample(2, 9, keep=0.5)
    expected = run(rewards, values, mask)
    for one, other in zip(run(rewards, values, mask.to(mask_dtype) * 2), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches_give_empty_results(run, shape):
    empty = torch.zeros(shape, requires_grad=True)
    advantages, returns = run(empty, torch.zeros(shape))
    assert advantages.shape == returns.shape == shape
    (grad,) = torch.autograd.grad((advantages + returns).sum(), empty)
    assert grad.shape == shape


def test_no_packed_sequences_give_empty_results(run):
    packed = run(torch.zeros(0), torch.zeros(0), cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert packed[0].shape == packed[1].shape == (0,)


def test_rows_that_are_all_masked_give_zeros_and_no_gradient(run):
    rewards, values, bootstrap = (
        torch.full(shape, math.nan, requires_grad=True) for shape in ((2, 6), (2, 6), (2,))
    )
    mask = torch.zeros(2, 6)
    advantages, returns = run(rewards, values, mask, bootstrap=bootstrap)
    assert not advantages.any() and not returns.any()
    for grad in torch.autograd.grad((advantages * 2 + returns).sum(), [rewards, values, bootstrap]):
        assert not grad.any()


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_any_strides(run, view):
    rewards, values, mask, bootstrap = sample(4, 24, keep=0.7)
    if view == "transposed":
        given_views = [x.t().contiguous().t() for x in (rewards, values, mask)]
    elif view == "sliced":
        rewards, values, mask = rewards[::2, 3:20], values[::2, 3:20], mask[::2, 3:20]
        given_views, bootstrap = [rewards, values, mask], bootstrap[::2]
    else:
        given_views = [x[:1].expand(4, 24) for x in (rewards, values, mask)]
        rewards, values, mask = (x.clone() for x in given_views)
    assert_matches(run, *given_views, gamma=0.95, bootstrap=bootstrap)


def test_half_precision_is_computed_and_returned_in_fp32(run):
    rewards, values, mask, _ = sample(3, 50, keep=0.8, dtype=torch.bfloat16)
    advantages, returns = run(rewards, values, mask)
    assert advantages.dtype == returns.dtype == torch.float32
    expected = run(rewards.float(), values.float(), mask)
    assert torch.equal(advantages, expected[0]) and torch.equal(returns, expected[1])


def test_fp64_of_either_input_makes_all_fp64(run):
    rewards, values, mask, bootstrap = sample(3, 50, keep=0.8, dtype=torch.float64)
    values = values.float()
    assert_matches(run, rewards, values, mask, bootstrap=bootstrap, tolerance=1e-14)


def test_returns_are_advantages_plus_values(run):
    rewards, values, _, _ = sample(3, 50)
    advantages, returns = run(rewards, values)
    assert torch.equal(returns, advantages + values.to(run.device))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_match_finite_differences(run, packed):
    rewards, values, mask, bootstrap = sample(3, 11, keep=0.7, dtype=torch.float64)
    mask[1] = False
    options = {"gamma": torch.tensor([0.9, 1.0, 0.5]), "lam": torch.tensor([0.95, 0.5, 1.0])}
    if packed:
        rewards, values, mask = rewards.flatten(), values.flatten(), mask.flatten()
        options["cu_seqlens"] = torch.tensor([0, 4, 4, 33], dtype=torch.int32)
    inputs = [x.to(run.device).requires_grad_() for x in (rewards, values, bootstrap)]

    def of(rewards, values, bootstrap):
        return run(rewards, values, mask, bootstrap=bootstrap, **options)

    # Random directions: the interpreter needs seconds for each entry of a full Jacobian.
    assert torch.autograd.gradcheck(of, inputs, fast_mode=True)


@pytest.mark.parametrize("T", [1, 6, 333, 1500])
def test_gradients_match_the_reference(run, T):
    rewards, values, mask, bootstrap = sample(3, T, keep=0.7, seed=T)
    inputs = [with_garbage(rewards, mask), with_garbage(values, mask), bootstrap]
    upstream = [with_garbage(x, mask) for x in sample(3, T, seed=1)[:2]]
    options = {"gamma": torch.tensor([0.9, 1.0, 0.99]), "lam": 0.9}

    def gradients(function, device):
        leaves = [x.detach().clone().to(device).requires_grad_() for x in inputs]
        outputs = function(leaves[0], leaves[1], mask, bootstrap=leaves[2], **options)
        return torch.autograd.grad(outputs, leaves, [x.to(device) for x in upstream])

    expected = gradients(gae_reference, "cpu")
    for grad, truth in zip(gradients(run, run.device), expected, strict=True):
        torch.testing.assert_close(grad.cpu(), truth, rtol=1e-5, atol=1e-5)
