"""Log-probability of given tokens, and the entropy, from logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import differentiable_once, floating, integral, require, stats_dtype
from rlhf_fast.ops._softmax import (
    RowStatistics,
    check_ids,
    check_scaling,
    gaps_below,
    row_statistics,
    scaled_logits,
    unscale_gradient,
)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the logits and a few numbers a row; the gradient is written out, not derived.

    With p = softmax(z), m = E_p[z - z_max]:

        d logp / d z_j    = [j = token] - p_j    (at the token -expm1(logp): it keeps its bits)
        d entropy / d z_j = -p_j (z_j - z_max - m)
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        temperature: float | Tensor,
        softcap: float | None,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor]:
        z = scaled_logits(logits, temperature, softcap, stats_dtype(logits.dtype))
        ignored = tokens == ignore_index
        inside = (tokens >= 0) & (tokens < logits.shape[-1])
        index = torch.where(inside, tokens, 0).long().unsqueeze(-1)
        stats = row_statistics(z)
        # Exact for a token that is the largest (the gap is 0); any other has p <= 1/2, where the
        # difference does not cancel.
        logprobs = (z.gather(-1, index) - stats.top - stats.log_normalizer).squeeze(-1)
        entropy = (stats.log_normalizer - stats.mean_gap).squeeze(-1)
        logprobs = logprobs.masked_fill(~inside, math.nan)
        entropy = entropy.masked_fill(~inside, math.nan)
        ctx.save_for_backward(logits, index, ignored, logprobs, *stats)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)
        return logprobs.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        logits, index, ignored, logprobs, *saved = ctx.saved_tensors
        stats = RowStatistics(*saved)
        z = scaled_logits(logits, ctx.temperature, ctx.softcap, logprobs.dtype)
        gaps = gaps_below(z, stats.top)
        p = gaps.exp().div_(1.0 + stats.others)
        if grad_logprobs is None:
            grad = torch.zeros_like(p)
        else:
            upstream = grad_logprobs.unsqueeze(-1)
            grad = p * -upstream
            grad.scatter_(-1, index, -logprobs.unsqueeze(-1).expm1() * upstream)
        if grad_entropy is not None:
            grad.sub_(gaps.sub_(stats.mean_gap).mul_(p).mul_(grad_entropy.unsqueeze(-1)))
        grad.masked_fill_(ignored.unsqueeze(-1), 0.0)
        return unscale_gradient(grad, logits, ctx.temperature, ctx.softcap), None, None, None, None


def token_logprobs_reference(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` in PyTorch, arguments unchecked: what every backend must compute.

    An id outside `[0, V)` that is not `ignore_index` gives NaN for its row.
    """
    logprobs, entropy = _TokenLogprobs.apply(logits, tokens, temperature, softcap, ignore_index)
    return logprobs, entropy


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, in nats.

    The distribution is `softmax(z)` with `z = softcap * tanh(logits / softcap) / temperature`. Both
    outputs are differentiable in `logits`, once. Logits of -inf (tokens ruled out) are legal and
    have probability 0 (under a `softcap` they become `-softcap`, as the formula says); a row that
    is all -inf has no distribution and gives NaN.

    A confident token keeps its bits: the sums leave the largest logit out, so that at a margin of
    60 nats the log-prob is still < 0 and has a gradient.

    Args:
        logits: `[..., V]`, any floating dtype and strides.
        tokens: `[...]` int64 or int32 ids in `[0, V)`, or `ignore_index`.
        temperature: a number > 0, or a tensor that broadcasts to the shape of `tokens`, such as
            `[B, 1]`: a constant, it gets no gradient.
        softcap: tanh cap on the logits (Gemma 2, arXiv:2408.00118); None for none.
        ignore_index: tokens with this id give 0, 0 and no gradient, whatever their row holds.
        inplace_backward: permission for a backend to write the gradient over `logits`. It saves
            memory; the logits are gone after the backward. PyTorch's reference never does.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        `(logprobs, entropy)`, both `[...]` in fp32 (fp64 for fp64 logits).

    Raises:
        TypeError: `logits` is not floating or `tokens` not integral.
        ValueError: shapes, devices or options do not fit.
        IndexError: an id lies outside `[0, V)`. Off the CPU and under `torch.compile`, where the
            check would stall, its row becomes NaN instead; `RLHF_FAST_CHECK=1` brings the error
            back on a GPU.
    """
    op = "token_logprobs"
    floating(op, logits=logits)
    integral(op, tokens=tokens)
    require(
        logits.ndim > 0 and logits.shape[-1] > 0,
        f"{op}: logits has shape {list(logits.shape)}; expected [..., V] with V > 0",
    )
    require(
        tokens.shape == logits.shape[:-1],
        f"{op}: tokens has shape {list(tokens.shape)}, but logits has {list(logits.shape)}; "
        f"expected tokens of shape {list(logits.shape[:-1])}",
    )
    require(
        tokens.device == logits.device,
        f"{op}: tokens is on {tokens.device}, but logits is on {logits.device}; "
        "move them to one device",
    )
    check_scaling(op, temperature, softcap, tokens.shape, tokens.device)
    check_ids(op, tokens, logits.shape[-1], ignore_index)
    resolve(op, logits.device, backend, logits.dtype)
    return token_logprobs_reference(
        logits, tokens, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
