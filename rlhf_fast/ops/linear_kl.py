"""Exact KL(policy || reference) of each token, from the hidden states and heads of both."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops import _kl_tiles
from rlhf_fast.ops._checks import differentiable_once, require, stats_dtype
from rlhf_fast.ops._linear import operand_dtype, select_rows, spread_rows, wants_grad
from rlhf_fast.ops._linear_checks import check_head, check_live_rows
from rlhf_fast.ops._plan import check_budget, make_plan
from rlhf_fast.ops._softmax import check_scaling, make_scaling
from rlhf_fast.ops.full_kl import full_kl_reference


def linear_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The specification of `linear_kl`: all logits at once, in the statistics' dtype."""
    inputs = (hidden, weight, ref_hidden, ref_weight)
    dtype = stats_dtype(reduce(torch.promote_types, (t.dtype for t in inputs)))

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = hidden.to(dtype) @ weight.to(dtype).t()
        return product if bias is None else product + bias.to(dtype)

    return full_kl_reference(
        logits(hidden, weight, bias),
        logits(ref_hidden, ref_weight, ref_bias),
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )


class _LinearKL(torch.autograd.Function):
    """The opaque tile loops, forward and backward, by the route that was planned."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        logit_scale: float,
        operand: torch.dtype,
        kept_tiles: int,
        direct: bool,
        skip_dead: bool,
        backend: str | None,
    ) -> Tensor:
        inputs = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        options = (temperature, softcap, logit_scale, operand, kept_tiles)
        kl, stats, kept, slopes = _kl_tiles.forward(
            *inputs, row_temperature, *options, direct, backend
        )
        ctx.save_for_backward(*inputs, stats, kept, row_temperature, slopes)
        ctx.options, ctx.direct = options, direct
        ctx.skip_dead, ctx.backend = skip_dead, backend
        return kl

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Any, ...]:
        *inputs, slopes = ctx.saved_tensors
        if ctx.direct:
            grad = (grad_kl.unsqueeze(-1) * slopes).to(inputs[0].dtype)
            # A row without an upstream gradient gets none, even if its logits are NaN.
            return grad.masked_fill_((grad_kl == 0).unsqueeze(-1), 0.0), *[None] * 14
        needs = list(ctx.needs_input_grad[:6])
        grads = _kl_tiles.backward(
            grad_kl, *inputs, *ctx.options, ctx.skip_dead, needs, ctx.backend
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 9


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    live_rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`full_kl` of the logits of two heads, in nats, without any `[N, V]` tensor.

    On both sides `z = softcap * tanh((hidden W^T + b) * logit_scale / softcap) / temperature`. The
    widths of the two models may differ, their vocabulary may not. Precision, tiles, routes, bits,
    rows without an upstream gradient and `torch.compile` are as in `linear_logprobs`.

    Args:
        hidden: `[N, D]` of the policy.
        weight: `[V, D]`, the policy's head.
        ref_hidden: `[N, D_ref]` of the reference.
        ref_weight: `[V, D_ref]`, the reference's head.
        bias: `[V]` or None, of the policy.
        ref_bias: `[V]` or None, of the reference.
        temperature: a number > 0, or a tensor that broadcasts to `[N]`: a constant.
        softcap: tanh cap on the logits; None for none.
        logit_scale: factor on the logits.
        memory_budget: bytes that may be kept for the backward. None takes half of what the device
            has free, 0 keeps as little as possible.
        live_rows: `[K]` int64, in rising order: the rows that count. The others give 0 and no
            gradient, and cost no product; None counts all.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        `kl [N]` in fp32 (fp64 for fp64 input), differentiable, once, in all six tensors.

    Raises:
        TypeError: an input is not floating.
        ValueError: shapes, devices or options do not fit.
    """
    op = "linear_kl"
    check_head(op, hidden, weight, bias)
    check_head(op, ref_hidden, ref_weight, ref_bias, prefix="ref_")
    if hidden.shape[0] != ref_hidden.shape[0]:  # made here alone: its text binds a graph to N
        raise ValueError(
            f"{op}: hidden has {hidden.shape[0]} rows, but ref_hidden has {ref_hidden.shape[0]}; "
            "they must be the same tokens"
        )
    require(
        weight.shape[0] == ref_weight.shape[0],
        f"{op}: weight has {weight.shape[0]} rows, but ref_weight has {ref_weight.shape[0]}; "
        "policy and reference must share one vocabulary",
    )
    require(
        hidden.device == ref_hidden.device,
        f"{op}: ref_hidden is on {ref_hidden.device}, but hidden is on {hidden.device}; "
        "move them to one device",
    )
    check_scaling(op, temperature, softcap, hidden.shape[:1], hidden.device, logit_scale)
    check_budget(op, memory_budget)
    check_live_rows(op, live_rows, hidden)
    compiling = torch.compiler.is_compiling()
    if compiling:  # which refuses one tensor in two places, such as a shared frozen head
        ref_hidden, ref_weight = ref_hidden.view_as(ref_hidden), ref_weight.view_as(ref_weight)
        ref_bias = None if ref_bias is None else ref_bias.view_as(ref_bias)
    operand = operand_dtype(hidden, weight, ref_hidden, ref_weight)
    dtype = stats_dtype(operand)
    resolve(op, hidden.device, backend, dtype)
    N = hidden.shape[0]
    if live_rows is not None:
        hidden, ref_hidden = (x.index_select(0, live_rows) for x in (hidden, ref_hidden))
    scaling = make_scaling(temperature, softcap, logit_scale, (N,), dtype, hidden.device)
    row_temperature = select_rows(scaling.row_temperature, live_rows)
    inputs = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    kept_tiles, direct = 0, False
    if not compiling or memory_budget:  # a plan would bind the graph to the number of rows
        plan = make_plan(
            *(hidden.shape[0], weight.shape[0], weight.shape[1], dtype, hidden.device),
            sides=2,
            needs=wants_grad(*inputs),
            entropy_grad=False,
            memory_budget=memory_budget,
        )
        kept_tiles, direct = plan.kept_tiles, plan.route == "direct"
    kl: Tensor = _LinearKL.apply(
        *(*inputs, row_temperature, *scaling[1:], operand),
        *(kept_tiles, direct, live_rows is None and not compiling, backend),
    )
    return spread_rows(kl, live_rows, N)
