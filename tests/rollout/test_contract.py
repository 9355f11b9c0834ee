"""What every rollout engine keeps to."""

from __future__ import annotations

import pytest
import torch
from rollout_cases import PROMPTS, disturb, forward_logprobs, make_model
from transformers import GenerationConfig

from rlhf_fast.rollout import Sampling, WeightSource


@pytest.fixture
def engine(shared_engine):
    return shared_engine


@pytest.fixture
def vocabulary(tokenizer):
    return len(tokenizer)


def test_a_rollout_has_n_rows_a_prompt_side_by_side(engine):
    rollout = engine.generate(PROMPTS[:4], Sampling(5, n=3, seed=0, ignore_eos=True))
    assert rollout.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rollout.tokens.shape == (12, 4 + 5)
    assert rollout.completion_mask.all()
    for row, index in enumerate(rollout.prompt_index):
        prompt = rollout.tokens[row, :4][rollout.mask[row, :4]]
        assert prompt.tolist() == PROMPTS[index]
    assert len({tuple(ids) for ids in rollout.completion_ids()}) == 12
    assert rollout.logprobs.dtype == torch.float32 and (rollout.logprobs < 0).all()
    assert rollout.weight_version.tolist() == [engine.weight_version] * 12


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_a_forward_pass(engine, vocabulary, temperature):
    rollout = engine.generate(PROMPTS, Sampling(9, temperature, seed=0, ignore_eos=True))
    expected = forward_logprobs(engine.model, rollout, temperature, vocabulary)
    torch.testing.assert_close(rollout.logprobs, expected, atol=3e-5, rtol=1e-5)


def test_a_completion_ends_with_its_first_end_token(engine, tokenizer):
    end = tokenizer.eos_token_id
    stops = tuple(range(100, 160))
    rollout = engine.generate(PROMPTS * 4, Sampling(12, seed=0, stop_token_ids=stops))
    reasons, lengths = set(), set()
    for ids, reason, finished in zip(
        rollout.completion_ids(), rollout.finish_reasons, rollout.finished, strict=True
    ):
        ends = [i in (end, *stops) for i in ids]
        assert not any(ends[:-1])
        assert (reason == "stop") == ends[-1] == bool(finished)
        assert reason == "stop" or len(ids) == 12
        reasons.add(reason)
        lengths.add(len(ids))
    assert reasons == {"stop", "length"} and len(lengths) > 3
    assert (rollout.logprobs[~rollout.completion_mask] == 0).all()


def test_end_tokens_of_the_models_generation_config_count_and_nothing_else_of_it(engine):
    plain = engine.generate(PROMPTS, Sampling(6, seed=3, ignore_eos=True))
    own = engine.model.generation_config
    stop = plain.completion_ids()[0][2]
    try:
        engine.model.generation_config = GenerationConfig(
            temperature=0.1, top_k=2, repetition_penalty=3.0, do_sample=True, eos_token_id=[stop]
        )
        stopped = engine.generate(PROMPTS, Sampling(6, seed=3))
        again = engine.generate(PROMPTS, Sampling(6, seed=3, ignore_eos=True))
    finally:
        engine.model.generation_config = own
    assert stopped.completion_ids()[0] == plain.completion_ids()[0][:3]
    assert stopped.finish_reasons[0] == "stop"
    assert torch.equal(again.tokens, plain.tokens)


def test_truncated_sampling_stays_in_its_support_and_reports_its_own_logprobs(engine, vocabulary):
    with torch.no_grad():
        logits = engine.model(torch.tensor([[70]])).logits[0, -1, :vocabulary]
    best = logits.topk(3)
    rollout = engine.generate([[70]], Sampling(1, top_k=3, n=300, seed=0))
    drawn = torch.tensor(rollout.completion_ids())[:, 0]
    assert set(drawn.tolist()) == set(best.indices.tolist())
    expected = dict(zip(best.indices.tolist(), best.values.log_softmax(0).tolist(), strict=True))
    for token, logprob in zip(drawn.tolist(), rollout.logprobs[:, 0].tolist(), strict=True):
        assert logprob == pytest.approx(expected[token], abs=2e-5)
    ranked = logits.softmax(0).sort(descending=True)
    size = int((ranked.values.cumsum(0) < 0.5).sum()) + 1
    nucleus = engine.generate([[70]], Sampling(1, top_p=0.5, n=300, seed=0))
    assert set(torch.tensor(nucleus.completion_ids())[:, 0].tolist()) <= set(
        ranked.indices[:size].tolist()
    )


def test_tokens_are_drawn_as_often_as_their_probability_says(engine, vocabulary):
    rollout = engine.generate([[70]], Sampling(1, 0.8, n=4000, seed=1))
    with torch.no_grad():
        p = (engine.model(torch.tensor([[70]])).logits[0, -1, :vocabulary] / 0.8).softmax(0)
    drawn = torch.tensor(rollout.completion_ids())[:, 0]
    counts, p = torch.bincount(drawn, minlength=vocabulary).double(), p.double()
    likely = p > 0.005
    deviation = (counts - 4000 * p)[likely] / (4000 * p * (1 - p))[likely].sqrt()
    assert likely.sum() > 10
    assert deviation.abs().max() < 4.5


def test_each_prompt_may_have_its_own_sampling(engine, vocabulary):
    each = [
        Sampling(3, seed=1, ignore_eos=True),
        Sampling(7, temperature=0.5, seed=2, ignore_eos=True, n=2),
        Sampling(5, top_k=1, seed=3, ignore_eos=True),
        Sampling(9, seed=4, stop_token_ids=tuple(range(2, vocabulary))),
    ]
    rollout = engine.generate(PROMPTS[:4], each)
    assert rollout.prompt_index.tolist() == [0, 1, 1, 2, 3]
    assert [len(ids) for ids in rollout.completion_ids()] == [3, 7, 7, 5, 1]
    assert rollout.finish_reasons == ["length"] * 4 + ["stop"]
    for rows, temperature in (([0, 4], 1.0), ([1, 2], 0.5)):
        some = rollout.select(torch.tensor(rows))
        expected = forward_logprobs(engine.model, some, temperature, vocabulary)
        torch.testing.assert_close(some.logprobs, expected, atol=3e-5, rtol=1e-5)
    assert (rollout.logprobs[3, :5] == 0).all()  # top_k = 1 leaves one token, for sure


def test_a_prompt_with_its_own_sampling_draws_the_same_alone_and_in_a_batch(engine):
    each = [Sampling(8, seed=i, n=2, ignore_eos=True) for i in range(4)]
    batch = engine.generate(PROMPTS[:4], each).completion_ids()
    for i in range(4):
        alone = engine.generate([PROMPTS[i]], [each[i]]).completion_ids()
        assert alone == batch[2 * i : 2 * i + 2]
    assert batch[0] != batch[1]


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator_alone(engine):
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, Sampling(6, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(engine.generate(PROMPTS, Sampling(6, seed=3)).tokens, first.tokens)
    assert not torch.equal(engine.generate(PROMPTS, Sampling(6, seed=4)).tokens, first.tokens)


def test_without_a_seed_the_global_generator_decides(engine):
    torch.manual_seed(5)
    first = engine.generate(PROMPTS, Sampling(6)).tokens
    second = engine.generate(PROMPTS, Sampling(6)).tokens
    torch.manual_seed(5)
    assert torch.equal(engine.generate(PROMPTS, Sampling(6)).tokens, first)
    assert not torch.equal(first, second)


def test_ids_beyond_the_tokenizer_are_never_drawn(engine, vocabulary):
    assert engine.model.get_input_embeddings().weight.shape[0] == vocabulary + 50
    rollout = engine.generate(PROMPTS * 8, Sampling(8, seed=0, ignore_eos=True))
    assert rollout.tokens.max() < vocabulary


def test_progress_counts_every_completion_once(engine):
    told = []
    engine.generate(PROMPTS, Sampling(4, n=2, seed=0), told.append)
    assert sum(told) == 2 * len(PROMPTS) and min(told) >= 1


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([], Sampling(2), "no prompts"),
        ([[70], []], Sampling(2), "prompt 1 is empty"),
        ([[70], [4, 9999]], Sampling(2), "prompt 1 holds the id 9999, outside the tokenizer's"),
        ([[70]], Sampling(2, stop_token_ids=(-1,)), "stop_token_ids of prompt 0 holds the id -1"),
        ([[70] * 398], Sampling(3), "prompt 0 has 398 tokens and asks for 3 more, but the context"),
        ([[70], [71]], [Sampling(2)], "1 samplings for 2 prompts"),
    ],
)
def test_bad_requests_are_refused(engine, prompts, sampling, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, sampling)


def test_a_request_that_fills_the_context_is_served(engine, vocabulary):
    rollout = engine.generate([[70] * 397], Sampling(3, seed=0, ignore_eos=True))
    expected = forward_logprobs(engine.model, rollout, vocabulary=vocabulary)
    torch.testing.assert_close(rollout.logprobs, expected, atol=3e-5, rtol=1e-5)


def test_updated_weights_are_those_sampled_from(engine, tokenizer, vocabulary):
    source, prompts = (
        WeightSource(engine.model, vocabulary=vocabulary),
        [[70 + i] * 200 for i in range(3)],
    )
    first = engine.weight_version
    before = engine.generate(prompts, Sampling(8, seed=0, ignore_eos=True))
    for version in range(first + 1, first + 4):
        disturb(engine.model, 0.05, seed=version)
        report = engine.update_weights(source, version)
        assert report.version == engine.weight_version == version
        rollout = engine.generate(prompts, Sampling(8, seed=0, ignore_eos=True))
        assert rollout.weight_version.tolist() == [version] * 3
        expected = forward_logprobs(engine.model, rollout, vocabulary=vocabulary)
        torch.testing.assert_close(rollout.logprobs, expected, atol=5e-5, rtol=1e-5)
    assert not torch.equal(before.tokens, rollout.tokens)


def test_weights_of_another_model_are_refused(engine, tokenizer, vocabulary):
    other = make_model(tokenizer, layers=3)
    with pytest.raises(ValueError, match="another model"):
        engine.update_weights(WeightSource(other, vocabulary=vocabulary), 9)


def test_memory_may_be_released_at_any_time(engine):
    expected = engine.generate(PROMPTS, Sampling(4, seed=0)).tokens
    engine.release_memory()
    engine.release_memory()
    assert torch.equal(engine.generate(PROMPTS, Sampling(4, seed=0)).tokens, expected)
    engine.release_memory()
    engine.restore_memory()
    assert torch.equal(engine.generate(PROMPTS, Sampling(4, seed=0)).tokens, expected)
