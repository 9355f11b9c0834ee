"""From a scored rollout to an experience: log-probs, reference, values, advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import Experience, Rollout
from rlhf_fast.models import evaluating
from rlhf_fast.ops import (
    gae,
    group_advantages,
    importance_weights,
    masked_var,
    masked_whiten,
    ppo_advantages,
)
from rlhf_fast.policy import Policy
from rlhf_fast.presets import PRESETS
from rlhf_fast.rollout import RolloutConfig

ADAPTIVE_LAM = 0.05
"""alpha of the length-adaptive lambda (Yue et al. 2025, arXiv:2504.05118, section 4.2)."""


def check_groups(rollout: Rollout, size: int) -> None:
    """Raises unless each `size` completions in a row answer one prompt."""
    start = rollout.prompt_length
    first = torch.arange(len(rollout), device=rollout.tokens.device) // size * size
    differs = torch.zeros_like(first, dtype=torch.bool)
    for x in (rollout.tokens, rollout.mask):
        differs |= (x[:, :start] != x[first, :start]).any(1)
    if differs.any():
        row = int(differs.nonzero()[0])
        raise ValueError(
            f"completion {row} of the rollout answers another prompt than completion "
            f"{row // size * size}; samples_per_prompt = {size}: repeat each prompt so often, side "
            "by side"
        )


@torch.no_grad()
def make_experience(
    actor_critic: nn.Module,
    ref: Policy,
    rollout: Rollout,
    scores: Tensor,
    config: PPOConfig,
    kl_coef: float,
    pieces: Sequence[Tensor],
) -> Experience:
    """Evaluates `rollout` under policy, reference and critic, and forms the advantages.

    Args:
        actor_critic: An `ActorCritic`, wrapped or not.
        ref: The reference policy.
        rollout: `[B]` completions; for a loss over groups, those of a prompt side by side.
        scores: `[B]`, the reward function's verdicts.
        config: Loss, discounts, penalties, whitening.
        kl_coef: Current coefficient of the KL in the reward.
        pieces: Row numbers of each forward pass, all together every row once. In the micro-batches
            of the first pass of `update` the ratio is then exactly 1: the same sums in the same
            order.
    """
    old_logprobs, ref_logprobs, values = [], [], []
    with evaluating(actor_critic):
        for index in pieces:
            piece = rollout.select(index)
            evaluation = actor_critic(piece, config.temperature)
            old_logprobs.append(evaluation.logprobs)
            ref_logprobs.append(ref.logprobs_of(piece, config.temperature))
            values.append(evaluation.values)
    back = torch.cat(list(pieces)).argsort()
    scored = _Scored(rollout, scores, *(torch.cat(x)[back] for x in (old_logprobs, ref_logprobs)))
    if PRESETS[config.loss].needs_groups:
        return Experience(*scored, _group_advantages(scored, config, kl_coef))
    if PRESETS[config.loss].needs_critic:
        value = torch.cat(values)[back]
        advantages, returns = _critic_advantages(scored, value, config, kl_coef)
        return Experience(*scored, advantages, value, returns)
    # A critic that says 0 everywhere leaves the discounted returns.
    nothing = torch.zeros_like(scored.old_logprobs)
    return Experience(*scored, _scan(scored, nothing, config, kl_coef, lam=1.0)[0])


class _Scored(NamedTuple):
    """What an experience begins with."""

    rollout: Rollout
    scores: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor


def _scan(
    scored: _Scored, values: Tensor, config: PPOConfig, kl_coef: float, lam: float | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, returns and rewards `[B, T]` as configured, but for whitened rewards."""
    adaptive = lam == "adaptive"
    return ppo_advantages(
        scored.scores,
        scored.old_logprobs,
        scored.ref_logprobs,
        values,
        scored.rollout.completion_mask,
        kl_coef=kl_coef,
        gamma=config.gamma,
        lam=1.0 if adaptive else float(lam),
        adaptive_lam=ADAPTIVE_LAM if adaptive else None,
        value_lam=config.value_lam,
        whiten=config.whiten_advantages and not config.whiten_rewards,
        missing_eos_penalty=config.missing_eos_penalty,
        finished=scored.rollout.finished,
    )


def _critic_advantages(
    scored: _Scored, values: Tensor, config: PPOConfig, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[B, T]`."""
    advantages, returns, rewards = _scan(scored, values, config, kl_coef, config.lam)
    if config.whiten_rewards:
        mask = scored.rollout.completion_mask
        rewards = masked_whiten(rewards, mask, shift_mean=False)
        lam = float(config.lam)
        advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=lam)
        if config.value_lam is not None:
            returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.value_lam)[1]
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
    return advantages, returns


def _group_advantages(scored: _Scored, config: PPOConfig, kl_coef: float) -> Tensor:
    """`[B]`: each completion against the others of its prompt, by score less the KL's price."""
    rewards = scored.scores
    if kl_coef != 0.0:
        rewards = rewards - kl_coef * (scored.old_logprobs - scored.ref_logprobs).sum(1)
    if config.missing_eos_penalty is not None:
        rewards = rewards - config.missing_eos_penalty * ~scored.rollout.finished
    kind = PRESETS[config.loss].advantages
    return group_advantages(rewards, config.samples_per_prompt, kind=kind)


def correct(
    experience: Experience, config: RolloutConfig, *, truncated: bool = False
) -> tuple[Experience, dict[str, Tensor]]:
    """Weighs an experience by how likely its tokens were where they were sampled.

    The engine that sampled computes by other kernels, perhaps in another precision, and perhaps it
    had older weights; its log-probs beside the trainer's own tell both.

    Args:
        experience: What was sampled and scored.
        config: Level, mode and bounds of the weights.
        truncated: The engine sampled with top-k or top-p. Its log-probs are then larger throughout,
            by what was cut off; a weight would scale the loss by that, so there is none.

    Returns:
        The experience with importance weights, if `config` asks for them, and the metrics of
        `ops.importance_weights` over all processes, always; both as they were, and none, for a
        rollout whose log-probs are not known.
    """
    rollout = experience.rollout
    if rollout.logprobs is None:
        return experience, {}
    weights, metrics = importance_weights(
        experience.old_logprobs,
        rollout.logprobs,
        rollout.completion_mask,
        level="token" if config.correction == "none" else config.correction,
        mode=config.correction_mode,
        low=config.weight_low,
        high=config.weight_high,
        across_processes=True,
    )
    if truncated or config.correction == "none":
        return experience, metrics
    return dataclasses.replace(experience, importance_weights=weights), metrics


def describe(experience: Experience, kl_coef: float) -> dict[str, Tensor]:
    """Metrics of an experience, 0-d, means over its sequences.

    Deviation and variances are those of all processes' sequences: every process must make the call.
    `soft_return_std` is the deviation of `score - kl_coef * log(policy / ref)`: at the optimum of
    the KL-regularised objective that is one constant, `kl_coef * log Z`, so it falls to 0.
    `explained_variance` is the critic's, before it learned from this experience.
    """
    rollout = experience.rollout
    lengths = rollout.completion_mask.sum(1).float()
    kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
    soft_returns = experience.scores - kl_coef * kl if kl_coef else experience.scores
    described = {
        "score": experience.scores.mean(),
        "kl": kl.mean(),
        "soft_return": soft_returns.mean(),
        "soft_return_std": _variance(soft_returns, torch.ones_like(soft_returns)).sqrt(),
        "length": lengths.mean(),
        "finished": rollout.finished.float().mean(),
    }
    if experience.values is not None and experience.returns is not None:
        mask, returns = rollout.completion_mask, experience.returns
        spread = _variance(returns, mask)
        unexplained = _variance(returns - experience.values, mask)
        explained = torch.where(spread > 0, 1 - unexplained / spread, 0.0)
        described["explained_variance"] = explained
    return described


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_var(x, mask, across_processes=True)
