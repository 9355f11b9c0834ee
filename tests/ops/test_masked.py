import math
import statistics
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.masked import masked_mean, masked_var, masked_whiten

GARBAGE = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def test_hand_worked_mean_variance_and_whitening():
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14 over n - 1 = 2, deviation sqrt(7).
    assert masked_mean(x, mask).item() == 3.0
    assert masked_var(x, mask).item() == 7.0
    root = math.sqrt(7.0)
    expected = torch.tensor([[-2 / root, -1 / root, 0.0], [3 / root, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(x, mask), expected)
    kept = torch.where(mask.bool(), expected + 3.0, 0.0)
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), kept)


def test_whitening_with_shift_has_mean_zero_and_without_shift_keeps_the_mean():
    x = torch.randn(8, 9, dtype=torch.float64) * 3 + 5
    mask = torch.rand(8, 9) < 0.6
    centred, kept = masked_whiten(x, mask), masked_whiten(x, mask, shift_mean=False)
    assert masked_mean(centred, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert masked_mean(kept, mask).item() == pytest.approx(x[mask].mean().item())
    assert masked_var(centred, mask).item() == pytest.approx(1.0, abs=1e-7)
    assert masked_var(kept, mask).item() == pytest.approx(1.0, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), max_size=20),
    st.sampled_from(GARBAGE),
)
def test_any_mask_equals_deleting_what_it_hides(pairs, garbage):
    counting = [value for value, counts in pairs if counts]
    x = torch.tensor([v if c else garbage for v, c in pairs], dtype=torch.float64)
    mask = torch.tensor([c for _, c in pairs], dtype=torch.float32)
    mean = statistics.fmean(counting) if counting else 0.0
    variance = statistics.variance(counting) if len(counting) > 1 else 0.0
    assert masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-9)
    assert masked_var(x, mask).item() == pytest.approx(variance, abs=1e-9)
    whitened = masked_whiten(x, mask)
    scale = math.sqrt(variance + 1e-8)
    expected = [(v - mean) / scale if c else 0.0 for v, c in pairs]
    assert whitened.tolist() == pytest.approx(expected, abs=1e-8)


def test_variance_at_a_large_mean_keeps_its_bits_in_fp32():
    x = torch.tensor([10000.0, 10000.25, 10000.5, 10000.75])
    # Deviations -.375 -.125 .125 .375: squares sum to .3125, over 3. E[x^2] - E[x]^2 gives 0 or 8.
    assert masked_var(x, torch.ones(4)).item() == pytest.approx(0.3125 / 3, rel=1e-6)


def test_equal_values_whiten_to_exactly_zero():
    # 0.1 and 100.1 are no binary fractions: the plain mean of a thousand is off by its rounding,
    # which a deviation of sqrt(1e-8) would blow up.
    for value in (0.1, 100.1, -3.3e4):
        x = torch.full((1000,), value)
        assert masked_whiten(x, torch.ones(1000)).abs().max().item() == 0.0
        assert masked_var(x, torch.ones(1000)).item() <= 1e-18 * value**2


def test_variance_of_one_or_no_element_is_zero():
    x = torch.tensor([3.0, math.nan])
    assert masked_var(x, torch.tensor([True, False])).item() == 0.0
    assert masked_var(x, torch.tensor([False, False])).item() == 0.0
    assert masked_whiten(x, torch.tensor([True, False])).tolist() == [0.0, 0.0]
    kept = masked_whiten(x, torch.tensor([True, False]), shift_mean=False)
    assert kept.tolist() == [3.0, 0.0]


@pytest.mark.parametrize("op", [masked_mean, masked_var, masked_whiten])
@pytest.mark.parametrize("shape", [(2, 3), (0, 4), (0,)])
def test_nothing_that_counts_gives_a_differentiable_zero(op, shape):
    x = torch.full(shape, math.nan, requires_grad=True)
    out = op(x, torch.zeros(shape))
    assert out.sum().item() == 0.0
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(shape))


def test_gradients_match_finite_differences_and_ignore_masked_garbage():
    x = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]])
    x[mask == 0] = math.nan
    x.requires_grad_()
    for op in (masked_mean, masked_var, masked_whiten):
        counting = x.detach()[mask.bool()].requires_grad_()

        def of_counting(values, op=op):
            full = torch.full((3, 4), math.nan, dtype=torch.float64)
            return op(full.masked_scatter(mask.bool(), values), mask)

        assert torch.autograd.gradcheck(of_counting, (counting,))
        weights = torch.randn(3, 4, dtype=torch.float64)
        (grad,) = torch.autograd.grad((op(x, mask) * weights).sum(), x)
        assert torch.equal(grad[mask == 0], torch.zeros(4, dtype=torch.float64))


def test_half_precision_is_summed_in_fp32():
    x = torch.ones(5000, dtype=torch.bfloat16)
    mean = masked_mean(x, torch.ones(5000))
    assert mean.dtype == torch.float32
    assert mean.item() == 1.0


def _whiten_a_share(rank, store, x, mask, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        rows = slice(0, 1) if rank == 0 else slice(1, 4)
        share = x[rows].clone().requires_grad_()
        whitened = masked_whiten(share, mask[rows])
        weights = torch.arange(x.numel(), dtype=x.dtype).view_as(x)
        (whitened * weights[rows]).sum().backward()
        results[rank, "whitened"] = whitened.detach().tolist()
        results[rank, "grad"] = share.grad.tolist()
        alone = masked_whiten(share.detach(), mask[rows], across_processes=False)
        results[rank, "alone"] = alone.tolist()
        together = masked_mean(share.detach(), mask[rows], across_processes=True)
        results[rank, "mean"] = together.item()
        results[rank, "var"] = masked_var(share.detach(), mask[rows], across_processes=True).item()
    finally:
        dist.destroy_process_group()


@pytest.mark.processes
def test_two_processes_whiten_an_uneven_split_as_one_process_does_the_whole():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64, generator=generator) + 2
    mask = torch.rand(4, 5, generator=generator) < 0.7
    whole = x.clone().requires_grad_()
    expected = masked_whiten(whole, mask)
    (expected * torch.arange(20, dtype=x.dtype).view(4, 5)).sum().backward()

    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_whiten_a_share, (f"{folder}/store", x, mask, results), nprocs=2)
        got = dict(results)
    for name, want in (("whitened", expected.detach()), ("grad", whole.grad)):
        joined = torch.tensor(got[0, name] + got[1, name], dtype=torch.float64)
        torch.testing.assert_close(joined, want, rtol=1e-12, atol=1e-12)
    for rank in (0, 1):
        assert got[rank, "mean"] == pytest.approx(x[mask].mean().item(), rel=1e-12)
        assert got[rank, "var"] == pytest.approx(x[mask].var().item(), rel=1e-12)
    assert got[0, "alone"] == [
        pytest.approx(row) for row in masked_whiten(x[:1], mask[:1]).tolist()
    ]


@pytest.mark.parametrize("op", [masked_mean, masked_var, masked_whiten])
def test_bad_arguments_are_named(op):
    with pytest.raises(ValueError, match=r"mask has shape \[3\], but x has \[2, 3\]"):
        op(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match=r"x has dtype torch.int64; expected a floating"):
        op(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3))
