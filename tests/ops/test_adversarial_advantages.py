"""ppo_advantages against a loop over tokens: written from the documentation alone."""

from __future__ import annotations

import pytest
import torch
from advantage_cases import OPTIONS, assert_true, sample
from backend_cases import cases
from loss_truth import BF16, F16, F32, F64, LossRunner
from truth import assert_budget

from rlhf_fast.ops import ppo_advantages


@pytest.fixture(params=cases("ppo_advantages"))
def run(request, monkeypatch):
    return LossRunner(ppo_advantages, request.param, monkeypatch)


@pytest.fixture(params=cases("ppo_advantages", interpreter=False))
def run_large(request, monkeypatch):
    return LossRunner(ppo_advantages, request.param, monkeypatch)


@pytest.fixture(params=cases("ppo_advantages", dtype=F64))
def run_double(request, monkeypatch):
    return LossRunner(ppo_advantages, request.param, monkeypatch)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 37), (3, 1), (1, 300)])
def test_error_is_within_that_of_a_plain_loop(run, shape, kind):
    assert_true(run, sample(*shape, keep=0.8), **OPTIONS[kind])


@pytest.mark.parametrize("kind", OPTIONS)
def test_double_precision_keeps_its_digits(run_double, kind):
    found = assert_true(run_double, sample(5, 130, dtype=F64), **OPTIONS[kind])
    assert all(x.dtype == F64 for x in found)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_coefficients_by_sequence(run, dtype):
    tensors = sample(5, 37)
    numbers = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=dtype)
    options = {"gamma": numbers, "lam": numbers.flip(0), "value_lam": numbers.roll(2)}
    for whiten in (False, True):
        assert_true(run, tensors, **options, whiten=whiten)
        assert_true(run, tensors, gamma=numbers, adaptive_lam=0.1, whiten=whiten)


FINISHED = {
    "bool": lambda x: x,
    "uint8": lambda x: x.to(torch.uint8) * 255,
    "int64 2**32": lambda x: x.long() * 2**32,
    "float -1e-30": lambda x: x.float() * -1e-30,
    "double 1e-300": lambda x: x.double() * 1e-300,
}


@pytest.mark.parametrize("kind", FINISHED)
def test_missing_eos(run, kind):
    tensors = sample(5, 37)
    finished = FINISHED[kind](torch.tensor([True, False, False, True, False]))
    for penalty in (1.0, 0.0, -2.0):
        options = {"missing_eos_penalty": penalty, "finished": finished, "whiten": False}
        assert_true(run, tensors, **options)


LENGTHS = (
    0,
    1,
    2,
    3,
    0,
    4,
    5,
    7,
    8,
    9,
    15,
    17,
    31,
    33,
    63,
    64,
    65,
    0,
    127,
    128,
    129,
    255,
    256,
    257,
)
SHORT = (0, 1, 2, 0, 0, 3, 17, 33, 64, 0, 65, 0)
LONG = (511, 512, 513, 1023, 1024, 1025, 2049, 4097, 5000, 20011)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, 9, 31, 64, 65, 127, 128, 129, 255, 256, 257])
def test_every_length(run, T):
    assert_true(run, sample(2, T, seed=T, keep=0.9), value_lam=1.0, gamma=0.99)


@pytest.mark.parametrize("T", LONG)
def test_long_sequences(run_large, T):
    assert_true(run_large, sample(2, T, seed=T), adaptive_lam=0.05, value_lam=1.0)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("kind", ["plain", "decoupled, raw", "adaptive, raw", "VAPO"])
def test_packs(run, kind, keep):
    offsets = torch.tensor([0, *SHORT]).cumsum(0).int()
    tensors = sample(int(offsets[-1]), keep=keep, count=len(SHORT))
    finished = torch.arange(len(SHORT)) % 3
    options = {"cu_seqlens": offsets, "finished": finished, "missing_eos_penalty": 1.0}
    assert_true(run, tensors, **options, **OPTIONS[kind])


def test_long_packs(run_large):
    offsets = torch.tensor([0, 3, *LONG, *LENGTHS]).cumsum(0).int()
    tensors = sample(int(offsets[-1]), count=len(offsets) - 1)
    assert_true(run_large, tensors, cu_seqlens=offsets, value_lam=1.0)


@pytest.mark.parametrize("shape", [(20011, 1), (6007, 3), (1025, 40)])
def test_many_sequences(run_large, shape):
    assert_true(run_large, sample(*shape), value_lam=1.0)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_scores_and_values_cancels(run, offset):
    """Returns lie around the offset, advantages do not; numbers are exact in binary.

    What is left of the offset is one rounding of it: a scan carries value and advantage as one.
    """
    tensors = sample(4, 65)
    tensors = [x if x.dtype == torch.bool else (x * 64).round() / 64 for x in tensors]
    options = {"kl_coef": 0.0, "gamma": 1.0, "lam": 0.5}
    near = assert_true(run, tensors, **options)
    moved = [tensors[0] + offset, *tensors[1:3], tensors[3] + offset, tensors[4]]
    far = assert_true(run, moved, **options)
    assert_budget("advantages", far[0], near[0].double(), roundings=1, scale=abs(offset))


@pytest.mark.parametrize("score", [0.0, 0.1, -1e4 / 3, 1e7 + 1])
@pytest.mark.parametrize("shape", [(3, 37), (1, 1), (2, 500)])
def test_equal_advantages_are_whitened_to_exactly_zero(run, shape, score):
    scores, logprobs, _, values, mask = sample(*shape)
    mask[0, 0] = True
    options = {"kl_coef": 0.0, "gamma": 1.0, "lam": 1.0}
    advantages, returns, _ = run(
        scores.fill_(score), logprobs, None, values.fill_(0), mask, **options
    )
    assert (advantages == 0).all(), advantages.abs().max()
    assert (returns[mask] == scores[0]).all()


def test_equal_advantages_of_many_tokens_are_whitened_to_exactly_zero(run_large):
    for score in (0.1, -1e4 / 3):
        scores, logprobs, _, values, mask = sample(7, 20011)
        options = {"kl_coef": 0.0, "gamma": 1.0, "lam": 1.0}
        found = run_large(scores.fill_(score), logprobs, None, values.fill_(0), mask, **options)[0]
        assert (found == 0).all(), found.abs().max()


def test_whitened_advantages_have_mean_zero_and_variance_one(run):
    for scale, offset in ((1.0, 0.0), (1e3, 1e5), (1e-2, 0.0), (1.0, -1e4)):
        tensors = sample(4, 300)
        tensors[0], tensors[3] = tensors[0] * scale + offset, tensors[3] * scale
        found = run(*tensors, kl_coef=0.1 * scale)[0][tensors[4]].double()
        assert abs(found.mean()) < 1e-5 and abs(found.var() - 1) < 1e-3
