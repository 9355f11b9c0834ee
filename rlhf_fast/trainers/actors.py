"""The models of PPO out of what a user names: policy, reference, critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rlhf_fast.actor_critic import ActorCritic
from rlhf_fast.models import (
    check_vocabulary,
    context_length,
    load_causal_lm,
    vocabulary_size,
)
from rlhf_fast.policy import Policy
from rlhf_fast.scalar_models import RewardModel, ScalarModel


def make_actors(
    model: Any,
    ref: str | Path | PreTrainedModel | None,
    critic: str | Path | ScalarModel | None,
    tokenizer: Any,
    max_length: int,
) -> tuple[ActorCritic, Policy]:
    """Policy and critic in one module, and the frozen reference.

    Args:
        model: The policy, as `load_causal_lm` gives it.
        ref: The reference, its name or folder; None for `model` as it is now.
        critic: See `ActorCritic`; also the folder of a reward model.
        tokenizer: The policy's; reference and critic must know its ids.
        max_length: Tokens of a sequence; they must read as many.

    Raises:
        ValueError: They do not.
    """
    vocabulary = vocabulary_size(tokenizer)
    policy = Policy(model, vocabulary)
    if ref is None:
        reference = policy.frozen_copy()
    else:
        reference = Policy(load_causal_lm(ref), vocabulary).requires_grad_(False).eval()
        _check_other("the reference", reference.model, policy.model, tokenizer, max_length)
    if isinstance(critic, str | Path) and (Path(critic) / "reward_model.json").exists():
        critic = RewardModel.from_pretrained(critic)
    if isinstance(critic, ScalarModel):
        _check_other("the critic", critic.model, policy.model, tokenizer, max_length)
    return ActorCritic(policy, critic), reference


def _check_other(
    what: str, model: PreTrainedModel, policy: PreTrainedModel, tokenizer: Any, max_length: int
) -> None:
    """Raises unless `model` can read what the policy reads and writes."""
    check_vocabulary(tokenizer, model, what)
    ours, theirs = context_length(policy, max_length), context_length(model, max_length)
    if theirs < ours:
        raise ValueError(
            f"{what} reads {theirs} tokens, but sequences may have {ours}; lower max_length "
            f"to {theirs}"
        )
