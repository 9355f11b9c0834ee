"""Inputs of ppo_advantages and the comparison with the truth."""

from __future__ import annotations

import torch
from loss_truth import F32, F64
from scan_truth import float32, ppo_truth
from truth import assert_budget

OUTPUTS = ("advantages", "returns", "rewards")
HEAD = ("scores", "logprobs", "ref_logprobs", "values", "mask")


def sample(*shape, dtype=F32, seed=0, keep=0.7, count=None):
    """Scores, log-probs, the reference's, values and a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    old, drift, values = torch.randn(3, *shape, generator=generator, dtype=F64)
    scores = torch.randn(shape[0] if count is None else count, generator=generator, dtype=F64)
    tensors = (scores, -old.abs(), -old.abs() + 0.3 * drift, values)
    return [x.to(dtype) for x in tensors] + [torch.rand(shape, generator=generator) < keep]


def assert_true(run, tensors, *, kl_coef=0.1, **options):
    found = run(*tensors, kl_coef=kl_coef, **options)
    truth = ppo_truth(*tensors, kl_coef=kl_coef, **options)
    naive = ppo_truth(*tensors, kl_coef=kl_coef, **options, number=float32)
    unscaled = truth
    if options.get("whiten", True):
        unscaled = ppo_truth(*tensors, kl_coef=kl_coef, **options | {"whiten": False})
    counts = (tensors[4] != 0) & torch.ones_like(tensors[1], dtype=torch.bool)
    held = unscaled.advantages[counts]
    spread = (
        held.var().add(1e-8).sqrt().item()
        if options.get("whiten", True) and held.numel() > 1
        else 1.0
    )
    scales = (truth.scale / spread, truth.scale, 0.0)
    for name, got, exact, rival, scale in zip(
        OUTPUTS, found, truth[:3], naive[:3], scales, strict=True
    ):
        rival = rival if got.dtype == F32 else None
        assert not got.requires_grad and (got[~counts] == 0).all()
        assert_budget(name, got, exact, rival, scale=scale)
    return found


OPTIONS = {
    "plain": {},
    "raw": {"whiten": False},
    "gamma, lam": {"gamma": 0.9, "lam": 0.5},
    "monte carlo": {"lam": 1.0, "whiten": False},
    "one step": {"lam": 0.0, "gamma": 0.99, "whiten": False},
    "no discount at all": {"gamma": 0.0, "whiten": False},
    "decoupled": {"value_lam": 1.0},
    "decoupled, raw": {"value_lam": 0.3, "lam": 0.7, "whiten": False},
    "adaptive": {"adaptive_lam": 0.05},
    "adaptive, raw": {"adaptive_lam": 0.3, "whiten": False, "gamma": 0.99},
    "adaptive, below one": {"adaptive_lam": 1e-3, "value_lam": 1.0, "whiten": False},
    "VAPO": {"adaptive_lam": 0.05, "value_lam": 1.0},
    "no KL": {"kl_coef": 0.0},
}
