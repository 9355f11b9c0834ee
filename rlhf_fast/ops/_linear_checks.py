"""Argument checks of the linear ops."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops._checks import floating, integral, require
from rlhf_fast.ops._softmax import host_checks_run


def check_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> None:
    """Raises unless `hidden [N, D]`, `weight [V, D]` and `bias [V]` fit; `prefix` as in "ref_"."""
    h, w, b = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    floating(op, **{h: hidden, w: weight, b: bias})
    require(
        hidden.ndim == 2,
        f"{op}: {h} has shape {list(hidden.shape)}; expected [N, D], one row per token "
        "(flatten the leading dims)",
    )
    require(
        weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[1],
        f"{op}: {w} has shape {list(weight.shape)}; expected [V, {hidden.shape[1]}] with V > 0, "
        f"for {h} of shape {list(hidden.shape)}",
    )
    require(
        bias is None or list(bias.shape) == [weight.shape[0]],
        f"{op}: {b} has shape {[] if bias is None else list(bias.shape)}; "
        f"expected [{weight.shape[0]}]",
    )
    for name, tensor in ((w, weight), (b, bias)):
        require(
            tensor is None or tensor.device == hidden.device,
            f"{op}: {name} is not on {hidden.device}, where {h} is; move them to one device",
        )


def check_row_tokens(op: str, hidden: Tensor, tokens: Tensor) -> None:
    """Raises unless `tokens [N]` are integers beside `hidden [N, D]`."""
    integral(op, tokens=tokens)
    require(
        tokens.shape == hidden.shape[:1],
        f"{op}: tokens has shape {list(tokens.shape)}; expected {list(hidden.shape[:1])}, "
        "one per row of hidden",
    )
    require(
        tokens.device == hidden.device,
        f"{op}: tokens is on {tokens.device}, but hidden is on {hidden.device}; "
        "move them to one device",
    )


def check_live_rows(op: str, live_rows: Tensor | None, hidden: Tensor) -> None:
    """Raises unless `live_rows` are int64 places in the rows of `hidden`, in order."""
    if live_rows is None:
        return
    if live_rows.dtype != torch.int64:
        raise TypeError(f"{op}: live_rows has dtype {live_rows.dtype}; expected int64 indices")
    require(
        live_rows.ndim == 1 and live_rows.device == hidden.device,
        f"{op}: live_rows has shape {list(live_rows.shape)} on {live_rows.device}; expected [K] "
        f"on {hidden.device}",
    )
    if host_checks_run(hidden.device) and live_rows.numel():
        rising = bool((live_rows.diff() > 0).all())
        inside = live_rows[0].item() >= 0 and live_rows[-1].item() < hidden.shape[0]
        require(
            rising and inside,
            f"{op}: live_rows must rise, without repeats, within [0, {hidden.shape[0]}); "
            "pass for example mask.nonzero().squeeze(-1)",
        )
