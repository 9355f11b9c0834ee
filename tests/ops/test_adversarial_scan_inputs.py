"""gae and discounted_returns on broken, empty and oddly laid out input."""

from __future__ import annotations

import pytest
import torch
from loss_truth import BF16, F16, F32, F64, INF, NAN
from scan_cases import Scan, assert_true, parameters, sample
from truth import assert_budget, assert_same, gradients, leaf


@pytest.fixture(params=parameters())
def run(request, monkeypatch):
    return Scan(*request.param, monkeypatch)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_what_lies_under_the_mask_is_not_read(run, garbage):
    (rewards, values, mask), options = sample(5, 130, keep=0.5)
    mask[2], mask[3, 5:], mask[4, :-1] = False, False, False
    clean, broken = (
        run.outcome(*(x.masked_fill(~mask, fill) for x in (rewards, values)), mask, **options)
        for fill in (0, garbage)
    )
    assert_same("all", broken, clean)
    for x in broken[: 3 + run.has_values]:
        if x.shape == mask.shape:
            assert (x[~mask] == 0).all()
    assert broken[-1][2] == 0, "the bootstrap of a sequence without tokens"


def test_upstream_gradients_under_the_mask_are_not_read(run):
    tensors, options = sample(5, 70)
    mask = tensors[2]
    clean, broken = (
        run.outcome(
            *tensors,
            bootstrap=options["bootstrap"],
            upstream=[x.masked_fill(~mask, fill) for x in options["upstream"]],
        )
        for fill in (0, NAN)
    )
    assert_same("all", broken, clean)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 64, 129])
def test_what_is_broken_breaks_only_what_it_reaches(run, value, position):
    """The tokens before it in its own sequence, and no other."""
    offsets = torch.tensor([0, 40, 40, 170, 230], dtype=torch.int32)
    for which in range(1 + run.has_values):
        (rewards, values, mask), _ = sample(230, keep=0.9)
        tensors = [rewards, values, mask]
        mask[40 + position] = True
        options = {"gamma": 0.9, "cu_seqlens": offsets}
        clean = run.outcome(*tensors, **options)
        tensors[which][40 + position] = value
        broken = run.outcome(*tensors, **options)
        truth, _ = run.truth(*tensors, **options)
        for got, before, exact in zip(broken, clean, truth, strict=True):
            assert_same("not finite", [got.isfinite()], [exact.isfinite()])
            safe = exact.isfinite()
            assert safe[40 + position + 1 :].all() and safe[:40].all()
            assert_same("the rest", [got[safe]], [before[safe]])


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
    (rewards, values, mask), options = sample(3, 70)
    expected = run.outcome(rewards, values, mask, **options)
    found = run.outcome(rewards, values, MASKS[kind](mask), **options)
    assert_same(kind, found, expected)


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
    tensors, _ = sample(*shape, keep=0.9)
    tensors[2].view(-1)[0] = True
    mask, _ = look(tensors[2]), None
    bootstrap = torch.linspace(-1, 1, 15)[1::3]
    head = [leaf(x) for x in tensors[: 1 + run.has_values]]
    out = run(*map(look, head), mask, bootstrap=bootstrap, gamma=torch.linspace(0, 1, 9)[::2])
    out = out if run.has_values else (out,)
    upstream = torch.randn(2, 70, 5).transpose(1, 2)
    options = {"gamma": torch.linspace(0, 1, 9)[::2], "bootstrap": bootstrap}
    truth, scale = run.truth(*map(look, tensors[:2]), mask, **options, upstream=tuple(upstream))
    for got, exact in zip(out, truth, strict=False):
        assert_budget("result", got.detach(), exact, scale=scale[0])
    for got, exact in zip(
        gradients(out, head, upstream[-len(out) :]), truth[len(out) :], strict=False
    ):
        base = torch.zeros(shape, dtype=F64, requires_grad=True)
        (expected,) = torch.autograd.grad(look(base), base, exact)
        assert_budget("gradient", got, expected, roundings=32)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_is_fp32_of_the_same_numbers(run, dtype):
    (rewards, values, mask), options = sample(4, 33, dtype=dtype)
    wide = {
        "bootstrap": options["bootstrap"].float(),
        "upstream": [x.float() for x in options["upstream"]],
    }
    found = run.outcome(rewards, values, mask, **options)
    expected = run.outcome(rewards.float(), values.float(), mask, **wide)
    results = 1 + run.has_values
    assert all(x.dtype == F32 for x in found[:results])
    assert all(x.dtype == dtype for x in found[results:])
    assert_same("results", found[:results], expected[:results])
    assert_same("gradients", found[results:], [x.to(dtype) for x in expected[results:]])


def test_coefficients_of_any_precision(run):
    tensors, options = sample(4, 70)
    for dtype in (F16, BF16, F32, F64):
        numbers = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype)
        lam = {"lam": numbers.flip(0)} if run.has_values else {}
        assert_true(run, tensors, **options, gamma=numbers, **lam)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes(run, size):
    (rewards, values, mask), _ = sample(3, 300)
    found = run.outcome(rewards * size, values * size, mask, gamma=0.9)
    truth, scale = run.truth(rewards * size, values * size, mask, gamma=0.9)
    for got, exact in zip(found, truth, strict=True):
        assert_budget("scaled", got, exact, scale=scale[0])


@pytest.mark.parametrize("shape", [(5, 33), (2, 300)])
def test_bits_repeat(run, shape):
    tensors, options = sample(*shape)
    first = run.outcome(*tensors, **options)
    assert_same("again", run.outcome(*tensors, **options), first)
    results = first[: 1 + run.has_values]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            bare = run(*tensors[: 1 + run.has_values], tensors[2], bootstrap=options["bootstrap"])
        assert_same(mode.__name__, bare if run.has_values else (bare,), results)


BAD = {
    "rewards": [torch.zeros(3, 5).int(), torch.zeros(15), torch.zeros(())],
    "values": [torch.zeros(4, 5), torch.zeros(3, 5).int(), torch.zeros(3, 5, device="meta")],
    "mask": [torch.zeros(4, 5), torch.zeros(5), torch.zeros(3, 5, device="meta")],
    "gamma": [-0.1, 1.1, NAN, torch.zeros(4), torch.zeros(3, 5), torch.tensor([0.5, 2, 0.5])],
    "lam": [-0.1, 1.1, NAN, torch.zeros(4), torch.tensor([0.5, -0.1, 0.5])],
    "bootstrap": [
        torch.zeros(4),
        torch.zeros(3, 5),
        torch.zeros(3).int(),
        torch.zeros(3, device="meta"),
    ],
    "cu_seqlens": [torch.zeros(4).int()],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, bad in BAD.items() for i in range(len(bad))]
)
def test_bad_arguments_are_named(run, name, index):
    if not run.has_values and name in ("values", "lam"):
        return
    bad = BAD[name][index]
    values_on_gpu = isinstance(bad, torch.Tensor) and name in ("gamma", "lam") and bad.shape == (3,)
    if run.device != "cpu" and values_on_gpu:
        return  # the host does not wait for them
    names = ("rewards", "values", "mask") if run.has_values else ("rewards", "mask")
    (rewards, values, mask), _ = sample(3, 5)
    arguments = {"rewards": rewards, "values": values, "mask": mask} | {name: bad}
    if not run.has_values:
        del arguments["values"]
    head = [arguments.pop(each) for each in names]
    with pytest.raises((TypeError, ValueError), match=name):
        run(*head, **arguments, idle=True)
