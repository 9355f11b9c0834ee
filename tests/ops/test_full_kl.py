from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from backend_cases import calls, cases
from torch import Tensor

from rlhf_fast.ops.full_kl import full_kl

INF = math.inf
OP = "full_kl"


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`full_kl` through one backend."""
    yield from calls(OP, full_kl, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, dtype=torch.float64))
def run64(request, monkeypatch):
    """As `run`, where fp64 is computed."""
    yield from calls(OP, full_kl, request.param, monkeypatch)


def naive(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The textbook form in the inputs' dtype; no -inf."""
    logp, logq = logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1)
    return (logp.exp() * (logp - logq)).sum(dim=-1)


def test_two_distributions_by_hand(run) -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    kl = run(p.log(), q.log())
    assert kl.item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-6)
    hot = run(p.log(), q.log(), temperature=2.0)
    root = [math.sqrt(x) for x in (0.5, 0.25, 0.25)]
    tempered_p = [x / sum(root) for x in root]
    tempered_q = tempered_p[::-1]
    by_hand = sum(a * math.log(a / b) for a, b in zip(tempered_p, tempered_q, strict=True))
    assert hot.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_of_a_distribution_with_itself_is_exactly_zero_with_zero_gradient(
    run, dtype: torch.dtype
) -> None:
    logits = (4 * torch.randn(3, 5, 777)).to(dtype).requires_grad_()
    ref = logits.detach().clone().requires_grad_()
    kl = run(logits, ref)
    assert torch.equal(kl, torch.zeros_like(kl))
    kl.sum().backward()
    assert logits.grad is not None and ref.grad is not None
    assert logits.grad.abs().max() == 0 and ref.grad.abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.tensor([[0.5], [1.5]])])
def test_both_inputs_pass_gradcheck(run64, temperature: float | Tensor) -> None:
    logits, ref = (3 * torch.randn(2, 2, 3, 6, dtype=torch.float64)).unbind()
    logits, ref = logits.requires_grad_(), ref.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: run64(a, b, temperature=temperature), (logits, ref)
    )
    assert torch.autograd.gradcheck(lambda a: run64(a, ref.detach()), (logits,))
    assert torch.autograd.gradcheck(lambda b: run64(logits.detach(), b), (ref,))


def test_strided_three_dim_input_matches_naive(run64) -> None:
    logits = torch.randn(65, 4, 3, dtype=torch.float64).permute(2, 1, 0)[:, ::2]
    ref = torch.randn(3, 2, 130, dtype=torch.float64)[..., ::2]
    torch.testing.assert_close(run64(logits, ref), naive(logits, ref))


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_close_distributions_keep_relative_precision_in_fp32(run, distance: float) -> None:
    logits = 3 * torch.randn(32, 500)
    ref = logits + distance * torch.randn(32, 500)
    # In fp64 the textbook form still has 6 digits at the smallest distance.
    truth = naive(logits.double(), ref.double())
    error = ((run(logits, ref) - truth) / truth).abs().max()
    assert error <= 1e-6 + 1e-7 / distance
    assert (run(logits, ref) > 0).all()


def test_gradients_of_close_distributions_keep_relative_precision_in_fp32(run) -> None:
    logits = 3 * torch.randn(8, 500)
    ref = logits + 1e-3 * torch.randn(8, 500)
    grads = []
    for function, dtype in ((naive, torch.float64), (run, torch.float32)):
        a, b = (x.detach().to(dtype).requires_grad_() for x in (logits, ref))
        upstream = torch.linspace(-2, 2, 8).to(dtype)
        grads.append(torch.autograd.grad((upstream * function(a, b)).sum(), (a, b)))
    for want, got in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


@pytest.mark.parametrize("margin", [10.0, 30.0, 60.0])
def test_peaked_distributions_keep_their_bits(run, margin: float) -> None:
    # A GPU's exp is exp2(x log2 e): the rounding of its argument grows with it.
    rel = 1e-6 if run.case.backend in ("reference", "cpp") else 1e-6 + margin * 6e-8
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    ref = torch.tensor([[margin, 1.0, -1.0]], requires_grad=True)
    kl = run(logits, ref)
    # p = (1, s, s) / (1 + 2 s) and q = (1, s e, s / e) / (1 + s (e + 1 / e)), s = exp(-margin).
    s = Fraction(math.exp(-margin))
    p1, q1, q2 = s / (1 + 2 * s), s * Fraction(math.e), s / Fraction(math.e)
    ratio = float((q1 + q2 - 2 * s) / (1 + 2 * s))  # Z_q / Z_p - 1
    by_hand = math.log1p(ratio) + float(p1) * (-1.0 + 1.0)
    assert kl.item() == pytest.approx(by_hand, rel=rel, abs=0)
    kl.backward()
    assert logits.grad is not None and ref.grad is not None
    # d KL / d z_j = p_j (u_j - KL), with u_1 = log Z_q - log Z_p - 1; d KL / d r_0 = q_0 - p_0.
    assert logits.grad[0, 1].item() == pytest.approx(float(p1) * -1.0, rel=1e-5, abs=0)
    q0_less_p0 = float(1 / (1 + q1 + q2) - 1 / (1 + 2 * s))
    assert ref.grad[0, 0].item() == pytest.approx(q0_less_p0, rel=1e-5, abs=0)


@pytest.mark.parametrize(("offset", "ref_offset"), [(1e4, 1e4), (0.0, 1e4), (-1e4, 100.0)])
def test_common_offsets_change_no_bit(run, offset: float, ref_offset: float) -> None:
    logits, ref = torch.randint(-80, 80, (2, 4, 33)) / 8.0
    assert torch.equal(run(logits + offset, ref + ref_offset), run(logits, ref))


def test_far_distributions_do_not_overflow(run) -> None:
    logits = torch.tensor([[500.0, 0.0, 0.0]], requires_grad=True)
    ref = torch.tensor([[0.0, 500.0, 0.0]], requires_grad=True)
    kl = run(logits, ref)
    assert kl.item() == 500.0
    kl.backward()
    assert ref.grad is not None and ref.grad.tolist() == [[-1.0, 1.0, 0.0]]
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_tokens_ruled_out_by_the_policy_add_nothing(run) -> None:
    logits = torch.tensor([[-INF, 0.0, 0.0], [-INF, 0.0, 0.0]], requires_grad=True)
    ref = torch.tensor([[1.0, 0.0, math.log(3)], [-INF, 0.0, math.log(3)]], requires_grad=True)
    kl = run(logits, ref)
    first = 0.5 * math.log((math.e + 4) / 2) + 0.5 * math.log((math.e + 4) / 6)
    second = 0.5 * math.log(2) + 0.5 * math.log(4 / 6)
    torch.testing.assert_close(kl, torch.tensor([first, second]))
    kl.sum().backward()
    assert logits.grad is not None and ref.grad is not None
    assert logits.grad[:, 0].tolist() == [0.0, 0.0]
    assert ref.grad[0, 0].item() == pytest.approx(math.e / (math.e + 4), rel=1e-6)
    assert ref.grad[1].tolist() == pytest.approx([0.0, -0.25, 0.25])


def test_token_ruled_out_by_the_reference_alone_makes_the_row_infinite(run) -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, -500.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    ref = torch.tensor([[0.0, -INF], [0.0, -INF], [-INF, -INF], [0.0, 2.0]], requires_grad=True)
    kl = run(logits, ref)
    assert kl[:3].tolist() == [INF, INF, INF] and 0 < kl[3].item() < 1
    kl.sum().backward()
    assert logits.grad is not None and ref.grad is not None
    for grad in (logits.grad, ref.grad):
        assert grad[:3].abs().max() == 0 and grad[3].abs().min() > 0


def test_policy_row_that_rules_out_everything_is_nan_with_its_gradients(run) -> None:
    logits = torch.tensor([[-INF] * 3, [-INF] * 3, [0.0, 1.0, 2.0]], requires_grad=True)
    ref = torch.zeros(3, 3, requires_grad=True)
    kl = run(logits, ref)
    assert kl.isnan().tolist() == [True, True, False]
    upstream = torch.tensor([1.0, 0.0, 1.0])
    for grad in torch.autograd.grad(run(logits, ref), (logits, ref), upstream):
        assert grad.isnan().all(dim=1).tolist() == [True, False, False]
        assert not grad[1].any() and grad[2].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [0.1, 3.0])
def test_errors_stay_within_those_of_naive_pytorch(
    run, dtype: torch.dtype, distance: float
) -> None:
    logits = (3 * torch.randn(32, 1003)).to(dtype)
    ref = (logits + distance * torch.randn(32, 1003)).to(dtype)
    upstream = torch.randn(32)

    def results(op: object, a: Tensor, b: Tensor) -> list[Tensor]:
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        kl = op(a, b)  # type: ignore[operator]
        grads = torch.autograd.grad((upstream.to(kl.dtype) * kl).sum(), (a, b))
        return [kl.detach().double(), *(g.double() for g in grads)]

    truth = results(naive, logits.double(), ref.double())
    ours, theirs = results(run, logits, ref), results(naive, logits, ref)
    eps = torch.finfo(torch.float32).eps
    for want, a, b in zip(truth, ours, theirs, strict=True):
        assert (a - want).abs().max() <= (b - want).abs().max() + eps * want.abs().max()


def test_dtypes_may_differ_and_rows_may_be_missing(run) -> None:
    logits, ref = torch.randn(2, 5, dtype=torch.bfloat16), torch.randn(2, 5)
    assert run(logits, ref).dtype == torch.float32
    torch.testing.assert_close(run(logits, ref), naive(logits.float(), ref))
    empty = torch.empty(0, 3, 5, requires_grad=True)
    kl = run(empty, torch.empty(0, 3, 5))
    kl.sum().backward()
    assert kl.shape == (0, 3) and empty.grad is not None


def test_vocabulary_of_one_has_no_divergence(run) -> None:
    assert run(torch.tensor([[3.0]]), torch.tensor([[-8.0]])).tolist() == [0.0]


def test_grad_mode_changes_no_bit(run) -> None:
    logits, ref = torch.randn(2, 8, 501)
    assert torch.equal(run(logits.clone().requires_grad_(), ref), run(logits, ref))


@pytest.mark.parametrize("case", cases(OP, interpreter=False))
def test_compiles_without_a_graph_break(case) -> None:
    def op(logits: Tensor, ref: Tensor) -> Tensor:
        return full_kl(logits, ref, temperature=0.7, backend=case.backend)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    pair = [torch.randn(4, 9, device=case.device, requires_grad=True) for _ in range(2)]
    got, want = (torch.autograd.grad(f(*pair).sum(), pair) for f in (compiled, op))
    torch.testing.assert_close(got, want)


def test_wrong_arguments_are_named() -> None:
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"full_kl: ref_logits has shape \[2, 4\].*\[2, 5\]"):
        full_kl(logits, logits[:, :4])
    with pytest.raises(TypeError, match="ref_logits has dtype torch.int64"):
        full_kl(logits, logits.long())
    with pytest.raises(ValueError, match="temperature=0.0"):
        full_kl(logits, logits, temperature=0.0)
    with pytest.raises(ValueError, match=r"logits has shape \[2, 0\]"):
        full_kl(logits[:, :0], logits[:, :0])
