"""Filters and draws against numbers worked by hand, and counts against probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.rollout._draw import BLOCK, NUCLEUS, draw, keep_top_k, keep_top_p, uniforms

LEAST, MOST = 0.0, 1.0 - 2.0**-53
ONE = torch.ones(1)


def logits_of(*probabilities):
    return torch.tensor([probabilities]).log()


def numbers(count, seed=0):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counts(logits, temperature, draws, seed=0):
    """How often each token comes, of `draws` from one row."""
    rows = logits.expand(draws, -1)
    tokens = draw(rows, torch.full((draws,), temperature), numbers(draws, seed))
    return torch.bincount(tokens, minlength=logits.shape[-1]).double()


def test_a_number_falls_into_the_token_whose_share_it_is_in():
    logits = logits_of(0.125, 0.25, 0.0, 0.625)
    for uniform, token in ((LEAST, 0), (0.12, 0), (0.13, 1), (0.37, 1), (0.38, 3), (MOST, 3)):
        assert draw(logits, ONE, torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_temperature_is_of_each_row():
    # At temperature 1/2 the odds 1 : 2 are 1 : 4: a share of 0.2 in place of a third.
    logits = logits_of(1 / 3, 2 / 3).repeat(2, 1)
    uniform = torch.tensor([0.3, 0.3], dtype=torch.float64)
    assert draw(logits, torch.tensor([1.0, 0.5]), uniform).tolist() == [0, 1]


@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
@pytest.mark.parametrize("uniform", [LEAST, 0.5, MOST])
def test_the_only_legal_token_is_drawn_wherever_it_is(size, uniform):
    for token in {0, size // 2, size - 1}:
        logits = torch.full((1, size), -torch.inf)
        logits[0, token] = -1e4
        assert draw(logits, ONE, torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_the_ends_of_the_unit_interval_draw_the_first_and_last_legal_token():
    logits = torch.randn(64, 5 * BLOCK + 3, generator=torch.Generator().manual_seed(0))
    logits[:, :700] = logits[:, -900:] = -torch.inf
    for uniform, token in ((LEAST, 700), (MOST, logits.shape[1] - 901)):
        tokens = draw(logits, torch.ones(64), torch.full((64,), uniform, dtype=torch.float64))
        assert tokens.tolist() == [token] * 64


def test_impossible_tokens_are_never_drawn():
    generator = torch.Generator().manual_seed(0)
    legal = torch.rand(4000, 2000, generator=generator) < 0.01
    legal[:, 1234] = True
    logits = torch.randn(4000, 2000, generator=generator).mul(8).masked_fill(~legal, -torch.inf)
    tokens = draw(logits, torch.ones(4000), numbers(4000))
    assert legal.gather(1, tokens[:, None]).all()


def test_tokens_come_as_often_as_they_are_likely():
    logits = torch.randn(1, 2 * BLOCK + 100, generator=torch.Generator().manual_seed(1)) * 2
    p, draws = (logits[0].double() / 0.7).softmax(0), 40_000
    got = counts(logits, 0.7, draws)
    # Pearson's chi-square over tokens of at least 5 expected, and one bin for the rest.
    likely = p * draws >= 5
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * draws
    seen = torch.cat([got[likely], got[~likely].sum()[None]])
    freedom = len(expected) - 1
    chi_square = ((seen - expected) ** 2 / expected).sum().item()
    assert freedom > 100
    assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_a_large_flat_vocabulary_is_drawn_from_evenly_to_its_end():
    # In fp32 a running sum of 150,000 equal shares is off by thousands of tokens' worth.
    size, rows = 150_001, 64
    uniform = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    tokens = torch.cat([draw(torch.zeros(1, size), ONE, u[None]) for u in uniform])
    assert (tokens.double() - (uniform * size).floor()).abs().max() <= 1


def test_the_tail_of_a_block_is_no_likelier_than_it_is():
    # Sums of a block differ in their last bits from the running sum within: were the difference
    # left to the last token, one of probability 1e-20 would come every 10^7 draws.
    logits = torch.randn(1, BLOCK, generator=torch.Generator().manual_seed(2))
    logits[0, -1] = -46.0
    near_one = 1 - torch.logspace(-9, -12, 200, dtype=torch.float64)
    tokens = draw(logits.expand(200, -1), torch.ones(200), near_one)
    assert (tokens < BLOCK - 1).all()


def test_logits_of_any_size_are_drawn_from():
    for shift in (-1e4, 1e4):
        logits = logits_of(0.25, 0.75) + shift
        got = counts(logits, 1.0, 4000)
        assert abs(got[0].item() - 1000) < 4.5 * math.sqrt(4000 * 0.25 * 0.75)


def test_a_tiny_temperature_takes_the_largest():
    tiny = torch.finfo(torch.float32).tiny
    logits = torch.tensor([[1.0, 3.0, 2.9]])
    for uniform in (LEAST, 0.5, MOST):
        number = torch.tensor([uniform], dtype=torch.float64)
        assert draw(logits, torch.tensor([tiny]), number).item() == 1


def test_rows_without_a_distribution_stay_in_the_vocabulary():
    logits = torch.full((3, BLOCK + 5), -torch.inf)
    logits[1] = torch.nan
    logits[2, 3] = torch.inf
    tokens = draw(logits, torch.ones(3), numbers(3))
    assert ((tokens >= 0) & (tokens < BLOCK + 5)).all()


def test_top_k_keeps_the_largest_of_each_row_and_ties_with_the_least():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]]).repeat(4, 1)
    kept = keep_top_k(logits, torch.tensor([1, 2, 0, 9]), 9).isfinite()
    assert kept.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


def test_top_p_keeps_the_fewest_with_the_mass_of_each_row():
    logits = logits_of(0.1, 0.5, 0.25, 0.15).repeat(4, 1)
    p = torch.tensor([0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    kept = keep_top_p(logits, torch.ones(4), p).isfinite()
    assert kept.int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]]


def test_top_p_counts_the_mass_at_the_temperature_of_each_row():
    # 0.6 : 0.3 : 0.1 at temperature 1/2 is 36 : 9 : 1, and 36 / 46 holds 0.7 alone.
    logits = logits_of(0.6, 0.3, 0.1).repeat(2, 1)
    p = torch.full((2,), 0.7, dtype=torch.float64)
    kept = keep_top_p(logits, torch.tensor([1.0, 0.5]), p).isfinite()
    assert kept.int().tolist() == [[1, 1, 0], [1, 0, 0]]


def test_top_p_counts_the_mass_of_what_top_k_left():
    # Of 0.4 : 0.3 : 0.2 : 0.1 top-2 leaves 4 : 3, of which the first holds 0.57.
    logits = keep_top_k(logits_of(0.4, 0.3, 0.2, 0.1), torch.tensor([2]), 2)
    kept = keep_top_p(logits, ONE, torch.tensor([0.5], dtype=torch.float64)).isfinite()
    assert kept.int().tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
def test_top_p_of_a_flat_row_ranks_as_many_as_it_takes(p):
    size = 3 * NUCLEUS + 11
    kept = keep_top_p(torch.zeros(1, size), ONE, torch.tensor([p], dtype=torch.float64)).isfinite()
    assert abs(int(kept.sum()) - math.ceil(p * size)) <= 1


def test_numbers_of_a_seeded_row_depend_on_its_seed_alone():
    state = torch.get_rng_state()
    first, second = uniforms([5, 6], 40)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(uniforms([6, 9, 5], 30)[2], first[:30])
    assert not torch.equal(first, second)
    assert first.dtype == torch.float64 and 0 <= first.min() and first.max() < 1
