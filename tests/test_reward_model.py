"""The trainer of reward models: its loss, normalisation, what becomes of the given model."""

from __future__ import annotations

import copy

import pytest
import torch
from trainer_cases import EXAMPLES, PAIRS, PROMPTS, assert_same, ppo_config, weights

import rlhf_fast
from rlhf_fast import RewardConfig, RewardModel, RewardTrainer


def test_reward_model_learns_the_pairs_and_is_normalised_on_them(model, tokenizer):
    trainer = rlhf_fast.reward(
        model, PAIRS, tokenizer=tokenizer, eval_data=PAIRS,
        batch_size=8, learning_rate=1e-2, epochs=10,
    )  # fmt: skip
    assert trainer.run.history[-1]["eval_accuracy"] == 1.0
    prompts = [row["prompt"] for row in PAIRS]
    scores = torch.cat(
        [trainer.model.score(prompts, [row[side] for row in PAIRS])
         for side in ("chosen", "rejected")]
    )  # fmt: skip
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-4)


def test_the_first_reward_loss_is_bradley_terry_with_margin_and_centring(model, tokenizer):
    rows = [{**row, "margin": 0.5} for row in PAIRS[:4]]
    start = RewardModel(copy.deepcopy(model), tokenizer)
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (
        start.score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")
    )
    expected = torch.log1p(torch.exp(-(chosen - rejected - 0.5))).mean()
    expected = expected + 0.3 * (chosen + rejected).square().mean()
    trainer = RewardTrainer(
        start, rows, config=RewardConfig(batch_size=4, center=0.3, epochs=1, normalize=False)
    ).train()
    assert trainer.run.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_scores_are_normalised_on_completions_of_the_reference(model, tokenizer):
    reference = [{"prompt": row["prompt"], "completion": " the sea"} for row in EXAMPLES]
    trainer = rlhf_fast.reward(
        model, PAIRS, tokenizer=tokenizer, reference_data=reference, batch_size=8,
        learning_rate=1e-2,
    )  # fmt: skip
    scores = trainer.model.score(PROMPTS, [" the sea"] * len(PROMPTS))
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-3)


def test_training_a_reward_model_leaves_the_given_model_alone(model, tokenizer):
    before = weights(model)
    scorer = rlhf_fast.reward(model, PAIRS, tokenizer=tokenizer, batch_size=8).model
    assert_same(weights(model), before, atol=0, rtol=0)
    expected = scorer.score(PROMPTS, [" the end"] * len(PROMPTS))
    rlhf_fast.ppo(
        model, reward=scorer, prompts=PROMPTS, tokenizer=tokenizer, **ppo_config().model_dump()
    )
    assert torch.equal(scorer.score(PROMPTS, [" the end"] * len(PROMPTS)), expected)
