"""Advantages and losses of an update, as the trainer has them: nothing waits, nothing is copied."""

from __future__ import annotations

import pytest
import torch
from backend_cases import cases, done_on_gpu
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import ppo_config

from rlhf_fast import backends
from rlhf_fast.actor_critic import Evaluation
from rlhf_fast.data import Experience, Rollout
from rlhf_fast.presets import PRESETS
from rlhf_fast.trainers import experience as advantages
from rlhf_fast.trainers.update import ppo_loss

B, T, PROMPT = 8, 5, 3
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
"""What hands numbers of a tensor, or how many there are, to the host."""


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Section:
    """Scored completions and what the models said of them, ready for the section of `loss`."""

    def __init__(self, loss, device):
        generator = torch.Generator().manual_seed(0)
        kl = {"kl_loss_coef": 0.1, "kl_loss_kind": "k3"} | {"missing_eos_penalty": 1.0}
        self.config = ppo_config(
            loss=loss, samples_per_prompt=4, kl_coef=0.05, entropy_coef=0.01, max_new_tokens=T, **kl
        )
        mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
        tokens = torch.randn(4, B, T, generator=generator).masked_fill(~mask, 0.0)
        old, ref, new, values = tokens
        self.old, self.ref, mask = old.to(device), ref.to(device), mask.to(device)
        self.rollout = Rollout(
            tokens=torch.zeros(B, PROMPT + T, dtype=torch.int64, device=device),
            mask=torch.ones(B, PROMPT + T, dtype=torch.bool, device=device),
            completion_mask=mask,
            finished=torch.arange(B, device=device) % 3 > 0,
        )
        self.scores = torch.randn(B, generator=generator).to(device)
        self.values = values.to(device) if PRESETS[loss].needs_critic else None
        self.counts = torch.stack([mask.sum(), mask.any(1).sum()])
        self.leaves = [new.to(device).requires_grad_(), new.exp().to(device).requires_grad_()]
        if self.values is not None:
            self.leaves.append((self.values * 0.9).requires_grad_())

    def run(self):
        """The loss and its gradients; the models' own work is done."""
        config, preset = self.config, PRESETS[self.config.loss]
        scored = advantages._Scored(self.rollout, self.scores, self.old, self.ref)
        returns = None
        if preset.needs_groups:
            estimate = advantages._group_advantages(scored, config, config.kl_coef)
        elif preset.needs_critic:
            given = (scored, self.values, config, config.kl_coef)
            estimate, returns = advantages._critic_advantages(*given)
        else:
            zeros = torch.zeros_like(self.old)
            estimate = advantages._scan(scored, zeros, config, config.kl_coef, lam=1.0)[0]
        piece = Experience(*scored, estimate, self.values, returns)
        values = None if self.values is None else self.leaves[2]
        said = Evaluation(*self.leaves[:2], values, None)
        loss, _ = ppo_loss(lambda *_: said, None, piece, config=config, counts=self.counts)
        return loss.detach(), *torch.autograd.grad(loss, self.leaves)


@pytest.mark.parametrize("case", cases("policy_loss", interpreter=False))
@pytest.mark.parametrize("loss", PRESETS)
def test_no_number_is_read_back(loss, case, monkeypatch):
    monkeypatch.setattr(backends, "REQUESTED", case.backend)
    section = Section(loss, case.device)
    with NoReads():
        results = section.run()
    assert all(x.isfinite().all() for x in results) and results[1].any()


GPU = [c for c in cases("policy_loss") if c.values[0].device == "cuda"]


@pytest.mark.parametrize("case", GPU)
@pytest.mark.parametrize("loss", PRESETS)
def test_a_profile_shows_neither_copies_nor_waiting(loss, case, monkeypatch):
    monkeypatch.setattr(backends, "REQUESTED", case.backend)
    names = done_on_gpu(Section(loss, case.device).run)
    assert names and not [name for name in names if name.startswith("Memcpy")], names
