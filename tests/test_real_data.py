"""Real human preference pairs through SFT, reward model and PPO, by the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rlhf_fast import RewardModel
from rlhf_fast.cli import app
from rlhf_fast.loading import load_preferences
from rlhf_fast.scratch import tiny_llama, train_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
TRAIN, TEST = DATA / "hh_harmless_train.jsonl.gz", DATA / "hh_harmless_test.jsonl.gz"


def run(*arguments):
    torch.set_num_threads(2)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def last(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not TRAIN.exists(), reason="the shared data folder is not here")
@pytest.mark.filterwarnings("ignore:skipped:UserWarning")
@pytest.mark.timeout(1800)
def test_human_preferences_go_through_all_three_stages(tmp_path):
    with pytest.warns(UserWarning):
        train, test = (load_preferences(path, bad_rows="skip") for path in (TRAIN, TEST))
    assert (len(train), len(test)) == (1494, 299)
    texts = [pair.prompt + answer for pair in train for answer in (pair.chosen, pair.rejected)]
    tokenizer = train_tokenizer(texts, vocab_size=2000)
    tiny_llama(tokenizer, hidden_size=64, context=2048).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    shared = ("bad_rows=skip", "max_length=2048", "micro_batch_size=8")

    run(
        "sft", f"model={tmp_path}/start", f"data={TRAIN}", f"eval_data={TEST}",
        f"run_dir={tmp_path}/sft", "batch_size=32", "learning_rate=3e-3", "loss_on=all",
        "epochs=2", *shared,
    )  # fmt: skip
    sft_loss = last(tmp_path / "sft")["eval_loss"]
    assert sft_loss < 0.75 * math.log(2000)

    run(
        "reward", f"model={tmp_path}/sft/model", f"data={TRAIN}", f"eval_data={TEST}",
        f"run_dir={tmp_path}/reward", "batch_size=32", "learning_rate=3e-4", "center=0.01", *shared,
    )  # fmt: skip
    judged = last(tmp_path / "reward")
    scorer = RewardModel.from_pretrained(tmp_path / "reward" / "model")
    prompts = [pair.prompt for pair in test]
    gap = scorer.score(prompts, [pair.chosen for pair in test], batch_size=8) - scorer.score(
        prompts, [pair.rejected for pair in test], batch_size=8
    )
    accuracy = (gap > 0).double().mean().item()
    assert judged["eval_accuracy"] == pytest.approx(accuracy, abs=0.01)
    interval = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))
    assert judged["eval_accuracy_interval"] == pytest.approx(interval, abs=0.01)
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in train) > len(train) / 2
    length_only = sum((len(pair.chosen) > len(pair.rejected)) == longer for pair in test) / len(
        test
    )
    train_gap = json.loads((tmp_path / "reward" / "metrics.jsonl").read_text().splitlines()[-2])

    run(
        "ppo", f"model={tmp_path}/sft/model", f"reward={tmp_path}/reward/model",
        f"prompts={TEST}", f"run_dir={tmp_path}/ppo", "iterations=8", "rollout_batch_size=32",
        "batch_size=32", "max_new_tokens=24", "learning_rate=3e-4", "epochs=2", *shared,
    )  # fmt: skip
    rows = [
        json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8
    assert all(math.isfinite(value) for row in rows for value in row.values())
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    assert not torch.equal(policy.model.norm.weight, start.model.norm.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "ppo" / "model").eos_token == "<|end|>"
    print(
        f"\nSFT held-out loss {sft_loss:.3f} nats a token; reward model held-out accuracy "
        f"{accuracy:.1%} ± {interval:.1%} on {len(test)} pairs, length only {length_only:.1%}; "
        f"last training batch {train_gap['accuracy']:.1%}; PPO score {rows[0]['score']:.2f} -> "
        f"{rows[-1]['score']:.2f}, KL {rows[-1]['kl']:.2f}"
    )
