"""A policy and its critic as one module, so that one forward pass and one wrapper serve both."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from rlhf_fast.config import ConfigError
from rlhf_fast.data import Rollout
from rlhf_fast.lora import own_copy
from rlhf_fast.models import disable_dropout, hidden_size
from rlhf_fast.policy import Policy
from rlhf_fast.presets import PRESETS
from rlhf_fast.scalar_models import ScalarHead, ScalarModel


class Evaluation(NamedTuple):
    """What policy and critic say of a rollout, fp32 `[B, T]`, 0 where no token was sampled.

    Attributes:
        logprobs: Of the sampled tokens, under the sampling temperature.
        entropy: Of the distributions that they were drawn from.
        values: The critic's, of the state *before* each sampled token; None without a critic.
        kl: Exact KL from a reference at each sampled token, if one was given.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    kl: Tensor | None


def choose_critic(
    loss: str, critic: str | Path | ScalarModel | None
) -> str | Path | ScalarModel | None:
    """The critic to use with `loss`: `"auto"` is `"head"` where it needs one, else None.

    Raises:
        ConfigError: The loss needs a critic and there is none, or the other way round.
    """
    needed = PRESETS[loss].needs_critic
    if isinstance(critic, str) and critic == "auto":
        return "head" if needed else None
    if needed and critic is None:
        without = ", ".join(name for name, preset in PRESETS.items() if not preset.needs_critic)
        raise ConfigError(
            f"loss {loss!r} takes its advantages from a critic, but critic is None; give one "
            f"('head'), or choose a loss that needs none: {without}"
        )
    if not needed and critic is not None:
        raise ConfigError(f"loss {loss!r} uses no critic; pass critic=None, or leave it out")
    return critic


class ActorCritic(nn.Module):
    """Evaluates rollouts for PPO, dropout off.

    Args:
        policy: The policy; parameters of it that are frozen stay so.
        critic: `"head"`: a value head on the policy's trunk, starting at 0 (2019). `"model"`: a
            trunk of its own, copied from the policy's. A `ScalarModel`, for example a trained
            `RewardModel`: a copy of it (TL;DR), its last-token head read at every position. Copies
            of what has LoRA adapters train adapters of their own, over the same frozen weights;
            others are trained whole. None: the policy alone.
    """

    def __init__(self, policy: Policy, critic: str | Path | ScalarModel | None = "head") -> None:
        super().__init__()
        self.policy = policy
        self.head: ScalarHead | None = None
        self.critic: ScalarModel | None = None
        if critic == "head":
            self.head = ScalarHead(hidden_size(policy.model))
        elif critic == "model":
            self.critic = ScalarModel(own_copy(policy.model))
        elif isinstance(critic, ScalarModel):
            self.critic = critic.as_critic()
        elif critic is not None:
            raise ValueError(
                f"critic = {critic!r} is unknown; choose 'head' (a head on the policy's trunk), "
                "'model' (a trunk of its own), None, or pass a ScalarModel or RewardModel"
            )
        disable_dropout(self)

    def parameter_groups(
        self, learning_rate: float, critic_learning_rate: float | None
    ) -> list[dict[str, Any]]:
        """AdamW's groups: the policy, and the value head or critic."""
        groups = [{"params": list(self.policy.parameters()), "lr": learning_rate}]
        own = self.head if self.head is not None else self.critic
        if own is not None:
            rate = critic_learning_rate or learning_rate
            groups.append({"params": list(own.parameters()), "lr": rate})
        return groups

    def forward(
        self, rollout: Rollout, temperature: float, ref: Policy | None = None
    ) -> Evaluation:
        """Evaluates the sampled tokens of `rollout`; with `ref`, also the exact KL from it."""
        batch = rollout.flush_left()
        output = self.policy(batch.tokens, batch.mask, batch.targets, temperature, ref)
        values = None
        if self.head is not None:
            values = self.head(output.hidden)
        elif self.critic is not None:
            values = self.critic(batch.tokens, batch.mask)
        if values is not None:
            # The state before token t is the trunk's output at token t - 1.
            values = batch.completions(nn.functional.pad(values[:, :-1], (1, 0)))
        return Evaluation(
            logprobs=batch.completions(output.logprobs),
            entropy=batch.completions(output.entropy),
            values=values,
            kl=None if output.kl is None else batch.completions(output.kl),
        )
