"""A PPO step on ragged rollouts: how many tokens go through the trunks, by how rows are laid out.

    python -m pytest -s benchmarks/bench_padding.py

A Llama of 2 layers of 256 with random weights, fp32, a value head; 64 completions, micro-batches of
8, one pass. A step is a forward pass of policy and reference to score, and a forward and a backward
pass of the policy. "Rollout's columns": every micro-batch keeps the padding of the whole rollout,
as ours did and TRL's GRPO trainer does. "Fixed lengths": prompts and completions padded to the
greatest lengths that are allowed, as verl does with `use_remove_padding=False`. "Columns in use":
what could be had without moving rows, in micro-batches sorted like ours.

Contenders take turns in each round. The share is that of real tokens among those computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest
import torch
from _harness import Rows, peak_memory, place, versions
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.data import FlushLeft, Rollout
from rlhf_fast.scratch import train_tokenizer

SIZE, MICRO_BATCH, ROUNDS = 64, 8, 7
# Median, spread (of the logarithm) and greatest length of prompts and of completions, and how many
# completions a prompt has: an eighth to a quarter of the tokens that such data have.
LENGTHS = {
    "chat": (24, 0.8, 128, 48, 0.7, 192, 1),
    "reasoning, groups of 8": (16, 0.4, 48, 64, 0.7, 224, 8),
    "summaries": (80, 0.4, 160, 12, 0.4, 32, 1),
    "equal": (32, 0.0, 32, 64, 0.0, 64, 1),
}
OURS, CUT, COLUMNS, FIXED = "flush left", "columns in use", "rollout's columns", "fixed lengths"

report = Rows()


def drawn(median_: float, spread: float, most: int, count: int, seed: int) -> list[int]:
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (median_ * (spread * normal).exp()).long().clamp(2, most).tolist()


def rollout_of(distribution: str) -> Rollout:
    p, p_spread, p_most, t, t_spread, t_most, group = LENGTHS[distribution]
    prompts = drawn(p, p_spread, p_most, SIZE // group, 0)
    completions = drawn(t, t_spread, t_most, SIZE, 1)
    return Rollout.from_lists(
        [[5 + i] * n for i, n in enumerate(prompts) for _ in range(group)],
        [[7 + i % 50 for i in range(n)] for n in completions],
        pad_id=1,
    )


def at_fixed_lengths(rollout: Rollout, distribution: str) -> Rollout:
    _, _, p_most, _, _, t_most, _ = LENGTHS[distribution]
    left = p_most - rollout.prompt_length
    right = t_most - rollout.completion_mask.shape[1]

    def widen(x: Tensor, left: int) -> Tensor:
        return torch.nn.functional.pad(x, (left, right))

    return replace(
        rollout,
        tokens=widen(rollout.tokens, left),
        mask=widen(rollout.mask, left),
        completion_mask=widen(rollout.completion_mask, 0),
    )


def all_columns(rollout: Rollout) -> FlushLeft:
    return cut(rollout, 0, rollout.tokens.shape[1])


def columns_in_use(rollout: Rollout) -> FlushLeft:
    used = rollout.mask.any(0).nonzero()
    return cut(rollout, int(used.min()), int(used.max()) + 1)


def cut(rollout: Rollout, start: int, end: int) -> FlushLeft:
    sampled = rollout.completion_mask
    columns = torch.arange(rollout.prompt_length, rollout.tokens.shape[1]) - start
    return FlushLeft(
        *(x[:, start:end] for x in (rollout.tokens, rollout.mask, rollout.targets)),
        columns=columns.clamp(max=end - start - 1).expand_as(sampled),
        sampled=sampled,
    )


LAYOUTS: dict[str, tuple[Callable[[Rollout], FlushLeft] | None, bool]] = {
    OURS: (None, True),
    CUT: (columns_in_use, True),
    COLUMNS: (all_columns, False),
    FIXED: (all_columns, False),
}
"""How rows are laid out, None for as the library does, and whether they are sorted by length."""


@pytest.fixture(scope="module")
def trainer():
    tokenizer = train_tokenizer(["a rollout"], 280)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.add_tokens([f"<{i}>" for i in range(config.vocab_size - len(tokenizer))])
    return PPOTrainer(
        LlamaForCausalLM(config),
        tokenizer=tokenizer,
        config=PPOConfig(
            lr_schedule="constant",
            learning_rate=1e-6,
            rollout_batch_size=SIZE,
            batch_size=SIZE,
            micro_batch_size=MICRO_BATCH,
            epochs=1,
        ),
        rollout={"engine": "hf", "probe_first": 0, "probe_every": None},
    )


@pytest.mark.parametrize("distribution", LENGTHS)
def bench_padding(benchmark, trainer, distribution):
    scores = [float(i % 7) for i in range(SIZE)]
    rollout = rollout_of(distribution)
    fixed = at_fixed_lengths(rollout, distribution)
    title = f"PPO step, {distribution}, {place('cpu', 1)}, {versions('transformers')}"
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    tokens: dict[str, int] = dict.fromkeys(LAYOUTS, 0)

    def step(name: str) -> dict[str, float]:
        flush, sorts = LAYOUTS[name]
        with ExitStack() as stack:
            if flush is not None:
                stack.enter_context(patch.object(Rollout, "flush_left", flush))
            if not sorts:
                as_drawn = property(lambda rollout: torch.zeros(len(rollout)))
                stack.enter_context(patch.object(Rollout, "lengths", as_drawn))
            return trainer.step(fixed if name == FIXED else rollout, scores)

    def count(name: str) -> None:
        def add(module: Any, args: Any, kwargs: Any) -> None:
            tokens[name] += kwargs["input_ids"].numel()

        trunks = (trainer.model.base_model, trainer.ref.model.base_model)
        hooks = [t.register_forward_pre_hook(add, with_kwargs=True) for t in trunks]
        step(name)
        for hook in hooks:
            hook.remove()

    def round_() -> None:
        for name in LAYOUTS:
            started = time.perf_counter()
            step(name)
            times[name].append(time.perf_counter() - started)

    for name in LAYOUTS:
        count(name)
    benchmark.pedantic(round_, rounds=ROUNDS, iterations=1)
    real = 3 * int(rollout.mask.sum())  # two passes to score, one to learn
    for name in LAYOUTS:
        peak = peak_memory(lambda name=name: step(name), "cpu")
        took = [mine / before for mine, before in zip(times[COLUMNS], times[name], strict=True)]
        report.add(
            title,
            name,
            {
                "step, s, median": median(times[name]),
                f"{COLUMNS} / this, median of rounds": median(took),
                "trunk tokens": tokens[name],
                "tokens / ours": tokens[name] / tokens[OURS],
                "real tokens, %": 100 * real / tokens[name],
                "peak, MB": float("nan") if peak is None else peak / 1e6,
            },
        )
