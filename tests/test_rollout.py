"""Rollouts with `model.generate`: what is drawn, and the log-probs that come with it."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from rlhf_fast.data import Rollout
from rlhf_fast.policy import Policy
from rlhf_fast.rollout import HFEngine, Sampling
from rlhf_fast.scratch import tiny_llama, train_tokenizer

PROMPTS = [[70, 71, 72], [70], [80, 81], [90, 91, 92, 93]] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog ran"], 280)


@pytest.fixture
def engine(tokenizer):
    return HFEngine(tiny_llama(tokenizer, hidden_size=32), tokenizer)


def encourage_end(engine):
    """Makes EOS likely enough that completions end at different lengths."""
    processor = engine.model.lm_head
    end = engine.tokenizer.eos_token_id
    forward = processor.forward

    def biased(hidden):
        logits = forward(hidden)
        bias = torch.zeros(logits.shape[-1])
        bias[end] = 4.0
        return logits + bias

    processor.forward = biased


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_policys_under_the_sampling_temperature(engine, temperature):
    rollout = engine.generate(PROMPTS, Sampling(6, temperature=temperature, ignore_eos=True))
    with torch.no_grad():
        scored = Policy(engine.model)(rollout.tokens, rollout.mask, rollout.targets, temperature)
    torch.testing.assert_close(
        rollout.logprobs, scored.logprobs[:, rollout.prompt_length :], atol=2e-5, rtol=1e-5
    )


def test_a_completion_counts_up_to_and_with_its_end_token(engine):
    encourage_end(engine)
    rollout = engine.generate(PROMPTS, Sampling(12, seed=0))
    end = engine.tokenizer.eos_token_id
    lengths = set()
    for ids, finished in zip(rollout.completion_ids(), rollout.finished, strict=True):
        assert end not in ids[:-1]
        assert (ids[-1] == end) == bool(finished)
        assert finished or len(ids) == rollout.completion_mask.shape[1]
        lengths.add(len(ids))
    assert len(lengths) > 2
    assert (rollout.logprobs[~rollout.completion_mask] == 0).all()
    assert (rollout.logprobs[rollout.completion_mask] < 0).all()


def test_padding_that_is_the_end_token_changes_nothing(engine):
    encourage_end(engine)
    expected = engine.generate(PROMPTS, Sampling(12, seed=0))
    engine.tokenizer = type(engine.tokenizer)(
        tokenizer_object=engine.tokenizer.backend_tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
    )
    got = engine.generate(PROMPTS, Sampling(12, seed=0))
    assert got.completion_ids() == expected.completion_ids()
    assert torch.equal(got.completion_mask, expected.completion_mask)
    assert torch.equal(got.finished, expected.finished)


def test_a_prompt_gets_the_same_distribution_alone_and_in_a_padded_batch(engine):
    batch = engine.generate(PROMPTS, Sampling(1, top_k=1))
    for prompt, row in zip(PROMPTS[:4], batch.completion_ids(), strict=False):
        assert engine.generate([prompt], Sampling(1, top_k=1)).completion_ids()[0] == row


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator_alone(engine):
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, Sampling(6, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(engine.generate(PROMPTS, Sampling(6, seed=3)).tokens, first.tokens)
    assert not torch.equal(engine.generate(PROMPTS, Sampling(6, seed=4)).tokens, first.tokens)


def test_truncated_sampling_stays_in_its_support_and_reports_its_own_logprobs(engine):
    rollout = engine.generate([[70]] * 400, Sampling(1, top_k=3, seed=0))
    with torch.no_grad():
        logits = engine.model(torch.tensor([[70]])).logits[0, -1]
    best = logits.topk(3)
    drawn = torch.tensor(rollout.completion_ids())[:, 0]
    assert set(drawn.tolist()) == set(best.indices.tolist())
    expected = dict(zip(best.indices.tolist(), best.values.log_softmax(0).tolist(), strict=True))
    for token, logprob in zip(drawn.tolist(), rollout.logprobs[:, 0].tolist(), strict=True):
        assert logprob == pytest.approx(expected[token], abs=1e-5)
    nucleus = engine.generate([[70]] * 400, Sampling(1, top_p=0.5, seed=0))
    ranked = logits.softmax(0).sort(descending=True)
    size = int((ranked.values.cumsum(0) < 0.5).sum()) + 1
    assert set(torch.tensor(nucleus.completion_ids())[:, 0].tolist()) <= set(
        ranked.indices[:size].tolist()
    )


def test_tokens_are_drawn_as_often_as_their_probability_says(engine):
    rollout = engine.generate([[70]] * 4000, Sampling(1, temperature=0.8, seed=1))
    with torch.no_grad():
        p = (engine.model(torch.tensor([[70]])).logits[0, -1] / 0.8)[: len(engine.tokenizer)]
    p = p.softmax(0).double()
    drawn = torch.tensor(rollout.completion_ids())[:, 0]
    counts = torch.bincount(drawn, minlength=len(p)).double()
    likely = p > 0.005
    deviation = (counts - 4000 * p)[likely] / (4000 * p * (1 - p))[likely].sqrt()
    assert likely.sum() > 10
    assert deviation.abs().max() < 4.5


def test_ids_beyond_the_tokenizer_are_never_drawn(engine, tokenizer):
    engine.model.resize_token_embeddings(len(tokenizer) + 50)
    with torch.no_grad():
        engine.model.lm_head.weight[len(tokenizer) :] = engine.model.lm_head.weight[70] * 3
    rollout = engine.generate(PROMPTS * 8, Sampling(8, seed=0))
    assert rollout.tokens.max() < len(tokenizer)


def test_the_models_own_generation_config_plays_no_part_but_for_its_end_tokens(engine):
    expected = engine.generate(PROMPTS, Sampling(6, seed=3, ignore_eos=True))
    own = GenerationConfig(temperature=0.1, top_k=2, repetition_penalty=3.0, do_sample=True)
    engine.model.generation_config = own
    got = engine.generate(PROMPTS, Sampling(6, seed=3, ignore_eos=True))
    assert torch.equal(got.tokens, expected.tokens)
    assert engine.model.generation_config is own
    stop = expected.completion_ids()[0][2]
    engine.model.generation_config = GenerationConfig(eos_token_id=[stop])
    stopped = engine.generate(PROMPTS, Sampling(6, seed=3))
    assert stopped.completion_ids()[0] == expected.completion_ids()[0][:3]
    assert stopped.finished[0]


def test_the_models_training_mode_survives(engine):
    engine.model.train()
    engine.generate(PROMPTS, Sampling(2))
    assert engine.model.training


def test_no_prompts_are_refused(engine):
    with pytest.raises(ValueError, match="no prompts to generate from"):
        engine.generate([], Sampling(2))


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
