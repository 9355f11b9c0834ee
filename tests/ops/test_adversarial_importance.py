"""Importance weights and KL estimates, in plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from loss_truth import (
    EPS,
    F64,
    INF,
    NAN,
    LossRunner,
    kl_and_slope,
    numbers,
    sequences,
)
from truth import assert_budget, gradients, leaf

from rlhf_fast.ops import importance_weights, kl_estimate


def runner(op):
    @pytest.fixture(params=cases(op.__name__))
    def run(request, monkeypatch):
        return LossRunner(op, request.param, monkeypatch)

    return run


weights, estimate = map(runner, (importance_weights, kl_estimate))


def weights_truth(old, rollout, mask, level, mode, low, high, cu_seqlens=None):
    a, b = numbers(old), numbers(rollout)
    raw, rows = [0.0] * len(a), sequences(mask, cu_seqlens)
    for row in rows:
        total = math.fsum(a[i] - b[i] for i in row)
        for i in row:
            x = {"token": a[i] - b[i], "sequence": total, "geometric": total / len(row)}[level]
            raw[i] = math.exp(min(max(x, -20), 20))
    at = [i for row in rows for i in row]
    floor, roof = -INF if low is None else low, INF if high is None else high
    w, n = [0.0] * len(a), len(at)
    for i in at:
        inside = floor <= raw[i] <= roof
        w[i] = min(max(raw[i], floor), roof) if mode == "truncate" else raw[i] * inside
    u = [a[i] - b[i] for i in at]
    squares = math.fsum(w[i] ** 2 for i in at)
    metrics = {
        "importance_weight_mean": math.fsum(w) / n,
        "importance_outside": sum(not floor <= raw[i] <= roof for i in at) / n,
        "importance_effective_samples": math.fsum(w) ** 2 / squares / n if squares else 0.0,
        "mismatch_mean": math.fsum(map(abs, u)) / n,
        "mismatch_max": max(map(abs, u)),
        "mismatch_ratio_mean": math.fsum(math.exp(min(abs(x), 20)) for x in u) / n,
        "mismatch_tokens": sum(not 0.9 <= math.exp(min(x, 20)) <= 1.1 for x in u) / n,
        "mismatch_kl_k3": math.fsum(math.expm1(min(x, 20)) - x for x in u) / n,
    }
    return torch.tensor(w, dtype=F64).view(mask.shape), metrics


@pytest.mark.parametrize("bounds", [(None, 2.0), (0.5, 2.0), (None, None), (0.9, 1.1), (0.0, 1.0)])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("packed", [False, True])
def test_importance_weights(weights, level, mode, bounds, packed):
    old = -torch.randn(5, 40).abs()
    rollout, mask = old + 0.3 * torch.randn(5, 40), torch.rand(5, 40) < 0.7
    mask[2] = False
    options = {"low": bounds[0], "high": bounds[1]}
    if packed:
        old, rollout, mask = old.flatten(), rollout.flatten(), mask.flatten()
        options["cu_seqlens"] = torch.tensor([0, 0, 3, 80, 80, 199, 200], dtype=torch.int32)
    exact, metrics = weights_truth(old, rollout, mask, level, mode, **options)
    held = leaf(old.masked_fill(~mask, NAN)), leaf(rollout.masked_fill(~mask, INF))
    found, measured = weights(*held, mask, level=level, mode=mode, **options)
    assert not found.requires_grad and (found[~mask] == 0).all()
    assert_budget("weights", found, exact, roundings=64)
    assert measured.keys() == metrics.keys()
    for name, value in measured.items():
        assert abs(value - metrics[name]) <= 64 * EPS * max(1, abs(metrics[name])), name


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_extreme_importance_weights(weights, level, mode):
    gaps = torch.tensor([0.0, 19.9, -19.9, 20.0, 21.0, -90.0, 1e4, -1e4])[:, None]
    for low, high in ((None, 2.0), (None, None), (0.5, 5.0)):
        exact, _ = weights_truth(gaps, 0 * gaps, gaps == gaps, level, mode, low, high)
        found, metrics = weights(
            gaps, 0 * gaps, torch.ones(8, 1), level=level, mode=mode, low=low, high=high
        )
        torch.testing.assert_close(found.double(), exact, rtol=32 * EPS, atol=0)
        assert not any(value.isnan() for value in metrics.values()), metrics
    for old, rollout in ((-INF, -1.0), (-1.0, -INF)):
        found, metrics = weights(
            torch.full((1, 2), old),
            torch.full((1, 2), rollout),
            torch.ones(1, 2),
            level=level,
            mode=mode,
        )
        assert found.isfinite().all() and not any(value.isnan() for value in metrics.values()), (
            metrics
        )
    found, metrics = weights(
        torch.full((2, 3), NAN), torch.zeros(2, 3), torch.zeros(2, 3), level=level
    )
    assert (found == 0).all() and all(value == 0 for value in metrics.values()), metrics


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_estimates_at_any_distance(estimate, kind, unbiased):
    gaps = [1e-6, 1e-4, 1e-2, 0.5, 3.0, 19.9, 19.999, 20.1, 87.0, 1e3]
    u = torch.tensor([0.0, *gaps, *(-x for x in gaps)])
    old = u.roll(3) / 3
    ref, held, upstream = torch.zeros_like(u), leaf(u), torch.linspace(-2, 2.1, len(u))
    options = {"old_logprobs": old} if unbiased else {}
    found = estimate(held, ref, kind=kind, unbiased_gradient=unbiased, **options)
    (gradient,) = gradients(found, [held], upstream)
    pairs = [
        kl_and_slope(kind, x, x - y if unbiased else None)
        for x, y in zip(u.double().tolist(), numbers(old), strict=True)
    ]
    exact, slopes = (torch.tensor(x, dtype=F64) for x in zip(*pairs, strict=True))
    if kind == "abs" and not unbiased:
        slopes[0] = 0
    close = {"rtol": 32 * EPS, "atol": 1e-38}
    torch.testing.assert_close(found.detach().double(), exact, **close)
    torch.testing.assert_close(gradient.double(), slopes * upstream, **close)
    assert kind == "k1" or (found >= 0).all()
    assert found[0] == 0


X = torch.zeros(3, 5)
WRONG = [
    ("rollout_logprobs", lambda: importance_weights(X, X[0], X)),
    ("mask", lambda: importance_weights(X, X, X[0])),
    ("level", lambda: importance_weights(X, X, X, level="word")),
    ("mode", lambda: importance_weights(X, X, X, mode="clip")),
    ("low", lambda: importance_weights(X, X, X, low=-0.1)),
    ("high", lambda: importance_weights(X, X, X, high=0.0)),
    ("high", lambda: importance_weights(X, X, X, low=2.0, high=1.0)),
    ("low", lambda: importance_weights(X, X, X, low=NAN)),
    ("ref_logprobs", lambda: kl_estimate(X, X[0])),
    ("kind", lambda: kl_estimate(X, X, kind="k4")),
    ("old_logprobs", lambda: kl_estimate(X, X, old_logprobs=X)),
    ("old_logprobs", lambda: kl_estimate(X, X, old_logprobs=X[0], unbiased_gradient=True)),
]


@pytest.mark.parametrize(("name", "call"), WRONG)
def test_bad_arguments_are_named(name, call):
    with pytest.raises((TypeError, ValueError), match=name):
        call()
