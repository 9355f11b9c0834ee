"""What both linear ops promise beside their numbers: bits, budgets, frozen parts, rows, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from torch.nn.functional import pad
from truth import Runner, assert_budget, assert_repeats, assert_same, gradients, leaf

from rlhf_fast.ops import linear_kl, linear_logprobs

NAN = math.nan
V = 130
BUDGETS = [0, 3000, None]


class Job:
    """A linear op on one backend with a head of its own; its result as a flat list of tensors."""

    def __init__(self, op, case, monkeypatch):
        self.run = Runner(op, case, monkeypatch)
        self.outputs = 2 if op is linear_logprobs else 1
        names = ("hidden", "weight", "bias")
        self.names = names if self.outputs == 2 else (*names, *(f"ref_{name}" for name in names))

    def data(self, N=5, dtype=torch.float32, bias=True):
        """The parts of the head by name, the constants, and the upstream gradients."""
        generator = torch.Generator().manual_seed(0)
        shapes = {"hidden": (N, 8), "weight": (V, 8), "ref_hidden": (N, 5), "ref_weight": (V, 5)}
        parts = {}
        for name in self.names:
            x = torch.randn(shapes.get(name, (V,)), generator=generator).to(dtype)
            parts[name] = x if bias or "bias" not in name else None
        constants = {"temperature": torch.linspace(0.5, 1.5, N)}
        if self.outputs == 2:
            constants["tokens"] = torch.randint(V, (N,), generator=generator)
        return parts, constants, list(torch.randn(self.outputs, N, generator=generator))

    def __call__(self, parts, constants, **options):
        out = self.run(**parts, **constants, **options)
        return (out,) if isinstance(out, torch.Tensor) else out

    def outcome(
        self, parts, constants, upstream, *, trainable=None, arrange=lambda x: x, **options
    ):
        """Outputs and the gradients of `trainable` (None: all), with inputs put by `arrange`."""
        wanted = [name for name in trainable or self.names if parts[name] is not None]
        leaves = {name: leaf(parts[name]) if name in wanted else parts[name] for name in parts}
        views = {k: x if x is None else arrange(self.run.move(x)) for k, x in leaves.items()}
        out = self(views, constants, **options)
        found = gradients(out, [leaves[name] for name in wanted], upstream)
        assert [x.dtype for x in found] == [parts[name].dtype for name in wanted]
        return [*(x.detach() for x in out), *found]


def jobs(interpreter=True):
    return [
        pytest.param((op, *param.values), marks=param.marks, id=f"{op.__name__}-{param.id}")
        for op in (linear_logprobs, linear_kl)
        for param in cases(op.__name__, interpreter=interpreter)
    ]


@pytest.fixture(params=jobs())
def job(request, monkeypatch):
    return Job(*request.param, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_memory_budget(job, dtype):
    data = job.data(dtype=dtype)
    expected = job.outcome(*data, memory_budget=None)
    for budget in (0, 1, 4 * V, 3000):
        got = job.outcome(*data, memory_budget=budget)
        assert_same(f"outputs, budget {budget}", got[: job.outputs], expected[: job.outputs])
        assert_same(f"gradients, budget {budget}", got[job.outputs :], expected[job.outputs :])


@pytest.mark.parametrize("memory_budget", [0, None])
def test_one_way_through_the_kernels(job, memory_budget):
    """The same bits with and without grad and run to run."""
    parts, constants, upstream = job.data(N=9)
    options = {"memory_budget": memory_budget}
    expected = job.outcome(parts, constants, upstream, **options)
    with torch.no_grad():
        leaves = {name: leaf(x) for name, x in parts.items()}
        assert_same("no_grad", job(leaves, constants, **options), expected[: job.outputs])
    with torch.inference_mode():
        assert_same("inference", job(parts, constants, **options), expected[: job.outputs])
    for _ in range(2):
        again = job.outcome(parts, constants, upstream, **options)
        assert_same("again", again, expected)


@pytest.mark.parametrize("memory_budget", BUDGETS)
def test_frozen_parts(job, memory_budget):
    """Whatever is trainable gets the same gradient, and the outputs do not notice."""
    parts, constants, upstream = job.data()
    full = dict(zip(job.names, job.outcome(parts, constants, upstream)[job.outputs :], strict=True))
    values = [x.detach() for x in job(parts, constants)]
    subsets = [*([name] for name in job.names), job.names[:2], job.names[1:]]
    for trainable in subsets:
        options = {"trainable": trainable, "memory_budget": memory_budget}
        got = job.outcome(parts, constants, upstream, **options)
        assert_same(f"outputs, {trainable} trainable", got[: job.outputs], values)
        for name, gradient in zip(trainable, got[job.outputs :], strict=True):
            what = f"gradient of {name}, {trainable} trainable"
            assert_budget(what, gradient, full[name].double(), roundings=32)


@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize("frozen_head", [False, True])
def test_outputs_one_at_a_time_and_backward_again(job, memory_budget, frozen_head):
    parts, constants, upstream = job.data()
    trainable = ("hidden", "ref_hidden")[: 1 + (job.outputs == 1)] if frozen_head else job.names
    leaves = {name: leaf(x) if name in trainable else x for name, x in parts.items()}
    wanted = [leaves[name] for name in trainable]
    out = job(leaves, constants, memory_budget=memory_budget)
    assert_repeats(out, wanted, upstream)
    whole = gradients(out, wanted, upstream, retain_graph=True)
    nothing = [None] * len(upstream)
    alone = [
        gradients(out, wanted, nothing[:i] + [upstream[i]] + nothing[i + 1 :], retain_graph=True)
        for i in range(job.outputs)
    ]
    for name, one, *parts_of_it in zip(trainable, whole, *alone, strict=True):
        assert_budget(name, sum(parts_of_it), one.double())


@pytest.mark.parametrize("memory_budget", [0, 3000, None])
def test_an_input_changed_before_the_backward_is_noticed(job, memory_budget):
    """An optimizer step in between: the old gradient or an error, never a mixture."""
    parts, constants, upstream = job.data()
    expected = job.outcome(parts, constants, upstream)[job.outputs :]
    for changed in job.names:
        leaves = {name: leaf(x) for name, x in parts.items()}
        here = {name: job.run.move(x) + 0 for name, x in leaves.items()}
        out = job(here, constants, memory_budget=memory_budget)
        with torch.no_grad():
            here[changed].mul_(2)
        try:
            got = gradients(out, list(leaves.values()), upstream)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            continue
        for name, one, exact in zip(job.names, got, expected, strict=True):
            assert_budget(f"gradient of {name} after a change of {changed}", one, exact.double())


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "wide": lambda x: pad(x, (1, 2), value=NAN)[..., 1:-2],
    "misaligned": lambda x: pad(x.flatten(), (1, 0), value=NAN)[1:].view(x.shape),
    "every second": lambda x: torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(job, layout):
    data = job.data()
    expected = job.outcome(*data)
    got = job.outcome(*data, arrange=LAYOUTS[layout])
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert_budget(f"{layout}, tensor {i}", one, other.double())


def test_rows_and_tokens_that_share_memory(job):
    parts, constants, upstream = job.data()
    expected = job.outcome(parts, constants, upstream)
    constants = {k: torch.stack([x, x - 999], -1)[..., 0] for k, x in constants.items()}
    constants |= {k: x.int() for k, x in constants.items() if k == "tokens"}
    assert_same("strided constants", job.outcome(parts, constants, upstream), expected)
    sides = {name: x for name, x in parts.items() if "hidden" in name}
    same = parts | {name: x[:1].expand_as(x) for name, x in sides.items()}
    copied = parts | {name: x[:1].repeat(len(x), 1) for name, x in sides.items()}
    assert_same(
        "expanded rows",
        job.outcome(same, constants, upstream),
        job.outcome(copied, constants, upstream),
    )
    upstream = [x[:1].expand(5) for x in upstream]
    tidy = [x.clone() for x in upstream]
    got, exact = (job.outcome(parts, constants, grads) for grads in (upstream, tidy))
    assert_same("expanded upstream gradients", got, exact)


@pytest.mark.parametrize("rows", [[], [0], [1, 4], list(range(5))], ids=str)
@pytest.mark.parametrize("memory_budget", [0, None])
def test_live_rows(job, rows, memory_budget):
    """The others give 0 and no gradient, and nothing of them is read: not even a bad id."""
    parts, constants, upstream = job.data()
    dead = [i for i in range(5) if i not in rows]
    few = {k: x[rows] if "hidden" in k else x for k, x in parts.items()}
    kept = [few, {k: x[rows] for k, x in constants.items()}, [x[rows] for x in upstream]]
    for name in parts:
        if "hidden" in name:
            parts[name][dead] = NAN
    if "tokens" in constants:
        constants["tokens"][dead] = -7
    for x in upstream:
        x[dead] = NAN
    options = {"memory_budget": memory_budget, "idle": not rows}
    got = job.outcome(parts, constants, upstream, live_rows=torch.tensor(rows).long(), **options)
    expected = job.outcome(*kept, **options)
    names = [f"output {i}" for i in range(job.outputs)] + list(job.names)
    for name, one, exact in zip(names, got, expected, strict=True):
        if "output" in name or "hidden" in name:
            assert (one[dead] == 0).all(), f"{name} of rows that do not count"
            one = one[rows]
        if one.numel():
            assert_budget(name, one, exact.double())


def test_ignored_tokens_among_live_rows(monkeypatch):
    for param in cases("linear_logprobs", interpreter=False):
        if any(mark.name == "skipif" and mark.args[0] for mark in param.marks):
            continue
        job = Job(linear_logprobs, *param.values, monkeypatch)
        parts, constants, upstream = job.data()
        constants["tokens"][[0, 2]] = -100
        live = torch.tensor([1, 2, 4])
        got = job.outcome(parts, constants, upstream, live_rows=live)
        for part in got[:3]:
            assert part[[1, 4]].all() and not part[[0, 2, 3]].any()


def test_autocast_casts_what_the_products_read(job):
    parts, constants, upstream = job.data(bias=False)
    halves = {k: None if x is None else x.bfloat16() for k, x in parts.items()}
    expected = job.outcome(halves, constants, upstream)
    with torch.autocast(job.run.device, dtype=torch.bfloat16):
        got = job.outcome(parts, constants, upstream)
    assert got[0].dtype == torch.float32
    assert_same("outputs", got[: job.outputs], expected[: job.outputs])
    wanted = [name for name in job.names if "bias" not in name]
    for name, one, half in zip(wanted, got[job.outputs :], expected[job.outputs :], strict=True):
        assert_budget(name, one.bfloat16(), half.double())


@pytest.mark.parametrize("memory_budget", [0, None])
def test_inputs_are_left_alone(job, memory_budget):
    parts, constants, upstream = job.data()
    before = [x.clone() for x in (*parts.values(), *constants.values(), *upstream)]
    leaves = {name: job.run.move(x).requires_grad_() for name, x in parts.items()}
    out = job(leaves, constants, memory_budget=memory_budget)
    gradients(out, list(leaves.values()), upstream)
    after = [x.detach().cpu() for x in (*leaves.values(), *constants.values(), *upstream)]
    assert_same("inputs", after, before)
