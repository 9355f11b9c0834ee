"""Scans and losses of rows that lie more than 2^31 elements apart, and of more rows than 65,535."""

from __future__ import annotations

import pytest
import torch
from backend_cases import calls, cases

from rlhf_fast import ops

# Of the third of rows so far apart the offset does not fit into 32 bits, but the distance does.
T, FAR = 40, 2**30 + 5


def outcome(op, call, scores, first, second, third, mask):
    """What `op` gives, with the gradient of what has one."""
    if op == "gae":
        return call(first, second, mask)
    if op == "ppo_advantages":
        return call(scores, first, second, third, mask, kl_coef=0.1)
    options = {}
    if op == "policy_loss":
        options = {"ratio": "sequence", "aggregation": "seq-mean-token-mean"}
    leaf = first.detach().requires_grad_()
    loss, metrics = call(leaf, second, third, mask, **options)
    return loss.detach(), *metrics.values(), *torch.autograd.grad(loss, leaf)


def reference(op, inputs):
    def call(*args, **options):
        return getattr(ops, op)(*args, **options, backend="reference")

    return outcome(op, call, *inputs)


def parameters(**options):
    return [
        pytest.param((op, case.values[0]), marks=case.marks, id=f"{op}-{case.id}")
        for op in ("gae", "ppo_advantages", "policy_loss", "value_loss")
        for case in cases(op, reference=False, **options)
    ]


def sample(rows, length):
    tensors = 0.3 * torch.randn(3, rows, length)
    return [torch.randn(rows), *tensors, torch.rand(rows, length) < 0.8]


def assert_close(found, expected):
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", parameters())
def test_rows_far_apart(which, monkeypatch):
    """11 GB of addresses, of which a few pages are touched."""
    op, case = which
    scores, *near = sample(3, T)
    expected = reference(op, (scores, *near))
    torch.use_deterministic_algorithms(False)  # it would fill the memory
    numbers = torch.empty(2 * FAR + 3 * T, device=case.device)
    counts = torch.empty(2 * FAR + T, dtype=torch.bool, device=case.device)
    far = [numbers.as_strided((3, T), (FAR, 1), i * T) for i in range(3)]
    far.append(counts.as_strided((3, T), (FAR, 1)))
    for view, x in zip(far, near, strict=True):
        view.copy_(x)
    for call in calls(op, getattr(ops, op), case, monkeypatch):
        assert_close(outcome(op, call, scores, *far), expected)


@pytest.mark.parametrize("which", parameters(interpreter=False))
def test_more_rows_than_65535(which, monkeypatch):
    op, case = which
    inputs = sample(70_001, 2)
    for call in calls(op, getattr(ops, op), case, monkeypatch):
        assert_close(outcome(op, call, *inputs), reference(op, inputs))
