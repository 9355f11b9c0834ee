"""ppo_advantages: hand-computed numbers, the papers' sums, and every backend against both.

Kernels have test_ppo_advantages_kernels.py, whitening has test_ppo_whitening.py.
"""

import math
import statistics

import pytest
import torch
from backend_cases import calls, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_fast.ops.ppo_advantages import ppo_advantages

OP = "ppo_advantages"


@pytest.fixture(params=cases(OP))
def run(request, monkeypatch):
    """`ppo_advantages` through one backend."""
    yield from calls(OP, ppo_advantages, request.param, monkeypatch)


@pytest.fixture(params=cases(OP, dtype=torch.float64))
def run64(request, monkeypatch):
    """As `run`, where fp64 is computed."""
    yield from calls(OP, ppo_advantages, request.param, monkeypatch)


def published(score, lp, ref, values, kl_coef, gamma, lam):
    """One sequence of tokens that all count: Ziegler et al.'s reward, Schulman et al.'s GAE."""
    rewards = [-kl_coef * (a - b) for a, b in zip(lp, ref, strict=True)]
    if rewards:
        rewards[-1] += score
    advantages = [0.0] * len(rewards)
    running, next_value = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * next_value - values[t] + gamma * lam * running
        advantages[t], next_value = running, values[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)], rewards


def batch(seed, sequences=4, length=6):
    """Scores, log-probs, reference, values (garbage under the mask) and a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sequences, dtype=torch.float64, generator=generator)
    tokens = torch.randn(3, sequences, length, dtype=torch.float64, generator=generator)
    mask = torch.rand(sequences, length, generator=generator) < 0.6
    garbage = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)[:, None, None]
    return scores, *torch.where(mask, tokens, garbage).unbind(), mask


def test_hand_worked_rewards_advantages_and_returns(run):
    scores = torch.tensor([2.0, 1.0])
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, math.inf, -0.5]])
    ref = torch.tensor([[-2.0, -2.0, 0.0], [-1.0, 0.0, -1.5]])
    values = torch.tensor([[1.0, 0.5, 9.0], [0.5, math.nan, 0.25]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    advantages, returns, rewards = run(
        scores, logprobs, ref, values, mask, kl_coef=0.5, gamma=1.0, lam=0.5, whiten=False
    )
    assert rewards.tolist() == [[-0.5, 2.0, 0.0], [0.0, 0.0, 0.5]]
    # Row 0: d2 = 2 - .5 = 1.5; d1 = -.5 + .5 - 1 = -1, A1 = -1 + .5 * 1.5 = -.25.
    # Row 1: d2 = .5 - .25 = .25; d1 = 0 + .25 - .5 = -.25, A1 = -.25 + .5 * .25 = -.125.
    assert advantages.tolist() == [[-0.25, 1.5, 0.0], [-0.125, 0.0, 0.25]]
    assert returns.tolist() == [[0.75, 2.0, 0.0], [0.375, 0.0, 0.5]]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**31), st.sampled_from([(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.8, 1.0)]))
def test_random_masks_equal_deleting_what_they_hide(run64, seed, coefficients):
    gamma, lam = coefficients
    scores, logprobs, ref, values, mask = batch(seed)
    got = run64(
        scores, logprobs, ref, values, mask, kl_coef=0.3, gamma=gamma, lam=lam, whiten=False
    )
    for b, keep in enumerate(mask):
        rows = (x[b][keep].tolist() for x in (logprobs, ref, values))
        want = published(scores[b].item(), *rows, 0.3, gamma, lam)
        for result, expected in zip(got, want, strict=True):
            assert result[b][keep].tolist() == pytest.approx(expected)
            assert (result[b][~keep] == 0).all()


def test_packed_tokens_give_what_padded_ones_do(run64):
    scores, logprobs, ref, values, mask = batch(3)
    options = {"kl_coef": 0.1, "lam": torch.tensor([0.9, 0.5, 1.0, 0.0], dtype=torch.float64)}
    inside = torch.arange(6) < torch.tensor([4, 0, 6, 2])[:, None]
    mask = mask & inside
    padded = run64(scores, logprobs, ref, values, mask, **options)
    packed = run64(
        scores,
        *(x[inside] for x in (logprobs, ref, values, mask)),
        cu_seqlens=torch.tensor([0, 4, 4, 10, 12], dtype=torch.int32),
        **options,
    )
    for a, b in zip(padded, packed, strict=True):
        torch.testing.assert_close(a[inside], b)


def test_padding_side_and_amount_do_not_matter(run64):
    scores, logprobs, ref, values, mask = batch(5)
    plain = run64(scores, logprobs, ref, values, mask, kl_coef=0.1)
    for left, right in ((3, 0), (0, 2), (1, 4)):
        pad = torch.nn.functional.pad
        wide = (pad(x, (left, right), value=math.nan) for x in (logprobs, ref, values))
        got = run64(scores, *wide, pad(mask, (left, right)), kl_coef=0.1)
        for a, b in zip(plain, got, strict=True):
            torch.testing.assert_close(b, pad(a, (left, right)))


def test_permuting_the_batch_permutes_the_results(run64):
    data = batch(7)
    order = torch.tensor([2, 0, 3, 1])
    plain = run64(*data, kl_coef=0.1)
    permuted = run64(*(x[order] for x in data), kl_coef=0.1)
    for a, b in zip(plain, permuted, strict=True):
        torch.testing.assert_close(a[order], b)


def test_lambda_one_is_monte_carlo_minus_the_value(run64):
    scores, logprobs, ref, values, mask = batch(9)
    advantages, returns, rewards = run64(
        scores, logprobs, ref, values, mask, kl_coef=0.2, lam=1.0, whiten=False
    )
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[mask], to_go[mask])
    torch.testing.assert_close(advantages[mask], (to_go - values)[mask])


def test_advantages_are_whitened_after_the_returns_were_taken(run64):
    data = batch(11)
    raw, returns, _ = run64(*data, kl_coef=0.2, whiten=False)
    whitened, same, _ = run64(*data, kl_coef=0.2)
    assert torch.equal(returns, same)
    mask = data[-1]
    counting = raw[mask].tolist()
    mean, deviation = statistics.fmean(counting), statistics.stdev(counting)
    assert whitened[mask].tolist() == pytest.approx([(a - mean) / deviation for a in counting])


def test_value_lambda_changes_the_returns_alone(run64):
    data = batch(13)
    advantages, returns, _ = run64(*data, kl_coef=0.2, lam=0.9, value_lam=1.0)
    plain, _, _ = run64(*data, kl_coef=0.2, lam=0.9)
    _, monte_carlo, _ = run64(*data, kl_coef=0.2, lam=1.0)
    torch.testing.assert_close(advantages, plain, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(returns, monte_carlo, rtol=1e-14, atol=1e-14)


def test_coefficients_may_differ_by_sequence(run64):
    data = batch(15)
    lam = torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=torch.float64)
    gamma = torch.tensor([1.0, 0.9, 1.0, 0.8], dtype=torch.float64)
    together = run64(*data, kl_coef=0.2, lam=lam, gamma=gamma, whiten=False)
    for b in range(4):
        alone = run64(
            *(x[b : b + 1] for x in data),
            kl_coef=0.2,
            lam=lam[b].item(),
            gamma=gamma[b].item(),
            whiten=False,
        )
        for a, c in zip(together, alone, strict=True):
            torch.testing.assert_close(a[b : b + 1], c)


def test_missing_eos_penalty_is_subtracted_from_unfinished_scores(run64):
    scores, logprobs, ref, values, mask = batch(17)
    finished = torch.tensor([1, 0, 0, 1])
    got = run64(
        scores,
        logprobs,
        ref,
        values,
        mask,
        kl_coef=0.2,
        missing_eos_penalty=1.5,
        finished=finished,
    )
    lowered = scores - torch.tensor([0.0, 1.5, 1.5, 0.0])
    want = run64(lowered, logprobs, ref, values, mask, kl_coef=0.2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sequence_without_tokens_contributes_nothing_even_with_a_broken_score(run64):
    scores, logprobs, ref, values, mask = batch(19)
    mask[1] = False
    scores[1] = math.nan
    got = run64(scores, logprobs, ref, values, mask, kl_coef=0.2)
    rest = torch.tensor([0, 2, 3])
    want = run64(scores[rest], logprobs[rest], ref[rest], values[rest], mask[rest], kl_coef=0.2)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[rest], b)
        assert (a[1] == 0).all()


def test_without_kl_no_reference_is_needed_or_read(run64):
    scores, logprobs, ref, values, mask = batch(21)
    without = run64(scores, logprobs, None, values, mask, kl_coef=0.0)
    ignored = run64(scores, logprobs, ref * math.inf, values, mask, kl_coef=0.0)
    for a, b in zip(without, ignored, strict=True):
        assert torch.equal(a, b)
    assert without[2].sum().item() == pytest.approx(scores[mask.any(1)].sum().item())


def test_results_are_constants_in_fp32(run):
    scores, logprobs, ref, values, mask = batch(23)
    half = [x.bfloat16().requires_grad_() for x in (scores, logprobs, ref, values)]
    for result in run(*half, mask, kl_coef=0.1):
        assert result.dtype == torch.float32
        assert not result.requires_grad


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_that_counts_gives_zeros(run, shape):
    x = torch.full(shape, math.nan)
    for result in run(torch.ones(shape[0]), x, x, x, torch.zeros(shape), kl_coef=0.1):
        assert torch.equal(result, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0,), (3,)])
def test_packed_sequences_may_all_be_empty(run, shape):
    cu_seqlens = torch.zeros(shape[0] + 1, dtype=torch.int32)
    x = torch.zeros(0)
    for result in run(torch.ones(shape), x, x, x, x, kl_coef=0.1, cu_seqlens=cu_seqlens):
        assert result.shape == (0,)


def test_one_token_gets_its_score_less_its_value(run):
    one = torch.ones(3, 1)
    advantages, returns, rewards = run(
        torch.tensor([1.0, 2.0, 3.0]), one, -one, 4 * one, one, kl_coef=0.25, whiten=False
    )
    assert rewards.tolist() == [[0.5], [1.5], [2.5]]
    assert advantages.tolist() == [[-3.5], [-2.5], [-1.5]]
    assert returns.tolist() == [[0.5], [1.5], [2.5]]


def test_the_adaptive_lambda_grows_with_the_tokens_that_count(run64):
    # alpha = 0.5; two tokens: lambda = 0, four: 1/2, ten: 0.8, one: 1 - 2 < 0 is 0.
    scores, logprobs, ref, values, _ = batch(25, length=12)
    lengths = torch.tensor([2, 4, 10, 1])
    mask = (torch.arange(12) % 11 != 3) & (torch.arange(12) < (lengths + (lengths > 3))[:, None])
    assert mask.sum(1).tolist() == lengths.tolist()
    data = (scores, *(torch.where(mask, x.nan_to_num(0.5), x) for x in (logprobs, ref, values)))
    for value_lam in (None, 0.25):
        options = {"kl_coef": 0.2, "gamma": 0.9, "value_lam": value_lam, "whiten": False}
        adaptive = run64(*data, mask, **options, lam=1.0, adaptive_lam=0.5)
        by_hand = torch.tensor([0.0, 0.5, 0.8, 0.0], dtype=torch.float64)
        for a, b in zip(adaptive, run64(*data, mask, **options, lam=by_hand), strict=True):
            torch.testing.assert_close(a, b)


def test_bad_arguments_are_named():
    scores, x = torch.zeros(2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"scores has shape \[3\] on cpu; expected .* \[2\]"):
        ppo_advantages(torch.zeros(3), x, x, x, x, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"finished has shape \[2, 3\]"):
        ppo_advantages(scores, x, x, x, x, kl_coef=0.1, finished=x)
    with pytest.raises(ValueError, match=r"missing_eos_penalty=1.0 needs finished"):
        ppo_advantages(scores, x, x, x, x, kl_coef=0.1, missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match=r"kl_coef=0.1 needs ref_logprobs"):
        ppo_advantages(scores, x, None, x, x, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"values has shape \[3\], but logprobs has \[2, 3\]"):
        ppo_advantages(scores, x, x, torch.zeros(3), x, kl_coef=0.1)
    flat = torch.zeros(6)
    with pytest.raises(ValueError, match=r"logprobs has shape \[6\]; expected \[B, T\], or \[N\]"):
        ppo_advantages(scores, flat, flat, flat, flat, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to the 6 packed tokens"):
        cu_seqlens = torch.tensor([0, 4, 5], dtype=torch.int32)
        ppo_advantages(scores, flat, flat, flat, flat, kl_coef=0.1, cu_seqlens=cu_seqlens)
