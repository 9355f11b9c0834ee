"""value_loss, forward and backward, against OpenRLHF 0.11.2, verl 0.9.1 and our own eager PyTorch.

    make bench        # CPU; fetches the wheels into .benchmarks/rivals
    make bench-gpu    # GPU

The clipped squared error with its gradient. Ours adds four statistics, the explained variance among
them, verl one. Each contender's gradient first has to agree with the reference's. Floor: values,
old ones, returns and mask read, the gradient written, read and written scaled, 25 bytes a token, at
the bandwidth of a copy.
"""

from __future__ import annotations

import os

import _rivals
import pytest
import torch
from _harness import GPU, Report, check, on_gpu, place, require_backend
from bench_policy_loss import CPU_NAMES, GPU_NAMES, GPU_SHAPES, SHAPES, batch

from rlhf_fast.ops import value_loss

WORK = 3 * 4 + 1 + 3 * 4

report = Report(floor=("copy",), unit="MB", rivals=("OpenRLHF", "verl", "reference"))


def contender(name: str):
    """A function of values, old ones, returns and mask that returns the loss."""
    if name == "OpenRLHF":
        return _rivals.openrlhf().ValueLoss(clip_eps=0.2)
    if name == "verl":
        compute = _rivals.verl().compute_value_loss
        return lambda values, old, returns, mask: compute(values, returns, old, mask, 0.2)[0]
    require_backend("value_loss", name)
    return lambda *arguments: value_loss(*arguments, backend=name)[0]


def measure(benchmark, name: str, B: int, T: int, device: str, threads: int = 1) -> None:
    title = f"value_loss forward + backward, B={B}, T={T}, fp32, {place(device, threads)}"
    values, *rest, _ = batch(B, T, device)
    if name == "copy":
        out, work = torch.empty_like(values), 8

        def run():
            out.copy_(values)
    else:
        function, work = contender(name), WORK
        leaf = values.requires_grad_()

        def run():
            return torch.autograd.grad(function(leaf, *rest), leaf)[0]

        truth = value_loss(leaf, *rest, backend="reference")[0]
        check(name, run(), torch.autograd.grad(truth, leaf)[0], 1e-5)
    report.measure(
        benchmark,
        title,
        name,
        run,
        device=device,
        work=work * values.numel(),
        rounds=100,
        warmup=10,
    )


@pytest.mark.parametrize("name", CPU_NAMES)
@pytest.mark.parametrize(("B", "T"), SHAPES)
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_value_loss_on_cpu(benchmark, threads, B, T, name):
    measure(benchmark, name, B, T, "cpu", threads)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize(("B", "T"), GPU_SHAPES)
def bench_value_loss_on_gpu(benchmark, B, T, name):
    measure(benchmark, name, B, T, GPU)
