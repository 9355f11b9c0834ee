"""Losses by name: what each trains on, with a critic and without."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from trainer_cases import PROMPTS, length_reward, ppo_config

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.config import ConfigError
from rlhf_fast.ops.policy_loss import policy_loss_reference
from rlhf_fast.presets import PRESETS
from rlhf_fast.scratch import tiny_llama
from rlhf_fast.trainers.experience import make_experience

WITHOUT_CRITIC = [name for name, preset in PRESETS.items() if not preset.needs_critic]
GROUPS = [name for name, preset in PRESETS.items() if preset.needs_groups]


def config_of(loss, **changes):
    return ppo_config(**{"loss": loss, "samples_per_prompt": 4, **changes})


def experience_of(trainer, scores):
    """What a first step would learn from: 8 completions of 2 prompts, 4 each."""
    rollout = trainer.generate([p for p in PROMPTS[:2] for _ in range(4)])
    settings = (trainer.config, trainer.kl_coef, [torch.arange(8)])
    return make_experience(trainer._module, trainer.ref, rollout, scores, *settings)


@pytest.mark.parametrize("loss", PRESETS)
def test_every_loss_trains_and_moves_the_policy(model, tokenizer, loss):
    before = copy.deepcopy(model.state_dict())
    trainer = PPOTrainer(
        model, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer, config=config_of(loss)
    ).train()
    assert len(trainer.run.history) == 3
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
    has_critic = PRESETS[loss].needs_critic
    for name in ("value_loss", "explained_variance"):
        assert (name in trainer.run.history[0]) == has_critic


@pytest.mark.parametrize("loss", WITHOUT_CRITIC)
def test_micro_batches_add_up_to_the_whole_batch(model, tokenizer, loss):
    weights, metrics = [], []
    for micro in (8, 2):
        trainer = PPOTrainer(
            copy.deepcopy(model),
            tokenizer=tokenizer,
            config=config_of(loss, micro_batch_size=micro),
        )
        torch.manual_seed(0)
        rollout = trainer.generate([p for p in PROMPTS[:2] for _ in range(4)])
        metrics.append(trainer.step(rollout, torch.arange(8.0) ** 1.5))
        weights.append(torch.cat([x.flatten() for x in trainer.model.state_dict().values()]))
    torch.testing.assert_close(*weights, atol=2e-4, rtol=1e-3)
    for name in ("policy_loss", "entropy", "ratio_mean", "approx_kl_k3", "clip_fraction_high"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-3, abs=1e-5), name


def test_completions_are_compared_with_those_of_their_own_prompt(model, tokenizer):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config_of("rloo"))
    scores = torch.tensor([0.0, 3.0, 6.0, 3.0, 100.0, 100.0, 100.0, 104.0])
    advantages = experience_of(trainer, scores).advantages
    # Policy and reference are still one, so the KL is 0. Less the mean of the three others:
    expected = [-4.0, 0.0, 4.0, 0.0, -4 / 3, -4 / 3, -4 / 3, 4.0]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_kl_and_a_missing_end_are_taken_off_the_score_before_groups_are_compared(
    model, tokenizer
):
    config = config_of("dr_grpo", kl_coef=0.5, missing_eos_penalty=3.0)
    trainer = PPOTrainer(
        model,
        tokenizer=tokenizer,
        config=config,
        ref=tiny_llama(tokenizer, hidden_size=32, context=64, seed=7),
    )
    scores = torch.arange(8.0)
    experience = experience_of(trainer, scores)
    kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
    assert kl.abs().min() > 1e-3
    rewards = scores - 0.5 * kl - 3.0 * (~experience.rollout.finished)
    expected = rewards - rewards.view(2, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(experience.advantages, expected)


def test_without_groups_the_advantages_are_the_whitened_returns(model, tokenizer):
    config = config_of("reinforce", samples_per_prompt=1, gamma=0.5, kl_coef=0.0)
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config)
    scores = torch.arange(8.0) - 2
    experience = experience_of(trainer, scores)
    mask = experience.rollout.completion_mask
    to_go = mask.flip(1).cumsum(1).flip(1) - 1  # steps from a token to the last
    returns = scores[:, None] * 0.5**to_go
    counting = returns[mask]
    expected = (returns - counting.mean()) / counting.std()
    torch.testing.assert_close(experience.advantages[mask], expected[mask])
    assert (experience.advantages[~mask] == 0).all()


def test_the_length_adaptive_lambda_is_that_of_vapo(model, tokenizer):
    config = config_of("vapo", whiten_advantages=False, ignore_eos=True, max_new_tokens=40)
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config)
    experience = experience_of(trainer, torch.arange(8.0))
    # The value head starts at 0, so only the last token has an error: the score.
    lam = 1 - 1 / (0.05 * 40)
    expected = torch.arange(8.0)[:, None] * lam ** torch.arange(39, -1, -1)
    torch.testing.assert_close(experience.advantages, expected)
    torch.testing.assert_close(experience.returns, torch.arange(8.0)[:, None].expand(8, 40))


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "gspo", "cispo", "rloo"])
def test_the_first_loss_is_that_of_the_op_by_its_own_count(model, tokenizer, loss):
    """The divisor: tokens, completions or a constant, by the aggregation."""
    config = config_of(loss, epochs=1, kl_loss_coef=0.0)
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config)
    scores = torch.tensor([0.0, 3.0, 6.0, 3.0, 1.0, 1.0, 1.0, 4.0])
    experience = experience_of(trainer, scores)
    metrics = trainer.step(experience.rollout, scores)
    mask = experience.rollout.completion_mask
    expected, _ = policy_loss_reference(
        experience.old_logprobs,
        experience.old_logprobs,
        experience.advantages,
        mask,
        **PRESETS[loss].loss,
        normalizer=8 * 5 if loss == "dr_grpo" else None,
    )
    assert metrics["policy_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["entropy"] > 1.0


def test_a_loss_brings_its_defaults_and_what_is_named_stays():
    assert PPOConfig().clip_high == 0.2 and PPOConfig().epochs == 4
    dapo = PPOConfig(loss="dapo")
    assert (dapo.clip_high, dapo.kl_coef, dapo.epochs, dapo.samples_per_prompt) == (0.28, 0, 1, 8)
    assert PPOConfig(loss="dapo", clip_high=0.3, seed=5).clip_high == 0.3
    assert PPOConfig(loss="dapo", seed=5).replace(batch_size=32).clip_high == 0.28
    other = PPOConfig(loss="gspo", seed=5, clip_low=0.1).replace(loss="grpo")
    assert (other.seed, other.clip_low, other.clip_high, other.kl_loss_coef) == (5, 0.1, 0.2, 0.04)


@pytest.mark.parametrize("loss", PRESETS)
def test_the_documentation_has_a_row_for_every_loss(loss):
    page = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
    table = page.partition("## The presets")[2].partition("Beside the others")[0]
    (row,) = (line for line in table.splitlines() if line.startswith(f"| `{loss}` |"))
    preset = PRESETS[loss]
    assert f"`{preset.loss['ratio']}`" in row
    assert preset.aggregation in row
    number = re.search(r"arXiv:([\d.]+)", preset.source)
    assert "Williams 1992" in row if number is None else number[1] in row


@pytest.mark.parametrize("loss", GROUPS)
def test_groups_of_one_are_refused(loss):
    with pytest.raises(
        ConfigError, match=re.escape(f"{loss!r} compares completions of one prompt")
    ):
        PPOConfig(loss=loss, samples_per_prompt=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "grop"}, "'ppo', 'vapo', 'reinforce'"),
        ({"loss": "grpo", "whiten_rewards": True}, "'grpo' does not read whiten_rewards"),
        ({"loss": "grpo", "gamma": 0.5}, "does not read gamma, but gamma = 0.5"),
        ({"loss": "reinforce", "clip_low": 0.1}, "'reinforce' does not read clip_low"),
        ({"loss": "reinforce", "lam": "adaptive"}, "does not read lam"),
        ({"loss": "grpo", "kl_target": 6.0}, "start from one above 0"),
        ({"loss": ["grpo"]}, "'ppo', 'vapo', 'reinforce'"),
        ({"lam": "adaptive", "whiten_rewards": True}, "do not go together"),
        ({"lam": "long"}, "'adaptive'"),
        ({"lam": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**fields)


def test_completions_of_different_prompts_are_no_group(model, tokenizer):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config_of("grpo"))
    rollout = trainer.generate([PROMPTS[0]] * 4 + [PROMPTS[1]] * 3 + [PROMPTS[2]])
    with pytest.raises(ValueError, match="completion 7 .* another prompt than completion 4"):
        trainer.step(rollout, torch.zeros(8))


def test_a_reference_that_rules_a_token_out_does_not_reach_a_reward_without_a_kl(
    model, tokenizer, monkeypatch
):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config_of("dr_grpo"))
    forward = trainer.ref.forward

    def ruling_out(*args):
        output = forward(*args)
        output.logprobs[output.logprobs != 0] = -torch.inf
        return output

    monkeypatch.setattr(trainer.ref, "forward", ruling_out)
    assert experience_of(trainer, torch.arange(8.0)).advantages.isfinite().all()


def test_loss_and_critic_must_go_together(model, tokenizer):
    with pytest.raises(ConfigError, match="'ppo' takes its advantages from a critic.*: reinforce"):
        PPOTrainer(model, tokenizer=tokenizer, critic=None, config=ppo_config())
    with pytest.raises(ConfigError, match="'grpo' uses no critic; pass critic=None"):
        PPOTrainer(model, tokenizer=tokenizer, critic="head", config=config_of("grpo"))
    trainer = PPOTrainer(model, tokenizer=tokenizer, critic=None, config=config_of("grpo"))
    assert trainer._module.head is None and trainer._module.critic is None
