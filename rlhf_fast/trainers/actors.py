"""The models of PPO out of what a user names: policy, reference, critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
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
        ref: The reference, its name or folder, which is loaded in the precision of `model`'s
            weights; None for `model` as it is now.
        critic: See `ActorCritic`; also the folder of a reward model.
        tokenizer: The policy's; reference and critic must know its ids.
        max_length: Tokens of a sequence; they must read as many.

    Raises:
        ValueError: They do not, or the reference shares weights that are trained.
    """
    vocabulary = vocabulary_size(tokenizer)
    policy = Policy(model, vocabulary)
    if ref is None:
        reference = policy.frozen_copy()
    else:
        _check_apart(ref, model)
        # In fp32 beside a policy in bf16 it would be another model from the start.
        dtype = policy.model.dtype
        ref = load_causal_lm(ref, frozen_dtype=dtype, dtype=dtype)
        reference = Policy(ref, vocabulary).requires_grad_(False).eval()
        _check_other("the reference", reference.model, policy.model, tokenizer, max_length)
    if isinstance(critic, str | Path) and (Path(critic) / "reward_model.json").exists():
        critic = RewardModel.from_pretrained(critic)
    if isinstance(critic, ScalarModel):
        _check_other("the critic", critic.model, policy.model, tokenizer, max_length)
    return ActorCritic(policy, critic), reference


def _check_apart(ref: Any, model: nn.Module) -> None:
    """Raises if `ref`, which is to be frozen, holds what is trained of `model`."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if isinstance(ref, nn.Module) and any(id(p) in trained for p in ref.parameters()):
        raise ValueError(
            "ref shares weights with the policy that are trained, so it would move with it; leave "
            "ref out, and the reference is a frozen copy of the policy as it is now, or give "
            "another model"
        )


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
