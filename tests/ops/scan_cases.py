"""gae and discounted_returns called alike, and compared with the truth."""

from __future__ import annotations

import pytest
import torch
from backend_cases import cases
from loss_truth import F32, F64, LossRunner
from scan_truth import float32, scan
from truth import assert_budget, gradients, leaf

from rlhf_fast.ops import discounted_returns, gae

OPS = {"gae": gae, "discounted_returns": discounted_returns}


def parameters(**options):
    """Every backend of both ops, as (op, case)."""
    return [
        pytest.param((op, param.values[0]), marks=param.marks, id=f"{op}-{param.id}")
        for op in OPS
        for param in cases(op, **options)
    ]


class Scan(LossRunner):
    """Both ops called alike: `values` is left out for the discounted returns."""

    def __init__(self, op, case, monkeypatch):
        super().__init__(OPS[op], case, monkeypatch)
        self.name, self.has_values = op, op == "gae"

    def outcome(self, rewards, values, mask=None, *, upstream=None, bootstrap=None, **options):
        """Advantages and returns, or returns; then the gradient of each input."""
        given = [rewards, values] if self.has_values else [rewards]
        given += [] if bootstrap is None else [bootstrap]
        leaves = [leaf(x) for x in given]
        if bootstrap is not None:
            options["bootstrap"] = leaves[-1]
        out = self(*leaves[: 1 + self.has_values], mask, **options)
        out = out if self.has_values else (out,)
        found = ()
        if upstream is not None:
            used = [x.to(out[0].dtype) for x in upstream[-len(out) :]]
            found = gradients(out, leaves, used)
        return *(x.detach() for x in out), *found

    def truth(self, rewards, values, mask=None, *, upstream=None, bootstrap=None, **options):
        """The same in float64, and the size of what was summed."""
        if not self.has_values:
            values = None
            upstream = None if upstream is None else (0 * upstream[1], upstream[1])
        s = scan(rewards, values, mask, bootstrap=bootstrap, upstream=upstream, **options)
        out = [s.advantages, s.returns] if self.has_values else [s.returns]
        if upstream is not None:
            out += [s.d_rewards, s.d_values] if self.has_values else [s.d_rewards]
            out += [] if bootstrap is None else [s.d_bootstrap]
        return out, s.scale


def sample(*shape, dtype=F32, seed=0, keep=0.7, count=None):
    """Rewards, values, mask; bootstrap and upstream gradients as options."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, *upstream = torch.randn(4, *shape, generator=generator, dtype=F64).to(dtype)
    mask = torch.rand(shape, generator=generator) < keep
    bootstrap = torch.randn(shape[0] if count is None else count, generator=generator).to(dtype)
    return (rewards, values, mask), {"bootstrap": bootstrap, "upstream": tuple(upstream)}


def assert_true(run, tensors, **options):
    found = run.outcome(*tensors, **options)
    truth, scale = run.truth(*tensors, **options)
    naive, _ = run.truth(*tensors, **options, number=float32)
    for i, (got, exact, rival) in enumerate(zip(found, truth, naive, strict=True)):
        rival = rival if got.dtype == F32 else None
        assert_budget(f"{run.name}, tensor {i}", got, exact, rival, scale=scale[i > run.has_values])
    return found
