"""The README keeps its word."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import rlhf_fast
from rlhf_fast.backends import support_table
from rlhf_fast.scratch import tiny_llama, train_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_table_of_ops_is_the_one_that_backends_make():
    assert support_table() in README


def test_the_first_two_commands_are_the_set_up():
    assert re.findall(r"^make (\w+)", blocks("bash")[0], re.MULTILINE) == ["demo", "test"]


def test_the_first_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["Why is the sky blue? What do bees eat?"], 300)
    tiny_llama(tokenizer, hidden_size=16, context=128).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    code = blocks("python")[0].replace("Qwen/Qwen2.5-0.5B-Instruct", "tiny")
    small = "iterations=1, rollout_batch_size=4, batch_size=4, max_new_tokens=4"
    names = {}
    exec(code.replace("iterations=200", small), names)
    assert names["trainer"].run.history[0]["score"] <= 0
    assert isinstance(names["trainer"], rlhf_fast.PPOTrainer)
    assert (tmp_path / "runs/twelve-words/model/config.json").exists()


def test_the_example_of_bare_ops_runs():
    size, vocabulary = (2, 3), 11
    names = {
        "hidden": torch.randn(6, 4),
        "lm_head": torch.nn.Linear(4, vocabulary),
        "tokens": torch.randint(vocabulary, (6,)),
        "rewards": torch.randn(size),
        "values": torch.randn(size),
        "mask": torch.ones(size),
        "new_logprobs": torch.randn(size),
        "old_logprobs": torch.randn(size),
    }
    exec(blocks("python")[1], names)
    assert names["loss"].isfinite()


def test_every_file_that_the_readme_links_to_is_there():
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links and all((root / link).exists() for link in links)
