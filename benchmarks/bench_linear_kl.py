"""linear_kl against logits in full, and its matrix products.

    make bench        # CPU
    make bench-gpu    # GPU

"naive" is `F.linear` and `log_softmax` in fp32 on both sides and `(p * (log_p - log_q)).sum(-1)`.
The policy's hidden states and head get gradients, the reference's don't. "keep" has room for all
logits, "recompute" for none (`memory_budget=0`).

Each contender first has to agree with the reference. The floor counts products of N x D by D x V,
at the rate that the faster of two single ones reaches: two forward, two backward and, where logits
are not kept, two to compute them again.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F
from _harness import GPU, PRODUCTS, Report, check, on_gpu, place, product, require_backend

from rlhf_fast.ops import linear_kl

SIZES = (1024, 512, 50_257)  # N, D, V
GPU_SIZES = (8192, 3584, 151_936)
TAKES = {"naive": 4, "keep": 4, "recompute": 6}  # products
ROUTES = ("keep", "recompute")
CPU_NAMES = [*PRODUCTS, "naive", *(f"{route} cpp" for route in ROUTES)]
GPU_NAMES = [*PRODUCTS, "naive"]
GPU_NAMES += [f"{route} {backend}" for route in ROUTES for backend in ("triton", "cuda")]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # "naive" rounds both logits to bf16

report = Report(floor=PRODUCTS, unit="GFLOP", rivals=("naive",))


def naive(hidden, weight, ref_hidden, ref_weight):
    log_p = F.log_softmax(F.linear(hidden, weight), dim=-1, dtype=torch.float32)
    log_q = F.log_softmax(F.linear(ref_hidden, ref_weight), dim=-1, dtype=torch.float32)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def contender(route: str, backend: str):
    if route == "naive":
        return naive
    require_backend("linear_kl", backend)
    budget = {"keep": 1 << 50, "recompute": 0}[route]
    return functools.partial(linear_kl, memory_budget=budget, backend=backend)


@functools.lru_cache(maxsize=1)
def batch(sizes: tuple[int, int, int], dtype: torch.dtype, device: str):
    """Policy and reference, a little apart, and upstream gradients; logits have a spread of 3."""
    N, D, V = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, scale: float):
        return torch.empty(rows, D, device=device).normal_(0, scale, generator=generator)

    ref_hidden, ref_weight = normal(N, 1.0), normal(V, 3 / D**0.5)
    hidden, weight = ref_hidden + normal(N, 0.1), ref_weight + normal(V, 0.3 / D**0.5)
    upstream = torch.randn(N, device=device, generator=generator)
    return [t.to(dtype) for t in (hidden, weight, ref_hidden, ref_weight)], upstream


def forward_backward(function, heads, upstream):
    hidden, weight = (t.detach().requires_grad_() for t in heads[:2])
    kl = function(hidden, weight, *heads[2:])
    return kl.detach(), *torch.autograd.grad(kl, (hidden, weight), upstream)


@functools.lru_cache(maxsize=1)
def expected(sizes: tuple[int, int, int], dtype: torch.dtype, device: str):
    return forward_backward(contender("recompute", "reference"), *batch(sizes, dtype, device))


def measure(benchmark, name, sizes, dtype, device, threads=1) -> None:
    N, D, V = sizes
    kind = str(dtype).removeprefix("torch.")
    title = f"linear_kl, forward and backward, N={N}, D={D}, V={V}, {kind}"
    title += f", {place(device, threads)}"
    heads, upstream = batch(sizes, dtype, device)
    route, _, backend = name.partition(" ")
    products, returned = 1, 0
    if name in PRODUCTS:
        run = product(name, *heads[:2])
    else:
        function = contender(route, backend)
        got = forward_backward(function, heads, upstream)
        truth = expected(sizes, dtype, device)
        for what, value, true in zip(("kl", "d hidden", "d weight"), got, truth, strict=True):
            check(f"{name}: {what}", value, true, TOLERANCE[dtype])
        products, returned = TAKES[route], heads[0].nbytes + heads[1].nbytes
        del got

        def run():
            forward_backward(function, heads, upstream)

    rounds, warmup = (5, 2) if device == GPU else (3, 0)
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
def bench_linear_kl_on_cpu(benchmark, name):
    measure(benchmark, name, SIZES, torch.float32, "cpu", os.cpu_count() or 1)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", GPU_NAMES)
def bench_linear_kl_on_gpu(benchmark, name):
    measure(benchmark, name, GPU_SIZES, torch.bfloat16, GPU)
