"""Drawing tokens from logits: the filters, and inverse transform sampling.

Logits are fp32 `[B, V]`; -inf marks what cannot be drawn. Temperature, k and p are one a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# About the square root of a large vocabulary: the two searches then cost next to nothing.
BLOCK = 512
# A nucleus seldom has more tokens; a sort of 150,000 logits costs a CPU more than a small model.
NUCLEUS = 1024


def keep_top_k(logits: Tensor, k: Tensor, most: int) -> Tensor:
    """The k largest logits of each row, and what ties with the least of them; the rest is -inf.

    Args:
        logits: `[B, V]`.
        k: int64 `[B]`; 0 keeps the whole row.
        most: The largest of `k`.
    """
    ranked = logits.topk(min(most, logits.shape[1])).values
    least = ranked.gather(1, k.clamp(1, ranked.shape[1])[:, None] - 1)
    least = least.masked_fill((k == 0)[:, None], -torch.inf)
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, temperature: Tensor, p: Tensor) -> Tensor:
    """The fewest tokens of each row that hold a mass of p; the rest is -inf.

    A token goes if those before it in the ranking hold p already; ties are ranked anyhow.

    Args:
        logits: `[B, V]`.
        temperature: fp32 `[B]`.
        p: fp64 `[B]`; 1 keeps the whole row.
    """
    probabilities = (_below_top(logits) / temperature[:, None]).softmax(-1)
    vocabulary, whole = logits.shape[1], (p >= 1)[:, None]
    # On a GPU asking whether so many suffice would stall the stream; there a whole sort is cheap.
    ranks = vocabulary if logits.is_cuda else min(NUCLEUS, vocabulary)
    while True:
        ranked, order = probabilities.topk(ranks)
        mass = ranked.double().cumsum(-1)
        if ranks == vocabulary or bool(((mass[:, -1:] >= p[:, None]) | whole).all()):
            break
        ranks = min(8 * ranks, vocabulary)
    kept = whole.repeat(1, vocabulary).scatter(1, order, (mass - ranked < p[:, None]) | whole)
    return logits.masked_fill(~kept, -torch.inf)


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Tokens from `softmax(logits / temperature)`, by inverting its distribution function.

    No token of probability 0 is ever drawn. The distribution function runs in fp64, over blocks
    and then within one: in fp32 it would hardly grow along a large vocabulary. A block's own sum is
    fp32, of positive numbers and so good to rounding; within the block its share is divided anew.

    Args:
        logits: `[B, V]`; NaN in a row, or nothing but -inf, makes its token meaningless.
        temperature: fp32 `[B]`, greater than 0.
        uniform: fp64 `[B]`, in `[0, 1)`.

    Returns:
        int64 `[B]`, in `[0, V)`.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    padded = logits.new_zeros(rows, blocks * BLOCK)
    weights = padded[:, :vocabulary]
    torch.sub(logits, logits.amax(-1, keepdim=True), out=weights)
    weights.div_(temperature[:, None]).exp_()
    by_block = padded.view(rows, blocks, BLOCK)
    block, rest = _invert(by_block.sum(-1).double(), uniform)
    token, _ = _invert(by_block[torch.arange(rows, device=logits.device), block].double(), rest)
    return block * BLOCK + token


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Indices drawn in proportion to fp64 `weights` `[B, K]`, and what each leaves of `uniform`.

    Always an index of a positive weight, if there is one: a product may be rounded up to the whole
    sum, and a parallel running sum may rise a little where it should stand still.

    Returns:
        int64 `[B]`, and fp64 `[B]` in `[0, 1]`: how far into the index's share the number falls.
    """
    upto, positive = weights.cumsum(-1), weights > 0
    mass = uniform * upto[:, -1]
    passed = positive & (upto > mass[:, None])
    place = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    first, last = passed.byte().argmax(-1), (positive * place).argmax(-1)
    index = torch.where(passed.any(-1), first, last)
    share = weights.gather(1, index[:, None])[:, 0]
    before = upto.gather(1, index[:, None])[:, 0] - share
    return index, ((mass - before) / share).clamp(0, 1)


def _below_top(logits: Tensor) -> Tensor:
    return logits - logits.amax(-1, keepdim=True)


def uniforms(seeds: list[int], count: int) -> Tensor:
    """fp64 `[B, count]` in `[0, 1)` on the CPU, of each row's own seed."""
    rows = [
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows)
