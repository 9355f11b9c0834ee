"""One call a stage: what the trainers do, with the configuration as keyword arguments."""

from __future__ import annotations

from typing import Any

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.trainers import PPOTrainer, RewardTrainer, SFTTrainer


def sft(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    run_dir: Any = None,
    resume: bool = False,
    pad_token: str | None = None,
    bad_rows: str = "error",
    **config: Any,
) -> SFTTrainer:
    """Fine-tunes `model` on `data` and returns the trainer; `.model` is the result.

    Arguments are those of `SFTTrainer`; `config` holds fields of `SFTConfig`.
    """
    return SFTTrainer(
        model,
        data,
        tokenizer=tokenizer,
        config=SFTConfig(**config),
        eval_data=eval_data,
        run_dir=run_dir,
        resume=resume,
        pad_token=pad_token,
        bad_rows=bad_rows,
    ).train()


def reward(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    reference_data: Any = None,
    run_dir: Any = None,
    resume: bool = False,
    pad_token: str | None = None,
    bad_rows: str = "error",
    **config: Any,
) -> RewardTrainer:
    """Trains a reward model on preference pairs and returns the trainer; `.model` is the result.

    Arguments are those of `RewardTrainer`; `config` holds fields of `RewardConfig`.
    """
    return RewardTrainer(
        model,
        data,
        tokenizer=tokenizer,
        config=RewardConfig(**config),
        eval_data=eval_data,
        reference_data=reference_data,
        run_dir=run_dir,
        resume=resume,
        pad_token=pad_token,
        bad_rows=bad_rows,
    ).train()


def ppo(
    model: Any,
    *,
    reward: Any,
    prompts: Any,
    tokenizer: Any = None,
    ref: Any = None,
    critic: Any = "auto",
    rollout: Any = "auto",
    run_dir: Any = None,
    resume: bool = False,
    pad_token: str | None = None,
    bad_rows: str = "error",
    **config: Any,
) -> PPOTrainer:
    """Trains `model` on `reward` by PPO, or what `loss` names; returns the trainer.

    Its `.model` is the result; its rollout engine is closed. Arguments are those of `PPOTrainer`;
    `config` holds fields of `PPOConfig`.
    """
    with PPOTrainer(
        model,
        reward=reward,
        prompts=prompts,
        tokenizer=tokenizer,
        ref=ref,
        critic=critic,
        rollout=rollout,
        config=PPOConfig(**config),
        run_dir=run_dir,
        resume=resume,
        pad_token=pad_token,
        bad_rows=bad_rows,
    ) as trainer:
        return trainer.train()
