"""Our advantages and masked statistics against verl's, called unmodified.

Where the two differ, the test says on which input, and derives from the formula who is right.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _peers import assert_agree, batch, load
from torch import Tensor

from rlhf_fast.ops import (
    gae,
    group_advantages,
    masked_mean,
    masked_var,
    masked_whiten,
    ppo_advantages,
)

algos = load("verl.trainer.ppo.core_algos")
functional = load("verl.utils.torch_functional")


def by_group(sizes: list[int]) -> np.ndarray:
    """verl's `index`: the group of each row."""
    return np.repeat(np.arange(len(sizes)), sizes)


def grouped(name: str, scores: Tensor, sizes: list[int], **options: object) -> Tensor:
    """verl's estimator `name` on scores that sit on each row's last token: one value a row."""
    estimator = algos.get_adv_estimator_fn(name)
    b = batch(rows=len(scores))
    rewards = torch.zeros_like(b.rewards, dtype=scores.dtype)
    rewards[torch.arange(len(scores)), b.mask.sum(1) - 1] = scores
    advantages, _ = estimator(rewards, b.mask.to(scores.dtype), index=by_group(sizes), **options)
    assert (advantages[~b.mask] == 0.0).all()
    torch.testing.assert_close(advantages[b.mask], advantages[:, :1].expand_as(b.mask)[b.mask])
    return advantages[:, 0]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
@pytest.mark.parametrize("gaps", [False, True])
def test_gae(gamma, lam, gaps):
    """verl whitens too, and steps over gaps as we do."""
    b = batch(gaps=gaps)
    expected, expected_returns = algos.compute_gae_advantage_return(
        b.rewards, b.values, b.ones, gamma, lam
    )
    advantages, returns = gae(b.rewards, b.values, b.mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(returns[b.mask], expected_returns[b.mask])
    whitened = masked_whiten(advantages, b.mask)
    torch.testing.assert_close(whitened[b.mask], expected[b.mask])
    # Where no token counts ours are 0, verl's what the scan carried past.
    assert (returns[~b.mask] == 0.0).all() and (whitened[~b.mask] == 0.0).all()
    assert (expected[~b.mask] != 0.0).all() and (expected_returns[~b.mask] != 0.0).any()


def test_garbage_under_the_mask_spoils_verls_gae_not_ours():
    b = batch()
    values = torch.where(b.mask, b.values, torch.nan)
    assert algos.compute_gae_advantage_return(b.rewards, values, b.ones, 1.0, 0.95)[0].isnan().all()
    clean = gae(b.rewards, b.values, b.mask)
    torch.testing.assert_close(gae(b.rewards, values, b.mask), clean)


def test_ppo_advantages_from_scores_to_whitened_advantages():
    b = batch(gaps=True)
    at_end = torch.zeros_like(b.rewards)
    last = torch.where(b.mask, torch.arange(b.mask.shape[1]), -1).amax(1)
    at_end[torch.arange(len(last)), last] = b.scores
    rewards = algos.compute_rewards(at_end, b.old, b.ref, 0.1) * b.ones
    advantages, returns = algos.compute_gae_advantage_return(rewards, b.values, b.ones, 0.99, 0.9)
    ours = ppo_advantages(
        b.scores, b.old, b.ref, b.values, b.mask, kl_coef=0.1, gamma=0.99, lam=0.9
    )
    for result, expected in zip(ours, (advantages, returns, rewards), strict=True):
        torch.testing.assert_close(result[b.mask], expected[b.mask])


@pytest.mark.parametrize(
    "name, kind, options, tolerance",
    [
        ("grpo", "grpo", {}, 1e-12),
        ("grpo", "dr_grpo", {"norm_adv_by_std_in_grpo": False}, 1e-12),
        ("grpo_vectorized", "grpo", {}, 1e-5),  # verl sums these in fp32
        ("grpo_vectorized", "dr_grpo", {"norm_adv_by_std_in_grpo": False}, 1e-5),
        ("rloo", "rloo", {}, 1e-12),
        ("rloo_vectorized", "rloo", {}, 1e-12),
    ],
)
def test_group_advantages(name, kind, options, tolerance):
    scores, sizes = torch.randn(11, dtype=torch.float64), [4, 2, 5]
    expected = grouped(name, scores, sizes, **options)
    ours = group_advantages(scores, sizes, kind=kind)
    torch.testing.assert_close(ours, expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name, kind", [("grpo", "grpo"), ("rloo", "rloo")])
def test_a_group_of_one_has_no_preference(name, kind):
    """Its reward less its mean, or less the mean of no others, is nothing; verl gives the reward.

    verl's own vectorised RLOO gives 0.
    """
    scores = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    ours = group_advantages(scores, [1, 2], kind=kind)
    assert ours[0] == 0.0
    theirs = grouped(name, scores, [1, 2])
    assert theirs[0].item() == pytest.approx(3.0, rel=1e-5)
    torch.testing.assert_close(theirs[1:], ours[1:])
    assert grouped("rloo_vectorized", scores, [1, 2])[0] == 0.0


def test_equal_rewards_are_no_preference_even_in_fp32():
    """The mean of seven 0.1 is not 0.1 in fp32; over a deviation of 0 + 1e-6 that shows."""
    scores = torch.full((7,), 0.1)
    assert (group_advantages(scores, 7, kind="grpo") == 0.0).all()
    theirs = grouped("grpo", scores, [7])
    assert 1e-3 < theirs.abs().max() < 1.0


def test_reinforce_plus_plus_is_the_whitened_discounted_return():
    from rlhf_fast.ops import discounted_returns

    for b in (batch(), batch(3, gaps=True)):
        advantages, returns = algos.compute_reinforce_plus_plus_outcome_advantage(
            b.rewards, b.ones, config=SimpleNamespace(gamma=0.9)
        )
        ours = discounted_returns(b.rewards, b.mask, gamma=0.9)
        torch.testing.assert_close(ours, returns)
        torch.testing.assert_close(masked_whiten(ours, b.mask), advantages)


def test_reinforce_plus_plus_baseline_counts_sequences_here_tokens_in_verl():
    """Both centre on the group, then whiten: we over the sequences, verl over their tokens.

    Over tokens a long completion counts more. With equal lengths only n / (n - 1) is left between
    the two.
    """
    scores, sizes = torch.randn(8, dtype=torch.float64), [4, 4]
    centred = group_advantages(scores, sizes, kind="dr_grpo")
    ours = group_advantages(scores, sizes, kind="reinforce++")
    torch.testing.assert_close(ours, centred / (centred.square().sum() / 7 + 1e-8).sqrt())

    lengths = batch(rows=8).mask.sum(1)
    tokens = centred.repeat_interleave(lengths)
    theirs = grouped("reinforce_plus_plus_baseline", scores, sizes)
    by_token = (centred - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(theirs, by_token)
    assert (theirs - ours).abs().max() > 0.1

    estimator = algos.get_adv_estimator_fn("reinforce_plus_plus_baseline")
    rewards = torch.zeros(8, 5, dtype=torch.float64).index_fill(1, torch.tensor(4), 1.0)
    rewards = rewards * scores[:, None]
    theirs = estimator(rewards, torch.ones_like(rewards), by_group(sizes))[0][:, 0]
    torch.testing.assert_close(theirs, ours * (39 / 40 * 8 / 7) ** 0.5)


def test_masked_statistics():
    b = batch()
    for ours, theirs in (
        (masked_mean, functional.masked_mean),
        (masked_var, functional.masked_var),
    ):
        assert_agree(lambda x, f=ours: f(x, b.mask), lambda x, f=theirs: f(x, b.ones), b.values)
    for shift in (True, False):
        assert_agree(
            lambda x, s=shift: b.returns * masked_whiten(x, b.mask, shift_mean=s),
            lambda x, s=shift: b.returns * b.ones * functional.masked_whiten(x, b.ones, s),
            b.values,
        )


def test_whitening_equal_values_gives_zero():
    """In fp32 verl's mean of equal values is off by a rounding, which 1 / sqrt(1e-8) blows up."""
    x = torch.full((1, 7), 1000.1)
    mask = torch.ones_like(x)
    assert (masked_whiten(x, mask) == 0.0).all()
    theirs = functional.masked_whiten(x, mask)
    assert theirs.abs().max() > 0.1


def test_variance_of_one_element_is_zero_in_verl_an_error():
    x, mask = torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0, 0.0]])
    assert masked_var(x, mask) == 0.0 and (masked_whiten(x, mask) == 0.0).all()
    with pytest.raises(ValueError, match="division by zero"):
        functional.masked_var(x, mask)
