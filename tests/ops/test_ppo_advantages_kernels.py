"""ppo_advantages' kernels: strides, rounding, long input, equal bits, registration, compilation."""

import functools
import math

import pytest
import torch
from backend_cases import calls, cases

from rlhf_fast.ops.ppo_advantages import ppo_advantages, ppo_advantages_reference

OP = "ppo_advantages"


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`ppo_advantages` through one backend."""
    yield from calls(OP, ppo_advantages, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, reference=False, interpreter=False))
def run_long(request, monkeypatch):
    """As `run`, without what takes minutes on long inputs."""
    yield from calls(OP, ppo_advantages, request.param, monkeypatch)


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_any_strides(run, view):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 4, 24, generator=generator)
    mask = torch.rand(4, 24, generator=generator) < 0.7
    scores = torch.randn(8, generator=generator)[::2]
    if view == "transposed":
        views = [x.t().contiguous().t() for x in (*tokens, mask)]
    elif view == "sliced":
        views = [x[::2, 3:20] for x in (*tokens, mask)]
        scores = scores[::2]
    else:
        views = [x[:1].expand(4, 24) for x in (*tokens, mask)]
    results = run(scores, *views, kl_coef=0.1, value_lam=0.9)
    expected = run(scores.clone(), *(x.contiguous() for x in views), kl_coef=0.1, value_lam=0.9)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth)


def test_a_broken_token_that_counts_shows_and_no_other_sequence_sees_it(run):
    x = torch.zeros(2, 9)
    values = x.clone()
    values[0, 4] = math.nan
    advantages, returns, rewards = run(
        torch.ones(2), x, x, values, torch.ones(2, 9), kl_coef=0.1, whiten=False
    )
    assert advantages[0, :5].isnan().all() and returns[0, :5].isnan().all()
    assert advantages[0, 5:].isfinite().all() and not rewards.isnan().any()
    assert advantages[1].isfinite().all() and returns[1].isfinite().all()
    whitened, _, _ = run(torch.ones(2), x, x, values, torch.ones(2, 9), kl_coef=0.1)
    assert whitened.isnan().all()


def error_budget(call, inputs, options):
    """Asserts that results in fp32 are as near to fp64 truth as the reference in fp32 is."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = ppo_advantages_reference(*wide, **options)
    naive = ppo_advantages_reference(*inputs, **options)
    for got, exact, rounded in zip(call(*inputs, **options), truth, naive, strict=True):
        eps = torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=1)
        assert (got - exact).abs().max() <= (rounded - exact).abs().max() + 8 * eps


@pytest.mark.parametrize("shape", [(3, 37), (2, 1100)])
@pytest.mark.parametrize("whiten", [False, True])
def test_error_against_fp64_is_that_of_the_reference(run, shape, whiten):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(3, *shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    scores = torch.randn(shape[0], generator=generator)
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.95, "value_lam": 1.0, "whiten": whiten}
    error_budget(run, (scores, *tokens, mask), options)


@pytest.mark.parametrize("shape", [(1, 33_001), (3, 5_003), (300, 130)])
@pytest.mark.parametrize("packed", [False, True])
def test_long_and_many_sequences(run_long, shape, packed):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(3, *shape, generator=generator)
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
    inside = torch.arange(shape[1]) < lengths
    mask = inside & (torch.rand(shape, generator=generator) < 0.9)
    scores = torch.randn(shape[0], generator=generator)
    options = {"kl_coef": 0.1, "gamma": 0.999, "adaptive_lam": 0.05}
    inputs = (scores, *tokens, mask)
    if packed:
        inputs = (scores, *(x[inside] for x in (*tokens, mask)))
        options["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.flatten().cumsum(0)]).int()
    error_budget(run_long, inputs, options)


@pytest.mark.parametrize("shape", [(5, 20_001), (64, 1500)])
def test_bits_do_not_depend_on_threads_or_the_run(run_long, shape):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(3, *shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.9
    scores = torch.randn(shape[0], generator=generator)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(run_long(scores, *tokens, mask, kl_coef=0.1, value_lam=0.9))
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


COMPILED = [c for c in cases(OP) if c.values[0].backend in ("cpp", "cuda")]


@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("packed", [False, True])
def test_registered_ops_pass_opcheck(case, packed):
    tokens = torch.randn(3, 3, 20, device=case.device)
    mask = torch.rand(3, 20, device=case.device) < 0.7
    scores, gamma = torch.randn(3, device=case.device), torch.rand(3, device=case.device)
    finished, cu_seqlens = gamma < 0.5, None
    if packed:
        tokens, mask = tokens.flatten(1), mask.flatten()
        cu_seqlens = torch.tensor([0, 7, 30, 60], dtype=torch.int32, device=case.device)
    ops = torch.ops.rlhf_fast
    numbers = (0.9, 0.8, -1.0, 0.0, 0.1, 1.0)
    for per_sequence in ((gamma, gamma, gamma, finished), (None,) * 4):
        arguments = (scores, *tokens, mask, *per_sequence, cu_seqlens, *numbers, True)
        torch.library.opcheck(ops.ppo_advantages_forward, arguments)
    advantages, _, _, moments = ops.ppo_advantages_forward(*arguments)
    torch.library.opcheck(ops.ppo_advantages_whiten, (advantages, mask, moments))


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_as_one_graph_for_any_length(case):
    function = functools.partial(ppo_advantages, kl_coef=0.1, value_lam=0.9, backend=case.backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (20, 33, 51):
        tokens = torch.randn(3, 3, length, device=case.device)
        mask = torch.rand(3, length, device=case.device) < 0.7
        scores = torch.randn(3, device=case.device)
        for got, expected in zip(
            compiled(scores, *tokens, mask), function(scores, *tokens, mask), strict=True
        ):
            assert torch.equal(got, expected)
