"""policy_loss, forward and backward, against OpenRLHF 0.11.2, verl 0.9.1 and our own eager PyTorch.

    make bench        # CPU; fetches the wheels into .benchmarks/rivals
    make bench-gpu    # GPU

PPO's clipped loss with its gradient. Ours adds the entropy and seven statistics, the rivals what
they have: OpenRLHF three, verl three (with a host sync for each). Each contender's gradient first
has to agree with the reference's. Floor: log-probs, old ones, advantages, entropy and mask read,
the gradient written, read and written scaled, 29 bytes a token, at the bandwidth of a copy.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import _rivals
import pytest
import torch
from _bars import Bar
from _harness import GPU, Report, check, on_gpu, place, require_backend

from rlhf_fast.ops import policy_loss

SHAPES = ((64, 1024),)
GPU_SHAPES = (*SHAPES, (512, 4096))
CPU_NAMES = ["copy", "OpenRLHF", "verl", "reference", "cpp"]
GPU_NAMES = ["copy", "OpenRLHF", "verl", "reference", "triton", "cuda"]
WORK = 4 * 4 + 1 + 3 * 4

report = Report(
    floor=("copy",),
    unit="MB",
    rivals=("OpenRLHF", "verl", "reference"),
    bars=(
        Bar("thread(s)", "cpp", "reference", faster=5.0),
        Bar("B=64, T=1024, fp32, NVIDIA", "cuda", "reference", faster=20.0),
        Bar("B=64, T=1024, fp32, NVIDIA", "triton", "reference", faster=20.0),
    ),
)


def contender(name: str):
    """A function of a batch that returns the loss."""
    if name == "OpenRLHF":
        rival = _rivals.openrlhf().PolicyLoss()
        return lambda new, old, adv, mask, entropy: rival(new, old, adv, mask)[0]
    if name == "verl":
        compute = _rivals.verl().compute_policy_loss_vanilla
        numbers = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None}
        # Its dual clip is always on; this bound is out of reach.
        config = SimpleNamespace(**numbers, global_batch_info={}, get=lambda name, default: 1e9)
        return lambda new, old, adv, mask, entropy: compute(old, new, adv, mask, config=config)[0]
    require_backend("policy_loss", name)
    return lambda new, old, adv, mask, entropy: policy_loss(
        new, old, adv, mask, entropy=entropy, backend=name
    )[0]


def batch(B: int, T: int, device: str):
    """Log-probs, old ones, advantages, a mask of ragged completions, entropy."""
    generator = torch.Generator().manual_seed(0)
    new, adv, entropy = (torch.randn(B, T, generator=generator) for _ in range(3))
    old = new + 0.2 * torch.randn(B, T, generator=generator)
    lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    return [x.to(device) for x in (new, old, adv, torch.arange(T) < lengths, entropy.abs())]


def measure(benchmark, name: str, B: int, T: int, device: str, threads: int = 1) -> None:
    title = f"policy_loss forward + backward, B={B}, T={T}, fp32, {place(device, threads)}"
    new, *rest = batch(B, T, device)
    if name == "copy":
        out, work = torch.empty_like(new), 8

        def run():
            out.copy_(new)
    else:
        function, work = contender(name), WORK
        leaf = new.requires_grad_()

        def run():
            return torch.autograd.grad(function(leaf, *rest), leaf)[0]

        truth = policy_loss(leaf, *rest[:3], backend="reference")[0]
        check(name, run(), torch.autograd.grad(truth, leaf)[0], 1e-5)
    report.measure(
        benchmark, title, name, run, device=device, work=work * new.numel(), rounds=100, warmup=10
    )


@pytest.mark.parametrize("name", CPU_NAMES)
@pytest.mark.parametrize(("B", "T"), SHAPES)
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_policy_loss_on_cpu(benchmark, threads, B, T, name):
    measure(benchmark, name, B, T, "cpu", threads)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", GPU_NAMES)
@pytest.mark.parametrize(("B", "T"), GPU_SHAPES)
def bench_policy_loss_on_gpu(benchmark, B, T, name):
    measure(benchmark, name, B, T, GPU)
