"""policy_loss on broken, extreme, empty and oddly laid out input."""

from __future__ import annotations

import math

import pytest
import torch
from adversarial_policy_cases import AGGREGATIONS, RATIOS, assert_true, flat, outcome, sample, take
from backend_cases import cases
from loss_truth import EPS, F32, F64, INF, NAN, LossRunner, policy_truth
from truth import assert_budget, assert_same, leaf

from rlhf_fast.ops import policy_loss

OPERANDS = ("importance_weights", "entropy", "ref_logprobs")
TERMS = {"entropy_coef": 0.3, "kl_coef": 0.7, "upstream": -1.7}


@pytest.fixture(params=cases("policy_loss"))
def run(request, monkeypatch):
    return LossRunner(policy_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("policy_loss", interpreter=False))
def run_large(request, monkeypatch):
    return LossRunner(policy_loss, request.param, monkeypatch)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30, -1e30])
@pytest.mark.parametrize("ratio", RATIOS)
def test_what_lies_under_the_mask_is_not_read(run, ratio, garbage):
    for others in (OPERANDS, ("kl", "entropy")):
        clean = take(sample(6, 21), *others)
        clean["mask"][2] = False
        mask = clean["mask"]
        broken = {k: x if k == "mask" else x.masked_fill(~mask, garbage) for k, x in clean.items()}
        clean = {k: x if k == "mask" else x.masked_fill(~mask, 0) for k, x in clean.items()}
        options = {"ratio": ratio, "kl_kind": "k3", **TERMS}
        options["aggregation"] = "token-mean" if "kl" in others else "seq-mean-token-sum"
        got, expected = (outcome(run, **x, **options) for x in (broken, clean))
        assert_same(f"{others}", flat(got), flat(expected))
        assert all((x[~mask] == 0).all() for x in got[2].values())


@pytest.mark.parametrize("garbage", [NAN, INF])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_numbers_of_a_sequence_without_tokens_are_not_read(run, ratio, garbage):
    tensors = take(sample(4, 9), "importance_weights")
    tensors["mask"][1] = tensors["mask"][3] = False
    for name in ("advantages", "importance_weights"):
        tensors[name] = tensors[name][:, 0].clone()
    clean = outcome(run, **tensors, ratio=ratio)
    for name in ("advantages", "importance_weights"):
        tensors[name][[1, 3]] = garbage
    assert_same("broken rows", flat(outcome(run, **tensors, ratio=ratio)), flat(clean))


MASKS = {
    "bool": lambda m: m,
    "int8 -1": lambda m: -m.to(torch.int8),
    "uint8 255": lambda m: m.to(torch.uint8) * 255,
    "int32 256": lambda m: m.int() * 256,
    "int32 least": lambda m: m.int() * -(2**31),
    "int64 2**32": lambda m: m.long() * 2**32,
    "half least": lambda m: m.half() * 6e-8,
    "bfloat16 -0.5": lambda m: m.bfloat16() * -0.5,
    "float 1e-30": lambda m: m.float() * 1e-30,
    "float -0.0": lambda m: torch.where(m, -1.0, -0.0),
    "double 1e-300": lambda m: m.double() * 1e-300,
    "double 1e300": lambda m: m.double() * -1e300,
    "float inf": lambda m: torch.where(m, INF, 0.0),
}


@pytest.mark.parametrize("kind", MASKS)
def test_any_nonzero_in_the_mask_counts(run, kind):
    tensors = take(sample(3, 21), *OPERANDS)
    mask = MASKS[kind](tensors["mask"])
    assert ((mask != 0) == tensors["mask"]).all()
    expected = outcome(run, **tensors, **TERMS)
    assert_same(kind, flat(outcome(run, **tensors | {"mask": mask}, **TERMS)), flat(expected))


VIEWS = {
    "transposed": (lambda B, T: (T, B), lambda x: x.t()),
    "every second": (lambda B, T: (B, 2 * T), lambda x: x[:, ::2]),
    "inner": (lambda B, T: (B + 2, T + 7), lambda x: x[1:-1, 3:-4]),
    "every second row": (lambda B, T: (2 * B, T), lambda x: x[1::2]),
    "inner transposed": (lambda B, T: (T + 3, B + 2), lambda x: x[1:-2, 1:-1].t()),
    "expanded rows": (lambda B, T: (1, T), lambda x: x.expand(5, -1)),
    "expanded columns": (lambda B, T: (B, 1), lambda x: x.expand(-1, 19)),
    "one element": (lambda B, T: (1, 1), lambda x: x.expand(5, 19)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_any_strides(run, view, ratio):
    shape, look = VIEWS[view]
    bases = take(sample(*shape(5, 19)), *OPERANDS)
    bases["mask"] = sample(*shape(5, 19), keep=0.9)["mask"]
    bases["mask"].view(-1)[0] = True
    for base in (bases[name] for name in ("logprobs", "entropy")):
        base.requires_grad_()
    tensors = {name: look(x) for name, x in bases.items()}
    options = {"entropy_coef": 0.3, "kl_coef": 0.7, "ratio": ratio}
    head = ("logprobs", "old_logprobs", "advantages", "mask")
    rest = {name: tensors[name] for name in OPERANDS}
    loss, _ = run(*(tensors[name] for name in head), **rest, **options)
    truth = policy_truth(**tensors, **options)
    assert_budget("loss", loss.detach(), truth.loss, scale=truth.scale["loss"])
    names = ("logprobs", "entropy")
    for name, got in zip(names, torch.autograd.grad(loss, [bases[n] for n in names]), strict=True):
        base = torch.zeros(bases[name].shape, dtype=F64, requires_grad=True)
        (expected,) = torch.autograd.grad(look(base), base, truth.gradients[name])
        assert_budget(f"d {name}", got, expected)


@pytest.mark.parametrize("step", [2, 3])
def test_strided_packs_and_offsets(run, step):
    tensors = take(sample(40 * step), *OPERANDS)
    tensors = {name: x[step - 1 :: step] for name, x in tensors.items()}
    offsets = torch.tensor([0, 99, 7, 99, 7, 99, 40, 99], dtype=torch.int32)[::2]
    sizes = torch.linspace(-1, 1, 9)[::3]
    options = {"cu_seqlens": offsets, "entropy_coef": 0.3, "kl_coef": 0.7}
    assert_true(run, **tensors, **options, naive=False)
    tensors |= {"advantages": sizes, "importance_weights": sizes.abs()}
    assert_true(run, **tensors, **options, naive=False, ratio="sequence")


LOG_RATIOS = (0, 1e-6, -1e-6, 0.5, -0.5, 19.9, -19.9, 20, -20, 20.1, -20.1, 90, -90, 1e4, -1e4)


@pytest.mark.parametrize("bounds", [{}, {"clip_low": None, "clip_high": None}, {"dual_clip": 3.0}])
@pytest.mark.parametrize("ratio", RATIOS)
def test_extreme_log_ratios(run, ratio, bounds):
    """Beyond +-20 a ratio stays at exp(+-20) and passes on no gradient; cispo's always does."""
    if "dual_clip" in bounds and ratio in ("none", "cispo"):
        return
    log_rho = torch.tensor(LOG_RATIOS).repeat_interleave(2)[:, None]
    old = torch.full_like(log_rho, -0.5)
    old[log_rho.abs() >= 19] = 0.0  # whose sums are exact
    advantages = torch.tensor([1.5, -0.7]).repeat(len(LOG_RATIOS))
    mask = torch.ones_like(old)
    arguments = dict(logprobs=old + log_rho, old_logprobs=old, advantages=advantages, mask=mask)
    _, _, gradients = outcome(run, **arguments, ratio=ratio, **bounds)
    truth = policy_truth(**arguments, ratio=ratio, **bounds)
    torch.testing.assert_close(
        gradients["logprobs"].double(), truth.gradients["logprobs"], rtol=32 * EPS, atol=0
    )


@pytest.mark.parametrize("log_rho", LOG_RATIOS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_one_extreme_log_ratio(run_large, ratio, log_rho):
    old = torch.full((1, 1), 0.0 if abs(log_rho) >= 19 else -0.5)
    arguments = dict(logprobs=old + log_rho, old_logprobs=old, mask=torch.ones(1, 1))
    for A in (1.5, -0.7):
        for bounds in ({}, {"clip_low": None, "clip_high": None}):
            options = {"advantages": torch.full((1, 1), A), "ratio": ratio, **bounds, **arguments}
            loss, metrics, _ = outcome(run_large, **options)
            truth = policy_truth(**options)
            torch.testing.assert_close(loss.double(), truth.loss, rtol=32 * EPS, atol=0)
            for name, value in metrics.items():
                close = {"rtol": 32 * EPS, "atol": 4 * EPS}
                torch.testing.assert_close(value.double(), truth.metrics[name], **close, msg=name)


@pytest.mark.parametrize(("new", "old"), [(-INF, -1.0), (-1.0, -INF), (-INF, -INF), (-1e30, -1e30)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_infinite_logprobs_are_large_finite_ones(run, ratio, new, old):
    tensors = take(sample(3, 7, keep=1.0), "ref_logprobs")
    tensors["logprobs"][1, 2], tensors["old_logprobs"][1, 2] = new, old
    for ref in (-1.0, -INF):
        tensors["ref_logprobs"][1, 2] = ref
        for kind in ("k2", "k3"):
            options = {"ratio": ratio, "kl_coef": 0.5, "kl_kind": kind}
            found = outcome(run, **tensors, **options)
            reference = policy_outcome(tensors, options)
            assert not any(x.isnan().any() for x in flat(found))
            torch.testing.assert_close(flat(found), flat(reference), rtol=64 * EPS, atol=8 * EPS)
    del tensors["ref_logprobs"]
    loss, _, gradients = outcome(run, **tensors, ratio=ratio)
    truth = policy_truth(**tensors, ratio=ratio)
    torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1] = ratio != "sequence"
    others[1, 2] = False
    got, expected = (x[others] for x in (gradients["logprobs"], truth.gradients["logprobs"]))
    torch.testing.assert_close(got.double(), expected, rtol=32 * EPS, atol=0)


def policy_outcome(tensors, options):
    """The outcome by the reference, which is the specification where the words leave room."""

    def reference(*args, idle, **rest):
        return policy_loss(*args, **rest, backend="reference")

    return outcome(reference, **tensors, **options)


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", *OPERANDS, "kl"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_nan_in_a_token_that_counts_is_not_swallowed(run, name, ratio):
    if name == "old_logprobs" and ratio == "none":
        return
    others = ("kl", "entropy") if name == "kl" else OPERANDS
    tensors = take(sample(4, 33, keep=1.0), *others)
    tensors[name][2, 17] = NAN
    loss, metrics, gradients = outcome(run, **tensors, ratio=ratio, **TERMS)
    assert loss.isnan(), f"NaN in {name} was swallowed"
    expected = policy_outcome(tensors, {"ratio": ratio, **TERMS})
    for what, value in {**metrics, **gradients}.items():
        reference = {**expected[1], **expected[2]}[what]
        assert (value.isnan() == reference.isnan()).all(), f"{what}: {value}, not {reference}"


@pytest.mark.parametrize("clip", [{"clip_low": 0.0, "clip_high": 0.0}, {"clip_low": 0.0}, {}])
@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_a_ratio_of_exactly_one_is_beyond_no_bound(run, ratio, clip):
    tensors = take(sample(3, 17, spread=0.0))
    _, metrics, gradients = assert_true(run, **tensors, **clip, ratio=ratio)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    for name in ("clip_fraction_low", "clip_fraction_high", "approx_kl_k1", "approx_kl_k3"):
        assert metrics[name] == 0, name
    assert gradients["logprobs"].count_nonzero() == tensors["mask"].sum()


@pytest.mark.parametrize("A", [0.0, -0.0, 1e-38, -1e-38, 1e-30, 1e17, -1e17])
@pytest.mark.parametrize("ratio", RATIOS)
def test_extreme_advantages(run, ratio, A):
    tensors = take(sample(4, 17, spread=1.0))
    tensors["advantages"].fill_(A)
    options = {"ratio": ratio, "aggregation": "constant", "normalizer": 1.0}
    _, metrics, gradients = outcome(run, **tensors, **options)
    truth = policy_truth(**tensors, **options)
    sign_only = policy_truth(
        **tensors | {"advantages": torch.full((4, 17), math.copysign(1, A))}, **options
    )
    for name in ("clip_fraction_low", "clip_fraction_high"):
        expected = truth if A == 0 else sign_only
        assert metrics[name] == expected.metrics[name], name
    got, expected = gradients["logprobs"].double(), truth.gradients["logprobs"]
    torch.testing.assert_close(got, expected, rtol=16 * EPS, atol=2e-45)


@pytest.mark.parametrize("value", [INF, -INF, 1e30])
@pytest.mark.parametrize("name", ["advantages", *OPERANDS, "kl"])
@pytest.mark.parametrize("ratio", ["token", "cispo"])
def test_infinite_numbers_that_count_are_what_the_reference_says(run, ratio, name, value):
    others = ("kl", "entropy") if name == "kl" else OPERANDS
    tensors = take(sample(3, 17, keep=1.0), *others)
    tensors[name][1, 4] = value
    options = {"ratio": ratio, **TERMS}
    found, expected = outcome(run, **tensors, **options), policy_outcome(tensors, options)
    close = {"rtol": 32 * EPS, "atol": 8 * EPS, "equal_nan": True}
    torch.testing.assert_close(flat(found), flat(expected), **close)


def test_tokens_of_weight_zero_keep_their_place_in_the_mean(run):
    tensors = take(sample(4, 17), *OPERANDS)
    tensors["importance_weights"][:, ::2] = 0.0
    tensors["logprobs"][:, ::4] = -90.0
    for ratio in RATIOS:
        options = {"ratio": ratio, "entropy_coef": 0.3, "kl_coef": 1e-3}
        assert_true(run, **tensors, **options, naive=False, roundings=16)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 5), (1, 1)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_nothing_that_counts(run, shape, ratio):
    tensors = take(sample(*shape), *OPERANDS)
    tensors = {k: x if k == "mask" else x.fill_(NAN) for k, x in tensors.items()}
    tensors["mask"].fill_(False)
    for normalizer in (None, 7.0, torch.tensor(0)):
        aggregation = AGGREGATIONS[RATIOS.index(ratio) % (3 if normalizer is None else 4)]
        options = {"ratio": ratio, "aggregation": aggregation, "normalizer": normalizer, **TERMS}
        loss, metrics, gradients = outcome(run, **tensors, **options, idle=True)
        assert loss == 0 and loss.dtype == F32
        assert all((x == 0).all() for x in gradients.values())
        assert all(value == 0 for value in metrics.values()), metrics


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0, 0]])
def test_empty_packs(run, offsets):
    empty = take(sample(0), *OPERANDS)
    logprobs = leaf(empty.pop("logprobs"))
    empty["advantages"] = torch.zeros(len(offsets) - 1)
    options = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32), "idle": True}
    head = [empty.pop(name) for name in ("old_logprobs", "advantages", "mask")]
    for ratio in RATIOS:
        loss, metrics = run(logprobs, *head, **empty, **options, ratio=ratio)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss == 0 and gradient.shape == (0,)
        assert all(value == 0 for value in metrics.values())
