"""linear_kl's numbers on adversarial heads: written from the specification alone."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from truth import (
    Runner,
    assert_budget,
    assert_same,
    capped,
    gradients,
    kl_truth,
    leaf,
    naive_kl,
    root_mean_square,
)

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.ops import linear_kl, linear_logprobs

INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float32).eps
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PARTS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


@pytest.fixture(params=cases("linear_kl"))
def run(request, monkeypatch):
    return Runner(linear_kl, request.param, monkeypatch)


@pytest.fixture(params=cases("linear_kl", interpreter=False))
def run_large(request, monkeypatch):
    return Runner(linear_kl, request.param, monkeypatch)


def sample(N, D, V, *, dtypes=(F32, F32), ref_dtypes=(F32, F32), D_ref=5, bias=True):
    """The parts of two heads, the policy's half peaked, and an upstream gradient."""
    generator = torch.Generator().manual_seed(N + V)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight, tokens = normal(V, D), torch.randint(V, (N,), generator=generator)
    hidden = normal(N, D) / D**0.5
    hidden[::2] += 15 * weight[tokens[::2]] / weight[tokens[::2]].square().sum(-1, keepdim=True)
    policy = (hidden.to(dtypes[0]), weight.to(dtypes[1]), normal(V).to(dtypes[1]))
    reference = (
        normal(N, D_ref).to(ref_dtypes[0]),
        normal(V, D_ref).to(ref_dtypes[1]),
        normal(V).to(ref_dtypes[1]),
    )
    parts = dict(zip(PARTS, (*policy, *reference), strict=True))
    if not bias:
        parts |= {"bias": None, "ref_bias": None}
    return parts, normal(N) + 0.1


def outcome(run, parts, upstream, **options):
    """KL, then the gradient of each part by name."""
    leaves = {name: None if x is None else leaf(x) for name, x in parts.items()}
    kl = run(**leaves, **options)
    wanted = [name for name, x in leaves.items() if x is not None]
    options.pop("idle", None)
    found = gradients(kl, [leaves[name] for name in wanted], upstream.to(kl.dtype))
    assert all(x.dtype == parts[name].dtype for name, x in zip(wanted, found, strict=True))
    return {"kl": kl.detach()} | dict(zip(wanted, found, strict=True))


def sides(parts, dtype):
    for prefix in ("", "ref_"):
        hidden, weight, bias = (parts[prefix + name] for name in PARTS[:3])
        logits = hidden.to(dtype) @ weight.to(dtype).t()
        yield logits if bias is None else logits + bias.to(dtype)


def truth(parts, upstream, **options):
    kl, *found = kl_truth(*sides(parts, F64), upstream, **options)
    results = {"kl": kl}
    for prefix, d in zip(("", "ref_"), found, strict=True):
        results[prefix + "hidden"] = d @ parts[prefix + "weight"].double()
        results[prefix + "weight"] = d.t() @ parts[prefix + "hidden"].double()
        results[prefix + "bias"] = d.sum(0)
    return results


def scales(parts, upstream, *, temperature=1.0, softcap=None, logit_scale=1.0):
    """Size of the terms that each gradient sums: they cancel, and each logit has its roundings."""
    sizes = {"kl": 0.0}
    z = [capped(x, softcap, logit_scale) for x in sides(parts, F64)]
    t = torch.as_tensor(temperature, dtype=F64).expand(len(upstream)).unsqueeze(-1)
    p, q = ((y / t).softmax(-1) for y, _ in z)
    reach = max((y / t)[y.isfinite()].abs().max().item() for y, _ in z)
    for prefix, mass, (_, slope) in zip(("", "ref_"), (p, p + q), z, strict=True):
        terms = (upstream.double().unsqueeze(-1) / t * slope * mass).abs() * (1 + 2 * reach)
        sizes[prefix + "hidden"] = (terms @ parts[prefix + "weight"].double().abs()).max().item()
        sizes[prefix + "weight"] = (
            (terms.t() @ parts[prefix + "hidden"].double().abs()).max().item()
        )
        sizes[prefix + "bias"] = terms.sum(0).max().item()
    return sizes


def naive(parts, upstream, *, logit_scale=1.0, **options):
    leaves = {name: None if x is None else leaf(x) for name, x in parts.items()}
    wide = F64 if any(x is not None and x.dtype == F64 for x in parts.values()) else F32
    kl = naive_kl(*(x * logit_scale for x in sides(leaves, wide)), **options)
    wanted = {name: x for name, x in leaves.items() if x is not None}
    found = gradients(kl, list(wanted.values()), upstream.to(wide))
    return {"kl": kl} | dict(zip(wanted, found, strict=True))


def assert_true(run, parts, upstream, *, rival=True, memory_budget=None, budget=None, **options):
    got = outcome(run, parts, upstream, memory_budget=memory_budget, **options)
    exact = truth(parts, upstream, **options)
    rivals = naive(parts, upstream, **options) if rival else {}
    sizes = scales(parts, upstream, **options)
    for what, one in got.items():
        slack = budget or {"scale": sizes[what]}
        if run.device != "cpu" and one.dtype.itemsize == 2:
            slack = {"roundings": torch.finfo(one.dtype).eps / EPS}  # products read half precision
        assert_budget(what, one, exact[what], rivals.get(what), **slack)
    return got


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("shape", "dtypes", "ref_dtypes"),
    [
        ((1, 1, 1), (F32, F32), (F32, F32)),
        ((9, 33, 259), (F32, F32), (F32, F32)),
        ((5, 7, 1000), (F32, F32), (F32, F32)),
        ((7, 31, 257), (BF16, BF16), (BF16, BF16)),
        ((3, 31, 257), (F16, F16), (F16, F16)),
        ((5, 7, 130), (BF16, F32), (F32, BF16)),
        ((5, 7, 130), (F32, F32), (BF16, BF16)),
        ((9, 33, 259), (F64, F64), (F64, F64)),
    ],
)
def test_error_is_within_that_of_naive_pytorch(run, shape, dtypes, ref_dtypes, everything):
    parts, upstream = sample(*shape, dtypes=dtypes, ref_dtypes=ref_dtypes, bias=everything)
    if F64 in dtypes and F64 not in run.dtypes:
        with pytest.raises(BackendUnavailable, match="float64"):
            run(**parts)
        return
    options = {}
    if everything:
        temperature = torch.linspace(0.6, 1.7, shape[0])
        options = {"softcap": 9.0, "logit_scale": -0.5, "temperature": temperature}
    assert_true(run, parts, upstream, **options)


@pytest.mark.parametrize(
    "shape",
    [
        *[(521, 7, 13), (20, 16, 32000), (6, 24, 50257), (200, 31, 1000)],
        (123, 513, 4001),
        (1025, 16, 8200),  # more than one of a CPU's tiles
    ],
)
def test_error_on_average(run_large, shape):
    parts, upstream = sample(*shape)
    upstream[1::3] = 0
    budget = {"measure": root_mean_square, "roundings": 2.0}
    assert_true(run_large, parts, upstream, temperature=0.8, memory_budget=1 << 22, budget=budget)


@pytest.mark.parametrize("logit_scale", [0.0, -1.0, 1e-3, 8.0])
def test_logit_scale(run, logit_scale):
    got = assert_true(run, *sample(6, 9, 130), logit_scale=logit_scale)
    if logit_scale == 0:
        assert all((x == 0).all() for x in got.values()), "two uniform distributions"


@pytest.mark.parametrize("memory_budget", [0, 5000, None])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_equal_heads_are_exactly_0_apart(run, memory_budget, dtype):
    parts, upstream = sample(4, 8, 700, dtypes=(dtype, dtype))
    parts |= {f"ref_{name}": parts[name].clone() for name in PARTS[:3]}
    for what, part in outcome(run, parts, upstream, memory_budget=memory_budget).items():
        assert (part == 0).all(), f"{what}: {part.abs().max()}"


RULED_OUT = {"first": slice(0, 8192), "last": slice(5, None), "even": slice(None, None, 2)}


@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize(
    ("part", "ref_part"), [("first", None), ("first", "first"), ("last", "last"), ("even", "first")]
)
def test_tokens_ruled_out_by_the_biases(run, part, ref_part, memory_budget):
    parts, upstream = sample(2, 4, 8200)
    parts["bias"][RULED_OUT[part]] = -INF
    if ref_part is not None:
        parts["ref_bias"][RULED_OUT[ref_part]] = -INF
    got = assert_true(run, parts, upstream, rival=False, memory_budget=memory_budget)
    if ((parts["bias"] != -INF) & (parts["ref_bias"] == -INF)).any():
        assert (got.pop("kl") == INF).all()
        assert all((x == 0).all() for x in got.values()), "rows at +inf pass on no gradient"
    else:
        assert (got["bias"][parts["bias"] == -INF] == 0).all()


@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("garbage", [None, NAN])
@pytest.mark.parametrize("dead", [[1, 3, 4], list(range(7))])
def test_rows_without_upstream_gradient(run, dead, garbage, memory_budget):
    parts, upstream = sample(7, 6, 40)
    upstream[dead] = 0
    expected, sizes = truth(parts, upstream), scales(parts, upstream)
    if garbage is not None:
        parts["hidden"][dead] = parts["ref_hidden"][dead] = garbage
    got = outcome(run, parts, upstream, memory_budget=memory_budget)
    assert (got["hidden"][dead] == 0).all() and (got["ref_hidden"][dead] == 0).all()
    for name in PARTS:
        assert_budget(name, got[name], expected[name], scale=sizes[name])


@pytest.mark.parametrize("side", ["hidden", "ref_hidden"])
def test_nan_stays_in_its_row(run, side):
    parts, upstream = sample(7, 6, 40)
    clean = outcome(run, parts, upstream)
    parts[side][3, 2] = NAN
    broken = outcome(run, parts, upstream)
    others = torch.arange(7) != 3
    for what in ("kl", "hidden", "ref_hidden"):
        assert broken[what][3].isnan().all(), f"{what}: NaN was swallowed"
        assert_same(what, [broken[what][others]], [clean[what][others]])


def test_no_rows(run):
    got = outcome(run, *sample(0, 6, 40), idle=True)
    assert got["kl"].shape == (0,) and got["hidden"].shape == (0, 6)
    assert all((x == 0).all() for x in got.values())


FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FEW
@given(N=st.integers(1, 6), V=st.integers(1, 90), D=st.integers(1, 9))
def test_properties(run_large, N, V, D):
    parts, upstream = sample(N, D, V)
    got, sizes = outcome(run_large, parts, upstream), scales(parts, upstream)
    assert (got["kl"] >= 0).all()
    order = torch.randperm(V, generator=torch.manual_seed(V))
    vocabulary = [name for name in PARTS if "hidden" not in name]
    permuted = outcome(
        run_large, {k: x[order] if k in vocabulary else x for k, x in parts.items()}, upstream
    )
    for name, one in permuted.items():
        exact = got[name][order] if name in vocabulary else got[name]
        assert_budget(f"permuted {name}", one, exact.double(), scale=sizes[name])
    halves = [
        outcome(
            run_large,
            {k: x[i::2] if "hidden" in k else x for k, x in parts.items()},
            upstream[i::2],
        )
        for i in range(min(N, 2))
    ]
    for name in vocabulary:
        total = sum(half[name] for half in halves)
        assert_budget(f"{name} of two batches", total, got[name].double(), scale=sizes[name])


@pytest.fixture(params=cases("linear_logprobs", interpreter=False))
def logprobs(request, monkeypatch):
    return Runner(linear_logprobs, request.param, monkeypatch)


@FEW
@given(V=st.integers(1, 60), D=st.integers(1, 9))
def test_log_probs_of_all_tokens_sum_to_1(logprobs, V, D):
    parts, _ = sample(1, D, V)
    hidden = parts["hidden"].expand(V, D)
    logp, entropy = logprobs(hidden, parts["weight"], torch.arange(V), bias=parts["bias"])
    assert abs(logp.double().exp().sum() - 1) < 16 * EPS
    assert (entropy <= math.log(V) * (1 + 4 * EPS)).all() and (logp <= 0).all()
    mean = -(logp.double().exp() * logp.double()).sum()
    assert (entropy - mean).abs().max() <= 64 * EPS * (1 + mean)
