"""ppo_advantages against the pipelines of OpenRLHF 0.11.2 and verl 0.9.1, and our own eager one.

    make bench        # CPU; fetches the wheels into .benchmarks/rivals
    make bench-gpu    # GPU

From log-probs and scores to whitened advantages and returns: the KL reward, the score on the last
token, GAE, whitening. The rivals' own functions are called in their trainers' order; OpenRLHF's
whitening stands in the middle of a method, and is written out here. Each contender first has to
agree with the reference. Floor: log-probs, reference, values and mask read, rewards, advantages and
returns written, the advantages read and written whitened, 33 bytes a token, at a copy's bandwidth.
"""

from __future__ import annotations

import os

import _rivals
import pytest
import torch
from _bars import Bar
from _harness import GPU, Report, check, on_gpu, place, require_backend

from rlhf_fast.ops import ppo_advantages

SHAPES = ((64, 1024),)
GPU_SHAPES = (*SHAPES, (512, 4096))
KL_COEF, GAMMA, LAM = 0.05, 1.0, 0.95
WORK = 3 * 4 + 1 + 3 * 4 + 2 * 4

report = Report(
    floor=("copy",),
    unit="MB",
    rivals=("OpenRLHF", "verl", "reference"),
    bars=(
        Bar("thread(s)", "cpp", "OpenRLHF", faster=20.0),
        Bar("thread(s)", "cpp", "verl", faster=20.0),
    ),
)


def openrlhf():
    """KL and reward of `make_experience`, advantages and their normalisation after it."""
    code = _rivals.openrlhf()

    def run(scores, logprobs, ref, values, mask):
        kl = code.compute_approx_kl(logprobs, ref, kl_estimator="k1")
        rewards = code.compute_reward(scores, KL_COEF, kl, action_mask=mask)
        advantages, returns = code.get_advantages_and_returns(
            None, values, rewards, mask, GAMMA, LAM
        )
        flat, counts = advantages.flatten().float(), mask.flatten()
        mean = (flat * counts).sum() / counts.sum()
        variance = ((flat - mean).pow(2) * counts).sum() / counts.sum()
        return (advantages - mean) * variance.clamp(min=1e-8).rsqrt(), returns

    return run


def verl():
    """`apply_kl_penalty` and `compute_advantage`, less their batch containers."""
    code = _rivals.verl()

    def run(scores, logprobs, ref, values, mask):
        mask = mask.float()
        rewards = torch.zeros_like(logprobs)
        rows = torch.arange(len(scores), device=scores.device)
        rewards[rows, mask.sum(1).long() - 1] = scores
        kl = code.kl_penalty(logprobs, ref, kl_penalty="kl") * mask
        return code.compute_gae_advantage_return(rewards - KL_COEF * kl, values, mask, GAMMA, LAM)

    return run


def contender(name: str):
    if name in ("OpenRLHF", "verl"):
        return {"OpenRLHF": openrlhf, "verl": verl}[name]()
    require_backend("ppo_advantages", name)

    def run(*arguments):
        options = {"kl_coef": KL_COEF, "gamma": GAMMA, "lam": LAM}
        return ppo_advantages(*arguments, **options, backend=name)[:2]

    return run


def measure(benchmark, name: str, B: int, T: int, device: str, threads: int = 1) -> None:
    title = f"ppo_advantages, B={B}, T={T}, fp32, {place(device, threads)}"
    generator = torch.Generator().manual_seed(0)
    logprobs, ref, values = (torch.randn(B, T, generator=generator) for _ in range(3))
    lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator)
    batch = (torch.randn(B, generator=generator), logprobs, ref, values, torch.arange(T) < lengths)
    batch = [x.to(device) for x in batch]
    work = WORK
    if name == "copy":
        out, work = torch.empty_like(batch[1]), 8

        def run():
            out.copy_(batch[1])
    else:
        function = contender(name)
        expected = contender("reference")(*batch)
        for got, truth in zip(function(*batch), expected, strict=True):
            check(name, got * batch[-1], truth, 1e-3)  # OpenRLHF's variance is the biased one

        def run():
            with torch.no_grad():
                return function(*batch)

    slow = name in ("OpenRLHF", "verl", "reference")
    report.measure(
        benchmark, title, name, run, device=device, work=work * B * T,
        rounds=10 if slow else 200, warmup=2 if slow else 20,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["copy", "OpenRLHF", "verl", "reference", "cpp"])
@pytest.mark.parametrize(("B", "T"), SHAPES)
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_ppo_advantages_on_cpu(benchmark, threads, B, T, name):
    measure(benchmark, name, B, T, "cpu", threads)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["copy", "OpenRLHF", "verl", "reference", "triton", "cuda"])
@pytest.mark.parametrize(("B", "T"), GPU_SHAPES)
def bench_ppo_advantages_on_gpu(benchmark, B, T, name):
    measure(benchmark, name, B, T, GPU)
