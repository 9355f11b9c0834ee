"""The dataclasses of rollouts."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.data import Rollout
from rlhf_fast.rollout import Sampling


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", 0.0), ("top_k", -1), ("top_p", 1.5)]
)
def test_sampling_out_of_range_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"Sampling.{name} = {value}: must be"):
        Sampling(**{"max_new_tokens": 4, name: value})


def test_rollouts_from_lists_pad_prompts_left_and_completions_right():
    rollout = Rollout.from_lists(
        [[1, 2], [3]], [[4], [5, 6]], pad_id=0, eos_ids=[6], logprobs=[[-0.5], [-1.0, -2.0]]
    )
    assert rollout.tokens.tolist() == [[1, 2, 4, 0], [0, 3, 5, 6]]
    assert rollout.mask.tolist() == [[True, True, True, False], [False, True, True, True]]
    assert rollout.completion_mask.tolist() == [[True, False], [True, True]]
    assert rollout.logprobs.tolist() == [[-0.5, 0.0], [-1.0, -2.0]]
    assert rollout.finished.tolist() == [False, True]
    assert rollout.completion_ids() == [[4], [5, 6]]
    assert rollout.select(torch.tensor([1])).completion_ids() == [[5, 6]]


@pytest.mark.parametrize("logprobs", [[[-1.0, -2.0], [-3.0]], [[-1.0]]])
def test_logprobs_that_are_not_one_a_token_are_refused(logprobs):
    with pytest.raises(ValueError, match="completion 0 has 1 tokens but 2|2 completions but 1"):
        Rollout.from_lists([[1], [2]], [[3], [4, 5]], pad_id=0, logprobs=logprobs)


def test_an_empty_completion_is_refused_by_its_number():
    with pytest.raises(ValueError, match="completion 1 is empty"):
        Rollout.from_lists([[1], [2]], [[3], []], pad_id=0)
