from __future__ import annotations

import math

import pytest
import torch
from backend_cases import calls, cases
from torch import Tensor

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.ops._softmax import host_checks_run
from rlhf_fast.ops.token_logprobs import token_logprobs, token_logprobs_reference

INF = math.inf
OP = "token_logprobs"


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`token_logprobs` through one backend."""
    yield from calls(OP, token_logprobs, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, dtype=torch.float64))
def run64(request, monkeypatch):
    """As `run`, where fp64 is computed."""
    yield from calls(OP, token_logprobs, request.param, monkeypatch)


def naive(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook form in the dtype of `logits`; no -inf, no ignored tokens."""
    logp = logits.log_softmax(dim=-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(dim=-1)


def test_three_token_distribution_by_hand(run) -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(3)]]).expand(3, 3)
    logprobs, entropy = run(logits, torch.tensor([0, 1, 2]))
    by_hand = math.log(6) / 6 + math.log(3) / 3 + math.log(2) / 2
    torch.testing.assert_close(logprobs, torch.tensor([1 / 6, 1 / 3, 1 / 2]).log())
    torch.testing.assert_close(entropy, torch.full((3,), by_hand))


def test_softcap_comes_before_temperature(run64) -> None:
    logits = torch.tensor([[4.0, -4.0]], dtype=torch.float64)
    logprobs, entropy = run64(logits, torch.tensor([1]), softcap=2.0, temperature=0.5)
    gap = 2 * (2 * math.tanh(2.0)) / 0.5
    p = 1 / (1 + math.exp(gap))
    assert logprobs.item() == pytest.approx(math.log(p), rel=1e-14)
    by_hand = -p * math.log(p) - (1 - p) * math.log1p(-p)
    assert entropy.item() == pytest.approx(by_hand, rel=1e-10)


def test_temperature_may_differ_by_row(run64) -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    tokens = torch.randint(0, 5, (2, 3))
    for temperature in (torch.tensor([[0.5], [2.0]]), torch.rand(2, 3) + 0.5, torch.tensor(0.7)):
        got = run64(logits, tokens, temperature=temperature)
        rows = temperature.double().expand(2, 3).unsqueeze(-1)
        torch.testing.assert_close(got, naive(logits / rows, tokens))


def test_uniform_rows_have_entropy_log_v_and_certain_rows_none(run) -> None:
    logprobs, entropy = run(torch.full((1, 1000), 3.0), torch.tensor([17]))
    assert logprobs.item() == pytest.approx(-math.log(1000), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(1000), rel=1e-6)
    certain = torch.tensor([[0.0, 1e4, 0.0], [-INF, 2.0, -INF]])
    logprobs, entropy = run(certain, torch.tensor([1, 1]))
    assert logprobs.tolist() == [0.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, torch.tensor([[0.5], [1.7]])])
def test_each_output_passes_gradcheck_alone(
    run64, output: int, softcap: float | None, temperature: float | Tensor
) -> None:
    logits = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 5, -100], [3, 3, 1]])

    def op(x: Tensor) -> Tensor:
        return run64(x, tokens, temperature=temperature, softcap=softcap)[output]

    assert torch.autograd.gradcheck(op, (logits,))


def test_strided_three_dim_input_matches_naive_with_its_gradient(run64) -> None:
    base = torch.randn(129, 4, 3, dtype=torch.float64, requires_grad=True)
    logits, tokens = base.permute(2, 1, 0)[:, ::2], torch.randint(0, 129, (2, 3)).T
    upstream = torch.randn(2, 3, 2, dtype=torch.float64)
    got, want = run64(logits, tokens), naive(logits, tokens)
    torch.testing.assert_close(got, want)
    for a, b in zip(got, want, strict=True):
        ours, theirs = (
            torch.autograd.grad((upstream[0] * o).sum(), base, retain_graph=True)[0] for o in (a, b)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("margin", [10.0, 16.7, 30.0, 60.0])
def test_confident_token_keeps_its_bits(run, margin: float) -> None:
    # A GPU's exp is exp2(x log2 e): the rounding of its argument grows with it.
    rel = 1e-6 if run.case.backend in ("reference", "cpp") else 1e-6 + margin * 6e-8
    logits = torch.tensor([[margin, 0.0, 0.0, 0.0]], requires_grad=True)
    logprobs, entropy = run(logits, torch.tensor([0]))
    s = 3 * math.exp(-margin)
    assert logprobs.item() == pytest.approx(-math.log1p(s), rel=rel, abs=0)
    assert entropy.item() == pytest.approx(math.log1p(s) + margin * s / (1 + s), rel=rel, abs=0)
    (grad,) = torch.autograd.grad(logprobs, logits, retain_graph=True)
    assert grad[0, 0].item() == pytest.approx(s / (1 + s), rel=rel, abs=0)
    assert grad[0, 1].item() == pytest.approx(-s / 3 / (1 + s), rel=rel, abs=0)
    (grad,) = torch.autograd.grad(entropy, logits)
    assert grad[0, 0].item() == pytest.approx(-margin * s / (1 + s) ** 2, rel=rel, abs=0)


def test_minus_inf_logits_are_legal(run) -> None:
    tail = torch.randn(2, 40)
    blocked = torch.cat([torch.full((2, 64), -INF), tail], dim=1).requires_grad_()
    free = tail.clone().requires_grad_()
    tokens = torch.tensor([3, 39])
    got, want = run(blocked, tokens + 64), run(free, tokens)
    torch.testing.assert_close(got, want)
    weights = torch.tensor([0.3, -2.0])
    for outputs in (got, want):
        (weights * (outputs[0] - 0.5 * outputs[1])).sum().backward()
    assert blocked.grad is not None and free.grad is not None
    assert torch.equal(blocked.grad[:, :64], torch.zeros(2, 64))
    torch.testing.assert_close(blocked.grad[:, 64:], free.grad)


def test_row_that_rules_out_all_but_the_token_has_gradient_zero(run) -> None:
    logits = torch.full((1, 8), -INF).index_fill(1, torch.tensor([5]), 1.25).requires_grad_()
    logprobs, entropy = run(logits, torch.tensor([5]))
    assert (logprobs.item(), entropy.item()) == (0.0, 0.0)
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros(1, 8))


def test_ruled_out_token_has_logprob_minus_inf(run) -> None:
    logits = torch.tensor([[0.0, -INF, 0.0]])
    logprobs, entropy = run(logits, torch.tensor([1]))
    assert logprobs.item() == -INF
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("offset", [1e4, -1e4, -100.0])
def test_common_offset_changes_no_bit(run, offset: float) -> None:
    logits = torch.randint(-80, 80, (4, 33)) / 8.0  # exact in fp32 with the offset too
    tokens = torch.randint(0, 33, (4,))
    shifted = (logits + offset).requires_grad_()
    plain = logits.clone().requires_grad_()
    got, want = run(shifted, tokens), run(plain, tokens)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    (got[0] + got[1]).sum().backward()
    (want[0] + want[1]).sum().backward()
    assert shifted.grad is not None and plain.grad is not None
    assert torch.equal(shifted.grad, plain.grad)


def test_vocabulary_of_one(run) -> None:
    logits = torch.tensor([[3.0], [-7.0]], requires_grad=True)
    logprobs, entropy = run(logits, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, 0.0] and entropy.tolist() == [0.0, 0.0]
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None and logits.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("garbage", [math.nan, INF, -INF])
def test_ignored_tokens_are_zero_without_gradient(run, ignore_index: int, garbage: float) -> None:
    logits = torch.randn(3, 4)
    logits[1] = garbage
    logits.requires_grad_()
    tokens = torch.tensor([0, ignore_index, 3])
    logprobs, entropy = run(logits, tokens, ignore_index=ignore_index)
    assert logprobs[1].item() == 0.0 and entropy[1].item() == 0.0
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad[1].tolist() == [0.0] * 4
    assert logits.grad.isfinite().all() and logits.grad[0].abs().min() > 0


@pytest.mark.parametrize("bad", [-1, 7, 2**31])
def test_id_outside_the_vocabulary_is_named(bad: int) -> None:
    with pytest.raises(IndexError, match=rf"token_logprobs: tokens holds the id {bad}, .*\[0, 7\)"):
        token_logprobs(torch.randn(2, 7), torch.tensor([-100, bad]))


def test_without_the_host_check_such_a_row_is_nan_and_others_are_not() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    logprobs, entropy = token_logprobs_reference(logits, torch.tensor([6, 2**40, -5]))
    for output in (logprobs, entropy):
        assert output.isnan().tolist() == [False, True, True]
    (grad,) = torch.autograd.grad(logprobs[0] + entropy[0], logits)
    assert grad[0].isfinite().all()


def test_gpu_checks_ids_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_FAST_CHECK", raising=False)
    assert host_checks_run(torch.device("cpu")) and not host_checks_run(torch.device("cuda"))
    monkeypatch.setenv("RLHF_FAST_CHECK", "1")
    assert host_checks_run(torch.device("cuda"))


@pytest.mark.parametrize("rows", [(0,), (0, 3), (2, 0)])
def test_empty_batch(run, rows: tuple[int, ...]) -> None:
    logits = torch.empty(*rows, 5, requires_grad=True)
    logprobs, entropy = run(logits, torch.empty(rows, dtype=torch.long))
    assert logprobs.shape == entropy.shape == rows
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.shape == (*rows, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_errors_stay_within_those_of_naive_pytorch(run, dtype: torch.dtype, scale: float) -> None:
    logits = (scale * torch.randn(64, 1003)).to(dtype)
    tokens = torch.where(torch.arange(64) < 32, logits.argmax(-1), torch.randint(0, 1003, (64,)))
    upstream = torch.randn(2, 64)

    def errors(forward: object, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        outputs = forward(x, tokens)  # type: ignore[operator]
        loss = sum((u.to(o.dtype) * o).sum() for u, o in zip(upstream, outputs, strict=True))
        return [*(o.double() for o in outputs), torch.autograd.grad(loss, x)[0].double()]

    truth = errors(naive, logits.double())
    ours, theirs = errors(run, logits), errors(naive, logits)
    eps = torch.finfo(torch.float32).eps
    for want, a, b in zip(truth, ours, theirs, strict=True):
        assert (a - want).abs().max() <= (b - want).abs().max() + eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_fp32_and_gradients_in_the_input_dtype(run, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5).to(dtype).requires_grad_()
    logprobs, entropy = run(logits, torch.tensor([1, 2], dtype=torch.int32))
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


def test_fp64_gives_fp64_or_is_refused_by_name(run64) -> None:
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 2])
    logprobs, entropy = run64(logits, tokens)
    assert logprobs.dtype == entropy.dtype == torch.float64
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.float64
    with pytest.raises(BackendUnavailable, match="triton"):
        token_logprobs(logits, tokens, backend="triton")


def test_reference_leaves_logits_alone_and_repeats_its_backward() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    before = logits.detach().clone()
    options = {"inplace_backward": True, "backend": "reference"}
    logprobs, _ = token_logprobs(logits, torch.tensor([0, 1, 2]), **options)
    first = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)[0]
    second = torch.autograd.grad(logprobs.sum(), logits)[0]
    assert torch.equal(first, second) and torch.equal(logits.detach(), before)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("case", cases(OP, reference=False))
@pytest.mark.parametrize("shape", ["whole", "shifted", "row"])
def test_in_place_gradient_lies_in_the_logits(case, shape: str) -> None:
    leaf = torch.randn(2, 4, 130, device=case.device, requires_grad=True)
    tokens = torch.randint(0, 130, (2, 4), device=case.device)

    def part(x: Tensor) -> Tensor:
        return {"whole": x, "shifted": x[:, :-1], "row": x[0, 0]}[shape]

    def run(in_place: bool) -> Tensor:
        logits = part(leaf * 1.5)  # not a leaf: what a model's head gives
        ids = {"whole": tokens, "shifted": tokens[:, 1:], "row": tokens[0, 0]}[shape]
        options = {"inplace_backward": in_place, "backend": case.backend}
        logprobs, entropy = token_logprobs(logits, ids, **options)
        loss = (logprobs * 3.0 - entropy * logprobs.detach()).sum()
        version = logits._version
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert (logits._version > version) == in_place
        assert torch.equal(logits * 1.5, part(grad)) == in_place
        if in_place:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, leaf)
        return grad

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("case", cases(OP, reference=False))
@pytest.mark.parametrize("layout", ["expanded", "overlapping", "transposed"])
def test_in_place_permission_is_not_taken_where_elements_share_memory(case, layout: str) -> None:
    base = torch.randn(9, 9, device=case.device)
    logits = {
        "expanded": base[:1].expand(3, 9),
        "overlapping": base.as_strided((3, 9), (4, 1)),
        "transposed": base.t(),
    }[layout].requires_grad_()
    tokens = torch.zeros(logits.shape[0], dtype=torch.long, device=case.device)
    before = logits.detach().clone()
    logprobs, _ = token_logprobs(logits, tokens, inplace_backward=True, backend=case.backend)
    grads = [torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0
    assert torch.equal(logits.detach(), before)


def test_grad_mode_changes_no_bit(run) -> None:
    logits, tokens = torch.randn(8, 501, requires_grad=True), torch.randint(0, 501, (8,))
    with_grad = run(logits, tokens, temperature=0.7)
    with torch.no_grad():
        without = run(logits, tokens, temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip(with_grad, without, strict=True))


@pytest.mark.parametrize("case", cases(OP, interpreter=False))
def test_compiles_without_a_graph_break(case) -> None:
    def op(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        options = {"temperature": 0.7, "softcap": 5.0, "backend": case.backend}
        return token_logprobs(logits, tokens, **options)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    logits = torch.randn(4, 9, device=case.device, requires_grad=True)
    tokens = torch.tensor([0, -100, 8, 3], device=case.device)
    grads = []
    for function in (compiled, op):
        logprobs, entropy = function(logits, tokens)
        grads.append(torch.autograd.grad((logprobs - 0.3 * entropy).sum(), logits)[0])
    torch.testing.assert_close(*grads)


def test_wrong_arguments_are_named() -> None:
    logits, tokens = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="logits has dtype torch.int64"):
        token_logprobs(tokens, tokens)
    with pytest.raises(TypeError, match="tokens has dtype torch.float32"):
        token_logprobs(logits, logits)
    with pytest.raises(ValueError, match=r"tokens has shape \[3, 2\].*expected.*\[2, 3\]"):
        token_logprobs(logits, tokens.T)
    with pytest.raises(ValueError, match=r"logits has shape \[2, 3, 0\]"):
        token_logprobs(logits[..., :0], tokens)
    for bad in (0.0, -1.0, INF, math.nan):
        with pytest.raises(ValueError, match=f"temperature={bad}"):
            token_logprobs(logits, tokens, temperature=bad)
        with pytest.raises(ValueError, match=f"softcap={bad}"):
            token_logprobs(logits, tokens, softcap=bad)
    with pytest.raises(ValueError, match=r"temperature has shape \[2\]"):
        token_logprobs(logits, tokens, temperature=torch.ones(2))
    with pytest.raises(ValueError, match=r"temperature holds 0\.0"):
        token_logprobs(logits, tokens, temperature=torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match="temperature requires grad"):
        token_logprobs(logits, tokens, temperature=torch.ones(2, 1, requires_grad=True))
    with pytest.raises((BackendUnavailable, ValueError), match="nonesuch"):
        token_logprobs(logits, tokens, backend="nonesuch")
