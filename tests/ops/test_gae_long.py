"""gae of long sequences, which backends cut into pieces that run side by side."""

from __future__ import annotations

import pytest
import torch
from backend_cases import calls, cases

from rlhf_fast.ops.gae import gae

GAMMA, LAM = 0.999, 0.98


@pytest.fixture(params=cases("gae", reference=False, interpreter=False))
def run(request, monkeypatch):
    """`gae` through one backend, without what takes minutes on long inputs."""
    yield from calls("gae", gae, request.param, monkeypatch)


def sample(*shape, seed=0):
    """Rewards, values and upstream gradients, and a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, *shape, generator=generator), torch.rand(shape, generator=generator) < 0.9


def token_by_token(tokens, mask, bootstrap):
    """Advantages, returns and gradients [4, T] of one sequence, and d bootstrap: in fp64."""
    rewards, values, up_a, up_r = tokens.double().tolist()
    kept = mask.nonzero().flatten().tolist()
    advantages, returns, grad_rewards, grad_values = ([0.0] * len(rewards) for _ in range(4))
    advantage, next_value = 0.0, bootstrap
    for t in reversed(kept):
        advantage = rewards[t] + GAMMA * next_value - values[t] + GAMMA * LAM * advantage
        next_value = values[t]
        advantages[t], returns[t] = advantage, advantage + values[t]
    u = 0.0
    for t in kept:
        before, u = u, up_a[t] + up_r[t] + GAMMA * LAM * u
        grad_rewards[t], grad_values[t] = u, up_r[t] - u + GAMMA * before
    rows = (advantages, returns, grad_rewards, grad_values)
    return torch.tensor(rows, dtype=torch.float64), GAMMA * u


def assert_close(got, truth):
    torch.testing.assert_close(got.detach().double(), truth, rtol=1e-5, atol=1e-4)


def results(run, tokens, mask, bootstrap, **options):
    """Advantages, returns and gradients, and d bootstrap."""
    leaves = [x.clone().requires_grad_() for x in (*tokens[:2], bootstrap)]
    outputs = run(*leaves[:2], mask, gamma=GAMMA, lam=LAM, bootstrap=leaves[2], **options)
    grads = torch.autograd.grad(outputs, leaves, tuple(tokens[2:]))
    return torch.stack([x.detach() for x in (*outputs, *grads[:2])]), grads[2]


# Around the ends of what backends take at a time, and cut long sequences into: 2048, 8 * 2048 and
# 16384 tokens, and those of fp64 by halves.
LENGTHS = (2047, 2049, 8191, 8193, 14337, 16383, 16384, 16385, 18433, 32769)


@pytest.mark.parametrize(
    "shape", [*((1, T) for T in LENGTHS), (2, 140_001), (9, 20_003), (1, 1_000_003)], ids=str
)
def test_long_sequences(run, shape):
    tokens, mask = sample(*shape)
    bootstrap = torch.linspace(-1, 1, shape[0])
    got, grad_bootstrap = results(run, tokens, mask, bootstrap)
    for row in range(shape[0]):
        truth, grad = token_by_token(tokens[:, row], mask[row], bootstrap[row].item())
        assert_close(got[:, row], truth)
        assert grad_bootstrap[row].item() == pytest.approx(grad, rel=1e-5, abs=1e-4)


def test_a_long_sequence_packed_among_short_ones(run):
    offsets = [0, 5, 5, 70_008, 70_100, 105_003, 105_003]
    tokens, mask = sample(offsets[-1])
    bootstrap = torch.linspace(-1, 1, len(offsets) - 1)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    got, grad_bootstrap = results(run, tokens, mask, bootstrap, cu_seqlens=cu_seqlens)
    for i, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        truth, grad = token_by_token(tokens[:, begin:end], mask[begin:end], bootstrap[i].item())
        assert_close(got[:, begin:end], truth)
        assert grad_bootstrap[i].item() == pytest.approx(grad, rel=1e-5, abs=1e-4)


def test_a_sequence_alone_gives_what_it_gives_among_many(run):
    # Alone it is cut, among many it is not; an odd length, too, moves the rows off alignment.
    tokens, mask = sample(1, 20_001)
    alone, alone_bootstrap = results(run, tokens, mask, torch.ones(1))
    many = tokens.expand(-1, 300, -1), mask.expand(300, -1)
    among, among_bootstrap = results(run, *many, torch.ones(300))
    torch.testing.assert_close(among[:, :1], alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(among_bootstrap[:1], alone_bootstrap, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(among, among[:, :1].expand_as(among), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 140_001), (64, 1500)])
def test_bits_do_not_depend_on_threads_or_the_run(run, shape):
    tokens, mask = sample(*shape)
    bootstrap = torch.linspace(-1, 1, shape[0])
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(results(run, tokens, mask, bootstrap))
    for again in runs[1:]:
        assert torch.equal(again[0], runs[0][0]) and torch.equal(again[1], runs[0][1])


@pytest.mark.parametrize("case", [c for c in cases("gae") if c.values[0].backend == "triton"])
@pytest.mark.parametrize("block", [(64, 1), (256, 2), (1024, 8)])
def test_the_block_that_triton_scans_at_a_time_does_not_matter(case, block, monkeypatch):
    from rlhf_fast.kernels import gae as kernel

    monkeypatch.setattr(kernel, "scan_block", lambda *_: block)
    tokens, mask = sample(2, 1500)
    bootstrap = torch.linspace(-1, 1, 2)
    for run in calls("gae", gae, case, monkeypatch):
        got, grad_bootstrap = results(run, tokens, mask, bootstrap)
    for row in range(2):
        truth, grad = token_by_token(tokens[:, row], mask[row], bootstrap[row].item())
        assert_close(got[:, row], truth)
        assert grad_bootstrap[row].item() == pytest.approx(grad, rel=1e-5, abs=1e-4)
