from __future__ import annotations

import math

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_fast.ops import _chunks
from rlhf_fast.ops.full_kl import full_kl
from rlhf_fast.ops.linear_kl import linear_kl

BUDGETS = [0, 4000, 10**12, None]


def problem(
    rows: int = 6, vocab: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """hidden [N, 4], weight, ref_hidden [N, 3], ref_weight; and both biases."""
    shapes = [(rows, 4), (vocab, 4), (rows, 3), (vocab, 3)]
    tensors = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    biases = {name: torch.randn(vocab).to(dtype).requires_grad_() for name in ("bias", "ref_bias")}
    return tensors, biases


@pytest.fixture
def three_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunks, "TILE_ELEMENTS", 3 * 7 + 1)


def test_two_token_heads_by_hand() -> None:
    eye = torch.eye(2)
    kl = linear_kl(torch.tensor([[math.log(3), 0.0]]), eye, torch.zeros(1, 1), torch.zeros(2, 1))
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl.tolist() == pytest.approx([by_hand], rel=1e-6)


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 2.0, 6)])
def test_all_six_tensors_pass_gradcheck(
    memory_budget: int | None, temperature: float | Tensor
) -> None:
    tensors, biases = problem()

    def op(h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, b: Tensor, rb: Tensor) -> Tensor:
        return linear_kl(
            h,
            w,
            rh,
            rw,
            bias=b,
            ref_bias=rb,
            temperature=temperature,
            softcap=3.0,
            logit_scale=0.5,
            memory_budget=memory_budget,
        )

    assert torch.autograd.gradcheck(op, (*tensors, *biases.values()))


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("memory_budget", BUDGETS)
def test_chunks_agree_with_the_whole_logits(memory_budget: int | None) -> None:
    (hidden, weight, ref_hidden, ref_weight), biases = problem(rows=20)
    got = linear_kl(hidden, weight, ref_hidden, ref_weight, **biases, memory_budget=memory_budget)
    want = full_kl(
        hidden @ weight.T + biases["bias"], ref_hidden @ ref_weight.T + biases["ref_bias"]
    )
    torch.testing.assert_close(got, want)
    upstream = torch.randn(20, dtype=torch.float64)
    inputs = (hidden, weight, ref_hidden, ref_weight, *biases.values())
    ours, theirs = (torch.autograd.grad((upstream * kl).sum(), inputs) for kl in (got, want))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory_budget", [0, 10**12])
def test_no_tensor_is_as_large_as_the_logits(
    monkeypatch: pytest.MonkeyPatch, memory_budget: int
) -> None:
    monkeypatch.setattr(_chunks, "TILE_ELEMENTS", 8 * 97)
    tensors, biases = problem(64, 97, torch.bfloat16)
    with LargestTensor() as largest:
        linear_kl(*tensors, **biases, memory_budget=memory_budget).sum().backward()
    assert tensors[1].grad is not None
    assert largest.elements == 8 * 97


@pytest.mark.usefixtures("three_rows_a_chunk")
def test_no_bit_depends_on_grad_mode_or_budget() -> None:
    tensors, biases = problem(rows=20, dtype=torch.bfloat16)
    with torch.no_grad():
        want = linear_kl(*tensors, **biases)
    grads = []
    for memory_budget in BUDGETS:
        got = linear_kl(*tensors, **biases, memory_budget=memory_budget)
        assert torch.equal(got, want)
        loss = (torch.linspace(-1, 2, 20) * got).sum()
        grads.append(torch.autograd.grad(loss, (*tensors, *biases.values())))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_no_divergence_from_itself(dtype: torch.dtype) -> None:
    (hidden, weight, _, _), biases = problem(rows=20, dtype=dtype)
    bias = biases["bias"]
    kl = linear_kl(
        hidden, weight, hidden.detach(), weight.detach(), bias=bias, ref_bias=bias.detach()
    )
    assert torch.equal(kl, torch.zeros(20))
    grads = torch.autograd.grad(kl.sum(), (hidden, weight, bias))
    assert all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize(("memory_budget", "recomputed"), [(0, 1), (10**12, 0)])
def test_a_reference_without_grad_costs_no_backward_products(
    memory_budget: int, recomputed: int
) -> None:
    tensors, _ = problem(rows=30, dtype=torch.float32)
    tensors[2].requires_grad_(False)
    tensors[3].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        linear_kl(*tensors, memory_budget=memory_budget).sum().backward()
    policy, ref = 2 * 30 * 7 * 4, 2 * 30 * 7 * 3
    assert counter.get_total_flops() == (3 + recomputed) * policy + (1 + recomputed) * ref


@pytest.mark.parametrize("memory_budget", [0, None])
def test_weight_gradients_are_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch, memory_budget: int | None
) -> None:
    monkeypatch.setattr(_chunks, "TILE_ELEMENTS", 2 * 31)
    tensors, biases = problem(512, 31, torch.bfloat16)
    upstream = torch.randn(512)

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        kl = linear_kl(*inputs[:4], bias=inputs[4], ref_bias=inputs[5], memory_budget=memory_budget)
        return torch.autograd.grad((upstream * kl).sum(), inputs)

    inputs = (*tensors, *biases.values())
    truth = gradients(*(t.detach().double().requires_grad_() for t in inputs))
    for got, want in zip(gradients(*inputs), truth, strict=True):
        assert got.dtype == torch.bfloat16
        assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-5 * want.abs().max()).all()


def test_autocast_changes_no_bit() -> None:
    tensors, biases = problem(dtype=torch.float32)

    def run() -> tuple[Tensor, ...]:
        kl = linear_kl(*tensors, **biases, memory_budget=0)
        return kl, *torch.autograd.grad(kl.sum(), tensors)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_empty_batch_can_still_be_differentiated() -> None:
    tensors, biases = problem(rows=0)
    kl = linear_kl(*tensors, **biases)
    assert kl.shape == (0,)
    grads = torch.autograd.grad(kl.sum(), (*tensors, *biases.values()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_wrong_arguments_are_named() -> None:
    (hidden, weight, ref_hidden, ref_weight), biases = problem()
    with pytest.raises(ValueError, match=r"ref_hidden has shape \[2, 3, 3\]; expected \[N, D\]"):
        linear_kl(hidden, weight, ref_hidden.view(2, 3, 3), ref_weight)
    with pytest.raises(ValueError, match="hidden has 6 rows, but ref_hidden has 5"):
        linear_kl(hidden, weight, ref_hidden[:5], ref_weight)
    with pytest.raises(ValueError, match="weight has 7 rows, but ref_weight has 6"):
        linear_kl(hidden, weight, ref_hidden, ref_weight[:6])
    with pytest.raises(ValueError, match=r"ref_bias has shape \[2\]; expected \[7\]"):
        linear_kl(hidden, weight, ref_hidden, ref_weight, ref_bias=biases["bias"][:2])
    with pytest.raises(TypeError, match="ref_weight has dtype torch.int64"):
        linear_kl(hidden, weight, ref_hidden, ref_weight.long())
    with pytest.raises(ValueError, match="softcap=-1"):
        linear_kl(hidden, weight, ref_hidden, ref_weight, softcap=-1.0)
