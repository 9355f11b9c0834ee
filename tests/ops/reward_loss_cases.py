"""What the tests of the reward models' losses share."""

from __future__ import annotations

import math

import torch
from truth import gradients, leaf


def outcome(run, *tensors, upstream=-1.7, leaves=1, **options):
    """Loss, metrics and the gradients of the first `leaves` tensors."""
    held = [leaf(x) for x in tensors[:leaves]]
    loss, metrics = run(*held, *tensors[leaves:], **options)
    assert not any(value.requires_grad for value in metrics.values())
    found = gradients(loss, held, torch.tensor(upstream, dtype=loss.dtype))
    return loss.detach(), metrics, found


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
