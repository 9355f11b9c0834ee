"""Our advantages and the reward model's loss against TRL's trainers, called unmodified."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from _peers import Accelerator, assert_agree, batch, load
from torch import Tensor
from trl_rollouts import generate_and_score

from rlhf_fast.ops import group_advantages, pairwise_loss, ppo_advantages

GRPOTrainer = load("trl.trainer.grpo_trainer").GRPOTrainer
RLOOTrainer = load("trl.trainer.rloo_trainer").RLOOTrainer
RewardTrainer = load("trl.trainer.reward_trainer").RewardTrainer


def test_grpo_advantages_differ_by_the_epsilon():
    """1e-4 is added to the deviation there, 1e-6 here."""
    b = batch(rows=8)
    theirs = generate_and_score(GRPOTrainer, b, 4)["advantages"]
    ours = group_advantages(b.scores, 4, kind="grpo")
    deviation = b.scores.view(2, 4).std(1).repeat_interleave(4)
    torch.testing.assert_close(theirs, ours * (deviation + 1e-6) / (deviation + 1e-4))


def test_small_rewards_are_scaled_to_one_here_shrunk_by_trls_epsilon():
    """The deviation must come out as 1, whatever the rewards' scale; at 1e-4 TRL gives a half."""
    b = batch(rows=8)
    deviation = b.scores.view(2, 4).std(1).repeat_interleave(4)
    b = b._replace(scores=b.scores / deviation * 1e-4)
    ours = group_advantages(b.scores, 4, kind="grpo").view(2, 4).std(1)
    torch.testing.assert_close(ours, torch.ones_like(ours), rtol=0.02, atol=0.0)
    theirs = generate_and_score(GRPOTrainer, b, 4)["advantages"].view(2, 4).std(1)
    torch.testing.assert_close(theirs, torch.full_like(theirs, 0.5))


def test_equal_rewards_are_no_preference_even_in_fp32():
    """The mean of fifteen 1000.1 is off by a rounding in fp32, which TRL takes for a reward."""
    b = batch(rows=15)._replace(scores=torch.full((15,), 1000.1))
    assert (group_advantages(b.scores, 15, kind="grpo") == 0.0).all()
    assert generate_and_score(GRPOTrainer, b, 15)["advantages"].abs().max() > 0.1


def test_dr_grpo_advantages():
    b = batch(rows=8)
    theirs = generate_and_score(GRPOTrainer, b, 4, scale_rewards="none")["advantages"]
    torch.testing.assert_close(group_advantages(b.scores, 4, kind="dr_grpo"), theirs)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo_advantages(beta):
    """With k1 in the reward, summed over the sequence, as `ppo_advantages` places it."""
    b = batch(rows=8)
    theirs = generate_and_score(RLOOTrainer, b, 4, beta=beta)["advantages"]
    rewards = ppo_advantages(b.scores, b.old, b.ref, b.values, b.mask, kl_coef=beta)[2].sum(1)
    torch.testing.assert_close(group_advantages(rewards, 4, kind="rloo"), theirs)


def test_normalised_rloo_is_reinforce_plus_plus_with_baseline():
    """TRL's `normalize_advantages` whitens n / (n - 1) times what REINFORCE++ does, over the
    sequences as we do; with groups of one size the factor cancels.
    """
    b = batch(rows=8)
    theirs = generate_and_score(RLOOTrainer, b, 4, normalize_advantages=True)["advantages"]
    rloo = group_advantages(b.scores, 4, kind="rloo")
    torch.testing.assert_close(theirs, rloo / (rloo.std() + 1e-4))
    ours = group_advantages(b.scores, 4, kind="reinforce++")
    torch.testing.assert_close(ours, rloo / (rloo.var() + 1e-8 * (4 / 3) ** 2).sqrt())


def reward_loss(scores: Tensor, margin: Tensor | None, center: float | None):
    stand_in = SimpleNamespace(
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=Accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        model=SimpleNamespace(training=True),
    )
    inputs = {"attention_mask": torch.ones(1)} | ({} if margin is None else {"margin": margin})

    def model(**kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=scores[:, None])

    return RewardTrainer.compute_loss(stand_in, model, inputs), stand_in._metrics["train"]


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_pairwise_loss(with_margin, center):
    chosen, rejected = 3 * torch.randn(2, 12, dtype=torch.float64)
    margin = torch.rand(12, dtype=torch.float64) if with_margin else None
    assert_agree(
        lambda c, r: pairwise_loss(c, r, margin=margin, center=center or 0.0)[0],
        lambda c, r: reward_loss(torch.cat([c, r]), margin, center)[0],
        chosen,
        rejected,
    )
    ours = pairwise_loss(chosen, rejected, margin=margin)[1]
    theirs = reward_loss(torch.cat([chosen, rejected]), margin, center)[1]
    assert ours["accuracy"].item() == pytest.approx(theirs["accuracy"][0])
    assert ours["gap_mean"].item() == pytest.approx(theirs["margin"][0])


def test_a_tie_is_half_right_here_wrong_in_trl():
    tie = torch.zeros(4)
    assert pairwise_loss(tie, tie)[1]["accuracy"] == 0.5
    assert reward_loss(torch.cat([tie, tie]), None, None)[1]["accuracy"] == [0.0]
