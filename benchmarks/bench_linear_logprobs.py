"""linear_logprobs against logits in full, TRL 1.16's chunked function, and its matrix products.

    make bench        # CPU
    make bench-gpu    # GPU; TRL's wheel has to be in .benchmarks/rivals

"naive" is `F.linear`, `log_softmax` in fp32 and `gather`; TRL's is `ChunkedLogProbFunction` with
the tile width that TRL gives it and no output but the log-probs (ours compute the entropy too).
"frozen" heads get no gradient. Of ours, "keep" has a `memory_budget` for all logits, "direct" for
the gradient of the hidden states, the others have none. In "half dead" every second token has a
zero upstream gradient.

Each contender first has to agree with the reference. The floor counts products of N x D by D x V,
at the rate that the faster of two single ones reaches: one forward, and backward one for the hidden
states, one for a trainable head and one to compute again what was not kept; of the last three only
the live rows' share. "direct" takes two in the forward and none in the backward.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import _rivals
import pytest
import torch
import torch.nn.functional as F
from _bars import Bar
from _harness import GPU, PRODUCTS, Report, check, on_gpu, place, product, require_backend

from rlhf_fast.ops import linear_logprobs

SIZES = (2048, 512, 50_257)  # N, D, V
GPU_SIZES = (8192, 3584, 151_936)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


class Case(NamedTuple):
    """A contender: whose route, the products it takes, its head and its upstream gradients."""

    route: str
    products: float
    frozen: bool = False
    half_dead: bool = False


RIVALS = {
    "naive": Case("naive", 3),
    "naive frozen": Case("naive", 2, frozen=True),
    "TRL 1.16": Case("TRL", 4),
    "TRL 1.16 frozen": Case("TRL", 3, frozen=True),
}
OURS = {
    "keep": Case("keep", 3),
    "recompute": Case("recompute", 4),
    "half dead": Case("recompute", 2.5, half_dead=True),
    "frozen keep": Case("keep", 2, frozen=True),
    "frozen direct": Case("direct", 2, frozen=True),
    "frozen recompute": Case("recompute", 3, frozen=True),
}
CPU_NAMES = [*PRODUCTS, "naive", "naive frozen", *(f"{name} cpp" for name in OURS)]
FP32_OUT = "product: logits in fp32"
GPU_NAMES = [*PRODUCTS, FP32_OUT, *RIVALS]
GPU_NAMES += [f"{name} {backend}" for name in OURS for backend in ("triton", "cuda")]

report = Report(
    floor=PRODUCTS,
    unit="GFLOP",
    rivals=tuple(RIVALS),
    bars=(
        Bar("float32", "recompute cpp", "naive", faster=1 / 1.2, scratch=0.1),
        Bar("float32", "keep cpp", "naive", faster=1.0),
        Bar("float32", "frozen direct cpp", "naive frozen", faster=1 / 0.9, scratch=0.1),
        Bar("float32", "half dead cpp", "recompute cpp", faster=1 / 0.85),
        Bar("bfloat16", FP32_OUT, PRODUCTS[0], faster=0.9),
        *(
            Bar("bfloat16", f"{name} {backend}", rival, faster=faster, scratch=scratch)
            for backend in ("triton", "cuda")
            for name, rival, faster, scratch in (
                ("keep", "TRL 1.16", 1.35, None),
                ("frozen keep", "TRL 1.16 frozen", 1.4, None),
                ("frozen direct", "TRL 1.16 frozen", 1.4, None),
                ("recompute", "TRL 1.16", 1.05, 1.0),
            )
        ),
    ),
)


def naive(hidden, weight, tokens):
    logprobs = F.log_softmax(F.linear(hidden, weight), dim=-1, dtype=torch.float32)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def contender(route: str, backend: str):
    """A function of hidden states, the head and tokens that returns log-probs."""
    if route == "naive":
        return naive
    if route == "TRL":
        trl = _rivals.trl()
        chunked = trl.kernels.ChunkedLogProbFunction
        width = trl._CHUNKED_LOGPROB_CHUNK_SIZE
        return lambda hidden, weight, tokens: chunked.apply(
            hidden, weight, None, tokens, 1.0, width, None, 1.0, ()
        )[0]

    require_backend("linear_logprobs", backend)

    def run(hidden, weight, tokens):
        budget = {"keep": 1 << 50, "direct": 4 * hidden.numel(), "recompute": 0}[route]
        return linear_logprobs(hidden, weight, tokens, memory_budget=budget, backend=backend)[0]

    return run


@functools.lru_cache(maxsize=1)
def batch(sizes: tuple[int, int, int], dtype: torch.dtype, device: str):
    """Hidden states, a head that gives logits a spread of 3, tokens, upstream gradients."""
    N, D, V = sizes
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, device=device, generator=generator)
    weight = torch.empty(V, D, device=device).normal_(0, 3 / D**0.5, generator=generator)
    tokens = torch.randint(V, (N,), device=device, generator=generator)
    upstream = torch.randn(N, device=device, generator=generator)
    return hidden.to(dtype), weight.to(dtype), tokens, upstream


def forward_backward(function, case: Case, hidden, weight, tokens, upstream):
    """Log-probs, the gradient of `hidden` and, unless it is frozen, of `weight`."""
    if case.half_dead:
        upstream = upstream * (torch.arange(len(upstream), device=upstream.device) % 2)
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(not case.frozen)
    logprobs = function(hidden, weight, tokens)
    leaves = [hidden] if case.frozen else [hidden, weight]
    return logprobs.detach(), *torch.autograd.grad(logprobs, leaves, upstream)


@functools.lru_cache(maxsize=2)
def expected(half_dead: bool, sizes: tuple[int, int, int], dtype: torch.dtype, device: str):
    case = Case("recompute", 4, half_dead=half_dead)
    return forward_backward(contender(case.route, "reference"), case, *batch(sizes, dtype, device))


def measure(benchmark, name, sizes, dtype, device, threads=1) -> None:
    N, D, V = sizes
    kind = str(dtype).removeprefix("torch.")
    title = f"linear_logprobs, forward and backward, N={N}, D={D}, V={V}, {kind}"
    title += f", {place(device, threads)}"
    inputs = batch(sizes, dtype, device)
    hidden, weight, *_ = inputs
    products, returned = 1.0, 0
    if name in PRODUCTS:
        run = product(name, hidden, weight)
    elif name == FP32_OUT:

        def run():
            torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        ours, _, backend = name.rpartition(" ")
        case = RIVALS[name] if name in RIVALS else OURS[ours]
        products, returned = case.products, hidden.nbytes + (0 if case.frozen else weight.nbytes)
        function = contender(case.route, backend)
        truth = expected(case.half_dead, sizes, dtype, device)
        got = forward_backward(function, case, *inputs)
        for what, value, true in zip(
            ("logprobs", "d hidden", "d weight"), got, truth, strict=False
        ):
            check(f"{name}: {what}", value, true, TOLERANCE[dtype])
        del got

        def run():
            forward_backward(function, case, *inputs)

    rounds, warmup = (10, 2) if device == GPU else (3, 0)
    report.measure(
        benchmark,
        title,
        name,
        run,
        device=device,
        work=products * 2 * N * D * V,
        rounds=rounds,
        warmup=warmup,
        returned=returned,
    )


@pytest.mark.parametrize("name", CPU_NAMES)
def bench_linear_logprobs_on_cpu(benchmark, name):
    measure(benchmark, name, SIZES, torch.float32, "cpu", os.cpu_count() or 1)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", GPU_NAMES)
def bench_linear_logprobs_on_gpu(benchmark, name):
    measure(benchmark, name, GPU_SIZES, torch.bfloat16, GPU)
