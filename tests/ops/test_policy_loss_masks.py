"""policy_loss: masks, packed and padded layouts, extremes and emptiness, on every backend."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_loss_cases import AGGREGATIONS, RATIOS, batch

GARBAGE = (math.nan, math.inf, -math.inf)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 2**31),
    st.sampled_from(RATIOS),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from(GARBAGE),
)
def test_any_mask_equals_deleting_what_it_hides(policy_loss, seed, ratio, aggregation, garbage):
    new, old, adv, mask = batch(seed, sequences=3, length=4)
    options = {"ratio": ratio, "aggregation": aggregation}
    if aggregation == "constant":
        options["normalizer"] = 11.0
    dirty = [torch.where(mask, x, garbage) for x in (new, old, adv, new.exp(), old - 0.1)]
    x = dirty[0].requires_grad_()
    loss, metrics = policy_loss(
        *dirty[:3],
        mask,
        importance_weights=dirty[3],
        ref_logprobs=dirty[4],
        kl_coef=0.1,
        **options,
    )
    loss.backward()
    assert (x.grad[~mask] == 0).all()

    lengths = torch.tensor([0, *mask.sum(1).tolist()])
    y = new[mask].requires_grad_()
    packed, packed_metrics = policy_loss(
        y,
        old[mask],
        adv[mask],
        torch.ones(y.shape),
        importance_weights=new[mask].detach().exp(),
        ref_logprobs=(old - 0.1)[mask],
        kl_coef=0.1,
        cu_seqlens=lengths.cumsum(0).int(),
        **options,
    )
    packed.backward()
    torch.testing.assert_close(loss, packed)
    torch.testing.assert_close(x.grad[mask], y.grad)
    for name, value in metrics.items():
        torch.testing.assert_close(packed_metrics[name], value, msg=name)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_tokens_with_gaps_give_what_padded_ones_do(policy_loss, ratio, aggregation):
    new, old, _, mask = batch(11)
    adv = torch.randn(4, dtype=torch.float64)
    inside = torch.arange(5) < torch.tensor([5, 0, 3, 4])[:, None]
    mask = mask & inside
    options = {"ratio": ratio, "aggregation": aggregation}
    if aggregation == "constant":
        options["normalizer"] = 11.0
    padded = policy_loss(new, old, adv, mask, **options)
    packed = policy_loss(
        new[inside],
        old[inside],
        adv,
        mask[inside],
        cu_seqlens=torch.tensor([0, 5, 5, 8, 12], dtype=torch.int32),
        **options,
    )
    torch.testing.assert_close(packed, padded)


@pytest.mark.parametrize("ratio", RATIOS)
def test_permutation_and_padding_do_not_matter(policy_loss, ratio):
    new, old, adv, mask = batch(12)
    options = {"ratio": ratio, "aggregation": "seq-mean-token-mean"}
    want = policy_loss(new, old, adv, mask, **options)
    order = torch.tensor([3, 1, 0, 2])
    permuted = policy_loss(new[order], old[order], adv[order], mask[order], **options)
    torch.testing.assert_close(permuted, want)
    pad = torch.nn.functional.pad
    for sides in ((3, 0), (0, 4), (2, 1)):
        wide = [pad(x, sides, value=math.nan) for x in (new, old, adv)]
        torch.testing.assert_close(policy_loss(*wide, pad(mask, sides), **options), want)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("extreme", [90.0, 1e4, 1e30, math.inf])
def test_extreme_log_ratios_never_give_nan(policy_loss, ratio, extreme):
    new = torch.tensor([[-1.0, -extreme, -1.0, -extreme, -1.0]], requires_grad=True)
    old = torch.tensor([[-extreme, -1.0, -1.0, -extreme, -1.0]])
    for sign in (1.0, -1.0, 0.0):
        new.grad = None
        loss, metrics = policy_loss(
            new,
            old,
            torch.full((1,), sign),
            torch.ones(1, 5),
            ratio=ratio,
            ref_logprobs=old,
            kl_coef=0.1,
            kl_kind="k3",
        )
        loss.backward()
        assert not loss.isnan()
        assert not new.grad.isnan().any()
        assert not any(value.isnan() for value in metrics.values())
        assert metrics["ratio_max"].item() <= math.exp(20.0) * 1.001


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_that_counts_gives_a_differentiable_zero(policy_loss, shape, ratio, aggregation):
    new = torch.full(shape, math.nan, requires_grad=True)
    normalizer = torch.tensor(0) if aggregation == "constant" else None
    loss, metrics = policy_loss(
        new,
        new,
        new,
        torch.zeros(shape),
        ratio=ratio,
        aggregation=aggregation,
        normalizer=normalizer,
        entropy=new,
        entropy_coef=0.1,
        ref_logprobs=new,
        kl_coef=0.1,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(new.grad, torch.zeros(shape))
    assert all(value.item() == 0.0 for value in metrics.values())


def test_an_empty_pack_gives_a_differentiable_zero(policy_loss):
    new = torch.zeros(0, requires_grad=True)
    for ratio in RATIOS:
        loss, _ = policy_loss(
            new,
            new,
            torch.zeros(2),
            torch.zeros(0),
            ratio=ratio,
            aggregation="seq-mean-token-mean",
            cu_seqlens=torch.tensor([0, 0, 0], dtype=torch.int32),
        )
        loss.backward()
        assert loss.item() == 0.0
