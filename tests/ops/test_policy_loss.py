import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.policy_loss import policy_loss

GARBAGE = (math.nan, math.inf, -math.inf)
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
RATIOS = ("token", "sequence", "none", "cispo")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def batch(seed=0, sequences=4, length=5, spread=0.4):
    """Log-probs new and old, advantages per token and a mask, float64."""
    generator = torch.Generator().manual_seed(seed)
    new, moved, advantages = torch.randn(
        3, sequences, length, dtype=torch.float64, generator=generator
    )
    mask = torch.rand(sequences, length, generator=generator) < 0.65
    return new - 2, new - 2 + spread * moved, advantages, mask


def rows(mask, *tensors):
    """Each sequence's counting tokens as plain lists, sequences without any left out."""
    for b in range(mask.shape[0]):
        if mask[b].any():
            yield [t[b][mask[b]].tolist() for t in tensors]


def clip(x, low, high):
    return min(max(x, low), high)


# Published losses, written as their papers state them (as objectives to maximise), in plain Python.


def ppo(new, old, adv, mask, eps):
    """Schulman et al. 2017, eq. 7, as a mean over all tokens."""
    terms = []
    for lp, lo, a in rows(mask, new, old, adv):
        for p, q, x in zip(lp, lo, a, strict=True):
            r = math.exp(p - q)
            terms.append(min(r * x, clip(r, 1 - eps, 1 + eps) * x))
    return sum(terms) / len(terms)


def grpo(new, old, adv, mask, ref, eps, beta):
    """Shao et al. 2024, eq. 3 with the KL of eq. 4: mean over outputs of means over tokens."""
    outputs = []
    for lp, lo, a, lr in rows(mask, new, old, adv, ref):
        inner = 0.0
        for p, q, x, f in zip(lp, lo, a, lr, strict=True):
            r = math.exp(p - q)
            kl = math.exp(f) / math.exp(p) - math.log(math.exp(f) / math.exp(p)) - 1
            inner += min(r * x, clip(r, 1 - eps, 1 + eps) * x) - beta * kl
        outputs.append(inner / len(lp))
    return sum(outputs) / len(outputs)


def dapo(new, old, adv, mask, eps_low, eps_high):
    """Yu et al. 2025: 1 / sum |o_i| over all tokens, unequal bounds."""
    total, tokens = 0.0, 0
    for lp, lo, a in rows(mask, new, old, adv):
        for p, q, x in zip(lp, lo, a, strict=True):
            r = math.exp(p - q)
            total += min(r * x, clip(r, 1 - eps_low, 1 + eps_high) * x)
            tokens += 1
    return total / tokens


def dr_grpo(new, old, adv, mask, eps, divisor):
    """Liu et al. 2025: the sum over tokens, no length in the divisor."""
    total = 0.0
    for lp, lo, a in rows(mask, new, old, adv):
        for p, q, x in zip(lp, lo, a, strict=True):
            r = math.exp(p - q)
            total += min(r * x, clip(r, 1 - eps, 1 + eps) * x)
    return total / divisor


def gspo(new, old, adv, mask, eps_low, eps_high):
    """Zheng et al. 2025: s_i = (pi / pi_old)^(1 / |y_i|), one advantage per sequence."""
    terms = []
    for lp, lo, a in rows(mask, new, old, adv):
        s = (math.exp(sum(lp)) / math.exp(sum(lo))) ** (1 / len(lp))
        terms.append(min(s * a[0], clip(s, 1 - eps_low, 1 + eps_high) * a[0]))
    return sum(terms) / len(terms)


def central_differences(function, x, mask):
    """The gradient of a scalar Python function of a tensor, element by element."""
    grad, h = torch.zeros_like(x), 1e-6
    for i, j in mask.nonzero().tolist():
        up, down = x.clone(), x.clone()
        up[i, j] += h
        down[i, j] -= h
        grad[i, j] = (function(up) - function(down)) / (2 * h)
    return grad


def check_against(objective, new, mask, loss_of):
    """Value and gradient of `loss_of(new)` are those of minus the published `objective`."""
    x = torch.where(mask, new, math.nan).requires_grad_()
    loss = loss_of(x)
    loss.backward()
    assert loss.item() == pytest.approx(-objective(new), rel=1e-9)
    expected = -central_differences(objective, new, mask)
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_value_and_gradient_are_those_of_the_paper(seed):
    new, old, adv, mask = batch(seed)
    check_against(
        lambda x: ppo(x, old, adv, mask, 0.2),
        new,
        mask,
        lambda x: policy_loss(x, old, adv, mask)[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_grpo_value_and_gradient_are_those_of_the_paper(seed):
    new, old, _, mask = batch(seed)
    adv = torch.randn(4, dtype=torch.float64)
    ref = old + 0.3 * torch.randn_like(old)
    check_against(
        lambda x: grpo(x, old, adv[:, None].expand(4, 5), mask, ref, 0.2, 0.04),
        new,
        mask,
        lambda x: policy_loss(
            x,
            old,
            adv,
            mask,
            aggregation="seq-mean-token-mean",
            ref_logprobs=ref,
            kl_coef=0.04,
            kl_kind="k3",
        )[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_dapo_value_and_gradient_are_those_of_the_paper(seed):
    new, old, adv, mask = batch(seed)
    check_against(
        lambda x: dapo(x, old, adv, mask, 0.2, 0.28),
        new,
        mask,
        lambda x: policy_loss(x, old, adv, mask, clip_low=0.2, clip_high=0.28)[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_dr_grpo_value_and_gradient_are_those_of_the_paper(seed):
    new, old, adv, mask = batch(seed)
    check_against(
        lambda x: dr_grpo(x, old, adv, mask, 0.2, 4 * 5),
        new,
        mask,
        lambda x: policy_loss(x, old, adv, mask, aggregation="constant", normalizer=4 * 5)[0],
    )


@pytest.mark.parametrize("seed", range(3))
def test_gspo_value_and_gradient_are_those_of_the_paper(seed):
    new, old, _, mask = batch(seed)
    adv = torch.randn(4, dtype=torch.float64)
    check_against(
        lambda x: gspo(x, old, adv[:, None].expand(4, 5), mask, 0.1, 0.15),
        new,
        mask,
        lambda x: policy_loss(
            x,
            old,
            adv,
            mask,
            ratio="sequence",
            aggregation="seq-mean-token-mean",
            clip_low=0.1,
            clip_high=0.15,
        )[0],
    )


def test_cispo_gradient_is_the_clipped_ratio_times_the_advantage():
    # MiniMax-M1: 1 / sum |o_i| * sum of sg(clip(r)) A log pi; no lower bound.
    new, old, adv, mask = batch(1)
    x = new.clone().requires_grad_()
    loss, metrics = policy_loss(x, old, adv, mask, ratio="cispo", clip_low=None, clip_high=0.3)
    loss.backward()
    value, expected, clipped = 0.0, torch.zeros_like(new), 0
    for i, j in mask.nonzero().tolist():
        r = math.exp(new[i, j] - old[i, j])
        weight = min(r, 1.3)
        clipped += r > 1.3
        value += weight * adv[i, j].item() * new[i, j].item()
        expected[i, j] = -weight * adv[i, j]
    tokens = int(mask.sum())
    assert loss.item() == pytest.approx(-value / tokens)
    torch.testing.assert_close(x.grad, expected / tokens)
    assert metrics["clip_fraction_high"].item() == pytest.approx(clipped / tokens)
    assert metrics["clip_fraction_low"].item() == 0.0
    assert clipped > 0


def test_reinforce_gradient_is_the_advantage_whatever_the_old_policy_was():
    new, old, adv, mask = batch(2)
    x = new.clone().requires_grad_()
    loss, metrics = policy_loss(x, old, adv, mask, ratio="none")
    loss.backward()
    tokens = int(mask.sum())
    assert loss.item() == pytest.approx(-(adv * new)[mask].sum().item() / tokens)
    torch.testing.assert_close(x.grad, torch.where(mask, -adv / tokens, 0.0))
    assert metrics["clip_fraction_low"].item() == metrics["clip_fraction_high"].item() == 0.0


def test_hand_worked_clipping_dual_clipping_and_metrics():
    # Ratios 1/2, 3/2, 1/2, 3/2, 4, 1 with the bounds .8 and 1.3.
    log = math.log
    new = torch.tensor([[log(0.5), log(1.5), log(0.5)], [log(1.5), log(4.0), 0.0]])
    new = new.double().requires_grad_()
    old = torch.zeros(2, 3, dtype=torch.float64)
    adv = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -2.0, 3.0]], dtype=torch.float64)
    mask = torch.ones(2, 3)
    options = {"clip_low": 0.2, "clip_high": 0.3}
    loss, metrics = policy_loss(new, old, adv, mask, **options)
    #   A=1 r=.5: -.5 | A=1 r=1.5: -1.3 (clipped) | A=-1 r=.5: .8 (clipped)
    #   A=-1 r=1.5: 1.5 | A=-2 r=4: 8 | A=3 r=1: -3
    assert loss.item() == pytest.approx((-0.5 - 1.3 + 0.8 + 1.5 + 8 - 3) / 6)
    loss.backward()
    expected = torch.tensor([[-0.5, 0.0, 0.0], [1.5, 8.0, -3.0]], dtype=torch.float64) / 6
    torch.testing.assert_close(new.grad, expected)
    got = {name: value.item() for name, value in metrics.items()}
    ratios = [0.5, 1.5, 0.5, 1.5, 4.0, 1.0]
    assert got == pytest.approx(
        {
            "policy_loss": 5.5 / 6,
            "clip_fraction_low": 1 / 6,
            "clip_fraction_high": 1 / 6,
            "approx_kl_k1": -sum(map(log, ratios)) / 6,
            "approx_kl_k3": sum(r - 1 - log(r) for r in ratios) / 6,
            "ratio_mean": 9 / 6,
            "ratio_max": 4.0,
        }
    )
    # c = 3: the fifth token's 8 becomes 2 * 3 and loses its gradient.
    new.grad = None
    loss, _ = policy_loss(new, old, adv, mask, dual_clip=3.0, **options)
    assert loss.item() == pytest.approx((-0.5 - 1.3 + 0.8 + 1.5 + 6 - 3) / 6)
    loss.backward()
    expected[1, 1] = 0.0
    torch.testing.assert_close(new.grad, expected)
    # Without bounds every token keeps A r.
    free, _ = policy_loss(new, old, adv, mask, clip_low=None, clip_high=None)
    assert free.item() == pytest.approx((-0.5 - 1.5 + 0.5 + 1.5 + 8 - 3) / 6)


def test_hand_worked_aggregations():
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
def test_at_ratio_one_the_gradient_is_minus_the_advantage_over_the_tokens(ratio):
    new, _, adv, mask = batch(4)
    adv = adv[:, :1].expand_as(new)
    x = new.clone().requires_grad_()
    policy_loss(x, new, adv, mask, ratio=ratio)[0].backward()
    torch.testing.assert_close(x.grad, torch.where(mask, -adv, 0.0) / mask.sum())


def test_importance_weights_multiply_the_policy_loss_alone():
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
    assert short.item() == full.item()


def test_loss_is_policy_minus_entropy_plus_kl():
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


def test_a_ready_made_kl_is_aggregated_and_differentiated_like_the_loss():
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


def test_terms_of_weight_zero_are_measured_but_leave_the_loss_alone():
    new, old, adv, mask = batch(8)
    infinite = torch.full_like(new, math.inf)
    plain, _ = policy_loss(new, old, adv, mask)
    loss, metrics = policy_loss(new, old, adv, mask, entropy=infinite, kl=infinite)
    assert loss.item() == plain.item()
    assert metrics["entropy"].item() == metrics["kl_ref"].item() == math.inf


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole_batch(ratio, aggregation):
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
def test_a_number_and_a_tensor_as_normalizer_agree(aggregation):
    new, old, adv, mask = batch(10)
    for normalizer in (7, 7.0):
        number, _ = policy_loss(new, old, adv, mask, aggregation=aggregation, normalizer=normalizer)
        tensor, _ = policy_loss(
            new, old, adv, mask, aggregation=aggregation, normalizer=torch.tensor(normalizer)
        )
        assert number.item() == pytest.approx(tensor.item())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(RATIOS),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from(GARBAGE),
)
def test_any_mask_equals_deleting_what_it_hides(seed, ratio, aggregation, garbage):
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
def test_packed_tokens_with_gaps_give_what_padded_ones_do(ratio, aggregation):
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
def test_permutation_and_padding_do_not_matter(ratio):
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


@pytest.mark.parametrize(
    ("ratio", "dual_clip"), [("token", None), ("token", 1.5), ("sequence", None), ("none", None)]
)
def test_gradients_match_finite_differences(ratio, dual_clip):
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
def test_only_the_policy_gets_gradients(ratio):
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


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("extreme", [90.0, 1e4, 1e30, math.inf])
def test_extreme_log_ratios_never_give_nan(ratio, extreme):
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
def test_nothing_that_counts_gives_a_differentiable_zero(shape, ratio, aggregation):
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


def test_an_empty_pack_gives_a_differentiable_zero():
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


def test_half_precision_is_computed_in_fp32():
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
        policy_loss(x, x, x, x, **options)


def test_bad_tensors_are_named():
    x, flat = torch.zeros(2, 3), torch.zeros(6)
    with pytest.raises(ValueError, match=r"advantages has shape \[3\].*or \[2\] for one per"):
        policy_loss(x, x, torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"mask has shape \[6\], but logprobs has \[2, 3\]"):
        policy_loss(x, x, x, flat)
    with pytest.raises(TypeError, match=r"advantages has dtype torch.int64"):
        policy_loss(x, x, x.long(), x)
    with pytest.raises(ValueError, match=r"logprobs has shape \[6\]; expected \[B, T\], or \[N\]"):
        policy_loss(flat, flat, flat, flat)
    with pytest.raises(ValueError, match=r"must rise from 0 to the 6 packed tokens"):
        policy_loss(flat, flat, flat, flat, cu_seqlens=torch.tensor([0, 5, 2, 6]))
    with pytest.raises(TypeError, match=r"cu_seqlens has dtype torch.float32"):
        policy_loss(flat, flat, flat, flat, cu_seqlens=torch.tensor([0.0, 6.0]))
