"""On a GPU: how many kernels an op launches, and that nothing waits for the host or copies."""

from __future__ import annotations

import pytest
import torch
from backend_cases import Case, cases, done_on_gpu

from rlhf_fast.ops import discounted_returns, gae, policy_loss, ppo_advantages, value_loss

B, T = 64, 1024


def batch():
    """Log-probs that want a gradient, three more tensors [B, T], a bool mask, scores [B]."""
    tensors = torch.randn(4, B, T, device="cuda").unbind()
    mask = torch.arange(T, device="cuda") < torch.randint(1, T, (B, 1), device="cuda")
    return tensors[0].clone().requires_grad_(), *tensors[1:], mask, torch.randn(B, device="cuda")


def differentiated(loss, leaf, upstream):
    return torch.autograd.grad(loss, leaf, upstream)


def calls(case: Case):
    """By name: a function that runs the op, and the most kernels that it may launch."""
    new, old, third, ref, mask, scores = batch()
    one, backend = torch.ones((), device="cuda"), case.backend
    entropy = third.abs()
    options = {"backend": backend}
    losses = {
        ratio: lambda ratio=ratio: policy_loss(
            new, old, third, mask, ratio=ratio, entropy=entropy, ref_logprobs=ref, kl_coef=0.1,
            **options,
        )[0]
        for ratio in ("token", "sequence", "cispo", "none")
    }  # fmt: skip
    plain = new.detach()
    return {
        **{
            f"policy_loss {ratio}": (lambda f=f: differentiated(f(), new, one), 2)
            for ratio, f in losses.items()
        },
        "value_loss": (
            lambda: differentiated(value_loss(new, old, ref, mask, **options)[0], new, one), 2,
        ),
        "ppo_advantages": (
            lambda: ppo_advantages(
                scores, plain, ref, old, mask, kl_coef=0.1, value_lam=1.0, **options
            ), 2,
        ),
        "gae": (lambda: gae(plain, old, mask, **options), 1),
        "discounted_returns": (lambda: discounted_returns(plain, mask, **options), 2),
    }  # fmt: skip


@pytest.mark.parametrize("case", [c for c in cases("policy_loss") if c.values[0].device == "cuda"])
def test_few_launches_no_copies_no_waiting(case):
    for name, (run, most) in calls(case).items():
        launched = done_on_gpu(run)
        assert 1 <= len(launched) <= most, f"{name}: {launched}"
        assert not [event for event in launched if event.startswith("Mem")], f"{name}: {launched}"
