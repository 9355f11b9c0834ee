"""The demo's world, and its promise."""

from __future__ import annotations

import json
import random

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rlhf_fast import RewardModel, cli
from rlhf_fast.demo import cafe, main, pipeline

PROMPT = "Guest: Hello! One soup, please.\nWaiter:"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" Of course! Here is your soup. Enjoy!", 4.0),
        (" Good choice! Your soup is coming. Have a lovely day!", cafe.BEST_UTILITY),
        (" Here is your soup.", 2.0),
        (" Here is your cake.", -2.0),
        (" We have no soup.", -1.0),
        (" What now? Here is your soup. Now go away.", 0.0),
        (" Here is your soup. My cat is fat.", 1.5),
        (" Here is your soup. Your soup is coming.", 1.5),  # a repetition
        (" Enjoy! Enjoy! Enjoy!", 0.0),
        (" Here is your. Enjoy!", 0.0),  # no sentence of the café
        (" Of course! Here is your soup. Enjoy! Here is", 3.0),  # cut off
        ("", 0.0),
    ],
)
def test_utility_of_an_answer(answer, expected):
    assert cafe.utility(PROMPT, answer) == expected


def test_no_answer_of_the_crowd_is_worth_more_than_the_best():
    rng = random.Random(0)
    train, held_out = cafe.split_prompts(16, seed=0)
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 96
    utilities = [cafe.utility(p, cafe.demonstration(p, rng)) for p in (train + held_out) * 20]
    assert max(utilities) == cafe.BEST_UTILITY
    assert -0.5 < sum(utilities) / len(utilities) < 0.5


def test_the_judge_errs_as_bradley_terry_says():
    good, bad = " Here is your soup.", " We have no soup."
    assert cafe.preference_probability(PROMPT, good, bad) == pytest.approx(0.9525741)
    assert cafe.preference_probability(PROMPT, good, good) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_closes_most_of_the_gap_to_the_best_true_utility(seed, tmp_path):
    report = main(run_dir=tmp_path, seed=seed)
    assert report["gap_closed"] >= 0.7
    assert report["reward_model_accuracy"] <= report["bayes_accuracy"] + 0.03
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    for stage in ("sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(tmp_path / stage / "model")
        assert (tmp_path / stage / "metrics.jsonl").exists()
    RewardModel.from_pretrained(tmp_path / "reward" / "model")


@pytest.mark.slow
@pytest.mark.vllm
def test_the_command_closes_the_gap_with_rollouts_of_vllm_too(tmp_path):
    report = main(run_dir=tmp_path, seed=0, rollout="hf")
    asked, held_out = cafe.split_prompts(pipeline.HELD_OUT, 0)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in asked))
    run = {
        "model": str(tmp_path / "sft" / "model"),
        "reward": str(tmp_path / "reward" / "model"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "run_dir": str(tmp_path / "vllm"),
        "rollout": "vllm",
        **pipeline.PPO,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    result = CliRunner().invoke(cli.app, ["ppo", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.output
    model, ref = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder / "model").eval()
        for folder in ("vllm", "sft")
    )
    reward = RewardModel.from_pretrained(tmp_path / "reward" / "model").eval()
    after = pipeline.evaluate(model, ref, reward, held_out, seed=3)
    before = report["utility_before"]
    gap_closed = (after.utility - before) / (cafe.BEST_UTILITY - before)
    print(f"gap closed: {gap_closed:.1%} with vLLM, {report['gap_closed']:.1%} with transformers")
    assert gap_closed >= 0.7
    rows = [json.loads(x) for x in (tmp_path / "vllm/metrics.jsonl").read_text().splitlines()]
    assert max(row["mismatch_max"] for row in rows) < 1e-3
