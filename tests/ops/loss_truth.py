"""Float64 truth of the RL losses, token by token from the papers, and naive fp32 PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from backend_cases import Case, count_launches, to_device
from torch import Tensor

from rlhf_fast import backends

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
INF, NAN = math.inf, math.nan
EPS = torch.finfo(F32).eps


class LossRunner:
    """An op on one backend and its device; takes CPU tensors, gives CPU tensors, must launch."""

    def __init__(self, op: Callable, case: Case, monkeypatch: Any) -> None:
        self.op, self.backend, self.device = op, case.backend, case.device
        self.counts = None
        if case.backend in backends.TABLE[op.__name__]:
            self.counts = count_launches(monkeypatch, op.__name__, case.backend)

    def move(self, x: Any) -> Any:
        return x if isinstance(x, Tensor) and x.is_meta else to_device(x, self.device)

    def __call__(self, *args: Any, idle: bool = False, **options: Any) -> Any:
        """The op's results; `idle` where there may be nothing for a kernel to do."""
        before = self.counts["forward"] if self.counts else 0
        args = tuple(map(self.move, args))
        options = {name: self.move(x) for name, x in options.items()}
        result = self.op(*args, backend=self.backend, **options)
        launched = self.counts is None or self.counts["forward"] > before
        assert idle or launched, f"{self.backend} was never launched"
        return to_cpu(result)


def to_cpu(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.cpu()
    if isinstance(result, dict):
        return {name: to_cpu(x) for name, x in result.items()}
    return tuple(to_cpu(x) for x in result)


def numbers(x: Tensor | float) -> list[float]:
    return torch.as_tensor(x).detach().double().reshape(-1).tolist()


def sequences(mask: Tensor, cu_seqlens: Tensor | None = None) -> list[list[int]]:
    """For each sequence the flat indices of its tokens that count, in order."""
    counts = (mask != 0).reshape(-1).tolist()
    if cu_seqlens is None:
        T = mask.shape[1]
        ends = [(row * T, (row + 1) * T) for row in range(mask.shape[0])]
    else:
        ends = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    return [[i for i in range(*end) if counts[i]] for end in ends]


def per_token(x: Tensor | None, rows: list[list[int]], shape: torch.Size) -> list[float]:
    """`x`, one number per token or per sequence, per token."""
    if x is None or x.shape == shape:
        return numbers(x) if x is not None else [1.0] * shape.numel()
    spread = [0.0] * shape.numel()
    for row, number in zip(rows, numbers(x), strict=True):
        for i in row:
            spread[i] = number
    return spread


class LossTruth(NamedTuple):
    """A loss, its statistics and the gradients of its inputs, in float64; what they sum up."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]
    scale: dict[str, float]  # sums of absolute terms: what a rounding of the sum is relative to


def shares(
    rows: list[list[int]], aggregation: str, normalizer: float | Tensor | None
) -> tuple[dict[int, float], dict[int, float]]:
    """Each token's weight in the loss and in the statistics."""
    live = [row for row in rows if row]
    divisor = None if normalizer is None else (float(normalizer) or 1.0)
    loss, statistics = {}, {}
    for row in live:
        for i in row:
            if aggregation in ("token-mean", "constant"):
                loss[i] = statistics[i] = 1 / (divisor or sum(map(len, live)))
            else:
                per_sequence = 1 / (divisor or len(live))
                statistics[i] = per_sequence / len(row)
                mean = aggregation == "seq-mean-token-mean"
                loss[i] = statistics[i] if mean else per_sequence
    return loss, statistics


def kl_and_slope(kind: str, u: float, log_rho: float | None) -> tuple[float, float]:
    """The estimate of KL(policy || reference) at a token and its derivative (Schulman 2020)."""
    value, slope = {
        "k1": lambda: (u, 1.0),
        "k2": lambda: (u * u / 2, u),
        "k3": lambda: (math.expm1(-u) + u, -math.expm1(-u)) if u >= -20 else (math.exp(20) - 21, 0),
        "abs": lambda: (abs(u), math.copysign(1.0, u)),
    }[kind]()
    return value, slope if log_rho is None else math.exp(min(log_rho, 20)) * u


def policy_truth(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k2",
    kl_unbiased_gradient: bool = False,
    cu_seqlens: Tensor | None = None,
    upstream: float = 1.0,
) -> LossTruth:
    rows, shape = sequences(mask, cu_seqlens), logprobs.shape
    in_loss, in_statistics = shares(rows, aggregation, normalizer)
    finite = [[min(max(x, -1e18), 1e18) for x in numbers(y)] for y in (logprobs, old_logprobs)]
    new, log_rho = finite[0], [a - b for a, b in zip(*finite, strict=True)]
    A = per_token(advantages, rows, shape)
    weights = per_token(importance_weights, rows, shape)
    low = 0.0 if clip_low is None else 1 - clip_low
    high = INF if clip_high is None else 1 + clip_high
    terms: dict[str, list[float]] = {}
    d_logprobs, d_entropy, d_kl = ([0.0] * len(new) for _ in range(3))
    rho_max = 0.0
    for row in rows:
        mean = math.fsum(log_rho[i] for i in row) / max(len(row), 1)
        for i in row:
            x = mean if ratio == "sequence" else log_rho[i]
            bounded = min(max(log_rho[i], -20), 20)
            rho = math.exp(min(max(x, -20), 20))
            clipped, slope = min(max(rho, low), high), 0.0
            if ratio in ("none", "cispo"):
                slope = -A[i] * (clipped if ratio == "cispo" else 1)
                loss = slope * new[i]
            else:
                loss = max(-A[i] * rho, -A[i] * clipped)
                if loss == -A[i] * rho and abs(x) <= 20:
                    slope = loss
                if dual_clip is not None and A[i] < 0 and loss > -A[i] * dual_clip:
                    loss, slope = -A[i] * dual_clip, 0.0
            decided = {"token": A[i], "sequence": A[i], "none": 0.0, "cispo": None}[ratio]
            found = {
                "policy_loss": loss * weights[i],
                "clip_fraction_low": (rho < low) * (decided is None or decided < 0),
                "clip_fraction_high": (rho > high) * (decided is None or decided > 0),
                "approx_kl_k1": -bounded,
                "approx_kl_k3": math.expm1(bounded) - bounded,
                "ratio_mean": rho,
            }
            d_logprobs[i] = slope * weights[i]
            rho_max = max(rho_max, rho)
            terms.setdefault("at", []).append(i)
            for name, value in found.items():
                terms.setdefault(name, []).append(value)
    at = terms.pop("at", [])
    if entropy is not None:
        held = numbers(entropy)
        terms["entropy"] = [held[i] for i in at]
    if ref_logprobs is not None:
        u = [min(max(a - b, -1e18), 1e18) for a, b in zip(new, numbers(ref_logprobs), strict=True)]
        found = [
            kl_and_slope(kl_kind, u[i], log_rho[i] if kl_unbiased_gradient else None) for i in at
        ]
        terms["kl_ref"] = [value for value, _ in found]
        for i, (_, slope) in zip(at, found, strict=True):
            d_logprobs[i] += kl_coef * slope
    elif kl is not None:
        held = numbers(kl)
        terms["kl_ref"] = [held[i] for i in at]
    metrics, scale = {}, {}
    of_loss = ("policy_loss", "entropy", "kl_ref")
    for name, values in terms.items():
        share = in_loss if name in of_loss else in_statistics
        metrics[name] = math.fsum(share[i] * x for i, x in zip(at, values, strict=True))
        scale[name] = math.fsum(share[i] * abs(x) for i, x in zip(at, values, strict=True))
    scale["approx_kl_k3"] = scale.get("ratio_mean", 0.0) + scale.get("approx_kl_k1", 0.0) + 1
    metrics["ratio_max"], scale["ratio_max"] = rho_max, rho_max
    factors = {"policy_loss": 1.0, "entropy": -entropy_coef, "kl_ref": kl_coef}
    present = {name: factor for name, factor in factors.items() if factor and name in metrics}
    loss = math.fsum(factor * metrics[name] for name, factor in present.items())
    scale["loss"] = math.fsum(abs(factor) * scale[name] for name, factor in present.items())
    for i in at:
        d_logprobs[i] *= in_loss[i] * upstream
        d_entropy[i] = -entropy_coef * in_loss[i] * upstream
        d_kl[i] = kl_coef * in_loss[i] * upstream
    held = {"logprobs": d_logprobs, "entropy": d_entropy, "kl": d_kl}
    return LossTruth(
        torch.tensor(loss, dtype=F64),
        {name: torch.tensor(float(x), dtype=F64) for name, x in metrics.items()},
        {name: torch.tensor(x, dtype=F64).view(shape) for name, x in held.items()},
        scale,
    )


def naive_policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    ratio="token",
    aggregation="token-mean",
    normalizer=None,
    importance_weights=None,
    entropy=None,
    entropy_coef=0.0,
    ref_logprobs=None,
    kl=None,
    kl_coef=0.0,
    kl_kind="k2",
    kl_unbiased_gradient=False,
):
    """What people write, for padded input, in the precision of the input."""
    mask = mask != 0
    log_rho = torch.where(mask, logprobs - old_logprobs, 0.0)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    token_log_rho = log_rho
    if ratio == "sequence":
        mean = log_rho.sum(-1, keepdim=True) / lengths
        log_rho = mean.detach() + logprobs - logprobs.detach()
    rho = log_rho.exp()
    clipped = rho.clamp(
        None if clip_low is None else 1 - clip_low, 1e30 if clip_high is None else 1 + clip_high
    )
    A = advantages if advantages.shape == mask.shape else advantages[:, None].expand(mask.shape)
    if ratio == "none":
        loss = -A * logprobs
    elif ratio == "cispo":
        loss = -A * clipped.detach() * logprobs
    else:
        loss = torch.maximum(-A * rho, -A * clipped)
        if dual_clip is not None:
            loss = torch.where(A < 0, torch.minimum(loss, -A * dual_clip), loss)
    if importance_weights is not None:
        w = importance_weights
        loss = loss * (w if w.shape == mask.shape else w[:, None])
    if entropy is not None:
        loss = loss - entropy_coef * entropy
    if ref_logprobs is not None:
        u = logprobs - ref_logprobs
        kl = {"k1": u, "k2": u * u / 2, "k3": (-u).exp() - 1 + u}[kl_kind]
        if kl_unbiased_gradient:
            kl = kl.detach() + (token_log_rho.exp() * u).detach() * (logprobs - logprobs.detach())
    if kl is not None:
        loss = loss + kl_coef * kl
    loss = torch.where(mask, loss, 0.0)
    if aggregation in ("token-mean", "constant"):
        return loss.sum() / (mask.sum() if normalizer is None else float(normalizer))
    live = mask.any(-1).sum() if normalizer is None else float(normalizer)
    per_sequence = loss.sum(-1)
    return (
        per_sequence / lengths[:, 0] if "mean-token-mean" in aggregation else per_sequence
    ).sum() / live
