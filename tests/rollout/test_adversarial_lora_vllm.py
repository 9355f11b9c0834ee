"""LoRA policies of every kind with vLLM: each sample is the policy's, or the reason is told."""

from __future__ import annotations

import gc

import peft
import pytest
import torch
from rollout_cases import forward_logprobs, make_model

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.rollout import RolloutConfig, WeightsError, make_engine

pytestmark = pytest.mark.vllm
TEXTS = ["the cat", "the dog sat", "on the mat", "a dog ran"]
ALONE = {"engine": "vllm", "max_lora_rank": 8}
KINDS = {
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "r": 3},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def short(prompts, completions, completion_ids):
    return [-float(sum(ids)) / 1000 for ids in completion_ids]


def adapt(tokenizer, *, tied=True, **options):
    model = make_model(tokenizer)
    if not tied:
        model.config.tie_word_embeddings = False
        model = type(model)(model.config).eval()
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def check(model, tokenizer, rollout="auto", engine=None):
    config = PPOConfig(
        iterations=2, rollout_batch_size=8, batch_size=8, max_new_tokens=6, learning_rate=1e-2,
        epochs=2, max_length=320,
    )  # fmt: skip
    gc.collect()
    with PPOTrainer(
        model, reward=short, prompts=TEXTS, tokenizer=tokenizer, config=config, rollout=rollout,
        engine=engine,
    ) as trainer:  # fmt: skip
        trainer.train()
        assert all(row["mismatch_max"] < 1e-3 for row in trainer.run.history)
        assert trainer.run.history[0]["kl"] == 0.0
        rollout = trainer.generate(TEXTS)
        expected = forward_logprobs(model.eval(), rollout, vocabulary=len(tokenizer))
        assert rollout.weight_version.tolist() == [2] * len(TEXTS)
        assert (rollout.logprobs - expected).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["merged", "alone"])
def test_samples_are_those_of_the_adapted_policy(kind, way, tokenizer):
    model = adapt(tokenizer, tied=False, **KINDS[kind])
    check(model, tokenizer, ALONE if way == "alone" else "vllm")


@pytest.mark.parametrize("kind", ["head", "embedding"])
def test_a_tied_head_with_an_adapter_on_one_side_is_sent_alone_or_refused(kind, tokenizer):
    check(adapt(tokenizer, **KINDS[kind]), tokenizer, ALONE)
    with pytest.raises(WeightsError, match="adapter changes one of them"):
        check(adapt(tokenizer, **KINDS[kind]), tokenizer, "vllm")


@pytest.mark.parametrize("way", [{}, {"max_lora_rank": 8}])
def test_an_engine_of_ones_own_follows_the_adapter(way, tokenizer):
    model = adapt(tokenizer)
    config = RolloutConfig(engine="vllm", **way)
    engine = make_engine(model, tokenizer, config, max_length=320)
    try:
        check(model, tokenizer, engine=engine)
    finally:
        engine.close()


def test_of_two_adapters_the_active_one_is_sampled_from(tokenizer):
    model = adapt(tokenizer)
    other = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.set_adapter("other")
    check(model, tokenizer, ALONE)
