from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_fast.ops.kl_estimate import kl_estimate

KINDS = ["k1", "k2", "k3", "abs"]


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("k1", [0.5, -2.0, 0.0]),
        ("k2", [0.125, 2.0, 0.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.exp(2.0) - 3.0, 0.0]),
        ("abs", [0.5, 2.0, 0.0]),
    ],
)
def test_values_by_hand(kind: str, by_hand: list[float]) -> None:
    logprobs, ref = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-1.5, -1.0, -2.0])
    assert kl_estimate(logprobs, ref, kind=kind).tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_both_inputs_pass_gradcheck(kind: str) -> None:
    logprobs = (-torch.rand(2, 5, dtype=torch.float64)).requires_grad_()
    ref = (-1.5 - torch.rand(2, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, kind=kind), (logprobs, ref))


@pytest.mark.parametrize("log_ratio", [1e-6, -1e-4, 3e-3, -0.08, 0.09, 1.0, -5.0])
def test_k3_is_precise_near_zero(log_ratio: float) -> None:
    u = torch.tensor([log_ratio], requires_grad=True)
    exact = u.detach().double().item()
    k3 = kl_estimate(u, torch.zeros(1), kind="k3")
    # The power series, summed in fp64 until its terms vanish.
    series = math.fsum((-exact) ** n / math.factorial(n) for n in range(2, 60))
    assert k3.item() == pytest.approx(series, rel=3e-6, abs=0)
    k3.backward()
    assert u.grad is not None
    assert u.grad.item() == pytest.approx(-math.expm1(-exact), rel=1e-5, abs=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_log_ratios_stay_finite(kind: str, unbiased: bool, gap: float) -> None:
    logprobs = torch.tensor([gap - 20000.0], requires_grad=True)
    old = logprobs.detach() - 200 if unbiased else None
    kl = kl_estimate(
        logprobs,
        torch.tensor([-20000.0]),
        kind=kind,
        old_logprobs=old,
        unbiased_gradient=unbiased,
    )
    kl.backward()
    assert kl.isfinite().all() and logprobs.grad is not None and logprobs.grad.isfinite().all()


def test_k3_saturates_where_the_reference_is_20_nats_above() -> None:
    logprobs = torch.tensor([-20.0, -20.5, -500.0], requires_grad=True)
    kl = kl_estimate(logprobs, torch.zeros(3), kind="k3")
    torch.testing.assert_close(kl, torch.full((3,), math.exp(20.0) - 21.0))
    kl[1:].sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("new", "ref"), [(-1.0, -math.inf), (-math.inf, -1.0)])
def test_the_unbiased_gradient_keeps_an_infinite_value_and_is_finite(
    kind: str, new: float, ref: float
) -> None:
    logprobs, reference = torch.tensor([new], requires_grad=True), torch.tensor([ref])
    for old in (None, torch.tensor([-60.0])):
        kl = kl_estimate(logprobs, reference, kind=kind, old_logprobs=old, unbiased_gradient=True)
        assert torch.equal(kl, kl_estimate(logprobs, reference, kind=kind)) and not kl.isnan()
        (grad,) = torch.autograd.grad(kl.sum(), logprobs)
        assert grad.isfinite()


def categorical() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, and log-probs of a reference and of the policy that sampled."""
    policy = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.6, 0.2, 0.1], dtype=torch.float64).log()
    old = torch.tensor([0.4, 0.2, 0.1, 0.3], dtype=torch.float64).log()
    return policy, ref, old


def expected_gradient(
    policy: Tensor, ref: Tensor, sampler: Tensor, kind: str, **options: object
) -> Tensor:
    """Expectation under `sampler` of the estimate's gradient, every token enumerated."""
    estimate = kl_estimate(policy.log_softmax(0), ref, kind=kind, **options)  # type: ignore[arg-type]
    return torch.autograd.grad((sampler.exp() * estimate).sum(), policy)[0]


def true_gradient(policy: Tensor, ref: Tensor) -> Tensor:
    logp = policy.log_softmax(0)
    return torch.autograd.grad((logp.exp() * (logp - ref)).sum(), policy)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_gradient_is_the_gradient_of_the_kl_off_policy(kind: str) -> None:
    policy, ref, old = categorical()
    got = expected_gradient(policy, ref, old, kind, unbiased_gradient=True, old_logprobs=old)
    torch.testing.assert_close(got, true_gradient(policy, ref), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_gradient_is_the_gradient_of_the_kl_on_policy(kind: str) -> None:
    policy, ref, _ = categorical()
    sampler = policy.detach().log_softmax(0)
    got = expected_gradient(policy, ref, sampler, kind, unbiased_gradient=True)
    torch.testing.assert_close(got, true_gradient(policy, ref), rtol=1e-12, atol=1e-14)


def test_plain_gradients_on_policy_are_zero_reverse_and_forward() -> None:
    policy, ref, _ = categorical()
    sampler = policy.detach().log_softmax(0)
    k1, k2, k3 = (expected_gradient(policy, ref, sampler, kind) for kind in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, torch.zeros_like(k1))
    torch.testing.assert_close(k2, true_gradient(policy, ref))
    forward = (ref.exp() * (ref - policy.log_softmax(0))).sum()
    torch.testing.assert_close(k3, torch.autograd.grad(forward, policy)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_gradient_keeps_the_value_and_spares_the_other_inputs(kind: str) -> None:
    logprobs, ref, old = (-torch.rand(3, 7)).unbind()
    ref, old = ref.requires_grad_(), old.requires_grad_()
    logprobs = logprobs.requires_grad_()
    got = kl_estimate(logprobs, ref, kind=kind, old_logprobs=old, unbiased_gradient=True)
    assert torch.equal(got, kl_estimate(logprobs, ref, kind=kind))
    grads = torch.autograd.grad(got.sum(), (logprobs, ref, old), allow_unused=True)
    assert grads[1] is None and grads[2] is None
    by_hand = (logprobs - old).exp() * (logprobs - ref)
    torch.testing.assert_close(grads[0], by_hand.detach())


def test_k1_and_k3_are_unbiased_for_the_kl() -> None:
    policy, ref, _ = categorical()
    logp = policy.detach().log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * kl_estimate(logp, ref, kind=kind)).sum(), kl)


def test_half_precision_is_computed_in_fp32_and_empty_is_allowed() -> None:
    logprobs = torch.tensor([-1.0078125], dtype=torch.bfloat16)
    kl = kl_estimate(logprobs, torch.tensor([-1.0], dtype=torch.bfloat16), kind="k2")
    assert kl.dtype == torch.float32 and kl.item() == 0.5 * 0.0078125**2
    assert kl_estimate(torch.empty(0, 4), torch.empty(0, 4), kind="k3").shape == (0, 4)


def test_wrong_arguments_are_named() -> None:
    logprobs = torch.zeros(3)
    with pytest.raises(ValueError, match="kind='k4' is unknown; choose one of 'k1', 'k2'"):
        kl_estimate(logprobs, logprobs, kind="k4")
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \[2\]"):
        kl_estimate(logprobs, logprobs[:2])
    with pytest.raises(TypeError, match="ref_logprobs has dtype torch.int64"):
        kl_estimate(logprobs, logprobs.long())
    with pytest.raises(ValueError, match="only unbiased_gradient=True uses it"):
        kl_estimate(logprobs, logprobs, old_logprobs=logprobs)
