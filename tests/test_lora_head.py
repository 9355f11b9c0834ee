"""The head of a LoRA policy: which one counts, and what it costs."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_cases import (
    MASK,
    TOKENS,
    adapt,
    base,
    base_folder,
    redraw,
    tokenizer,
)

from rlhf_fast.ops import count_products
from rlhf_fast.policy import Policy

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures


def forward_logprobs(model):
    logits = model(TOKENS).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(2, TOKENS[:, 1:, None])[..., 0]


HEADS = {
    "frozen": (True, {}, True),
    "frozen-untied": (False, {}, True),
    "adapted": (False, {"target_modules": ["q_proj", "lm_head"]}, False),
    "embedding-adapted": (True, {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "trained": (False, {"modules_to_save": ["lm_head"]}, True),
    "embedding-trained": (False, {"modules_to_save": ["embed_tokens"]}, True),
    "tied-and-trained": (True, {"modules_to_save": ["embed_tokens"]}, True),
}


@pytest.mark.filterwarnings("ignore:.*tied")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("case", HEADS)
def test_the_head_that_is_used_is_the_models_own(case, base):
    tied, options, split = HEADS[case]
    base.config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = adapt(type(base)(base.config), **options)
    policy = Policy(model).eval()
    assert (policy.head_options is not None) == split
    redraw(model)  # afterwards: as it is made an adapter is nothing, and any head would do
    got = policy(TOKENS, MASK, MASK).logprobs[:, 1:]
    expected = forward_logprobs(model)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
    upstream = torch.randn(got.shape)
    (got * upstream).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (expected * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in ours), name
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_a_frozen_head_costs_two_products_and_a_trained_one_three(base):
    def cost(model):
        policy, rows = Policy(model), TOKENS[:, 1:].numel()
        with count_products() as counted:
            output = policy(TOKENS, MASK, MASK)
            output.logprobs.sum().backward()
        return counted.flops / (2 * rows * base.config.hidden_size * base.config.vocab_size)

    assert cost(adapt(copy.deepcopy(base))) == 2
    assert cost(base) == 3
