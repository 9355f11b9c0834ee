"""What a ragged rollout is to a model: its rows flush left, without columns that no row uses."""

from __future__ import annotations

import dataclasses

import torch
from ragged_cases import ragged, widened

from rlhf_fast.data import Rollout


def by_hand():
    o, x = False, True
    return Rollout(
        tokens=torch.tensor([[0, 5, 6, 7, 8, 0], [9, 5, 6, 7, 8, 4], [0, 0, 0, 3, 0, 0]]),
        mask=torch.tensor([[o, x, x, x, x, o], [x, x, x, x, x, x], [o, o, o, x, o, o]]),
        # The second row's fourth and last tokens were not sampled: a tool's.
        completion_mask=torch.tensor([[x, x, o], [o, x, o], [x, o, o]]),
        finished=torch.tensor([True, False, True]),
    )


def test_rows_begin_in_the_first_column_and_end_with_their_last_sampled_token():
    rollout = by_hand()
    assert rollout.lengths.tolist() == [4, 5, 2]
    batch = rollout.flush_left()
    # Of a row without a prompt the column before the completion stays, masked.
    assert batch.tokens[:, :2].tolist() == [[5, 6], [9, 5], [0, 3]]
    assert batch.tokens.shape == (3, 5)
    assert batch.mask.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.targets.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.tokens[batch.targets].tolist() == [7, 8, 8, 3]
    assert batch.completions(batch.tokens * 1.0).tolist() == [[7, 8, 0], [0, 8, 0], [3, 0, 0]]


def test_columns_that_no_row_uses_are_not_read():
    rollout = ragged()
    narrow, wide = rollout.flush_left(), widened(rollout).flush_left()
    assert narrow.tokens.shape == (8, 20)
    for name in ("mask", "targets"):
        assert torch.equal(getattr(narrow, name), getattr(wide, name))
    assert torch.equal(narrow.tokens[narrow.mask], wide.tokens[wide.mask])
    assert torch.equal(narrow.tokens[narrow.mask], rollout.tokens[rollout.mask])


def test_a_long_prompt_beside_a_long_completion_shows_no_token_twice():
    rollout = Rollout.from_lists([[5], [6] * 11], [[7] * 14, [8] * 9], pad_id=1)
    batch = rollout.flush_left()
    assert batch.tokens.shape == (2, 20)
    assert batch.mask.sum(1).tolist() == [15, 20] and batch.targets.sum(1).tolist() == [14, 9]
    assert batch.tokens[batch.mask].tolist() == rollout.tokens[rollout.mask].tolist()


def test_a_row_in_which_nothing_was_sampled_takes_a_column():
    rollout = ragged()
    nothing = torch.zeros_like(rollout.completion_mask)
    empty = dataclasses.replace(rollout, completion_mask=nothing)
    assert empty.lengths.min() == 1 and not empty.flush_left().targets.any()
