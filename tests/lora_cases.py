"""A tiny Llama, adapted, and a PPO trainer of it."""

from __future__ import annotations

import peft
import pytest
import torch
from trainer_cases import EXAMPLES, PROMPTS, length_reward, ppo_config

from rlhf_fast import PPOTrainer
from rlhf_fast.scratch import tiny_llama, train_tokenizer

TEXTS = [row["prompt"] + row["completion"] for row in EXAMPLES] + [" no no"]
TOKENS = torch.arange(24).view(2, 12) % 200 + 5
MASK = torch.ones_like(TOKENS).bool()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def base(tokenizer):
    return tiny_llama(tokenizer, hidden_size=32)


@pytest.fixture
def base_folder(base, tokenizer, tmp_path):
    folder = tmp_path / "base"
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapt(model, *, drawn=False, **options):
    """A PeftModel; `drawn` at random, as if it had been trained."""
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    if drawn:
        redraw(model)
    return model


@torch.no_grad()
def redraw(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def trainer_of(policy, tokenizer, *, run_dir=None, resume=False, config=None, **options):
    return PPOTrainer(
        policy, reward=length_reward, prompts=PROMPTS, tokenizer=tokenizer, rollout="hf",
        config=config or ppo_config(), run_dir=run_dir, resume=resume, **options,
    )  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def optimized(trainer):
    groups = trainer._optimizer.param_groups
    return {id(p) for group in groups for p in group["params"]}
