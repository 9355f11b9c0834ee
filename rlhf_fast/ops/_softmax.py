"""Row softmax maths shared by the log-prob and KL ops: scaling, statistics, argument checks.

Every sum leaves the row's largest logit out. With `S = sum exp(z_j - z_max)` over the *others*,
the normaliser is `z_max + log1p(S)`: `S` keeps the bits of a confident row that `1 + S` would round
away.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops._checks import floating, require


class RowStatistics(NamedTuple):
    """Softmax statistics of rows of logits; each field has the rows' shape with a last dim of 1."""

    top: Tensor
    """The largest logit."""
    others: Tensor
    """Sum of `exp(z - top)` over all but one largest logit."""
    mean_gap: Tensor
    """Expectation of `z - top` under the softmax; <= 0."""

    @property
    def log_normalizer(self) -> Tensor:
        """logsumexp of the row, less `top`."""
        return self.others.log1p()


def scaled_logits(
    logits: Tensor, temperature: float | Tensor, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """`softcap * tanh(logits / softcap) / temperature` in `dtype`; may alias `logits`.

    A tensor `temperature` has one entry per row and broadcasts against `logits[..., 0]`.
    """
    z = logits.to(dtype)
    if softcap is not None:
        z = (z / softcap).tanh_() * softcap
    if isinstance(temperature, Tensor):
        return z / temperature.to(dtype).unsqueeze(-1)
    return z if temperature == 1.0 else z / temperature


def unscale_gradient(
    grad: Tensor, logits: Tensor, temperature: float | Tensor, softcap: float | None
) -> Tensor:
    """Turns the gradient of `scaled_logits(logits, ...)`, overwritten, into that of `logits`."""
    if isinstance(temperature, Tensor):
        grad = grad.div_(temperature.to(grad.dtype).unsqueeze(-1))
    elif temperature != 1.0:
        grad = grad.div_(temperature)
    if softcap is not None:
        # 1 / cosh^2 is 1 - tanh^2 without the cancellation of a saturated tanh.
        grad = grad.div_((logits.to(grad.dtype) / softcap).cosh_().square_())
    return grad.to(logits.dtype)


def gaps_below(z: Tensor, top: Tensor) -> Tensor:
    """`z - top`, finite: a gap of -inf becomes the lowest number, so that 0 * gap is 0, not NaN."""
    return (z - top).clamp_(min=torch.finfo(z.dtype).min)


def row_statistics(z: Tensor) -> RowStatistics:
    """Softmax statistics over the last dim of `z[..., V]`; NaN for a row that is all -inf."""
    top, peak = z.max(dim=-1, keepdim=True)
    gaps = gaps_below(z, top)
    weights = gaps.exp().scatter_(-1, peak, 0.0)
    others = weights.sum(dim=-1, keepdim=True)
    mean_gap = weights.mul_(gaps).sum(dim=-1, keepdim=True) / (1.0 + others)
    return RowStatistics(top, others, mean_gap)


def exp_excess(u: Tensor) -> Tensor:
    """`exp(-u) - 1 + u` >= 0, precise near 0 where it is u^2/2; the k3 term of log-ratio `u`.

    Below the switch the series' first omitted term, u^4/360 of the value, is under one rounding.
    """
    small = u.abs() < (360.0 * torch.finfo(u.dtype).eps) ** 0.25
    s = torch.where(small, u, 0.0)
    series = 0.5 * s * s * (1.0 - s / 3.0 * (1.0 - s / 4.0 * (1.0 - s / 5.0)))
    return torch.where(small, series, torch.where(small, 1.0, u).neg().expm1() + u)


def host_checks_run(device: torch.device) -> bool:
    """Whether values (not only shapes) are checked: on CPU; elsewhere where RLHF_FAST_CHECK=1.

    Such a check waits for the device. Under `torch.compile` it would break the graph: not run.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("RLHF_FAST_CHECK") == "1"


def check_scaling(
    op: str,
    temperature: float | Tensor,
    softcap: float | None,
    rows: torch.Size,
    device: torch.device,
    logit_scale: float = 1.0,
) -> None:
    """Raises unless the options that turn logits into z are usable for rows of shape `rows`."""
    require(
        softcap is None or 0.0 < softcap < math.inf,
        f"{op}: softcap={softcap}; expected None or a finite number > 0",
    )
    require(
        math.isfinite(logit_scale), f"{op}: logit_scale={logit_scale}; expected a finite number"
    )
    if not isinstance(temperature, Tensor):
        require(
            0.0 < temperature < math.inf,
            f"{op}: temperature={temperature}; expected a finite number > 0",
        )
        return
    floating(op, temperature=temperature)
    shape = list(temperature.shape)
    require(
        temperature.ndim <= len(rows)
        and all(a in (1, b) for a, b in zip(reversed(shape), reversed(rows), strict=False)),
        f"{op}: temperature has shape {shape}, which does not broadcast to the rows {list(rows)}; "
        "give a float or one temperature per row",
    )
    require(
        temperature.device == device,
        f"{op}: temperature is on {temperature.device}, but the rows are on {device}; "
        "move them to one device",
    )
    require(
        not temperature.requires_grad,
        f"{op}: temperature requires grad, but it gets none; pass temperature.detach()",
    )
    if host_checks_run(device) and not bool((temperature > 0).all()):
        raise ValueError(
            f"{op}: temperature holds {temperature.min().item()}; expected only numbers > 0"
        )


def check_ids(op: str, tokens: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises `IndexError` for an id that is neither in `[0, vocab)` nor `ignore_index`.

    Where `host_checks_run` is false nothing is raised: such a row becomes NaN.
    """
    if not host_checks_run(tokens.device):
        return
    outside = (tokens != ignore_index) & ((tokens < 0) | (tokens >= vocab))
    if bool(outside.any()):
        raise IndexError(
            f"{op}: tokens holds the id {tokens[outside][0].item()}, outside [0, {vocab}); only "
            f"ignore_index ({ignore_index}) may lie outside"
        )
