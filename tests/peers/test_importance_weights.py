"""Our weights for what another engine sampled, against the corrections of all three projects.

The two log-probs of `batch()`: `old` is the trainer's, `rollout` the engine's.
"""

from __future__ import annotations

import pytest
import torch
from _peers import assert_agree, batch, load
from trl_rollouts import generate_and_score

from rlhf_fast.ops import policy_loss

algos = load("verl.trainer.ppo.core_algos")
correction = load("verl.trainer.ppo.rollout_corr_helper")
ActorConfig = load("verl.workers.config").ActorConfig
losses = load("openrlhf.models.loss")
GRPOTrainer = load("trl.trainer.grpo_trainer").GRPOTrainer

SCALES = (0.5, 12.0)
"""The second makes most ratios leave the bounds, and some sums of their logarithms leave +-20."""


def far(scale: float):
    b = batch(rows=12)
    return b._replace(rollout=b.old + scale * (b.rollout - b.old))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "threshold, ours",
    [
        (2.0, {"mode": "truncate", "high": 2.0}),
        ("0.5_1.5", {"mode": "mask", "low": 0.5, "high": 1.5}),
    ],
)
def test_weights_of_verl(scale, level, threshold, ours):
    from rlhf_fast.ops import importance_weights

    b = far(scale)
    expected, statistics = correction.compute_rollout_correction_weights(
        b.old - b.rollout, b.ones, level, threshold
    )
    weights, metrics = importance_weights(b.old, b.rollout, b.mask, level=level, **ours)
    torch.testing.assert_close(weights[b.mask], expected[b.mask])
    mean = statistics["rollout_is_mean"]
    assert metrics["importance_weight_mean"].item() == pytest.approx(mean, rel=1e-6)


def test_geometric_mean_masks_what_verl_rejects():
    """verl's `seq_mean_k1` bounds the mean of -log ratio: a band around 1 that is [1/c, c]."""
    from rlhf_fast.ops import importance_weights

    b = far(0.5)
    kept, _ = correction.compute_rollout_rejection_mask(
        b.old - b.rollout, b.ones, "seq_mean_k1", 1.1
    )
    options = {"level": "geometric", "mode": "mask", "low": 1 / 1.1, "high": 1.1}
    weights, _ = importance_weights(b.old, b.rollout, b.mask, **options)
    assert 0 < kept.sum() < b.mask.sum()
    assert torch.equal(weights > 0.0, kept != 0.0)


def test_verls_k1_bounds_are_of_the_inverse_ratio():
    """verl rejects by -log(old / rollout): its `lower_upper` is ours upside down."""
    from rlhf_fast.ops import importance_weights

    b = far(0.5)
    kept, _ = correction.compute_rollout_rejection_mask(
        b.old - b.rollout, b.ones, "token_k1", "0.5_1.25"
    )
    for low, high, same in ((1 / 1.25, 1 / 0.5, True), (0.5, 1.25, False)):
        weights, _ = importance_weights(b.old, b.rollout, b.mask, mode="mask", low=low, high=high)
        assert torch.equal(weights > 0.0, kept != 0.0) == same


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weighted_losses_of_verl(level):
    from rlhf_fast.ops import importance_weights

    b = far(0.5)
    expected, _ = correction.compute_rollout_correction_weights(
        b.old - b.rollout, b.ones, level, 2.0
    )
    weights, _ = importance_weights(b.old, b.rollout, b.mask, level=level)
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    assert_agree(
        lambda x: policy_loss(
            x, b.old, b.advantages, b.mask, dual_clip=3.0, importance_weights=weights
        )[0],
        lambda x: algos.compute_policy_loss_vanilla(
            b.old, x, b.advantages, b.ones, "token-mean", config, expected
        )[0],
        b.logprobs,
    )
    assert_agree(
        lambda x: policy_loss(
            x,
            b.old,
            b.advantages,
            b.mask,
            ratio="none",
            aggregation="seq-mean-token-sum",
            importance_weights=weights,
        )[0],
        lambda x: algos.compute_policy_loss_reinforce(
            b.rollout, x, b.advantages, b.ones, config=config, rollout_is_weights=expected
        )[0],
        b.logprobs,
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode, ours", [("clip", "truncate"), ("mask", "mask")])
def test_weighted_loss_of_openrlhf(scale, mode, ours):
    from rlhf_fast.ops import importance_weights

    b = far(scale)
    weights, metrics = importance_weights(b.old, b.rollout, b.mask, mode=ours, low=0.5, high=5.0)
    loss = losses.PolicyLoss(is_correction_level="token", is_correction_mode=mode)
    assert_agree(
        lambda x: policy_loss(x, b.old, b.advantages, b.mask, importance_weights=weights)[0],
        lambda x: loss(x, b.old, b.advantages, b.ones, b.rollout)[0],
        b.logprobs,
    )
    outside = loss(b.logprobs, b.old, b.advantages, b.ones, b.rollout)[4]
    assert 0.0 < metrics["importance_outside"].item() == pytest.approx(outside.item(), rel=1e-6)


def test_openrlhf_gates_by_the_geometric_mean_and_weighs_by_the_token():
    """At `seq` level both drop the same sequences; what is left keeps its tokens' own ratios there,
    the geometric mean that was looked at here. Ours take two calls for theirs.
    """
    from rlhf_fast.ops import importance_weights

    b = far(0.5)
    bounds = {"mode": "mask", "low": 0.9, "high": 1.1}
    geometric, _ = importance_weights(b.old, b.rollout, b.mask, level="geometric", **bounds)
    token, _ = importance_weights(b.old, b.rollout, b.mask, high=None)
    assert (geometric > 0).any() and not (geometric[b.mask] > 0).all()
    loss = losses.PolicyLoss(is_correction_level="seq", is_correction_threshold=[0.9, 1.1])
    assert_agree(
        lambda x: policy_loss(
            x,
            b.old,
            b.advantages,
            b.mask,
            importance_weights=torch.where(geometric > 0, token, 0.0),
        )[0],
        lambda x: loss(x, b.old, b.advantages, b.ones, b.rollout)[0],
        b.logprobs,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("low, high", [(None, 3.0), (0.7, 1.4), (0.7, None)])
def test_weights_of_trl(level, mode, low, high):
    from rlhf_fast.ops import importance_weights

    b = far(0.5)
    theirs = generate_and_score(
        GRPOTrainer,
        b,
        use_vllm=True,
        vllm_importance_sampling_mode=f"{level}_{mode}",
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )["importance_sampling_ratio"].expand_as(b.old)
    weights, _ = importance_weights(
        b.old, b.rollout, b.mask, level=level, mode=mode, low=low, high=high
    )
    # TRL's log-probs of the engine go through fp32.
    torch.testing.assert_close(weights[b.mask], theirs[b.mask], rtol=1e-5, atol=1e-6)


def test_an_unbounded_product_overflows_in_trl_ours_stops_at_exp_20():
    from rlhf_fast.ops import importance_weights

    b = far(1.0).to(torch.float32)
    b = b._replace(rollout=b.old - 20.0)
    options = {"use_vllm": True, "vllm_importance_sampling_mode": "sequence_truncate"}
    unbounded = {"vllm_importance_sampling_clip_max": 1e38}
    theirs = generate_and_score(GRPOTrainer, b, **options, **unbounded)
    assert (theirs["importance_sampling_ratio"] == 1e38).any()
    weights, _ = importance_weights(b.old, b.rollout, b.mask, level="sequence", high=None)
    assert torch.allclose(weights[b.mask], torch.tensor(20.0).exp())
