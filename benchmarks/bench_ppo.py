"""One PPO iteration by phase, on a GPU, with each rollout engine; and what vLLM's sleep gives back.

    make bench-gpu

A policy of Qwen2.5 0.5B's sizes with random weights, bf16 autocast, a value head, 128 prompts of 16
tokens, completions of 256, a reward that costs nothing. The first iteration warms up; the second is
shown, without probes. Phases end when the GPU is done. Freed memory is what the driver says is
free, the peak torch's own.

The floor is for the phases that only compute: 2 FLOPs a weight and token for each forward pass, of
policy and reference in the experience and of the policy in the update, and twice that for the
backward pass, at the rate of one large product in bf16.
"""

from __future__ import annotations

import time

import pytest
import torch
from _harness import GPU, Rows, on_gpu, place, versions
from bench_rollout import LIBRARIES, llama_config
from transformers import LlamaForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.rollout import RolloutConfig, vllm_unavailable_reason
from rlhf_fast.scratch import train_tokenizer
from rlhf_fast.trainers import ppo

PHASES = ("generate", "score", "experience", "update", "sync")
PROMPTS, PROMPT_TOKENS, TOKENS, MICRO_BATCH = 128, 16, 256, 16
PRODUCT = 8192  # rows and columns


report = Rows()


def free() -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e9


def constant(prompts, completions):
    return [float(i % 7) for i in range(len(prompts))]


def seconds(run, *args):
    """How long `run` takes, the GPU's work included, and what it returns."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = run(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - started, out


def product_rate(rounds: int = 20) -> float:
    """FLOPs a second of one large product."""
    a = torch.randn(PRODUCT, PRODUCT, device=GPU).bfloat16()
    out = a @ a
    took, _ = seconds(lambda: [torch.mm(a, a, out=out) for _ in range(rounds)])
    return rounds * 2 * PRODUCT**3 / took


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def bench_ppo_iteration(benchmark, monkeypatch, engine):
    if engine == "vllm" and (reason := vllm_unavailable_reason(torch.device(GPU))):
        pytest.skip(reason)
    config = llama_config("0.5 B")
    vocabulary = config.vocab_size
    tokenizer = train_tokenizer(["a rollout"], 280)
    tokenizer.add_tokens([f"<{i}>" for i in range(vocabulary - len(tokenizer))])
    with torch.device(GPU):
        model = LlamaForCausalLM(config)
    weights = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator)
    experiences = []
    make_experience = ppo.make_experience

    def timed(*args):
        took, experience = seconds(make_experience, *args)
        experiences.append(took)
        return experience

    monkeypatch.setattr(ppo, "make_experience", timed)
    trainer = PPOTrainer(
        model,
        reward=constant,
        prompts=[tokenizer.decode(row) for row in ids],
        tokenizer=tokenizer,
        config=PPOConfig(
            iterations=2,
            rollout_batch_size=PROMPTS,
            batch_size=PROMPTS,
            micro_batch_size=MICRO_BATCH,
            epochs=1,
            max_new_tokens=TOKENS,
            max_length=1024,
            ignore_eos=True,
            learning_rate=1e-6,
            mixed_precision="bf16",
        ),
        rollout=RolloutConfig(engine=engine, probe_first=0, probe_every=None),
    )
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(trainer.train, rounds=1, iterations=1)
    last = trainer.run.history[-1] | {"seconds_experience": experiences[-1]}
    last["seconds_update"] -= experiences[-1]
    row = {f"{phase}, s": last[f"seconds_{phase}"] for phase in PHASES}
    row["iteration, s"] = sum(row.values())
    row["tokens/s generated"] = PROMPTS * TOKENS / row["generate, s"]
    tokens = PROMPTS * (PROMPT_TOKENS + TOKENS)
    passes = {"experience": 2, "update": 3}
    for phase, count in passes.items():
        floor = 2 * count * weights * tokens / product_rate()
        row[f"share of floor, {phase}"] = floor / row[f"{phase}, s"]
    row["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    awake = free()
    trainer.rollouts.engine.release_memory()
    row["GB freed by sleep"] = free() - awake
    title = f"PPO iteration, Llama 0.5 B, {PROMPTS} x {TOKENS} tokens, {place(GPU, 1)}"
    title += f", {versions(*LIBRARIES)}"
    rows = report.tables[title]
    first = next(iter(rows), engine)
    row[f"{first} / this"] = rows.get(first, row)["iteration, s"] / row["iteration, s"]
    report.add(title, engine, row)
    trainer.close()
