"""linear_logprobs on the inputs that broke others' fused heads: from the specification alone."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from truth import (
    Runner,
    assert_budget,
    assert_same,
    gradients,
    leaf,
    logprobs_truth,
    naive_logprobs,
    root_mean_square,
)

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.ops import linear_logprobs

INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float32).eps
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PARTS = ("hidden", "weight", "bias")
EVERYTHING = {"softcap": 9.0, "logit_scale": -0.5}


@pytest.fixture(params=cases("linear_logprobs"))
def run(request, monkeypatch):
    return Runner(linear_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases("linear_logprobs", interpreter=False))
def run_large(request, monkeypatch):
    return Runner(linear_logprobs, request.param, monkeypatch)


def sample(N, D, V, *, dtypes=(F32, F32, F32), bias=True, seed=0):
    """A head (hidden, weight, bias), tokens, and unequal upstream gradients of both outputs.

    Half of the rows are peaked: their hidden state points at the weight of their token.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator)
    tokens = torch.randint(V, (N,), generator=generator)
    hidden = torch.randn(N, D, generator=generator) * 2 / D**0.5
    hidden[::2] += 20 * weight[tokens[::2]] / weight[tokens[::2]].square().sum(-1, keepdim=True)
    parts = (hidden, weight, torch.randn(V, generator=generator) if bias else None)
    head = [None if x is None else x.to(t) for x, t in zip(parts, dtypes, strict=True)]
    return head, tokens, tuple(torch.randn(2, N, generator=generator) + 0.1)


def outcome(run, head, tokens, upstream, *, trainable=PARTS, idle=False, **options):
    """Both outputs, then the gradient of each part of the head, None for what is frozen."""
    leaves = [
        x if x is None or name not in trainable else leaf(x)
        for name, x in zip(PARTS, head, strict=True)
    ]
    out = run(*leaves[:2], tokens, bias=leaves[2], idle=idle, **options)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    upstream = [None if x is None else x.to(out[0].dtype) for x in upstream]
    found = iter(gradients(out, wanted, upstream))
    grads = [next(found) if x is not None and x.requires_grad else None for x in leaves]
    assert all(g is None or g.dtype == x.dtype for g, x in zip(grads, head, strict=True))
    return *(part.detach() for part in out), *grads


def truth(head, tokens, upstream, **options):
    hidden, weight, bias = (None if x is None else x.double() for x in head)
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    *values, d = logprobs_truth(logits, tokens, upstream, **options)
    return *values, d @ weight, d.t() @ hidden, None if bias is None else d.sum(0)


def naive(head, tokens, upstream, *, logit_scale=1.0, **options):
    leaves = [None if x is None else leaf(x) for x in head]
    wide = F64 if F64 in (head[0].dtype, head[1].dtype) else F32
    hidden, weight, bias = (None if x is None else x.to(wide) for x in leaves)
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * logit_scale
    out = naive_logprobs(logits, tokens, **options)
    found = gradients(
        out,
        [x for x in leaves if x is not None],
        [None if x is None else x.to(wide) for x in upstream],
    )
    return *out, *found, *([None] if bias is None else [])


def assert_true(
    run, head, tokens, upstream, *, trainable=PARTS, rival=True, budget=None, **options
):
    got = outcome(run, head, tokens, upstream, trainable=trainable, **options)
    options.pop("memory_budget", None)
    exact = truth(head, tokens, upstream, **options)
    rivals = naive(head, tokens, upstream, **options) if rival else (None,) * 5
    for what, *numbers in zip(("logprobs", "entropy", *PARTS), got, exact, rivals, strict=True):
        if numbers[0] is not None:
            assert_budget(what, *numbers, **budget_of(run, numbers[0], budget))
    return got


def budget_of(run, got, budget):
    """A GPU's half-precision products read gradients of logits rounded to half precision."""
    if run.device == "cpu" or got.dtype.itemsize > 2:
        return budget or {}
    return {"roundings": torch.finfo(got.dtype).eps / EPS}


@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((1, 1, 1), (F32,) * 3),
        ((9, 33, 259), (F32,) * 3),
        ((5, 7, 1000), (F32,) * 3),
        ((7, 31, 257), (BF16,) * 3),
        ((3, 31, 257), (F16,) * 3),
        ((9, 33, 259), (F64,) * 3),
        ((5, 7, 130), (BF16, F32, F32)),
        ((5, 7, 130), (F32, BF16, F32)),
        ((5, 7, 130), (BF16, BF16, F32)),
    ],
)
def test_error_is_within_that_of_naive_pytorch(run, shape, dtypes, options, used):
    head, tokens, upstream = sample(*shape, dtypes=dtypes, bias=bool(options))
    names = ("logprobs", "entropy")
    upstream = [
        x if used in (name, "both") else None for name, x in zip(names, upstream, strict=True)
    ]
    if options:
        options = {**options, "temperature": torch.linspace(0.6, 1.7, shape[0])}
    if F64 in dtypes and F64 not in run.dtypes:
        with pytest.raises(BackendUnavailable, match="float64"):
            run(*head[:2], tokens, bias=head[2])
        return
    assert_true(run, head, tokens, upstream, **options)


@pytest.mark.parametrize(
    "shape",
    [
        *[(521, 7, 13), (20, 16, 32000), (6, 24, 50257), (1025, 16, 512)],
        (123, 877, 16_001),
        (1025, 16, 8200),  # more than one of a CPU's tiles
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_error_on_average(run_large, shape, dtype):
    head, tokens, upstream = sample(*shape, dtypes=(dtype,) * 3)
    upstream[0][1::3] = upstream[1][1::3] = 0
    options = {"temperature": 0.8, "memory_budget": 1 << 22}
    budget = {"measure": root_mean_square, "roundings": 2.0}
    assert_true(run_large, head, tokens, upstream, budget=budget, **options)


@pytest.mark.parametrize("logit_scale", [0.0, -1.0, 1e-3, 16.0])
def test_logit_scale(run, logit_scale):
    head, tokens, upstream = sample(6, 9, 130)
    got = assert_true(run, head, tokens, upstream, logit_scale=logit_scale)
    if logit_scale == 0:
        assert (got[1] - math.log(130)).abs().max() < 8 * EPS * math.log(130)
        assert all((x == 0).all() for x in got[2:]), "a constant has no gradient"


@pytest.mark.parametrize("margin", [10, 17, 60])
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_a_confident_token_keeps_its_bits(run, margin, memory_budget):
    weight, hidden = -(torch.arange(130) % 7.0)[:, None], torch.tensor([[1.0], [-1.0]])
    weight[4] = float(margin)
    head = [hidden[:1], weight, torch.zeros(130)]
    data = (head, torch.tensor([4]), (torch.tensor([0.7]), None))
    got = outcome(run, *data, memory_budget=memory_budget)
    assert got[0] < 0 and got[1] > 0 and (got[2] != 0).all() and (got[3] != 0).all()
    for what, one, exact in zip(("logprobs", "entropy", *PARTS), got, truth(*data), strict=True):
        rtol = EPS * (16 + margin)
        torch.testing.assert_close(one.double(), exact, rtol=rtol, atol=0, msg=f"{what}: {one}")


@pytest.mark.parametrize("excluded", [slice(0, 8192), slice(5, None), slice(1, None)], ids=str)
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_tokens_ruled_out_by_the_bias(run, excluded, memory_budget):
    head, tokens, upstream = sample(2, 4, 8200)
    head[2][excluded] = -INF
    tokens[:] = torch.tensor([0, 8199])
    got = assert_true(
        run,
        head,
        tokens,
        upstream,
        rival=False,
        memory_budget=memory_budget,
        budget={"roundings": 32},
    )
    assert ((got[0] == -INF) == (head[2][tokens] == -INF)).all()
    assert_true(run, head, tokens, upstream, rival=False, softcap=9.0, budget={"roundings": 32})


@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_ignored_rows_reach_nothing(run, ignore_index, memory_budget):
    head, tokens, upstream = sample(15, 6, 40)
    options = {"ignore_index": ignore_index, "memory_budget": memory_budget}
    tokens[tokens == ignore_index] = 7
    dropped = torch.arange(15) % 3 == 1
    tokens[dropped], head[0][dropped] = ignore_index, NAN
    got = outcome(run, head, tokens, upstream, **options)
    for part in got[:3]:
        assert (part[dropped] == 0).all()
    kept = ([head[0][~dropped], *head[1:]], tokens[~dropped], [x[~dropped] for x in upstream])
    for what, one, other in zip(PARTS, got[2:], outcome(run, *kept, **options)[2:], strict=True):
        one = one[~dropped] if what == "hidden" else one
        assert_budget(what, one, other.double())


def test_nothing_counts(run):
    head, tokens, upstream = sample(7, 6, 40)
    head[0][:] = NAN
    got = outcome(run, head, tokens.fill_(-100), upstream, idle=True)
    assert all((part == 0).all() for part in got)
    assert [x.shape for x in got[2:]] == [x.shape for x in head]


def test_no_rows(run):
    head, tokens, upstream = sample(0, 6, 40)
    got = outcome(run, head, tokens, upstream, idle=True)
    assert got[0].shape == got[1].shape == (0,) and got[2].shape == (0, 6)
    assert (got[3] == 0).all() and (got[4] == 0).all()


@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("garbage", [None, NAN])
@pytest.mark.parametrize("dead", [[1, 3, 4], list(range(7))])
def test_rows_without_upstream_gradient(run, dead, garbage, memory_budget):
    head, tokens, upstream = sample(7, 6, 40)
    upstream[0][dead] = upstream[1][dead] = 0
    expected = truth(head, tokens, upstream)[2:]
    if garbage is not None:
        head[0][dead] = garbage
    got = outcome(run, head, tokens, upstream, memory_budget=memory_budget)[2:]
    assert (got[0][dead] == 0).all()
    for what, one, exact in zip(PARTS, got, expected, strict=True):
        assert_budget(what, one, exact, roundings=16)


def test_nan_stays_in_its_row(run):
    head, tokens, upstream = sample(7, 6, 40)
    clean = outcome(run, head, tokens, upstream)[:3]
    head[0][3, 2] = NAN
    others = torch.arange(7) != 3
    for got, before in zip(outcome(run, head, tokens, upstream)[:3], clean, strict=True):
        assert got[3].isnan().all(), "NaN was swallowed"
        assert_same("the other rows", [got[others]], [before[others]])


@pytest.mark.parametrize("bad", [2**40, -5, 40, -1])
def test_ids_out_of_range(run, bad):
    head, tokens, upstream = sample(3, 6, 40)
    tokens[1] = bad
    if run.device == "cpu":
        with pytest.raises(IndexError, match=rf"(?s)(?=.*{bad}\b)(?=.*\b40\b)"):
            run(*head[:2], tokens, bias=head[2], idle=True)
        return
    got = outcome(run, head, tokens, upstream)
    assert got[0].isnan().tolist() == got[1].isnan().tolist() == [False, True, False]
