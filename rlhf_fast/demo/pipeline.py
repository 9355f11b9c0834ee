"""SFT, reward model and PPO on the café, with every claim measured."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data import encode_prompt
from rlhf_fast.demo import cafe
from rlhf_fast.demo.plots import plot
from rlhf_fast.policy import Policy
from rlhf_fast.rollout import HFEngine, Sampling
from rlhf_fast.scalar_models import RewardModel
from rlhf_fast.scratch import tiny_llama, train_tokenizer
from rlhf_fast.trainers import PPOTrainer, RewardTrainer, SFTTrainer

DEMONSTRATIONS, PAIRS, TEST_PAIRS, HELD_OUT, SAMPLES = 2048, 6144, 1024, 16, 512
MAX_NEW_TOKENS = 32
SFT: dict[str, Any] = {
    "batch_size": 64,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "epochs": 8,
    "max_length": 64,
}
REWARD: dict[str, Any] = {
    "batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "epochs": 3,
    "max_length": 64,
    "center": 0.01,
}
PPO: dict[str, Any] = {
    "iterations": 60,
    "rollout_batch_size": 64,
    "batch_size": 64,
    "max_new_tokens": MAX_NEW_TOKENS,
    "max_length": 64,
    "learning_rate": 1e-3,
    "kl_coef": 0.1,
    "missing_eos_penalty": 1.0,
}


class Evaluation(NamedTuple):
    """Means over sampled answers to held-out requests, and some of the answers."""

    utility: float
    learned_reward: float
    kl: float
    samples: list[tuple[str, str]]


def _sample(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], seed: int
) -> tuple[list[str], Any]:
    engine = HFEngine(model, tokenizer)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rollout = engine.generate(ids, Sampling(MAX_NEW_TOKENS, seed=seed))
    return tokenizer.batch_decode(rollout.completion_ids(), skip_special_tokens=True), rollout


def collect_preferences(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], count: int, seed: int
) -> tuple[list[dict[str, str]], float]:
    """Pairs of sampled answers as the judge ranks them, and the best accuracy possible on them.

    Returns:
        `count` rows `{prompt, chosen, rejected}`, and the Bayes accuracy: how often someone who
        knows the true utility would agree with the judge.
    """
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    agreement = 0.0
    while len(rows) < count:
        asked = rng.choices(prompts, k=512)
        first, _ = _sample(model, tokenizer, asked, rng.randrange(2**31))
        second, _ = _sample(model, tokenizer, asked, rng.randrange(2**31))
        for prompt, a, b in zip(asked, first, second, strict=True):
            if len(rows) == count or a == b or not a.strip() or not b.strip():
                continue
            p = cafe.preference_probability(prompt, a, b)
            agreement += max(p, 1 - p)
            chosen, rejected = (a, b) if rng.random() < p else (b, a)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows, agreement / count


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    ref: PreTrainedModel,
    reward: RewardModel,
    prompts: Sequence[str],
    seed: int,
) -> Evaluation:
    """Samples answers to `prompts` and measures them; KL is per answer, in nats."""
    tokenizer = reward.tokenizer
    asked = [prompts[i % len(prompts)] for i in range(SAMPLES)]
    answers, rollout = _sample(model, tokenizer, asked, seed)
    scored = [
        Policy(m)(rollout.tokens, rollout.mask, rollout.targets).logprobs.sum(1)
        for m in (model, ref)
    ]
    utilities = [cafe.utility(p, a) for p, a in zip(asked, answers, strict=True)]
    return Evaluation(
        utility=sum(utilities) / len(utilities),
        learned_reward=reward.score(asked, answers).mean().item(),
        kl=(scored[0] - scored[1]).mean().item(),
        samples=list(zip(asked, answers, strict=True))[:6],
    )


def main(run_dir: str | Path | None = None, seed: int = 0, rollout: str = "auto") -> dict[str, Any]:
    """Runs the pipeline, prints what it finds and keeps it in `run_dir`.

    Args:
        run_dir: A folder for this run alone; by default `runs/demo-<time>`.
        seed: Of the data, the weights, the training and the sampling.
        rollout: Engine of PPO's rollouts: "auto", "hf" or "vllm".

    Returns:
        The report, as in `run_dir/report.json`.
    """
    run_dir = Path(run_dir or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    console, started = Console(), time.perf_counter()
    disable_progress_bar()  # of transformers, for the writing of files: they tear ours
    rng = random.Random(seed)
    train_prompts, test_prompts = cafe.split_prompts(HELD_OUT, seed)
    console.rule("[bold]rlhf_fast: SFT, reward model, PPO in a little café")
    console.print(
        "Guests order, a tiny language model answers. It learns to talk from rude and kind "
        "waiters, a reward model learns from a noisy judge which answers people prefer, and PPO "
        "learns to please it.\n"
    )

    demonstrations = [
        {"prompt": prompt, "completion": cafe.demonstration(prompt, rng)}
        for prompt in rng.choices(train_prompts, k=DEMONSTRATIONS)
    ]
    tokenizer = train_tokenizer(
        [row["prompt"] + row["completion"] for row in demonstrations], vocab_size=512
    )
    sft = SFTTrainer(
        tiny_llama(tokenizer, heads=3, context=64, seed=seed),  # heads of 32, as vLLM wants
        demonstrations,
        tokenizer=tokenizer,
        config=SFTConfig(seed=seed, **SFT),
        run_dir=run_dir / "sft",
    ).train()

    pairs, _ = collect_preferences(sft.model, tokenizer, train_prompts, PAIRS, seed + 1)
    test_pairs, bayes = collect_preferences(
        sft.model, tokenizer, test_prompts, TEST_PAIRS, seed + 2
    )
    ref = Policy(sft.model).frozen_copy().model
    reward = RewardTrainer(
        sft.model,
        pairs,
        tokenizer=tokenizer,
        config=RewardConfig(seed=seed, **REWARD),
        eval_data=test_pairs,
        run_dir=run_dir / "reward",
    ).train()
    accuracy = reward.run.history[-1]

    before = evaluate(ref, ref, reward.model, test_prompts, seed + 3)
    answered: list[tuple[str, str]] = []

    def pleased(prompts: list[str], completions: list[str]) -> torch.Tensor:
        # Kept for the plot of the true utility, which is worked out when training is over.
        answered.extend(zip(prompts, completions, strict=True))
        return reward.model.score(prompts, completions)

    with PPOTrainer(
        sft.model,
        reward=pleased,
        prompts=train_prompts,
        tokenizer=tokenizer,
        config=PPOConfig(seed=seed, **PPO),
        rollout=rollout,
        run_dir=run_dir / "ppo",
    ) as ppo:
        ppo.train()
    after = evaluate(ppo.model, ref, reward.model, test_prompts, seed + 3)

    report = {
        "seed": seed,
        "reward_model_accuracy": accuracy["eval_accuracy"],
        "reward_model_accuracy_interval": accuracy["eval_accuracy_interval"],
        "bayes_accuracy": bayes,
        "utility_before": before.utility,
        "utility_after": after.utility,
        "utility_best": cafe.BEST_UTILITY,
        "gap_closed": (after.utility - before.utility) / (cafe.BEST_UTILITY - before.utility),
        "learned_reward_before": before.learned_reward,
        "learned_reward_after": after.learned_reward,
        "kl_before": before.kl,
        "kl_after": after.kl,
        "seconds": time.perf_counter() - started,
        "samples": [
            {"prompt": prompt, "before": old, "after": new}
            for (prompt, old), (_, new) in zip(before.samples, after.samples, strict=True)
        ],
    }
    (run_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(
        run_dir / "curves.png",
        sft=sft.run.history,
        reward=reward.run.history[:-1],
        ppo=ppo.run.history,
        utilities=[cafe.utility(p, a) for p, a in answered],
        report=report,
    )
    _show(console, report, run_dir)
    return report


def _show(console: Console, report: dict[str, Any], run_dir: Path) -> None:
    samples = Table("guest", "before PPO", "after PPO", title="answers to held-out requests")
    for sample in report["samples"]:
        guest = sample["prompt"].removeprefix("Guest: ").removesuffix("\nWaiter:")
        samples.add_row(guest, sample["before"].strip(), sample["after"].strip())
    console.print(samples)
    table = Table("", "before PPO", "after PPO", "best", title="measured on held-out requests")
    row = report.get
    table.add_row(
        "true utility (never shown to training)",
        f"{row('utility_before'):.2f}",
        f"[bold]{row('utility_after'):.2f}",
        f"{row('utility_best'):.2f}",
    )
    table.add_row(
        "learned reward",
        f"{row('learned_reward_before'):.2f}",
        f"{row('learned_reward_after'):.2f}",
        "",
    )
    table.add_row(
        "KL from the reference (nats an answer)",
        f"{row('kl_before'):.2f}",
        f"{row('kl_after'):.2f}",
        "",
    )
    console.print(table)
    console.print(
        f"reward model: {row('reward_model_accuracy'):.1%} ± "
        f"{row('reward_model_accuracy_interval'):.1%} of the judge's noisy verdicts; someone who "
        f"knows the true utility gets {row('bayes_accuracy'):.1%}\n"
        f"PPO closed [bold]{row('gap_closed'):.0%}[/bold] of the gap to the best answer, in "
        f"{row('seconds'):.0f} s all told\n"
        f"kept in {run_dir}: report.json, curves.png, {{sft,reward,ppo}}/metrics.jsonl, "
        "{sft,reward,ppo}/model"
    )
