from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend_cases import cases, count_launches, to_cpu, to_device
from linear_cases import small_tiles
from torch import Tensor

from rlhf_fast.ops import count_products
from rlhf_fast.ops.linear_logprobs import linear_logprobs
from rlhf_fast.ops.linear_policy_loss import linear_policy_loss

N, D, V = 9, 4, 7


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """hidden, weight, tokens, old_logprobs, advantages and a mask with holes."""
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    tokens = torch.randint(0, V, (N,))
    old = (hidden @ weight.T).detach().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1]).bool()
    return hidden, weight, tokens, old + 0.3 * torch.randn(N), torch.randn(N, dtype=dtype), mask


def test_ppo_loss_by_hand() -> None:
    # One logit per token id: p = (3/4, 1/4) in both rows.
    hidden, weight = torch.ones(2, 1), torch.tensor([[math.log(3)], [0.0]])
    old = torch.tensor([0.5, 0.5]).log()
    loss, _ = linear_policy_loss(
        hidden,
        weight,
        torch.tensor([0, 1]),
        old,
        torch.tensor([2.0, -1.0]),
        torch.ones(2),
        entropy_coef=0.1,
    )
    # Ratios 1.5 and 0.5: clipped to 1.2 for A > 0, and to 0.8 for A < 0.
    policy = (-2.0 * 1.2 + 1.0 * 0.8) / 2
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert loss.item() == pytest.approx(policy - 0.1 * entropy, rel=1e-6)


@pytest.fixture(params=cases("linear_policy_loss"))
def run(request, monkeypatch):
    """`linear_policy_loss` through one backend, whose launchers must run, forward and backward."""
    case, counts = request.param, []
    if case.backend != "reference":
        ops = ("linear_logprobs", "policy_loss")
        counts = [count_launches(monkeypatch, op, case.backend) for op in ops]

    def call(*args: Any, **options: Any) -> Any:
        moved = [to_device(x, case.device) for x in args]
        options = {name: to_device(x, case.device) for name, x in options.items()}
        return to_cpu(linear_policy_loss(*moved, backend=case.backend, **options))

    yield call
    assert all(count["forward"] > 0 and count["backward"] > 0 for count in counts), counts


def test_agrees_with_the_formula_on_whole_logits(run) -> None:
    hidden, weight, tokens, old, advantages, mask = problem(torch.float32)
    bias = torch.randn(V, requires_grad=True)
    ref = old + 0.1
    loss, metrics = run(
        hidden,
        weight,
        tokens,
        old,
        advantages,
        mask,
        bias=bias,
        temperature=0.8,
        softcap=5.0,
        logit_scale=0.5,
        memory_budget=0,
        clip_low=0.1,
        clip_high=0.3,
        entropy_coef=0.05,
        ref_logprobs=ref,
        kl_coef=0.2,
    )
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    z = 5.0 * torch.tanh((wide[0] @ wide[1].T + wide[2]) * 0.5 / 5.0) / 0.8
    logp = z.log_softmax(-1)
    new = logp.gather(1, tokens[:, None]).squeeze(1)
    rho = (new - old).exp()
    token = -torch.minimum(rho * advantages, rho.clamp(0.9, 1.3) * advantages)
    entropy = -(logp.exp() * logp).sum(-1)
    want = (token - 0.05 * entropy + 0.2 * 0.5 * (new - ref) ** 2)[mask].mean()
    got = (loss, metrics["entropy"], *torch.autograd.grad(loss, (hidden, weight, bias)))
    truth = (want, entropy[mask].mean(), *torch.autograd.grad(want, wide))
    for one, other in zip(got, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.3}, {"ratio": "cispo"}])
def test_head_and_hidden_pass_gradcheck(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    small_tiles(monkeypatch, 2, 4)
    hidden, weight, tokens, old, advantages, mask = problem()
    if "ratio" in options:  # its clipped ratio is a constant: no function has this gradient
        loss, _ = linear_policy_loss(
            hidden, weight, tokens, old, advantages, mask, clip_high=9.0, clip_low=1.0, **options
        )
        new, _ = linear_logprobs(hidden, weight, tokens)
        want = (-(new - old).exp().detach() * advantages * new)[mask].mean()
        torch.testing.assert_close(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))
        )
        return

    def op(h: Tensor, w: Tensor) -> Tensor:
        return linear_policy_loss(h, w, tokens, old, advantages, mask, **options)[0]

    assert torch.autograd.gradcheck(op, (hidden, weight))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_tokens_touch_nothing_whatever_they_hold(garbage: float) -> None:
    hidden, weight, tokens, old, advantages, mask = problem()
    options = {"entropy_coef": 0.1, "kl_coef": 0.1}
    ref = old - 0.2
    results = []
    for dirty in (False, True):
        if dirty:
            with torch.no_grad():
                hidden[~mask] = garbage
            tokens, old, advantages, ref = (t.clone() for t in (tokens, old, advantages, ref))
            tokens[~mask] = 10**6
            for t in (old, advantages, ref):
                t[~mask] = garbage
        loss, _ = linear_policy_loss(
            hidden, weight, tokens, old, advantages, mask, ref_logprobs=ref, **options
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for clean, touched in zip(*results, strict=True):
        assert torch.equal(clean, touched)
    assert results[1][1][~mask].abs().max() == 0 and results[1][1][mask].abs().min() > 0


def test_masked_tokens_cost_no_products() -> None:
    hidden, weight, tokens, old, advantages, mask = problem(torch.float32)
    with count_products() as counted:
        loss, _ = linear_policy_loss(
            *(hidden, weight, tokens, old, advantages, mask),
            clip_low=None,
            clip_high=None,
            memory_budget=10**12,
        )
        loss.backward()
    assert counted.flops == 3 * 2 * int(mask.sum()) * V * D


def test_ignored_tokens_do_not_count() -> None:
    hidden, weight, tokens, old, advantages, mask = problem()
    ignored = tokens.clone()
    ignored[0] = -100
    smaller = mask.clone()
    smaller[0] = False
    a, _ = linear_policy_loss(hidden, weight, ignored, old, advantages, mask)
    b, _ = linear_policy_loss(hidden, weight, tokens, old, advantages, smaller)
    assert torch.equal(a, b)


def test_log_probs_scored_with_the_same_rows_give_a_ratio_of_exactly_one() -> None:
    hidden, weight, tokens, _, advantages, mask = problem(torch.float32)
    with torch.no_grad():
        old, _ = linear_logprobs(hidden, weight, torch.where(mask, tokens, -100))
    _, metrics = linear_policy_loss(hidden, weight, tokens, old, advantages, mask)
    assert metrics["ratio_mean"].item() == 1.0 and metrics["ratio_max"].item() == 1.0


def test_sequence_ratio_and_mean_follow_the_packed_sequences() -> None:
    hidden, weight, tokens, old, advantages, mask = problem()
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    loss, _ = linear_policy_loss(
        hidden,
        weight,
        tokens,
        old,
        advantages[:2],
        mask,
        ratio="sequence",
        aggregation="seq-mean-token-mean",
        cu_seqlens=cu_seqlens,
    )
    new = (hidden @ weight.T).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    want = []
    for part, advantage in ((slice(0, 4), advantages[0]), (slice(4, 9), advantages[1])):
        rho = (new - old)[part][mask[part]].mean().exp()
        want.append(-torch.minimum(rho * advantage, rho.clamp(0.8, 1.2) * advantage))
    torch.testing.assert_close(loss, torch.stack(want).mean())


def test_nothing_that_counts_gives_a_zero_that_can_be_differentiated() -> None:
    hidden, weight, tokens, old, advantages, mask = problem()
    for rows in (slice(None), slice(0, 0)):
        args = (tokens[rows], old[rows], advantages[rows], mask[rows] & False)
        loss, _ = linear_policy_loss(hidden[rows], weight, *args, entropy_coef=0.1)
        assert loss.item() == 0.0
        for grad in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_wrong_arguments_are_named() -> None:
    hidden, weight, tokens, old, advantages, mask = problem()
    with pytest.raises(ValueError, match=r"linear_policy_loss: mask has shape \[8\]"):
        linear_policy_loss(hidden, weight, tokens, old, advantages, mask[:8])
    with pytest.raises(ValueError, match=r"advantages has shape \[1\]"):
        linear_policy_loss(hidden, weight, tokens, old, advantages[:1], mask)
    with pytest.raises(ValueError, match=r"hidden has shape \[1, 9, 4\]"):
        linear_policy_loss(hidden[None], weight, tokens, old, advantages, mask)
    with pytest.raises(ValueError, match="needs to know the sequences; pass cu_seqlens"):
        linear_policy_loss(hidden, weight, tokens, old, advantages, mask, ratio="sequence")
    with pytest.raises(IndexError, match="tokens holds the id 7"):
        linear_policy_loss(hidden, weight, tokens.fill_(7), old, advantages, mask)


def test_clipped_tokens_cost_no_backward_products() -> None:
    hidden, weight, tokens, _, advantages, mask = problem(torch.float32)
    old = torch.full((N,), -100.0)  # every ratio is far above the clip
    with count_products() as counted:
        loss, _ = linear_policy_loss(
            *(hidden, weight, tokens, old, advantages.abs(), mask), memory_budget=0
        )
        loss.backward()
    assert counted.flops == 2 * int(mask.sum()) * V * D
    assert hidden.grad is not None and not hidden.grad.any()
