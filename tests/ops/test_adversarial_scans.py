"""gae and discounted_returns against a loop over tokens: from the documentation alone."""

from __future__ import annotations

import pytest
import torch
from loss_truth import F64
from scan_cases import Scan, assert_true, parameters, sample


@pytest.fixture(params=parameters())
def run(request, monkeypatch):
    return Scan(*request.param, monkeypatch)


@pytest.fixture(params=parameters(interpreter=False))
def run_large(request, monkeypatch):
    return Scan(*request.param, monkeypatch)


@pytest.fixture(params=parameters(dtype=F64))
def run_double(request, monkeypatch):
    return Scan(*request.param, monkeypatch)


COEFFICIENTS = ((1.0, 1.0), (1.0, 0.95), (0.99, 0.0), (0.0, 0.9), (0.5, 0.5), (0.9999, 1.0))


@pytest.mark.parametrize(("gamma", "lam"), COEFFICIENTS)
@pytest.mark.parametrize("shape", [(5, 37), (3, 1), (1, 300)])
def test_error_is_within_that_of_a_plain_loop(run, shape, gamma, lam):
    tensors, options = sample(*shape)
    lam = {"lam": lam} if run.has_values else {}
    assert_true(run, tensors, **options, gamma=gamma, **lam)


@pytest.mark.parametrize(("gamma", "lam"), COEFFICIENTS)
def test_double_precision_keeps_its_digits(run_double, gamma, lam):
    tensors, options = sample(4, 257, dtype=F64)
    lam = {"lam": lam} if run_double.has_values else {}
    found = assert_true(run_double, tensors, **options, gamma=gamma, **lam)
    assert found[0].dtype == F64


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
LONG = (511, 512, 513, 1023, 1025, 2049, 5000, 20011)


@pytest.mark.parametrize("T", [x for x in LENGTHS if x])
def test_every_length(run, T):
    tensors, options = sample(2, T, seed=T, keep=0.9)
    assert_true(run, tensors, **options, gamma=0.99)


@pytest.mark.parametrize("T", LONG)
def test_long_sequences(run_large, T):
    for gamma, keep in ((1.0, 1.0), (0.999, 0.6))[T > 5000 :]:
        tensors, options = sample(2, T, seed=T, keep=keep)
        assert_true(run_large, tensors, **options, gamma=gamma)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.02])
def test_packs(run, keep):
    offsets = torch.tensor([0, *SHORT]).cumsum(0).int()
    tensors, options = sample(int(offsets[-1]), keep=keep, count=len(SHORT))
    coefficients = {"gamma": torch.linspace(0, 1, len(SHORT))}
    coefficients |= {"lam": torch.linspace(1, 0.2, len(SHORT))} if run.has_values else {}
    assert_true(run, tensors, **options, cu_seqlens=offsets, **coefficients)


def test_long_packs(run_large):
    offsets = torch.tensor([0, 3, *LONG, *LENGTHS]).cumsum(0).int()
    tensors, options = sample(int(offsets[-1]), count=len(offsets) - 1)
    assert_true(run_large, tensors, **options, cu_seqlens=offsets)


@pytest.mark.parametrize("shape", [(20011, 1), (6007, 3), (1025, 40)])
def test_many_sequences(run_large, shape):
    tensors, options = sample(*shape)
    assert_true(run_large, tensors, **options, gamma=torch.linspace(0, 1, shape[0]))
