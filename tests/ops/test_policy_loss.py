"""policy_loss: terms, aggregation, micro-batches and messages, on every backend."""

import math

import pytest
import torch
from policy_loss_cases import AGGREGATIONS, RATIOS, batch, rows

from rlhf_fast import ops


def test_hand_worked_aggregations(policy_loss):
    # Token losses are -A at ratio 1: rows 1 2 | 6 | nothing.
    x = torch.zeros(3, 2)
    adv = torch.tensor([[-1.0, -2.0], [-6.0, 99.0], [math.nan, 5.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    want = {
        "token-mean": 9 / 3,
        "seq-mean-token-mean": (1.5 + 6) / 2,
        "seq-mean-token-sum": (3 + 6) / 2,
        "constant": 9 / 12,
    }
    for aggregation, expected in want.items():
        normalizer = 12 if aggregation == "constant" else None
        loss, _ = policy_loss(x, x, adv, mask, aggregation=aggregation, normalizer=normalizer)
        assert loss.item() == pytest.approx(expected), aggregation


@pytest.mark.parametrize("ratio", RATIOS)
def test_at_ratio_one_the_gradient_is_minus_the_advantage_over_the_tokens(policy_loss, ratio):
    new, _, adv, mask = batch(4)
    adv = adv[:, :1].expand_as(new)
    x = new.clone().requires_grad_()
    policy_loss(x, new, adv, mask, ratio=ratio)[0].backward()
    torch.testing.assert_close(x.grad, torch.where(mask, -adv, 0.0) / mask.sum())


def test_importance_weights_multiply_the_policy_loss_alone(policy_loss):
    new, old, adv, mask = batch(5)
    entropy, ref = torch.rand(4, 5, dtype=torch.float64), old - 0.1
    common = {"entropy": entropy, "entropy_coef": 0.1, "ref_logprobs": ref, "kl_coef": 0.2}
    weights = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(new, old, adv, mask, importance_weights=weights, **common)
    scaled, same = policy_loss(new, old, adv * weights.detach(), mask, **common)
    assert loss.item() == pytest.approx(scaled.item())
    assert metrics["kl_ref"] == same["kl_ref"] and metrics["entropy"] == same["entropy"]
    assert not loss.requires_grad
    by_sequence = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    short, _ = policy_loss(new, old, adv, mask, importance_weights=by_sequence)
    full, _ = policy_loss(new, old, adv, mask, importance_weights=by_sequence[:, None].expand(4, 5))
    assert short.item() == pytest.approx(full.item(), rel=1e-12)


def test_loss_is_policy_minus_entropy_plus_kl(policy_loss):
    new, old, adv, mask = batch(6)
    entropy, ref = torch.rand(4, 5, dtype=torch.float64), old - 0.3
    for kind in ("k2", "k3"):
        loss, m = policy_loss(
            new,
            old,
            adv,
            mask,
            entropy=torch.where(mask, entropy, math.nan),
            entropy_coef=0.3,
            ref_logprobs=torch.where(mask, ref, math.inf),
            kl_coef=0.7,
            kl_kind=kind,
        )
        u = (new - ref)[mask]
        kl = (0.5 * u * u if kind == "k2" else torch.exp(-u) - 1 + u).mean().item()
        assert m["entropy"].item() == pytest.approx(entropy[mask].mean().item())
        assert m["kl_ref"].item() == pytest.approx(kl)
        assert loss.item() == pytest.approx(
            m["policy_loss"].item() - 0.3 * m["entropy"].item() + 0.7 * kl
        )


def test_a_ready_made_kl_is_aggregated_and_differentiated_like_the_loss(policy_loss):
    new, old, adv, mask = batch(7)
    kl = torch.rand(4, 5, dtype=torch.float64)
    kl = torch.where(mask, kl, math.nan).requires_grad_()
    options = {"aggregation": "seq-mean-token-mean", "normalizer": 8}
    loss, metrics = policy_loss(new, old, adv, mask, kl=kl, kl_coef=0.5, **options)
    loss.backward()
    want = sum(sum(row) / len(row) for (row,) in rows(mask, kl.detach())) / 8
    assert metrics["kl_ref"].item() == pytest.approx(want)
    share = 0.5 / mask.sum(1, keepdim=True).clamp(min=1).double() / 8
    torch.testing.assert_close(kl.grad, torch.where(mask, share, 0.0))


def test_terms_of_weight_zero_are_measured_but_leave_the_loss_alone(policy_loss):
    new, old, adv, mask = batch(8)
    infinite = torch.full_like(new, math.inf)
    plain, _ = policy_loss(new, old, adv, mask)
    loss, metrics = policy_loss(new, old, adv, mask, entropy=infinite, kl=infinite)
    assert loss.item() == plain.item()
    assert metrics["entropy"].item() == metrics["kl_ref"].item() == math.inf


def test_terms_of_weight_zero_get_no_gradient_not_even_zeros(policy_loss):
    """Zeros would cost the log-prob ops the products of an entropy's gradient."""
    new, old, adv, mask = batch(8)
    leaves = [x.clone().requires_grad_() for x in (new, new.exp(), new.exp())]
    loss, _ = policy_loss(leaves[0], old, adv, mask, entropy=leaves[1], kl=leaves[2])
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert grads[0].any() and grads[1] is None and grads[2] is None


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole_batch(policy_loss, ratio, aggregation):
    new, old, adv, mask = batch(9, sequences=7)
    mask[2] = False
    entropy, ref = torch.rand(7, 5, dtype=torch.float64), old - 0.2
    whole_count = {
        "token-mean": mask.sum(),
        "seq-mean-token-mean": mask.any(1).sum(),
        "seq-mean-token-sum": mask.any(1).sum(),
        "constant": torch.tensor(7.0 * 5),
    }[aggregation]

    def run(index, normalizer):
        x = new[index].clone().requires_grad_()
        loss, metrics = policy_loss(
            x,
            old[index],
            adv[index],
            mask[index],
            ratio=ratio,
            aggregation=aggregation,
            normalizer=normalizer,
            entropy=entropy[index],
            entropy_coef=0.1,
            ref_logprobs=ref[index],
            kl_coef=0.2,
        )
        loss.backward()
        return loss.detach(), x.grad, metrics

    given = whole_count if aggregation == "constant" else None
    loss, grad, metrics = run(slice(0, 7), given)
    pieces = [run(i, whole_count) for i in (slice(0, 2), slice(2, 3), slice(3, 7))]
    torch.testing.assert_close(sum(p[0] for p in pieces), loss)
    torch.testing.assert_close(torch.cat([p[1] for p in pieces]), grad)
    for name, value in metrics.items():
        parts = torch.stack([p[2][name] for p in pieces])
        total = parts.max() if name == "ratio_max" else parts.sum()
        torch.testing.assert_close(total, value, msg=name)


@pytest.mark.parametrize("aggregation", ("token-mean", "seq-mean-token-mean"))
def test_a_number_and_a_tensor_as_normalizer_agree(policy_loss, aggregation):
    new, old, adv, mask = batch(10)
    for normalizer in (7, 7.0):
        number, _ = policy_loss(new, old, adv, mask, aggregation=aggregation, normalizer=normalizer)
        tensor, _ = policy_loss(
            new, old, adv, mask, aggregation=aggregation, normalizer=torch.tensor(normalizer)
        )
        assert number.item() == pytest.approx(tensor.item())


@pytest.mark.parametrize(
    ("ratio", "dual_clip"), [("token", None), ("token", 1.5), ("sequence", None), ("none", None)]
)
def test_gradients_match_finite_differences(policy_loss, ratio, dual_clip):
    # The sequence ratio's token-wise gradient is its value's derivative only where all tokens of a
    # sequence share one advantage and one weight. CISPO's never is: its own test states it.
    new, old, adv, mask = batch(13)
    entropy = torch.rand(4, 5, dtype=torch.float64)

    def function(logprobs, entropy):
        return policy_loss(
            logprobs,
            old,
            adv[:, 0],
            mask,
            ratio=ratio,
            dual_clip=dual_clip,
            aggregation="seq-mean-token-mean",
            entropy=entropy,
            entropy_coef=0.1,
            ref_logprobs=old - 0.1,
            kl_coef=0.3,
        )[0]

    assert torch.autograd.gradcheck(function, (new.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("ratio", RATIOS)
def test_only_the_policy_gets_gradients(policy_loss, ratio):
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(5)]
    new, old, adv, weights, ref = tensors
    loss, metrics = policy_loss(
        new,
        old,
        adv,
        torch.ones(2, 3),
        ratio=ratio,
        importance_weights=weights,
        ref_logprobs=ref,
        kl_coef=0.1,
    )
    loss.backward()
    assert new.grad is not None
    assert all(x.grad is None for x in (old, adv, weights, ref))
    assert not any(value.requires_grad for value in metrics.values())


def test_half_precision_is_computed_in_fp32(policy_loss):
    new, old, adv, mask = batch(14)
    half = [x.bfloat16() for x in (new, old, adv)]
    loss, metrics = policy_loss(*half, mask)
    want, _ = policy_loss(*(x.double() for x in half), mask)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "ppo"}, r"ratio='ppo' is unknown; choose one of 'token', 'sequence'"),
        ({"aggregation": "mean"}, r"aggregation='mean' is unknown"),
        ({"aggregation": "constant"}, r"pass it as normalizer"),
        ({"normalizer": 0}, r"normalizer=0; expected a number > 0"),
        ({"normalizer": torch.ones(2)}, r"normalizer has shape \[2\]"),
        ({"clip_low": -0.1}, r"clip_low=-0.1; expected a number >= 0"),
        ({"clip_high": -0.1}, r"clip_high=-0.1"),
        ({"dual_clip": 1.0}, r"dual_clip=1.0; expected a number > 1"),
        ({"dual_clip": 3.0, "ratio": "cispo"}, r"dual_clip=3.0 with ratio='cispo'"),
        ({"entropy_coef": 0.1}, r"entropy_coef=0.1 needs entropy"),
        ({"kl_coef": 0.1}, r"kl_coef=0.1 needs ref_logprobs or kl"),
        ({"kl_kind": "k1"}, r"gradient of k1 in the loss is zero in expectation"),
        ({"kl_kind": "full"}, r"kl_kind='full' is unknown; .* pass any other .* as kl"),
        ({"ref_logprobs": torch.zeros(2, 3), "kl": torch.zeros(2, 3)}, r"leave one out"),
        ({"importance_weights": torch.ones(3)}, r"importance_weights has shape \[3\].*\[2, 3\]"),
        ({"entropy": torch.ones(2)}, r"entropy has shape \[2\], but logprobs has \[2, 3\]"),
        (
            {"cu_seqlens": torch.tensor([0, 3])},
            r"with cu_seqlens \[2\] logprobs has shape \[2, 3\]",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        ops.policy_loss(x, x, x, x, **options)


def test_bad_tensors_are_named():
    x, flat = torch.zeros(2, 3), torch.zeros(6)
    with pytest.raises(ValueError, match=r"advantages has shape \[3\].*or \[2\] for one per"):
        ops.policy_loss(x, x, torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"mask has shape \[6\], but logprobs has \[2, 3\]"):
        ops.policy_loss(x, x, x, flat)
    with pytest.raises(TypeError, match=r"advantages has dtype torch.int64"):
        ops.policy_loss(x, x, x.long(), x)
    with pytest.raises(ValueError, match=r"logprobs has shape \[6\]; expected \[B, T\], or \[N\]"):
        ops.policy_loss(flat, flat, flat, flat)
    with pytest.raises(ValueError, match=r"must rise from 0 to the 6 packed tokens"):
        ops.policy_loss(flat, flat, flat, flat, cu_seqlens=torch.tensor([0, 5, 2, 6]))
    with pytest.raises(TypeError, match=r"cu_seqlens has dtype torch.float32"):
        ops.policy_loss(flat, flat, flat, flat, cu_seqlens=torch.tensor([0.0, 6.0]))
