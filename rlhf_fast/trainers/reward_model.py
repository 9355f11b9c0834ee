"""Reward modelling: a scalar that ranks completions as the people who compared them did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.config import RewardConfig
from rlhf_fast.data import check_length, encode_completion, encode_prompt, pad
from rlhf_fast.loading import load_preferences
from rlhf_fast.models import (
    context_length,
    disable_dropout,
    evaluating,
    load_causal_lm,
    load_tokenizer,
)
from rlhf_fast.ops import pairwise_loss
from rlhf_fast.scalar_models import RewardModel
from rlhf_fast.trainers import checkpoint
from rlhf_fast.trainers.run import Metrics, Run, count_steps, pieces_of

Pair = tuple[list[int], list[int], float]


class RewardTrainer:
    """Trains a `RewardModel` on pairs of completions (Bradley-Terry).

    Args:
        model: A causal language model (usually the SFT model), its name or folder, or a
            `RewardModel` to train further.
        data: What `loading.load_preferences` takes: `{prompt, chosen, rejected[, margin]}` rows
            or `{chosen, rejected}` transcripts.
        tokenizer: By default the one saved with the model.
        config: See `RewardConfig`.
        eval_data: Held-out pairs; the accuracy on them is logged at the end.
        run_dir: Where metrics, checkpoints and the trained model go; None writes nothing.
        resume: Go on from the newest checkpoint in `run_dir`.
        pad_token: Padding token for a tokenizer without one.

    Raises:
        DataError, ConfigError, ValueError: Bad data, configuration or tokenizer, before training.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | RewardModel,
        data: Any,
        *,
        tokenizer: Any = None,
        config: RewardConfig | None = None,
        eval_data: Any = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        pad_token: str | None = None,
    ) -> None:
        self.config = config or RewardConfig()
        self.run = Run(self.config, run_dir, resume=resume)
        if isinstance(model, RewardModel):
            self.model, self.tokenizer = model, model.tokenizer
        else:
            self.tokenizer = load_tokenizer(tokenizer, model, pad_token)
            self.model = RewardModel(load_causal_lm(model), self.tokenizer)
        disable_dropout(self.model)
        self._pairs = self._encode(data)
        self._eval_pairs = None if eval_data is None else self._encode(eval_data)
        self.total_steps = count_steps(len(self._pairs), self.config.batch_size, self.config.epochs)
        optimizer, self._schedule = self.run.optimizer(
            [{"params": list(self.model.parameters())}], self.total_steps
        )
        self._module, self._optimizer = self.run.accelerator.prepare(self.model, optimizer)
        self.run.accelerator.register_for_checkpointing(self._schedule)
        if resume:
            checkpoint.restore(self.run)

    def _encode(self, data: Any) -> list[Pair]:
        limit = min(
            self.config.max_length, context_length(self.model.model) or self.config.max_length
        )
        pairs = []
        for i, pair in enumerate(load_preferences(data), start=1):
            prompt = encode_prompt(self.tokenizer, pair.prompt)
            chosen, rejected = (
                prompt + encode_completion(self.tokenizer, text)
                for text in (pair.chosen, pair.rejected)
            )
            for name, ids in (("chosen", chosen), ("rejected", rejected)):
                check_length(
                    ids,
                    limit,
                    f"row {i} of the data ({name})",
                    "shorten the row, or raise max_length if the model reads more",
                )
            margin = pair.margin if self.config.use_margin and pair.margin is not None else 0.0
            pairs.append((chosen, rejected, margin))
        return pairs

    def _scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        # One forward pass for both halves: the same padding, the same kernels.
        rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        tokens, mask = pad(rows, self.tokenizer.pad_token_id, side="right")
        scores = self._module(tokens.to(self.run.device), mask.to(self.run.device))
        return scores[: len(pairs)], scores[len(pairs) :]

    def _loss(self, pairs: Sequence[Pair]) -> tuple[Tensor, Metrics]:
        chosen, rejected = self._scores(pairs)
        margin = torch.tensor([pair[2] for pair in pairs], device=chosen.device)
        loss, metrics = pairwise_loss(chosen, rejected, margin=margin, center=self.config.center)
        share = len(pairs) / self.config.batch_size  # means of pieces to the mean of the batch
        return loss * share, {"loss": loss.detach() * share} | {
            name: value * share for name, value in metrics.items()
        }

    def train(self) -> RewardTrainer:
        """Trains to the end of the configured epochs; returns itself."""
        run = self.run
        self._module.train()
        for step in run.steps(self.total_steps, "reward model", "accuracy"):
            pieces = [
                [self._pairs[i] for i in piece] for piece in pieces_of(run, step, len(self._pairs))
            ]
            metrics = run.optimize(
                self._module, self._optimizer, self._schedule, pieces, self._loss
            )
            run.step = step + 1
            run.log({**run.reduce(metrics), "learning_rate": self._schedule.get_last_lr()[0]})
            if self.config.save_every and run.step % self.config.save_every == 0:
                checkpoint.save(run, {}, self.model.save_pretrained)
        if self.config.normalize:
            self.normalize()
        if self._eval_pairs is not None:
            accuracy, interval = self.evaluate(self._eval_pairs)
            run.log({"eval_accuracy": accuracy, "eval_accuracy_interval": interval})
        if run.folder is not None and run.accelerator.is_main_process:
            self.model.save_pretrained(run.folder / "model")
        run.finish()
        return self

    @torch.no_grad()
    def _score_all(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        size = self.config.micro_batch
        with evaluating(self._module):
            parts = [self._scores(pairs[i : i + size]) for i in range(0, len(pairs), size)]
        chosen, rejected = zip(*parts, strict=True)
        return torch.cat(chosen), torch.cat(rejected)

    def normalize(self, prompts_and_completions: Sequence[tuple[str, str]] | None = None) -> None:
        """Shifts and scales the model so that reference scores have mean 0 and deviation 1 (2019).

        Args:
            prompts_and_completions: Samples of the reference policy, best drawn from the SFT
                model; by default the training pairs' completions, both sides.
        """
        self.model.gain.fill_(1.0)
        self.model.shift.fill_(0.0)
        if prompts_and_completions is None:
            scores = torch.cat(self._score_all(self._pairs))
        else:
            prompts, completions = zip(*prompts_and_completions, strict=True)
            scores = self.model.score(prompts, completions, batch_size=self.config.micro_batch)
        gain = 1 / scores.std().clamp(min=1e-6)
        self.model.gain.copy_(gain)
        self.model.shift.copy_(-scores.mean() * gain)

    def evaluate(self, pairs: Sequence[Pair]) -> tuple[float, float]:
        """Accuracy on encoded `pairs`, and the half-width of its 95 % interval (normal)."""
        chosen, rejected = self._score_all(pairs)
        gap = (chosen - rejected).cpu()
        accuracy = ((gap > 0).float() + (gap == 0).float() / 2).mean().item()
        return accuracy, 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(pairs))
