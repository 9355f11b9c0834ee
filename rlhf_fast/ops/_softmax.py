"""Row softmax maths of the log-prob and KL ops: scaling, statistics, argument checks.

A raw logit l becomes z = y / temperature with y = logit_scale * l, or softcap * tanh(y / softcap).
Every sum leaves one largest element of its row out. With S = sum exp(z_j - z_max) over the
*others*, the normaliser is z_max + log1p(S): S keeps the bits of a confident row that 1 + S would
round away. The maximum is subtracted before the temperature divides, so that a common offset of the
logits costs no bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops._checks import floating, require


class Scaling(NamedTuple):
    """What turns raw logits into z, in the order in which every launcher takes it."""

    row_temperature: Tensor | None
    """[N] in the statistics' dtype, or None for one temperature."""
    temperature: float
    softcap: float
    """0.0 stands for none."""
    logit_scale: float

    def capped(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """y of raw logits, in `dtype`; may alias them."""
        y = logits.to(dtype)
        if self.logit_scale != 1.0:
            y = y * self.logit_scale
        return (y / self.softcap).tanh() * self.softcap if self.softcap else y

    def divide(self, gaps: Tensor) -> Tensor:
        """`gaps / temperature`, for gaps `[N]` or `[N, w]` of y."""
        if self.row_temperature is None:
            return gaps if self.temperature == 1.0 else gaps / self.temperature
        return gaps / self.row_temperature.view(-1, *[1] * (gaps.ndim - 1))

    def slope(self, logits: Tensor, dtype: torch.dtype) -> Tensor | float:
        """dz / dl at raw logits `[N]` or `[N, w]`, times the temperature."""
        if not self.softcap:
            return self.logit_scale
        # 1 / cosh^2 is 1 - tanh^2 without the cancellation of a saturated tanh.
        x = logits.to(dtype) * (self.logit_scale / self.softcap)
        return self.logit_scale / x.cosh_().square_()

    def rows(self, index: Tensor | slice) -> Scaling:
        """The scaling of some of the rows."""
        if self.row_temperature is None:
            return self
        return self._replace(row_temperature=self.row_temperature[index])


def make_scaling(
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    rows: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Scaling:
    """The public options as launchers take them, for rows of shape `rows`."""
    if torch.compiler.is_compiling() and not isinstance(temperature, Tensor) and temperature != 1.0:
        # An opaque op binds a graph to the floats that it is given, and so does torch.full, but a
        # tensor times a float does not.
        temperature = torch.ones((1,) * len(rows), dtype=dtype, device=device) * temperature
    options = (softcap or 0.0, float(logit_scale))
    if isinstance(temperature, Tensor):
        return Scaling(temperature.to(dtype).expand(rows).reshape(-1), 1.0, *options)
    return Scaling(None, float(temperature), *options)


class RowSums(NamedTuple):
    """Sums over the columns seen so far, each [N]; `top` is -inf while nothing is possible."""

    top: Tensor
    """Largest y."""
    others: Tensor
    """Sum of e^gap over all but one largest element, gap = (y - top) / temperature."""
    weighted: Tensor
    """Sum of e^gap * gap, <= 0."""

    def log_normalizer(self) -> Tensor:
        """logsumexp of z, less that of the largest element alone."""
        return self.others.log1p()


def pivot(top: Tensor) -> Tensor:
    """`top`, or 0 where it is -inf, so that -inf - pivot is -inf and not NaN."""
    return torch.where(top == -math.inf, 0.0, top)


def gaps_below(y: Tensor, top: Tensor, scaling: Scaling) -> Tensor:
    """(y - top) / temperature of y `[N, w]`, finite: so that 0 * gap is 0 and not NaN."""
    gaps = scaling.divide(y - pivot(top).unsqueeze(-1))
    return gaps.clamp_(min=torch.finfo(y.dtype).min)


def row_sums(y: Tensor, scaling: Scaling) -> RowSums:
    """The sums of y `[N, w]`, w > 0."""
    top, peak = y.max(dim=-1)
    gaps = gaps_below(y, top, scaling)
    weights = gaps.exp().scatter_(-1, peak.unsqueeze(-1), 0.0)
    return RowSums(top, weights.sum(dim=-1), weights.mul_(gaps).sum(dim=-1))


def merge_sums(first: RowSums, second: RowSums, scaling: Scaling) -> RowSums:
    """The sums of two runs of columns together."""
    swap = second.top > first.top
    high, low = (
        RowSums(*(torch.where(swap, b, a) for a, b in zip(*pair, strict=True)))
        for pair in ((first, second), (second, first))
    )
    d = scaling.divide(low.top - pivot(high.top))
    w = d.exp()
    others = high.others + w * (1.0 + low.others)
    weighted = high.weighted + w * (low.weighted + d * (1.0 + low.others))
    nothing = d == -math.inf
    return RowSums(
        high.top,
        torch.where(nothing, high.others, others),
        torch.where(nothing, high.weighted, weighted),
    )


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
    # Messages are made only when needed: under torch.compile a number that varies has no text.
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap={softcap}; expected None or a finite number > 0")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{op}: logit_scale={logit_scale}; expected a finite number")
    if not isinstance(temperature, Tensor):
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"{op}: temperature={temperature}; expected a finite number > 0")
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
