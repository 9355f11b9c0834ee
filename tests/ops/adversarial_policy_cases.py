"""Inputs of policy_loss, its outcome with every gradient, and the comparison with the truth."""

from __future__ import annotations

import torch
from loss_truth import F32, F64, naive_policy_loss, policy_truth
from truth import assert_budget, leaf

RATIOS = ("token", "sequence", "none", "cispo")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
LEAVES = ("logprobs", "entropy", "kl")


def sample(*shape, dtype=F32, seed=0, keep=0.7, spread=0.3):
    """Arguments by name: a policy near the old one, advantages of both signs, a gappy mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(shape, generator=generator, dtype=F64)

    old = -normal().abs() - 0.05
    tensors = {
        "logprobs": old + spread * normal(),
        "old_logprobs": old,
        "advantages": normal(),
        "importance_weights": normal().exp().clamp(max=2),
        "entropy": normal().abs(),
        "ref_logprobs": old + spread * normal(),
        "kl": normal().square(),
    }
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    return {**tensors, "mask": torch.rand(shape, generator=generator) < keep}


def take(tensors, *names):
    return {
        name: tensors[name] for name in ("logprobs", "old_logprobs", "advantages", "mask", *names)
    }


def outcome(run, upstream=1.0, op=None, idle=False, **arguments):
    """Loss, metrics, and the gradient of each of `LEAVES` that is given."""
    leaves = {name: leaf(arguments[name]) for name in LEAVES if name in arguments}
    arguments = arguments | leaves
    head = [arguments.pop(name) for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    loss, metrics = (
        run(*head, idle=idle, **arguments) if op is None else (op(*head, **arguments), {})
    )
    if not any(x.numel() for x in leaves.values()):
        return loss.detach(), metrics, leaves
    found = torch.autograd.grad(
        loss, list(leaves.values()), torch.tensor(upstream, dtype=loss.dtype), allow_unused=True
    )
    gradients = {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(leaves.items(), found, strict=True)
    }
    return loss.detach(), metrics, gradients


def assert_true(run, *, naive=True, upstream=-1.7, roundings=8.0, **arguments):
    """Loss, statistics and gradients within the error of naive PyTorch in the same precision."""
    loss, metrics, gradients = outcome(run, upstream, **arguments)
    truth = policy_truth(upstream=upstream, **arguments)
    rival, rivals = None, {}
    if naive:
        rival, _, rivals = outcome(None, upstream, op=naive_policy_loss, **arguments)
    budget = {"roundings": roundings}
    assert_budget("loss", loss, truth.loss, rival, scale=truth.scale["loss"], **budget)
    for name, gradient in gradients.items():
        assert_budget(f"d {name}", gradient, truth.gradients[name], rivals.get(name), **budget)
    assert metrics.keys() == truth.metrics.keys()
    for name, value in metrics.items():
        assert value.dtype == loss.dtype and value.shape == () and not value.requires_grad
        assert_budget(name, value, truth.metrics[name], scale=truth.scale[name], **budget)
    return loss, metrics, gradients


def flat(found):
    """Loss, metrics and gradients of an outcome, as one list."""
    loss, metrics, gradients = found
    return [loss, *metrics.values(), *gradients.values()]
