"""Log-probability of given tokens, and the entropy, from hidden states and the head's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops import _logprob_tiles
from rlhf_fast.ops._checks import differentiable_once, stats_dtype
from rlhf_fast.ops._linear import operand_dtype, select_rows, spread_rows, wants_grad
from rlhf_fast.ops._linear_checks import check_head, check_live_rows, check_row_tokens
from rlhf_fast.ops._plan import check_budget, make_plan
from rlhf_fast.ops._softmax import check_ids, check_scaling, host_checks_run, make_scaling
from rlhf_fast.ops.token_logprobs import token_logprobs_reference


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_logprobs`: the logits at once, in the statistics' dtype."""
    dtype = stats_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_logprobs_reference(
        logits * logit_scale,
        tokens,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
    )


class _LinearLogprobs(torch.autograd.Function):
    """The opaque tile loops, forward and backward, by the route that was planned."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        logit_scale: float,
        ignore_index: int,
        operand: torch.dtype,
        kept_tiles: int,
        direct: bool,
        skip_dead: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        options = (temperature, softcap, logit_scale, ignore_index, operand, kept_tiles)
        logprobs, entropy, stats, kept, slopes = _logprob_tiles.forward(
            hidden, weight, bias, tokens, row_temperature, *options, direct, backend
        )
        ctx.save_for_backward(hidden, weight, bias, tokens, stats, kept, row_temperature, slopes)
        ctx.options, ctx.direct = options, direct
        ctx.skip_dead, ctx.backend = skip_dead, backend
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Any, ...]:
        hidden, weight, bias, tokens, stats, kept, row_temperature, slopes = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 14
        if ctx.direct and grad_entropy is None:
            assert grad_logprobs is not None
            grad = (grad_logprobs.unsqueeze(-1) * slopes).to(hidden.dtype)
            # A row without an upstream gradient gets none, even if its logits are NaN.
            return grad.masked_fill_((grad_logprobs == 0).unsqueeze(-1), 0.0), *[None] * 13
        inputs = (hidden, weight, bias, tokens, stats, kept, row_temperature)
        grads = _logprob_tiles.backward(
            grad_logprobs, grad_entropy, *inputs, *ctx.options, ctx.skip_dead, needs, ctx.backend
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 11


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    live_rows: Tensor | None = None,
    entropy_grad: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of `(hidden @ weight.T + bias) * logit_scale`, without the `[N, V]` logits.

    The distribution is `softmax(z)` with
    `z = softcap * tanh((hidden W^T + b) * logit_scale / softcap) / temperature`.

    The logits exist in tiles, whose size follows from shapes and device type alone. Their products
    read the inputs' dtype, or autocast's where it is on (half precision on a GPU's tensor cores),
    and leave fp32 (fp64 for fp64 inputs): logits, statistics and the sums of all gradients are
    never rounded to half precision. So the same call gives the same outputs, to the bit, with and
    without grad and for every `memory_budget`; another number of rows may move the last bits. The
    last bits of gradients may depend on the route: for runs that repeat to the bit, and inside
    `torch.utils.checkpoint`, pass a number as `memory_budget`.

    What the backward costs is planned beforehand (`plan_linear_logprobs`): all or some logits are
    kept, within `memory_budget`, or made again; with a frozen head the gradient may be summed in
    the forward instead. Rows whose upstream gradients are all 0 are left out of the backward's
    products.

    Rows whose token is `ignore_index` (prompts, padding) are left out of all products and give
    0, 0 and no gradient. On a GPU the host waits once in the forward, and once in the backward, to
    learn how many rows are left; `live_rows` spares both. Under `torch.compile` no row is left out,
    unless by `live_rows`, and None as `memory_budget` means 0.

    Args:
        hidden: `[N, D]`, one row per predicted token.
        weight: `[V, D]`, the language-model head; no gradient is computed if it is frozen.
        tokens: `[N]` int64 or int32 ids in `[0, V)`, or `ignore_index`.
        bias: `[V]` or None.
        temperature: a number > 0, or a tensor that broadcasts to `[N]`: a constant.
        softcap: tanh cap on the logits; None for none.
        logit_scale: factor on the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        ignore_index: the id of tokens that do not count.
        memory_budget: bytes that may be kept for the backward. None takes half of what the device
            has free, 0 keeps as little as possible.
        live_rows: `[K]` int64, in rising order: the rows that count. The others are treated as if
            their token were `ignore_index`. All rows named go through the backward's products.
        entropy_grad: whether to plan for a gradient of the entropy. It is right either way; with a
            frozen head it rules out the gradient summed in the forward, which would not help.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        `(logprobs, entropy)`, both `[N]` in fp32 (fp64 for fp64 input), differentiable, once, in
        `hidden`, `weight` and `bias`.

    Raises:
        TypeError: a floating input is not, or `tokens` is not integral.
        ValueError: shapes, devices or options do not fit.
        IndexError: an id lies outside `[0, V)`, as in `token_logprobs`.
    """
    op = "linear_logprobs"
    check_head(op, hidden, weight, bias)
    check_row_tokens(op, hidden, tokens)
    check_scaling(op, temperature, softcap, tokens.shape, tokens.device, logit_scale)
    check_budget(op, memory_budget)
    check_live_rows(op, live_rows, hidden)
    if host_checks_run(hidden.device):
        ids = tokens if live_rows is None else tokens[live_rows]
        check_ids(op, ids, weight.shape[0], ignore_index)
    N, rows = tokens.shape[0], live_rows
    compiling = torch.compiler.is_compiling()
    if rows is None and not compiling:
        rows = (tokens != ignore_index).nonzero().squeeze(-1)
        rows = None if rows.numel() == N else rows
    operand = operand_dtype(hidden, weight)
    dtype = stats_dtype(operand)
    resolve(op, hidden.device, backend, dtype)
    if rows is not None:
        hidden, tokens = hidden.index_select(0, rows), tokens.index_select(0, rows)
    scaling = make_scaling(temperature, softcap, logit_scale, (N,), dtype, hidden.device)
    row_temperature = select_rows(scaling.row_temperature, rows)
    needs = wants_grad(hidden, weight, bias)
    kept_tiles, direct = 0, False
    if not compiling or memory_budget:  # a plan would bind the graph to the number of rows
        plan = make_plan(
            *(tokens.shape[0], weight.shape[0], weight.shape[1], dtype, hidden.device),
            sides=1,
            needs=needs,
            entropy_grad=entropy_grad,
            memory_budget=memory_budget,
        )
        kept_tiles, direct = plan.kept_tiles, plan.route == "direct"
    logprobs, entropy = _LinearLogprobs.apply(
        *(hidden, weight, bias, tokens.long(), row_temperature, *scaling[1:], ignore_index),
        *(operand, kept_tiles, direct, live_rows is None and not compiling, backend),
    )
    return spread_rows(logprobs, rows, N), spread_rows(entropy, rows, N)
