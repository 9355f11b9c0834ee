from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_fast.ops import _chunks
from rlhf_fast.ops.linear_logprobs import linear_logprobs
from rlhf_fast.ops.token_logprobs import token_logprobs

BUDGETS = [0, 4000, 10**12, None]


def problem(
    rows: int = 6, dim: int = 4, vocab: int = 7, dtype: Any = torch.float64
) -> list[Tensor]:
    """hidden, weight, bias (all of which require grad) and tokens with two ignored."""
    hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
    tokens = torch.randint(0, vocab, (rows,))
    tokens[1::3] = -100
    bias = torch.randn(vocab).to(dtype)
    return [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), tokens]


@pytest.fixture
def three_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunks, "TILE_ELEMENTS", 3 * 7 + 1)


def test_two_token_head_by_hand() -> None:
    hidden, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    options = {"bias": torch.tensor([0.5, 0.0]), "logit_scale": 2.0, "temperature": 4.0}
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 1]), **options)  # type: ignore[arg-type]
    # Logits (1.5, 2) and (3.5, 4), times 2 / 4: the second token leads by 1/4 in both rows.
    p = 1 / (1 + math.exp(-0.25))
    assert logprobs.tolist() == pytest.approx([math.log(1 - p), math.log(p)], rel=1e-6)
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert entropy.tolist() == pytest.approx([h, h], rel=1e-6)


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("memory_budget", [0, None])
@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 2.0, 6)])
def test_each_output_passes_gradcheck_alone(
    output: int, memory_budget: int | None, temperature: float | Tensor
) -> None:
    hidden, weight, bias, tokens = problem()

    def op(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_logprobs(
            h,
            w,
            tokens,
            bias=b,
            temperature=temperature,
            softcap=3.0,
            logit_scale=0.5,
            memory_budget=memory_budget,
        )[output]

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("memory_budget", BUDGETS)
def test_chunks_agree_with_the_whole_logits(memory_budget: int | None) -> None:
    hidden, weight, bias, tokens = problem(rows=20)
    temperature = torch.rand(20) + 0.5
    got = linear_logprobs(
        hidden, weight, tokens, bias=bias, temperature=temperature, memory_budget=memory_budget
    )
    want = token_logprobs(hidden @ weight.T + bias, tokens, temperature=temperature)
    torch.testing.assert_close(got, want)
    upstream = torch.randn(2, 20, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((upstream[0] * o[0] + upstream[1] * o[1]).sum(), (hidden, weight, bias))
        for o in (got, want)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory_budget", [0, 10**12])
def test_no_tensor_is_as_large_as_the_logits(
    monkeypatch: pytest.MonkeyPatch, memory_budget: int
) -> None:
    rows, dim, vocab = 64, 8, 97
    monkeypatch.setattr(_chunks, "TILE_ELEMENTS", 8 * vocab)
    hidden, weight, bias, tokens = problem(rows, dim, vocab, torch.bfloat16)
    with LargestTensor() as largest:
        outputs = linear_logprobs(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
        (outputs[0] - 0.1 * outputs[1]).sum().backward()
    assert weight.grad is not None
    assert largest.elements == 8 * vocab  # a chunk of logits; the weight is as large here


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_grad_mode_or_budget(dtype: torch.dtype) -> None:
    hidden, weight, bias, tokens = problem(rows=20, dtype=dtype)
    with torch.no_grad():
        want = linear_logprobs(hidden, weight, tokens, bias=bias)
    grads = []
    for memory_budget in BUDGETS:
        got = linear_logprobs(hidden, weight, tokens, bias=bias, memory_budget=memory_budget)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        upstream = torch.linspace(-1, 2, 20)
        loss = (upstream * (got[0] - 0.3 * got[1])).sum()
        grads.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("memory_budget", "recomputed"), [(0, 1), (10**12, 0)])
def test_ignored_rows_and_frozen_heads_cost_no_products(
    frozen: bool, memory_budget: int, recomputed: int
) -> None:
    hidden, weight, _, tokens = problem(rows=30, dtype=torch.float32)
    weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        linear_logprobs(hidden, weight, tokens, memory_budget=memory_budget)[0].sum().backward()
    live = 20
    products = 1 + recomputed + (1 if frozen else 2)
    assert counter.get_total_flops() == products * 2 * live * 7 * 4


@pytest.mark.usefixtures("three_rows_a_chunk")
def test_ignored_rows_are_zero_without_gradient_even_if_nan() -> None:
    hidden, weight, _, tokens = problem(rows=20)
    with torch.no_grad():
        hidden[1::3] = math.nan
    logprobs, entropy = linear_logprobs(hidden, weight, tokens)
    assert logprobs[1::3].abs().max() == 0 and entropy[1::3].abs().max() == 0
    grads = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    assert grads[0][1::3].abs().max() == 0 and grads[0][0::3].abs().min() > 0
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


@pytest.mark.parametrize("memory_budget", [0, None])
def test_weight_gradient_is_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch, memory_budget: int | None
) -> None:
    rows, dim, vocab = 512, 16, 31
    monkeypatch.setattr(_chunks, "TILE_ELEMENTS", 2 * vocab)
    hidden, weight, bias, tokens = problem(rows, dim, vocab, torch.bfloat16)
    upstream = torch.randn(rows)

    def gradients(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = linear_logprobs(h, w, tokens, bias=b, memory_budget=memory_budget)
        return torch.autograd.grad((upstream * (logprobs + entropy)).sum(), (h, w, b))

    truth = gradients(*(t.detach().double().requires_grad_() for t in (hidden, weight, bias)))
    for got, want in zip(gradients(hidden, weight, bias), truth, strict=True):
        assert got.dtype == torch.bfloat16
        # One rounding to bf16 (half an ulp is 2^-8 at most of the value), after 256 chunks.
        assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_stay_within_those_of_naive_pytorch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    rows, dim, vocab = 48, 64, 509
    monkeypatch.setattr(_chunks, "TILE_ELEMENTS", 7 * vocab)
    hidden, weight, _, tokens = problem(rows, dim, vocab, dtype)
    live = (tokens != -100).nonzero().squeeze(1)
    upstream = torch.randn(2, rows)

    def results(h: Tensor, w: Tensor, ours: bool) -> list[Tensor]:
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        if ours:
            outputs = linear_logprobs(h, w, tokens, memory_budget=0)
        else:
            logp = (h @ w.T).log_softmax(-1)
            chosen = logp.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
            outputs = (chosen, -(logp.exp() * logp).sum(-1))
        lp, ent = outputs[0][live], outputs[1][live]
        weights = upstream[:, live].to(lp.dtype)
        grads = torch.autograd.grad((weights[0] * lp + weights[1] * ent).sum(), (h, w))
        return [t.detach().double() for t in (lp, ent, *grads)]

    truth = results(hidden.double(), weight.double(), ours=False)
    got, naive = results(hidden, weight, ours=True), results(hidden, weight, ours=False)
    eps = torch.finfo(torch.float32).eps
    for want, a, b in zip(truth, got, naive, strict=True):
        assert (a - want).abs().max() <= (b - want).abs().max() + 4 * eps * want.abs().max()


@pytest.mark.parametrize("memory_budget", [0, None])
def test_autocast_changes_no_bit(memory_budget: int | None) -> None:
    hidden, weight, bias, tokens = problem(dtype=torch.float32)

    def run() -> tuple[Tensor, ...]:
        logprobs, entropy = linear_logprobs(
            hidden, weight, tokens, bias=bias, memory_budget=memory_budget
        )
        loss = (logprobs + entropy).sum()
        return logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight, bias))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_strided_inputs_and_mixed_dtypes() -> None:
    hidden = torch.randn(8, 12, dtype=torch.bfloat16).T[::2]
    weight, tokens = torch.randn(8, 9).T, torch.randint(0, 9, (6, 2))[:, 1]
    got = linear_logprobs(hidden, weight, tokens)
    torch.testing.assert_close(got, token_logprobs(hidden.float() @ weight.T, tokens))


def test_chunk_sizes_depend_on_rows_and_vocabulary_only() -> None:
    assert _chunks.chunk_rows(10**6, 2**25) == [1] * 10**6
    assert _chunks.chunk_rows(5, 2**30) == [1] * 5
    assert _chunks.chunk_rows(0, 100) == [0]
    sizes = _chunks.chunk_rows(1000, 151_936)
    assert sum(sizes) == 1000 and max(sizes) - min(sizes) <= 1 and max(sizes) * 151_936 <= 2**25


def test_free_memory_of_this_machine_is_known_and_of_others_is_none() -> None:
    assert _chunks.free_memory(torch.device("meta")) == 0
    assert _chunks.free_memory(torch.device("cpu")) >= 0


def test_id_outside_the_vocabulary_is_named() -> None:
    hidden, weight, _, tokens = problem()
    tokens[3] = 7
    with pytest.raises(IndexError, match=r"linear_logprobs: tokens holds the id 7, .*\[0, 7\)"):
        linear_logprobs(hidden, weight, tokens)


def test_wrong_arguments_are_named() -> None:
    hidden, weight, bias, tokens = problem()
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 3, 4\]; expected \[N, D\]"):
        linear_logprobs(hidden.view(2, 3, 4), weight, tokens.view(2, 3))
    with pytest.raises(ValueError, match=r"weight has shape \[4, 7\]; expected \[V, 4\]"):
        linear_logprobs(hidden, weight.T, tokens)
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; expected \[7\]"):
        linear_logprobs(hidden, weight, tokens, bias=bias[:3])
    with pytest.raises(ValueError, match=r"tokens has shape \[5\]; expected \[6\]"):
        linear_logprobs(hidden, weight, tokens[:5])
    with pytest.raises(TypeError, match="hidden has dtype torch.int64"):
        linear_logprobs(hidden.long(), weight, tokens)
    with pytest.raises(TypeError, match="tokens has dtype torch.float32"):
        linear_logprobs(hidden, weight, tokens.float())
    with pytest.raises(ValueError, match="memory_budget=-1"):
        linear_logprobs(hidden, weight, tokens, memory_budget=-1)
    with pytest.raises(ValueError, match="logit_scale=inf"):
        linear_logprobs(hidden, weight, tokens, logit_scale=math.inf)
    with pytest.raises(ValueError, match=r"temperature has shape \[2\]"):
        linear_logprobs(hidden, weight, tokens, temperature=torch.ones(2))
