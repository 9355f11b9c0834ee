"""value_loss: layouts, masks, normalisers, autograd and refusals."""

from __future__ import annotations

import pytest
import torch
from backend_cases import cases
from loss_truth import BF16, EPS, F16, F32, F64, INF, NAN, LossRunner
from truth import assert_budget, assert_same, gradients, leaf
from value_loss_cases import assert_true, flat, outcome, sample, value_truth

from rlhf_fast.ops import value_loss


@pytest.fixture(params=cases("value_loss"))
def run(request, monkeypatch):
    return LossRunner(value_loss, request.param, monkeypatch)


MASKS = {
    "uint8 255": lambda m: m.to(torch.uint8) * 255,
    "int8 -1": lambda m: -m.to(torch.int8),
    "int32 256": lambda m: m.int() * 256,
    "int64 2**32": lambda m: m.long() * 2**32,
    "half least": lambda m: m.half() * 6e-8,
    "bfloat16 -0.5": lambda m: m.bfloat16() * -0.5,
    "float -0.0": lambda m: torch.where(m, 1e-30, -0.0),
    "double 1e-300": lambda m: m.double() * 1e-300,
}


@pytest.mark.parametrize("kind", MASKS)
def test_any_nonzero_in_the_mask_counts(run, kind):
    *tensors, mask = sample(3, 21)
    expected = outcome(run, *tensors, mask)
    assert_same(kind, flat(outcome(run, *tensors, MASKS[kind](mask))), flat(expected))


VIEWS = {
    "transposed": ((19, 5), lambda x: x.t()),
    "every second": ((5, 38), lambda x: x[:, ::2]),
    "inner": ((7, 26), lambda x: x[1:-1, 3:-4]),
    "inner transposed": ((22, 7), lambda x: x[1:-2, 1:-1].t()),
    "expanded rows": ((1, 19), lambda x: x.expand(5, -1)),
    "expanded columns": ((5, 1), lambda x: x.expand(-1, 19)),
    "one element": ((1, 1), lambda x: x.expand(5, 19)),
    "permuted": ((19, 5, 3), lambda x: x.permute(1, 2, 0)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(run, view):
    shape, look = VIEWS[view]
    bases = sample(*shape, keep=0.9)
    bases[3].view(-1)[0] = True
    bases[0].requires_grad_()
    tensors = [look(x) for x in bases]
    loss, metrics = run(*tensors)
    truth = value_truth(*tensors)
    assert_budget("loss", loss.detach(), truth.loss, scale=truth.scale["loss"])
    for name, value in metrics.items():
        assert_budget(name, value, truth.metrics[name], scale=truth.scale[name])
    base = torch.zeros(shape, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(look(base), base, truth.gradients["values"])
    assert_budget("d values", *torch.autograd.grad(loss, bases[0]), expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_is_fp32_of_the_same_numbers(run, dtype):
    *tensors, mask = sample(4, 33, dtype=dtype)
    got = outcome(run, *tensors, mask, upstream=-1.7)
    expected = outcome(run, *(x.float() for x in tensors), mask, upstream=-1.7)
    assert got[0].dtype == F32 and got[2].dtype == dtype
    assert_same("all", flat(got), [*flat(expected)[:-1], expected[2].to(dtype)])


def test_micro_batches_add_up(run):
    tensors = sample(6, 19)
    tensors[3][3] = False
    count = tensors[3].sum()
    truth = value_truth(*tensors, normalizer=count)
    whole = outcome(run, *tensors, normalizer=count)
    assert_same("the count itself", flat(outcome(run, *tensors)), flat(whole))
    slices = (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6))
    parts = [outcome(run, *(x[rows] for x in tensors), normalizer=count) for rows in slices]
    added = sum(part[0].double() for part in parts).float()
    assert_budget("loss", added, truth.loss, scale=truth.scale["loss"])
    assert_same("d values", [torch.cat([part[2] for part in parts])], [whole[2]])
    for name in ("value_clip_fraction", "value_mean", "return_mean"):
        added = sum(part[1][name].double() for part in parts).float()
        assert_budget(name, added, truth.metrics[name], scale=truth.scale[name])
    for rows, part in zip(slices, parts, strict=True):
        alone = value_truth(*(x[rows] for x in tensors), normalizer=count)
        name = "explained_variance"
        assert_budget(name, part[1][name], alone.metrics[name], scale=alone.scale[name])


def test_normalizers(run):
    tensors = sample(4, 17)
    number = outcome(run, *tensors, normalizer=96)
    for dtype in (F16, BF16, F32, F64, torch.int32, torch.int64):
        again = outcome(run, *tensors, normalizer=torch.tensor(96, dtype=dtype))
        torch.testing.assert_close(flat(again), flat(number), rtol=2 * EPS, atol=0)
    for normalizer in (1e-3, 1e9, torch.tensor(0), torch.tensor(0.0, dtype=BF16)):
        assert_true(run, *tensors, normalizer=normalizer)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 5), (1,), (2, 0, 3)])
def test_nothing_that_counts(run, shape):
    tensors = [torch.full(shape, NAN) for _ in range(3)]
    for options in ({}, {"clip": None}, {"normalizer": 7}, {"normalizer": torch.tensor(0)}):
        mask = torch.zeros(shape)
        loss, metrics, d_values = outcome(run, *tensors, mask, **options, idle=True)
        assert loss == 0 and loss.dtype == F32 and (d_values == 0).all()
        assert all(value == 0 for value in metrics.values()), metrics


@pytest.mark.parametrize("shape", [(4, 129), (7,)])
def test_permutation_and_padding_do_not_matter(run, shape):
    tensors = sample(*shape, keep=0.9)
    loss, metrics, d_values = outcome(run, *tensors)
    order = torch.randperm(shape[-1])
    padded = [torch.nn.functional.pad(x[..., order], (3, 70)) for x in tensors]
    again = outcome(run, *padded)
    scale = value_truth(*tensors).scale
    assert_budget("loss", again[0], loss.double(), roundings=4)
    assert_same("gradient", [again[2][..., 3:-70]], [d_values[..., order]])
    for name, value in metrics.items():
        assert_budget(name, again[1][name], value.double(), roundings=4, scale=scale[name])


@pytest.mark.parametrize("size", [1e-20, 1e-10, 1e10, 1e18])
def test_sizes(run, size):
    """The loss scales with the square, the explained variance not at all."""
    values, old_values, returns, mask = sample(5, 33)
    tensors = (values * size, old_values * size, returns * size, mask)
    loss, metrics, d_values = outcome(run, *tensors, clip=0.2 * size)
    truth = value_truth(*tensors, clip=0.2 * size)
    torch.testing.assert_close(loss.double(), truth.loss, rtol=16 * EPS, atol=2e-45)
    torch.testing.assert_close(d_values.double(), truth.gradients["values"], rtol=16 * EPS, atol=0)
    if 1e-18 < size < 1e18:
        got, expected = metrics["explained_variance"], truth.metrics["explained_variance"]
        assert abs(got - expected) < 16 * EPS


def test_gradients_reach_the_values_alone_and_twice(run):
    *tensors, mask = sample(4, 17)
    leaves = [leaf(x) for x in tensors]
    loss, _ = run(*leaves, mask)
    upstream = torch.tensor(-1.3)
    first = gradients(loss, leaves[:1], upstream, retain_graph=True)
    assert_budget(
        "d values", first[0], value_truth(*tensors, mask, upstream=-1.3).gradients["values"]
    )
    kept = [x.clone() for x in first]
    assert_same("twice", gradients(loss, leaves[:1], upstream, retain_graph=True), kept)
    other = gradients(loss, leaves[:1], torch.tensor(0.0), retain_graph=True)
    assert (other[0] == 0).all()
    assert_same("not overwritten", first, kept)
    for found in torch.autograd.grad(loss, leaves[1:], allow_unused=True):
        assert found is None or (found == 0).all()
    loss, _ = run(tensors[0], *leaves[1:], mask)
    if loss.requires_grad:
        for found in torch.autograd.grad(loss, leaves[1:], allow_unused=True):
            assert found is None or (found == 0).all()


@pytest.mark.parametrize("shape", [(5, 33), (2000,)])
def test_bits_do_not_depend_on_grad_mode_or_the_run(run, shape):
    tensors = sample(*shape)
    first = outcome(run, *tensors)
    assert_same("again", flat(outcome(run, *tensors)), flat(first))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, metrics = run(*tensors)
        assert_same(mode.__name__, [loss, *metrics.values()], flat(first)[:-1])


def test_second_derivatives_are_right_or_refused(run):
    values, old_values, returns, mask = sample(3, 17)
    values = leaf(values)
    loss, _ = run(values, old_values, returns, mask)
    if run.backend != "reference":
        with pytest.raises(RuntimeError, match="differentiable once, so create_graph=True"):
            torch.autograd.grad(loss, values, create_graph=True)
        return
    (first,) = torch.autograd.grad(loss, values, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), values)
    expected = (
        value_truth(values, old_values, returns, mask).gradients["values"] != 0
    ) / mask.sum().double()
    assert_budget("second", second, expected)


T, META = torch.zeros(4, 5), torch.zeros(3, 5, device="meta")
BAD = {
    "values": [torch.zeros(3, 5).int(), T, torch.zeros(15)],
    "old_values": [torch.zeros(3, 5).int(), T, torch.zeros(5), META],
    "returns": [torch.zeros(3, 5).long(), T, torch.zeros(3, 1), META],
    "mask": [T, torch.zeros(5), torch.zeros(3, 1), META],
    "clip": [-0.1, NAN, -INF],
    "normalizer": [0, -1.0, NAN, torch.ones(1), torch.ones(3, 5)],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, bad in BAD.items() for i in range(len(bad))]
)
def test_bad_arguments_are_named(run, name, index):
    names = ("values", "old_values", "returns", "mask")
    arguments = dict(zip(names, sample(3, 5), strict=True)) | {name: BAD[name][index]}
    head = [arguments.pop(each) for each in names]
    with pytest.raises((TypeError, ValueError), match=name):
        run(*head, **arguments, idle=True)
