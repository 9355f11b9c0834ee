"""policy_loss: every kernel against the reference in float64, over the options' whole grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from backend_cases import calls, cases, to_device
from policy_loss_cases import AGGREGATIONS, RATIOS
from truth import assert_budget, assert_same, gradients

from rlhf_fast import backends, ops
from rlhf_fast.ops.policy_loss import policy_loss_reference

KERNELS = cases("policy_loss", reference=False)
REGISTERED = [c for c in KERNELS if c.values[0].backend in ("cpp", "cuda")]
DTYPES = (torch.float32, torch.float64)
KLS = (
    {},
    {"kl": True},
    {"kl_kind": "k2"},
    {"kl_kind": "k3"},
    *({"kl_kind": kind, "kl_unbiased_gradient": True} for kind in ("k1", "k2", "k3")),
)
ADVANTAGES = ("token", "sequence")
WEIGHTS = (None, "token", "sequence")
NORMALIZERS = (None, 37.5, torch.tensor(12.0), torch.tensor(0))
LENGTHS = (45, 1, 0, 17, 33, 40)
"""Of the packed sequences; the fourth has no token that counts."""


@pytest.fixture(params=KERNELS)
def run(request, monkeypatch):
    yield from calls("policy_loss", ops.policy_loss, request.param, monkeypatch)


def problem(packed=False, *, advantages="token", weights=None, kl=None, seed=0, shape=None):
    """fp32 arguments and tensor options; NaN and infinities under the mask; None is left out."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (len(LENGTHS), max(LENGTHS))
    new, moved, per_token, entropy, divergence = torch.randn(5, *shape, generator=generator)
    by_sequence = torch.randn(2, shape[0], generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[3:4] = False
    old = new + 0.3 * moved
    tensors = {
        "logprobs": new - 2,
        "old_logprobs": old - 2,
        "advantages": per_token if advantages == "token" else by_sequence[0],
        "mask": mask,
        "entropy": entropy.exp(),
    }
    if weights is not None:
        per_token = moved.exp() if weights == "token" else by_sequence[1].exp()
        tensors["importance_weights"] = per_token
    if kl is not None and "kl" in kl:
        tensors["kl"] = divergence.exp()
    elif kl:
        tensors["ref_logprobs"] = old - 2.1 + 0.2 * divergence
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).repeat(mask.numel())[: mask.numel()]
    for name, x in tensors.items():
        if name != "mask" and x.shape == shape:
            tensors[name] = torch.where(mask, x, garbage.view(shape))
    if packed:
        inside = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
        tensors = {k: x[inside] if x.shape == shape else x for k, x in tensors.items()}
        ends = torch.tensor(LENGTHS).cumsum(0)
        tensors["cu_seqlens"] = torch.nn.functional.pad(ends, (1, 0)).int()
    return tensors


def results(function, tensors, dtype, upstream=1.7, **options):
    """Loss, metrics and each gradient by name, in `dtype`."""
    tensors = {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors.items()}
    leaves = {k: tensors[k].requires_grad_() for k in ("logprobs", "entropy", "kl") if k in tensors}
    args = [tensors.pop(k) for k in ("logprobs", "old_logprobs", "advantages", "mask")]
    loss, metrics = function(*args, **tensors, **options)
    grads = torch.autograd.grad(
        loss, leaves.values(), torch.tensor(upstream, dtype=dtype), allow_unused=True
    )
    named = zip(leaves.items(), grads, strict=True)
    found = {f"d {k}": torch.zeros_like(x) if g is None else g for (k, x), g in named}
    return {"loss": loss.detach(), **metrics, **found}


def assert_as_good(run, tensors, dtype, what="", roundings=8.0, **options):
    """The kernel's errors against those of the reference in the same precision."""
    truth = results(policy_loss_reference, tensors, torch.float64, **options)
    naive = results(policy_loss_reference, tensors, dtype, **options)
    got = results(run, tensors, dtype, **options)
    assert got.keys() == truth.keys()
    mask = tensors["mask"]
    for name, value in got.items():
        assert value.dtype == dtype
        # Terms of the sums are about 1, those of gradients 1 / divisor.
        scale = 0.0 if name.startswith("d ") else 1.0
        assert_budget(
            f"{name} {what}", value, truth[name], naive[name], scale=scale, roundings=roundings
        )
        if name.startswith("d "):
            assert (value[~mask] == 0).all(), f"{name} {what}"


def computes(run, dtype):
    return dtype in backends.TABLE["policy_loss"][run.case.backend].dtypes


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_grid_of_options(run, ratio, aggregation):
    dual_clips = (None, 1.5) if ratio in ("token", "sequence") else (None,)
    rest = itertools.cycle(itertools.product(ADVANTAGES, WEIGHTS, NORMALIZERS))
    grid = list(itertools.product(dual_clips, KLS, (False, True), DTYPES))
    # All of it takes the interpreter minutes.
    step = 5 if run.case.device == "cpu" and run.case.backend == "triton" else 1
    for i, (dual_clip, kl, packed, dtype) in enumerate(grid):
        advantages, weights, normalizer = next(rest)
        if i % step or not computes(run, dtype):
            continue
        if aggregation == "constant" and normalizer is None:
            normalizer = 60
        options = {k: v for k, v in kl.items() if k != "kl"}
        assert_as_good(
            run,
            problem(packed, advantages=advantages, weights=weights, kl=kl, seed=i),
            dtype,
            f"{dual_clip=} {kl=} {packed=} {advantages=} {weights=} {normalizer=}",
            ratio=ratio,
            aggregation=aggregation,
            dual_clip=dual_clip,
            normalizer=normalizer,
            entropy_coef=0.3 * (i % 2),
            kl_coef=0.4 if kl else 0.0,
            **options,
        )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS[:2])
@pytest.mark.parametrize("shape", [(5, 1), (5, 3), (2, 255), (3, 1029), (2, 20_003), (700, 9)])
def test_rows_of_all_lengths(run, ratio, aggregation, shape):
    if run.case.device == "cpu" and run.case.backend == "triton":  # many rows or long ones are slow
        shape = (min(shape[0], 9), min(shape[1], 2003))
    options = {"ratio": ratio, "aggregation": aggregation, "kl_coef": 0.1, "kl_kind": "k3"}
    tensors = problem(kl={"kl_kind": "k3"}, shape=shape)
    assert_as_good(run, tensors, torch.float32, **options)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("operand", ["logprobs", "old_logprobs", "advantages", "entropy"])
def test_nan_in_a_token_that_counts_shows(run, ratio, operand):
    tensors = problem()
    (b, t), *_ = tensors["mask"].nonzero().tolist()
    tensors[operand][b, t] = math.nan
    options = {"ratio": ratio, "entropy_coef": 0.1, "dual_clip": None}
    want = results(policy_loss_reference, tensors, torch.float32, **options)
    got = results(run, tensors, torch.float32, **options)
    for name, value in got.items():
        torch.testing.assert_close(
            value, want[name], equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    # REINFORCE does not read the old log-probs.
    assert got["loss"].isnan() == (operand != "old_logprobs" or ratio != "none")


@pytest.mark.parametrize("ratio", RATIOS)
def test_ties_infinities_and_bounds_are_those_of_the_reference(run, ratio):
    """Ratios of 1 at bounds of 1, advantages of 0, log-ratios of 20 and beyond, inf and 1e30."""
    edges = torch.tensor([0.0, -1.0, -21.0, -20.0, -41.0, 20.0, -1e30, -math.inf, math.inf])
    # In float64 no sum overflows; in float32 the gradient does without one, but for a sequence's
    # mean, where huge numbers cancel.
    wide = computes(run, torch.float64)
    if ratio == "sequence" and not wide:
        edges = edges[edges.abs() < 50]
    new, old = (x.flatten()[None] for x in torch.meshgrid(edges, edges, indexing="ij"))
    tensors = {"logprobs": new, "old_logprobs": old, "mask": torch.ones_like(new).bool()}
    for advantage, bound, kind in itertools.product((-2.0, 0.0, 3.0), (0.0, None), ("k2", "k3")):
        tensors["advantages"] = torch.full((1,), advantage)
        tensors["ref_logprobs"] = old.flip(1)
        options = {"clip_low": bound, "clip_high": bound, "kl_kind": kind, "kl_coef": 1e-3}
        dtype, rtol = (torch.float64, 1e-12) if wide else (torch.float32, 1e-5)
        want = results(policy_loss_reference, tensors, dtype, ratio=ratio, **options)
        got = results(run, tensors, dtype, ratio=ratio, **options)
        for name in got if wide else ("d logprobs",):
            what = f"{name} {advantage=} {bound=}"
            torch.testing.assert_close(
                got[name], want[name], rtol=rtol, atol=0, msg=lambda m, what=what: f"{what}: {m}"
            )


@pytest.mark.parametrize("view", ["sliced", "expanded", "transposed", "strided"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS[:2])
def test_any_strides(run, view, aggregation):
    def as_view(x):
        if view == "sliced":
            return torch.nn.functional.pad(x, (3, 2))[:, 3:-2]
        if view == "expanded":
            return x[:1].expand(x.shape)
        if view == "transposed":
            return x.t().contiguous().t()
        return x.repeat_interleave(2, 1)[:, ::2]

    tensors = {k: as_view(x) for k, x in problem(weights="token", kl={"kl": True}).items()}
    dense = {k: x.clone(memory_format=torch.contiguous_format) for k, x in tensors.items()}
    options = {"aggregation": aggregation, "entropy_coef": 0.1, "kl_coef": 0.2}
    want = results(run, dense, torch.float32, **options)
    for name, value in results(run, tensors, torch.float32, **options).items():
        torch.testing.assert_close(value, want[name], msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradient_does_not_depend_on_when_it_is_asked_for(run):
    tensors = {k: x for k, x in problem().items()}
    x, entropy = (tensors.pop(k).requires_grad_() for k in ("logprobs", "entropy"))
    args = [tensors.pop(k) for k in ("old_logprobs", "advantages", "mask")]
    loss, metrics = run(x, *args, entropy=entropy, entropy_coef=0.1)
    first = gradients(loss, (x, entropy), torch.tensor(0.7), retain_graph=True)
    assert_same("a second backward", gradients(loss, (x, entropy), torch.tensor(0.7)), first)
    with torch.no_grad():
        again, others = run(x, *args, entropy=entropy, entropy_coef=0.1)
    assert_same("without grad", (again, *others.values()), (loss.detach(), *metrics.values()))
    alone, _ = run(x.detach(), *args, entropy=entropy, entropy_coef=0.1)
    (only,) = torch.autograd.grad(alone, entropy, torch.tensor(0.7))
    assert_same("of the entropy alone", (only,), (first[1],))


def test_zero_stays_zero_whatever_comes_from_above(run):
    tensors = problem()
    got = results(run, tensors, torch.float32, upstream=math.inf)
    plain = results(run, tensors, torch.float32, upstream=1.0)
    for name in ("d logprobs", "d entropy"):
        assert torch.equal(got[name] == 0, plain[name] == 0) and not got[name].isnan().any()


@pytest.mark.parametrize("case", [c for c in KERNELS if c.values[0].backend == "cpp"])
@pytest.mark.parametrize("shape", [(64, 1500), (2, 70_001), (9000, 7)])
@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("aggregation", AGGREGATIONS[:2])
def test_bits_do_not_depend_on_threads(case, shape, ratio, aggregation):
    tensors = problem(weights="sequence", shape=shape)
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        options = {"ratio": ratio, "aggregation": aggregation, "backend": case.backend}
        runs.append(results(ops.policy_loss, tensors, torch.float32, **options))
    for other in runs[1:]:
        assert_same("threads", tuple(other.values()), tuple(runs[0].values()))


@pytest.mark.parametrize("case", REGISTERED)
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph_for_any_length(case, packed):
    def loss_of(x, entropy, old, advantages, mask, cu_seqlens):
        options = {"aggregation": "seq-mean-token-mean", "cu_seqlens": cu_seqlens}
        loss, metrics = ops.policy_loss(
            x, old, advantages, mask, entropy=entropy, entropy_coef=0.1, backend=case.backend,
            **options,
        )  # fmt: skip
        return 2 * loss + metrics["approx_kl_k3"]

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for length in (20, 33, 47):
        tensors = problem(shape=(4, length))
        names = ("logprobs", "entropy", "old_logprobs", "advantages", "mask")
        inputs = [to_device(tensors[name], case.device) for name in names]
        cu_seqlens = None
        if packed:
            inputs = [x.flatten() for x in inputs]
            cu_seqlens = torch.tensor([0, 7, length, 4 * length], dtype=torch.int32)
            cu_seqlens = cu_seqlens.to(case.device)
        found = []
        for function in (compiled, loss_of):
            leaves = [x.clone().requires_grad_() for x in inputs[:2]]
            loss = function(*leaves, *inputs[2:], cu_seqlens)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", REGISTERED)
@pytest.mark.parametrize("packed", [False, True])
def test_registered_ops_pass_opcheck(case, packed):
    tensors = problem(packed, weights="sequence", kl={"kl": True})
    tensors = {k: to_device(x, case.device) for k, x in tensors.items()}
    names = ("logprobs", "old_logprobs", "advantages", "mask", "importance_weights", "entropy")
    inputs = [tensors[name] for name in names]
    inputs += [None, tensors["kl"], tensors.get("cu_seqlens")]
    registered = torch.ops.rlhf_fast
    for normalizer, wanted in ((None, (True, False)), (inputs[0].new_ones(()), (False, True))):
        options = (0, 1, 0.8, 1.2, math.inf, 1, False, 0.1, 0.2)
        forward = (*inputs, normalizer, 0.0, *options, *wanted)
        torch.library.opcheck(registered.policy_loss_forward, forward)
        loss, values, grad, shares = registered.policy_loss_forward(*forward)
        needs = (wanted[0], wanted[1], wanted[1])
        backward = (loss, values, grad, shares, 0.1, 0.2, *needs)
        torch.library.opcheck(registered.policy_loss_backward, backward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_a_captured_graph_replays(backend):
    if backend not in backends.TABLE["policy_loss"]:
        return
    tensors = {k: x.cuda() for k, x in problem().items()}
    args = [tensors[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")]
    ops.policy_loss(*args, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, metrics = ops.policy_loss(*args, backend=backend)
    for seed in (1, 2):
        for name, x in problem(seed=seed).items():
            tensors[name].copy_(x)
        graph.replay()
        again, others = ops.policy_loss(*args, backend=backend)
        assert_same("replay", (loss, *metrics.values()), (again, *others.values()))
