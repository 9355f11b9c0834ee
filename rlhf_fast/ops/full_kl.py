r"""Exact KL(policy || reference) of each token, from the logits of both.

With p, q the two softmaxes and u = log p - log q, a sum of terms that are all >= 0,

    KL = sum_j p_j u_j - p_j + q_j = sum_j p_j (exp(-u_j) - 1 + u_j),

since p and q both sum to 1: nothing cancels when p is close to q, and an error in the normalisers
enters only squared. Gradients: p_j (u_j - KL) for z_j of the policy, q_j - p_j for the reference's.

Two runs of columns merge by the chain rule of KL. With w, v the shares of the first run in p and q,

    KL = w KL_1 + (1 - w) KL_2 + w log(w / v) + (1 - w) log((1 - w) / (1 - v)).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops._checks import differentiable_once, floating, require, same_shape, stats_dtype
from rlhf_fast.ops._memory import fresh_like
from rlhf_fast.ops._softmax import (
    RowSums,
    Scaling,
    check_scaling,
    exp_excess,
    make_scaling,
    merge_sums,
    pivot,
    row_sums,
)


class _RowKL(NamedTuple):
    """What is known of rows after some columns; `kl` [N] is that of the distributions over them."""

    sums: RowSums
    ref_sums: RowSums
    kl: Tensor


class _Terms(NamedTuple):
    """Probabilities, log-ratio u (0 where p is 0) and where |u| < 1, each `[N, w]`."""

    p: Tensor
    q: Tensor
    u: Tensor
    near: Tensor


def _terms(y: Tensor, sums: RowSums, ref_y: Tensor, ref_sums: RowSums, scaling: Scaling) -> _Terms:
    """u is the difference of the rows' gaps less that of their normalisers.

    Equal rows give exactly 0, and a common offset of the logits never enters.
    """
    gap = scaling.divide(y - pivot(sums.top).unsqueeze(-1))
    ref_gap = scaling.divide(ref_y - pivot(ref_sums.top).unsqueeze(-1))
    shift = (sums.log_normalizer() - ref_sums.log_normalizer()).unsqueeze(-1)
    # By the gap: a masked logit's finite value, divided by a temperature, may leave the dtype.
    possible = gap > -math.inf
    u = torch.where(possible, gap - ref_gap - shift, 0.0)
    p = gap.exp().div_((1.0 + sums.others).unsqueeze(-1))
    q = ref_gap.exp().div_((1.0 + ref_sums.others).unsqueeze(-1))
    return _Terms(p, q, u, possible & (u.abs() < 1.0))


def _row_kl(y: Tensor, ref_y: Tensor, scaling: Scaling) -> _RowKL:
    sums, ref_sums = row_sums(y, scaling), row_sums(ref_y, scaling)
    p, q, u, near = _terms(y, sums, ref_y, ref_sums, scaling)
    terms = torch.where(near, p * exp_excess(u), p * (u - 1.0) + q)
    kl = terms.sum(dim=-1).masked_fill_((u == math.inf).any(dim=-1), math.inf)
    return _RowKL(sums, ref_sums, kl.masked_fill_(sums.top == -math.inf, 0.0))


def _merge(first: _RowKL, second: _RowKL, scaling: Scaling) -> _RowKL:
    d, ref_d = (
        scaling.divide(pivot(a.top) - pivot(b.top)) + (a.log_normalizer() - b.log_normalizer())
        for a, b in ((first.sums, second.sums), (first.ref_sums, second.ref_sums))
    )
    kl = _merge_shares(d, ref_d, first.kl, second.kl)
    # A run in which nothing is possible: it has no share in p, or none in q.
    for here, there in ((first, second), (second, first)):
        none, ref_none = (s.top == -math.inf for s in (here.sums, here.ref_sums))
        other = there.ref_sums
        unseen = scaling.divide(pivot(here.ref_sums.top) - pivot(other.top))
        unseen = unseen + (here.ref_sums.log_normalizer() - other.log_normalizer())
        alone = there.kl + torch.where(ref_none, 0.0, torch.nn.functional.softplus(unseen))
        kl = torch.where(none, alone, torch.where(ref_none, math.inf, kl))
    empty = (first.sums.top == -math.inf) & (second.sums.top == -math.inf)
    return _RowKL(
        merge_sums(first.sums, second.sums, scaling),
        merge_sums(first.ref_sums, second.ref_sums, scaling),
        kl.masked_fill(empty, 0.0),
    )


def _merge_shares(d: Tensor, ref_d: Tensor, kl: Tensor, other_kl: Tensor) -> Tensor:
    """The chain rule for shares w = sigmoid(d) of p and v = sigmoid(ref_d) of q."""
    w, rest, delta = d.sigmoid(), (-d).sigmoid(), d - ref_d
    logsigmoid = torch.nn.functional.logsigmoid
    # log(w / v) = log1p((1 - w) expm1(delta)), without cancellation while delta is small.
    near = delta.abs() < 1.0
    small = torch.where(near, delta, 0.0)
    x = torch.where(near, (rest * small.expm1()).log1p(), logsigmoid(d) - logsigmoid(ref_d))
    y = torch.where(near, (w * (-small).expm1()).log1p(), logsigmoid(-d) - logsigmoid(-ref_d))
    binary = torch.where(
        near,
        w * exp_excess(torch.where(near, x, 0.0)) + rest * exp_excess(torch.where(near, y, 0.0)),
        _product(w, x) + _product(rest, y),
    )
    return _product(w, kl) + _product(rest, other_kl) + binary


def _product(share: Tensor, x: Tensor) -> Tensor:
    """`share * x`, 0 where the share is; but a KL of +inf stays one."""
    return torch.where(
        (share == 0.0) & (x < math.inf), 0.0, torch.where(x == math.inf, x, share * x)
    )


def forward_reference(
    logits: Tensor,
    ref_logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    carry: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(kl, stats) of a slice of the columns and those before it.

    Args:
        logits: `[..., w]` raw, N rows.
        ref_logits: `[..., w]` raw.
        row_temperature: `[N]` in the statistics' dtype; None for `temperature` everywhere.
        temperature: see `row_temperature`.
        softcap: 0.0 for none.
        logit_scale: factor on the logits.
        carry: the stats of the columns before, or None.

    Returns:
        kl `[...]`, of the distributions over the columns so far. stats `[5, N]`: the policy's
        largest y and S, the reference's, and kl (0 while the policy allows nothing).
    """
    scaling = Scaling(row_temperature, temperature, softcap, logit_scale)
    dtype = stats_dtype(torch.promote_types(logits.dtype, ref_logits.dtype))
    y, ref_y = (scaling.capped(x.reshape(-1, x.shape[-1]), dtype) for x in (logits, ref_logits))
    row = _row_kl(y, ref_y, scaling)
    if carry is not None:
        row = _merge(_unpack(carry), row, scaling)
    stats = torch.stack([*row.sums[:2], *row.ref_sums[:2], row.kl])
    kl = row.kl.masked_fill(row.sums.top == -math.inf, math.nan)
    return kl.view(logits.shape[:-1]), stats


def _unpack(stats: Tensor) -> _RowKL:
    top, others, ref_top, ref_others, kl = stats
    zero = torch.zeros_like(kl)
    return _RowKL(RowSums(top, others, zero), RowSums(ref_top, ref_others, zero), kl)


def backward_reference(
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    grad_kl: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    rows: Tensor | None,
    out: Tensor | None,
    ref_out: Tensor | None,
) -> None:
    """Writes the gradients of a slice of the columns into `out` and `ref_out`, where wanted.

    Args:
        logits: `[..., w]` raw.
        ref_logits: `[..., w]` raw.
        stats: `[5, K]`, what the forward of the last columns gave.
        grad_kl: `[...]`, K in all.
        row_temperature: `[K]` or None; this and the options after it as in the forward.
        rows: `[K]` int64, the row of both logits that belongs to each row of the rest; None if they
            are the same rows.
        out: `[..., w]`, K rows, or None; may be `logits` itself.
        ref_out: the same for `ref_logits`.
    """
    scaling = Scaling(row_temperature, temperature, softcap, logit_scale)
    dtype = stats.dtype
    x, ref_x = (t.reshape(-1, t.shape[-1]) for t in (logits, ref_logits))
    if rows is not None:
        x, ref_x = x[rows], ref_x[rows]
    sums, ref_sums, kl = _unpack(stats)
    y, ref_y = scaling.capped(x, dtype), scaling.capped(ref_x, dtype)
    p, q, u, near = _terms(y, sums, ref_y, ref_sums, scaling)
    upstream = grad_kl.reshape(-1).to(dtype)
    dead = ((kl == math.inf) | (upstream == 0.0)).unsqueeze(-1)
    upstream = upstream.unsqueeze(-1)
    # Before any write: an output may be its own input.
    slopes = [scaling.slope(t, dtype) for t in (x, ref_x)]
    grad = torch.where(p == 0.0, 0.0, p * (u - kl.unsqueeze(-1)))
    ref_grad = torch.where(near, p * u.neg().expm1(), q - p)
    impossible = (sums.top == -math.inf).unsqueeze(-1)
    for g, slope, target in zip((grad, ref_grad), slopes, (out, ref_out), strict=True):
        if target is not None:
            g = scaling.divide(g.mul_(upstream) * slope)
            g = g.masked_fill_(impossible, math.nan).masked_fill_(dead, 0.0)
            target.copy_(g.view(target.shape))


REFERENCE = Impl(forward_reference, backward_reference, (), (), None)


class _FullKL(torch.autograd.Function):
    """Any backend's `full_kl`; keeps both logits and five numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: Impl,
        logits: Tensor,
        ref_logits: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        logit_scale: float,
    ) -> Tensor:
        assert impl.forward is not None
        options = (temperature, softcap, logit_scale)
        kl, stats = impl.forward(logits, ref_logits, row_temperature, *options, None)
        ctx.save_for_backward(logits, ref_logits, stats, row_temperature)
        ctx.impl, ctx.options = impl, options
        return kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Any, ...]:
        logits, ref_logits, stats, row_temperature = ctx.saved_tensors
        out = fresh_like(logits) if ctx.needs_input_grad[1] else None
        ref_out = fresh_like(ref_logits) if ctx.needs_input_grad[2] else None
        ctx.impl.backward(
            logits, ref_logits, stats, grad_kl, row_temperature, *ctx.options, None, out, ref_out
        )
        return None, out, ref_out, None, None, None, None


def full_kl_reference(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """`full_kl` in PyTorch, arguments unchecked; with the options that `linear_kl` adds."""
    return _run(REFERENCE, logits, ref_logits, temperature, softcap, logit_scale)


def _run(
    impl: Impl,
    logits: Tensor,
    ref_logits: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    dtype = stats_dtype(torch.promote_types(logits.dtype, ref_logits.dtype))
    scaling = make_scaling(
        temperature, softcap, logit_scale, logits.shape[:-1], dtype, logits.device
    )
    kl: Tensor = _FullKL.apply(impl, logits, ref_logits, *scaling)
    return kl


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Exact KL(policy || reference) over the vocabulary, in nats, one number per row.

    `sum_j p_j (log p_j - log q_j)` with `p = softmax(logits / temperature)` and
    `q = softmax(ref_logits / temperature)`. Differentiable in both, once. Precise where p is close
    to q (equal logits give exactly 0) and where both are peaked; never negative.

    A token ruled out by the policy (logit -inf) adds nothing. One that the policy allows and the
    reference rules out makes the row +inf; such a row passes on no gradient. A policy row that is
    all -inf has no distribution and gives NaN.

    Args:
        logits: `[..., V]` of the policy, any floating dtype and strides.
        ref_logits: `[..., V]` of the reference; the dtype may differ (the compiled backends then
            widen a copy of one of the two).
        temperature: a number > 0, or a tensor that broadcasts to the rows `[...]`; a constant.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        `[...]` in fp32 (fp64 if one input is fp64).

    Raises:
        TypeError: an input is not floating.
        ValueError: shapes, devices or the temperature do not fit.
    """
    op = "full_kl"
    floating(op, logits=logits, ref_logits=ref_logits)
    same_shape(op, logits=logits, ref_logits=ref_logits)
    require(
        logits.ndim > 0 and logits.shape[-1] > 0,
        f"{op}: logits has shape {list(logits.shape)}; expected [..., V] with V > 0",
    )
    check_scaling(op, temperature, None, logits.shape[:-1], logits.device)
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    impl = resolve(op, logits.device, backend, dtype)
    return _run(impl or REFERENCE, logits, ref_logits, temperature, None, 1.0)
