"""Both engines over one tiny model."""

from __future__ import annotations

import pytest
import torch
from rollout_cases import VLLM, make_model, start

from rlhf_fast.scratch import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog ran"], 280)


@pytest.fixture(scope="module", params=["hf", VLLM])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def shared_engine(kind, tokenizer):
    """One engine a module: vLLM takes seconds to start. Its model has more rows than ids."""
    model = make_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 50)
    with torch.no_grad():  # rows that stand for no token, and would be likely
        model.get_input_embeddings().weight[len(tokenizer) :] *= 3
    engine = start(kind, model, tokenizer)
    yield engine
    engine.close()
