"""Our losses and KL estimates against verl's `core_algos`, called unmodified.

Where the two differ, the test says on which input, and derives from the formula who is right.
"""

from __future__ import annotations

import math

import pytest
import torch
from _peers import Batch, assert_agree, batch, load, value_and_gradients
from torch import Tensor

from rlhf_fast.ops import kl_estimate, policy_loss, value_loss

algos = load("verl.trainer.ppo.core_algos")
ActorConfig = load("verl.workers.config").ActorConfig

AGGREGATIONS = {
    "token-mean": lambda b: {"aggregation": "token-mean"},
    "token-sum": lambda b: {"aggregation": "constant", "normalizer": 1.0},
    "seq-mean-token-mean": lambda b: {"aggregation": "seq-mean-token-mean"},
    "seq-mean-token-sum": lambda b: {"aggregation": "seq-mean-token-sum"},
    # Divided by the sequences that have tokens, and by the padded length.
    "seq-mean-token-sum-norm": lambda b: {
        "aggregation": "constant",
        "normalizer": float(b.mask.any(1).sum() * b.mask.shape[1]),
    },
}
"""verl's `loss_agg_mode`, and what it is called here."""
NO_DUAL_CLIP = 1e30
"""A bound that no loss reaches: verl's dual clip cannot be switched off."""


def actor(**options: object) -> object:
    return ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **options)


def theirs(
    name: str, b: Batch, mode: str = "token-mean", weights: Tensor | None = None, **options: object
):
    """verl's policy loss as a function of the log-probs."""
    loss, config = algos.get_policy_loss_fn(name), actor(**options)
    return lambda x: loss(b.old, x, b.advantages, b.ones, mode, config, weights)[0]


def ours(b: Batch, mode: str = "token-mean", **options: object):
    aggregation = AGGREGATIONS[mode](b)
    return lambda x: policy_loss(x, b.old, b.advantages, b.mask, **aggregation, **options)[0]


def one_token(log_ratio: float, advantage: float, **others: float) -> Batch:
    """A batch of one token whose log-ratio is `log_ratio`."""
    b = batch(rows=1, steps=1)
    new = {"old": -30.0, "logprobs": -30.0 + log_ratio, "advantages": advantage} | others
    return b._replace(**{name: torch.full_like(b.old, x) for name, x in new.items()})


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, 3.0), (0.2, 0.28, 1.1), (0.1, 0.3, 10.0)])
def test_ppo_with_dual_clip(mode, low, high, dual):
    for b in (batch(), batch(1, gaps=True)):
        for weights in (None, (b.old - b.rollout).exp()):
            options = {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": dual}
            assert_agree(
                ours(
                    b,
                    mode,
                    clip_low=low,
                    clip_high=high,
                    dual_clip=dual,
                    importance_weights=weights,
                ),
                theirs("vanilla", b, mode, weights, **options),
                b.logprobs,
            )


def test_ppo_statistics():
    b = batch()
    metrics = policy_loss(b.logprobs, b.old, b.advantages, b.mask)[1]
    expected = algos.get_policy_loss_fn("vanilla")(
        b.old, b.logprobs, b.advantages, b.ones, config=actor(clip_ratio_c=NO_DUAL_CLIP)
    )[1]
    clipped = (metrics["clip_fraction_low"] + metrics["clip_fraction_high"]).item()
    assert 0.0 < clipped == pytest.approx(expected["actor/pg_clipfrac"], rel=1e-6)
    kl = metrics["approx_kl_k1"].item()
    assert kl == pytest.approx(expected["actor/ppo_kl"], rel=1e-6)


def test_verls_default_is_dual_clip_at_3_ours_is_plain_ppo():
    # rho = 5, A = -1: eq. 7 of PPO gives max(5, clip(5)) = 5, dual clip with c = 3 gives 3.
    b = one_token(math.log(5.0), -1.0)
    assert value_and_gradients(ours(b), b.logprobs)[0].item() == pytest.approx(5.0)
    value, gradient = value_and_gradients(theirs("vanilla", b), b.logprobs)
    assert value.item() == pytest.approx(3.0) and gradient.item() == 0.0
    assert ours(b, dual_clip=3.0)(b.logprobs).item() == pytest.approx(3.0)


@pytest.mark.parametrize("log_ratio", [-25.0, 25.0])
def test_log_ratios_beyond_20_are_bounded_alike(log_ratio):
    b = one_token(log_ratio, -1.0)
    expected = value_and_gradients(theirs("vanilla", b, clip_ratio_c=NO_DUAL_CLIP), b.logprobs)
    torch.testing.assert_close(value_and_gradients(ours(b), b.logprobs), expected)
    assert expected[1].item() == 0.0


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gspo(mode):
    for b in (batch(), batch(2, gaps=True)):  # advantages differ by token: the GSPO-token form
        assert_agree(
            ours(b, mode, ratio="sequence", clip_low=0.05, clip_high=0.1),
            theirs("gspo", b, mode, clip_ratio_low=0.05, clip_ratio_high=0.1),
            b.logprobs,
        )


def test_gspo_ratios_beyond_exp_10_lose_their_gradient_in_verl():
    # One token, s = exp(12), A = -1: the loss is max(s, clip(s)) = s, and ds/dlogp = s.
    b = one_token(12.0, -1.0)
    truth = torch.tensor(12.0, dtype=torch.float64).exp().reshape(1, 1)
    value, gradient = value_and_gradients(ours(b, ratio="sequence"), b.logprobs)
    torch.testing.assert_close(value.reshape(1, 1), truth)
    torch.testing.assert_close(gradient, truth)
    value, gradient = value_and_gradients(theirs("gspo", b), b.logprobs)
    assert value.item() == pytest.approx(math.exp(10.0)) and gradient.item() == 0.0


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.28)])
def test_cispo(mode, low, high):
    b = batch()
    assert_agree(
        ours(b, mode, ratio="cispo", clip_low=low, clip_high=high),
        theirs("cispo", b, mode, clip_ratio_low=low, clip_ratio_high=high),
        b.logprobs,
    )


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_policy_gradient_without_a_ratio(mode):
    b = batch()
    assert_agree(ours(b, mode, ratio="none"), theirs("gpg", b, mode), b.logprobs)


def test_counts_of_the_global_batch():
    """Two processes, one of them at hand: verl multiplies by their number, we divide by a share."""
    b = batch()
    for mode, info, normalizer in (
        ("token-mean", {"batch_num_tokens": 90}, 45.0),
        ("seq-mean-token-mean", {"global_batch_size": 14}, 7.0),
        ("seq-mean-token-sum", {"global_batch_size": 14}, 7.0),
    ):
        config = actor(global_batch_info={"dp_size": 2, **info})
        assert_agree(
            ours(b, mode, normalizer=normalizer, dual_clip=3.0),
            lambda x, m=mode, c=config: algos.compute_policy_loss_vanilla(
                b.old, x, b.advantages, b.ones, m, c
            )[0],
            b.logprobs,
        )


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_sequences_without_tokens_are_in_no_mean(mode):
    b = batch()
    b.mask[3] = False
    assert_agree(ours(b, mode, dual_clip=3.0), theirs("vanilla", b, mode), b.logprobs)


def test_without_any_token_verl_is_nan_ours_zero():
    b = batch()
    b.mask[:] = False
    assert theirs("vanilla", b)(b.logprobs).isnan()
    value, gradient = value_and_gradients(ours(b), b.logprobs)
    assert value == 0.0 and (gradient == 0.0).all()


def test_garbage_under_the_mask_touches_nothing_here():
    """verl drops it from a token mean's value; elsewhere 0 x NaN survives in value or gradient."""
    b = batch()
    clean = value_and_gradients(ours(b, dual_clip=3.0), b.logprobs)
    dirty = b._replace(
        logprobs=torch.where(b.mask, b.logprobs, torch.nan),
        advantages=torch.where(b.mask, b.advantages, torch.nan),
    )
    for mode in ("token-mean", "seq-mean-token-mean"):
        expected = value_and_gradients(ours(b, mode, dual_clip=3.0), b.logprobs)
        got = value_and_gradients(ours(dirty, mode, dual_clip=3.0), dirty.logprobs)
        torch.testing.assert_close(got, expected)
    # Of the two, verl bears NaN log-probs: its clamp has no gradient there.
    torch.testing.assert_close(value_and_gradients(theirs("vanilla", b), dirty.logprobs), clean)
    value, gradient = value_and_gradients(theirs("vanilla", dirty), b.logprobs)
    torch.testing.assert_close(value, clean[0])
    assert gradient[~b.mask].isnan().all()
    assert theirs("vanilla", b, "seq-mean-token-mean")(dirty.logprobs).isnan()


@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_value_loss(clip):
    b = batch()
    assert_agree(
        lambda x: value_loss(x, b.old_values, b.returns, b.mask, clip=clip)[0],
        lambda x: algos.compute_value_loss(x, b.returns, b.old_values, b.ones, clip)[0],
        b.values,
    )
    expected = algos.compute_value_loss(b.values, b.returns, b.old_values, b.ones, clip)[1].item()
    metrics = value_loss(b.values, b.old_values, b.returns, b.mask, clip=clip)[1]
    assert 0.0 < metrics["value_clip_fraction"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "name, kind", [("kl", "k1"), ("k1", "k1"), ("abs", "abs"), ("mse", "k2"), ("low_var_kl", "k3")]
)
def test_kl_estimates(name, kind):
    b = batch()
    upstream = b.advantages  # a gradient that differs by token
    assert_agree(
        lambda x, ref: upstream * kl_estimate(x, ref, kind=kind),
        lambda x, ref: upstream * algos.kl_penalty(x, ref, name),
        b.logprobs,
        b.ref,
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_straight_through_kl_estimates(kind):
    """verl's `+`: the value of one estimate, k2's gradient. It has no weight for off-policy."""
    b = batch()
    assert_agree(
        lambda x: b.advantages * kl_estimate(x, b.ref, kind=kind, unbiased_gradient=True),
        lambda x: b.advantages * algos.kl_penalty(x, b.ref, f"{kind}+"),
        b.logprobs,
    )


def test_verl_caps_k3_at_10_which_biases_it():
    """Two tokens: E[k3] is the KL. Capped at 10 it is not, and loses the gradient there."""
    policy = torch.tensor([1e-3, 1.0 - 1e-3], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    mean = (policy * kl_estimate(policy.log(), reference.log(), kind="k3")).sum()
    torch.testing.assert_close(mean, exact)
    capped = (policy * algos.kl_penalty(policy.log(), reference.log(), "k3")).sum()
    assert capped < 0.5 * exact

    x, ref = torch.tensor([-7.0], dtype=torch.float64), torch.tensor([-0.7], dtype=torch.float64)
    assert value_and_gradients(lambda x: algos.kl_penalty(x, ref, "k3"), x)[1] == 0.0
    gradient = value_and_gradients(lambda x: kl_estimate(x, ref, kind="k3"), x)[1]
    torch.testing.assert_close(gradient, 1.0 - (ref - x).exp())  # d(exp(-u) - 1 + u)/du


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_loss_with_kl_and_entropy(mode):
    """The sum that verl's actor minimises: policy loss, entropy bonus and KL, aggregated alike."""
    b = batch()

    def total(x: Tensor, entropy: Tensor) -> Tensor:
        loss = theirs("vanilla", b, mode)(x)
        kl = algos.kl_penalty(x, b.ref, "low_var_kl")
        bonus = algos.agg_loss(entropy, b.ones, mode)
        return loss + 0.1 * algos.agg_loss(kl, b.ones, mode) - 0.01 * bonus

    options = AGGREGATIONS[mode](b) | {"dual_clip": 3.0, "kl_coef": 0.1, "kl_kind": "k3"}
    assert_agree(
        lambda x, entropy: policy_loss(
            x,
            b.old,
            b.advantages,
            b.mask,
            entropy=entropy,
            entropy_coef=0.01,
            ref_logprobs=b.ref,
            **options,
        )[0],
        total,
        b.logprobs,
        b.entropy,
    )
