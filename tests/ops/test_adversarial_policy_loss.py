"""policy_loss against the papers, token by token: written from the documentation alone."""

from __future__ import annotations

import pytest
import torch
from adversarial_policy_cases import AGGREGATIONS, RATIOS, assert_true, flat, outcome, sample, take
from backend_cases import cases
from loss_truth import BF16, EPS, F16, F32, F64, LossRunner, policy_truth
from truth import assert_budget, assert_same

from rlhf_fast.ops import policy_loss


@pytest.fixture(params=cases("policy_loss"))
def run(request, monkeypatch):
    return LossRunner(policy_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("policy_loss", interpreter=False))
def run_large(request, monkeypatch):
    return LossRunner(policy_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("policy_loss", dtype=F64))
def run_double(request, monkeypatch):
    return LossRunner(policy_loss, request.param, monkeypatch)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_error_is_within_that_of_naive_pytorch(run, ratio, aggregation):
    normalizer = 37.0 if aggregation == "constant" else None
    options = {"ratio": ratio, "aggregation": aggregation, "normalizer": normalizer}
    assert_true(run, **take(sample(5, 37)), **options)
    everything = take(sample(3, 65, seed=1), "importance_weights", "entropy", "ref_logprobs")
    options |= {"clip_low": 0.1, "clip_high": 0.28, "entropy_coef": 0.3, "kl_coef": 0.7}
    assert_true(run, **everything, **options)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_double_precision_keeps_its_digits(run_double, ratio, aggregation):
    everything = take(sample(4, 33, dtype=F64), "importance_weights", "entropy", "kl")
    options = {"ratio": ratio, "aggregation": aggregation, "normalizer": 17}
    options |= {"entropy_coef": 0.3, "kl_coef": 0.7, "clip_high": 0.28}
    loss, _, _ = assert_true(run_double, naive=False, **everything, **options)
    assert loss.dtype == F64


BOUNDS = [
    {"clip_low": None},
    {"clip_high": None},
    {"clip_low": None, "clip_high": None},
    {"clip_low": 0.0, "clip_high": 0.0},
    {"clip_low": 1.0, "clip_high": 3.0},
    {"dual_clip": 1.05},
    {"dual_clip": 1.05, "clip_high": None},
    {"dual_clip": 3.0, "clip_low": None, "clip_high": None},
]


@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_bounds(run, bounds, ratio):
    if ratio == "cispo" and "dual_clip" in bounds:
        with pytest.raises(ValueError, match="dual_clip"):
            outcome(run, **take(sample(2, 3)), ratio=ratio, **bounds, idle=True)
        return
    tensors = take(sample(40, 3, spread=1.0), "importance_weights")
    assert_true(run, **tensors, **bounds, ratio=ratio)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("ratio", ["token", "sequence", "none"])
def test_kl_to_the_reference(run, kind, unbiased, ratio):
    tensors = take(sample(4, 33), "ref_logprobs")
    options = {"kl_kind": kind, "kl_unbiased_gradient": unbiased, "kl_coef": 0.7, "ratio": ratio}
    if kind == "k1" and not unbiased:
        with pytest.raises(ValueError, match="k1"):
            outcome(run, **tensors, **options, idle=True)
        return
    assert_true(run, **tensors, **options)


LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65)
LONG = (127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 4097, 5000, 20011)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_length(run, ratio):
    for T in LENGTHS:
        tensors = take(sample(2, T, seed=T, keep=1.0), "entropy")
        assert_true(
            run, **tensors, ratio=ratio, aggregation="seq-mean-token-mean", entropy_coef=0.1
        )


@pytest.mark.parametrize("T", LONG)
def test_long_sequences(run_large, T):
    everything = take(sample(2, T, seed=T), "importance_weights", "ref_logprobs")
    assert_true(run_large, **everything, kl_coef=0.2, kl_kind="k3")
    assert_true(
        run_large, **everything, kl_coef=0.2, ratio="sequence", aggregation="seq-mean-token-sum"
    )


@pytest.mark.parametrize("shape", [(20011, 1), (6007, 3), (1, 20011), (1025, 17)])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_many_sequences(run_large, shape, ratio):
    tensors = take(sample(*shape), "importance_weights")
    tensors["advantages"] = tensors["advantages"][:, 0]
    assert_true(run_large, **tensors, ratio=ratio, aggregation="seq-mean-token-mean")


def packed(lengths, seed=0, keep=0.7):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return sample(int(offsets[-1]), seed=seed, keep=keep), offsets


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_packs_with_empty_sequences_and_gaps(run, ratio, aggregation):
    lengths = (0, 3, 0, 0, 17, 1, 64, 0, 65, 2, 0)
    tensors, offsets = packed(lengths)
    tensors["mask"][20:21] = False  # the one of length 1 counts nothing
    tensors["mask"][85:120] = False
    per_sequence = {"advantages": torch.linspace(-2, 2, len(lengths))}
    per_sequence["importance_weights"] = torch.linspace(0, 2, len(lengths))
    options = {"ratio": ratio, "aggregation": aggregation, "cu_seqlens": offsets, "naive": False}
    options["normalizer"] = 50 if aggregation == "constant" else None
    assert_true(run, **take(tensors, "ref_logprobs"), **options, kl_coef=0.3)
    assert_true(run, **take(tensors, "importance_weights") | per_sequence, **options)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_long_packs(run_large, aggregation):
    tensors, offsets = packed((0, *LENGTHS, *LONG, 0, *LENGTHS))
    options = {
        "aggregation": aggregation,
        "cu_seqlens": offsets,
        "naive": False,
        "normalizer": 99.0,
    }
    for ratio in ("token", "sequence"):
        assert_true(run_large, **take(tensors, "entropy"), **options, ratio=ratio, entropy_coef=0.1)


def test_one_number_each_is_per_token_in_a_pack_of_single_tokens(run):
    tensors, offsets = packed((2, 0, 1, 1), keep=1.0)
    tensors["mask"][1] = True
    for ratio in ("token", "sequence"):
        assert_true(
            run, **take(tensors, "importance_weights"), cu_seqlens=offsets, naive=False, ratio=ratio
        )


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_half_precision_is_fp32_of_the_same_numbers(run, dtype, ratio):
    tensors = take(sample(4, 33, dtype=dtype), "importance_weights", "entropy", "ref_logprobs")
    options = {"entropy_coef": 0.3, "kl_coef": 0.7, "ratio": ratio, "upstream": -1.7}
    wide = {name: x if x.dtype == torch.bool else x.float() for name, x in tensors.items()}
    loss, metrics, gradients = outcome(run, **tensors, **options)
    expected = outcome(run, **wide, **options)
    assert loss.dtype == F32
    assert_same("loss", [loss, *metrics.values()], [expected[0], *expected[1].values()])
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_same(f"d {name}", [gradient], [expected[2][name].to(dtype)])


@pytest.mark.parametrize("offset", [-1e4, -100.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_common_offset_costs_no_bit(run, offset, ratio):
    tensors = take(sample(4, 65), "ref_logprobs")
    names = ("logprobs", "old_logprobs", "ref_logprobs")
    near = tensors | {name: (tensors[name] * 512).round() / 512 for name in names}
    far = near | {name: near[name] + offset for name in names}
    options = {"ratio": ratio, "kl_coef": 0.5, "kl_kind": "k3"}
    one, other = (outcome(run, **x, **options) for x in (near, far))
    assert_same("shifted", flat(other), flat(one))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_micro_batches_add_up(run, ratio, aggregation):
    everything = take(sample(6, 19), "importance_weights", "entropy", "kl")
    everything["mask"][3] = False
    whole = everything["mask"].any(-1).sum() if "seq" in aggregation else everything["mask"].sum()
    options = {"ratio": ratio, "aggregation": aggregation, "entropy_coef": 0.3, "kl_coef": 0.7}
    options |= {"normalizer": whole, "upstream": 0.6}
    loss, metrics, gradients = outcome(run, **everything, **options)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(3, 4), slice(4, 6)):
        parts.append(
            outcome(run, idle=True, **{k: x[rows] for k, x in everything.items()}, **options)
        )
    parts = [parts[0], parts[1], parts[3], parts[2]]  # row 3 comes twice: nothing in it counts
    truth = policy_truth(**everything, **options)
    added = sum(part[0].double() for part in parts)
    assert_budget("loss", added.float(), truth.loss, scale=truth.scale["loss"])
    assert_budget("whole", loss, truth.loss, scale=truth.scale["loss"])
    for name in metrics:
        values = torch.stack([part[1][name].double() for part in parts])
        value = values.max() if name == "ratio_max" else values.sum()
        assert_budget(name, value.float(), truth.metrics[name], scale=truth.scale[name])
    for name, gradient in gradients.items():
        added = torch.cat([part[2][name] for part in parts[:3]])
        assert_same(f"d {name}", [added], [gradient])


@pytest.mark.parametrize("ratio", RATIOS)
def test_permutation_and_padding_do_not_matter(run, ratio):
    everything = take(sample(5, 21), "importance_weights", "ref_logprobs")
    options = {"ratio": ratio, "kl_coef": 0.7, "aggregation": "seq-mean-token-mean"}
    loss, metrics, gradients = outcome(run, **everything, **options)
    order = torch.tensor([3, 0, 4, 2, 1])
    padded = {k: torch.nn.functional.pad(x[order], (3, 40, 1, 2)) for k, x in everything.items()}
    again = outcome(run, **padded, **options)
    expected = gradients["logprobs"][order].double()
    assert_budget("gradient", again[2]["logprobs"][1:6, 3:24], expected, roundings=4)
    assert again[2]["logprobs"].count_nonzero() == gradients["logprobs"].count_nonzero()
    scale = policy_truth(**everything, **options).scale
    assert_budget("loss", again[0], loss.double(), roundings=4, scale=scale["loss"])
    for name, value in metrics.items():
        assert_budget(name, again[1][name], value.double(), roundings=4, scale=scale[name])
    assert abs(again[1]["ratio_max"] / metrics["ratio_max"] - 1) < 4 * EPS


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_normalizers(run, aggregation):
    tensors, options = (
        take(sample(4, 17), "entropy"),
        {"aggregation": aggregation, "entropy_coef": 0.1},
    )
    number = outcome(run, **tensors, **options, normalizer=96.0)
    for dtype in (F16, BF16, F32, F64, torch.int32, torch.int64):
        normalizer = torch.tensor(96, dtype=dtype)
        again = outcome(run, **tensors, **options, normalizer=normalizer)
        torch.testing.assert_close(flat(again), flat(number), rtol=2 * EPS, atol=0)
    assert_true(run, **tensors, **options, normalizer=96)
    for normalizer in (1e-3, 1e9, torch.tensor(0), torch.tensor(0.0, dtype=BF16)):
        assert_true(run, **tensors, **options, normalizer=normalizer)
