"""Which rows of the data each optimiser step learns from."""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_fast.config import ConfigError
from rlhf_fast.data import batch_indices
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

    Within a batch the order is free, so rows of like length (`lengths` [rows], in tokens) are put
    into one micro-batch: less padding, the same sum.
    """
    config = run.config
    index = batch_indices(step, len(lengths), config.batch_size, config.seed)
    index = index[lengths[index].argsort(stable=True)]
    return [run.local(piece) for piece in index.split(config.micro_batch)]
