import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.group_advantages import group_advantages

KINDS = ("grpo", "rloo", "dr_grpo", "reinforce++")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def published(rewards, sizes, kind):
    """The papers' formulas in plain Python, with the eps this library names."""
    out, start = [], 0
    for size in sizes:
        group = rewards[start : start + size]
        start += size
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            if kind == "rloo":
                out.append(reward - statistics.fmean(others) if others else 0.0)
            elif kind == "grpo":
                deviation = statistics.stdev(group) if size > 1 else 0.0
                out.append((reward - statistics.fmean(group)) / (deviation + 1e-6))
            else:
                out.append(reward - statistics.fmean(group))
    if kind == "reinforce++":
        mean, variance = statistics.fmean(out), statistics.variance(out)
        out = [(a - mean) / math.sqrt(variance + 1e-8) for a in out]
    return out


def test_hand_worked_groups_of_unequal_size():
    rewards = torch.tensor([1.0, 3.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    # Means 2 and 1; unbiased variances 2 and (1 + 1 + 4) / 2 = 3.
    root2, root3 = math.sqrt(2), math.sqrt(3)
    want = {
        "dr_grpo": [-1, 1, -1, -1, 2],
        "grpo": [-1 / root2, 1 / root2, -1 / root3, -1 / root3, 2 / root3],
        "rloo": [1 - 3, 3 - 1, 0 - 1.5, 0 - 1.5, 3 - 0],
        # -1 1 -1 -1 2 has mean 0 and squares 1 + 1 + 1 + 1 + 4 = 8 over n - 1 = 4.
        "reinforce++": [-1 / root2, 1 / root2, -1 / root2, -1 / root2, 2 / root2],
    }
    for kind, expected in want.items():
        got = group_advantages(rewards, [2, 3], kind=kind)
        assert got.tolist() == pytest.approx(expected, abs=3e-6), kind


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(KINDS))
def test_any_groups_agree_with_the_published_formulas(data, kind):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    total = sum(sizes)
    numbers = st.integers(-40, 40).map(lambda n: n / 8)
    rewards = data.draw(st.lists(numbers, min_size=max(total, 2), max_size=max(total, 2)))
    sizes = sizes if total > 1 else [2]
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), sizes, kind=kind)
    assert got.tolist() == pytest.approx(published(rewards, sizes, kind), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 0.7, -3.3])
def test_groups_without_variance_give_exactly_zero(kind, value):
    # In fp32 the mean of seven tenths is not a tenth: only an exact rule gives 0.
    rewards = torch.tensor([value] * 7 + [0.0, 1.0, 5.0] + [value])
    got = group_advantages(rewards, [7, 3, 1], kind=kind)
    assert got[:7].tolist() == [0.0] * 7
    assert got[10].item() == 0.0
    assert (got[7:10] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_int_list_and_tensor_sizes_agree(kind):
    rewards = torch.randn(12)
    by_int = group_advantages(rewards, 4, kind=kind)
    assert torch.equal(by_int, group_advantages(rewards, [4, 4, 4], kind=kind))
    assert torch.equal(by_int, group_advantages(rewards, torch.tensor([4, 4, 4]), kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_groups_permutes_the_advantages(kind):
    rewards = torch.randn(3, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    got = group_advantages(rewards.flatten(), 4, kind=kind).view(3, 4)
    permuted = group_advantages(rewards[order].flatten(), 4, kind=kind).view(3, 4)
    torch.testing.assert_close(permuted, got[order])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences_and_stay_finite_without_variance(kind):
    rewards = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: group_advantages(r, [3, 4], kind=kind), (rewards,))
    flat = torch.ones(4, requires_grad=True)
    group_advantages(flat, 2, kind=kind).sum().backward()
    assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_nothing(kind):
    assert group_advantages(torch.zeros(0), 4, kind=kind).shape == (0,)
    assert group_advantages(torch.zeros(0), [], kind=kind).shape == (0,)


def test_bad_arguments_are_named():
    rewards = torch.zeros(6)
    with pytest.raises(ValueError, match=r"6 rewards do not divide into groups of 4"):
        group_advantages(rewards, 4)
    with pytest.raises(ValueError, match=r"do not divide into groups of 0"):
        group_advantages(rewards, 0)
    with pytest.raises(ValueError, match=r"\[2, 3\] sums to 5; .* the 6 rewards"):
        group_advantages(rewards, [2, 3])
    with pytest.raises(ValueError, match=r"sizes >= 1"):
        group_advantages(rewards, [6, 0])
    with pytest.raises(ValueError, match=r"kind='ppo' is unknown"):
        group_advantages(rewards, 3, kind="ppo")
    with pytest.raises(ValueError, match=r"rewards has shape \[2, 3\]; expected \[B\]"):
        group_advantages(rewards.view(2, 3), 3)
    with pytest.raises(TypeError, match=r"group_size has dtype torch.float32"):
        group_advantages(rewards, torch.tensor([3.0, 3.0]))
