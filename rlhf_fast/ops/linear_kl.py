"""Exact KL(policy || reference) of each token, from the hidden states and heads of both."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import require, stats_dtype
from rlhf_fast.ops._chunks import (
    check_budget,
    check_head,
    head_logits,
    map_chunks,
    wants_grad,
)
from rlhf_fast.ops._softmax import check_scaling
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
    memory_budget: int | None = None,
) -> Tensor:
    """`linear_kl` in PyTorch, arguments unchecked: what every backend must compute."""
    inputs = (hidden, weight, ref_hidden, ref_weight)
    dtype = stats_dtype(reduce(torch.promote_types, (t.dtype for t in inputs)))
    # One cast ahead of the loop: autograd then sums dW and db over the chunks in this dtype.
    head, ref_head = weight.to(dtype), ref_weight.to(dtype)
    head_bias = None if bias is None else bias.to(dtype)
    ref_head_bias = None if ref_bias is None else ref_bias.to(dtype)
    rows = [hidden, ref_hidden]
    if isinstance(temperature, Tensor):
        rows.append(temperature.expand(hidden.shape[:1]))

    def chunk(
        hidden: Tensor, ref_hidden: Tensor, row_temperature: Tensor | None = None
    ) -> tuple[Tensor]:
        kl = full_kl_reference(
            head_logits(hidden, head, head_bias, logit_scale),
            head_logits(ref_hidden, ref_head, ref_head_bias, logit_scale),
            temperature=temperature if row_temperature is None else row_temperature,
            softcap=softcap,
        )
        return (kl,)

    width = 2 * weight.shape[0] + hidden.shape[1] + ref_hidden.shape[1]
    (kl,) = map_chunks(
        chunk,
        rows,
        vocab=weight.shape[0],
        bytes_per_row=head.element_size() * width,
        memory_budget=memory_budget,
        needs_grad=wants_grad(*inputs, bias, ref_bias),
    )
    return kl


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
    backend: str | None = None,
) -> Tensor:
    """`full_kl` of the logits of two heads, in nats, without any `[N, V]` tensor.

    On both sides `z = softcap * tanh((hidden W^T + b) * logit_scale / softcap) / temperature`. The
    widths of the two models may differ, their vocabulary may not. Precision, chunks and bits are as
    in `linear_logprobs`: fp32 products (fp64 for fp64 input), the gradients of weights and biases
    summed in fp32, no bit depends on `memory_budget` or on grad mode.

    Args:
        hidden: `[N, D]` of the policy. Leave out the rows that do not count.
        weight: `[V, D]`, the policy's head.
        ref_hidden: `[N, D_ref]` of the reference.
        ref_weight: `[V, D_ref]`, the reference's head.
        bias: `[V]` or None, of the policy.
        ref_bias: `[V]` or None, of the reference.
        temperature: a number > 0, or a tensor that broadcasts to `[N]`: a constant.
        softcap: tanh cap on the logits; None for none.
        logit_scale: factor on the logits.
        memory_budget: bytes for logits kept for the backward instead of computed again. None takes
            half of the device's free memory, 0 keeps nothing.
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
    require(
        hidden.shape[0] == ref_hidden.shape[0],
        f"{op}: hidden has {hidden.shape[0]} rows, but ref_hidden has {ref_hidden.shape[0]}; "
        "they must be the same tokens",
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
    resolve(op, hidden.device, backend, hidden.dtype)
    return linear_kl_reference(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        bias=bias,
        ref_bias=ref_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        memory_budget=memory_budget,
    )
