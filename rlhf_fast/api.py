"""One call a stage: what the trainers do, with the configuration as keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_fast._adapter_files import ADAPTER, check_mergeable
from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.lora import load_adapter
from rlhf_fast.models import load_tokenizer
from rlhf_fast.scalar_models import RewardModel
from rlhf_fast.trainers import PPOTrainer, RewardTrainer, SFTTrainer


def sft(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    lora: Any = None,
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
        lora=lora,
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
    lora: Any = None,
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
        lora=lora,
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
    lora: Any = None,
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
        lora=lora,
        rollout=rollout,
        config=PPOConfig(**config),
        run_dir=run_dir,
        resume=resume,
        pad_token=pad_token,
        bad_rows=bad_rows,
    ) as trainer:
        return trainer.train()


def merge(folder: str | Path, into: str | Path) -> None:
    """Writes the adapter in `folder` and its base as one model.

    Its precision is that of the base on disk; a reward model's is that in which it was trained.

    Args:
        folder: A policy's adapter, or a reward model's.
        into: A new or empty folder for the model, which then needs neither the base nor peft.

    Raises:
        ValueError: There is no adapter in `folder`, or something in `into`, or an adapter adds to a
            head or an embedding that are tied.
    """
    if not (Path(folder) / ADAPTER).exists():
        raise ValueError(f"{str(folder)!r} holds no {ADAPTER}; give the folder of an adapter")
    if Path(into).exists() and (not Path(into).is_dir() or any(Path(into).iterdir())):
        raise ValueError(f"{str(into)!r} is not empty, and would be overwritten; name another")
    if (Path(folder) / "reward_model.json").exists():
        RewardModel.from_pretrained(folder).merge_adapter().save_pretrained(into)
        return
    tokenizer = load_tokenizer(None, folder)
    model = load_adapter(folder, "auto")
    check_mergeable(model)
    model.merge_and_unload().save_pretrained(into)
    tokenizer.save_pretrained(into)
