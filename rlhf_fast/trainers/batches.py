"""Which rows of the data each optimiser step learns from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast.config import ConfigError, PPOConfig
from rlhf_fast.data import Rollout, batch_indices
from rlhf_fast.trainers.run import Run


def count_steps(size: int, batch_size: int, epochs: float) -> int:
    """Optimiser steps of `epochs` passes over `size` rows, the last batch filled up.

    Raises:
        ConfigError: There are fewer rows than a batch holds.
    """
    if size < batch_size:
        raise ConfigError(
            f"batch_size = {batch_size} is more than the {size} rows of the data; make it at "
            f"most {size}"
        )
    return math.ceil(size * epochs / batch_size)


def pieces_of(run: Run, step: int, lengths: Tensor) -> list[Tensor]:
    """Row numbers of the micro-batches of `step`, this process's share of each.

    `lengths` [rows] are in tokens.
    """
    config = run.config
    index = batch_indices(step, len(lengths), config.batch_size, config.seed)
    return [run.local(piece) for piece in _longest_first(index, lengths).split(config.micro_batch)]


def minibatches(
    run: Run, config: PPOConfig, rollout: Rollout, epoch: int
) -> Iterator[list[Tensor]]:
    """Row numbers of the minibatches of an epoch of PPO, each in micro-batches.

    Minibatches are drawn at random from this process's `rollout`.
    """
    seed = (config.seed * 1_000_003 + run.step) * 101 + epoch
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(seed))
    lengths = rollout.lengths.cpu()
    for index in order.split(config.batch_size // run.world):
        index = _longest_first(index, lengths).to(run.device)
        yield list(index.split(config.micro_batch // run.world))


def _longest_first(index: Tensor, lengths: Tensor) -> Tensor:
    """The rows `index` of a batch in an order that puts those of like length into one micro-batch.

    Within a batch the order is free: less padding, the same sum. What the longest leave behind is
    room for all that follow.
    """
    return index[lengths[index].argsort(stable=True, descending=True)]
