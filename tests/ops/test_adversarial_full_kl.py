"""full_kl on the inputs that break KL kernels: written from the specification alone."""

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
    kl_truth,
    leaf,
    naive_kl,
    root_mean_square,
    sample,
)

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.ops import full_kl

INF, NAN = math.inf, math.nan
EPS = torch.finfo(torch.float32).eps
OUTPUTS = ("kl", "gradient", "reference gradient")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(params=cases("full_kl"))
def run(request, monkeypatch):
    return Runner(full_kl, request.param, monkeypatch)


@pytest.fixture(params=cases("full_kl", interpreter=False))
def run_large(request, monkeypatch):
    return Runner(full_kl, request.param, monkeypatch)


def pair(*shape, dtypes=(F32, F32), peaked=False, distance=1.0):
    """Logits, the reference's `distance` away, and an upstream gradient."""
    logits, _, (upstream, _) = sample(*shape, peaked=peaked)
    ref_logits = logits + distance * sample(*shape, seed=1)[0]
    return logits.to(dtypes[0]), ref_logits.to(dtypes[1]), upstream


def outcome(run, logits, ref_logits, upstream, **options):
    """KL and both gradients."""
    leaves = [leaf(logits), leaf(ref_logits)]
    kl = run(*leaves, **options)
    found = gradients(kl, leaves, upstream.to(kl.dtype))
    assert [x.dtype for x in found] == [logits.dtype, ref_logits.dtype]
    assert not run.launches or run.launched("backward") > 0, "the backward was never launched"
    return kl.detach(), *found


def assert_true(run, logits, ref_logits, upstream, *, naive=True, budget=None, **options):
    got = outcome(run, logits, ref_logits, upstream, **options)
    rivals = (None,) * 3
    if naive:
        leaves = [leaf(logits), leaf(ref_logits)]
        kl = naive_kl(*leaves, **options)
        rivals = (kl, *gradients(kl, leaves, upstream.to(kl.dtype)))
    truth = kl_truth(logits, ref_logits, upstream, **options)
    for what, *numbers in zip(OUTPUTS, got, truth, rivals, strict=True):
        assert_budget(what, *numbers, **(budget or {}))
    return got


@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((1, 1), (F32, F32)),
        ((5, 129), (F32, F32)),
        ((7,), (F32, F32)),
        ((2, 1, 2, 7), (F32, F32)),
        ((2, 1000), (F32, F32)),
        ((3, 64), (BF16, BF16)),
        ((2, 1000), (BF16, F32)),
        ((3, 129), (F32, BF16)),
        ((3, 129), (F16, F16)),
        ((3, 129), (F64, F64)),
        ((3, 129), (F64, BF16)),
    ],
)
def test_error_is_within_that_of_naive_pytorch(run, shape, dtypes, peaked):
    logits, ref_logits, upstream = pair(*shape, dtypes=dtypes, peaked=peaked)
    if F64 in dtypes and F64 not in run.dtypes:
        with pytest.raises(BackendUnavailable, match="float64"):
            run(logits, ref_logits)
        return
    temperature = torch.linspace(0.6, 1.7, upstream.numel()).view(upstream.shape)
    assert_true(run, logits, ref_logits, upstream, temperature=temperature)
    assert_true(run, ref_logits, logits, upstream)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("shape", [(70_000, 5), (5, 32000), (3, 50257), (2, 151936), (2, 256_000)])
def test_error_at_real_vocabularies(run_large, shape, dtypes):
    assert_true(run_large, *pair(*shape, dtypes=dtypes), temperature=1.3)
    assert_true(run_large, *pair(*shape, dtypes=dtypes, peaked=True))


@pytest.mark.parametrize(("V", "dtype"), [(50257, F32), (151936, BF16), (256_000, F32)])
def test_a_row_of_many_pieces(run, V, dtype):
    assert_true(run, *pair(1, V, dtypes=(dtype, dtype), peaked=True), temperature=0.8)


@pytest.mark.parametrize("distance", [0.05, 1.0])
@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
def test_error_on_average(run_large, peaked, distance):
    on_average = {"measure": root_mean_square, "roundings": 1.0}
    data = pair(300, 1000, peaked=peaked, distance=distance)
    assert_true(run_large, *data, temperature=0.7, budget=on_average)


@pytest.mark.parametrize("used", [0, 1])
def test_each_gradient_alone(run, used):
    logits, ref_logits, upstream = pair(4, 3, 77, dtypes=(F32, BF16))
    expected = outcome(run, logits, ref_logits, upstream)
    inputs = [logits, ref_logits]
    inputs[used] = leaf(inputs[used])
    kl = run(*inputs)
    got = gradients(kl, [inputs[used]], upstream)
    assert_same(OUTPUTS[1 + used], (kl, *got), (expected[0], expected[1 + used]))
    inputs[1 - used] = inputs[1 - used].requires_grad_()
    half = gradients(run(*inputs), [inputs[used]], upstream)
    assert_same("both need one, one is asked for", half, got)


@pytest.mark.parametrize("nearness", [2**-4, 2**-7, 2**-10])
@pytest.mark.parametrize("V", [3, 700, 9000])
def test_close_distributions_keep_their_digits(run, nearness, V):
    """KL is about nearness^2 / 2, where naive fp32 is left with noise, even with the wrong sign."""
    generator = torch.manual_seed(V)
    logits = torch.randint(-4096, 4096, (2, V), generator=generator) / 1024  # all differences exact
    ref_logits = logits + torch.randint(-1, 2, (2, V), generator=generator) * nearness
    logits[:, 1], ref_logits[:, 1] = 0.0, nearness  # never the same
    kl, *found = outcome(run, logits, ref_logits, torch.tensor([1.0, -0.5]))
    truth = kl_truth(logits, ref_logits, torch.tensor([1.0, -0.5]))
    rtol = 32 * EPS / nearness
    assert (kl > 0).all()
    torch.testing.assert_close(kl.double(), truth[0], rtol=rtol, atol=0)
    for what, got, exact in zip(OUTPUTS[1:], found, truth[1:], strict=True):
        assert_budget(what, got, exact, roundings=32 / nearness)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
def test_equal_distributions_are_exactly_0_apart(run, dtypes, peaked):
    logits, _, upstream = pair(2, 3, 1100, peaked=peaked)
    logits = (logits * 4).round() / 4  # exact in every dtype, and offset by 8
    logits[:, 1, ::2] = -INF
    for offset in (0, 8):
        for part in outcome(run, logits.to(dtypes[0]), (logits + offset).to(dtypes[1]), upstream):
            assert (part == 0).all(), f"{part.abs().max()} at offset {offset}"


@pytest.mark.parametrize(
    ("margin", "ref_margin"), [(10, 5), (10, 60), (17, 17), (17, 30), (30, 60), (60, 60), (60, 10)]
)
def test_peaked_on_the_same_token(run, margin, ref_margin):
    """KL is about exp(-margin): lost in lse differences, kept in sums of non-negative terms."""
    logits = -(torch.arange(2 * 130) % 7.0).view(2, 130)
    ref_logits = -(torch.arange(2 * 130) % 5.0).view(2, 130)
    logits[:, 70], ref_logits[:, 70] = float(margin), float(ref_margin)
    upstream = torch.tensor([0.7, -1.3])
    kl, *found = outcome(run, logits, ref_logits, upstream)
    truth = kl_truth(logits, ref_logits, upstream)
    torch.testing.assert_close(kl.double(), truth[0], rtol=EPS * (32 + margin), atol=0)
    for what, got, exact in zip(OUTPUTS[1:], found, truth[1:], strict=True):
        others = torch.arange(130) != 70  # at the peak they sum up, with the rounding of 1
        assert_budget(what, got[:, others], exact[:, others], roundings=32 + margin)


WIDE = 8200
PARTS = {"first": slice(0, 8192), "last": slice(5, None), "even": slice(None, None, 2)}


@pytest.mark.parametrize(
    ("part", "ref_part"),
    [("first", "none"), ("first", "first"), ("last", "last"), ("even", "even"), ("even", "first")],
)
def test_tokens_ruled_out(run, part, ref_part):
    """By the policy: they add nothing. By the reference alone: +inf, and no gradient."""
    logits, ref_logits, upstream = pair(2, WIDE)
    logits[1, PARTS[part]] = -INF
    if ref_part != "none":
        ref_logits[1, PARTS[ref_part]] = -INF
    data = (logits, ref_logits, upstream)
    # Five tokens of the policy against all: log-ratios of 15 nats, 16 roundings each.
    kl, d_logits, d_ref = assert_true(run, *data, naive=False, budget={"roundings": 32})
    infinite = bool(((logits[1] != -INF) & (ref_logits[1] == -INF)).any())
    assert (kl == INF).tolist() == [False, infinite]
    assert (d_logits[1, logits[1] == -INF] == 0).all()
    assert not infinite or (d_logits[1] == 0).all() and (d_ref[1] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tokens_masked_with_the_lowest_number(run, dtype, temperature):
    """Generation code masks with `finfo.min`; divided by a temperature it is -inf."""
    logits, ref_logits, upstream = pair(4, 9, dtypes=(dtype, dtype))
    lowest = torch.finfo(dtype).min
    logits[:2, :5] = lowest
    ref_logits[1:3, :5] = lowest
    both = outcome(run, logits, ref_logits, upstream, temperature=temperature)
    exact = kl_truth(logits, ref_logits, upstream, temperature=temperature)
    size = (upstream.abs() / temperature * (1 + exact[0]))[[0, 1, 3]].max().item()
    assert both[0][2] > 1e37, "the policy allows what the reference masks"
    for what, got, truth in zip(OUTPUTS, both, exact, strict=True):
        assert_budget(what, got[[0, 1, 3]], truth[[0, 1, 3]], scale=size)


@pytest.mark.parametrize("column", [0, 8191, WIDE - 1])
def test_one_token_left(run, column):
    logits, ref_logits, upstream = pair(2, WIDE)
    logits[1, torch.arange(WIDE) != column] = -INF
    kl, d_logits, _ = assert_true(run, logits, ref_logits, upstream, naive=False)
    surprise = -ref_logits[1].double().log_softmax(-1)[column]
    assert abs(kl[1] - surprise) < 8 * EPS * surprise
    assert (d_logits[1].abs() < 64 * EPS).all()


def test_a_row_without_any_token_is_nan_alone(run):
    logits, ref_logits, upstream = pair(4, 300)
    logits[1] = -INF
    logits[2] = ref_logits[2] = -INF
    kl = outcome(run, logits, ref_logits, upstream)[0]
    assert kl.isnan().tolist() == [False, True, True, False]
    logits, ref_logits, _ = pair(2, 300)
    ref_logits[1] = -INF
    kl = run(logits, ref_logits)
    assert kl[0].isfinite() and not kl[1].isfinite(), "a reference without any token"


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("column", [0, 700, 1499])
def test_nan_stays_in_its_row_and_is_not_swallowed(run, side, column):
    *inputs, upstream = pair(4, 1500)
    clean = outcome(run, *inputs, upstream)
    inputs[side][2, column] = NAN
    for what, got, before in zip(OUTPUTS, outcome(run, *inputs, upstream), clean, strict=True):
        assert got[2].isnan().all(), f"{what}: NaN was swallowed"
        assert_same(f"{what} of the other rows", got[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("garbage", [None, NAN])
@pytest.mark.parametrize("dead", [[0], [1, 3], [0, 1, 2, 3, 4]])
def test_rows_without_upstream_gradient_get_exact_zeros(run, dead, garbage):
    *inputs, upstream = pair(5, 70)
    expected = outcome(run, *inputs, upstream)[1:]
    for x in (upstream, *expected):
        x[dead] = 0
    if garbage is not None:
        inputs[0][dead] = inputs[1][dead] = garbage
    assert_same("gradients", outcome(run, *inputs, upstream)[1:], expected)


@pytest.mark.parametrize("offsets", [(1e4, 0), (0, -1e4), (-1e4, 1e4), (-100, -100)])
def test_common_offsets_change_no_bit(run, offsets):
    logits, ref_logits, upstream = pair(4, 257, peaked=True)
    logits, ref_logits = ((x * 64).round() / 64 for x in (logits, ref_logits))
    options = {"temperature": torch.tensor([0.3, 1.0, 1.7, 3.0])}
    expected = outcome(run, logits, ref_logits, upstream, **options)
    shifted = (logits + offsets[0], ref_logits + offsets[1], upstream)
    assert_same("shifted", outcome(run, *shifted, **options), expected)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_rows(run, shape):
    leaves = [torch.empty(shape, requires_grad=True) for _ in range(2)]
    kl = run(*leaves, idle=True)
    assert kl.shape == shape[:-1] and kl.dtype == F32
    assert [x.shape for x in gradients(kl, leaves, kl)] == [shape, shape]


@pytest.mark.parametrize(
    "temperature", [0.25, torch.tensor([[0.5], [3.0]]), torch.tensor(2.0)], ids=str
)
def test_temperature(run, temperature):
    assert_true(run, *pair(2, 3, 65), temperature=temperature)
