"""What holds for all three stages: micro-batches, resumed runs, saved models, frozen parameters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from trainer_cases import (
    EXAMPLES,
    PAIRS,
    PROMPTS,
    assert_same,
    length_reward,
    ppo_config,
    sft_config,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_fast
from rlhf_fast import PPOTrainer, RewardConfig, RewardTrainer, SFTTrainer
from rlhf_fast.data import batch_indices


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
