"""The row kernels as the linear ops call them: slices of columns, chosen rows, other dtypes."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from backend_cases import Case, cases
from torch import Tensor

from rlhf_fast.backends import Impl, resolve
from rlhf_fast.ops import full_kl, linear_kl, linear_logprobs, token_logprobs

logprobs_reference, kl_reference = (
    importlib.import_module(f"rlhf_fast.ops.{name}").REFERENCE
    for name in ("token_logprobs", "full_kl")
)
N, V = 7, 37
CUTS = [[37], [1, 36], [36, 1], [16, 16, 5], [5] * 7 + [2]]
SCALINGS = [(None, 1.0, 0.0, 1.0), ("rows", 1.0, 3.0, -0.7), (None, 0.5, 0.0, 2.0)]


def impl_of(op: str, case: Case) -> Impl:
    reference = logprobs_reference if op == "token_logprobs" else kl_reference
    found = resolve(op, torch.device(case.device), case.backend, torch.float32)
    return found or reference


def rows_of_all_kinds() -> Tensor:
    """Logits [7, 37]: ordinary, flat, peaked, with -inf at the front, the back, almost all."""
    logits = 3.0 * torch.randn(N, V)
    logits[1] = 0.25
    logits[2, 20] += 40.0
    logits[3, :17] = -math.inf
    logits[4, 5:] = -math.inf
    logits[5, torch.arange(V) != 36] = -math.inf
    logits[6] += 1e4
    return logits


def scaling_of(scaling: Any, device: str) -> tuple[Any, ...]:
    temperature, *rest = scaling
    return (torch.linspace(0.5, 2.0, N, device=device) if temperature else None, *rest)


def sliced(impl: Impl, inputs: list[Tensor], cuts: list[int], before: Any, after: Any) -> Any:
    """The forward's results after the last slice."""
    assert impl.forward is not None
    *results, carry, first = (None, None, 0)
    for parts in zip(*(x.split(cuts, dim=1) for x in inputs), strict=True):
        *results, carry = impl.forward(*parts, *before, *after(first), carry)
        first += parts[0].shape[1]
    return *results, carry


@pytest.mark.parametrize("case", cases("token_logprobs"))
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logprobs_of_slices_are_those_of_the_whole(case: Case, cuts: list[int], scaling: Any):
    logits = rows_of_all_kinds()
    tokens = torch.tensor([3, 0, 20, 36, 2, 36, -100])
    upstream = torch.randn(2, N, dtype=torch.float64)
    upstream[:, 1] = 0.0

    def results(impl: Impl, cuts: list[int], dtype: torch.dtype, device: str) -> list[Tensor]:
        x, ids, up = logits.to(device, dtype), tokens.to(device), upstream.to(device, dtype)
        options = scaling_of(scaling, device)
        before = (ids, *options, -100)
        *outputs, stats = sliced(impl, [x], cuts, before, lambda first: (first,))
        assert impl.backward is not None
        grad = torch.full_like(x, math.nan)
        first = 0
        for part, out in zip(x.split(cuts, 1), grad.split(cuts, 1), strict=True):
            impl.backward(part, ids, stats, *up, *options, -100, first, None, out)
            first += part.shape[1]
        return [y.double().cpu() for y in (*outputs, grad)]

    want = results(logprobs_reference, [V], torch.float64, "cpu")
    got = results(impl_of("token_logprobs", case), cuts, torch.float32, case.device)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    assert not got[2][1].any() and not got[2][6].any()


@pytest.mark.parametrize("case", cases("full_kl"))
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_kl_of_slices_is_that_of_the_whole(case: Case, cuts: list[int], scaling: Any):
    logits = rows_of_all_kinds()
    ref = logits + torch.randn(N, V)
    ref[0, 3] = -math.inf  # the policy allows it
    ref[4] = torch.randn(V)  # it allows what the policy rules out
    upstream = torch.randn(N, dtype=torch.float64)
    upstream[1] = 0.0

    def results(impl: Impl, cuts: list[int], dtype: torch.dtype, device: str) -> list[Tensor]:
        pair = [x.to(device, dtype) for x in (logits, ref)]
        options = scaling_of(scaling, device)
        kl, stats = sliced(impl, pair, cuts, options, lambda _: ())
        assert impl.backward is not None
        grads = [torch.full_like(x, math.nan) for x in pair]
        parts = zip(*(x.split(cuts, 1) for x in (*pair, *grads)), strict=True)
        for part, ref_part, out, ref_out in parts:
            up = upstream.to(device, dtype)
            impl.backward(part, ref_part, stats, up, *options, None, out, ref_out)
        return [y.double().cpu() for y in (kl, *grads)]

    want = results(kl_reference, [V], torch.float64, "cpu")
    got = results(impl_of("full_kl", case), cuts, torch.float32, case.device)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("case", cases("token_logprobs"))
def test_a_row_that_is_all_minus_inf_is_nan_however_it_is_cut(case: Case):
    impl = impl_of("token_logprobs", case)
    x = torch.full((1, 8), -math.inf, device=case.device)
    before = (torch.zeros(1, dtype=torch.long, device=case.device), None, 1.0, 0.0, 1.0, -100)
    for cuts in ([8], [3, 5]):
        logprobs, entropy, _ = sliced(impl, [x], cuts, before, lambda first: (first,))
        assert logprobs.isnan().all() and entropy.isnan().all()


@pytest.mark.parametrize("case", cases("token_logprobs"))
@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**40)])
def test_an_id_of_no_column_gives_nan_and_reads_nothing(case: Case, bad: int):
    impl = impl_of("token_logprobs", case)
    x = rows_of_all_kinds()[:2].to(case.device)
    ids = torch.tensor([bad, 1], device=case.device)
    options = (None, 1.0, 0.0, 1.0, -100, 0)
    assert impl.forward is not None and impl.backward is not None
    logprobs, entropy, stats = impl.forward(x, ids, *options, None)
    for output in (logprobs, entropy):
        assert output.isnan().tolist() == [True, False]
    grad = torch.zeros_like(x)
    impl.backward(x, ids, stats, torch.ones_like(logprobs), None, *options, None, grad)
    assert grad[0].isnan().all() and grad[1].isfinite().all()


@pytest.mark.parametrize("case", cases("token_logprobs"))
def test_gradients_of_chosen_rows(case: Case):
    impl, device = impl_of("token_logprobs", case), case.device
    x = rows_of_all_kinds().to(device)
    ids = torch.tensor([3, 0, 20, 36, 2, 36, 5], device=device)
    options = (None, 0.7, 0.0, 1.0, -100, 0)
    assert impl.forward is not None and impl.backward is not None
    *_, stats = impl.forward(x, ids, *options, None)
    up, whole = torch.randn(2, N, device=device), torch.empty_like(x)
    impl.backward(x, ids, stats, up[0], up[1], *options, None, whole)
    rows = torch.tensor([0, 2, 3, 6], device=device)
    some = torch.empty(4, V, device=device)
    chosen = (ids[rows], stats[:, rows], up[0, rows], up[1, rows])
    impl.backward(x, *chosen, *options, rows, some)
    assert torch.equal(some, whole[rows])
    impl.backward(x, ids, stats, up[0], up[1], *options, None, x)  # over the logits themselves
    assert torch.equal(x, whole)


@pytest.mark.parametrize("case", cases("full_kl"))
def test_kl_gradients_of_chosen_rows(case: Case):
    impl, device = impl_of("full_kl", case), case.device
    x = rows_of_all_kinds().to(device)
    ref = x + torch.randn(N, V, device=device)
    options = (None, 0.7, 0.0, 1.0)
    assert impl.forward is not None and impl.backward is not None
    _, stats = impl.forward(x, ref, *options, None)
    up = torch.randn(N, device=device)
    whole, ref_whole = torch.empty_like(x), torch.empty_like(x)
    impl.backward(x, ref, stats, up, *options, None, whole, ref_whole)
    rows = torch.tensor([0, 2, 3, 6], device=device)
    some, ref_some = torch.empty(2, 4, V, device=device)
    impl.backward(x, ref, stats[:, rows], up[rows], *options, rows, some, ref_some)
    assert torch.equal(some, whole[rows]) and torch.equal(ref_some, ref_whole[rows])
    impl.backward(x, ref, stats, up, *options, None, x, None)
    assert torch.equal(x, whole)


GPU_KERNELS = [c for c in cases("token_logprobs") if c.values[0].backend in ("triton", "cuda")]


@pytest.mark.parametrize("case", GPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_fp32_tiles_may_be_written_in_half_precision(case: Case, dtype: torch.dtype):
    device = case.device
    x = rows_of_all_kinds().to(device)
    up, options = torch.randn(N, device=device), (None, 1.0, 0.0, 1.0)
    impl = impl_of("token_logprobs", case)
    assert impl.forward is not None and impl.backward is not None
    ids = torch.tensor([3, 0, 20, 36, 2, 36, 5], device=device)
    *_, stats = impl.forward(x, ids, *options, -100, 0, None)
    wide, half = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    for out in (wide, half):
        impl.backward(x, ids, stats, up, None, *options, -100, 0, None, out)
    assert torch.equal(half, wide.to(dtype))
    impl = impl_of("full_kl", case)
    assert impl.forward is not None and impl.backward is not None
    ref = x + 1.0 - torch.rand_like(x)
    _, stats = impl.forward(x, ref, *options, None)
    for out in (wide, half):
        impl.backward(x, ref, stats, up, *options, None, out, None)
    assert torch.equal(half, wide.to(dtype))


@pytest.mark.parametrize("case", cases("token_logprobs"))
def test_the_sums_that_linear_ops_take_from_the_backward_kernels(case: Case):
    """With zero statistics they write e_j, and e_j g_j, relative to the largest logit."""
    device, options = case.device, (None, 0.5, 0.0, 1.0)
    x = rows_of_all_kinds().to(device)
    ref = torch.randn(N, V, device=device)
    top, ref_top = x.amax(1), ref.amax(1)
    zero, ones, out = torch.zeros_like(top), torch.ones_like(top), torch.empty_like(x)
    impl = impl_of("token_logprobs", case)
    assert impl.backward is not None
    stats = torch.stack([top, zero, zero, zero])
    nothing = torch.full((N,), -1, device=device)
    impl.backward(x, nothing, stats, -ones, None, *options, -2, 0, None, out)
    gap = (x - top[:, None]) / 0.5
    torch.testing.assert_close(out, gap.exp() / 0.5)
    impl = impl_of("full_kl", case)
    assert impl.backward is not None
    stats = torch.stack([top, zero, ref_top, zero, zero])
    impl.backward(x, ref, stats, ones, *options, None, out, None)
    g = gap - (ref - ref_top[:, None]) / 0.5
    expected = torch.where(gap == -math.inf, 0.0, gap.exp() * g / 0.5)
    torch.testing.assert_close(out, expected)


COMPILED = [c for c in cases("token_logprobs") if c.values[0].backend in ("cpp", "cuda")]


@pytest.mark.parametrize("case", COMPILED)
def test_registered_ops_pass_opcheck(case: Case):
    ops, device = torch.ops.rlhf_fast, case.device
    x = rows_of_all_kinds()[:4].to(device)
    ids = torch.tensor([3, 0, 20, -100], device=device)
    rows = torch.tensor([0, 2], device=device)
    for temperature in (None, torch.linspace(0.5, 2.0, 4, device=device)):
        options = (temperature, 0.7, 3.0, 1.0, -100, 0)
        torch.library.opcheck(ops.token_logprobs_forward, (x, ids, *options, None))
        logprobs, entropy, stats = ops.token_logprobs_forward(x, ids, *options, None)
        torch.library.opcheck(ops.token_logprobs_forward, (x, ids, *options, stats))
        backward = (x, ids, stats, logprobs, entropy, *options, None, torch.empty_like(x))
        torch.library.opcheck(ops.token_logprobs_backward, backward)
        options = options[:4]
        torch.library.opcheck(ops.full_kl_forward, (x, -x, *options, None))
        kl, stats = ops.full_kl_forward(x, -x, *options, None)
        outs = (torch.empty_like(x), None)
        torch.library.opcheck(ops.full_kl_backward, (x, -x, stats, kl, *options, None, *outs))
    chosen = (stats[:, rows], kl[rows], None, *options[1:], rows, None, torch.empty_like(x[rows]))
    torch.library.opcheck(ops.full_kl_backward, (x, -x, *chosen))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs an NVIDIA GPU beside the first")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("op", [token_logprobs, full_kl, linear_logprobs, linear_kl])
def test_runs_on_the_device_of_its_tensors(op: Any, backend: str):
    x, weight, ids = rows_of_all_kinds(), torch.randn(V, V), torch.zeros(N, dtype=torch.long)
    x[3:6] = torch.randn(3, V)  # a product of -inf would be NaN
    inputs = {
        token_logprobs: (x, ids),
        full_kl: (x, -x),
        linear_logprobs: (x, weight, ids),
        linear_kl: (x, weight, -x, weight),
    }[op]
    results = []
    for name, device in ((backend, "cuda:1"), ("reference", "cpu")):
        leaf = inputs[0].to(device).requires_grad_()
        out = op(leaf, *(y.to(device) for y in inputs[1:]), backend=name)
        out = out if isinstance(out, Tensor) else out[0]
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
        assert torch.cuda.current_device() == 0
    on_gpu = tuple(y.cpu() for y in results[0])
    torch.testing.assert_close(on_gpu, results[1], rtol=1e-4, atol=1e-4)
