"""token_logprobs on the inputs that broke others' kernels: written from the specification alone."""

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
    sample,
)

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.ops import token_logprobs

INF, NAN = math.inf, math.nan
OUTPUTS = ("logprobs", "entropy", "gradient")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = torch.finfo(F32).eps


@pytest.fixture(params=cases("token_logprobs"))
def run(request, monkeypatch):
    return Runner(token_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases("token_logprobs", interpreter=False))
def run_large(request, monkeypatch):
    return Runner(token_logprobs, request.param, monkeypatch)


def outcome(run, logits, tokens, upstream, **options):
    """Log-probs, entropy and the gradient of the logits."""
    x = leaf(logits)
    out = run(x, tokens, **options)
    gradient = gradients(out, [x], upstream)
    assert gradient[0].dtype == logits.dtype
    assert not run.launches or run.launched("backward") > 0, "the backward was never launched"
    return *(part.detach() for part in out), *gradient


def assert_true(run, logits, tokens, upstream, *, naive=True, budget=None, **options):
    got = outcome(run, logits, tokens, upstream, **options)
    rivals = (None,) * 3
    if naive:
        x = leaf(logits)
        out = naive_logprobs(x, tokens, **options)
        rivals = (*out, *gradients(out, [x], upstream))
    truth = logprobs_truth(logits, tokens, upstream, **options)
    for what, *numbers in zip(OUTPUTS, got, truth, rivals, strict=True):
        assert_budget(what, *numbers, **(budget or {}))
    return got


@pytest.mark.parametrize("used", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1), F32),
        ((5, 129), F32),
        ((7,), F32),
        ((2, 1, 2, 7), F32),
        ((2, 1000), F32),
        ((3, 64), BF16),
        ((2, 1000), BF16),
        ((3, 129), F16),
        ((3, 129), F64),
    ],
)
def test_error_is_within_that_of_naive_pytorch(run, shape, dtype, peaked, used):
    logits, tokens, upstream = sample(*shape, dtype=dtype, peaked=peaked)
    upstream = [
        grad if used in (name, "both") else None
        for name, grad in zip(OUTPUTS, upstream, strict=False)
    ]
    if dtype == F64 and dtype not in run.dtypes:
        with pytest.raises(BackendUnavailable, match="float64"):
            run(logits, tokens)
        return
    temperature = torch.linspace(0.6, 1.7, tokens.numel()).view(tokens.shape)
    assert_true(run, logits, tokens, upstream, temperature=temperature)
    capped = {"roundings": 43.0}  # two of a capped logit, 15 / 0.7
    options = {"budget": capped if dtype != F64 else None}
    assert_true(run, logits, tokens, upstream, temperature=0.7, softcap=15.0, **options)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(70_000, 5), (5, 32000), (3, 50257), (2, 151936), (2, 256_000)])
def test_error_at_real_vocabularies(run_large, shape, dtype):
    assert_true(run_large, *sample(*shape, dtype=dtype), temperature=1.3)
    assert_true(run_large, *sample(*shape, dtype=dtype, peaked=True))
    logits, tokens, upstream = sample(*shape, dtype=dtype)
    logits.fill_(-15.0)[:, 3] = 3.0  # mass of columns that do not exist would show
    assert_true(run_large, logits, tokens, upstream)


@pytest.mark.parametrize(("V", "dtype"), [(50257, F32), (151936, BF16), (256_000, F32)])
def test_a_row_of_many_pieces(run, V, dtype):
    assert_true(run, *sample(1, V, dtype=dtype, peaked=True), temperature=0.8)


@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_error_on_average(run_large, peaked, softcap):
    on_average = {"measure": root_mean_square, "roundings": 1.0}
    for used in range(2):
        logits, tokens, upstream = sample(300, 1000, peaked=peaked)
        upstream = [grad if i == used else None for i, grad in enumerate(upstream)]
        options = {"temperature": 0.7, "softcap": softcap, "budget": on_average}
        assert_true(run_large, logits, tokens, upstream, **options)


@pytest.mark.parametrize("margin", [10, 16, 17, 30, 60])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_confident_token_keeps_its_bits(run, margin, dtype):
    logits = -(torch.arange(2 * 130) % 7.0).view(2, 130)  # exact in bfloat16
    tokens = torch.tensor([0, 129])
    logits[[0, 1], tokens] = float(margin)
    logits, d_logprobs = logits.to(dtype), torch.tensor([0.7, -1.3])
    logprobs, entropy, gradient = outcome(run, logits, tokens, (d_logprobs, None))
    truth = logprobs_truth(logits, tokens, (d_logprobs, None))
    assert (logprobs < 0).all() and (entropy > 0).all()
    assert (gradient[[0, 1], tokens].sign() == d_logprobs.sign()).all()
    rtol = EPS * (16 + margin)
    for what, got, exact in zip(OUTPUTS, (logprobs, entropy), truth, strict=False):
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=0, msg=f"{what} {got}")
    rtol += torch.finfo(dtype).eps if dtype != F32 else 0
    torch.testing.assert_close(gradient.double(), truth[2], rtol=rtol, atol=0)


WIDE = 8200


@pytest.mark.parametrize("target", [0, 8192, WIDE - 1])
@pytest.mark.parametrize(
    "excluded",
    [slice(0, 8192), slice(5, None), slice(None, None, 2), slice(1, None), slice(0, WIDE - 1)],
    ids=str,
)
def test_tokens_ruled_out(run, excluded, target):
    logits, _, upstream = sample(2, WIDE)
    logits[1, excluded] = -INF
    tokens = torch.tensor([4, target])
    logprobs, _, gradient = assert_true(run, logits, tokens, upstream, naive=False)
    assert (logprobs[1] == -INF) == (logits[1, target] == -INF)
    others = torch.arange(WIDE) != target
    assert (gradient[1, others & (logits[1] == -INF)] == 0).all()


def test_tokens_ruled_out_are_back_under_a_softcap(run):
    logits, tokens, upstream = sample(2, 300)
    logits[1, 7:] = -INF
    logprobs = assert_true(run, logits, tokens, upstream, naive=False, softcap=20.0)[0]
    assert logprobs.isfinite().all()


def test_a_row_without_any_token_is_nan_alone(run):
    logits, tokens, upstream = sample(3, 300)
    logits[1] = -INF
    logprobs, entropy, _ = outcome(run, logits, tokens, upstream)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("offset", [1e4, -1e4, -100.0])
def test_a_common_offset_changes_no_bit(run, offset):
    logits, tokens, upstream = sample(4, 257, peaked=True)
    logits = (logits * 64).round() / 64  # 1e4 more is still exact
    options = {"temperature": torch.tensor([0.3, 1.0, 1.7, 3.0])}
    expected = outcome(run, logits, tokens, upstream, **options)
    assert_same("shifted", outcome(run, logits + offset, tokens, upstream, **options), expected)


@pytest.mark.parametrize("level", [-100.0, 0.0, 1e4])
@pytest.mark.parametrize("V", [2, 129, WIDE])
def test_equal_logits_are_uniform(run, level, V):
    """All are the largest: one of them is left out of the sums, the others are not."""
    logits, tokens, upstream = sample(2, V)
    logprobs, entropy, _ = assert_true(run, logits.fill_(level), tokens, upstream)
    for got in (-logprobs, entropy):
        assert (got - math.log(V)).abs().max() < 4 * EPS * math.log(V)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_differences_beyond_the_largest_number(run, dtype):
    huge = torch.finfo(dtype).max
    logits = torch.tensor([[huge, -huge, 0, huge], [-huge, -huge, -huge, 0], [huge, 0, 0, 0]])
    tokens, upstream = torch.tensor([0, 3, 0]), (torch.ones(3), torch.ones(3))
    assert_true(run, logits.to(dtype), tokens, upstream, naive=False, temperature=0.5)


@pytest.mark.parametrize("column", [0, 1, 700, 1498, 1499])
def test_nan_stays_in_its_row_and_is_not_swallowed(run, column):
    logits, tokens, upstream = sample(4, 1500)
    tokens[:] = torch.tensor([3, 700, 1, 1499])
    clean = outcome(run, logits, tokens, upstream)
    logits[2, column] = NAN
    broken = outcome(run, logits, tokens, upstream)
    for what, got, before in zip(OUTPUTS, broken, clean, strict=True):
        assert got[2].isnan().all(), f"{what}: NaN was swallowed"
        assert_same(f"{what} of the other rows", got[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("ignore_index", [-100, 0, 5, 2**40])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_ignored_rows_are_not_read(run, ignore_index, garbage):
    logits, tokens, upstream = sample(2, 3, 40)
    options = {"ignore_index": ignore_index}
    tokens[tokens == ignore_index] = 1
    expected = outcome(run, logits, tokens, upstream, **options)
    dropped = torch.tensor([[True, False, False], [False, True, True]])
    logits[dropped], tokens[dropped] = garbage, ignore_index
    got = outcome(run, logits, tokens, upstream, **options)
    for what, one, other in zip(OUTPUTS, got, expected, strict=True):
        assert (one[dropped] == 0).all(), f"{what} of ignored rows is not 0"
        assert_same(f"{what} of the rest", one[~dropped], other[~dropped])


def test_nothing_counts(run):
    logits, tokens, upstream = sample(2, 5, 40)
    for part in outcome(run, logits, tokens.fill_(-100), upstream):
        assert (part == 0).all()


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 1)])
def test_no_rows(run, shape):
    logits = torch.empty(shape, requires_grad=True)
    out = run(logits, torch.empty(shape[:-1], dtype=torch.int64), idle=True)
    assert all(part.shape == shape[:-1] and part.dtype == F32 for part in out)
    (gradient,) = gradients(out, [logits], out)
    assert gradient.shape == shape


@pytest.mark.parametrize("bad", [2**40, -5, 40, -1, -(2**40), 2**31, 2**32 + 3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_out_of_range(run, bad, dtype):
    logits, tokens, upstream = sample(3, 40)
    if abs(bad) >= 2**31 and dtype == torch.int32:
        bad = 2**31 - 1 if bad > 0 else -(2**31)
    expected = outcome(run, logits, tokens, upstream)
    tokens = tokens.to(dtype)
    tokens[1] = bad
    if run.device == "cpu":
        with pytest.raises(IndexError, match=rf"(?s)(?=.*{bad}\b)(?=.*\b40\b)"):
            run(logits, tokens, idle=True)
        return
    for got, before in zip(outcome(run, logits, tokens, upstream), expected, strict=True):
        assert got[1].isnan().all()
        assert_same("the other rows", got[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("dead", [[0], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("garbage", [None, NAN])
def test_rows_without_upstream_gradient_get_exact_zeros(run, dead, garbage):
    logits, tokens, upstream = sample(5, 70)
    expected = outcome(run, logits, tokens, upstream)[2]
    upstream[0][dead] = upstream[1][dead] = expected[dead] = 0
    if garbage is not None:
        logits[dead] = garbage
    assert_same("gradient", outcome(run, logits, tokens, upstream)[2:], [expected])


TEMPERATURES = {
    "number": lambda B, T: 0.25,
    "0-d": lambda B, T: torch.tensor(1.75),
    "[B, 1]": lambda B, T: torch.linspace(0.3, 2, B).view(B, 1),
    "[T]": lambda B, T: torch.linspace(0.3, 2, T),
    "extreme": lambda B, T: torch.tensor([1e-3, 1e3, 1.0]),
    "transposed": lambda B, T: torch.linspace(0.3, 2, B * T).view(T, B).t(),
    "float64": lambda B, T: torch.linspace(0.25, 2, B, dtype=F64).view(B, 1),
    "bfloat16": lambda B, T: torch.linspace(0.25, 2, B, dtype=BF16).view(B, 1),
}


@pytest.mark.parametrize("kind", TEMPERATURES)
def test_temperature(run, kind):
    assert_true(run, *sample(2, 3, 65), temperature=TEMPERATURES[kind](2, 3))
