r"""Log-probability of given tokens, and the entropy, from logits.

With p = softmax(z), m = E_p[z - z_max], z as in `_softmax`:

    logp    = z_token - z_max - log1p(S)
    entropy = log1p(S) - m
    d logp / d z_j    = [j = token] - p_j    (at the token -expm1(logp): it keeps its bits)
    d entropy / d z_j = -p_j (z_j - z_max - m)

For a token that is the largest, logp = -log1p(S) to the last bit; any other has p <= 1/2, where
nothing cancels. The columns may come in slices (tiles of a larger vocabulary): the statistics of
those before are carried along, and merge.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops._checks import differentiable_once, floating, integral, require, stats_dtype
from rlhf_fast.ops._memory import fresh_like, owns_its_rows
from rlhf_fast.ops._softmax import (
    RowSums,
    Scaling,
    check_ids,
    check_scaling,
    gaps_below,
    make_scaling,
    merge_sums,
    row_sums,
)


def forward_reference(
    logits: Tensor,
    tokens: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    first_column: int,
    carry: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, stats) of columns `[first_column, first_column + w)` and those before.

    Args:
        logits: `[..., w]`, any strides.
        tokens: `[...]`, N in all.
        row_temperature: `[N]` in the statistics' dtype; None for `temperature` everywhere.
        temperature: see `row_temperature`.
        softcap: 0.0 for none.
        logit_scale: factor on the logits.
        ignore_index: tokens that get 0 everywhere.
        first_column: what the first column is in the vocabulary.
        carry: the stats of the columns before, or None.

    Returns:
        logprobs and entropy, `[...]`; NaN while the token's column has not come. stats `[4, N]`:
        the largest y, S, sum exp(gap) * gap, and the token's raw logit (NaN while not come).
    """
    scaling = Scaling(row_temperature, temperature, softcap, logit_scale)
    dtype = stats_dtype(logits.dtype)
    rows, ids = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1).long()
    sums = row_sums(scaling.capped(rows, dtype), scaling)
    column = ids - first_column
    here = (column >= 0) & (column < rows.shape[1])
    index = torch.where(here, column, 0).unsqueeze(-1)
    target = torch.where(here, rows.gather(-1, index).squeeze(-1).to(dtype), math.nan)
    if carry is not None:
        sums = merge_sums(RowSums(*carry[:3]), sums, scaling)
        target = torch.where(here, target, carry[3])
    possible = torch.where((sums.top == -math.inf) | target.isnan(), math.nan, 0.0).to(dtype)
    logprobs = _logprobs(sums, target, scaling) + possible
    mean_gap = sums.weighted / (1.0 + sums.others)
    entropy = sums.log_normalizer() - mean_gap + possible
    ignored = ids == ignore_index
    stats = torch.stack([*sums, target]).masked_fill_(ignored, 0.0)
    logprobs, entropy = (
        x.masked_fill(ignored, 0.0).view(tokens.shape) for x in (logprobs, entropy)
    )
    return logprobs, entropy, stats


def _logprobs(sums: RowSums, target: Tensor, scaling: Scaling) -> Tensor:
    """Log-probs `[N]` of tokens whose raw logits are `target`."""
    gap = scaling.divide(scaling.capped(target, target.dtype) - sums.top)
    return gap - sums.log_normalizer()


def backward_reference(
    logits: Tensor,
    tokens: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    first_column: int,
    rows: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the gradient of columns `[first_column, first_column + w)` into `out`.

    Args:
        logits: `[..., w]`, raw.
        tokens: `[...]`, K in all.
        stats: `[4, K]`, what the forward of the last columns gave.
        grad_logprobs: `[...]` or None for zero.
        grad_entropy: `[...]` or None for zero.
        row_temperature: `[K]` or None; this and the options after it as in the forward.
        rows: `[K]` int64, the row of `logits` that belongs to each row of the rest; None if they
            are the same rows.
        out: `[..., w]`, K rows; may be `logits` itself.
    """
    scaling = Scaling(row_temperature, temperature, softcap, logit_scale)
    dtype, ids = stats.dtype, tokens.reshape(-1).long()
    x = logits.reshape(-1, logits.shape[-1])
    x = x if rows is None else x[rows]
    sums, target = RowSums(*stats[:3]), stats[3]
    zero = torch.zeros_like(target)
    up_logprobs = zero if grad_logprobs is None else grad_logprobs.reshape(-1).to(dtype)
    up_entropy = zero if grad_entropy is None else grad_entropy.reshape(-1).to(dtype)
    dead = (ids == ignore_index) | ((up_logprobs == 0.0) & (up_entropy == 0.0))
    up_logprobs = torch.where(target.isnan(), math.nan, up_logprobs)

    gaps = gaps_below(scaling.capped(x, dtype), sums.top, scaling)
    p = gaps.exp().div_((1.0 + sums.others).unsqueeze(-1))
    grad = p * -up_logprobs.unsqueeze(-1)
    column = ids - first_column
    here = (column >= 0) & (column < x.shape[1])
    index = torch.where(here, column, 0).unsqueeze(-1)
    at_token = -_logprobs(sums, target, scaling).expm1() * up_logprobs
    at_token = torch.where(here, at_token, grad.gather(-1, index).squeeze(-1))
    grad.scatter_(-1, index, at_token.unsqueeze(-1))
    if grad_entropy is not None:
        mean_gap = sums.weighted / (1.0 + sums.others)
        gaps.sub_(mean_gap.unsqueeze(-1)).mul_(p).mul_(up_entropy.unsqueeze(-1))
        grad.sub_(gaps)
    grad = scaling.divide(grad * scaling.slope(x, dtype))
    out.copy_(grad.masked_fill_(dead.unsqueeze(-1), 0.0).view(out.shape))


REFERENCE = Impl(forward_reference, backward_reference, (), (), None)


class _TokenLogprobs(torch.autograd.Function):
    """Any backend's `token_logprobs`; keeps the logits and four numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: Impl,
        logits: Tensor,
        tokens: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        logit_scale: float,
        ignore_index: int,
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        assert impl.forward is not None
        options = (temperature, softcap, logit_scale, ignore_index, 0)
        logprobs, entropy, stats = impl.forward(logits, tokens, row_temperature, *options, None)
        ctx.save_for_backward(logits, tokens, stats, row_temperature)
        ctx.impl, ctx.options, ctx.in_place = impl, options, in_place
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Any, ...]:
        # A logits tensor that was overwritten since, by an earlier in-place backward too, raises.
        logits, tokens, stats, row_temperature = ctx.saved_tensors
        out = logits.detach() if ctx.in_place else fresh_like(logits)
        upstream = (grad_logprobs, grad_entropy)
        ctx.impl.backward(
            logits, tokens, stats, *upstream, row_temperature, *ctx.options, None, out
        )
        if ctx.in_place:
            torch.autograd.graph.increment_version(logits)
        return None, out, *[None] * 7


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
    return _run(REFERENCE, logits, tokens, temperature, softcap, ignore_index, in_place=False)


def _run(
    impl: Impl,
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    dtype = stats_dtype(logits.dtype)
    scaling = make_scaling(temperature, softcap, 1.0, tokens.shape, dtype, tokens.device)
    logprobs, entropy = _TokenLogprobs.apply(impl, logits, tokens, *scaling, ignore_index, in_place)
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
        inplace_backward: permission for a backend to write the gradient over `logits`, which saves
            `[..., V]` of memory and the time to touch it. The logits are gone after the backward:
            a second backward, or that of another op that saved them, raises. Not taken by the
            reference, under `torch.compile`, and where elements of `logits` share memory.
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
    impl = resolve(op, logits.device, backend, logits.dtype)
    in_place = inplace_backward and impl is not None and owns_its_rows(logits)
    return _run(impl or REFERENCE, logits, tokens, temperature, softcap, ignore_index, in_place)
