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
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlhf_fast.presets import PRESETS


class ConfigError(ValueError):
    """A configuration that cannot be meant: an unknown key, or a value out of its range."""


REFUSED_KEYS = {
    "kl_estimator": "the KL in the reward is always k1: k2, k3 and abs train toward the wrong "
    "optimum there (their gradient vanishes or reverses near the reference, and the policy "
    "collapses onto the reward's argmax); put k2, k3 or the exact KL in the loss (kl_loss_coef, "
    "kl_loss_kind)",
}
"""Keys that other libraries have and ours lack, and why."""


def unknown_key(key: str, known: Iterable[str], what: str) -> str:
    """The message for an unknown `key` of `what`, with the nearest known one if one is near."""
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {key!r} in {what}; {REFUSED_KEYS.get(key, hint)}"


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


class Strict(BaseModel):
    """Frozen, without unknown keys, and with errors that name key and value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})


class _Config(Strict):
    # What a resumed run may change: the rest would make it another run.
    may_change: ClassVar[frozenset[str]] = frozenset({"save_every", "log_with", "micro_batch_size"})

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

    @property
    def micro_batch(self) -> int:
        """Sequences a forward pass, over all processes."""
        return self.micro_batch_size or self.batch_size

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
    """Policy optimisation: PPO with a critic, or one of its kin (`presets.PRESETS`) without.

    The defaults below are those of `loss="ppo"`; another loss brings its own, which give way to
    what is named beside it.
    """

    may_change: ClassVar[frozenset[str]] = _Config.may_change | {"iterations"}

    # Fields whose default depends on the loss.
    by_loss: ClassVar[frozenset[str]] = frozenset().union(*(p.defaults for p in PRESETS.values()))

    loss: Literal[tuple(PRESETS)] = Field(  # type: ignore[valid-type]
        "ppo", description="its values replace some defaults here: docs/losses.md"
    )
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
    lam: Annotated[float, Field(ge=0, le=1)] | Literal["adaptive"] = Field(
        0.95, description="lambda of GAE (2019); adaptive: 1 - 1 / (0.05 * tokens) (VAPO)"
    )
    value_lam: float | None = Field(None, ge=0, le=1, description="lambda of returns (VAPO: 1)")
    whiten_advantages: bool = Field(True, description="mean 0, variance 1 over the batch (2019)")
    # loss
    clip_low: float = Field(
        0.2, gt=0, le=1, description="ratio is clipped below 1 - clip_low (2019)"
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
    def _take_from_the_loss(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        if fields.get("kl_loss_kind") == "k1":
            raise ValueError(
                "kl_loss_kind 'k1' has an expected gradient of zero: it does nothing but add "
                "noise. Use 'k2', 'k3' or 'full', or put k1 in the reward (kl_coef)"
            )
        loss = fields.get("loss", "ppo")
        known = isinstance(loss, str) and loss in PRESETS
        return {**PRESETS[loss].defaults, **fields} if known else fields

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, checked like a new one.

        With another loss go the values that the old one has by default, even those that were named.
        """
        fields = self.model_dump()
        if changes.get("loss", self.loss) != self.loss:
            # What the old loss brought goes with it.
            brought = type(self)(loss=self.loss).model_dump()
            fields = {name: x for name, x in fields.items() if x != brought[name]}
        return type(self)(**{**fields, **changes})

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        preset = PRESETS[self.loss]
        if preset.needs_groups and self.samples_per_prompt < 2:
            raise ValueError(
                f"loss {self.loss!r} compares completions of one prompt, but samples_per_prompt = "
                f"{self.samples_per_prompt}; set it to 2 or more"
            )
        for name in preset.unread:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"loss {self.loss!r} does not read {name}, but {name} = "
                    f"{getattr(self, name)!r}; leave it out"
                )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                f"kl_target = {self.kl_target} moves kl_coef by factors, but kl_coef = 0; start "
                "from one above 0 (the KL in the loss, kl_loss_coef, is not adapted)"
            )
        if self.whiten_rewards and self.lam == "adaptive":
            raise ValueError(
                "whiten_rewards (2019) and lam 'adaptive' (VAPO) do not go together; leave out one"
            )
        return self

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
