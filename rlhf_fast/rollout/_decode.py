"""The decode loop: draws a token of every live row at a time, and drops rows that have ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data import pad
from rlhf_fast.ops import token_logprobs
from rlhf_fast.rollout._context import Context
from rlhf_fast.rollout._draw import draw, keep_top_k, keep_top_p, uniforms
from rlhf_fast.rollout.engine import Progress, Request

# Steps between two looks at which rows have ended: a look stalls a GPU's stream.
LOOK = {"cpu": 1}
LOOK_ELSEWHERE = 8
# Ended rows are dropped when they are one of so many: each time the rest of the cache is copied.
DROP = 8


class _Rows(NamedTuple):
    """What the loop knows of the live rows, one each: see `Sampling`.

    `number` is the row's in the whole batch, `length` where it ends as far as is known, `stops`
    `[B, S]` are filled up with -1, `uniform` `[B, T]` are what its tokens are drawn with.
    """

    number: Tensor
    length: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    stops: Tensor
    uniform: Tensor

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(*(x[rows] for x in self))


def _make_rows(numbers: list[int], requests: list[Request], stops: list[list[int]]) -> _Rows:
    hows = [request.sampling for request in requests]
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    longest = max(how.max_new_tokens for how in hows)
    return _Rows(
        number=torch.tensor(numbers),
        length=torch.tensor([how.max_new_tokens for how in hows]),
        temperature=torch.tensor([min(max(how.temperature, smallest), largest) for how in hows]),
        top_k=torch.tensor([how.top_k for how in hows]),
        top_p=torch.tensor([how.top_p for how in hows], dtype=torch.float64),
        stops=pad(stops, -1, side="right")[0],
        uniform=uniforms([request.seed for request in requests], longest),
    )


@dataclasses.dataclass
class Completions:
    """Completions of all rows, as the loop leaves them: what lies beyond `length` is of no meaning.

    Attributes:
        tokens: int64 `[B, T]`.
        logprobs: fp32 `[B, T]`, of the tokens under the distribution that they were drawn from.
        length: int64 `[B]`.
        finished: bool `[B]`, True where the last token is one to stop at.
    """

    tokens: Tensor
    logprobs: Tensor
    length: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, rows: int, longest: int, device: torch.device) -> Completions:
        return cls(
            tokens=torch.zeros(rows, longest, dtype=torch.int64, device=device),
            logprobs=torch.zeros(rows, longest, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
        )


def decode(
    begin: Callable[[list[Request], int], Context],
    numbers: list[int],
    requests: list[Request],
    stops: list[list[int]],
    vocabulary: int,
    out: Completions,
    on_progress: Progress,
) -> None:
    """Samples `requests` in one batch, into the rows `numbers` of `out`.

    Args:
        begin: Makes the context of requests, with room for so many tokens.
        stops: The tokens that end each request's completion.
        vocabulary: Tokens that can be drawn: the first so many of the logits.
    """
    device = out.tokens.device
    rows = _Rows(*(x.to(device) for x in _make_rows(numbers, requests, stops)))
    most_k = max(request.sampling.top_k for request in requests)
    some_p = any(request.sampling.top_p < 1 for request in requests)
    longest, look = rows.uniform.shape[1], LOOK.get(device.type, LOOK_ELSEWHERE)
    context, told = begin(requests, longest), 0
    for step in range(longest):
        logits = context.logits[:, :vocabulary].to(device, torch.float32)
        if most_k:
            logits = keep_top_k(logits, rows.top_k, most_k)
        if some_p:
            logits = keep_top_p(logits, rows.temperature, rows.top_p)
        tokens = draw(logits, rows.temperature, rows.uniform[:, step])
        out.tokens[rows.number, step] = tokens
        out.logprobs[rows.number, step] = token_logprobs(
            logits, tokens, temperature=rows.temperature
        )[0]
        ended = (tokens[:, None] == rows.stops).any(1) & (rows.length > step)
        out.finished[rows.number] |= ended
        rows = rows._replace(length=torch.where(ended, step + 1, rows.length))
        if step + 1 == longest:
            break
        if (step + 1) % look == 0:
            alive = rows.length > step + 1
            left = int(alive.sum())
            if left < len(requests) - told:
                on_progress(len(requests) - told - left)
                told = len(requests) - left
            if not left:
                break
            if (len(alive) - left) * DROP >= len(alive):
                out.length[rows.number] = rows.length
                kept = alive.nonzero()[:, 0]
                rows, tokens = rows.select(kept), tokens[kept]
                context.select(kept)
        context.append(tokens)
    out.length[rows.number] = rows.length
    if told < len(requests):
        on_progress(len(requests) - told)
