"""Float64 truth of the log-prob and KL ops, PyTorch's naive answer, and the budget between them.

Every sum of the truth leaves the largest logit out and adds terms of one sign, so that it keeps 12
digits where naive float64 keeps none (a margin of 60 nats is 1e-26 below 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from backend_cases import Case, count_launches
from torch import Tensor

from rlhf_fast import backends

# What an op may launch: a head over hidden states may use the row kernels of its logits.
LAUNCHERS = {
    "token_logprobs": ("token_logprobs",),
    "full_kl": ("full_kl",),
    "linear_logprobs": ("linear_logprobs", "token_logprobs"),
    "linear_kl": ("linear_kl", "full_kl"),
}


class Runner:
    """An op on one backend and its device; takes CPU tensors, gives CPU tensors, must launch."""

    def __init__(self, op: Callable, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        self.op, self.backend, self.device = op, case.backend, case.device
        self.dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        self.launches = []
        for name in LAUNCHERS[op.__name__]:
            if case.backend in backends.TABLE[name]:
                self.dtypes = backends.TABLE[name][case.backend].dtypes
                self.launches.append(count_launches(monkeypatch, name, case.backend))

    def launched(self, direction: str) -> int:
        return sum(counts[direction] for counts in self.launches)

    def move(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def __call__(self, *tensors: Tensor, idle: bool = False, **options: Any) -> Any:
        """The op's outputs; `idle` where no row is left that a kernel must see."""
        before = self.launched("forward")
        options = {name: self.move(value) for name, value in options.items()}
        out = self.op(*map(self.move, tensors), backend=self.backend, **options)
        assert idle or not self.launches or self.launched("forward") > before, "never launched"
        return out.cpu() if isinstance(out, Tensor) else tuple(part.cpu() for part in out)


def gradients(outputs: Any, leaves: Sequence[Tensor], upstream: Any, **options: Any) -> tuple:
    """Gradients of `leaves`; an output whose upstream gradient is None takes no part."""
    if isinstance(outputs, Tensor):
        outputs, upstream = (outputs,), (upstream,)
    used = [i for i, grad in enumerate(upstream) if grad is not None]
    return torch.autograd.grad(
        [outputs[i] for i in used], leaves, [upstream[i] for i in used], **options
    )


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def sample(*shape, dtype=torch.float32, peaked=False, seed=0):
    """Logits [..., V], tokens [...] and the upstream gradients of both outputs, all unequal.

    `peaked`: three tokens of each row hold all its mass, and most targets are one of them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, V = shape[:-1], shape[-1]
    logits = torch.randn(shape, generator=generator) * 3
    tokens = torch.randint(V, rows, generator=generator)
    if peaked:
        heavy = torch.randint(V, (*rows, 3), generator=generator)
        noise = torch.rand(*rows, 3, generator=generator)
        logits.scatter_(-1, heavy, torch.tensor([24.0, 22.5, 17.0]) + noise)
        tokens = heavy[..., 0].where(torch.rand(rows, generator=generator) < 0.8, tokens)
    upstream = torch.randn(2, *rows, generator=generator) + 0.1
    return logits.to(dtype), tokens, tuple(upstream.double() if dtype.itemsize == 8 else upstream)


def capped(logits: Tensor, softcap: float | None, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Logits after scale and softcap, before the temperature; and the derivative of that."""
    x = logits.double() * logit_scale
    if softcap is None:
        return x, torch.full_like(x, logit_scale)
    return softcap * (x / softcap).tanh(), logit_scale / (x / softcap).cosh().square()


def spread(y: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps to the largest, probabilities, and log-sum-exp above the largest, `[..., 1]`."""
    gap = (y - y.amax(-1, keepdim=True)) / temperature
    others = gap.exp().scatter(-1, y.argmax(-1, keepdim=True), 0.0).sum(-1, keepdim=True)
    return gap, gap.exp() / (1 + others), others.log1p()


def per_row(temperature: float | Tensor, rows: torch.Size) -> Tensor:
    return torch.as_tensor(temperature, dtype=torch.float64).expand(rows).unsqueeze(-1)


def logprobs_truth(
    logits: Tensor,
    tokens: Tensor,
    upstream: Sequence[Tensor | None] = (None, None),
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy, and the gradient of the logits for these upstream gradients."""
    y, slope = capped(logits, softcap, logit_scale)
    temperature = per_row(temperature, tokens.shape)
    gap, p, excess = spread(y, temperature)
    counts = (tokens != ignore_index).unsqueeze(-1)
    target = tokens.long().where(counts[..., 0], 0).unsqueeze(-1)
    logprobs = gap.gather(-1, target) - excess
    mean = torch.where(p == 0, 0, p * gap).sum(-1, keepdim=True)
    entropy = excess - mean
    d_logp, d_entropy = (
        torch.zeros_like(logprobs) if grad is None else grad.double().unsqueeze(-1)
        for grad in upstream
    )
    dz = d_logp * (-p).scatter(-1, target, -logprobs.expm1())
    dz = dz - d_entropy * torch.where(p == 0, 0, p * (gap - mean))
    live = counts & ((d_logp != 0) | (d_entropy != 0))
    d_logits = torch.where(live, dz * slope / temperature, 0)
    results = (torch.where(counts, x, 0).squeeze(-1) for x in (logprobs, entropy))
    return *results, d_logits


def kl_truth(
    logits: Tensor,
    ref_logits: Tensor,
    upstream: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, and the gradients of both logits; the sum is of `q - p + p log(p / q)`, all >= 0."""
    (y, slope), (r, ref_slope) = (capped(x, softcap, logit_scale) for x in (logits, ref_logits))
    temperature = per_row(temperature, logits.shape[:-1])
    (gap, p, excess), (ref_gap, q, ref_excess) = spread(y, temperature), spread(r, temperature)
    u = (gap - ref_gap) - (excess - ref_excess)
    series = sum((-u) ** n / torch.tensor(float(n)).add(1).lgamma().exp() for n in range(9, 1, -1))
    small = torch.where(u.abs() < 0.02, series, (-u).expm1() + u)
    terms = torch.where(u.abs() < 1, p * small, p * (u - 1) + q)
    terms = torch.where(y == -torch.inf, q, terms)
    kl = terms.sum(-1, keepdim=True)
    scale = upstream.double().unsqueeze(-1) / temperature
    dead = (scale == 0) | (kl == torch.inf)
    dz = torch.where(p == 0, 0, p * (u - kl))
    # It sums to 0: where one token holds all mass, the others know its gradient, u - kl does not.
    largest = y.argmax(-1, keepdim=True)
    dz = dz.scatter(-1, largest, -dz.scatter(-1, largest, 0.0).sum(-1, keepdim=True))
    d_logits = torch.where(dead, 0, scale * dz * slope)
    d_ref = torch.where(u.abs() < 1, p * (-u).expm1(), q - p)
    return kl.squeeze(-1), d_logits, torch.where(dead, 0, scale * d_ref * ref_slope)


def naive_logits(x: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return torch.log_softmax(x / per_row(temperature, x.shape[:-1]).to(x.dtype), -1)


def naive_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What people write: log_softmax, gather, minus the sum of p log p; in fp32 or fp64."""
    logp = naive_logits(logits, temperature, softcap)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def naive_kl(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logp, logq = (naive_logits(x, temperature, softcap) for x in (logits, ref_logits))
    return (logp.exp() * (logp - logq)).sum(-1)


def assert_budget(
    what: str,
    got: Tensor,
    truth: Tensor,
    naive: Tensor | None = None,
    *,
    roundings: float = 8.0,
    scale: float = 0.0,
    measure: Callable[[Tensor], Tensor] = torch.amax,
) -> None:
    """Error against truth: at most naive PyTorch's and a few roundings of the largest value.

    NaN and infinities must be where the truth has them.

    Args:
        roundings: in fp32. Quotients, exp, log and products have one each, a logit of 16 is rounded
            to 16 of them, and the largest error of a handful of numbers is a matter of luck.
        scale: size of what the result is summed from, where that is larger than the result.
        measure: turns absolute errors into one number.
    """
    assert got.shape == truth.shape, f"{what}: shape {got.shape}, not {truth.shape}"
    finite = truth.isfinite()
    torch.testing.assert_close(
        got.double()[~finite], truth[~finite], equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
    if not finite.any():
        return
    rounding = 1e-13 if got.dtype == torch.float64 else roundings * torch.finfo(torch.float32).eps
    errors, size = (got.double() - truth)[finite].abs(), truth[finite].abs()
    if naive is None:
        allowed = rounding * max(scale, measure(size)) + _rounding_to(got.dtype) * measure(size)
    else:
        allowed = rounding * max(scale, measure(size)) + measure(
            (naive.double() - truth)[finite].abs()
        )
    at = errors.argmax()
    assert measure(errors) <= allowed, (
        f"{what}: error {measure(errors):.3g} > {allowed:.3g} ({got.dtype}), worst where the truth "
        f"is {truth[finite][at]:.9g} and the result {got[finite][at]:.9g}"
    )


def root_mean_square(errors: Tensor) -> Tensor:
    return errors.square().mean().sqrt()


def _rounding_to(dtype: torch.dtype) -> float:
    return 0.0 if dtype.itemsize >= 4 else torch.finfo(dtype).eps


def assert_same(what: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit, NaN included."""
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(
            one,
            other,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, i=i: f"{what}, tensor {i}: {m}",
        )


def assert_repeats(outputs: Any, leaves: Sequence[Tensor], upstream: Any) -> None:
    """Three backward passes: each the same gradients, or an error; never others, never zeros."""
    first = gradients(outputs, leaves, upstream, retain_graph=True)
    for _ in range(2):
        try:
            again = gradients(outputs, leaves, upstream, retain_graph=True)
        except RuntimeError:
            return
        assert_same("a second backward", again, first)
