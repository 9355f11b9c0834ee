"""linear_logprobs: hand-computed numbers, and every route on every backend against the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_cases import calls, cases
from linear_cases import BUDGETS, small_tiles
from linear_logprobs_cases import problem
from torch import Tensor

from rlhf_fast.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference

OP = "linear_logprobs"


# Which of hidden states, weight and bias are trained.
TRAINED = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`linear_logprobs` through one backend."""
    yield from calls(OP, linear_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, interpreter=False))
def run_long(request, monkeypatch):
    """As `run`, without what takes long."""
    yield from calls(OP, linear_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, dtype=torch.float64))
def run64(request, monkeypatch):
    """As `run`, where fp64 is computed."""
    yield from calls(OP, linear_logprobs, request.param, monkeypatch)


def test_two_token_head_by_hand(run) -> None:
    hidden, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    options = {"bias": torch.tensor([0.5, 0.0]), "logit_scale": 2.0, "temperature": 4.0}
    logprobs, entropy = run(hidden, weight, torch.tensor([0, 1]), **options)
    # Logits (1.5, 2) and (3.5, 4), times 2 / 4: the second token leads by 1/4 in both rows.
    p = 1 / (1 + math.exp(-0.25))
    assert logprobs.tolist() == pytest.approx([math.log(1 - p), math.log(p)], rel=1e-6)
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert entropy.tolist() == pytest.approx([h, h], rel=1e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_output_passes_gradcheck_alone(
    run64, output: int, memory_budget: int | None, frozen: bool
) -> None:
    hidden, weight, bias, tokens = problem()
    options = {"temperature": torch.linspace(0.5, 2.0, 8), "softcap": 3.0, "logit_scale": -0.5}
    options["memory_budget"] = memory_budget

    others = (weight.detach(), bias.detach())

    def op(h: Tensor, *trained: Tensor) -> Tensor:
        w, b = trained or others
        return run64(h, w, tokens, bias=b, **options)[output]

    assert torch.autograd.gradcheck(op, hidden if frozen else (hidden, weight, bias))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("memory_budget", [0, 200, 600, None])
@pytest.mark.parametrize("upstream_of", ["logprobs", "entropy", "both"])
def test_every_route_agrees_with_the_formula(
    run, trained: tuple[int, ...], memory_budget: int | None, upstream_of: str
) -> None:
    *inputs, tokens = problem(rows=12, dtype=torch.float32)
    upstream = torch.randn(2, 12)
    upstream[:, 4:9] = 0.0  # a whole chunk without an upstream gradient, and more
    upstream[1 if upstream_of == "logprobs" else 0] *= upstream_of == "both"
    temperature = torch.rand(12) + 0.5

    def results(function: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        hidden, weight, bias = (
            x.detach().to(dtype).requires_grad_(bool(t))
            for x, t in zip(inputs, trained, strict=True)
        )
        outputs = function(hidden, weight, tokens, bias=bias, temperature=temperature, **options)
        used = {"logprobs": [0], "entropy": [1], "both": [0, 1]}[upstream_of]
        loss = sum((upstream[i] * outputs[i]).sum() for i in used)
        leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    expected = results(linear_logprobs_reference, torch.float64)
    got = results(run, torch.float32, memory_budget=memory_budget)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("frozen", [False, True])
def test_no_bit_depends_on_grad_mode_budget_or_the_run(run_long, frozen: bool) -> None:
    hidden, weight, bias, tokens = problem(rows=20, dtype=torch.bfloat16)
    leaves = (hidden,) if frozen else (hidden, weight, bias)
    weight, bias = weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    with torch.no_grad():
        want = run_long(hidden, weight, tokens, bias=bias)
    for memory_budget in BUDGETS:
        grads = []
        for _ in range(2):
            got = run_long(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            loss = (torch.linspace(-1, 2, 20) * got[0]).sum()
            grads.append(torch.autograd.grad(loss, leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", BUDGETS)
def test_a_second_backward_repeats_the_first(run, memory_budget: int | None) -> None:
    hidden, weight, bias, tokens = problem(dtype=torch.float32)
    outputs = run(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
    loss = (outputs[0] * torch.randn(8) - outputs[1]).sum()
    first, second = (
        torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("margin", [12.0, 30.0, 60.0])
@pytest.mark.parametrize("memory_budget", [0, 16, 10**12])
@pytest.mark.usefixtures("tiles")
def test_a_confident_token_keeps_the_bits_of_its_gradient(
    run, margin: float, memory_budget: int
) -> None:
    # The head is the identity: d logp / d hidden is d logp / d logits.
    hidden = torch.zeros(1, 7).index_fill(1, torch.tensor([5]), margin).requires_grad_()
    logprobs, _ = run(hidden, torch.eye(7), torch.tensor([5]), memory_budget=memory_budget)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    s = 6 * math.exp(-margin)
    assert logprobs.item() == pytest.approx(-math.log1p(s), rel=5e-6, abs=0)
    assert grad[0, 5].item() == pytest.approx(s / (1 + s), rel=5e-6, abs=0)
    assert grad[0, 0].item() == pytest.approx(-s / 6 / (1 + s), rel=5e-6, abs=0)


@pytest.mark.parametrize("memory_budget", [0, None])
def test_weight_gradient_is_summed_in_fp32(
    run_long, monkeypatch: pytest.MonkeyPatch, memory_budget: int | None
) -> None:
    small_tiles(monkeypatch, 2, 32)
    hidden, weight, bias, tokens = problem(64, 16, 31, torch.bfloat16)
    upstream = torch.randn(64)

    def gradients(function: Any, h: Tensor, w: Tensor, b: Tensor, **options: Any) -> Any:
        logprobs, entropy = function(h, w, tokens, bias=b, **options)
        return torch.autograd.grad((upstream * (logprobs + entropy)).sum(), (h, w, b))

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    truth = gradients(linear_logprobs_reference, *wide)
    got = gradients(run_long, hidden, weight, bias, memory_budget=memory_budget)
    for one, want in zip(got, truth, strict=True):
        assert one.dtype == torch.bfloat16
        # One rounding of the sum to bf16 (2^-8 of it at most); on a GPU one of each factor, too.
        factor = 2**-8 if run_long.case.device == "cpu" else 2**-6
        assert ((one - want).abs() <= factor * want.abs() + 1e-3 * want.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_errors_stay_within_those_of_naive_pytorch(
    run, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, frozen: bool
) -> None:
    rows, dim, vocab = 24, 64, 257
    small_tiles(monkeypatch, 7, 64)
    hidden, weight, _, tokens = problem(rows, dim, vocab, dtype)
    live = (tokens != -100).nonzero().squeeze(1)
    upstream = torch.randn(2, rows)

    def results(h: Tensor, w: Tensor, ours: bool) -> list[Tensor]:
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(not frozen)
        if ours:
            outputs = run(h, w, tokens, memory_budget=rows * dim * 4)
        else:
            logp = (h @ w.T).log_softmax(-1)
            chosen = logp.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
            outputs = (chosen, -(logp.exp() * logp).sum(-1))
        lp, ent = outputs[0][live], outputs[1][live]
        weights = upstream[:, live].to(lp.dtype)
        loss = (weights[0] * lp).sum() + (0.0 if frozen else (weights[1] * ent).sum())
        grads = torch.autograd.grad(loss, (h,) if frozen else (h, w))
        return [t.detach().double() for t in (lp, ent, *grads)]

    truth = results(hidden.double(), weight.double(), ours=False)
    got, naive = results(hidden, weight, ours=True), results(hidden, weight, ours=False)
    eps = torch.finfo(torch.float32).eps
    for want, a, b in zip(truth, got, naive, strict=True):
        assert (a - want).abs().max() <= (b - want).abs().max() + 4 * eps * want.abs().max()


def test_strided_inputs_and_mixed_dtypes(run) -> None:
    hidden = torch.randn(8, 12, dtype=torch.bfloat16).T[::2]
    weight, tokens = torch.randn(8, 9).T, torch.randint(0, 9, (6, 2))[:, 1]
    got = run(hidden, weight, tokens)
    torch.testing.assert_close(got, linear_logprobs_reference(hidden.float(), weight, tokens))
