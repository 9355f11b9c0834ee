"""Float64 truth of value_loss, naive PyTorch's answer, and the comparison between them."""

from __future__ import annotations

import math

import torch
from loss_truth import F32, F64, LossTruth, numbers
from truth import assert_budget, gradients, leaf


def value_truth(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | torch.Tensor | None = None,
    upstream: float = 1.0,
) -> LossTruth:
    kept = [i for i, counts in enumerate((mask != 0).reshape(-1).tolist()) if counts]
    v, old, R = (numbers(x) for x in (values, old_values, returns))
    share = 1 / (max(len(kept), 1) if normalizer is None else (float(normalizer) or 1.0))
    d_values, losses, decided = [0.0] * len(v), [], 0
    for i in kept:
        near = v[i] if clip is None else min(max(v[i], old[i] - clip), old[i] + clip)
        plain, clipped = (v[i] - R[i]) ** 2, (near - R[i]) ** 2
        losses.append(max(plain, clipped) / 2)
        decided += clipped > plain
        d_values[i] = 0.0 if clipped > plain else (v[i] - R[i]) * share * upstream
    count = max(len(kept), 1)

    def variance(x: list[float]) -> float:
        mean = math.fsum(x) / count
        return math.fsum((y - mean) ** 2 for y in x) / max(count - 1, 1)

    spread = variance([R[i] for i in kept])
    explained = 1 - variance([R[i] - v[i] for i in kept]) / spread if spread else 0.0
    metrics = {
        "value_clip_fraction": decided * share,
        "explained_variance": explained * len(kept) * share,
        "value_mean": math.fsum(v[i] for i in kept) * share,
        "return_mean": math.fsum(R[i] for i in kept) * share,
    }
    scale = {
        "loss": math.fsum(losses) * share,
        "value_mean": math.fsum(abs(v[i]) for i in kept) * share,
        "return_mean": math.fsum(abs(R[i]) for i in kept) * share,
        "explained_variance": (1 + abs(1 - explained)) * len(kept) * share,
        "value_clip_fraction": 0.0,
    }
    return LossTruth(
        torch.tensor(math.fsum(losses) * share, dtype=F64),
        {name: torch.tensor(x, dtype=F64) for name, x in metrics.items()},
        {"values": torch.tensor(d_values, dtype=F64).view(values.shape)},
        scale,
    )


def naive_value_loss(values, old_values, returns, mask, *, clip=0.2, normalizer=None):
    """What people write, in the precision of the input."""
    near = values if clip is None else values.clamp(old_values - clip, old_values + clip)
    loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    count = (mask != 0).sum() if normalizer is None else float(normalizer)
    return torch.where(mask != 0, loss, 0.0).sum() / count


def naive_explained_variance(values, returns, mask):
    kept = mask != 0
    return 1 - (returns - values)[kept].var() / returns[kept].var()


def sample(*shape, dtype=F32, seed=0, keep=0.7, offset=0.0, spread=0.4):
    """Values that ran from the old ones, returns around them, a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    old, new, returns = torch.randn(3, *shape, generator=generator, dtype=F64)
    values = (old + spread * new + offset).to(dtype), (old + offset).to(dtype)
    returns = (old + returns + offset).to(dtype)
    return *values, returns, torch.rand(shape, generator=generator) < keep


def outcome(run, values, old_values, returns, mask, *, upstream=1.0, **options):
    values = leaf(values)
    loss, metrics = run(values, old_values, returns, mask, **options)
    assert not any(value.requires_grad for value in metrics.values())
    (d_values,) = gradients(loss, [values], torch.tensor(upstream, dtype=loss.dtype))
    return loss.detach(), metrics, d_values


def flat(found):
    loss, metrics, d_values = found
    return [loss, *metrics.values(), d_values]


def assert_true(run, *tensors, upstream=-1.7, **options):
    loss, metrics, d_values = outcome(run, *tensors, upstream=upstream, **options)
    truth = value_truth(*tensors, upstream=upstream, **options)
    values = leaf(tensors[0])
    rival = naive_value_loss(values, *tensors[1:], **options)
    (d_rival,) = gradients(rival, [values], torch.tensor(upstream, dtype=rival.dtype))
    assert_budget("loss", loss, truth.loss, rival.detach(), scale=truth.scale["loss"])
    assert_budget("d values", d_values, truth.gradients["values"], d_rival)
    assert metrics.keys() == truth.metrics.keys()
    for name, value in metrics.items():
        assert value.dtype == loss.dtype and value.shape == ()
        rival = None
        varies = (tensors[3] != 0).sum() > 1
        if name == "explained_variance" and "normalizer" not in options and varies:
            rival = naive_explained_variance(tensors[0], *tensors[2:])
        assert_budget(name, value, truth.metrics[name], rival, scale=truth.scale[name])
    return loss, metrics, d_values
