"""full_kl against the formula in plain PyTorch, and the bytes it must move.

    make bench        # CPU
    make bench-gpu    # GPU

"plain" is `(log_p.exp() * (log_p - log_q)).sum(-1)` of two `log_softmax` in fp32. The gradient is
that of the policy's logits.

Each contender first has to agree with the reference, on every eighth row. The forward cannot avoid
to read both logits once, the backward to read them again and to write the gradient, at the
bandwidth that a copy of one of them reaches on the same threads.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F
from _bars import Bar
from _harness import GPU, Report, check, on_gpu, place, require_backend

from rlhf_fast.ops import full_kl

SHAPE = (512, 151_936)
GPU_SHAPE = (8192, 151_936)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}

report = Report(
    floor=("copy",), unit="MB", rivals=("plain",), bars=(Bar("", "cpp", "plain", faster=3.0),)
)


def plain(logits, ref_logits):
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_q = F.log_softmax(ref_logits, dim=-1, dtype=torch.float32)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def contender(name: str):
    if name == "plain":
        return plain
    require_backend("full_kl", name)
    return functools.partial(full_kl, backend=name)


@functools.lru_cache(maxsize=1)
def batch(shape: tuple[int, int], dtype: torch.dtype, device: str):
    """Logits of a policy that has moved a little off its reference, and upstream gradients."""
    generator = torch.Generator(device).manual_seed(0)
    ref_logits = torch.empty(shape, device=device).normal_(0, 3, generator=generator)
    moved = torch.empty(shape, device=device).normal_(0, 0.3, generator=generator)
    logits = moved.add_(ref_logits).to(dtype)
    upstream = torch.randn(shape[0], device=device, generator=generator)
    return logits, ref_logits.to(dtype), upstream


def forward_backward(function, logits, ref_logits, upstream):
    leaf = logits.detach().requires_grad_()
    kl = function(leaf, ref_logits)
    (grad,) = torch.autograd.grad(kl, leaf, upstream)
    return kl.detach(), grad


def measure(benchmark, name, shape, dtype, device, threads=1, backward=True) -> None:
    passes = "forward and backward" if backward else "forward"
    kind = str(dtype).removeprefix("torch.")
    title = f"full_kl, {passes}, {list(shape)} {kind}, {place(device, threads)}"
    logits, ref_logits, upstream = batch(shape, dtype, device)
    work, returned = (5 if backward else 2) * logits.nbytes, 0
    if name == "copy":
        out, work = torch.empty_like(logits), 2 * logits.nbytes

        def run():
            out.copy_(logits)
    else:
        function = contender(name)
        kl, grad = forward_backward(function, logits, ref_logits, upstream)
        sample = (t[::8] for t in (logits, ref_logits, upstream))
        true_kl, true_grad = forward_backward(contender("reference"), *sample)
        check(f"{name}: kl", kl[::8], true_kl, TOLERANCE[dtype])
        check(f"{name}: gradient", grad[::8], true_grad, TOLERANCE[dtype])
        returned = logits.nbytes if backward else 0
        del kl, grad

        def run():
            if backward:
                forward_backward(function, logits, ref_logits, upstream)
            else:
                with torch.no_grad():
                    function(logits, ref_logits)

    report.measure(
        benchmark,
        title,
        name,
        run,
        device=device,
        work=work,
        rounds=30 if device == GPU else 7,
        returned=returned,
    )


@pytest.mark.parametrize("name", ["copy", "plain", "cpp"])
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_full_kl_on_cpu(benchmark, threads, name):
    measure(benchmark, name, SHAPE, torch.float32, "cpu", threads)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["copy", "plain", "triton", "cuda"])
@pytest.mark.parametrize("backward", [False, True])
def bench_full_kl_on_gpu(benchmark, backward, name):
    measure(benchmark, name, GPU_SHAPE, torch.bfloat16, GPU, backward=backward)
