"""SFT, reward and PPO trainers: what one update does, accumulation, resuming."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from trainer_cases import EXAMPLES, PAIRS, PROMPTS, WORDS, length_reward, ppo_config, sft_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_fast
from rlhf_fast import (
    PPOTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    SFTTrainer,
)
from rlhf_fast.data import Rollout, batch_indices
from rlhf_fast.scratch import tiny_llama, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS) + " no end", *PROMPTS], 300)


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer, hidden_size=32, context=64)


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance, msg=name)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_sft_loss_is_transformers_own_over_the_tokens_that_count(model, tokenizer, loss_on):
    reference = copy.deepcopy(model)
    trainer = SFTTrainer(
        model, EXAMPLES, tokenizer=tokenizer,
        config=sft_config(loss_on=loss_on, batch_size=16, epochs=1),
    ).train()  # fmt: skip
    total, count = 0.0, 0
    for row in EXAMPLES:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([ids])
        if loss_on == "completion":
            labels[0, : len(prompt)] = -100
        scored = int((labels[0, 1:] != -100).sum())
        loss = reference(torch.tensor([ids]), labels=labels).loss
        total, count = total + loss.item() * scored, count + scored
    assert trainer.run.history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_sft_learns_the_examples(model, tokenizer):
    trainer = rlhf_fast.sft(
        model, EXAMPLES, tokenizer=tokenizer, eval_data=EXAMPLES,
        batch_size=8, learning_rate=1e-2, epochs=30, max_length=64,
    )  # fmt: skip
    assert trainer.run.history[-1]["eval_loss"] < 0.2 * trainer.run.history[0]["loss"]


def test_sft_on_texts_trains_on_every_token(model, tokenizer):
    trainer = SFTTrainer(
        model, ["the cat sat", "a dog ran"], tokenizer=tokenizer, config=sft_config(batch_size=2)
    )
    batch = trainer._batch(trainer._rows)
    assert torch.equal(batch.targets[:, 1:], batch.mask[:, 1:])


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_micro_batches_add_up_to_the_whole_batch(model, tokenizer, stage):
    results = []
    for micro in (None, 2):
        trained = copy.deepcopy(model)
        torch.manual_seed(0)
        if stage == "sft":
            config = sft_config(micro_batch_size=micro, weight_decay=0.1)
            result = SFTTrainer(trained, EXAMPLES, tokenizer=tokenizer, config=config).train().model
        elif stage == "reward":
            config = RewardConfig(
                batch_size=8, micro_batch_size=micro, learning_rate=1e-2, epochs=2, center=0.1
            )
            result = RewardTrainer(trained, PAIRS, tokenizer=tokenizer, config=config).train().model
        else:
            config = ppo_config(
                micro_batch_size=micro, entropy_coef=0.01, kl_loss_coef=0.1, kl_loss_kind="k3"
            )
            trainer = PPOTrainer(
                trained, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer, config=config
            ).train()
            result = trainer._module
        results.append(weights(result))
    assert_same(*results, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_resumed_run_ends_with_the_same_bits(model, tokenizer, tmp_path, stage, monkeypatch):
    def make(folder, resume=False, trained=None):
        torch.manual_seed(0)
        start = copy.deepcopy(model) if trained is None else trained
        if stage == "sft":
            config = sft_config(save_every=2)
            return SFTTrainer(start, EXAMPLES, tokenizer=tokenizer, config=config,
                              run_dir=folder, resume=resume)  # fmt: skip
        if stage == "reward":
            config = RewardConfig(batch_size=8, learning_rate=1e-2, epochs=2, save_every=2)
            return RewardTrainer(start, PAIRS, tokenizer=tokenizer, config=config,
                                 run_dir=folder, resume=resume)  # fmt: skip
        config = ppo_config(save_every=2, kl_target=1.0, kl_horizon=100)
        return PPOTrainer(start, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer,
                          config=config, run_dir=folder, resume=resume)  # fmt: skip

    whole = make(tmp_path / "whole").train()

    class Killed(Exception):
        pass

    cut = make(tmp_path / "cut")
    log, steps = cut.run.log, []

    def die_after_three(metrics):
        steps.append(metrics)
        log(metrics)
        if len(steps) == 3:
            raise Killed

    monkeypatch.setattr(cut.run, "log", die_after_three)
    with pytest.raises(Killed):
        cut.train()
    resumed = make(tmp_path / "cut", resume=True)
    assert resumed.run.step == 2
    resumed.train()
    assert_same(weights(resumed._module), weights(whole._module), atol=0, rtol=0)
    strip = ("seconds",)
    first, second = (
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(strip)}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    )
    assert first == second


def test_trained_models_load_with_transformers(model, tokenizer, tmp_path):
    trainer = rlhf_fast.ppo(
        model, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer, run_dir=tmp_path,
        save_every=1, **ppo_config(iterations=1).model_dump(exclude={"save_every"}),
    )  # fmt: skip
    for folder in (tmp_path / "model", tmp_path / "checkpoints" / "step-1" / "model"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert_same(weights(loaded), weights(trainer.model), atol=0, rtol=0)
        assert (
            AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]
            == (tokenizer("the cat")["input_ids"])
        )


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


def test_a_padding_token_can_be_named(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    trainer = PPOTrainer(
        model, reward=length_reward, prompts=PROMPTS, tokenizer=bare, config=ppo_config(),
        pad_token=bare.eos_token,
    ).train()  # fmt: skip
    assert trainer.run.step == 3


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_each_stage_may_have_its_own_precision(model, tokenizer, precision):
    trainer = PPOTrainer(
        model, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer,
        config=ppo_config(mixed_precision=precision, epochs=1),
    ).train()  # fmt: skip
    assert trainer.run.accelerator.mixed_precision == precision
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    # Before the first update policy, reference and old log-probs are one and the same, whatever
    # the precision of the trunk.
    assert trainer.run.history[0]["approx_kl_k3"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.run.history[0]["kl"] == 0.0


def test_rollouts_of_ones_own_can_be_learnt_from(model, tokenizer):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config())
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:8]]
    completions = [tokenizer(" the end")["input_ids"] for _ in prompts]
    rollout = Rollout.from_lists(prompts, completions, pad_id=tokenizer.pad_token_id)
    assert trainer.step(rollout, torch.randn(8))["length"] == len(completions[0])


def test_every_row_is_used_once_an_epoch_and_batches_are_full():
    seen = torch.cat([batch_indices(step, 10, 4, seed=3) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(batch_indices(2, 10, 4, seed=3), seen[8:12])


def test_a_metrics_file_that_was_cut_off_in_a_line_can_be_resumed(model, tokenizer, tmp_path):
    config = sft_config(save_every=1, epochs=1)
    SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=config, run_dir=tmp_path).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    resumed = SFTTrainer(
        model, EXAMPLES, tokenizer=tokenizer, config=config, run_dir=tmp_path, resume=True
    )
    assert [row["step"] for row in resumed.run.history] == [1, 2]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_frozen_parameters_stay_as_they_are(model, tokenizer, stage):
    model.model.embed_tokens.requires_grad_(False)
    before = weights(model)
    if stage == "sft":
        SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config()).train()
    elif stage == "reward":
        config = RewardConfig(batch_size=8, learning_rate=1e-2)
        model = RewardTrainer(model, PAIRS, tokenizer=tokenizer, config=config).train().model
    else:
        PPOTrainer(
            model, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer, config=ppo_config()
        ).train()
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])


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
