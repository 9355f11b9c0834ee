"""Our losses and KL estimates against OpenRLHF's `models.loss` and `models.utils`, unmodified.

Where the two differ, the test says on which input, and derives from the formula who is right.
"""

from __future__ import annotations

import math

import pytest
import torch
from _peers import Batch, assert_agree, batch, load, value_and_gradients
from torch import Tensor

from rlhf_fast.ops import kl_estimate, pairwise_loss, policy_loss, value_loss

losses = load("openrlhf.models.loss")
utils = load("openrlhf.models.utils")

AGGREGATIONS = {True: "token-mean", False: "seq-mean-token-mean"}
"""OpenRLHF's `token_level_loss`, and what it is called here."""


def theirs(b: Batch, counts: dict[str, float] | None = None, **options: object):
    """OpenRLHF's policy loss as a function of the log-probs."""
    loss = losses.PolicyLoss(**options)
    return lambda x: loss(x, b.old, b.advantages, b.ones, **(counts or {}))[0]


def ours(b: Batch, token_level: bool = True, **options: object):
    aggregation = {"aggregation": AGGREGATIONS[token_level]}
    return lambda x: policy_loss(x, b.old, b.advantages, b.mask, **aggregation, **options)[0]


@pytest.mark.parametrize("token_level", AGGREGATIONS)
@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, None), (0.2, 0.28, 3.0), (0.1, 0.3, 1.1)])
def test_ppo(token_level, low, high, dual):
    for b in (batch(), batch(1, gaps=True)):
        assert_agree(
            ours(b, token_level, clip_low=low, clip_high=high, dual_clip=dual),
            theirs(
                b,
                clip_eps_low=low,
                clip_eps_high=high,
                dual_clip=dual,
                token_level_loss=token_level,
            ),
            b.logprobs,
        )


def test_ppo_statistics():
    b = batch()
    metrics = policy_loss(b.logprobs, b.old, b.advantages, b.mask)[1]
    _, clipped, kl, *_ = losses.PolicyLoss()(b.logprobs, b.old, b.advantages, b.ones)
    ours = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    torch.testing.assert_close(ours, clipped.double(), rtol=1e-6, atol=0.0)
    assert clipped > 0
    torch.testing.assert_close(metrics["approx_kl_k1"], kl)


def test_counts_of_the_global_batch():
    """Two processes, one at hand: OpenRLHF multiplies by their number, we divide by a share."""
    b = batch()
    for token_level, counts, normalizer in (
        (True, {"dp_size": 2, "batch_num_tokens": 90.0}, 45.0),
        (False, {"dp_size": 2, "global_batch_size": 14.0}, 7.0),
    ):
        assert_agree(
            ours(b, token_level, normalizer=normalizer),
            theirs(b, counts, token_level_loss=token_level),
            b.logprobs,
        )


@pytest.mark.parametrize("token_level", AGGREGATIONS)
def test_sequences_without_tokens_are_in_no_mean(token_level):
    b = batch()
    b.mask[3] = False
    assert_agree(ours(b, token_level), theirs(b, token_level_loss=token_level), b.logprobs)


def test_without_any_token_openrlhf_is_nan_ours_zero():
    b = batch()
    b.mask[:] = False
    assert theirs(b)(b.logprobs).isnan()
    value, gradient = value_and_gradients(ours(b), b.logprobs)
    assert value == 0.0 and (gradient == 0.0).all()


def test_garbage_under_the_mask_spoils_openrlhfs_loss_not_ours():
    b = batch()
    dirty = torch.where(b.mask, b.logprobs, torch.nan)
    assert theirs(b)(dirty).isnan()
    clean = value_and_gradients(ours(b), b.logprobs)
    torch.testing.assert_close(value_and_gradients(ours(b), dirty), clean)


def test_gspo_with_one_advantage_a_sequence():
    b = batch()
    b = b._replace(advantages=b.scores[:, None].expand_as(b.old))
    assert_agree(
        ours(b, False, ratio="sequence", clip_low=0.05, clip_high=0.1),
        theirs(b, policy_loss_type="gspo", clip_eps_low=0.05, clip_eps_high=0.1),
        b.logprobs,
    )


def test_gspo_takes_the_mean_over_sequences_whatever_was_asked():
    """`token_level_loss=True`, its default, is overruled; here the aggregation is an argument."""
    b = batch()
    b = b._replace(advantages=b.scores[:, None].expand_as(b.old))
    asked = theirs(b, policy_loss_type="gspo", token_level_loss=True)(b.logprobs)
    torch.testing.assert_close(asked, ours(b, False, ratio="sequence")(b.logprobs))
    assert (ours(b, True, ratio="sequence")(b.logprobs) - asked).abs() > 1e-3


def test_gspo_with_an_advantage_for_each_token():
    """The values agree, the gradients do not: ours is GSPO-token, theirs spreads evenly.

    With s the sequence's ratio and n its tokens, the paper's GSPO-token has gradient
    s A_t / n at token t; OpenRLHF, which differentiates s itself, s mean(A) / n at all of them.
    """
    b = batch(rows=1)
    tokens = b.mask.sum()
    s = (((b.logprobs - b.old) * b.ones).sum() / tokens).exp()
    value, gradient = value_and_gradients(
        ours(b, False, ratio="sequence", clip_low=None, clip_high=None), b.logprobs
    )
    torch.testing.assert_close(gradient, -s * b.advantages / tokens * b.ones)
    wide = {"clip_eps_low": 1.0, "clip_eps_high": 1e9}
    value_theirs, spread = value_and_gradients(
        theirs(b, policy_loss_type="gspo", **wide), b.logprobs
    )
    torch.testing.assert_close(value_theirs, value)
    torch.testing.assert_close(spread, -s * b.advantages.mean() / tokens * b.ones)
    assert (gradient - spread).abs().max() > 0.05


def test_gspos_ratio_overflows_in_openrlhf():
    """Ours is bounded at exp(20), as the token's ratio is in both."""
    b = batch(rows=1, steps=1)
    b = b._replace(old=b.old - 100.0, advantages=-torch.ones_like(b.old)).to(torch.float32)
    assert theirs(b, policy_loss_type="gspo")(b.logprobs).isinf()
    assert ours(b, False, ratio="sequence")(b.logprobs).item() == pytest.approx(math.exp(20.0))


@pytest.mark.parametrize("clip", [None, 0.2, 0.5])
def test_value_loss(clip):
    b = batch()
    assert_agree(
        lambda x: value_loss(x, b.old_values, b.returns, b.mask, clip=clip)[0],
        lambda x: losses.ValueLoss(clip)(x, b.old_values, b.returns, b.ones),
        b.values,
    )


@pytest.mark.parametrize("margin", [None, 0.7])
def test_pairwise_loss(margin):
    chosen, rejected = torch.randn(2, 12, dtype=torch.float64) * 3
    margins = None if margin is None else margin * torch.rand(12, dtype=torch.float64)
    assert_agree(
        lambda c, r: pairwise_loss(c, r, margin=margins)[0],
        lambda c, r: losses.PairWiseLoss()(c, r, margins),
        chosen,
        rejected,
    )


def test_log_exp_loss_ignores_the_margin_and_overflows():
    chosen, rejected = torch.randn(2, 12, dtype=torch.float64)
    margin = torch.ones(12, dtype=torch.float64)
    theirs = losses.LogExpLoss()
    torch.testing.assert_close(theirs(chosen, rejected), pairwise_loss(chosen, rejected)[0])
    assert theirs(chosen, rejected, margin) == theirs(chosen, rejected)
    # -log sigmoid(c - r - m) = log(1 + exp(r - c + m))
    truth = torch.log1p((rejected - chosen + margin).exp()).mean()
    torch.testing.assert_close(pairwise_loss(chosen, rejected, margin=margin)[0], truth)

    chosen, rejected = torch.tensor([0.0]), torch.tensor([100.0])
    assert theirs(chosen, rejected).isinf()
    assert pairwise_loss(chosen, rejected)[0].item() == pytest.approx(100.0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_estimates(kind, unbiased):
    """In fp32, to which OpenRLHF casts."""
    b = batch().to(torch.float32)
    for old in (None, b.old):
        assert_agree(
            lambda x, o=old: (
                b.advantages
                * kl_estimate(
                    x,
                    b.ref,
                    kind=kind,
                    old_logprobs=o if unbiased else None,
                    unbiased_gradient=unbiased,
                )
            ),
            lambda x, o=old: b.advantages * utils.compute_approx_kl(x, b.ref, o, kind, unbiased),
            b.logprobs,
            rtol=1e-5,
            atol=1e-6,
        )


def exact_kl(policy: Tensor, reference: Tensor) -> Tensor:
    return (policy * (policy / reference).log()).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_openrlhf_caps_every_estimate_at_10_which_biases_it(kind):
    """Two tokens: E[k1] = E[k3] = KL. Capped at +-10 neither is."""
    policy = torch.tensor([1.0 - 1e-7, 1e-7], dtype=torch.float64)
    reference = torch.tensor([1e-7, 1.0 - 1e-7], dtype=torch.float64)
    x, ref = policy.log(), reference.log()
    exact = exact_kl(policy, reference)
    torch.testing.assert_close((policy * kl_estimate(x, ref, kind=kind)).sum(), exact)
    capped = (policy * utils.compute_approx_kl(x, ref, kl_estimator=kind)).sum()
    assert exact > 16.0 and capped < 10.1


def test_openrlhf_caps_the_importance_weight_at_10_which_biases_the_gradient():
    """The old policy samples; over its tokens the gradient in the logits must be that of the KL.

    pi / old is 180 at the second token: within our cap of exp(20), beyond theirs.
    """
    logits = torch.tensor([0.0, 2.0], dtype=torch.float64)
    old = torch.tensor([1.0 - 1 / 200, 1 / 200], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.6], dtype=torch.float64)

    def kl(z: Tensor) -> Tensor:
        return exact_kl(z.softmax(0), reference)

    def sampled(estimate):
        return lambda z: (old * estimate(z.log_softmax(0), reference.log(), old.log())).sum()

    def mine(x: Tensor, ref: Tensor, old: Tensor) -> Tensor:
        return kl_estimate(x, ref, old_logprobs=old, unbiased_gradient=True)

    def peer(x: Tensor, ref: Tensor, old: Tensor) -> Tensor:
        return utils.compute_approx_kl(x, ref, old, "k1", True)

    truth = value_and_gradients(kl, logits)[1]
    torch.testing.assert_close(value_and_gradients(sampled(mine), logits)[1], truth)
    biased = value_and_gradients(sampled(peer), logits)[1]
    assert (biased - truth).abs().max() > 0.2 * truth.abs().max()
