"""gae against OpenRLHF 0.11.2's own loop, our reference, and the bytes it cannot avoid to move.

    make bench        # CPU; fetches OpenRLHF's wheel into .benchmarks/rivals
    make bench-gpu    # GPU

Each contender first has to agree with the reference. The floor is 16 bytes a token (rewards and
values read, advantages and returns written) at the bandwidth that a copy of the same tensors
reaches on the same threads.
"""

from __future__ import annotations

import os

import _rivals
import pytest
import torch
from _bars import Bar
from _harness import GPU, Report, check, on_gpu, place, require_backend

from rlhf_fast.ops import gae

SHAPES = ((256, 1024), (16, 8192))
GPU_SHAPES = (*SHAPES, (512, 4096), (8192, 2048), (1, 8192), (1, 131_072), (1, 1_000_000))
GAMMA, LAM = 1.0, 0.95


def gpu_bars(name: str) -> tuple[Bar, ...]:
    """Device time, share of a copy's bandwidth, and times the loop over tokens: theirs and ours."""
    return (
        Bar("B=512, T=4096, fp32, NVIDIA", name, "copy", within=25e-6),
        Bar("B=8192, T=2048, fp32, NVIDIA", name, "copy", share=0.6),
        Bar("B=1, T=8192, fp32, NVIDIA", name, "OpenRLHF", faster=1000.0),
        Bar("B=1, T=8192, fp32, NVIDIA", name, "gae reference", faster=1000.0),
    )


report = Report(
    floor=("copy",),
    unit="MB",
    rivals=("OpenRLHF", "gae reference"),
    bars=(
        Bar("B=256, T=1024, fp32, 1 thread", "gae cpp", "OpenRLHF", faster=50.0),
        Bar("B=256, T=1024, fp32, 2 thread", "gae cpp", "OpenRLHF", faster=50.0),
        Bar("B=16, T=8192, fp32, 1 thread", "gae cpp", "OpenRLHF", faster=100.0),
        Bar("B=16, T=8192, fp32, 2 thread", "gae cpp", "OpenRLHF", faster=100.0),
        *gpu_bars("gae cuda"),
        *gpu_bars("gae triton"),
    ),
)


def contender(name: str):
    if name == "OpenRLHF":
        loop = _rivals.openrlhf_gae()
        return lambda rewards, values, mask: loop(values, rewards, mask, GAMMA, LAM)
    backend = name.removeprefix("gae ")
    require_backend("gae", backend)

    def run(rewards, values, mask):
        return gae(rewards, values, mask, gamma=GAMMA, lam=LAM, backend=backend)

    return run


def batch(B: int, T: int, device: str):
    """Rewards, values and a mask of completions that end at different lengths."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(B, T, generator=generator) for _ in range(2))
    lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    return [x.to(device) for x in (rewards, values, torch.arange(T) < lengths)]


def measure(benchmark, name: str, B: int, T: int, device: str, threads: int = 1) -> None:
    title = f"gae, B={B}, T={T}, fp32, {place(device, threads)}"
    rewards, values, mask = batch(B, T, device)
    if name == "copy":
        out = [torch.empty_like(rewards), torch.empty_like(values)]

        def run():
            out[0].copy_(rewards)
            out[1].copy_(values)
    else:
        function = contender(name)
        expected = gae(rewards, values, mask, gamma=GAMMA, lam=LAM, backend="reference")
        for got, truth in zip(function(rewards, values, mask), expected, strict=True):
            check(name, got * mask, truth, 1e-4)

        def run():
            with torch.no_grad():
                function(rewards, values, mask)

    slow = name in ("OpenRLHF", "gae reference")
    rounds, warmup = (10, 2) if slow else (300, 20)
    work = 16 * rewards.numel()
    report.measure(
        benchmark, title, name, run, device=device, work=work, rounds=rounds, warmup=warmup
    )


@pytest.mark.parametrize("name", ["OpenRLHF", "gae reference", "gae cpp", "copy"])
@pytest.mark.parametrize(("B", "T"), SHAPES)
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_gae_on_cpu(benchmark, threads, B, T, name):
    measure(benchmark, name, B, T, "cpu", threads)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["OpenRLHF", "gae reference", "gae triton", "gae cuda", "copy"])
@pytest.mark.parametrize(("B", "T"), GPU_SHAPES)
def bench_gae_on_gpu(benchmark, B, T, name):
    if T > 8192 and name in ("OpenRLHF", "gae reference"):
        pytest.skip("minutes for one call")
    measure(benchmark, name, B, T, GPU)
