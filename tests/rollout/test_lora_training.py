"""PPO on a LoRA policy with rollouts of either engine: merged weights, or the adapter alone."""

from __future__ import annotations

import peft
import pytest
import torch
from rollout_cases import VLLM, forward_logprobs, make_model

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.config import ConfigError
from rlhf_fast.rollout import RolloutConfig, VLLMEngine

TEXTS = ["the cat", "the dog sat", "on the mat", "a dog ran"]


def short(prompts, completions, completion_ids):
    return [-float(sum(ids)) / 1000 for ids in completion_ids]


def adapt(tokenizer, drawn=False, **options):
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    model = peft.get_peft_model(make_model(tokenizer), config)
    if drawn:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer_of(model, tokenizer, rollout):
    return PPOTrainer(
        model, reward=short, prompts=TEXTS, tokenizer=tokenizer, rollout=rollout,
        config=PPOConfig(
            iterations=3, rollout_batch_size=8, batch_size=8, epochs=2, max_new_tokens=6,
            learning_rate=1e-2, max_length=320,
        ),
    )  # fmt: skip


def check(trainer, version=3):
    """Every rollout came from the policy of its step, and the last weights have arrived."""
    history = trainer.run.history
    assert history[0]["kl"] == 0.0 and history[-1]["kl"] != 0.0
    for row in history:
        assert row["mismatch_max"] < 1e-3 and row["probe_max_abs"] < 1e-3
    rollout = trainer.generate(TEXTS)
    assert rollout.weight_version.tolist() == [version] * len(TEXTS)
    ids = len(trainer.tokenizer)
    expected = forward_logprobs(trainer.model.eval(), rollout, vocabulary=ids)
    assert (rollout.logprobs - expected).abs().max() < 1e-3


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", ["hf", VLLM])
def test_the_engine_samples_from_the_adapted_policy(kind, drawn, tokenizer):
    options = {"modules_to_save": ["norm"]} if drawn else {}
    with trainer_of(adapt(tokenizer, drawn, **options), tokenizer, kind) as trainer:
        check(trainer.train())


@pytest.mark.vllm
@pytest.mark.parametrize("drawn", [False, True])
def test_the_adapter_alone_is_sent_where_the_engine_serves_adapters(drawn, tokenizer, monkeypatch):
    reports = []
    send = VLLMEngine.update_adapter

    def reporting(engine, directory, version):
        reports.append(send(engine, directory, version))
        return reports[-1]

    monkeypatch.setattr(VLLMEngine, "update_adapter", reporting)
    model = adapt(tokenizer, drawn)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with trainer_of(model, tokenizer, RolloutConfig(engine="vllm", max_lora_rank=8)) as trainer:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        check(trainer.train())
    assert [report.version for report in reports] == [0, 1, 2, 3]
    size = sum(p.nbytes for name, p in model.named_parameters() if name in trained)
    assert {report.bytes for report in reports} == {size}


def test_what_cannot_be_sent_as_an_adapter_is_refused(tokenizer):
    rollout = {"engine": "vllm", "max_lora_rank": 8}
    with pytest.raises(ConfigError, match="norm.* is trained beside it.*leave max_lora_rank out"):
        trainer_of(adapt(tokenizer, modules_to_save=["norm"]), tokenizer, rollout)
    with pytest.raises(ConfigError, match="sleep_level = 2 drops the weights below the adapter"):
        trainer_of(adapt(tokenizer), tokenizer, {**rollout, "sleep_level": 2})


@pytest.mark.vllm
def test_an_adapter_above_the_rank_that_is_served_is_refused(tokenizer):
    rollout = {"engine": "vllm", "max_lora_rank": 8}
    with pytest.raises(ValueError, match="has rank 16, but max_lora_rank = 8"):
        trainer_of(adapt(tokenizer, r=16), tokenizer, rollout)
