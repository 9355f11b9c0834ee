"""The whitening of ppo_advantages: its moments, what is exact, and several processes."""

from __future__ import annotations

import math
import statistics
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from backend_cases import calls, cases, to_device

from rlhf_fast import backends
from rlhf_fast.ops.ppo_advantages import ppo_advantages, ppo_advantages_reference

OP = "ppo_advantages"


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`ppo_advantages` through one backend."""
    yield from calls(OP, ppo_advantages, request.param, monkeypatch)


def forward(case, scores, logprobs, ref_logprobs, values, mask, cu_seqlens=None, moments=True):
    """The forward launcher of `case` with gamma 1, lambda 0.95 and a KL weight of 0.1."""
    tensors = (scores, logprobs, ref_logprobs, values, mask, *[None] * 4, cu_seqlens)
    tensors = [to_device(x, case.device) for x in tensors]
    return backends.TABLE[OP][case.backend].forward(
        *tensors, 1.0, 0.95, -1.0, 0.0, 0.1, 0.0, moments
    )


KERNELS = cases(OP, reference=False)


@pytest.mark.parametrize("case", KERNELS)
@pytest.mark.parametrize("packed", [False, True])
def test_moments_are_those_of_the_advantages_that_count(case, packed):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 7, 90, generator=generator)
    mask = torch.rand(7, 90, generator=generator) < 0.8
    mask[2] = False
    cu_seqlens = None
    if packed:
        tokens, mask = tokens.flatten(1), mask.flatten()
        cu_seqlens = torch.tensor([0, 90, 90, 91, 300, 500, 620, 630], dtype=torch.int32)
    scores = torch.randn(7, generator=generator)
    advantages, _, _, moments = forward(case, scores, *tokens, mask, cu_seqlens)
    counting = advantages.cpu()[mask].tolist()
    assert moments.dtype == torch.float64
    assert moments.tolist() == [
        len(counting),
        pytest.approx(statistics.fmean(counting), rel=1e-12),
        pytest.approx(statistics.variance(counting) * (len(counting) - 1), rel=1e-12),
    ]
    unasked = forward(case, scores, *tokens, mask, cu_seqlens, moments=False)
    assert torch.equal(unasked[0], advantages) and unasked[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", KERNELS)
def test_equal_advantages_have_no_variance_at_all(case):
    # A reward of 0.3 on a single token and a value of 7.1 leave -6.8, in fp32, everywhere.
    x = torch.zeros(37, 5)
    mask = torch.zeros(37, 5)
    mask[torch.arange(37), torch.arange(37) % 5] = 1
    advantages, _, _, moments = forward(case, torch.full((37,), 0.3), x, x, x + 7.1, mask != 0)
    (value,) = set(advantages.cpu()[mask != 0].tolist())
    assert moments.tolist() == [37, value, 0]


def test_equal_advantages_whiten_to_exactly_zero(run):
    x, mask = torch.zeros(37, 5), torch.ones(37, 5)
    mask[:, 1:] = 0
    advantages, _, _ = run(torch.full((37,), 0.3), x, x, x + 7.1, mask, kl_coef=0.1)
    assert torch.equal(advantages, x)


def test_a_single_token_whitens_to_zero(run):
    one = torch.ones(1, 1)
    advantages, returns, _ = run(torch.tensor([3.0]), one, one, one, one, kl_coef=0.1)
    assert advantages.tolist() == [[0.0]] and returns.tolist() == [[3.0]]


@pytest.mark.parametrize("shape", [(6, 1), (3, 200)])
def test_a_large_common_offset_keeps_the_bits_that_fp32_has(run, shape):
    # lambda 0 and gamma 0: each advantage is reward less value, near -1e4.
    generator = torch.Generator().manual_seed(4)
    values = 1e4 + torch.randn(shape, generator=generator)
    x, scores, mask = torch.zeros(shape), torch.zeros(shape[0]), torch.ones(shape)
    options = {"kl_coef": 0.0, "gamma": 0.0, "lam": 0.0}
    inputs = (scores, x, x, values, mask)
    truth, _, _ = ppo_advantages_reference(*(y.double() for y in inputs), **options)
    naive, _, _ = ppo_advantages_reference(*inputs, **options)
    got, _, _ = run(*inputs, **options)
    eps = torch.finfo(torch.float32).eps
    assert (got - truth).abs().max() <= (naive - truth).abs().max() + 4 * eps
    if run.case.backend != "reference":  # kernels form the mean in fp64
        assert (got - truth).abs().max() <= 16 * eps


def test_whitening_sees_no_masked_garbage(run):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(3, 4, 50, generator=generator)
    mask = torch.rand(4, 50, generator=generator) < 0.6
    scores = torch.randn(4, generator=generator)
    clean = run(scores, *tokens, mask, kl_coef=0.1)
    for garbage in (math.nan, math.inf):
        dirty = run(scores, *torch.where(mask, tokens, garbage), mask, kl_coef=0.1)
        assert all(map(torch.equal, clean, dirty))


def _whiten_a_share(rank, store, backend, inputs, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        rows = slice(0, 1) if rank == 0 else slice(1, 5)
        share = [x[rows] for x in inputs]
        results[rank] = ppo_advantages(*share, kl_coef=0.1, backend=backend)[0].tolist()
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize(
    "case", [c for c in cases(OP) if c.values[0].backend in ("reference", "cpp")]
)
def test_two_processes_whiten_an_uneven_split_as_one_process_does_the_whole(case):
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randn(3, 5, 30, dtype=torch.float64, generator=generator)
    mask = torch.rand(5, 30, generator=generator) < 0.7
    inputs = (torch.randn(5, dtype=torch.float64, generator=generator), *tokens, mask)
    expected = ppo_advantages(*inputs, kl_coef=0.1, backend=case.backend)[0]
    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_whiten_a_share, (f"{folder}/store", case.backend, inputs, results), nprocs=2)
        joined = torch.tensor(results[0] + results[1], dtype=torch.float64)
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)


def test_a_group_of_one_process_talks_to_nobody(run, monkeypatch):
    """vLLM makes one in the trainer's process."""
    inputs = torch.randn(2), *torch.randn(3, 2, 9), torch.ones(2, 9)
    expected = run(*inputs, kl_coef=0.1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for collective in ("all_reduce", "all_gather"):
            monkeypatch.setattr(dist, collective, None)
        assert all(map(torch.equal, run(*inputs, kl_coef=0.1), expected))
    finally:
        dist.destroy_process_group()
