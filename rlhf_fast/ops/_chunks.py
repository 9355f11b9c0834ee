"""Row chunks for the linear ops: logits exist for one chunk at a time, never for all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlhf_fast.ops._checks import differentiable_once, floating, integral, require

TILE_ELEMENTS = 1 << 25
"""Most logits of one chunk: 128 MiB in fp32. Part of the numerics (a product's bits depend on its
shape), so never derived from the memory at hand."""


def chunk_rows(rows: int, vocab: int) -> list[int]:
    """Sizes of the chunks of `rows` rows: near equal, at least one chunk (of no rows, if empty)."""
    most = max(1, TILE_ELEMENTS // vocab)
    chunks = max(1, -(-rows // most))
    return [rows // chunks + (i < rows % chunks) for i in range(chunks)]


def free_memory(device: torch.device) -> int:
    """Bytes that `device` can still give, 0 where that is unknown; respects a cgroup v2 limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((cgroup / "memory.current").read_text()))
    except OSError:
        pass
    return max(0, free)


def map_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    rows: Sequence[Tensor],
    *,
    vocab: int,
    bytes_per_row: int,
    memory_budget: int | None,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    """Applies `function` to chunks of `rows` (all `[N, ...]`) and joins each output to `[N]`.

    The first chunks, as many as the budget holds, keep what their backward needs (`bytes_per_row`
    each row); the others run again in the backward. Which ones changes no bit of any result. With
    `memory_budget=None` half of the device's free memory is used: gradients need the rest.
    """
    sizes = chunk_rows(rows[0].shape[0], vocab)
    recomputed = 0
    if needs_grad:
        budget = free_memory(rows[0].device) // 2 if memory_budget is None else memory_budget
        recomputed = len(sizes) - min(len(sizes), budget // max(1, bytes_per_row * sizes[0]))
    outputs = []
    for i, chunk in enumerate(zip(*(t.split(sizes) for t in rows), strict=True)):
        if i < len(sizes) - recomputed:
            outputs.append(function(*chunk))
        else:
            outputs.append(
                checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
            )
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


class _HeadLogits(torch.autograd.Function):
    """The products, forward and backward, with autocast off in both.

    Autograd's own backward of a product runs in half precision where `backward()` is called inside
    an autocast region.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.logit_scale = logit_scale
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.to(weight.dtype), weight, bias)
        return logits if logit_scale == 1.0 else logits.mul_(logit_scale)

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None, None]
        if ctx.logit_scale != 1.0:
            grad = grad * ctx.logit_scale
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grads[0] = (grad @ weight).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grads[1] = grad.T @ hidden.to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grads[2] = grad.sum(dim=0)
        return grads[0], grads[1], grads[2], None


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    """`(hidden W^T + b) * logit_scale` in the dtype of `weight`, whatever autocast says."""
    logits: Tensor = _HeadLogits.apply(hidden, weight, bias, logit_scale)
    return logits


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
        f"{op}: tokens has shape {list(tokens.shape)}; expected [{hidden.shape[0]}], "
        "one per row of hidden",
    )
    require(
        tokens.device == hidden.device,
        f"{op}: tokens is on {tokens.device}, but hidden is on {hidden.device}; "
        "move them to one device",
    )


def check_budget(op: str, memory_budget: int | None) -> None:
    """Raises unless `memory_budget` is None or a number of bytes >= 0."""
    require(
        memory_budget is None or memory_budget >= 0,
        f"{op}: memory_budget={memory_budget}; expected None or a number of bytes >= 0",
    )
