"""Log-probability of given tokens, and the entropy, from hidden states and the head's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import stats_dtype
from rlhf_fast.ops._chunks import (
    check_budget,
    check_head,
    check_row_tokens,
    head_logits,
    map_chunks,
    wants_grad,
)
from rlhf_fast.ops._softmax import check_ids, check_scaling
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
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` in PyTorch, arguments unchecked: what every backend must compute."""
    dtype = stats_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    # One cast ahead of the loop: autograd then sums dW and db over the chunks in this dtype.
    head, head_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = [hidden, tokens]
    if isinstance(temperature, Tensor):
        rows.append(temperature.expand(tokens.shape))
    live = (tokens != ignore_index).nonzero().squeeze(-1)
    compact = live.numel() < tokens.numel()
    if compact:
        rows = [row.index_select(0, live) for row in rows]

    def chunk(
        hidden: Tensor, tokens: Tensor, row_temperature: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return token_logprobs_reference(
            head_logits(hidden, head, head_bias, logit_scale),
            tokens,
            temperature=temperature if row_temperature is None else row_temperature,
            softcap=softcap,
            ignore_index=ignore_index,
        )

    logprobs, entropy = map_chunks(
        chunk,
        rows,
        vocab=weight.shape[0],
        bytes_per_row=head.element_size() * (weight.shape[0] + weight.shape[1]),
        memory_budget=memory_budget,
        needs_grad=wants_grad(hidden, weight, bias),
    )
    if not compact:
        return logprobs, entropy
    zeros = logprobs.new_zeros(tokens.shape)
    return zeros.index_copy(0, live, logprobs), zeros.index_copy(0, live, entropy)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of `(hidden @ weight.T + bias) * logit_scale`, without the `[N, V]` logits.

    The distribution is `softmax(z)` with
    `z = softcap * tanh((hidden W^T + b) * logit_scale / softcap) / temperature`. Products and sums
    run in fp32 (fp64 for fp64 input) out of inputs of any floating dtype, outside autocast, and the
    gradients of `weight` and `bias` are summed in it before they are rounded to the inputs' dtype;
    a half-precision `weight` is therefore held once more in fp32, `[V, D]`.

    Rows whose token is `ignore_index` (prompts, padding) are dropped before the products: they cost
    nothing and give 0, 0 and no gradient. Dropping them waits for the device once.

    Rows go through in chunks; their size depends on V and on how many rows are left, nothing else.
    So the same call gives the same bits with and without grad and for every `memory_budget`;
    another set of ignored rows may move the last bits of the rest.

    Args:
        hidden: `[N, D]`, one row per predicted token.
        weight: `[V, D]`, the language-model head; no gradient is computed if it is frozen.
        tokens: `[N]` int64 or int32 ids in `[0, V)`, or `ignore_index`.
        bias: `[V]` or None.
        temperature: a number > 0, or a tensor that broadcasts to `[N]`: a constant.
        softcap: tanh cap on the logits; None for none.
        logit_scale: factor on the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        ignore_index: the id of tokens that do not count.
        memory_budget: bytes for logits kept for the backward instead of computed again. None takes
            half of the device's free memory, 0 keeps nothing.
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
    check_ids(op, tokens, weight.shape[0], ignore_index)
    resolve(op, hidden.device, backend, hidden.dtype)
    return linear_logprobs_reference(
        hidden,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
    )
