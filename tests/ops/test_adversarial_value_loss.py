"""value_loss against its formula, token by token: written from the documentation alone."""

from __future__ import annotations

import pytest
import torch
from backend_cases import cases
from loss_truth import EPS, F64, INF, NAN, LossRunner
from truth import assert_same, leaf
from value_loss_cases import assert_true, flat, outcome, sample, value_truth

from rlhf_fast.ops import value_loss


@pytest.fixture(params=cases("value_loss"))
def run(request, monkeypatch):
    return LossRunner(value_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("value_loss", interpreter=False))
def run_large(request, monkeypatch):
    return LossRunner(value_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("value_loss", dtype=F64))
def run_double(request, monkeypatch):
    return LossRunner(value_loss, request.param, monkeypatch)


CLIPS = (0.2, 0.0, 1e-6, 3.0, 1e30, None)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(5, 37), (65,), (2, 3, 7), (1, 1), (2,)])
def test_error_is_within_that_of_naive_pytorch(run, shape, clip):
    assert_true(run, *sample(*shape, keep=0.9), clip=clip)
    assert_true(run, *sample(*shape, seed=1, keep=1.0), clip=clip, normalizer=96)


@pytest.mark.parametrize("clip", CLIPS)
def test_double_precision_keeps_its_digits(run_double, clip):
    loss, _, _ = assert_true(run_double, *sample(5, 37, dtype=F64), clip=clip)
    assert loss.dtype == F64
    assert_true(run_double, *sample(500, dtype=F64, offset=1e6), clip=clip)


LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LONG = (511, 512, 513, 1023, 1024, 1025, 2047, 2049, 4095, 4097, 5000, 8191, 16385, 20011)


def test_every_length(run):
    for T in LENGTHS:
        assert_true(run, *sample(T, seed=T, keep=1.0))


@pytest.mark.parametrize("T", LONG)
def test_long_batches(run_large, T):
    assert_true(run_large, *sample(T, seed=T))
    assert_true(run_large, *sample(3, T, seed=T), normalizer=1e5)


@pytest.mark.parametrize("shape", [(20011, 1), (6007, 3), (1, 20011), (0x10001,)])
def test_shapes_at_the_extremes(run_large, shape):
    assert_true(run_large, *sample(*shape))


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
@pytest.mark.parametrize("T", [33, 1025])
def test_a_common_offset_leaves_the_explained_variance_alone(run, offset, T):
    """Squares summed around 0 would hold nothing but the offset."""
    tensors = sample(T, offset=offset)
    _, metrics, _ = assert_true(run, *tensors, clip=0.25)  # exact, as the offset is
    centred = value_truth(*(x.double() - offset for x in tensors[:3]), tensors[3])
    assert abs(metrics["explained_variance"] - centred.metrics["explained_variance"]) < 1e-5


@pytest.mark.parametrize("level", [0.0, 0.1, -1e4 / 3, 1e7 + 1, 1e-20])
@pytest.mark.parametrize("T", [1, 2, 3, 65, 500])
def test_returns_that_do_not_vary_explain_nothing(run, level, T):
    values, old_values, returns, mask = sample(3, T, keep=0.8)
    mask[0] = True
    returns.fill_(level)
    loss, metrics, _ = outcome(run, values, old_values, returns, mask)
    truth = value_truth(values, old_values, returns, mask)
    assert abs(loss / truth.loss - 1) < 8 * EPS
    assert metrics["explained_variance"] == 0, metrics["explained_variance"]


def test_returns_that_do_not_vary_over_many_tokens(run_large):
    for level in (0.1, -1e4 / 3):
        values, old_values, returns, mask = sample(20011)
        metrics = outcome(run_large, values, old_values, returns.fill_(level), mask)[1]
        assert metrics["explained_variance"] == 0, metrics["explained_variance"]


def test_a_perfect_critic_explains_all(run):
    values, old_values, _, mask = sample(500, offset=1e3)
    metrics = outcome(run, values, old_values, values.clone(), mask)[1]
    assert metrics["explained_variance"] == 1
    metrics = outcome(run, values, old_values, values + 4, mask)[1]  # off by a constant
    assert abs(metrics["explained_variance"] - 1) < 1e-6


def test_a_token_alone_has_no_variance(run):
    values, old_values, returns, mask = sample(4, 9)
    mask.fill_(False)[2, 5] = True
    metrics = assert_true(run, values, old_values, returns, mask)[1]
    assert metrics["explained_variance"] == 0


def test_bounds_and_ties(run):
    """Exact in binary: at the bound, one step beyond, the return midway, and on either side."""
    old, clip = torch.zeros(8), 1.0
    values = torch.tensor([1.0, -1.0, 1 + 2**-20, 2.0, 2.0, 2.0, -2.0, -2.0])
    returns = torch.tensor([3.0, -3.0, 3.0, 1.5, 1.0, 2.5, -1.5, 5.0])
    loss, metrics, d_values = outcome(
        run, values, old, returns, old == 0, clip=clip, normalizer=1.0
    )
    assert metrics["value_clip_fraction"] == 2  # one step beyond, and 2.5
    plain, clipped = (values - returns) ** 2, (values.clamp(-1, 1) - returns) ** 2
    assert abs(loss - torch.maximum(plain, clipped).double().sum() / 2) < 8 * EPS * loss
    expected = torch.where(clipped > plain, 0.0, values - returns)
    tied = (clipped == plain) & (values.abs() > 1)
    assert tied.tolist() == [False, False, False, True, False, False, True, False]
    assert_same("untied", [d_values[~tied]], [expected[~tied]])
    share = d_values[tied] / expected[tied]  # any subgradient lies between
    assert ((share >= 0) & (share <= 1)).all()
    reference = leaf(values)
    gradient = torch.autograd.grad(
        value_loss(
            reference, old, returns, old == 0, clip=clip, normalizer=1.0, backend="reference"
        )[0],
        reference,
    )
    assert_same("the reference's at ties", [d_values], gradient)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("clip", [0.2, None])
def test_what_lies_under_the_mask_is_not_read(run, garbage, clip):
    *tensors, mask = sample(6, 21)
    mask[2] = False
    clean, broken = ([x.masked_fill(~mask, fill) for x in tensors] for fill in (0, garbage))
    got, expected = (outcome(run, *x, mask, clip=clip) for x in (broken, clean))
    assert_same("all", flat(got), flat(expected))
    assert (got[2][~mask] == 0).all()


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("clip", [0.2, None])
def test_nan_in_a_token_that_counts_is_not_swallowed(run, position, clip):
    tensors = sample(3, 33, keep=1.0)
    tensors[position][1, 17] = NAN
    loss, metrics, d_values = outcome(run, *tensors, clip=clip)
    if position == 1 and clip is None:
        assert loss.isfinite()
        return
    assert loss.isnan() and d_values.isnan().sum() <= 1

    def reference(*args, **options):
        return value_loss(*args, **options, backend="reference")

    expected = outcome(reference, *tensors, clip=clip)
    assert_same(
        "where NaN is",
        [x.isnan() for x in flat((loss, metrics, d_values))],
        [x.isnan() for x in flat(expected)],
    )
