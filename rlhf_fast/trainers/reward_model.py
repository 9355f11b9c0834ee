"""Reward modelling: a scalar that ranks completions as the people who compared them did."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast._adapter_files import name_weights
from rlhf_fast._adapters import check_peft_model
from rlhf_fast.config import RewardConfig, checked
from rlhf_fast.data import check_length, encode_completion, encode_prompt, pad
from rlhf_fast.loading import Preference, load_examples, load_preferences
from rlhf_fast.lora import LoraConfig
from rlhf_fast.models import (
    context_length,
    disable_dropout,
    evaluating,
    load_causal_lm,
    load_tokenizer,
    require_trainable,
)
from rlhf_fast.ops import pairwise_loss
from rlhf_fast.scalar_models import RewardModel
from rlhf_fast.trainers import checkpoint
from rlhf_fast.trainers.batches import count_steps, pieces_of
from rlhf_fast.trainers.run import Metrics, Run

Pair = tuple[list[int], list[int], float]  # chosen and rejected token ids, margin


class RewardTrainer:
    """Trains a `RewardModel` on pairs of completions (Bradley-Terry).

    Args:
        model: A causal language model (usually the SFT model), its name or folder: a copy of its
            trunk gets a scalar head. Or a `RewardModel`, or the folder of one, to train further.
            Where there is a LoRA adapter, that and the scalar head are trained.
        data: What `loading.load_preferences` takes: `{prompt, chosen, rejected[, margin]}` rows
            or `{chosen, rejected}` transcripts.
        tokenizer: By default the one saved with the model.
        config: See `RewardConfig`.
        eval_data: Held-out pairs; the accuracy on them is logged at the end.
        reference_data: Completions of the reference policy, as `{prompt, completion}` rows, on
            which the scores are normalised; by default the pairs' own, both sides, which are that
            where the pairs were sampled from it.
        lora: Train an adapter: its rank, a `LoraConfig` or its fields (docs/lora.md). None trains
            what requires gradients.
        run_dir: Where metrics, checkpoints and the trained model go; None writes nothing.
        resume: Go on from the newest checkpoint in `run_dir`.
        pad_token: Padding token for a tokenizer without one.
        bad_rows: "error", or "skip" to leave bad and overlong rows out with a warning.

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
        reference_data: Any = None,
        lora: int | dict[str, Any] | LoraConfig | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        pad_token: str | None = None,
        bad_rows: str = "error",
    ) -> None:
        self.config = checked(config, RewardConfig)
        adapter = LoraConfig.of(lora)
        self.run = Run(self.config, run_dir, resume=resume)
        self.model = _load(model, tokenizer, pad_token, adapter, self.run.dtype)
        self.tokenizer = self.model.tokenizer
        require_trainable(self.model)
        disable_dropout(self.model)
        self._pairs = self._encode(data, bad_rows)
        self._eval_pairs = [] if eval_data is None else self._encode(eval_data, bad_rows)
        self._reference = (
            None if reference_data is None else load_examples(reference_data, bad_rows=bad_rows)
        )
        self.total_steps = count_steps(len(self._pairs), self.config.batch_size, self.config.epochs)
        optimizer, self._schedule = self.run.optimizer(
            [{"params": list(self.model.parameters())}], self.total_steps
        )
        self._module, self._optimizer = self.run.accelerator.prepare(self.model, optimizer)
        self.run.accelerator.register_for_checkpointing(self._schedule)
        if resume:
            checkpoint.restore(self.run)
        name_weights(self.model)

    def _encode(self, data: Any, bad_rows: str) -> list[Pair]:
        limit = context_length(self.model.model, self.config.max_length)
        pairs: list[Pair] = []

        def take(pair: Preference) -> None:
            prompt = encode_prompt(self.tokenizer, pair.prompt)
            sides = []
            for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                ids = prompt + encode_completion(self.tokenizer, text)
                remedy = "shorten the row, or raise max_length if the model reads more"
                check_length(ids, limit, f"prompt and {name}", remedy)
                sides.append(ids)
            margin = pair.margin if self.config.use_margin and pair.margin is not None else 0.0
            pairs.append((sides[0], sides[1], margin))

        load_preferences(data, bad_rows=bad_rows, check=take)
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
        lengths = torch.tensor([max(len(pair[0]), len(pair[1])) for pair in self._pairs])
        self._module.train()
        for step in run.steps(self.total_steps, "reward model", "accuracy"):
            pieces = [[self._pairs[i] for i in piece] for piece in pieces_of(run, step, lengths)]
            rate = self._schedule.get_last_lr()[0]
            metrics = run.optimize(
                self._module, self._optimizer, self._schedule, pieces, self._loss
            )
            run.step = step + 1
            run.log({**run.reduce(metrics), "learning_rate": rate})
            if self.config.save_every and run.step % self.config.save_every == 0:
                checkpoint.save(run, {}, self.model.save_pretrained)
        if self.config.normalize:
            self.normalize(self._reference)
        if self._eval_pairs:
            accuracy, interval = self._evaluate(self._eval_pairs)
            run.log({"eval_accuracy": accuracy, "eval_accuracy_interval": interval})
        if run.folder is not None and run.accelerator.is_main_process:
            self.model.save_pretrained(run.open_folder() / "model")
            name_weights(self.model, run.open_folder() / "model")
        run.finish()
        return self

    @torch.no_grad()
    def _score_all(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([max(len(pair[0]), len(pair[1])) for pair in pairs])
        scores = torch.empty(2, len(pairs), device=self.run.device)
        with evaluating(self._module):
            # By length, for less padding.
            size = max(self.config.micro_batch // self.run.world, 1)
            for index in lengths.argsort(stable=True).split(size):
                scores[:, index.to(scores.device)] = torch.stack(
                    self._scores([pairs[i] for i in index])
                )
        return scores[0], scores[1]

    def normalize(self, reference_data: Any = None) -> None:
        """Shifts and scales the model so that reference scores have mean 0 and deviation 1 (2019).

        Args:
            reference_data: Completions of the reference policy, as `{prompt, completion}` rows; by
                default the training pairs' own, both sides.
        """
        self.model.gain.fill_(1.0)
        self.model.shift.fill_(0.0)
        if reference_data is None:
            scores = torch.cat(self._score_all(self._pairs))
        else:
            examples = load_examples(reference_data)
            scores = self.model.score(
                [example.prompt for example in examples],
                [example.completion for example in examples],
                batch_size=self.config.micro_batch,
            )
        gain = 1 / scores.std().clamp(min=1e-6)
        self.model.gain.copy_(gain)
        self.model.shift.copy_(-scores.mean() * gain)

    def evaluate(self, data: Any, *, bad_rows: str = "error") -> tuple[float, float]:
        """Accuracy on the pairs of `data`, and the half-width of its 95 % interval (normal)."""
        return self._evaluate(self._encode(data, bad_rows))

    def _evaluate(self, pairs: list[Pair]) -> tuple[float, float]:
        chosen, rejected = self._score_all(pairs)
        gap = (chosen - rejected).cpu()
        accuracy = ((gap > 0).float() + (gap == 0).float() / 2).mean().item()
        return accuracy, 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(pairs))


def _load(
    model: Any,
    tokenizer: Any,
    pad_token: str | None,
    lora: LoraConfig | None,
    frozen_dtype: torch.dtype,
) -> RewardModel:
    if isinstance(model, str | Path) and (Path(model) / "reward_model.json").exists():
        model = RewardModel.from_pretrained(model)
    if not isinstance(model, RewardModel):
        tokenizer = load_tokenizer(tokenizer, model, pad_token)
        if not isinstance(model, str | Path):
            model = copy.deepcopy(model)  # else training the one would change the other
        loaded = load_causal_lm(model, lora=lora, frozen_dtype=frozen_dtype)
        return RewardModel(loaded, tokenizer)
    if tokenizer is not None or pad_token is not None:
        raise ValueError(
            "a RewardModel brings its tokenizer; leave tokenizer and pad_token out, or set "
            "model.tokenizer"
        )
    if lora is not None:
        raise ValueError(
            "lora makes an adapter for a new reward model, but this is a RewardModel already; "
            "leave lora out, or start from a causal language model"
        )
    if model.peft is not None:
        check_peft_model(model.peft)
    return model
