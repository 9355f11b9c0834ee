"""From a scored rollout to an experience: log-probs, reference, values, advantages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import Experience, Rollout
from rlhf_fast.models import evaluating
from rlhf_fast.ops import gae, masked_var, masked_whiten, ppo_advantages
from rlhf_fast.policy import Policy


@torch.no_grad()
def make_experience(
    actor_critic: nn.Module,
    ref: Policy,
    rollout: Rollout,
    scores: Tensor,
    config: PPOConfig,
    kl_coef: float,
    micro_batch_size: int,
) -> Experience:
    """Evaluates `rollout` under policy, reference and critic, and forms the advantages.

    Args:
        actor_critic: An `ActorCritic`, wrapped or not.
        ref: The reference policy.
        rollout: `[B]` completions.
        scores: `[B]`, the reward function's verdicts.
        config: Discounts, penalties, whitening.
        kl_coef: Current coefficient of the KL in the reward.
        micro_batch_size: Sequences a forward pass.
    """
    old_logprobs, ref_logprobs, values = [], [], []
    with evaluating(actor_critic):
        for index in torch.arange(len(rollout), device=scores.device).split(micro_batch_size):
            piece = rollout.select(index)
            evaluation = actor_critic(piece, config.temperature)
            reference = ref(piece.tokens, piece.mask, piece.targets, config.temperature)
            old_logprobs.append(evaluation.logprobs)
            ref_logprobs.append(reference.logprobs[:, piece.prompt_length :])
            values.append(evaluation.values)
    old, ref_, value = (torch.cat(parts) for parts in (old_logprobs, ref_logprobs, values))
    mask = rollout.completion_mask
    advantages, returns, rewards = ppo_advantages(
        scores,
        old,
        ref_,
        value,
        mask,
        kl_coef=kl_coef,
        gamma=config.gamma,
        lam=config.lam,
        value_lam=config.value_lam,
        whiten=config.whiten_advantages and not config.whiten_rewards,
        missing_eos_penalty=config.missing_eos_penalty,
        finished=rollout.finished,
    )
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, value, mask, gamma=config.gamma, lam=config.lam)
        if config.value_lam is not None:
            returns = gae(rewards, value, mask, gamma=config.gamma, lam=config.value_lam)[1]
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
    return Experience(rollout, scores, old, ref_, value, rewards, advantages, returns)


def describe(experience: Experience, kl_coef: float) -> dict[str, Tensor]:
    """Metrics of an experience, 0-d means over its sequences.

    `soft_return_std` is the deviation of `score - kl_coef * log(policy / ref)`: at the optimum of
    the KL-regularised objective that is one constant, `kl_coef * log Z`, so it falls to 0.
    `explained_variance` is the critic's, before it learned from this experience.
    """
    rollout = experience.rollout
    lengths = rollout.completion_mask.sum(1).float()
    kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
    soft_returns = experience.scores - kl_coef * kl
    mask, returns = rollout.completion_mask, experience.returns
    spread, unexplained = masked_var(returns, mask), masked_var(returns - experience.values, mask)
    explained = torch.where(spread > 0, 1 - unexplained / spread, 0.0)
    return {
        "score": experience.scores.mean(),
        "kl": kl.mean(),
        "soft_return": soft_returns.mean(),
        "soft_return_std": soft_returns.std(correction=min(1, len(rollout) - 1)),
        "length": lengths.mean(),
        "finished": rollout.finished.float().mean(),
        "explained_variance": explained,
    }
