"""Data and settings that the tests of the trainers share."""

from __future__ import annotations

import torch

from rlhf_fast import PPOConfig, SFTConfig

WORDS = "the cat sat on a mat and the dog ran to the big red house by the sea".split()
EXAMPLES = [
    {"prompt": f"{a} {b}", "completion": f" {b} {a}{' the end' * (i % 3)}"}
    for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
][:16]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no" + " no" * (i % 2)}
    for i, row in enumerate(EXAMPLES)
]
PROMPTS = [row["prompt"] for row in EXAMPLES]


def sft_config(**changes):
    fields = {"batch_size": 8, "learning_rate": 1e-2, "epochs": 2, "max_length": 64}
    return SFTConfig(**{**fields, **changes})


def ppo_config(**changes):
    fields = {
        "iterations": 3, "rollout_batch_size": 8, "batch_size": 8, "epochs": 2,
        "max_new_tokens": 5, "learning_rate": 3e-3, "max_length": 64,
    }  # fmt: skip
    return PPOConfig(**{**fields, **changes})


def length_reward(prompts, completions):
    return [float(len(text)) for text in completions]


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance, msg=name)
