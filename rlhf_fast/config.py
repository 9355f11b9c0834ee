"""Configurations of the three training stages: frozen, flat, strict.

An unknown key or a value out of range raises `ConfigError` before anything is loaded. Batch sizes
are global: they count sequences over all processes. Each default names where it comes from:
"2019" is Ziegler et al., Fine-Tuning Language Models from Human Preferences, as re-implemented in
Huang et al., The N+ Implementation Details of RLHF with PPO; "TL;DR" is Stiennon et al., Learning
to Summarize from Human Feedback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A configuration that cannot be meant: an unknown key, or a value out of its range."""


def unknown_key(key: str, known: Iterable[str], what: str) -> str:
    """The message for an unknown `key` of `what`, with the nearest known one if one is near."""
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
    return f"unknown key {key!r} in {what}{hint}"


def _explain(owner: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(unknown_key(key, owner.model_fields, owner.__name__))
        elif key:
            lines.append(f"{owner.__name__}.{key} = {item['input']!r}: {item['msg']}")
        else:
            lines.append(f"{owner.__name__}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


class _Config(BaseModel):
    # What a resumed run may change: the rest would make it another run.
    may_change: ClassVar[frozenset[str]] = frozenset({"save_every", "log_with", "micro_batch_size"})

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of initialisation, data order and sampling"
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="linear decays to 0 (2019), cosine (TL;DR), constant"
    )
    warmup_steps: int = Field(0, ge=0, description="optimiser steps of linear warm-up")
    adam_eps: float = Field(1e-5, gt=0, description="epsilon of AdamW (2019; 1e-8 elsewhere)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip the global norm; null: no clip"
    )
    batch_size: int = Field(64, ge=1, description="sequences (or pairs) an optimiser step, global")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences (or pairs) a forward pass, global; null: batch_size"
    )
    max_length: int = Field(512, ge=2, description="tokens of prompt and completion together")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast dtype")
    log_with: Literal["tensorboard", "wandb"] | None = Field(
        None, description="tracker beside metrics.jsonl"
    )
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; null: none")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    @property
    def micro_batch(self) -> int:
        """Sequences a forward pass, over all processes."""
        return self.micro_batch_size or self.batch_size

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch}; choose a divisor, so that every micro-batch is full"
            )
        return self


_Kind = TypeVar("_Kind", bound=_Config)


def checked(config: _Kind | None, kind: type[_Kind]) -> _Kind:
    """`config`, or the defaults of `kind`; raises `TypeError` for anything else."""
    if config is None:
        return kind()
    if not isinstance(config, kind):
        raise TypeError(
            f"config is of type {type(config).__name__}; give a {kind.__name__}, for example "
            f"{kind.__name__}(seed=1)"
        )
    return config


class SFTConfig(_Config):
    """Supervised fine-tuning: next-token cross-entropy, a mean over the tokens that count."""

    may_change: ClassVar[frozenset[str]] = _Config.may_change | {"epochs"}

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="tokens that count: the completion's (and EOS), or all"
    )


class RewardConfig(_Config):
    """Reward modelling: Bradley-Terry on pairs (Stiennon et al., section 3.4)."""

    may_change: ClassVar[frozenset[str]] = _Config.may_change | {"epochs"}

    learning_rate: float = Field(3e-6, gt=0, description="peak learning rate of AdamW (TL;DR)")
    epochs: float = Field(1.0, gt=0, description="passes over the pairs (TL;DR: more overfits)")
    center: float = Field(
        0.0, ge=0, description="coefficient of mean((chosen + rejected)^2); TRL suggests 0.01"
    )
    use_margin: bool = Field(True, description="subtract the pair's margin where a row has one")
    normalize: bool = Field(
        True, description="after training: reference completions' scores get mean 0, std 1 (2019)"
    )


class PPOConfig(_Config):
    """Proximal policy optimisation with a critic."""

    may_change: ClassVar[frozenset[str]] = _Config.may_change | {"iterations"}

    iterations: int = Field(100, ge=1, description="rollout-and-update rounds")
    rollout_batch_size: int = Field(64, ge=1, description="completions an iteration, global")
    samples_per_prompt: int = Field(1, ge=1, description="completions of each prompt")
    epochs: int = Field(4, ge=1, description="passes over the rollouts, reshuffled each (2019)")
    # sampling
    max_new_tokens: int = Field(64, ge=1, description="completion length at most")
    temperature: float = Field(
        1.0, ge=0.01, description="of sampling and of every log-prob (2019: .7)"
    )
    top_k: int = Field(0, ge=0, description="0: all; else ratios and KL are biased")
    top_p: float = Field(1.0, gt=0, le=1, description="1: all; else ratios and KL are biased")
    ignore_eos: bool = Field(False, description="always sample max_new_tokens tokens")
    # reward
    kl_coef: float = Field(
        0.05, ge=0, description="beta of the KL in the reward (TL;DR; 2019: .15)"
    )
    kl_estimator: Literal["k1"] = Field("k1", description="of the KL in the reward: k1 only")
    kl_target: float | None = Field(
        None, gt=0, description="adaptive KL: target nats a sequence (2019: 6); null: fixed"
    )
    kl_horizon: int = Field(10_000, ge=1, description="adaptive KL: horizon in sequences (2019)")
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="subtracted from the score of a completion without EOS (TL;DR: 1)"
    )
    whiten_rewards: bool = Field(
        False, description="variance of the rewards to 1, their mean kept (2019; TL;DR: no)"
    )
    # advantages
    gamma: float = Field(1.0, ge=0, le=1, description="discount (2019)")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of GAE (2019)")
    value_lam: float | None = Field(None, ge=0, le=1, description="lambda of returns (VAPO: 1)")
    whiten_advantages: bool = Field(True, description="mean 0, variance 1 over the batch (2019)")
    # loss
    clip_low: float = Field(
        0.2, gt=0, lt=1, description="ratio is clipped below 1 - clip_low (2019)"
    )
    clip_high: float = Field(0.2, gt=0, description="and above 1 + clip_high (2019; DAPO: .28)")
    value_clip: float | None = Field(0.2, gt=0, description="of values, around the old (2019)")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss (2019)")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    kl_loss_coef: float = Field(0.0, ge=0, description="weight of a KL in the loss (GRPO style)")
    kl_loss_kind: Literal["k2", "k3", "full"] = Field(
        "k2", description="k2: reverse KL; k3: the forward KL's gradient; full: exact, per token"
    )
    critic_learning_rate: float | None = Field(
        None, gt=0, description="learning rate of value head or critic; null: learning_rate"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_wrong_estimators(cls, fields: Any) -> Any:
        kind = fields.get("kl_estimator", "k1") if isinstance(fields, dict) else "k1"
        if kind in ("k2", "k3", "abs"):
            raise ValueError(
                f"kl_estimator {kind!r} in the reward trains toward the wrong optimum: its "
                "gradient vanishes or reverses near the reference, and the policy collapses onto "
                "the reward's argmax. Use 'k1' here; for k2, k3 or the exact KL put it in the "
                "loss (kl_loss_coef, kl_loss_kind)"
            )
        if isinstance(fields, dict) and fields.get("kl_loss_kind") == "k1":
            raise ValueError(
                "kl_loss_kind 'k1' has an expected gradient of zero: it does nothing but add "
                "noise. Use 'k2', 'k3' or 'full', or put k1 in the reward (kl_coef)"
            )
        return fields

    @model_validator(mode="after")
    def _check_rollouts(self) -> Self:
        if self.ignore_eos and self.missing_eos_penalty is not None:
            raise ValueError(
                f"missing_eos_penalty = {self.missing_eos_penalty} would fall on every completion, "
                "because ignore_eos lets none end; leave one of them out"
            )
        if self.rollout_batch_size % self.samples_per_prompt:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of "
                f"samples_per_prompt {self.samples_per_prompt}; make it one"
            )
        if self.rollout_batch_size % self.batch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of batch_size "
                f"{self.batch_size}; make it one, so that every optimiser step is full"
            )
        return self
