"""token_logprobs against F.cross_entropy, TRL 1.16's functions, and the bytes it must move.

    make bench        # CPU; fetches TRL's wheel into .benchmarks/rivals
    make bench-gpu    # GPU

TRL's `selective_log_softmax` is PyTorch on a CPU and TRL's own Triton kernel on a GPU. Ours and
that kernel compute the entropy too, the others don't.

Each contender first has to agree with the reference, on every eighth row. The forward cannot avoid
to read the logits once, the backward to read them again and to write the gradient, at the bandwidth
that a copy of the logits reaches on the same threads. Each round allocates and frees its gradient
("copy into fresh memory" shows what that costs a CPU), but "in place" writes it over the logits.
They are therefore restored ahead of each round, for every contender.

A CPU's page faults can cost more than the op. `THP_MEM_ALLOC_ENABLE=1` has torch ask the kernel for
huge pages, for all contenders alike; `make bench` runs this file without and with it.
"""

from __future__ import annotations

import functools
import os

import _rivals
import pytest
import torch
import torch.nn.functional as F
from _bars import Bar
from _harness import GPU, Report, check, on_gpu, place, require_backend

from rlhf_fast.ops import token_logprobs

SHAPE = (512, 151_936)
FRESH = "copy into fresh memory"
GPU_SHAPE = (8192, 151_936)
CPU_NAMES = ["copy", FRESH, "F.cross_entropy", "TRL 1.16", "reference", "cpp", "cpp in place"]
GPU_NAMES = ["copy", "F.cross_entropy", "TRL 1.16", "triton", "cuda"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # rivals round log-probs to bf16

report = Report(
    floor=("copy",),
    unit="MB",
    rivals=("F.cross_entropy", "TRL 1.16"),
    bars=(
        Bar("float32", "cpp", "F.cross_entropy", faster=2.5),
        Bar("float32", "cpp", "TRL 1.16", faster=3.0),
        Bar("float32", "cpp in place", "F.cross_entropy", faster=5.0),
        Bar("bfloat16", "cpp", "F.cross_entropy", faster=1.5),
        *(
            bar
            for passes, share in (("forward", 0.9), ("forward and backward", 0.88))
            for backend in ("triton", "cuda")
            for bar in (
                Bar(f"{passes}, {list(GPU_SHAPE)}", backend, "TRL 1.16", faster=1.0),
                Bar(f"{passes}, {list(GPU_SHAPE)}", backend, "copy", share=share),
            )
        ),
    ),
)


def contender(name: str):
    """A function of logits and tokens that returns log-probs."""
    if name == "F.cross_entropy":
        return lambda logits, tokens: -F.cross_entropy(logits, tokens, reduction="none")
    if name == "TRL 1.16":
        return _rivals.trl().selective_log_softmax
    backend, inplace = name.removesuffix(" in place"), name.endswith(" in place")
    require_backend("token_logprobs", backend)

    def run(logits, tokens):
        return token_logprobs(logits, tokens, inplace_backward=inplace, backend=backend)[0]

    return run


@functools.lru_cache(maxsize=1)
def batch(shape: tuple[int, int], dtype: torch.dtype, device: str):
    """Logits, room for a copy that a contender may overwrite, tokens, and upstream gradients."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape, device=device).normal_(0, 3, generator=generator).to(dtype)
    tokens = torch.randint(shape[1], shape[:1], device=device, generator=generator)
    upstream = torch.randn(shape[0], device=device, generator=generator)
    return logits, torch.empty_like(logits), tokens, upstream


def forward_backward(function, logits, tokens, upstream):
    leaf = logits.detach().requires_grad_()
    logprobs = function(leaf, tokens)
    (grad,) = torch.autograd.grad(logprobs, leaf, upstream.to(logprobs.dtype))
    return logprobs.detach(), grad


def agree(name: str, function, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    logits, room, tokens, upstream = batch(shape, dtype, device)
    room.copy_(logits)
    got = forward_backward(function, room, tokens, upstream)
    logprobs, grad = (t[::8] for t in got)
    sample = (t[::8] for t in (logits, tokens, upstream))
    true_logprobs, true_grad = forward_backward(contender("reference"), *sample)
    check(f"{name}: logprobs", logprobs, true_logprobs, TOLERANCE[dtype])
    check(f"{name}: gradient", grad, true_grad, TOLERANCE[dtype])
    # The target's element outweighs the rest of its row, so the rest is compared alone.
    index = tokens[::8].unsqueeze(-1)
    rest, true_rest = grad.scatter(-1, index, 0), true_grad.scatter(-1, index, 0)
    check(f"{name}: gradient but for the targets", rest, true_rest, TOLERANCE[dtype])


def measure(benchmark, name, shape, dtype, device, threads=1, backward=True) -> None:
    passes = "forward and backward" if backward else "forward"
    kind = str(dtype).removeprefix("torch.")
    title = f"token_logprobs, {passes}, {list(shape)} {kind}, {place(device, threads)}"
    logits, room, tokens, upstream = batch(shape, dtype, device)
    work, returned = (3 if backward else 1) * logits.nbytes, 0
    if name == "copy":
        out, work = torch.empty_like(logits), 2 * logits.nbytes

        def run():
            out.copy_(room)
    elif name == FRESH:
        work = 2 * logits.nbytes

        def run():
            room.clone()
    else:
        function = contender(name)
        agree(name, function, shape, dtype, device)
        if backward and not name.endswith(" in place"):
            returned = logits.nbytes

        def run():
            if backward:
                forward_backward(function, room, tokens, upstream)
            else:
                with torch.no_grad():
                    function(room, tokens)

    def restore():
        room.copy_(logits)

    report.measure(
        benchmark,
        title,
        name,
        run,
        device=device,
        work=work,
        rounds=30 if device == GPU else 3 if name == "reference" else 7,
        setup=restore,
        returned=returned,
    )


@pytest.mark.parametrize("name", CPU_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_token_logprobs_on_cpu(benchmark, threads, dtype, name):
    measure(benchmark, name, SHAPE, dtype, "cpu", threads)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", GPU_NAMES)
def bench_token_logprobs_forward_on_gpu(benchmark, name):
    measure(benchmark, name, GPU_SHAPE, torch.bfloat16, GPU, backward=False)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", [*GPU_NAMES, "triton in place", "cuda in place"])
def bench_token_logprobs_on_gpu(benchmark, name):
    measure(benchmark, name, GPU_SHAPE, torch.bfloat16, GPU)
