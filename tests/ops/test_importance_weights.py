"""importance_weights: hand-worked numbers, bounds, and that they make an expectation right."""

from __future__ import annotations

import math
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import importance_weights, policy_loss

LOG = math.log
NAN, INF = math.nan, math.inf
# Ratios 2, 1/4 in the first sequence, 3 in the second.
OLD = torch.tensor([[LOG(0.4), LOG(0.1), NAN], [INF, LOG(0.6), -INF]], dtype=torch.float64)
ROLLOUT = torch.tensor([[LOG(0.2), LOG(0.4), INF], [NAN, LOG(0.2), -INF]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("level", "mode", "low", "high", "expected"),
    [
        ("token", "truncate", None, None, [2.0, 0.25, 3.0]),
        ("token", "truncate", None, 2.5, [2.0, 0.25, 2.5]),
        ("token", "truncate", 0.5, 2.5, [2.0, 0.5, 2.5]),
        ("token", "mask", None, 2.5, [2.0, 0.25, 0.0]),
        ("token", "mask", 0.5, 2.5, [2.0, 0.0, 0.0]),
        ("sequence", "truncate", None, None, [0.5, 0.5, 3.0]),
        ("sequence", "truncate", None, 2.0, [0.5, 0.5, 2.0]),
        ("sequence", "mask", 0.6, None, [0.0, 0.0, 3.0]),
        ("geometric", "truncate", None, None, [0.5**0.5, 0.5**0.5, 3.0]),
        ("geometric", "mask", 0.6, 2.0, [0.5**0.5, 0.5**0.5, 0.0]),
    ],
)
def test_hand_worked_weights(level, mode, low, high, expected):
    weights, _ = importance_weights(OLD, ROLLOUT, MASK, level=level, mode=mode, low=low, high=high)
    assert weights[MASK != 0].tolist() == pytest.approx(expected)
    assert (weights[MASK == 0] == 0).all()


def test_hand_worked_metrics():
    _, metrics = importance_weights(OLD, ROLLOUT, MASK, low=0.5, high=2.5)
    apart = [LOG(2), LOG(4), LOG(3)]
    weights = [2.0, 0.5, 2.5]
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(
        {
            "importance_weight_mean": 5.0 / 3,
            "importance_outside": 2 / 3,
            "importance_effective_samples": 25.0 / (sum(w * w for w in weights) * 3),
            "mismatch_mean": sum(apart) / 3,
            "mismatch_max": LOG(4),
            "mismatch_ratio_mean": (2 + 4 + 3) / 3,
            "mismatch_tokens": 1.0,
            # KL(rollout || old) of ratios q / p: q / p - 1 - log(q / p).
            "mismatch_kl_k3": sum(r - 1 - LOG(r) for r in (2.0, 0.25, 3.0)) / 3,
        }
    )


def test_equal_logprobs_weigh_one_and_show_no_mismatch():
    weights, metrics = importance_weights(OLD, OLD, MASK, level="sequence")
    assert weights[MASK != 0].tolist() == [1.0, 1.0, 1.0]
    assert metrics["importance_effective_samples"] == 1.0
    for name in ("importance_outside", "mismatch_mean", "mismatch_tokens", "mismatch_kl_k3"):
        assert metrics[name] == 0.0


def test_the_weighted_gradient_is_that_under_the_trainers_policy():
    """Enumerated: drawn by the rollout and weighted is drawn by the old policy."""
    generator = torch.Generator().manual_seed(0)
    logits, other, advantages = torch.randn(3, 6, 1, dtype=torch.float64, generator=generator)
    old, rollout = logits.log_softmax(0), other.log_softmax(0)
    weights, _ = importance_weights(old, rollout, torch.ones(6, 1), high=None)
    new = old.clone().requires_grad_()
    # A probability that multiplies the advantage stands for how often a token is drawn.
    drawn = rollout.exp() * advantages
    loss, _ = policy_loss(new, old, drawn, torch.ones(6, 1), importance_weights=weights)
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, -old.exp() * advantages / 6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["token", "sequence", "geometric"]),
    st.sampled_from(["truncate", "mask"]),
)
def test_packed_tokens_and_deleted_ones_give_the_same(seed, level, mode):
    generator = torch.Generator().manual_seed(seed)
    old, rollout = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    options = {"level": level, "mode": mode, "low": 0.3, "high": 1.5}
    old, rollout = (torch.where(mask, x, NAN) for x in (old, rollout))
    padded, metrics = importance_weights(old, rollout, mask, **options)
    lengths = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    packed, same = importance_weights(
        old[mask], rollout[mask], mask[mask], cu_seqlens=lengths, **options
    )
    torch.testing.assert_close(padded[mask], packed)
    torch.testing.assert_close(metrics, same)


def test_extremes_stay_finite_and_fp16_is_computed_in_fp32():
    old = torch.tensor([[0.0, -1e4, -3e4]], dtype=torch.float16)
    weights, metrics = importance_weights(old, old.flip(1), torch.ones(1, 3), high=None)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [pytest.approx([math.exp(20), 1.0, math.exp(-20)], rel=1e-5)]
    assert all(x.isfinite() for x in metrics.values())


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_that_counts_gives_zeros(shape):
    weights, metrics = importance_weights(
        torch.full(shape, NAN), torch.zeros(shape), torch.zeros(shape)
    )
    assert weights.shape == shape and not weights.any()
    assert all(x == 0.0 for x in metrics.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "batch"}, "level='batch' is unknown; choose one of 'token', 'sequence'"),
        ({"mode": "drop"}, "mode='drop' is unknown"),
        ({"low": -1.0}, "low=-1.0; expected a number >= 0"),
        ({"low": 2.0, "high": 1.0}, "high=1.0; expected a number > 0 that is not below low"),
        ({"high": 0.0}, "high=0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        importance_weights(OLD, ROLLOUT, MASK, **options)
    with pytest.raises(ValueError, match="rollout_logprobs has shape"):
        importance_weights(OLD, ROLLOUT[:1], MASK)


def _weigh_a_share(rank, store, old, rollout, mask, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        rows = slice(0, 1) if rank == 0 else slice(1, 4)
        share = old[rows], rollout[rows], mask[rows]
        for together in (False, True):
            weights, metrics = importance_weights(*share, across_processes=together)
            found = {name: x.item() for name, x in metrics.items()}
            results[rank, together] = weights.tolist(), found
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
def test_metrics_of_two_processes_are_those_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    old, rollout = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    weights, metrics = importance_weights(old, rollout, mask)
    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_weigh_a_share, (f"{folder}/store", old, rollout, mask, results), nprocs=2)
        got = dict(results)
    for rank, rows in ((0, slice(0, 1)), (1, slice(1, 4))):
        alone = importance_weights(old[rows], rollout[rows], mask[rows])[1]
        for together, expected in ((True, metrics), (False, alone)):
            found_weights, found = got[rank, together]
            assert found == pytest.approx({name: x.item() for name, x in expected.items()})
            assert found_weights == [pytest.approx(row) for row in weights[rows].tolist()]
    assert got[0, False][1] != pytest.approx(got[1, False][1])
