"""value_loss: every kernel against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import calls, cases, to_device
from truth import assert_budget, assert_same, gradients

from rlhf_fast import backends, ops
from rlhf_fast.ops.value_loss import value_loss_reference

KERNELS = cases("value_loss", reference=False)
REGISTERED = [c for c in KERNELS if c.values[0].backend in ("cpp", "cuda")]
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=KERNELS)
def run(request, monkeypatch):
    yield from calls("value_loss", ops.value_loss, request.param, monkeypatch)


def computes(run, dtype):
    return dtype in backends.TABLE["value_loss"][run.case.backend].dtypes


def problem(*shape, offset=0.0, seed=0):
    """fp32 values, old values, returns and a mask; NaN and infinities under the mask."""
    generator = torch.Generator().manual_seed(seed)
    values, moved, noise = torch.randn(3, *shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    tensors = (values + offset, values + offset + 0.3 * moved, values + offset + 0.5 * noise)
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).repeat(mask.numel())[: mask.numel()]
    return *(torch.where(mask, x, garbage.view(shape)) for x in tensors), mask


def results(function, tensors, dtype, upstream=1.7, **options):
    """Loss, metrics and the gradient by name, in `dtype`."""
    values, old, returns = (x.to(dtype) for x in tensors[:3])
    values.requires_grad_()
    loss, metrics = function(values, old, returns, tensors[3], **options)
    (grad,) = torch.autograd.grad(loss, values, torch.tensor(upstream, dtype=dtype))
    return {"loss": loss.detach(), **metrics, "grad": grad}


def assert_as_good(run, tensors, dtype, what="", **options):
    """The kernel's errors against those of the reference in the same precision."""
    truth = results(value_loss_reference, tensors, torch.float64, **options)
    naive = results(value_loss_reference, tensors, dtype, **options)
    for name, value in results(run, tensors, dtype, **options).items():
        assert value.dtype == dtype
        scale = 0.0 if name == "grad" else 1.0
        assert_budget(f"{name} {what}", value, truth[name], naive[name], scale=scale)
        if name == "grad":
            assert (value[~tensors[3]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [None, 0.0, 0.2])
@pytest.mark.parametrize("normalizer", [None, 37.5, torch.tensor(12.0), torch.tensor(0)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_options(run, dtype, clip, normalizer, offset):
    if computes(run, dtype):
        for shape in ((7, 45), (300,), (3, 4, 5), (1, 1)):
            tensors = problem(*shape, offset=offset)
            assert_as_good(run, tensors, dtype, f"{shape}", clip=clip, normalizer=normalizer)


@pytest.mark.parametrize("shape", [(5, 1), (5, 3), (2, 255), (3, 1029), (2, 20_003), (700, 9)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_rows_of_all_lengths(run, shape, offset):
    if run.case.device == "cpu" and run.case.backend == "triton" and shape[1] > 2000:
        shape = (shape[0], 2003)
    assert_as_good(run, problem(*shape, offset=offset), torch.float32)


def test_a_pivot_far_from_the_rest_costs_no_digits(run):
    values, old, returns, mask = problem(40, 500)
    mask[0, 0] = True
    for x in (values, old):
        x[0, 0] = 1.0
    returns[0, 0] = 1e5
    assert_as_good(run, (values, old, returns, mask), torch.float32)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4 + 0.123, -3e-5])
def test_constant_returns_have_nothing_to_explain(run, constant):
    values, old, returns, mask = problem(9, 1111, offset=1e4)
    returns = torch.where(mask, constant, returns)
    assert run(values, old, returns, mask)[1]["explained_variance"].item() == 0.0
    perfect = run(returns, returns, returns, mask)[1]["explained_variance"]
    assert perfect.item() == 0.0


@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_that_count_show_as_in_the_reference(run, operand, clip, bad):
    tensors = problem(3, 20)
    tensors[3][1, 2] = True
    for x in tensors[:3]:
        x[1, 2] = 0.25
    tensors[operand][1, 2] = bad
    want = results(value_loss_reference, tensors, torch.float32, clip=clip)
    got = results(run, tensors, torch.float32, clip=clip)
    for name, value in got.items():
        torch.testing.assert_close(
            value, want[name], equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_ties_beyond_the_bounds_give_half_the_gradient(run):
    # Clipped to 1 and -1, as far from the return 0.5 + 0.5 v as the value itself.
    values, old = torch.tensor([2.0, -2.0, 1.0, 0.5]), torch.zeros(4)
    returns = torch.tensor([1.5, -1.5, 3.0, 2.0])
    got = results(run, (values, old, returns, torch.ones(4).bool()), torch.float32, 1.0, clip=1.0)
    assert got["grad"].tolist() == [0.0625, -0.0625, -0.5, -0.375]
    assert got["value_clip_fraction"].item() == 0.0


@pytest.mark.parametrize("view", ["sliced", "expanded", "transposed", "strided"])
def test_any_strides(run, view):
    def as_view(x):
        if view == "sliced":
            return torch.nn.functional.pad(x, (3, 2))[:, 3:-2]
        if view == "expanded":
            return x[:1].expand(x.shape)
        if view == "transposed":
            return x.t().contiguous().t()
        return x.repeat_interleave(2, 1)[:, ::2]

    tensors = [as_view(x) for x in problem(6, 45)]
    dense = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
    want = results(run, dense, torch.float32)
    for name, value in results(run, tensors, torch.float32).items():
        torch.testing.assert_close(value, want[name], msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradient_does_not_depend_on_when_it_is_asked_for(run):
    values, *others = problem(7, 45)
    values.requires_grad_()
    loss, metrics = run(values, *others)
    first = gradients(loss, (values,), torch.tensor(0.7), retain_graph=True)
    assert_same("a second backward", gradients(loss, (values,), torch.tensor(0.7)), first)
    with torch.no_grad():
        again, more = run(values, *others)
    assert_same("without grad", (again, *more.values()), (loss.detach(), *metrics.values()))


def test_zero_stays_zero_whatever_comes_from_above(run):
    tensors = problem(7, 45)
    got = results(run, tensors, torch.float32, upstream=math.inf)["grad"]
    plain = results(run, tensors, torch.float32, upstream=1.0)["grad"]
    assert torch.equal(got == 0, plain == 0) and not got.isnan().any()


@pytest.mark.parametrize("case", [c for c in KERNELS if c.values[0].backend == "cpp"])
@pytest.mark.parametrize("shape", [(64, 1500), (2, 70_001), (9000, 7)])
def test_bits_do_not_depend_on_threads(case, shape):
    for tensors in (problem(*shape), [x[:, 1:] for x in problem(*shape)]):
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found = results(ops.value_loss, tensors, torch.float32, backend=case.backend)
            runs.append(tuple(found.values()))
        for other in runs[1:]:
            assert_same("threads", other, runs[0])


@pytest.mark.parametrize("case", REGISTERED)
def test_compiles_as_one_graph_for_any_length(case):
    def loss_of(values, old, returns, mask):
        loss, metrics = ops.value_loss(values, old, returns, mask, backend=case.backend)
        return 2 * loss + metrics["value_mean"]

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for length in (20, 33, 47):
        values, *others = (to_device(x, case.device) for x in problem(4, length))
        found = []
        for function in (compiled, loss_of):
            x = values.clone().requires_grad_()
            loss = function(x, *others)
            found.append((loss.detach(), *torch.autograd.grad(loss, x)))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", REGISTERED)
@pytest.mark.parametrize("shape", [(4, 9), (11,), (2, 3, 2)])
def test_registered_ops_pass_opcheck(case, shape):
    tensors = [to_device(x, case.device) for x in problem(*shape)]
    registered = torch.ops.rlhf_fast
    for normalizer, with_grad in ((None, True), (tensors[0].new_ones(()), False)):
        forward = (*tensors, normalizer, 0.0, 0.2, with_grad)
        torch.library.opcheck(registered.value_loss_forward, forward)
    loss, out, grad = registered.value_loss_forward(*tensors, None, 0.0, 0.2, True)
    torch.library.opcheck(registered.value_loss_backward, (loss, out, grad))
