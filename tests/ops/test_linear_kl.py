"""linear_kl: hand-computed numbers, and every route on every backend against the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_cases import calls, cases
from linear_cases import BUDGETS, small_tiles
from linear_kl_cases import of, problem
from torch import Tensor

from rlhf_fast.ops import _kl_tiles, _linear
from rlhf_fast.ops.linear_kl import linear_kl, linear_kl_reference

OP = "linear_kl"


# Which are trained: the policy's hidden states, weight and bias, and the reference's.
TRAINED = [(1, 1, 1, 0, 0, 0), (1, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1), (0, 0, 0, 1, 0, 1)]


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`linear_kl` through one backend."""
    yield from calls(OP, linear_kl, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, interpreter=False))
def run_long(request, monkeypatch):
    """As `run`, without what takes long."""
    yield from calls(OP, linear_kl, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, dtype=torch.float64))
def run64(request, monkeypatch):
    """As `run`, where fp64 is computed."""
    yield from calls(OP, linear_kl, request.param, monkeypatch)


def test_two_token_heads_by_hand(run) -> None:
    eye = torch.eye(2)
    kl = run(torch.tensor([[math.log(3), 0.0]]), eye, torch.zeros(1, 1), torch.zeros(2, 1))
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl.tolist() == pytest.approx([by_hand], rel=1e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_all_six_tensors_pass_gradcheck(run64, memory_budget: int | None, frozen: bool) -> None:
    inputs = problem()
    options = {"temperature": torch.linspace(0.5, 2.0, 8), "softcap": 3.0, "logit_scale": -0.5}
    others = [x.detach() for x in inputs[1:]]

    def op(hidden: Tensor, *rest: Tensor) -> Tensor:
        return of(run64, (hidden, *(rest or others)), memory_budget=memory_budget, **options)

    assert torch.autograd.gradcheck(op, inputs[:1] if frozen else inputs)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("memory_budget", [0, 200, 800, None])
@pytest.mark.parametrize("distance", [1.0, 1e-2])
def test_every_route_agrees_with_the_formula(
    run, trained: tuple[int, ...], memory_budget: int | None, distance: float
) -> None:
    inputs = problem(rows=12, dtype=torch.float32)
    if distance < 1.0:  # the reference is close to the policy
        inputs[3:] = [(x + distance * torch.randn_like(x)).detach() for x in inputs[:3]]
    upstream = torch.randn(12)
    upstream[4:9] = 0.0  # a whole chunk without an upstream gradient, and more
    temperature = torch.rand(12) + 0.5

    def results(function: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        tensors = [
            x.detach().to(dtype).requires_grad_(bool(t))
            for x, t in zip(inputs, trained, strict=True)
        ]
        kl = of(function, tensors, temperature=temperature, **options)
        leaves = [x for x in tensors if x.requires_grad]
        return [kl, *torch.autograd.grad((upstream * kl).sum(), leaves)]

    expected = results(linear_kl_reference, torch.float64)
    got = results(run, torch.float32, memory_budget=memory_budget)
    for one, other in zip(got, expected, strict=True):
        scale = other.abs().max().item()
        # The rounding of logits of about 10 is 1e-6, of log-ratios as small as the distance.
        assert (one.double() - other).abs().max() <= (1e-5 + 1e-5 / distance) * scale


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("frozen", [False, True])
def test_no_bit_depends_on_grad_mode_budget_or_the_run(run_long, frozen: bool) -> None:
    inputs = problem(rows=20, dtype=torch.bfloat16)
    inputs = [x.requires_grad_(i == 0 or not frozen) for i, x in enumerate(inputs)]
    leaves = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        want = of(run_long, inputs)
    for memory_budget in BUDGETS:
        grads = []
        for _ in range(2):
            got = of(run_long, inputs, memory_budget=memory_budget)
            assert torch.equal(got, want)
            loss = (torch.linspace(-1, 2, 20) * got).sum()
            grads.append(torch.autograd.grad(loss, leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_no_divergence_from_itself(run, dtype: torch.dtype) -> None:
    policy = problem(rows=8, dtype=dtype)[:3]
    kl = of(run, [*policy, *(x.detach() for x in policy)])
    assert torch.equal(kl, torch.zeros(8))
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(kl.sum(), policy))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", [0, 16 * 4, None])
def test_tokens_ruled_out_before_the_first_slice_ends(run, memory_budget: int | None) -> None:
    # The head is the identity; the first two slices rule out everything, on one side or both.
    logits, ref = torch.randn(2, 3, 16)
    logits[0, :6] = ref[0, :6] = -math.inf
    logits[1, :6] = -math.inf
    logits[2, 10:] = ref[2, 12:] = -math.inf
    bias, ref_bias = logits, ref
    for row in range(3):
        hidden = torch.zeros(1, 16, requires_grad=True)
        eye = torch.eye(16)
        kl = run(
            *(hidden, eye, torch.zeros(1, 16), eye),
            bias=bias[row],
            ref_bias=ref_bias[row],
            memory_budget=memory_budget,
        )
        p, q = logits[row].double().softmax(-1), ref[row].double().softmax(-1)
        u = torch.where(p > 0, (p / q).log(), 0.0)
        torch.testing.assert_close(kl[0].double(), (p * u).sum(), rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(2.0 * kl.sum(), hidden)
        expected = 2.0 * p * (u - (p * u).sum())
        torch.testing.assert_close(grad[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_budget", [0, None])
def test_weight_gradients_are_summed_in_fp32(
    run_long, monkeypatch: pytest.MonkeyPatch, memory_budget: int | None
) -> None:
    small_tiles(monkeypatch, 2, 32)
    inputs = problem(64, 31, torch.bfloat16)
    upstream = torch.randn(64)

    def gradients(function: Any, tensors: list[Tensor], **options: Any) -> Any:
        return torch.autograd.grad((upstream * of(function, tensors, **options)).sum(), tensors)

    truth = gradients(linear_kl_reference, [x.detach().double().requires_grad_() for x in inputs])
    got = gradients(run_long, inputs, memory_budget=memory_budget)
    factor = 2**-8 if run_long.case.device == "cpu" else 2**-6
    for one, want in zip(got, truth, strict=True):
        assert one.dtype == torch.bfloat16
        assert ((one - want).abs() <= factor * want.abs() + 1e-3 * want.abs().max()).all()


def test_autocast_rounds_the_inputs_once_and_nothing_else(run) -> None:
    inputs = problem(dtype=torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() if x.ndim == 2 else x for x in inputs]

    def results(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        kl = of(run, tensors, memory_budget=0)
        return kl, *torch.autograd.grad(kl.sum(), tensors)

    with torch.autocast(run.case.device, torch.bfloat16):
        cast = results(inputs)
    assert {x.dtype for x in cast} == {torch.float32}
    for one, other in zip(cast, results(rounded), strict=True):
        assert torch.equal(one.to(other.dtype), other)


class _Bf16Head(_linear.Head):
    """A head whose products read bf16, as on a GPU."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.work = torch.bfloat16


@pytest.mark.parametrize("gap", [4.0, 8.0])
@pytest.mark.parametrize("columns", [16, 64])
def test_gradients_of_confident_rows_survive_tiles_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, gap: float, columns: int
) -> None:
    """The policy is sure of one token, the reference of another."""
    small_tiles(monkeypatch, 8, columns)
    rows, vocab = 8, 64
    hidden = torch.zeros(rows, vocab)
    hidden[:, 5] = 6.0 + torch.arange(rows) / 4
    ref_hidden = torch.zeros(rows, vocab)
    ref_hidden[:, 9] = gap
    hidden += 0.5 * torch.randn(rows, vocab)
    hidden, ref_hidden, eye = hidden.bfloat16(), ref_hidden.bfloat16(), torch.eye(vocab).bfloat16()

    def gradient(function: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        leaf = hidden.to(dtype).requires_grad_()
        kl = function(leaf, eye.to(dtype), ref_hidden.to(dtype), eye.to(dtype), **options)
        return torch.autograd.grad(kl.sum(), leaf)[0].double()

    truth = gradient(linear_kl_reference, torch.float64)
    scale = truth.abs().amax(dim=1, keepdim=True)
    monkeypatch.setattr(_kl_tiles, "Head", _Bf16Head)
    for budget in (0, rows * vocab * 4):  # recompute, direct
        options = {"memory_budget": budget, "backend": "reference"}
        got = gradient(linear_kl, torch.bfloat16, **options)
        assert ((got - truth).abs() <= 2**-6 * scale).all(), budget


def test_wrong_arguments_are_named() -> None:
    hidden, weight, bias, ref_hidden, ref_weight, _ = problem(rows=6, vocab=7)
    with pytest.raises(ValueError, match=r"ref_hidden has shape \[2, 3, 3\]; expected \[N, D\]"):
        linear_kl(hidden, weight, ref_hidden.view(2, 3, 3), ref_weight)
    with pytest.raises(ValueError, match="hidden has 6 rows, but ref_hidden has 5"):
        linear_kl(hidden, weight, ref_hidden[:5], ref_weight)
    with pytest.raises(ValueError, match="weight has 7 rows, but ref_weight has 6"):
        linear_kl(hidden, weight, ref_hidden, ref_weight[:6])
    with pytest.raises(ValueError, match=r"ref_bias has shape \[2\]; expected \[7\]"):
        linear_kl(hidden, weight, ref_hidden, ref_weight, ref_bias=bias[:2])
    with pytest.raises(TypeError, match="ref_weight has dtype torch.int64"):
        linear_kl(hidden, weight, ref_hidden, ref_weight.long())
    with pytest.raises(ValueError, match="softcap=-1"):
        linear_kl(hidden, weight, ref_hidden, ref_weight, softcap=-1.0)
    with pytest.raises(ValueError, match=r"live_rows must rise.*\[0, 6\)"):
        linear_kl(hidden, weight, ref_hidden, ref_weight, live_rows=torch.tensor([3, 2]))
