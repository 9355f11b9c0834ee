"""linear_kl: which products it multiplies, what memory it takes, which rows it leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_cases import calls, cases
from linear_cases import BUDGETS, Watch, small_tiles, transparent
from linear_kl_cases import of, problem
from torch import Tensor

from rlhf_fast.ops import _kl_tiles, _plan, count_products
from rlhf_fast.ops.linear_kl import linear_kl, linear_kl_reference


@pytest.fixture(params=cases("linear_kl"))
def run(request, monkeypatch):
    """`linear_kl` through one backend."""
    yield from calls("linear_kl", linear_kl, request.param, monkeypatch)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("trained", "memory_budget", "live", "products"),
    [
        ((1, 1, 1), 0, 8, 6),  # 2 + 4 r
        ((1, 1, 1), 0, 2, 3),
        ((1, 1, 1), 10**12, 8, 4),  # 2 + 2 r
        ((1, 1, 1), 10**12, 4, 3),
        ((1, 0, 0), 0, 8, 5),
        ((1, 0, 0), 10**12, 8, 3),
        ((1, 0, 0), 8 * 4 * 4, 8, 4),  # what the forward summed
        ((1, 0, 0), 8 * 4 * 4, 0, 4),
        ((0, 0, 0), None, 8, 2),
    ],
)
def test_products_are_those_of_the_plan_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
    trained: tuple[int, ...],
    memory_budget: int | None,
    live: int,
    products: float,
) -> None:
    transparent(monkeypatch)
    policy = [
        x.detach().requires_grad_(bool(t))
        for x, t in zip(problem(dtype=torch.float32)[:3], trained, strict=True)
    ]
    ref = [x.detach() + 0.5 for x in policy]
    upstream = (torch.arange(8) < live).float()
    with count_products() as counted, Watch() as watch:
        kl = of(linear_kl, [*policy, *ref], memory_budget=memory_budget)
        if any(trained):
            (upstream * kl).sum().backward()
    assert counted.flops == products * 2 * 8 * 4 * 11
    assert watch.products == counted.calls


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    small_tiles(monkeypatch, 8, 128)
    transparent(monkeypatch)
    inputs = problem(64, 1000, torch.bfloat16)
    inputs = [x.requires_grad_(i == 0 or not frozen) for i, x in enumerate(inputs)]
    with Watch() as watch:
        kl = of(linear_kl, inputs, memory_budget=4 * 64 * 8, backend="reference")
        kl.sum().backward()
    assert inputs[0].grad is not None
    # A tile, the statistics stacked, the weight's gradient.
    assert watch.elements <= max(8 * 128, 1000 * 4)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", BUDGETS)
def test_live_rows_are_the_only_ones_that_count(run, memory_budget: int | None) -> None:
    inputs = problem(rows=9, dtype=torch.float32)
    live = torch.tensor([0, 1, 4, 8])
    with torch.no_grad():
        inputs[0][2] = inputs[3][5] = math.nan
    kl = of(run, inputs, live_rows=live, memory_budget=memory_budget)
    alone = [x[live] if i in (0, 3) else x for i, x in enumerate(inputs)]
    torch.testing.assert_close(kl[live], of(linear_kl_reference, alone))
    assert kl.count_nonzero() == 4
    grads = torch.autograd.grad(kl.sum(), inputs)
    assert all(g.isfinite().all() for g in grads) and grads[0].any(dim=1).sum() == 4


def test_rows_without_a_gradient_may_hold_nan_and_a_head_may_be_shared() -> None:
    hidden, weight, bias, *_ = problem(rows=6, dtype=torch.float32)
    ref_hidden, upstream = torch.randn(6, 4), torch.randn(6)
    upstream[2] = 0.0
    with torch.no_grad():
        hidden[2] = math.nan

    def op(hidden: Tensor, weight: Tensor, ref_hidden: Tensor) -> Tensor:
        kl = linear_kl(hidden, weight, ref_hidden, weight, bias=bias, ref_bias=bias)
        return (upstream * kl.where(upstream != 0, 0.0)).sum()

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(hidden, weight, ref_hidden), (hidden, weight, bias))
        for f in (op, compiled)
    ]
    assert all(g.isfinite().all() for g in grads[0])
    torch.testing.assert_close(*grads)


def test_empty_batch_can_still_be_differentiated() -> None:
    inputs = problem(rows=0)
    kl = of(linear_kl, inputs)
    assert kl.shape == (0,)
    grads = torch.autograd.grad(kl.sum(), inputs)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("case", cases("linear_kl", interpreter=False))
@pytest.mark.parametrize("memory_budget", [None, 10**9])
def test_compiles_as_one_graph(case, memory_budget: int | None) -> None:
    inputs = [x.detach().to(case.device).requires_grad_() for x in problem(dtype=torch.float32)]

    def op(*tensors: Tensor) -> Tensor:
        return of(linear_kl, tensors, memory_budget=memory_budget, backend=case.backend)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        kl = function(*inputs)
        return kl, *torch.autograd.grad(kl.square().sum(), inputs)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled), gradients(op), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "kept_tiles", [0, 2]
)  # full ones without gaps: all of the buffer is written
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(1, 0, 1, 0, 1, 0), (1, 0, 0, 0, 0, 0), (0, 1, 0, 1, 0, 1)])
def test_registered_ops_pass_opcheck(
    kept_tiles: int, dtype: torch.dtype, needs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "STRIDE_MULTIPLE", 1)
    inputs = [x.detach() for x in problem(dtype=dtype)]
    options = (None, 0.7, 0.0, 1.0, dtype, kept_tiles)
    forward = (*inputs, *options, False, "reference")
    torch.library.opcheck(_kl_tiles.forward, forward)
    kl, stats, kept, _ = _kl_tiles.forward(*forward)
    backward = (kl, *inputs, stats, kept, *options, True, list(map(bool, needs)), "reference")
    torch.library.opcheck(_kl_tiles.backward, backward)
