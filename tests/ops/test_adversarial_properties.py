"""What must hold for any logits: token_logprobs and full_kl under Hypothesis."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from truth import Runner, assert_budget, assert_same, gradients, leaf

from rlhf_fast.ops import full_kl, token_logprobs

EPS = torch.finfo(torch.float32).eps
FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=cases("token_logprobs", interpreter=False))
def logprobs(request, monkeypatch):
    return Runner(token_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases("full_kl", interpreter=False))
def kl(request, monkeypatch):
    return Runner(full_kl, request.param, monkeypatch)


def logits_of(rows):
    """Rows of one length, 1 to 40, in eighths: exact, and exact when shifted."""
    numbers = st.integers(-200, 200)
    return st.integers(1, 40).flatmap(
        lambda V: st.lists(
            st.lists(numbers, min_size=V, max_size=V), min_size=rows, max_size=4
        ).map(lambda x: torch.tensor(x) / 8.0)
    )


@FEW
@given(logits=logits_of(1), shift=st.integers(-4096, 4096), seed=st.integers(0, 99))
def test_token_logprobs(logprobs, logits, shift, seed):
    N, V = logits.shape
    generator = torch.manual_seed(seed)
    tokens = torch.randint(V, (N,), generator=generator)
    upstream = tuple(torch.randn(2, N, generator=generator))
    order = torch.randperm(V, generator=generator)

    def outcome(logits, tokens, upstream=upstream):
        x = leaf(logits)
        out = logprobs(x, tokens)
        return *(part.detach() for part in out), *gradients(out, [x], upstream)

    logp, entropy, gradient = whole = outcome(logits, tokens)
    assert (logp <= 0).all() and (entropy >= 0).all()
    assert (entropy <= math.log(V) * (1 + 4 * EPS)).all()
    assert_same("shifted", outcome(logits + shift, tokens), whole)
    alone = outcome(logits[:1], tokens[:1], [grad[:1] for grad in upstream])
    torch.testing.assert_close(alone, tuple(x[:1] for x in whole), rtol=4 * EPS, atol=0)
    permuted = outcome(logits[:, order], order.argsort()[tokens])
    expected = (logp, entropy, gradient[:, order])
    torch.testing.assert_close(permuted, expected, rtol=16 * EPS, atol=4 * EPS)
    everything, _ = logprobs(logits[:1].expand(V, V), torch.arange(V))
    assert abs(everything.double().exp().sum() - 1) < 8 * EPS


@FEW
@given(logits=logits_of(2), shift=st.integers(-4096, 4096), seed=st.integers(0, 99))
def test_full_kl(kl, logits, shift, seed):
    ref_logits = logits.roll(1, 0)
    generator = torch.manual_seed(seed)
    upstream = torch.randn(len(logits), generator=generator)
    order = torch.randperm(logits.shape[1], generator=generator)

    def outcome(logits, ref_logits, upstream=upstream):
        leaves = [leaf(logits), leaf(ref_logits)]
        out = kl(*leaves)
        return out.detach(), *gradients(out, leaves, upstream)

    whole = outcome(logits, ref_logits)
    assert (whole[0] >= 0).all()
    assert (kl(logits, logits + shift) == 0).all()
    assert_same("shifted", outcome(logits + shift, ref_logits), whole)
    alone = outcome(logits[:1], ref_logits[:1], upstream[:1])
    torch.testing.assert_close(alone, tuple(x[:1] for x in whole), rtol=4 * EPS, atol=0)
    size = (upstream.abs() * (1 + whole[0])).max().item()  # of what u - kl is made
    permuted = outcome(logits[:, order], ref_logits[:, order])
    expected = (whole[0], *(x[:, order] for x in whole[1:]))
    for i, (one, other) in enumerate(zip(permuted, expected, strict=True)):
        assert_budget(f"permuted, tensor {i}", one, other.double(), scale=size)
