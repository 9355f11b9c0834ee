"""linear_logprobs: which products it multiplies, what memory it takes, which rows it leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_cases import calls, cases
from linear_cases import BUDGETS, Watch, small_tiles, transparent
from linear_logprobs_cases import problem

from rlhf_fast.ops import count_products
from rlhf_fast.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference


@pytest.fixture(params=cases("linear_logprobs"))
def run(request, monkeypatch):
    """`linear_logprobs` through one backend."""
    yield from calls("linear_logprobs", linear_logprobs, request.param, monkeypatch)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("trained", "memory_budget", "live", "entropy", "products"),
    [
        ((1, 1, 1), 0, 8, True, 4),  # 1 + 3 r
        ((1, 1, 1), 0, 4, True, 2.5),
        ((1, 1, 1), 0, 0, True, 1),
        ((1, 1, 1), 10**12, 8, True, 3),  # 1 + 2 r
        ((1, 1, 1), 10**12, 2, True, 1.5),
        ((1, 0, 0), 0, 8, False, 3),  # 1 + 2 r
        ((1, 0, 0), 0, 2, True, 1.5),
        ((1, 0, 0), 10**12, 8, True, 2),  # 1 + r
        ((1, 0, 0), 10**12, 4, True, 1.5),
        ((1, 0, 0), 8 * 4 * 4, 8, False, 2),  # what the forward summed is enough
        ((1, 0, 0), 8 * 4 * 4, 2, False, 2),
        ((1, 0, 0), 8 * 4 * 4, 8, True, 4),  # but not for the entropy
        ((0, 0, 1), 0, 8, True, 2),
        ((0, 0, 0), None, 8, True, 1),
    ],
)
def test_products_are_those_of_the_plan_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
    trained: tuple[int, ...],
    memory_budget: int | None,
    live: int,
    entropy: bool,
    products: float,
) -> None:
    transparent(monkeypatch)
    *inputs, tokens = problem(dtype=torch.float32)
    hidden, weight, bias = (
        x.detach().requires_grad_(bool(t)) for x, t in zip(inputs, trained, strict=True)
    )
    upstream = (torch.arange(8) < live).float()
    with count_products() as counted, Watch() as watch:
        outputs = linear_logprobs(
            hidden, weight, tokens.clamp(min=0), bias=bias, memory_budget=memory_budget
        )
        if any(trained):
            loss = (upstream * (outputs[0] + outputs[1] if entropy else outputs[0])).sum()
            loss.backward()
    assert counted.flops == products * 2 * 8 * 4 * 11
    assert watch.products == counted.calls


def test_counters_nest_and_stop() -> None:
    hidden, weight, _, tokens = problem()
    with count_products() as outer:
        linear_logprobs(hidden, weight, tokens)
        with count_products() as inner:
            linear_logprobs(hidden, weight, tokens)
    linear_logprobs(hidden, weight, tokens)
    assert outer.flops == 2 * inner.flops > 0 and outer.calls == 2 * inner.calls


@pytest.mark.parametrize("budget", [0, 4 * 64 * 8])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_is_as_large_as_the_logits(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, budget: int
) -> None:
    small_tiles(monkeypatch, 8, 128)
    transparent(monkeypatch)
    hidden, weight, bias, tokens = problem(64, 8, 1000, torch.bfloat16)
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    with Watch() as watch:
        outputs = linear_logprobs(
            *(hidden, weight, tokens), bias=bias, memory_budget=budget, backend="reference"
        )
        loss = outputs[0] if frozen else outputs[0] - 0.1 * outputs[1]
        loss.sum().backward()
    assert hidden.grad is not None
    assert watch.elements <= max(8 * 128, 1000 * 8 * (not frozen))  # a tile; the weight's gradient


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize("by_rows", [False, True])
def test_rows_left_out_are_zero_without_gradient_even_if_nan(
    run, memory_budget: int | None, by_rows: bool
) -> None:
    hidden, weight, _, tokens = problem(rows=20, dtype=torch.float32)
    tokens = tokens.clamp(min=0)
    out = torch.arange(20) % 3 == 1
    with torch.no_grad():
        hidden[out] = math.nan
    options: dict[str, Any] = {"memory_budget": memory_budget}
    if by_rows:
        tokens[out] = 10**6  # never read
        with torch.no_grad():
            hidden[0] = math.nan  # among the rows that count, but ignored
        tokens[0], out[0] = -100, True
        options["live_rows"] = torch.cat([torch.tensor([0]), (~out).nonzero().squeeze(-1)])
    else:
        tokens[out] = -100
    logprobs, entropy = run(hidden, weight, tokens, **options)
    assert logprobs[out].abs().max() == 0 and entropy[out].abs().max() == 0
    alone = linear_logprobs_reference(hidden[~out], weight, tokens[~out])
    torch.testing.assert_close((logprobs[~out], entropy[~out]), alone)
    grads = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    assert grads[0][out].abs().max() == 0 and grads[0][~out].abs().min() > 0
    assert grads[0].isfinite().all() and grads[1].isfinite().all()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("memory_budget", [0, None])
def test_no_live_row_gives_zeros_that_can_still_be_differentiated(
    rows: int, memory_budget: int | None
) -> None:
    hidden, weight, bias, _ = problem(rows=rows)
    tokens = torch.full((rows,), -100)
    outputs = linear_logprobs(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
    assert all(torch.equal(o, torch.zeros(rows, dtype=torch.float64)) for o in outputs)
    grads = torch.autograd.grad((outputs[0] + outputs[1]).sum(), (hidden, weight, bias))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
