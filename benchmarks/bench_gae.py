"""gae against OpenRLHF 0.11.2's own loop, our reference, and the bytes it cannot avoid to move.

    make bench        # CPU; fetches OpenRLHF's wheel into .benchmarks/rivals
    make bench-gpu    # GPU

Each contender first has to agree with the reference. The floor is 16 bytes a token (rewards and
values read, advantages and returns written) over the bandwidth that a copy of the same tensors
reaches on the same threads.
"""

from __future__ import annotations

import ast
import os
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from rlhf_fast import backends
from rlhf_fast.ops import gae

RIVALS = Path(os.environ.get("RLHF_FAST_RIVALS", ".benchmarks/rivals"))
SHAPES = ((256, 1024), (16, 8192))
GPU_SHAPES = (*SHAPES, (4096, 1024), (1, 131_072))
GAMMA, LAM = 1.0, 0.95

# (device, B, T, threads) -> contender -> (median, best) in seconds
measured: dict[tuple[str, int, int, int], dict[str, tuple[float, float]]] = defaultdict(dict)


def openrlhf_loop():
    """`RemoteExperienceMaker.get_advantages_and_returns` out of OpenRLHF's wheel, unmodified.

    Only that function's text is executed, so that nothing else of OpenRLHF has to import.
    """
    wheels = sorted(RIVALS.glob("openrlhf-0.11.2-*.whl"))
    if not wheels:
        pytest.skip(f"no OpenRLHF 0.11.2 wheel in {RIVALS}; `make bench` fetches it")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("/ppo_utils/experience_maker.py"))
        source = wheel.read(name).decode()
    (function,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "get_advantages_and_returns"
    )
    namespace = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module([function], []), name, "exec"), namespace)
    loop = namespace["get_advantages_and_returns"]

    def run(rewards, values, mask):
        return loop(None, values, rewards, mask, GAMMA, LAM)

    return run


def contender(name: str):
    if name == "OpenRLHF":
        return openrlhf_loop()
    backend = name.removeprefix("gae ")
    if backend != "reference" and backends.TABLE["gae"][backend].missing:
        pytest.skip(backends.TABLE["gae"][backend].missing)

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
    torch.set_num_threads(threads)
    rewards, values, mask = batch(B, T, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if name == "copy":
        out = [torch.empty_like(rewards), torch.empty_like(values)]

        def run():
            out[0].copy_(rewards)
            out[1].copy_(values)
            wait()
    else:
        function = contender(name)
        expected = gae(rewards, values, mask, gamma=GAMMA, lam=LAM, backend="reference")
        for got, truth in zip(function(rewards, values, mask), expected, strict=True):
            torch.testing.assert_close(got * mask, truth, rtol=1e-4, atol=1e-4)

        def run():
            with torch.no_grad():
                function(rewards, values, mask)
            wait()

    slow = name in ("OpenRLHF", "gae reference")
    benchmark.pedantic(run, rounds=10 if slow else 300, warmup_rounds=2 if slow else 20)
    stats = benchmark.stats.stats
    measured[device, B, T, threads][name] = stats.median, stats.min


@pytest.mark.parametrize("name", ["OpenRLHF", "gae reference", "gae cpp", "copy"])
@pytest.mark.parametrize(("B", "T"), SHAPES)
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_gae_on_cpu(benchmark, threads, B, T, name):
    measure(benchmark, name, B, T, "cpu", threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["OpenRLHF", "gae reference", "gae triton", "gae cuda", "copy"])
@pytest.mark.parametrize(("B", "T"), GPU_SHAPES)
def bench_gae_on_gpu(benchmark, B, T, name):
    if T > 8192 and name in ("OpenRLHF", "gae reference"):
        pytest.skip("minutes for one call")
    measure(benchmark, name, B, T, "cuda")


@pytest.fixture(scope="module", autouse=True)
def _table():
    """At the end, a Markdown table of what was measured."""
    yield
    for (device, B, T, threads), times in measured.items():
        where = f"{threads} thread(s)" if device == "cpu" else torch.cuda.get_device_name()
        print(f"\n\ngae, B={B}, T={T}, fp32, {where}, torch {torch.__version__}\n")
        print("| | median, ms | best, ms | OpenRLHF / this, median (best) | x floor, best |")
        print("| --- | --- | --- | --- | --- |")
        for name, (median, best) in times.items():
            ratio = floor = "-"
            if "OpenRLHF" in times:
                ratio = f"{times['OpenRLHF'][0] / median:.0f} ({times['OpenRLHF'][1] / best:.0f})"
            if "copy" in times:
                floor = f"{best / times['copy'][1]:.1f}"
            label = "copy of 16 B/token (floor)" if name == "copy" else name
            print(f"| {label} | {median * 1e3:.3f} | {best * 1e3:.3f} | {ratio} | {floor} |")
