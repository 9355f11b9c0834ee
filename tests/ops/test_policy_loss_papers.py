"""policy_loss: values and gradients of the published losses, and numbers worked by hand."""

import math

import pytest
import torch
from policy_loss_cases import batch, rows


def clip(x, low, high):
    return min(max(x, low), high)


# Published losses, written as their papers state them (as objectives to maximise), in plain Python.


def ppo(new, old, adv, mask, eps):
    """Schulman et al. 2017, eq. 7, as a mean over all tokens."""
    terms = []
    for lp, lo, a in rows(mask, new, old, adv):
        for p, q, x in zip(lp, lo, a, strict=True):
            r = math.exp(p - q)
            terms.append(min(r * x, clip(r, 1 - eps, 1 + eps) * x))
    return sum(terms) / len(terms)


def grpo(new, old, adv, mask, ref, eps, beta):
    """Shao et al. 2024, eq. 3 with the KL of eq. 4: mean over outputs of means over tokens."""
    outputs = []
    for lp, lo, a, lr in rows(mask, new, old, adv, ref):
        inner = 0.0
        for p, q, x, f in zip(lp, lo, a, lr, strict=True):
            r = math.exp(p - q)
            kl = math.exp(f) / math.exp(p) - math.log(math.exp(f) / math.exp(p)) - 1
            inner += min(r * x, clip(r, 1 - eps, 1 + eps) * x) - beta * kl
        outputs.append(inner / len(lp))
    return sum(outputs) / len(outputs)


def dapo(new, old, adv, mask, eps_low, eps_high):
    """Yu et al. 2025: 1 / sum |o_i| over all tokens, unequal bounds."""
    total, tokens = 0.0, 0
    for lp, lo, a in rows(mask, new, old, adv):
        for p, q, x in zip(lp, lo, a, strict=True):
            r = math.exp(p - q)
            total += min(r * x, clip(r, 1 - eps_low, 1 + eps_high) * x)
            tokens += 1
    return total / tokens


def dr_grpo(new, old, adv, mask, eps, divisor):
    """Liu et al. 2025: the sum over tokens, no length in the divisor."""
    total = 0.0
    for lp, lo, a in rows(mask, new, old, adv):
        for p, q, x in zip(lp, lo, a, strict=True):
            r = math.exp(p - q)
            total += min(r * x, clip(r, 1 - eps, 1 + eps) * x)
    return total / divisor


def gspo(new, old, adv, mask, eps_low, eps_high):
    """Zheng et al. 2025: s_i = (pi / pi_old)^(1 / |y_i|), one advantage per sequence."""
    terms = []
    for lp, lo, a in rows(mask, new, old, adv):
        s = (math.exp(sum(lp)) / math.exp(sum(lo))) ** (1 / len(lp))
        terms.append(min(s * a[0], clip(s, 1 - eps_low, 1 + eps_high) * a[0]))
    return sum(terms) / len(terms)


def central_differences(function, x, mask):
    """The gradient of a scalar Python function of a tensor, element by element."""
    grad, h = torch.zeros_like(x), 1e-6
    for i, j in mask.nonzero().tolist():
        up, down = x.clone(), x.clone()
        up[i, j] += h
        down[i, j] -= h
        grad[i, j] = (function(up) - function(down)) / (2 * h)
    return grad


def check_against(objective, new, mask, loss_of):
    """Value and gradient of `loss_of(new)` are those of minus the published `objective`."""
    x = torch.where(mask, new, math.nan).requires_grad_()
    loss = loss_of(x)
    loss.backward()
    assert loss.item() == pytest.approx(-objective(new), rel=1e-9)
    expected = -central_differences(objective, new, mask)
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_value_and_gradient_are_those_of_the_paper(policy_loss, seed):
    new, old, adv, mask = batch(seed)
    check_against(
        lambda x: ppo(x, old, adv, mask, 0.2),
        new,
        mask,
        lambda x: policy_loss(x, old, adv, mask)[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_grpo_value_and_gradient_are_those_of_the_paper(policy_loss, seed):
    new, old, _, mask = batch(seed)
    adv = torch.randn(4, dtype=torch.float64)
    ref = old + 0.3 * torch.randn_like(old)
    check_against(
        lambda x: grpo(x, old, adv[:, None].expand(4, 5), mask, ref, 0.2, 0.04),
        new,
        mask,
        lambda x: policy_loss(
            x,
            old,
            adv,
            mask,
            aggregation="seq-mean-token-mean",
            ref_logprobs=ref,
            kl_coef=0.04,
            kl_kind="k3",
        )[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_dapo_value_and_gradient_are_those_of_the_paper(policy_loss, seed):
    new, old, adv, mask = batch(seed)
    check_against(
        lambda x: dapo(x, old, adv, mask, 0.2, 0.28),
        new,
        mask,
        lambda x: policy_loss(x, old, adv, mask, clip_low=0.2, clip_high=0.28)[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_dr_grpo_value_and_gradient_are_those_of_the_paper(policy_loss, seed):
    new, old, adv, mask = batch(seed)
    check_against(
        lambda x: dr_grpo(x, old, adv, mask, 0.2, 4 * 5),
        new,
        mask,
        lambda x: policy_loss(x, old, adv, mask, aggregation="constant", normalizer=4 * 5)[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_gspo_value_and_gradient_are_those_of_the_paper(policy_loss, seed):
    new, old, _, mask = batch(seed)
    adv = torch.randn(4, dtype=torch.float64)
    check_against(
        lambda x: gspo(x, old, adv[:, None].expand(4, 5), mask, 0.1, 0.15),
        new,
        mask,
        lambda x: policy_loss(
            x,
            old,
            adv,
            mask,
            ratio="sequence",
            aggregation="seq-mean-token-mean",
            clip_low=0.1,
            clip_high=0.15,
        )[0],
    )


def test_cispo_gradient_is_the_clipped_ratio_times_the_advantage(policy_loss):
    # MiniMax-M1: 1 / sum |o_i| * sum of sg(clip(r)) A log pi; no lower bound.
    new, old, adv, mask = batch(1)
    x = new.clone().requires_grad_()
    loss, metrics = policy_loss(x, old, adv, mask, ratio="cispo", clip_low=None, clip_high=0.3)
    loss.backward()
    value, expected, clipped = 0.0, torch.zeros_like(new), 0
    for i, j in mask.nonzero().tolist():
        r = math.exp(new[i, j] - old[i, j])
        weight = min(r, 1.3)
        clipped += r > 1.3
        value += weight * adv[i, j].item() * new[i, j].item()
        expected[i, j] = -weight * adv[i, j]
    tokens = int(mask.sum())
    assert loss.item() == pytest.approx(-value / tokens)
    torch.testing.assert_close(x.grad, expected / tokens)
    assert metrics["clip_fraction_high"].item() == pytest.approx(clipped / tokens)
    assert metrics["clip_fraction_low"].item() == 0.0
    assert clipped > 0


def test_reinforce_gradient_is_the_advantage_whatever_the_old_policy_was(policy_loss):
    new, old, adv, mask = batch(2)
    x = new.clone().requires_grad_()
    loss, metrics = policy_loss(x, old, adv, mask, ratio="none")
    loss.backward()
    tokens = int(mask.sum())
    assert loss.item() == pytest.approx(-(adv * new)[mask].sum().item() / tokens)
    torch.testing.assert_close(x.grad, torch.where(mask, -adv / tokens, 0.0))
    assert metrics["clip_fraction_low"].item() == metrics["clip_fraction_high"].item() == 0.0


def test_hand_worked_clipping_dual_clipping_and_metrics(policy_loss):
    # Ratios 1/2, 3/2, 1/2, 3/2, 4, 1 with the bounds .8 and 1.3.
    log = math.log
    new = torch.tensor([[log(0.5), log(1.5), log(0.5)], [log(1.5), log(4.0), 0.0]])
    new = new.double().requires_grad_()
    old = torch.zeros(2, 3, dtype=torch.float64)
    adv = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -2.0, 3.0]], dtype=torch.float64)
    mask = torch.ones(2, 3)
    options = {"clip_low": 0.2, "clip_high": 0.3}
    loss, metrics = policy_loss(new, old, adv, mask, **options)
    #   A=1 r=.5: -.5 | A=1 r=1.5: -1.3 (clipped) | A=-1 r=.5: .8 (clipped)
    #   A=-1 r=1.5: 1.5 | A=-2 r=4: 8 | A=3 r=1: -3
    assert loss.item() == pytest.approx((-0.5 - 1.3 + 0.8 + 1.5 + 8 - 3) / 6)
    loss.backward()
    expected = torch.tensor([[-0.5, 0.0, 0.0], [1.5, 8.0, -3.0]], dtype=torch.float64) / 6
    torch.testing.assert_close(new.grad, expected)
    got = {name: value.item() for name, value in metrics.items()}
    ratios = [0.5, 1.5, 0.5, 1.5, 4.0, 1.0]
    assert got == pytest.approx(
        {
            "policy_loss": 5.5 / 6,
            "clip_fraction_low": 1 / 6,
            "clip_fraction_high": 1 / 6,
            "approx_kl_k1": -sum(map(log, ratios)) / 6,
            "approx_kl_k3": sum(r - 1 - log(r) for r in ratios) / 6,
            "ratio_mean": 9 / 6,
            "ratio_max": 4.0,
        }
    )
    # c = 3: the fifth token's 8 becomes 2 * 3 and loses its gradient.
    new.grad = None
    loss, _ = policy_loss(new, old, adv, mask, dual_clip=3.0, **options)
    assert loss.item() == pytest.approx((-0.5 - 1.3 + 0.8 + 1.5 + 6 - 3) / 6)
    loss.backward()
    expected[1, 1] = 0.0
    torch.testing.assert_close(new.grad, expected)
    # Without bounds every token keeps A r.
    free, _ = policy_loss(new, old, adv, mask, clip_low=None, clip_high=None)
    assert free.item() == pytest.approx((-0.5 - 1.5 + 0.5 + 1.5 + 8 - 3) / 6)
