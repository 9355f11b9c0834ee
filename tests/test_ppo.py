"""PPO: first ratio and gradient, KL, critics, rollouts of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
from trainer_cases import PROMPTS, assert_same, length_reward, ppo_config, weights

from rlhf_fast import PPOTrainer, RewardModel
from rlhf_fast.data import Rollout, batch_indices
from rlhf_fast.scratch import tiny_llama
from rlhf_fast.trainers import update
from rlhf_fast.trainers.experience import make_experience


def test_generate_and_step_are_a_loop_of_ones_own(model, tokenizer):
    config = ppo_config()
    whole = PPOTrainer(
        copy.deepcopy(model), reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer,
        config=config,
    ).train()  # fmt: skip
    trainer = PPOTrainer(copy.deepcopy(model), tokenizer=tokenizer, config=config)
    for iteration in range(config.iterations):
        rows = batch_indices(iteration, len(PROMPTS), 8, config.seed).tolist()
        rollout = trainer.generate([PROMPTS[i] for i in rows])
        texts = tokenizer.batch_decode(rollout.completion_ids(), skip_special_tokens=True)
        trainer.step(rollout, length_reward(None, texts))
    assert_same(weights(trainer.model), weights(whole.model), atol=0, rtol=0)


def test_the_first_ratio_is_exactly_one(model, tokenizer):
    config = ppo_config(iterations=1, epochs=1, micro_batch_size=8)
    trainer = PPOTrainer(
        model, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer, config=config
    ).train()
    row = trainer.run.history[0]
    assert row["approx_kl_k3"] == pytest.approx(0.0, abs=1e-9)
    assert row["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)


def test_the_first_policy_gradient_is_that_of_whitened_advantages(model, tokenizer):
    """One update re-derived by hand: rewards, GAE(.95) with V = 0, whitening, gradient ascent."""
    config = ppo_config(epochs=1, value_coef=0.0, kl_coef=0.0, max_grad_norm=None)
    trainer = PPOTrainer(copy.deepcopy(model), tokenizer=tokenizer, config=config)
    rollout = trainer.generate(PROMPTS[:8])
    scores = torch.arange(8.0) ** 2
    grads = {}

    def capture(*args, **kwargs):
        for name, p in trainer.model.named_parameters():
            grads[name] = p.grad.clone()

    trainer._optimizer.optimizer.register_step_pre_hook(capture)
    trainer.step(rollout, scores)

    advantages = torch.zeros_like(rollout.logprobs)
    for i, keep in enumerate(rollout.completion_mask):
        length = int(keep.sum())
        for t in range(length):
            advantages[i, t] = scores[i] * 0.95 ** (length - 1 - t)
    kept = advantages[rollout.completion_mask]
    advantages = (advantages - kept.mean()) / (kept.var() + 1e-8).sqrt()
    positions = (rollout.mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(
        rollout.tokens, attention_mask=rollout.mask.long(), position_ids=positions
    ).logits
    start = rollout.prompt_length
    logprobs = logits[:, start - 1 : -1].log_softmax(-1)
    logprobs = logprobs.gather(2, rollout.tokens[:, start:, None])[..., 0]
    mask = rollout.completion_mask
    (-(advantages * logprobs)[mask].sum() / mask.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["k2", "k3", "full"])
def test_a_kl_in_the_loss_holds_the_policy_near_the_reference(model, tokenizer, kind):
    def final_kl(coefficient):
        trainer = PPOTrainer(
            copy.deepcopy(model), reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer,
            config=ppo_config(
                iterations=8, kl_coef=0.0, kl_loss_coef=coefficient, kl_loss_kind=kind,
                learning_rate=5e-3, rollout_batch_size=64, batch_size=64,
            ),
        ).train()  # fmt: skip
        return trainer.run.history[-1]["kl"]

    assert final_kl(10.0) < 0.5 * final_kl(0.0)


def test_the_adaptive_coefficient_follows_the_formula(model, tokenizer):
    config = ppo_config(kl_target=6.0, kl_horizon=100, kl_coef=0.2)
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config)
    trainer._adapt_kl(7.5, 10)  # 25 % above, clipped to 20 %
    assert trainer.kl_coef == pytest.approx(0.2 * (1 + 0.2 * 10 / 100))
    trainer._adapt_kl(5.4, 10)  # 10 % below
    assert trainer.kl_coef == pytest.approx(0.2 * 1.02 * (1 - 0.1 * 10 / 100))


def test_a_critic_from_the_reward_model_scores_like_it_before_training(model, tokenizer):
    scorer = RewardModel(copy.deepcopy(model), tokenizer)
    scorer.gain.fill_(3.0)
    scorer.shift.fill_(-5.0)
    critic = scorer.as_critic()
    tokens = torch.tensor([tokenizer("the cat sat on")["input_ids"] + [tokenizer.eos_token_id]])
    mask = torch.ones_like(tokens).bool()
    torch.testing.assert_close(critic(tokens, mask)[:, -1], scorer(tokens, mask))
    trainer = PPOTrainer(
        model, reward=scorer, prompts=PROMPTS, tokenizer=tokenizer, critic=scorer,
        config=ppo_config(iterations=1),
    ).train()  # fmt: skip
    assert "score" in trainer.run.history[0]


def test_several_samples_of_each_prompt_stand_side_by_side(model, tokenizer):
    seen = []

    def watch(prompts, completions):
        seen.append(prompts)
        return [0.0] * len(prompts)

    PPOTrainer(
        model, reward=watch, prompts=PROMPTS, tokenizer=tokenizer,
        config=ppo_config(iterations=1, samples_per_prompt=4),
    ).train()  # fmt: skip
    assert [prompt for prompt in seen[0][::4] for _ in range(4)] == seen[0]
    assert len(set(seen[0])) == 2


def test_rewards_without_a_spread_do_not_make_nan(model, tokenizer):
    trainer = PPOTrainer(
        model, reward=lambda prompts, completions: [1.0] * len(prompts), prompts=PROMPTS,
        tokenizer=tokenizer, config=ppo_config(whiten_rewards=True),
    ).train()  # fmt: skip
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_whitened_rewards_have_the_deviation_1_and_the_mean_that_they_had(model, tokenizer):
    """KL, score and GAE by hand, token by token."""
    config = ppo_config(
        whiten_rewards=True, whiten_advantages=False, kl_coef=0.3, gamma=0.9, lam=0.5
    )
    trainer = PPOTrainer(
        model, tokenizer=tokenizer, config=config, critic="model",
        ref=tiny_llama(tokenizer, hidden_size=32, context=64, seed=7),
    )  # fmt: skip
    torch.nn.init.normal_(trainer._module.critic.head.weight)
    rollout, scores = trainer.generate(PROMPTS[:8]), torch.arange(8.0)
    given = (trainer._module, trainer.ref, rollout, scores, config, 0.3, [torch.arange(8)])
    experience = make_experience(*given)
    kl = experience.old_logprobs - experience.ref_logprobs
    rewards = [-0.3 * x[keep] for x, keep in zip(kl, rollout.completion_mask, strict=True)]
    for row, score in zip(rewards, scores, strict=True):
        row[-1] += score
    mean, deviation = torch.cat(rewards).mean(), (torch.cat(rewards).var() + 1e-8).sqrt()
    for i, keep in enumerate(rollout.completion_mask):
        values = [*experience.values[i, keep].tolist(), 0.0]
        assert any(values)
        advantage, expected = 0.0, []
        for t in reversed(range(len(rewards[i]))):
            reward = ((rewards[i][t] - mean) / deviation + mean).item()
            advantage = reward + 0.9 * values[t + 1] - values[t] + 0.45 * advantage
            expected.insert(0, advantage)
        assert experience.advantages[i, keep].tolist() == pytest.approx(expected, abs=1e-4)
        returns = [a + v for a, v in zip(expected, values, strict=False)]
        assert experience.returns[i, keep].tolist() == pytest.approx(returns, abs=1e-4)


def test_every_epoch_takes_every_completion_once_in_an_order_of_its_own(
    model, tokenizer, monkeypatch
):
    taken, loss = [], update.ppo_loss

    def watch(actor_critic, ref, piece, **options):
        taken.extend(piece.scores.tolist())
        return loss(actor_critic, ref, piece, **options)

    monkeypatch.setattr(update, "ppo_loss", watch)
    config = ppo_config(epochs=3, batch_size=4, micro_batch_size=2)
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config)
    trainer.step(trainer.generate(PROMPTS[:8]), torch.arange(8.0))
    epochs = [taken[i : i + 8] for i in range(0, 24, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len(set(map(tuple, epochs))) == 3


def test_rollouts_of_ones_own_can_be_learnt_from(model, tokenizer):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config())
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:8]]
    completions = [tokenizer(" the end")["input_ids"] for _ in prompts]
    rollout = Rollout.from_lists(prompts, completions, pad_id=tokenizer.pad_token_id)
    assert trainer.step(rollout, torch.randn(8))["length"] == len(completions[0])


def test_rows_that_stand_for_no_token_are_in_no_distribution(model, tokenizer):
    model.resize_token_embeddings(len(tokenizer) + 64)
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config())
    rollout = trainer.generate(PROMPTS[:8])
    metrics = trainer.step(rollout, [0.0] * 8)
    assert metrics["approx_kl_k3"] < 0.05
    start = rollout.prompt_length
    fresh = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config())
    again = fresh.generate(PROMPTS[:8])
    scored = fresh.ref(again.tokens, again.mask, again.targets).logprobs[:, start:]
    torch.testing.assert_close(again.logprobs, scored, atol=2e-5, rtol=1e-5)


def test_a_critic_can_come_from_a_folder(model, tokenizer, tmp_path):
    RewardModel(copy.deepcopy(model), tokenizer).save_pretrained(tmp_path)
    trainer = PPOTrainer(model, tokenizer=tokenizer, critic=tmp_path, config=ppo_config())
    trainer.step(trainer.generate(PROMPTS[:8]), [0.0] * 8)
