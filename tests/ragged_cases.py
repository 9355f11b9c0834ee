"""A ragged rollout, and the same with columns that no row uses."""

from __future__ import annotations

import dataclasses

import torch

from rlhf_fast.data import Rollout

PROMPT = [3, 3, 11, 11, 6, 6, 2, 2]  # pairs of one prompt
COMPLETION = [5, 1, 9, 2, 14, 3, 8, 7]


def ragged(logprobs=True):
    generator = torch.Generator().manual_seed(3)

    def draw(n):
        return torch.randint(5, 200, (n,), generator=generator).tolist()

    prompts = [draw(n) for n in PROMPT[::2] for _ in (0, 1)]
    for i in range(0, 8, 2):
        prompts[i + 1] = prompts[i]
    completions = [draw(n) for n in COMPLETION]
    given = [[-6.0 - i / 8] * n for i, n in enumerate(COMPLETION)] if logprobs else None
    return Rollout.from_lists(prompts, completions, pad_id=1, logprobs=given)


def widened(rollout, left=3, right=4):
    """With columns that no row uses."""

    def widen(x, left):
        return torch.nn.functional.pad(x, (left, right))

    return dataclasses.replace(
        rollout,
        tokens=widen(rollout.tokens, left),
        mask=widen(rollout.mask, left),
        completion_mask=widen(rollout.completion_mask, 0),
        logprobs=None if rollout.logprobs is None else widen(rollout.logprobs, 0),
    )
