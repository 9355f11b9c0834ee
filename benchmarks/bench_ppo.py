"""One PPO iteration by phase, on a GPU, with each rollout engine; and what vLLM's sleep gives back.

    make bench-gpu

A policy of Qwen2.5 0.5B's sizes with random weights, bf16 autocast, a value head, 128 prompts of 16
tokens, completions of 256, a reward that costs nothing. The first iteration warms up; the second is
shown. Memory is what the driver says is free.
"""

from __future__ import annotations

import pytest
import torch
from _harness import on_gpu
from bench_rollout import llama_config
from transformers import LlamaForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.rollout import RolloutConfig, vllm_unavailable_reason
from rlhf_fast.scratch import train_tokenizer

PHASES = ("seconds_generate", "seconds_score", "seconds_update", "seconds_sync")
PROMPTS, TOKENS = 128, 256


class Phases:
    """A row an engine."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, float]] = {}

    def markdown(self) -> str:
        columns = list(next(iter(self.tables.values())))
        lines = [["", *columns], ["---"] * (len(columns) + 1)]
        lines += [
            [name, *(f"{row[column]:.3f}" for column in columns)]
            for name, row in self.tables.items()
        ]
        title = f"## PPO iteration, 0.5 B, {PROMPTS} x {TOKENS} tokens\n\n"
        return title + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


report = Phases()


def free() -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e9


def constant(prompts, completions):
    return [float(i % 7) for i in range(len(prompts))]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def bench_ppo_iteration(benchmark, engine):
    if engine == "vllm" and (reason := vllm_unavailable_reason(torch.device("cuda"))):
        pytest.skip(reason)
    config = llama_config("0.5 B")
    vocabulary = config.vocab_size
    tokenizer = train_tokenizer(["a rollout"], 280)
    tokenizer.add_tokens([f"<{i}>" for i in range(vocabulary - len(tokenizer))])
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (PROMPTS, 16), generator=generator)
    trainer = PPOTrainer(
        model,
        reward=constant,
        prompts=[tokenizer.decode(row) for row in ids],
        tokenizer=tokenizer,
        config=PPOConfig(
            iterations=2,
            rollout_batch_size=PROMPTS,
            batch_size=PROMPTS,
            micro_batch_size=16,
            epochs=1,
            max_new_tokens=TOKENS,
            max_length=1024,
            ignore_eos=True,
            learning_rate=1e-6,
            mixed_precision="bf16",
        ),
        rollout=RolloutConfig(engine=engine),
    )
    benchmark.pedantic(trainer.train, rounds=1, iterations=1)
    row = {phase: trainer.run.history[-1][phase] for phase in PHASES}
    awake = free()
    trainer.rollouts.engine.release_memory()
    row["GB freed by sleep"] = free() - awake
    report.tables[engine] = row
    trainer.close()
