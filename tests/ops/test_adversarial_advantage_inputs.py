"""ppo_advantages on broken, empty and oddly laid out input."""

from __future__ import annotations

import pytest
import torch
from advantage_cases import HEAD, OPTIONS, OUTPUTS, assert_true, sample
from backend_cases import cases
from loss_truth import BF16, EPS, F16, F32, INF, NAN, LossRunner, sequences
from scan_truth import ppo_truth
from truth import assert_budget, assert_same

from rlhf_fast.ops import ppo_advantages


@pytest.fixture(params=cases("ppo_advantages"))
def run(request, monkeypatch):
    return LossRunner(ppo_advantages, request.param, monkeypatch)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("kind", ["plain", "VAPO", "raw"])
def test_what_lies_under_the_mask_is_not_read(run, kind, garbage):
    tensors = sample(5, 70, keep=0.5)
    scores, *_, mask = tensors
    mask[2], mask[3, 5:], mask[4, :-1] = False, False, False
    clean, broken = (
        run(
            scores.index_fill(0, torch.tensor([2]), fill),
            *(x.masked_fill(~mask, fill) for x in tensors[1:4]),
            mask,
            kl_coef=0.1,
            **OPTIONS[kind],
        )
        for fill in (0, garbage)
    )
    assert_same("all", broken, clean)
    assert all((x[~mask] == 0).all() for x in broken)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_without_a_coefficient_no_logprob_is_read(run, garbage):
    tensors = sample(3, 37)
    expected = run(*tensors, kl_coef=0.0)
    assert_same("None", run(*tensors[:2], None, *tensors[3:], kl_coef=0.0), expected)
    tensors[2].fill_(garbage)
    assert_same("broken reference", run(*tensors, kl_coef=0.0), expected)
    tensors[1].fill_(garbage)
    assert_same("broken policy", run(*tensors, kl_coef=0.0), expected)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_what_is_broken_breaks_only_what_it_reaches(run, which, value):
    offsets = torch.tensor([0, 40, 40, 170, 230], dtype=torch.int32)
    tensors = sample(230, keep=0.9, count=4)
    tensors[4][140] = True
    options = {"gamma": 0.9, "cu_seqlens": offsets, "whiten": False, "kl_coef": 0.1}
    clean = run(*tensors, **options)
    tensors[which][2 if which == 0 else 140] = value
    broken, truth = run(*tensors, **options), ppo_truth(*tensors, **options)
    for name, got, before, exact in zip(OUTPUTS, broken, clean, truth[:3], strict=True):
        assert_same(f"{name}: not finite", [got.isfinite()], [exact.isfinite()])
        safe = exact.isfinite()
        assert safe[:40].all() and safe[170:].all()
        assert_same(name, [got[safe]], [before[safe]])


@pytest.mark.parametrize("new", [-INF, -1e30, -1.0])
@pytest.mark.parametrize("ref", [-INF, -1e30, -1.0])
def test_infinite_logprobs_are_what_the_reference_says(run, new, ref):
    tensors = sample(3, 37, keep=1.0)
    tensors[1][1, 5], tensors[2][1, 5] = new, ref
    for whiten in (False, True):
        options = {"kl_coef": 0.1, "whiten": whiten}
        found, expected = (
            run(*tensors, **options),
            ppo_advantages(*tensors, **options, backend="reference"),
        )
        torch.testing.assert_close(found, expected, rtol=64 * EPS, atol=64 * EPS, equal_nan=True)


MASKS = {
    "uint8 255": lambda m: m.to(torch.uint8) * 255,
    "int8 -1": lambda m: -m.to(torch.int8),
    "int32 256": lambda m: m.int() * 256,
    "int64 2**32": lambda m: m.long() * 2**32,
    "half least": lambda m: m.half() * 6e-8,
    "float -0.0": lambda m: torch.where(m, 1e-30, -0.0),
    "double 1e-300": lambda m: m.double() * 1e-300,
}


@pytest.mark.parametrize("kind", MASKS)
def test_any_nonzero_in_the_mask_counts(run, kind):
    tensors = sample(3, 70)
    options = {"kl_coef": 0.1, "adaptive_lam": 0.1}
    expected = run(*tensors, **options)
    assert_same(kind, run(*tensors[:4], MASKS[kind](tensors[4]), **options), expected)


VIEWS = {
    "transposed": ((70, 5), lambda x: x.t()),
    "every third": ((5, 210), lambda x: x[:, 1::3]),
    "inner": ((7, 77), lambda x: x[1:-1, 3:-4]),
    "inner transposed": ((73, 7), lambda x: x[1:-2, 1:-1].t()),
    "expanded rows": ((1, 70), lambda x: x.expand(5, -1)),
    "expanded columns": ((5, 1), lambda x: x.expand(-1, 70)),
    "one element": ((1, 1), lambda x: x.expand(5, 70)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(run, view):
    shape, look = VIEWS[view]
    tensors = sample(*shape, keep=0.9)
    tensors[4].view(-1)[0] = True
    tensors = [torch.linspace(-1, 1, 15)[1::3], *map(look, tensors[1:])]
    options = {"gamma": torch.linspace(0, 1, 9)[::2], "lam": torch.tensor(0.5).expand(5)}
    options |= {"finished": torch.arange(15)[::3] % 2, "missing_eos_penalty": 0.5}
    assert_true(run, tensors, **options, whiten=False)
    assert_true(run, tensors, **options, value_lam=torch.linspace(0, 1, 9)[::2])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_is_fp32_of_the_same_numbers(run, dtype):
    *tensors, mask = sample(4, 70, dtype=dtype)
    found = run(*tensors, mask, kl_coef=0.1)
    assert all(x.dtype == F32 for x in found)
    assert_same("all", found, run(*(x.float() for x in tensors), mask, kl_coef=0.1))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 5), (1, 1)])
def test_nothing_that_counts(run, shape):
    tensors = [x.fill_(NAN) for x in sample(*shape)[:4]]
    for kind, options in OPTIONS.items():
        found = run(*tensors, torch.zeros(shape), **{"kl_coef": 0.1, **options}, idle=True)
        assert all(x.shape == shape and (x == 0).all() for x in found), kind


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0, 0]])
def test_empty_packs(run, offsets):
    tensors = sample(0, count=len(offsets) - 1)
    options = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32), "kl_coef": 0.1}
    for found in run(*tensors, **options, idle=True):
        assert found.shape == (0,) and found.dtype == F32


def test_bits_repeat_and_inputs_stay(run):
    tensors = sample(5, 130)
    for x in tensors[:4]:
        x.requires_grad_()
    versions, before = [x._version for x in tensors], [x.detach().clone() for x in tensors]
    first = run(*tensors, kl_coef=0.1, value_lam=1.0)
    assert not any(x.requires_grad for x in first)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(mode.__name__, run(*tensors, kl_coef=0.1, value_lam=1.0), first)
    assert_same("inputs", [x.detach() for x in tensors], before)
    assert versions == [x._version for x in tensors]


def test_order_and_padding_of_sequences_do_not_matter(run):
    tensors = sample(5, 37)
    rows = sequences(tensors[4])
    assert all(rows)
    order = torch.tensor([3, 0, 4, 2, 1])
    found = run(*tensors, kl_coef=0.1, whiten=False)
    wide = [torch.nn.functional.pad(x[order], (3, 70)) for x in tensors[1:]]
    again = run(tensors[0][order], *wide, kl_coef=0.1, whiten=False)
    for name, one, other in zip(OUTPUTS, again, found, strict=True):
        assert_budget(name, one[:, 3:-70], other[order].double(), roundings=16)


T, META = torch.zeros(4, 5), torch.zeros(3, 5, device="meta")
BAD = {
    "scores": [
        torch.zeros(4),
        torch.zeros(3, 5),
        torch.zeros(3).int(),
        torch.zeros(3, device="meta"),
    ],
    "logprobs": [T, torch.zeros(3, 5).int(), torch.zeros(15)],
    "ref_logprobs": [T, torch.zeros(3, 5).int(), None, META],
    "values": [T, torch.zeros(3, 5).int(), torch.zeros(3), META],
    "mask": [T, torch.zeros(5), META],
    "kl_coef": [NAN, -0.1],
    "gamma": [-0.1, 1.1, NAN, torch.zeros(4)],
    "lam": [-0.1, 1.1, NAN, torch.zeros(4)],
    "value_lam": [-0.1, 1.1, NAN, torch.zeros(4)],
    "adaptive_lam": [0.0, -0.05, NAN],
    "missing_eos_penalty": [1.0],  # without `finished`
    "finished": [torch.zeros(4), torch.zeros(3, 5), torch.zeros(3, device="meta")],
    "cu_seqlens": [torch.zeros(4).int()],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, bad in BAD.items() for i in range(len(bad))]
)
def test_bad_arguments_are_named(run, name, index):
    arguments = dict(zip(HEAD, sample(3, 5), strict=True)) | {"kl_coef": 0.1}
    arguments |= {"missing_eos_penalty": 1.0} if name == "finished" else {}
    arguments |= {name: BAD[name][index]}
    head = [arguments.pop(each) for each in HEAD]
    with pytest.raises((TypeError, ValueError), match=name):
        run(*head, **arguments, idle=True)
