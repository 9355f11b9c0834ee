"""The decode loop: batches, ends, progress, and each row's own sampling."""

from __future__ import annotations

import pytest
import torch
from decode_cases import (
    BOTH,
    LENGTHS,
    PROMPTS,
    build,
    check_logprobs,
    expected_logprobs,
    lengths,
)

from rlhf_fast.rollout import HFEngine, Sampling
from rlhf_fast.scratch import tiny_llama


@pytest.fixture
def engine(tokenizer):
    return HFEngine(tiny_llama(tokenizer, hidden_size=32), tokenizer)


def batch_sizes(model):
    """What `forward` is given from now on: (rows, tokens a row) of each call."""
    seen = []

    def record(module, args, kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


def test_equal_prompts_are_prefilled_once(engine):
    seen = batch_sizes(engine.model)
    rollout = engine.generate(
        [[70, 71], [80, 81, 82], [70, 71]], Sampling(3, n=4, ignore_eos=True, seed=0)
    )
    assert seen == [(2, 3), (12, 1), (12, 1)]
    assert rollout.prompt_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len({tuple(ids) for ids in rollout.completion_ids()}) == 12
    check_logprobs(engine, rollout, [[70, 71]] * 4 + [[80, 81, 82]] * 4 + [[70, 71]] * 4)


def test_ended_rows_are_dropped_from_the_batch(engine):
    seen = batch_sizes(engine.model)
    rollout = engine.generate(PROMPTS[:4], lengths(1, 2, 2, 5, seed=0))
    assert seen == [(4, 7), (3, 1), (1, 1), (1, 1), (1, 1)]
    assert rollout.completion_mask.sum(1).tolist() == [1, 2, 2, 5]
    assert rollout.finish_reasons == ["length"] * 4
    check_logprobs(engine, rollout, PROMPTS[:4])


def test_looking_seldom_at_what_has_ended_changes_nothing(engine, monkeypatch):
    """As on a GPU, where rows go on for some steps after their end."""
    stop = engine.generate([[70]], Sampling(6, seed=1, ignore_eos=True)).completion_ids()[0][2]
    hows = [Sampling(n, seed=1, stop_token_ids=(stop,)) for n in (9, 11, 2, 4, 6)]
    ended = []
    expected = engine.generate([[70]] * 5, hows)
    monkeypatch.setattr("rlhf_fast.rollout._decode.LOOK", {"cpu": 4})
    got = engine.generate([[70]] * 5, hows, on_progress=ended.append)
    assert got.completion_ids() == expected.completion_ids()
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    assert got.finish_reasons == ["stop", "stop", "length", "stop", "stop"]
    assert sum(ended) == 5


def test_each_row_has_its_own_temperature_filters_and_stops(engine):
    prompt, count = [70, 71], 300
    hows = (
        [Sampling(1, temperature=0.5, seed=i) for i in range(count)]
        + [Sampling(1, top_k=2, seed=i) for i in range(count)]
        + [Sampling(1, top_p=0.4, temperature=0.7, seed=i) for i in range(count)]
    )
    rollout = engine.generate([prompt] * len(hows), hows)
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    cold, plain = (logits / 0.5).log_softmax(0), logits.topk(2)
    ranked = (logits / 0.7).softmax(0).sort(descending=True)
    size = int((ranked.values.cumsum(0) < 0.4).sum()) + 1
    two = dict(zip(plain.indices.tolist(), plain.values.log_softmax(0).tolist(), strict=True))
    few = ranked.values[:size] / ranked.values[:size].sum()
    nucleus = dict(zip(ranked.indices[:size].tolist(), few.log().tolist(), strict=True))
    tokens, logprobs = rollout.tokens[:, -1].tolist(), rollout.logprobs[:, 0].tolist()
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        expected = (cold.tolist(), two, nucleus)[i // count][token]
        assert logprob == pytest.approx(expected, abs=2e-5)
    assert set(tokens[count : 2 * count]) == set(two)
    assert set(tokens[2 * count :]) == set(nucleus)


def test_stop_tokens_are_of_each_row(engine):
    free = engine.generate([[70]] * 3, lengths(8, 8, 8, seed=1)).completion_ids()[0]
    stop = free[3]
    assert stop not in free[:3]
    hows = [
        Sampling(8, seed=1, stop_token_ids=(stop,)),
        Sampling(8, seed=1, stop_token_ids=(stop,), ignore_eos=True),
        Sampling(3, seed=1, stop_token_ids=(stop,)),
    ]
    rollout = engine.generate([[70]] * 3, hows)
    assert rollout.completion_ids() == [free[:4], free, free[:3]]
    assert rollout.finished.tolist() == [True, False, False]
    assert rollout.finish_reasons == ["stop", "length", "length"]


def test_a_stop_as_the_last_token_allowed_counts_as_finished(engine):
    free = engine.generate([[70]], lengths(3, seed=1)).completion_ids()[0]
    rollout = engine.generate([[70]], [Sampling(3, seed=1, stop_token_ids=(free[2],))])
    assert rollout.completion_ids() == [free]
    assert rollout.finished.tolist() == [True]


def test_progress_tells_of_every_completion_as_it_ends(engine):
    told = []
    engine.generate(PROMPTS, lengths(1, 2, 2, 5, 5), on_progress=told.append)
    assert told == [1, 2, 2]


def test_half_precision_is_sampled_from_as_it_computes(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=32).to(torch.bfloat16)
    engine = HFEngine(model, tokenizer)
    assert engine.route == BOTH
    rollout = engine.generate(PROMPTS, lengths(*LENGTHS, seed=0))
    assert rollout.logprobs.dtype == torch.float32
    check_logprobs(engine, rollout, PROMPTS, atol=0.1)


def test_the_callers_autocast_holds(engine):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = engine.generate(PROMPTS, lengths(*LENGTHS, seed=0))
        check_logprobs(engine, rollout, PROMPTS, atol=0.1)
    exact = expected_logprobs(engine.model, PROMPTS[2], rollout.completion_ids()[2])
    assert 1e-4 < (rollout.logprobs[2] - exact).abs().max() < 0.2


def test_a_model_that_has_diverged_is_said_to(engine):
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="after prompt 0 are NaN or infinite.*diverged"):
        engine.generate(PROMPTS, Sampling(4))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
def test_rows_that_ended_do_not_grow_beyond_the_context(kind, tokenizer):
    """A long prompt that wants few tokens beside short ones that want many."""
    engine = HFEngine(build(kind), tokenizer)
    prompts = [[70] * 60, *([[71 + i] for i in range(20)])]
    hows = [Sampling(4, seed=0, ignore_eos=True)] + [Sampling(40, seed=1, ignore_eos=True)] * 20
    rollout = engine.generate(prompts, hows)
    assert [len(ids) for ids in rollout.completion_ids()] == [4] + [40] * 20
    check_logprobs(engine, rollout, prompts)
