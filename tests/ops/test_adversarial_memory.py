"""token_logprobs and full_kl on strange memory: strides, shared rows, far rows, gradients in place.

And the promises on bits: with and without grad, run to run, backward after backward.
"""

from __future__ import annotations

import math

import pytest
import torch
from backend_cases import cases
from torch.nn.functional import pad
from truth import (
    Runner,
    assert_budget,
    assert_repeats,
    assert_same,
    gradients,
    leaf,
    logprobs_truth,
    sample,
)

from rlhf_fast.ops import full_kl, token_logprobs

NAN = math.nan
EPS = torch.finfo(torch.float32).eps


class Job:
    """One op on one backend: `inputs` get gradients, `constants` do not."""

    def __init__(self, op, case, monkeypatch):
        self.run = Runner(op, case, monkeypatch)
        self.move = self.run.move

    def data(self, *shape, dtype=torch.float32):
        logits, tokens, upstream = sample(*shape, dtype=dtype, peaked=True)
        if self.run.op is token_logprobs:
            return [logits], [tokens], upstream
        return [logits, logits + sample(*shape, dtype=dtype, seed=1)[0] / 4], [], upstream[:1]

    def __call__(self, inputs, constants, **options):
        out = self.run(*inputs, *constants, **options)
        return (out,) if isinstance(out, torch.Tensor) else out

    def outcome(self, inputs, constants, upstream, **options):
        leaves = [leaf(x) for x in inputs]
        out = self(leaves, constants, **options)
        return *(x.detach() for x in out), *gradients(out, leaves, upstream)

    def assert_layout(self, what, got, expected):
        """A kernel reads the same bits whatever the strides; PyTorch's sums depend on them."""
        if self.run.backend != "reference":
            return assert_same(what, got, expected)
        got = tuple(x.detach() for x in got)
        torch.testing.assert_close(got, tuple(expected), rtol=16 * EPS, atol=8 * EPS)


def jobs(*ops, **which):
    return [
        pytest.param((op, *param.values), marks=param.marks, id=f"{op.__name__}-{param.id}")
        for op in ops
        for param in cases(op.__name__, **which)
    ]


@pytest.fixture(params=jobs(token_logprobs, full_kl))
def job(request, monkeypatch):
    return Job(*request.param, monkeypatch)


@pytest.fixture(params=jobs(token_logprobs, full_kl, reference=False, interpreter=False))
def compiled_job(request, monkeypatch):
    return Job(*request.param, monkeypatch)


@pytest.fixture(params=jobs(token_logprobs))
def token_job(request, monkeypatch):
    return Job(*request.param, monkeypatch)


LAYOUTS = {
    "shifted": lambda x: pad(x, (0, 0, 0, 1), value=NAN)[:, :-1],
    "wide rows": lambda x: pad(x, (2, 3), value=NAN)[..., 2:-3],
    "misaligned": lambda x: pad(x.flatten(), (1, 0), value=NAN)[1:].view(x.shape),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every second column": lambda x: torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, NAN)], 2)[:, :, 0],
    "4-D": lambda x: pad(x, (0, 0, 0, 1, 0, 1), value=NAN)[:-1, :-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_logits(job, layout, dtype):
    inputs, constants, upstream = job.data(2, 2, 259, dtype=dtype)
    expected = job.outcome(inputs, constants, upstream, temperature=0.9)
    leaves = [leaf(x) for x in inputs]
    out = job([LAYOUTS[layout](job.move(x)) for x in leaves], constants, temperature=0.9)
    job.assert_layout(layout, (*out, *gradients(out, leaves, upstream)), expected)


def test_strides_of_one_input_of_two(job):
    inputs, constants, upstream = job.data(2, 2, 259)
    expected = job.outcome(inputs, constants, upstream)
    leaves = [leaf(x) for x in inputs]
    views = [job.move(x) for x in leaves]
    views[-1] = LAYOUTS["transposed"](views[-1])
    out = job(views, constants)
    job.assert_layout("one input", (*out, *gradients(out, leaves, upstream)), expected)


VECTORS = {
    "int32": lambda x: x if x.is_floating_point() else x.int(),
    "strided": lambda x: torch.stack([x, -x - 9], -1)[..., 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "one for all": lambda x: x[:1, :1].expand(2, 2),
    "misaligned": lambda x: pad(x.flatten(), (1, 0))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", VECTORS)
def test_strides_of_tokens_temperatures_and_upstream_gradients(job, layout):
    arrange = VECTORS[layout]
    inputs, constants, upstream = job.data(2, 2, 33)
    temperature = torch.linspace(0.5, 2, 4).view(2, 2)
    tidy = [[arrange(x).contiguous() for x in part] for part in (constants, upstream)]
    expected = job.outcome(inputs, *tidy, temperature=arrange(temperature).contiguous())
    leaves = [leaf(x) for x in inputs]
    constants = [arrange(job.move(x)) for x in constants]
    out = job(leaves, constants, temperature=arrange(job.move(temperature)))
    got = (*out, *gradients(out, leaves, [arrange(x) for x in upstream]))
    assert_same(layout, got, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_share_memory(token_job, inplace):
    """An expanded row has stride 0: in place, every row would write over the others."""
    row, _, upstream = sample(1, 12)
    tokens, upstream = torch.arange(12), sample(12, 2, seed=3)[0].t()
    x = leaf(row)
    wide = token_job.move(x).expand(12, 12)
    out = token_job([wide], [tokens], inplace_backward=inplace)
    truth = list(logprobs_truth(row.expand(12, 12), tokens, upstream))
    truth[2] = truth[2].sum(0, keepdim=True)
    for i, got in enumerate((*out, *gradients(out, [x], upstream))):
        assert_budget(f"output {i}", got.detach(), truth[i])


def test_one_way_through_the_kernels(job):
    """The same bits with and without grad, run to run, and for any number of threads."""
    inputs, constants, upstream = job.data(3, 1031)
    expected = job.outcome(inputs, constants, upstream)
    values = expected[: len(upstream)]
    with torch.no_grad():
        assert_same("without grad", job([leaf(x) for x in inputs], constants), values)
    with torch.inference_mode():
        assert_same("inference mode", job(inputs, constants), values)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        again = job.outcome(inputs, constants, upstream)
        assert_same(f"again with {threads} threads", again, expected)


def test_backward_repeats(job):
    inputs, constants, upstream = job.data(4, 60)
    leaves = [leaf(x) for x in inputs]
    assert_repeats(job(leaves, constants), leaves, upstream)
    for x, unchanged in zip(leaves, inputs, strict=True):
        assert_same("the logits", [x.detach()], [unchanged])


def test_upstream_gradients_are_left_alone(job):
    inputs, constants, upstream = job.data(4, 60)
    leaves = [leaf(x) for x in inputs]
    copies = [x.clone() for x in upstream]
    gradients(job(leaves, constants), leaves, upstream)
    assert_same("upstream gradients", upstream, copies)


def in_place(job, logits, tokens):
    """A leaf, logits computed from it by what does not save them, and the op's outputs."""
    x = leaf(logits)
    y = job.move(x) + 0
    return x, y, job([y], [tokens], inplace_backward=True), y._version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_place(token_job, dtype):
    [logits], [tokens], upstream = token_job.data(4, 90, dtype=dtype)
    expected = token_job.outcome([logits], [tokens], upstream)
    x, y, out, version = in_place(token_job, logits, tokens)
    got = gradients(out, [x], upstream, retain_graph=True)
    assert_same("in place", (*out, *got), expected)
    assert_same("outputs after the backward", out, expected[:2])
    if token_job.run.backend == "reference":
        assert_same("logits", [y.detach().cpu()], [logits])
    else:
        assert y._version > version, "autograd cannot know that the logits are gone"
        assert_same("memory of the logits", [y.detach().cpu()], expected[2:])


def test_a_second_backward_after_one_in_place(token_job):
    [logits], [tokens], upstream = token_job.data(4, 90)
    x, _, out, _ = in_place(token_job, logits, tokens)
    assert_repeats(out, [x], upstream)


def test_in_place_one_output_after_the_other(token_job):
    """Two backward passes through one node: right, or refused."""
    [logits], [tokens], upstream = token_job.data(4, 90)
    expected = token_job.outcome([logits], [tokens], (None, upstream[1]))[2:]
    x, _, out, _ = in_place(token_job, logits, tokens)
    gradients(out, [x], (upstream[0], None), retain_graph=True)
    try:
        got = gradients(out, [x], (None, upstream[1]))
    except RuntimeError:
        return
    assert_same("the entropy's gradient", got, expected)


@pytest.mark.parametrize("first", ["op", "other"])
def test_in_place_betrays_no_other_user_of_the_logits(token_job, first):
    [logits], [tokens], upstream = token_job.data(4, 90)
    x, y, out, version = in_place(token_job, logits, tokens)
    other = y.square().sum()  # saves the logits
    if first == "other":
        torch.autograd.grad(other, x, retain_graph=True)
    gradients(out, [x], upstream, retain_graph=True)
    if y._version > version:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
    else:
        assert_same("the other gradient", torch.autograd.grad(other, x), [2 * logits])


def test_in_place_for_two_calls_on_the_same_logits(token_job):
    """Log-probs of two tokens of one row: the second backward must not read a gradient."""
    [logits], [tokens], upstream = token_job.data(4, 90)
    both = [token_job.outcome([logits], [t], upstream)[2] for t in (tokens, 89 - tokens)]
    x, y, out, _ = in_place(token_job, logits, tokens)
    more = token_job([y], [89 - tokens], inplace_backward=True)
    try:
        (got,) = gradients((*out, *more), [x], (*upstream, *upstream))
    except RuntimeError:
        return
    torch.testing.assert_close(got, sum(both), rtol=8 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_on_views(token_job, layout):
    inputs, constants, upstream = token_job.data(2, 2, 259)
    expected = token_job.outcome(inputs, constants, upstream)
    x = leaf(inputs[0])
    out = token_job([LAYOUTS[layout](token_job.move(x))], constants, inplace_backward=True)
    token_job.assert_layout(layout, (*out, *gradients(out, [x], upstream)), expected)


def test_in_place_on_a_leaf(token_job):
    inputs, constants, upstream = token_job.data(4, 90)
    expected = token_job.outcome(inputs, constants, upstream)[2:]
    x = leaf(inputs[0])
    out = token_job([x], constants, inplace_backward=True)
    assert_same("gradient", gradients(out, [x], upstream), expected)


# The third of rows 2^30 apart: the distance itself fits into 32 bits, its double does not.
@pytest.mark.parametrize(("rows", "far"), [(3, 2**30 + 5), (2, 2**31 - 3), (2, 2**32 + 1)])
def test_offsets_beyond_int32(job, rows, far):
    """Rows `far` elements apart: 4 to 8 GB of addresses, of which a few pages are touched."""
    inputs, constants, upstream = job.data(rows, 100, dtype=torch.float16)
    expected = job.outcome(inputs, constants, upstream)
    torch.use_deterministic_algorithms(False)  # it would fill the memory
    views = []
    for x in inputs:
        memory = torch.empty((rows - 1) * far + 100, dtype=x.dtype, device=job.run.device)
        views.append(memory.as_strided((rows, 100), (far, 1)).copy_(x).requires_grad_())
    out = job(views, constants)
    got = (*out, *(x.cpu() for x in gradients(out, views, upstream)))
    job.assert_layout("far rows", got, expected)


@pytest.mark.parametrize(("rows", "far"), [(3, 2**30 + 5), (2, 2**32 + 1)])
def test_gradients_in_place_beyond_int32(token_job, rows, far):
    """As above, and there they are written."""
    [logits], [tokens], upstream = token_job.data(rows, 100, dtype=torch.float16)
    expected = token_job.outcome([logits], [tokens], upstream)
    torch.use_deterministic_algorithms(False)
    memory = torch.empty((rows - 1) * far + 100, dtype=logits.dtype, device=token_job.run.device)
    view = memory.as_strided((rows, 100), (far, 1)).copy_(logits).requires_grad_()
    out = token_job([view], [tokens], inplace_backward=True)
    got = (*out, *(x.cpu() for x in gradients(out, [view], upstream)))
    token_job.assert_layout("far rows", got, expected)
    if token_job.run.backend != "reference":
        assert_same("memory of the logits", [view.detach().cpu()], expected[2:])


def test_more_than_2_to_the_31_elements(compiled_job):
    V = 151936
    N = 2**31 // V + 2
    inputs, constants, upstream = compiled_job.data(1, V, dtype=torch.bfloat16)
    on_gpu = compiled_job.run.device == "cuda"
    # So many that each row has a block, as it does below: of few rows several share one.
    rows = 1024 if on_gpu else 1
    some = ([x.expand(rows, *x.shape[1:]) for x in part] for part in (inputs, constants, upstream))
    expected = [x[:1] for x in compiled_job.outcome(*some)]
    values = expected[: len(upstream)]
    wide = [compiled_job.move(x).expand(N, V).requires_grad_(on_gpu) for x in inputs]
    out = compiled_job(wide, [x.expand(N) for x in constants])
    assert_same("all rows", [x.detach() for x in out], [x.expand(N) for x in values])
    if on_gpu:  # where 4 GB for each gradient are no matter
        found = gradients(out, wide, [x.expand(N) for x in upstream])
        for i in (0, N // 2, N - 2, N - 1):
            rows = [x[i : i + 1].cpu() for x in found]
            assert_same(f"gradient of row {i}", rows, expected[len(upstream) :])
