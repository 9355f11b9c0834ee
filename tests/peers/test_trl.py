"""Our losses against those of TRL's GRPO and RLOO trainers, called unmodified.

`_compute_loss` runs on a stand-in for the trainer that hands it the log-probs. Where the two
differ, the test says on which input, and derives from the formula who is right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from _peers import Accelerator, Batch, assert_agree, batch, load, value_and_gradients
from torch import Tensor

from rlhf_fast.ops import kl_estimate, policy_loss

GRPOTrainer = load("trl.trainer.grpo_trainer").GRPOTrainer
RLOOTrainer = load("trl.trainer.rloo_trainer").RLOOTrainer

LIMIT = 16
"""TRL's `max_completion_length`."""
ALL_TOKENS = 90.0
"""TRL's `num_items_in_batch`: tokens of the batch in all processes."""
PROCESSES, ACCUMULATED, PER_GENERATION = 2, 3, 4

AGGREGATIONS = {
    "grpo": lambda b: {
        "aggregation": "seq-mean-token-mean",
        "normalizer": float(len(b.mask) * ACCUMULATED),
    },
    "bnpo": lambda b: {"normalizer": float(b.mask.sum() * ACCUMULATED)},
    "dr_grpo": lambda b: {
        "aggregation": "constant",
        "normalizer": float(len(b.mask) * LIMIT * ACCUMULATED),
    },
    "luspo": lambda b: {
        "aggregation": "seq-mean-token-sum",
        "normalizer": float(len(b.mask) * ACCUMULATED),
    },
    "dapo": lambda b: {"normalizer": ALL_TOKENS / PROCESSES * ACCUMULATED / PER_GENERATION},
}
"""TRL's `loss_type`, and what it is called here. TRL divides each micro-batch's loss by
`ACCUMULATED` itself, and for `dapo` by this process's share of all tokens of one update."""


def trainer(logprobs: Tensor, entropy: Tensor, **options: object) -> SimpleNamespace:
    """Stands in for `self` in `_compute_loss`, with TRL's defaults but a clip of 0.2 and 0.28."""
    settings = {
        "_entropy_bonus_enabled": False,
        "_get_per_token_logps_and_entropies": lambda *args, **kw: (logprobs, entropy, None),
        "_metrics": {"train": defaultdict(list)},
        "accelerator": Accelerator(PROCESSES),
        "args": SimpleNamespace(
            delta=options.pop("delta", None),
            steps_per_generation=PER_GENERATION,
            use_bias_correction_kl=options.pop("use_bias_correction_kl", False),
        ),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": ACCUMULATED,
        "entropy_coef": 0.0,
        "epsilon_high": 0.28,
        "epsilon_low": 0.2,
        "importance_sampling_level": "token",
        "loss_type": "dapo",
        "max_completion_length": LIMIT,
        "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_adaptive_entropy": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
    }
    return SimpleNamespace(**settings | options)


def inputs(b: Batch, **others: Tensor) -> dict[str, Tensor]:
    prompt = torch.zeros(len(b.mask), 1, dtype=torch.long)
    return {
        "advantages": b.scores,
        "completion_ids": torch.zeros_like(b.mask, dtype=torch.long),
        "completion_mask": b.mask.long(),
        "num_items_in_batch": torch.tensor(ALL_TOKENS),
        "old_per_token_logps": b.old,
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "ref_per_token_logps": b.ref,
        **others,
    }


def theirs(b: Batch, given: dict[str, Tensor] | None = None, **options: object):
    """TRL's GRPO loss as a function of the log-probs."""
    given = inputs(b, **(given or {}))
    return lambda x, entropy=b.entropy: GRPOTrainer._compute_loss(
        trainer(x, entropy, **options), None, given
    )


def ours(b: Batch, name: str = "dapo", **options: object):
    options = {"clip_low": 0.2, "clip_high": 0.28} | AGGREGATIONS[name](b) | options
    return lambda x, entropy=None: policy_loss(
        x, b.old, b.scores, b.mask, entropy=entropy, **options
    )[0]


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("level, ratio", [("token", "token"), ("sequence", "sequence")])
def test_grpo_losses(name, level, ratio):
    b = batch()
    assert_agree(
        ours(b, name, ratio=ratio),
        theirs(b, loss_type=name, importance_sampling_level=level),
        b.logprobs,
    )


def test_delta_is_dual_clip():
    """TRL bounds the ratio from above, which with A < 0 is dual clip; with A > 0 clip decides."""
    b = batch()
    assert_agree(ours(b, dual_clip=1.4), theirs(b, delta=1.4), b.logprobs)
    assert ours(b, dual_clip=1.4)(b.logprobs) != ours(b)(b.logprobs)


def test_clip_fractions():
    b = batch()
    stand_in = trainer(b.logprobs, b.entropy)
    GRPOTrainer._compute_loss(stand_in, None, inputs(b))
    metrics = policy_loss(b.logprobs, b.old, b.scores, b.mask, clip_low=0.2, clip_high=0.28)[1]
    for side in ("low", "high"):
        (expected,) = stand_in._metrics["train"][f"clip_ratio/{side}_mean"]
        assert 0.0 < expected == pytest.approx(metrics[f"clip_fraction_{side}"].item(), rel=1e-6)


def test_cispos_bound_is_the_ratio_itself_in_trl_its_distance_from_1_here():
    b = batch()
    given = {"loss_type": "cispo", "epsilon_high": 1.3}
    assert_agree(
        ours(b, ratio="cispo", clip_low=None, clip_high=0.3), theirs(b, **given), b.logprobs
    )
    # The paper's (MiniMax 2025) weight is clip(rho, 1 - eps_low, 1 + eps_high): with TRL's
    # default, 0.2, no ratio gets past 0.2, and each token's weight is all but the same.
    gradient = value_and_gradients(theirs(b, loss_type="cispo", epsilon_high=0.2), b.logprobs)[1]
    flat = value_and_gradients(ours(b, ratio="none"), b.logprobs)[1]
    torch.testing.assert_close(gradient, 0.2 * flat)
    paper = ours(b, ratio="cispo", clip_low=0.2, clip_high=0.2)
    ratio = (b.logprobs - b.old).exp().clamp(0.8, 1.2)
    torch.testing.assert_close(value_and_gradients(paper, b.logprobs)[1], ratio * flat)


def test_sequences_without_tokens_count_in_trls_mean_not_in_ours():
    """A completion that was masked out whole has no loss to average: verl leaves it out, too."""
    b = batch()
    b.mask[3] = False
    rows = len(b.mask)
    options = {"aggregation": "seq-mean-token-mean", "normalizer": None}
    mean = ours(b, "grpo", **options)(b.logprobs) / ACCUMULATED
    got = theirs(b, loss_type="grpo")(b.logprobs)
    torch.testing.assert_close(got, mean * (rows - 1) / rows)
    by_row = [
        ours(Batch(*(x[i : i + 1] for x in b)), "grpo", **options)(b.logprobs[i : i + 1])
        for i in range(rows)
        if i != 3
    ]
    torch.testing.assert_close(mean * ACCUMULATED, torch.stack(by_row).mean())


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_kl_in_the_loss(name):
    b = batch()
    assert_agree(
        ours(b, name, ref_logprobs=b.ref, kl_coef=0.1, kl_kind="k3"),
        theirs(b, loss_type=name, beta=0.1),
        b.logprobs,
    )


def test_corrected_kl_has_our_unbiased_gradient():
    """TRL, by default, multiplies k3 by rho: d(rho k3) = rho (k3 + 1 - exp(-u)) = rho u d logp.

    That is what `unbiased_gradient` puts behind any estimate; only the values differ, by rho.
    """
    b = batch()

    def loss(x: Tensor) -> Tensor:
        kl = kl_estimate(x, b.ref, kind="k3", old_logprobs=b.old, unbiased_gradient=True)
        return ours(b, kl=kl, kl_coef=0.1)(x)

    corrected = theirs(b, beta=0.1, use_bias_correction_kl=True)
    gradient = value_and_gradients(corrected, b.logprobs)[1]
    torch.testing.assert_close(value_and_gradients(loss, b.logprobs)[1], gradient)
    rho, k3 = (b.logprobs - b.old).exp(), kl_estimate(b.logprobs, b.ref, kind="k3")
    term = corrected(b.logprobs) - theirs(b)(b.logprobs)
    divisor = AGGREGATIONS["dapo"](b)["normalizer"]
    torch.testing.assert_close(term, 0.1 * (rho * k3)[b.mask].sum() / divisor)


def test_weights_for_another_sampler_multiply_the_policy_loss_only():
    b = batch()
    weights = (b.old - b.rollout).exp()
    assert_agree(
        ours(b, importance_weights=weights, ref_logprobs=b.ref, kl_coef=0.1, kl_kind="k3"),
        theirs(b, {"importance_sampling_ratio": weights}, use_vllm=True, beta=0.1),
        b.logprobs,
    )


def test_entropy_bonus_is_a_mean_over_tokens_in_trl_aggregated_as_the_loss_here():
    b = batch()
    bonus = {"_entropy_bonus_enabled": True, "entropy_coef": 0.05}
    assert_agree(
        ours(b, "bnpo", entropy_coef=0.05),
        theirs(b, loss_type="bnpo", **bonus),
        b.logprobs,
        b.entropy,
    )
    plain = theirs(b, loss_type="grpo")(b.logprobs)
    term = plain - theirs(b, loss_type="grpo", **bonus)(b.logprobs)
    torch.testing.assert_close(term, 0.05 * b.entropy[b.mask].mean() / ACCUMULATED)
    term = plain - ours(b, "grpo", entropy_coef=0.05)(b.logprobs, b.entropy)
    by_row = (b.entropy * b.ones).sum(1) / b.ones.sum(1)
    torch.testing.assert_close(term, 0.05 * by_row.mean() / ACCUMULATED)


def test_ratios_overflow_in_trl_ours_are_bounded():
    """A < 0 and rho = exp(100): inf in fp32, and no finite gradient; ours stays at exp(20)."""
    b = batch(rows=1, steps=1)
    b = b._replace(old=b.logprobs - 100.0, scores=-torch.ones(1)).to(torch.float32)
    value, gradient = value_and_gradients(theirs(b, loss_type="bnpo"), b.logprobs)
    assert value.isinf() and not gradient.isfinite().all()
    value, gradient = value_and_gradients(ours(b, "bnpo"), b.logprobs)
    assert value.item() == pytest.approx(math.exp(20.0) / ACCUMULATED, rel=1e-5)
    assert gradient.item() == 0.0


def test_garbage_under_the_mask_spoils_trls_loss_not_ours():
    b = batch()
    dirty = torch.where(b.mask, b.logprobs, torch.nan)
    assert theirs(b)(dirty).isnan()
    clean = value_and_gradients(ours(b), b.logprobs)
    torch.testing.assert_close(value_and_gradients(ours(b), dirty), clean)


def rloo(b: Batch, **options: object):
    given = inputs(b, old_logps=(b.old * b.ones).sum(1))
    return lambda x: RLOOTrainer._compute_loss(trainer(x, b.entropy, **options), None, given)


def test_rloo_on_policy_is_reinforce():
    b = batch()
    b = b._replace(old=b.logprobs)
    ours_ = ours(b, ratio="none", aggregation="seq-mean-token-sum", normalizer=None)
    gradient = value_and_gradients(rloo(b), b.logprobs)[1]
    torch.testing.assert_close(value_and_gradients(ours_, b.logprobs)[1], gradient)


def test_rloos_ratio_is_the_product_over_the_sequence():
    """Ours of a sequence is the geometric mean; the product is a weight, given ready-made."""
    b = batch()
    product = ((b.logprobs - b.old) * b.ones).sum(1).exp()
    decided = torch.where(b.scores > 0, product <= 1.28, product >= 0.8)
    assert decided.any() and not decided.all()
    ours_ = ours(
        b,
        ratio="none",
        aggregation="seq-mean-token-sum",
        normalizer=None,
        importance_weights=torch.where(decided, product, 0.0),
    )
    gradient = value_and_gradients(rloo(b), b.logprobs)[1]
    torch.testing.assert_close(value_and_gradients(ours_, b.logprobs)[1], gradient)
