"""What the ops without a kernel of their own cost in eager PyTorch, and in how many kernels.

    make bench        # CPU
    make bench-gpu    # GPU

They work on one number a completion, or are computed once an iteration, or stand beside a fused op
that does the same inside (`policy_loss` has k2 and k3, `ppo_advantages` k1 and whitening). The
yardstick is one layer of a 0.5 B model (2048 tokens, width 896, inner 4864), forward and backward:
a step of training takes two dozen of them, for many more tokens.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from _harness import GPU, Report, on_gpu, place
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import ops

YARDSTICK = "one layer's products"
TOKENS, PAIRS = (64, 1024), 64

report = Report(floor=(), unit="MB", rivals=(YARDSTICK,))


class Counter(TorchDispatchMode):
    """Counts what is dispatched, views left out: the launches that a GPU would see, about."""

    VIEWS = (
        "view",
        "expand",
        "detach",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "as_strided",
        "t",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.VIEWS
        return function(*args, **(kwargs or {}))


def calls(device: str):
    """By name: a function of nothing that computes the op and its gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    mask = (draw(*TOKENS) > -1).to(device)
    new, ref, old = draw(*TOKENS).requires_grad_(), draw(*TOKENS), draw(*TOKENS)
    chosen, rejected = draw(PAIRS).requires_grad_(), draw(PAIRS).requires_grad_()
    lists, ranks = draw(PAIRS, 4).requires_grad_(), torch.tensor([[1, 2, 3, 4]] * PAIRS).to(device)
    ratings = torch.randint(1, 6, (PAIRS,), generator=generator).to(device)
    thresholds = torch.tensor([-2.0, -1.0, 1.0, 2.0], device=device).requires_grad_()
    hidden, up = draw(2048, 896).requires_grad_(), draw(4864, 896).requires_grad_()
    gate, down = draw(4864, 896).requires_grad_(), draw(896, 4864).requires_grad_()
    square = [draw(896, 896).requires_grad_() for _ in range(2)]

    def gradients(loss: Tensor, *leaves: Tensor):
        return torch.autograd.grad(loss.sum(), leaves)

    def layer():
        x = hidden
        for weight in square:
            x = F.linear(x, weight)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def ordinal() -> Tensor:
        return ops.rating_loss(chosen, ratings, kind="ordinal", thresholds=thresholds)[0]

    return {
        YARDSTICK: lambda: gradients(layer(), hidden, up, gate, down, *square),
        "kl_estimate k3": lambda: gradients(ops.kl_estimate(new, ref, kind="k3"), new),
        "pairwise_loss": lambda: gradients(
            ops.pairwise_loss(chosen, rejected, center=0.01)[0], chosen, rejected
        ),
        "ranking_loss": lambda: gradients(ops.ranking_loss(lists, ranks)[0], lists),
        "rating_loss ordinal": lambda: gradients(ordinal(), chosen, thresholds),
        "group_advantages": lambda: ops.group_advantages(ref[:, 0], 8),
        "masked_whiten": lambda: ops.masked_whiten(ref, mask),
        "importance_weights": lambda: ops.importance_weights(old, ref, mask),
    }


NAMES = tuple(calls("cpu"))


def measure(benchmark, name: str, device: str, threads: int = 1) -> None:
    title = f"eager ops, {TOKENS} tokens or {PAIRS} pairs, {place(device, threads)}"
    run = calls(device)[name]
    with Counter() as counter:
        run()
    label = name if name == YARDSTICK else f"{name}, {counter.count} kernels"
    report.measure(benchmark, title, label, run, device=device, work=1, rounds=50, warmup=5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_small_ops_on_cpu(benchmark, threads, name):
    measure(benchmark, name, "cpu", threads)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", NAMES)
def bench_small_ops_on_gpu(benchmark, name):
    measure(benchmark, name, GPU)
