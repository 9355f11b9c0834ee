"""The trainers on a GPU: the same gate, and mixed precision."""

from __future__ import annotations

import pytest
import torch
from closed_form import sequence_logprobs
from test_learning import train_closed_form
from trainer_cases import EXAMPLES, PAIRS, PROMPTS, WORDS, length_reward, ppo_config, sft_config

from rlhf_fast import PPOTrainer, RewardConfig, RewardTrainer, SFTTrainer
from rlhf_fast.scratch import tiny_llama, train_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_gate_a_holds_on_a_gpu():
    problem, model, history = train_closed_form(0, iterations=80, batch=128)
    assert model.device.type == "cuda"
    logprobs = sequence_logprobs(model, problem.completions)
    assert problem.gap_closed(logprobs) >= 0.99
    assert history[-1]["soft_return"] == pytest.approx(problem.best, abs=0.05)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_stage_trains_on_a_gpu_in_every_precision(stage, precision):
    tokenizer = train_tokenizer([" ".join(WORDS) + " no end", *PROMPTS], 300)
    model = tiny_llama(tokenizer, hidden_size=32, context=64)
    if stage == "sft":
        config = sft_config(mixed_precision=precision, epochs=4)
        trainer = SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=config).train()
        assert trainer.run.history[-1]["loss"] < trainer.run.history[0]["loss"]
    elif stage == "reward":
        config = RewardConfig(batch_size=8, learning_rate=1e-2, epochs=6, mixed_precision=precision)
        trainer = RewardTrainer(model, PAIRS, tokenizer=tokenizer, config=config).train()
        assert trainer.evaluate(PAIRS)[0] == 1.0
    else:
        config = ppo_config(mixed_precision=precision, kl_loss_coef=0.1, kl_loss_kind="full")
        trainer = PPOTrainer(
            model, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer, config=config
        ).train()
        assert trainer.run.history[0]["kl"] == 0.0
    assert next(model.parameters()).device.type == "cuda" or stage == "reward"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_shares_the_frozen_weights_on_a_gpu_too(precision):
    tokenizer = train_tokenizer([" ".join(WORDS) + " no end", *PROMPTS], 300)
    trainer = PPOTrainer(
        tiny_llama(tokenizer, hidden_size=32, context=64),
        reward=length_reward,
        prompts=PROMPTS,
        tokenizer=tokenizer,
        critic="model",
        lora=4,
        config=ppo_config(mixed_precision=precision),
    )
    actor_critic = trainer._module
    stored = [
        {p.data_ptr() for p in module.parameters()}
        for module in (actor_critic.policy, actor_critic.critic, trainer.ref)
    ]
    embedding = actor_critic.policy.model.get_input_embeddings().weight
    assert embedding.device.type == "cuda"
    assert all(embedding.data_ptr() in pointers for pointers in stored)
    trainer.train()
    assert trainer.run.history[0]["kl"] == 0.0
    assert trainer.run.history[-1]["kl"] != 0.0
