"""policy_loss: who gets gradients, repeated passes, equal bits, and refusals of bad arguments."""

from __future__ import annotations

import pytest
import torch
from adversarial_policy_cases import AGGREGATIONS, LEAVES, RATIOS, flat, outcome, sample, take
from backend_cases import cases
from loss_truth import BF16, F32, F64, INF, NAN, LossRunner, policy_truth
from truth import assert_budget, assert_same, gradients, leaf

from rlhf_fast.ops import policy_loss

HEAD = ("logprobs", "old_logprobs", "advantages", "mask")


@pytest.fixture(params=cases("policy_loss"))
def run(request, monkeypatch):
    return LossRunner(policy_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("policy_loss", interpreter=False))
def run_large(request, monkeypatch):
    return LossRunner(policy_loss, request.param, monkeypatch)


def apply(run, tensors, **options):
    rest = {name: x for name, x in tensors.items() if name not in HEAD}
    return run(*(tensors[name] for name in HEAD), **rest, **options)


@pytest.mark.parametrize("who", [("logprobs",), ("entropy",), ("kl",), ("logprobs", "kl"), LEAVES])
@pytest.mark.parametrize("ratio", RATIOS)
def test_only_what_asks_gets_a_gradient(run, ratio, who):
    tensors = take(sample(3, 17), "entropy", "kl")
    leaves = {name: leaf(tensors[name]) for name in who}
    loss, metrics = apply(run, tensors | leaves, ratio=ratio, entropy_coef=0.3, kl_coef=0.7)
    assert not any(value.requires_grad for value in metrics.values())
    truth = policy_truth(**tensors, ratio=ratio, entropy_coef=0.3, kl_coef=0.7, upstream=-2.5)
    found = gradients(loss, list(leaves.values()), torch.tensor(-2.5))
    for name, got in zip(who, found, strict=True):
        assert_budget(f"d {name}", got, truth.gradients[name])


@pytest.mark.parametrize("ratio", RATIOS)
def test_constants_get_no_gradient(run, ratio):
    names = ("importance_weights", "entropy", "ref_logprobs")
    tensors = take(sample(3, 17), *names)
    tensors = {name: x if name == "mask" else leaf(x) for name, x in tensors.items()}
    for unbiased in (False, True):
        options = {"kl_coef": 0.7, "entropy_coef": 0.3, "kl_unbiased_gradient": unbiased}
        loss, _ = apply(run, tensors, **options, ratio=ratio)
        constants = [
            tensors[n] for n in ("old_logprobs", "advantages", "importance_weights", "ref_logprobs")
        ]
        for found in torch.autograd.grad(loss, constants, allow_unused=True, retain_graph=True):
            assert found is None or (found == 0).all()
        (d_logprobs,) = gradients(loss, [tensors["logprobs"]], torch.tensor(1.0))
        truth = policy_truth(**tensors, **options, ratio=ratio)
        assert_budget("d logprobs", d_logprobs, truth.gradients["logprobs"])


def test_no_gradient_wanted_none_given(run):
    loss, _ = apply(run, take(sample(3, 17), "entropy", "kl"), entropy_coef=0.3, kl_coef=0.7)
    assert not loss.requires_grad


@pytest.mark.parametrize("ratio", RATIOS)
def test_terms_of_weight_zero_are_measured_alone(run, ratio):
    tensors = take(sample(3, 17), "entropy", "kl")
    loss, metrics, found = outcome(run, **tensors, ratio=ratio)
    bare, bare_metrics, bare_found = outcome(run, **take(tensors), ratio=ratio)
    assert_same("loss", [loss, found["logprobs"]], [bare, bare_found["logprobs"]])
    assert (found["entropy"] == 0).all() and (found["kl"] == 0).all()
    truth = policy_truth(**tensors)
    for name in ("entropy", "kl_ref"):
        assert name not in bare_metrics
        assert_budget(name, metrics[name], truth.metrics[name])


@pytest.mark.parametrize("upstream", [0.0, -0.0, -1.0, 1e-6, 1e6, -3e7])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_upstream_gradient_scales_all(run, ratio, upstream):
    tensors = take(sample(3, 17), "entropy", "ref_logprobs")
    options = {"ratio": ratio, "entropy_coef": 0.3, "kl_coef": 0.7, "upstream": upstream}
    truth = policy_truth(**tensors, **options)
    for name, found in outcome(run, **tensors, **options)[2].items():
        assert_budget(f"d {name}", found, truth.gradients[name])


def test_an_upstream_gradient_of_zero_clears_whatever_is_there(run):
    tensors = take(sample(3, 17, keep=1.0))
    tensors["logprobs"][0, 0], tensors["old_logprobs"][1, 1] = -INF, -INF
    tensors["advantages"][2, 2] = 1e30
    for ratio in RATIOS:
        found = outcome(run, **tensors, ratio=ratio, upstream=0.0)[2]["logprobs"]
        assert (found == 0).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_loss_may_be_used_twice(run, ratio):
    tensors = take(sample(3, 17), "entropy", "kl")
    leaves = {name: leaf(tensors[name]) for name in LEAVES}
    loss, _ = apply(run, tensors | leaves, ratio=ratio, entropy_coef=0.3, kl_coef=0.7)
    inputs, upstream = list(leaves.values()), torch.tensor(-1.3)
    first = gradients(loss, inputs, upstream, retain_graph=True)
    kept = [x.clone() for x in first]
    assert_same("twice", gradients(loss, inputs, upstream, retain_graph=True), kept)
    other = gradients(loss, inputs, torch.tensor(2.6), retain_graph=True)
    for x, y in zip(other, kept, strict=True):
        assert_budget("another upstream", x, -2 * y.double(), roundings=2)
    assert_same("the first are not overwritten", first, kept)
    (2 * loss + loss).backward()
    for x, y in zip(leaves.values(), kept, strict=True):
        assert_budget("summed", x.grad, y.double() * (3 / -1.3), roundings=4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_bits_do_not_depend_on_grad_mode_or_the_run(run, ratio, aggregation):
    tensors = take(sample(5, 33), "entropy", "ref_logprobs")
    options = {"ratio": ratio, "aggregation": aggregation, "entropy_coef": 0.3, "kl_coef": 0.7}
    options["normalizer"] = 50.0 if aggregation == "constant" else None
    first = outcome(run, **tensors, **options)
    assert_same("again", flat(outcome(run, **tensors, **options)), flat(first))
    with torch.no_grad():
        loss, metrics = apply(run, tensors, **options)
    assert_same("no_grad", [loss, *metrics.values()], [first[0], *first[1].values()])
    with torch.inference_mode():
        loss, metrics = apply(run, tensors, **options)
    assert_same("inference", [loss, *metrics.values()], [first[0], *first[1].values()])


@pytest.mark.parametrize("shape", [(3, 20011), (2049, 33), (50_000, 1)])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_bits_of_large_batches_repeat_whatever_the_threads(run_large, shape, ratio):
    tensors = take(sample(*shape), "entropy")
    options = {"ratio": ratio, "aggregation": "seq-mean-token-mean", "entropy_coef": 0.3}
    first = outcome(run_large, **tensors, **options)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        again = outcome(run_large, **tensors, **options)
        if run_large.backend != "reference":  # torch's own sums do depend on them
            assert_same(f"{threads} threads", flat(again), flat(first))
    assert_same("again", flat(again), flat(first))


@pytest.mark.parametrize("ratio", RATIOS)
def test_inputs_are_left_as_they_were(run, ratio):
    tensors = take(sample(3, 17), "importance_weights", "entropy", "ref_logprobs")
    tensors["old_logprobs"][~tensors["mask"]] = NAN
    before = {name: x.clone() for name, x in tensors.items()}
    versions = {name: x._version for name, x in tensors.items()}
    outcome(run, **tensors, ratio=ratio, entropy_coef=0.3, kl_coef=0.7)
    assert_same("inputs", list(tensors.values()), list(before.values()))
    assert versions == {name: x._version for name, x in tensors.items()}


@pytest.mark.parametrize("ratio", RATIOS)
def test_second_derivatives_are_right_or_refused(run, ratio):
    tensors = take(sample(3, 17, keep=1.0))
    logprobs = leaf(tensors["logprobs"])
    loss, _ = apply(run, tensors | {"logprobs": logprobs}, ratio=ratio, aggregation="token-mean")
    if run.backend != "reference":
        with pytest.raises(RuntimeError, match="differentiable once, so create_graph=True"):
            torch.autograd.grad(loss, logprobs, create_graph=True)
        return
    (first,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    if not first.requires_grad:
        return  # a second derivative is an error, by torch
    (second,) = torch.autograd.grad(first.sum(), logprobs)
    truth = policy_truth(**tensors, ratio=ratio).gradients["logprobs"]
    assert_budget("second", second, truth if ratio in ("token", "sequence") else 0 * truth)


S, T, N = (3, 5), torch.zeros(4, 5), torch.zeros(15)
OFFSETS = torch.tensor([0, 7, 15], dtype=torch.int32)
BAD = {
    "logprobs": [torch.zeros(3, 5).int(), torch.zeros(15), torch.zeros(1, 3, 5), torch.zeros(())],
    "old_logprobs": [T, torch.zeros(3, 5).long(), torch.zeros(3), torch.zeros(3, 5, device="meta")],
    "advantages": [T, torch.zeros(5), torch.zeros(3, 1), torch.zeros(3).long(), torch.zeros(())],
    "mask": [T, torch.zeros(3), torch.zeros(5), torch.zeros(3, 5, device="meta")],
    "importance_weights": [T, torch.zeros(5), torch.zeros(3, 5).int(), torch.zeros(3, 1)],
    "entropy": [T, torch.zeros(3), torch.zeros(3, 5).bool(), torch.zeros(3, 5, device="meta")],
    "ref_logprobs": [T, torch.zeros(3), torch.zeros(3, 5).int()],
    "kl": [T, torch.zeros(3), torch.zeros(3, 5).int()],
    "clip_low": [-0.1, NAN],
    "clip_high": [-0.1, NAN],
    "dual_clip": [1.0, 0.5, -3.0, NAN],
    "ratio": ["Token", "geometric", ""],
    "aggregation": ["mean", "token_mean"],
    "normalizer": [0, 0.0, -2.0, NAN, torch.ones(1), torch.ones(3, 5)],
    "kl_kind": ["k4", "abs", "k1"],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, bad in BAD.items() for i in range(len(bad))]
)
def test_bad_arguments_are_named(run, name, index):
    bad = BAD[name][index]
    tensors = take(sample(*S))
    options = {"ref_logprobs": torch.zeros(S), "kl_coef": 0.1} if name == "kl_kind" else {}
    with pytest.raises((TypeError, ValueError), match=name):
        apply(run, tensors | options | {name: bad}, idle=True)


BAD_OFFSETS = {
    "float": OFFSETS.float(),
    "not from 0": torch.tensor([1, 7, 15], dtype=torch.int32),
    "negative": torch.tensor([0, -1, 15], dtype=torch.int32),
    "short": torch.tensor([0, 7, 14], dtype=torch.int32),
    "long": torch.tensor([0, 7, 16], dtype=torch.int32),
    "decreasing": torch.tensor([0, 9, 7, 15], dtype=torch.int32),
    "beyond": torch.tensor([0, 2**31 - 1, 15], dtype=torch.int32),
    "two axes": OFFSETS[None],
    "none at all": torch.zeros(0, dtype=torch.int32),
    "elsewhere": OFFSETS.to("meta"),
}
OF_ITS_FORM = ("float", "two axes", "none at all", "elsewhere")


@pytest.mark.parametrize("kind", BAD_OFFSETS)
def test_bad_offsets_are_named(run, kind):
    if run.device != "cpu" and kind not in OF_ITS_FORM:  # the host does not wait for values
        return
    with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
        apply(run, take(sample(15)), cu_seqlens=BAD_OFFSETS[kind], idle=True)


def test_options_that_exclude_one_another(run):
    tensors, zeros = take(sample(*S)), torch.zeros(S)
    wrong = [
        ("normalizer", {"aggregation": "constant"}),
        ("kl", {"kl": zeros, "ref_logprobs": zeros, "kl_coef": 0.1}),
        ("kl_coef", {"kl_coef": 0.1}),
        ("entropy", {"entropy_coef": 0.1}),
        ("dual_clip", {"dual_clip": 3.0, "ratio": "none"}),
        ("cu_seqlens", {"cu_seqlens": OFFSETS}),
    ]
    for name, options in wrong:
        with pytest.raises(ValueError, match=name):
            apply(run, tensors, **options, idle=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes_may_differ(run, dtype):
    tensors = take(sample(3, 17), "importance_weights", "ref_logprobs")
    tensors["logprobs"] = tensors["logprobs"].to(dtype)
    exact = {k: x if k == "mask" else x.bfloat16().float() for k, x in tensors.items()}
    mixed = {
        k: x if k == "mask" else x.to(F64 if i % 2 else BF16)
        for i, (k, x) in enumerate(exact.items())
    }
    mixed["logprobs"] = exact["logprobs"].to(dtype)
    got, expected = (outcome(run, **x, kl_coef=0.5) for x in (mixed, exact))
    assert got[0].dtype == F32 and got[2]["logprobs"].dtype == dtype
    assert_same("mixed", flat(got)[:-1], flat(expected)[:-1])
