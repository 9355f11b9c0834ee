"""What a model is found able to do (caches, padding), and that its log-probs are right by it."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from decode_cases import (
    BOTH,
    CACHE_ONLY,
    LENGTHS,
    MODELS,
    PROMPTS,
    build,
    check_logprobs,
    lengths,
)
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_fast.rollout import HFEngine
from rlhf_fast.rollout._context import GrowingLayer
from rlhf_fast.scratch import tiny_llama


@pytest.mark.parametrize("kind", MODELS)
def test_logprobs_are_those_of_plain_forward_passes(kind, tokenizer):
    engine = HFEngine(build(kind), tokenizer)
    assert engine.route == MODELS[kind][1]
    rollout = engine.generate(PROMPTS, lengths(*LENGTHS, seed=3))
    assert [len(ids) for ids in rollout.completion_ids()] == LENGTHS
    check_logprobs(engine, rollout, PROMPTS)


@pytest.mark.parametrize("kind", ["llama", "mamba", "openai-gpt", "rwkv"])
def test_a_request_of_its_own_seed_draws_the_same_alone_and_in_a_batch(kind, tokenizer):
    engine = HFEngine(build(kind), tokenizer)
    hows = lengths(*LENGTHS, seed=3)
    together = engine.generate(PROMPTS, hows).completion_ids()
    for prompt, how, ids in zip(PROMPTS, hows, together, strict=True):
        assert engine.generate([prompt], [how]).completion_ids() == [ids]
    backwards = engine.generate(PROMPTS[::-1], hows[::-1]).completion_ids()
    assert backwards == together[::-1]


def test_a_model_that_cannot_use_its_cache_is_said_to_be_slow(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        HFEngine(build("rwkv"), tokenizer)
    assert "RwkvForCausalLM cannot go on from a cache" in caplog.text


def test_a_cache_that_gives_other_logits_is_found_out(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=32)
    forward = model.model.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            past_key_values.layers[0].values.mul_(0.9)
        return forward(*args, past_key_values=past_key_values, **kwargs)

    model.model.forward = forgetful
    engine = HFEngine(model, tokenizer)
    assert not engine.route.cached
    check_logprobs(engine, engine.generate(PROMPTS, lengths(*LENGTHS)), PROMPTS)


def test_a_model_that_is_blind_to_padding_is_found_out(tokenizer):
    model = build("gpt2")
    forward = model.forward

    def careless(input_ids, past_key_values=None, use_cache=None, **ignored):
        return forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    model.forward = careless
    engine = HFEngine(model, tokenizer)
    assert engine.route == CACHE_ONLY
    check_logprobs(engine, engine.generate(PROMPTS, lengths(*LENGTHS)), PROMPTS)


def test_measuring_a_model_leaves_generators_and_mode_alone(tokenizer):
    model, state = build("gpt2").train(), torch.get_rng_state()
    HFEngine(model, tokenizer)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_growing_layer_holds_what_a_concatenating_one_holds():
    generator = torch.Generator().manual_seed(0)
    growing, plain = GrowingLayer(limit=200), DynamicLayer()
    rows = 4
    for step, width in enumerate([5, 1, 1, 70, 1, 90, 1, 1]):
        keys = torch.randn(rows, 2, width, 8, generator=generator)
        values = torch.randn(rows, 2, width, 6, generator=generator)
        for got, expected in zip(
            growing.update(keys, values), plain.update(keys, values), strict=True
        ):
            assert torch.equal(got, expected)
        if step in (0, 2, 5):
            index = torch.tensor([2, 0, 2, 1, 3])[: rows + 1 - (step > 0) * 2]
            growing.reorder_cache(index)
            plain.reorder_cache(index)
            rows = len(index)
        assert growing.get_seq_length() == plain.get_seq_length()
        assert growing.get_mask_sizes(1) == plain.get_mask_sizes(1)


def test_a_growing_layer_copies_what_it_holds_seldom():
    layer, places = GrowingLayer(limit=10_000), set()
    step = torch.zeros(1, 1, 1, 4)
    for _ in range(2000):
        places.add(layer.update(step, step)[0].data_ptr())
    assert len(places) < 15


def test_sliding_windows_keep_the_layers_of_transformers(tokenizer):
    engine, made = HFEngine(build("gemma2"), tokenizer), []
    forward = engine.model.forward

    def record(*args, **kwargs):
        made.append(kwargs["past_key_values"])
        return forward(*args, **kwargs)

    record.__signature__ = inspect.signature(forward)
    engine.model.forward = record
    engine.generate(PROMPTS, lengths(*LENGTHS))
    kinds = [type(layer) for layer in made[0].layers]
    plain = [type(layer) for layer in DynamicCache(config=engine.model.config).layers]
    assert plain[1] is DynamicLayer
    assert kinds == [plain[0], GrowingLayer]


def test_an_engine_made_under_autocast_measures_its_model_in_full_precision(tokenizer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert HFEngine(tiny_llama(tokenizer), tokenizer).route == BOTH


def test_a_model_that_casts_by_itself_is_measured_by_the_precision_of_its_head(tokenizer):
    model = tiny_llama(tokenizer)
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    assert HFEngine(model, tokenizer).route == BOTH
