"""Supervised fine-tuning: its loss, what it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from trainer_cases import EXAMPLES, sft_config

import rlhf_fast
from rlhf_fast import SFTTrainer


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_sft_loss_is_transformers_own_over_the_tokens_that_count(model, tokenizer, loss_on):
    reference = copy.deepcopy(model)
    trainer = SFTTrainer(
        model, EXAMPLES, tokenizer=tokenizer,
        config=sft_config(loss_on=loss_on, batch_size=16, epochs=1),
    ).train()  # fmt: skip
    total, count = 0.0, 0
    for row in EXAMPLES:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([ids])
        if loss_on == "completion":
            labels[0, : len(prompt)] = -100
        scored = int((labels[0, 1:] != -100).sum())
        loss = reference(torch.tensor([ids]), labels=labels).loss
        total, count = total + loss.item() * scored, count + scored
    assert trainer.run.history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_sft_learns_the_examples(model, tokenizer):
    trainer = rlhf_fast.sft(
        model, EXAMPLES, tokenizer=tokenizer, eval_data=EXAMPLES,
        batch_size=8, learning_rate=1e-2, epochs=30, max_length=64,
    )  # fmt: skip
    assert trainer.run.history[-1]["eval_loss"] < 0.2 * trainer.run.history[0]["loss"]


def test_sft_on_texts_trains_on_every_token(model, tokenizer):
    trainer = SFTTrainer(
        model, ["the cat sat", "a dog ran"], tokenizer=tokenizer, config=sft_config(batch_size=2)
    )
    batch = trainer._batch(trainer._rows)
    assert torch.equal(batch.targets[:, 1:], batch.mask[:, 1:])
