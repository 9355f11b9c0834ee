"""From an experience to a better policy and critic: the epochs of one PPO iteration."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import Experience
from rlhf_fast.ops import policy_loss, value_loss
from rlhf_fast.policy import Policy
from rlhf_fast.presets import PRESETS
from rlhf_fast.trainers.batches import minibatches
from rlhf_fast.trainers.run import Metrics, Run


def update(
    run: Run,
    actor_critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    ref: Policy,
    experience: Experience,
    config: PPOConfig,
) -> dict[str, float]:
    """`config.epochs` passes over `experience`, reshuffled each, in minibatches of `batch_size`.

    Returns:
        The last pass's metrics, means over its minibatches.
    """
    actor_critic.train()  # dropout is off all the same; checkpointing of activations needs it
    metrics: list[Metrics] = []
    for epoch in range(config.epochs):
        metrics = []
        for rows in minibatches(run, config, experience.rollout, epoch):
            mask = experience.rollout.completion_mask[torch.cat(rows)]
            counts = run.total(torch.stack([mask.sum(), mask.any(1).sum()]))
            pieces = [experience.select(index) for index in rows]
            loss = partial(ppo_loss, actor_critic, ref, config=config, counts=counts)
            metrics.append(run.optimize(actor_critic, optimizer, schedule, pieces, loss))
    sums = [run.reduce(part) for part in metrics]
    return {name: sum(part[name] for part in sums) / len(sums) for name in sums[0]}


def ppo_loss(
    actor_critic: nn.Module,
    ref: Policy,
    piece: Experience,
    *,
    config: PPOConfig,
    counts: Tensor,
) -> tuple[Tensor, Metrics]:
    """Policy loss, and with a critic the value loss, of a micro-batch.

    Args:
        actor_critic: An `ActorCritic`, wrapped or not.
        ref: The reference, for the exact KL.
        piece: The micro-batch.
        config: Loss, clipping, coefficients.
        counts: `[2]`, sampled tokens and completions of the whole minibatch, over all processes:
            with them as divisors the losses of micro-batches add up.
    """
    mask, exact = piece.rollout.completion_mask, config.kl_loss_kind == "full"
    in_loss = config.kl_loss_coef > 0
    new = actor_critic(piece.rollout, config.temperature, ref if in_loss and exact else None)
    loss, metrics = policy_loss(
        new.logprobs,
        piece.old_logprobs,
        piece.advantages,
        mask,
        **PRESETS[config.loss].loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        normalizer=_divisor(config, counts),
        importance_weights=piece.importance_weights,
        entropy=new.entropy,
        entropy_coef=config.entropy_coef,
        ref_logprobs=piece.ref_logprobs if in_loss and not exact else None,
        kl=new.kl,
        kl_coef=config.kl_loss_coef,
        kl_kind="k2" if exact else config.kl_loss_kind,
    )
    metrics = _per_token(metrics, config, counts)
    if piece.values is None or piece.returns is None:
        return loss, metrics
    critic_loss, critic_metrics = value_loss(
        new.values, piece.values, piece.returns, mask, clip=config.value_clip, normalizer=counts[0]
    )
    metrics |= {"value_loss": critic_loss.detach(), **critic_metrics}
    return loss + config.value_coef * critic_loss, metrics


def _divisor(config: PPOConfig, counts: Tensor) -> float | Tensor:
    """What the loss of a minibatch is divided by."""
    aggregation = PRESETS[config.loss].aggregation
    if aggregation == "constant":
        return float(config.batch_size * config.max_new_tokens)
    tokens, completions = counts
    return tokens if aggregation == "token-mean" else completions


def _per_token(metrics: Metrics, config: PPOConfig, counts: Tensor) -> Metrics:
    """Statistics as means over tokens where the loss is divided by a constant."""
    if PRESETS[config.loss].aggregation != "constant":
        return metrics
    scale = _divisor(config, counts) / counts[0].clamp(min=1)
    as_they_are = ("policy_loss", "ratio_max")
    return {name: x if name in as_they_are else x * scale for name, x in metrics.items()}
