"""Runs the part of TRL's trainers that turns completions and their rewards into a batch."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from _peers import Accelerator, Batch
from torch import Tensor


def generate_and_score(trainer: Any, b: Batch, group_size: int = 2, **options: Any) -> dict:
    """`trainer._generate_and_score_completions`, unmodified, on a stand-in for the trainer.

    Generation gives completions of the lengths of `b`, the models its log-probs `old` and `ref`,
    the one reward function its scores, and the sampling engine, if `use_vllm`, `rollout`. The
    settings are TRL's defaults.
    """
    lengths = b.mask.sum(1).tolist()
    tokens = [[1] * length for length in lengths]
    sampled = [row[:length].tolist() for row, length in zip(b.rollout, lengths, strict=True)]

    def generate(prompts: list[str]) -> tuple:
        prompt = [[1]] * len(prompts)
        if trainer.__name__ == "RLOOTrainer":
            return prompt, tokens, tokens
        return prompt, tokens, None, tokens, sampled, {}, None, None

    def score(model: str, *args: object, **kwargs: object) -> tuple[Tensor, None, None]:
        return {"policy": b.old, "reference": b.ref}[getattr(model, "name", model)], None, None

    settings = {
        "_calculate_rewards": lambda *args: b.scores[:, None].clone(),
        "_generate": generate,
        "_get_per_token_logps_and_entropies": score,
        "_logs": {
            "advantages": [],
            "completion": [],
            "extra": defaultdict(list),
            "prompt": [],
            "rewards": defaultdict(list),
        },
        "_metrics": {"train": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "accelerator": Accelerator(),
        "args": SimpleNamespace(
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(b.mask),
            steps_per_generation=1,
        ),
        "beta": 0.0,
        "environment_factories": None,
        "environments": None,
        "mask_truncated_completions": False,
        "model": SimpleNamespace(is_gradient_checkpointing=False, name="policy", training=True),
        "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False,
        "num_generations": group_size,
        "num_iterations": 1,
        "pad_to_multiple_of": None,
        "ref_model": "reference",
        "reward_clip_range": None,
        "reward_func_names": ["score"],
        "reward_weights": torch.ones(1, dtype=b.scores.dtype),
        "scale_rewards": "group",
        "tools": None,
        "use_vllm": False,
        "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "sequence_mask",
    }
    prompts = [{"prompt": "a question"}] * len(b.mask)
    return trainer._generate_and_score_completions(SimpleNamespace(**settings | options), prompts)
