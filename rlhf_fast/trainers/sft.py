"""Supervised fine-tuning: the first stage, and the reference of the other two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast._adapter_files import name_weights
from rlhf_fast._adapters import takes_adapter_off_on_error
from rlhf_fast.config import SFTConfig, checked
from rlhf_fast.data import TokenBatch, check_length, encode_completion, encode_prompt, pad
from rlhf_fast.loading import Example, load_examples
from rlhf_fast.lora import LoraConfig, save_model
from rlhf_fast.models import (
    check_vocabulary,
    context_length,
    evaluating,
    load_causal_lm,
    load_tokenizer,
    require_trainable,
)
from rlhf_fast.policy import Policy
from rlhf_fast.trainers import checkpoint
from rlhf_fast.trainers.batches import count_steps, pieces_of
from rlhf_fast.trainers.run import Metrics, Run

Row = tuple[list[int], int]  # token ids, and where the targets begin


class SFTTrainer:
    """Trains a causal language model to continue prompts as the examples do.

    Args:
        model: A model, or the name or folder of one. It is trained in place. Of a `PeftModel`, or
            the folder of a LoRA adapter, the adapter is.
        data: What `loading.load_examples` takes: `{prompt, completion}` rows, `{text}` rows, or
            preference rows (the chosen answers).
        tokenizer: By default the one saved with the model.
        config: See `SFTConfig`.
        eval_data: Held-out examples; the loss on them is logged at the end.
        lora: Train an adapter: its rank, a `LoraConfig` or its fields (docs/lora.md). None trains
            what requires gradients.
        run_dir: Where metrics, checkpoints and the trained model go; None writes nothing.
        resume: Go on from the newest checkpoint in `run_dir`.
        pad_token: Padding token for a tokenizer without one.
        bad_rows: "error", or "skip" to leave bad and overlong rows out with a warning.

    Raises:
        DataError, ConfigError, ValueError: Bad data, configuration or tokenizer, before training.
    """

    @takes_adapter_off_on_error
    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        data: Any,
        *,
        tokenizer: Any = None,
        config: SFTConfig | None = None,
        eval_data: Any = None,
        lora: int | dict[str, Any] | LoraConfig | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        pad_token: str | None = None,
        bad_rows: str = "error",
    ) -> None:
        self.config = checked(config, SFTConfig)
        adapter = LoraConfig.of(lora)
        self.run = Run(self.config, run_dir, resume=resume)
        self.tokenizer = load_tokenizer(tokenizer, model, pad_token)
        self.model = load_causal_lm(model, lora=adapter, frozen_dtype=self.run.dtype)
        require_trainable(self.model)
        check_vocabulary(self.tokenizer, self.model, "the model")
        self._rows = self._encode(data, bad_rows)
        self._eval_rows = [] if eval_data is None else self._encode(eval_data, bad_rows)
        self.total_steps = count_steps(len(self._rows), self.config.batch_size, self.config.epochs)
        policy = Policy(self.model)
        optimizer, self._schedule = self.run.optimizer(
            [{"params": list(policy.parameters())}], self.total_steps
        )
        self._module, self._optimizer = self.run.accelerator.prepare(policy, optimizer)
        self.run.accelerator.register_for_checkpointing(self._schedule)
        if resume:
            checkpoint.restore(self.run)
        name_weights(self.model)

    def _encode(self, data: Any, bad_rows: str) -> list[Row]:
        limit = context_length(self.model, self.config.max_length)
        rows: list[Row] = []

        def take(example: Example) -> None:
            prompt = encode_prompt(self.tokenizer, example.prompt)
            ids = prompt + encode_completion(self.tokenizer, example.completion)
            remedy = "shorten the row, or raise max_length if the model reads more"
            check_length(ids, limit, "prompt and completion", remedy)
            begins = len(prompt) if self.config.loss_on == "completion" else 0
            rows.append((ids, max(begins, 1)))

        load_examples(data, bad_rows=bad_rows, check=take)
        return rows

    def _batch(self, rows: Sequence[Row]) -> TokenBatch:
        tokens, mask = pad([ids for ids, _ in rows], self.tokenizer.pad_token_id, side="right")
        begins = torch.tensor([begin for _, begin in rows])
        targets = mask & (torch.arange(mask.shape[1]) >= begins[:, None])
        return TokenBatch(tokens, mask, targets).to(self.run.device)

    def train(self) -> SFTTrainer:
        """Trains to the end of the configured epochs; returns itself."""
        run = self.run
        lengths = torch.tensor([len(ids) for ids, _ in self._rows])
        self._module.train()
        for step in run.steps(self.total_steps, "SFT", "loss"):
            pieces = [
                self._batch([self._rows[i] for i in piece])
                for piece in pieces_of(run, step, lengths)
            ]
            tokens = run.total(torch.stack([piece.targets.sum() for piece in pieces]).sum())
            rate = self._schedule.get_last_lr()[0]
            metrics = run.optimize(
                self._module,
                self._optimizer,
                self._schedule,
                pieces,
                partial(self._loss, tokens=tokens),
            )
            run.step = step + 1
            run.log({**run.reduce(metrics), "learning_rate": rate})
            if self.config.save_every and run.step % self.config.save_every == 0:
                checkpoint.save(run, {}, self.save)
        if self._eval_rows:
            run.log({"eval_loss": self._evaluate(self._eval_rows)})
        if run.folder is not None and run.accelerator.is_main_process:
            self.save(run.open_folder() / "model")
            name_weights(self.model, run.open_folder() / "model")
        run.finish()
        return self

    def _loss(self, batch: TokenBatch, tokens: Tensor) -> tuple[Tensor, Metrics]:
        output = self._module(batch.tokens, batch.mask, batch.targets)
        loss = -output.logprobs.sum() / tokens
        return loss, {"loss": loss.detach(), "entropy": output.entropy.detach().sum() / tokens}

    def evaluate(self, data: Any, *, bad_rows: str = "error") -> float:
        """Mean negative log-likelihood of the tokens that count in `data`, in nats."""
        return self._evaluate(self._encode(data, bad_rows))

    @torch.no_grad()
    def _evaluate(self, rows: list[Row]) -> float:
        rows = sorted(rows, key=lambda row: len(row[0]))  # for less padding
        size = max(self.config.micro_batch // self.run.world, 1)
        loss, tokens = 0.0, 0
        with evaluating(self._module):
            for start in range(0, len(rows), size):
                batch = self._batch(rows[start : start + size])
                output = self._module(batch.tokens, batch.mask, batch.targets)
                loss -= float(output.logprobs.sum())
                tokens += int(batch.targets.sum())
        return loss / tokens

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer as transformers reads them, an adapter as peft does."""
        save_model(self.model, folder)
        self.tokenizer.save_pretrained(folder)
