"""What `HFEngine` keeps to beyond the contract of all engines."""

from __future__ import annotations

import pytest
import torch
from rollout_cases import PROMPTS

from rlhf_fast.rollout import HFEngine, Sampling
from rlhf_fast.scratch import tiny_llama


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


def test_the_models_training_mode_survives(engine):
    engine.model.train()
    engine.generate(PROMPTS, Sampling(2))
    assert engine.model.training
