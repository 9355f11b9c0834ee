"""A tiny model that every engine serves, and what a plain forward pass says of a rollout."""

from __future__ import annotations

import gc

import pytest
import torch

from rlhf_fast.rollout import HFEngine, RolloutConfig, VLLMEngine, probe
from rlhf_fast.scratch import tiny_llama

VLLM = pytest.param("vllm", marks=pytest.mark.vllm)
PROMPTS = [[70, 71, 72], [70], [80, 81], [90, 91, 92, 93]] * 4


def make_model(tokenizer, **changes):
    """A Llama that vLLM's CPU kernels serve (heads of 32), dropout off, its layers not all alike.

    Its positions reach over three blocks of vLLM's KV cache on a CPU.
    """
    options = {"hidden_size": 64, "heads": 2, "context": 400}
    return tiny_llama(tokenizer, **{**options, **changes}).eval()


@torch.no_grad()
def forward_logprobs(model, rollout, temperature=1.0, vocabulary=None):
    """`[B, T]`, each sequence by itself, unpadded, with nothing of ours but the model."""
    rows = torch.zeros(rollout.completion_mask.shape)
    sequences = zip(rollout.tokens, rollout.mask, rollout.completion_mask, strict=True)
    for i, (tokens, mask, completion) in enumerate(sequences):
        ids, new = tokens[mask][None], int(completion.sum())
        logits = model(ids).logits[0, -new - 1 : -1, :vocabulary].double() / temperature
        picked = logits.log_softmax(-1).gather(1, ids[0, -new:, None])[:, 0]
        rows[i, completion] = picked.float()
    return rows


@torch.no_grad()
def disturb(model, scale=0.1, seed=1):
    """Other weights, far enough from the old ones that a stale tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def start(kind, model, tokenizer, **config):
    gc.collect()
    if kind == "hf":
        return HFEngine(model, tokenizer)
    return VLLMEngine(model, tokenizer, RolloutConfig(engine="vllm", max_sequences=64, **config))


def mismatch(engine, prompts=PROMPTS, **options):
    """A probe of the engine against plain forward passes of its model."""
    vocabulary = len(engine.tokenizer)

    def score(rollout):
        return forward_logprobs(engine.model, rollout, vocabulary=vocabulary)

    return probe(engine, score, prompts, **options)
