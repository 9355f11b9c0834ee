"""Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019) and its kin."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast import rewards
from rlhf_fast._adapter_files import name_weights
from rlhf_fast._adapters import takes_adapter_off_on_error
from rlhf_fast.actor_critic import choose_critic
from rlhf_fast.config import ConfigError, PPOConfig, checked
from rlhf_fast.data import Rollout, batch_indices
from rlhf_fast.loading import DataError, Prompt, load_prompts
from rlhf_fast.lora import LoraConfig, save_model
from rlhf_fast.models import load_causal_lm, load_tokenizer, require_trainable
from rlhf_fast.rollout import RolloutConfig, RolloutEngine
from rlhf_fast.scalar_models import ScalarModel
from rlhf_fast.trainers import checkpoint
from rlhf_fast.trainers.actors import make_actors
from rlhf_fast.trainers.batches import minibatches
from rlhf_fast.trainers.experience import correct, describe, make_experience
from rlhf_fast.trainers.rollouts import Rollouts, check_correction, check_rollout, prompt_ids
from rlhf_fast.trainers.run import Run
from rlhf_fast.trainers.update import update


class PPOTrainer:
    """Trains a policy on rewards of its own completions.

    `train()` runs it all. For a loop of your own, `generate(prompts)` gives a `Rollout` and
    `step(rollout, scores)` learns from it.

    Args:
        policy: A causal language model, its name or folder. It is trained in place. Of a
            `PeftModel`, or the folder of a LoRA adapter, the adapter is.
        reward: A function `reward(prompts, completions, **columns)`, a `RewardModel`, its folder,
            `"module:function"`, or a list of these or of `(reward, weight)` pairs; see `rewards`.
            None if only `generate` and `step` are used.
        prompts: What `loading.load_prompts` takes. None if only `step` is used.
        tokenizer: By default the one saved with the policy.
        ref: Reference policy, its name or folder, which is frozen; by default `policy` as it is
            now, a frozen copy that shares frozen weights below adapters.
        critic: `"head"`, `"model"`, a `ScalarModel` or `RewardModel`, or the folder of a saved
            reward model; see `ActorCritic`. None trains without one, by a loss that needs none
            (`config.loss`). `"auto"` is `"head"` for a loss that needs a critic, else None.
        config: See `PPOConfig`.
        lora: Train an adapter: its rank, a `LoraConfig` or its fields (docs/lora.md). None trains
            what requires gradients.
        rollout: Which engine samples completions ("auto", "hf", "vllm"), how its log-probs are
            corrected and probed: a name, a `RolloutConfig` or its fields.
        engine: An engine of your own, in place of the one that `rollout` names.
        run_dir: Where metrics, samples, checkpoints and the policy go; None writes nothing.
        resume: Go on from the newest checkpoint in `run_dir`.
        pad_token: Padding token for a tokenizer without one.
        bad_rows: "error", or "skip" to leave bad and overlong prompts out with a warning.

    Raises:
        DataError, ConfigError, ValueError: Bad prompts, configuration or tokenizer, before
            training. `train` and `score` raise `RewardError` for a reward function that fails.
    """

    @takes_adapter_off_on_error
    def __init__(
        self,
        policy: str | Path | PreTrainedModel,
        *,
        reward: Any = None,
        prompts: Any = None,
        tokenizer: Any = None,
        ref: str | Path | PreTrainedModel | None = None,
        critic: str | Path | ScalarModel | None = "auto",
        config: PPOConfig | None = None,
        lora: int | dict[str, Any] | LoraConfig | None = None,
        rollout: str | dict[str, Any] | RolloutConfig = "auto",
        engine: RolloutEngine | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        pad_token: str | None = None,
        bad_rows: str = "error",
    ) -> None:
        self.config = config = checked(config, PPOConfig)
        rollout, adapter = RolloutConfig.of(rollout), LoraConfig.of(lora)
        critic = choose_critic(config.loss, critic)
        self.run = Run(config, run_dir, resume=resume)
        if (count := config.rollout_batch_size // config.samples_per_prompt) % self.run.world:
            raise ConfigError(
                f"{count} prompts an iteration do not divide among {self.run.world} processes, and "
                "the completions of a prompt stay together; change rollout_batch_size or "
                "samples_per_prompt"
            )
        self.tokenizer = load_tokenizer(tokenizer, policy, pad_token)
        self.model = load_causal_lm(policy, lora=adapter, frozen_dtype=self.run.dtype)
        require_trainable(self.model)
        self.prompts: list[Prompt] = []
        self._prompt_ids: list[list[int]] = []
        if prompts is not None:
            self.prompts = load_prompts(
                prompts,
                bad_rows=bad_rows,
                check=lambda prompt: self._prompt_ids.append(
                    prompt_ids(self.tokenizer, self.model, config, prompt.text)
                ),
            )
        self._reward = None if reward is None else rewards.as_reward(reward).to(self.run.device)
        if self._reward is not None and self.prompts:
            rewards.check_columns(self._reward, self.prompts[0].columns)
        if self._reward is not None:
            self._reward.refuse_shared(self.model)
        if config.top_k or config.top_p < 1:
            warnings.warn(
                f"top_k={config.top_k}, top_p={config.top_p}: completions are drawn from a "
                "truncated distribution, but ratios and KL are those of the full one, so both "
                "are biased, and importance weights are left out; top_k=0, top_p=1 is exact",
                stacklevel=2,
            )
        actor_critic, self.ref = make_actors(
            self.model, ref, critic, self.tokenizer, config.max_length
        )
        self.ref.to(self.run.device)
        updates = config.iterations * config.epochs * self._minibatches
        optimizer, self._schedule = self.run.optimizer(
            actor_critic.parameter_groups(config.learning_rate, config.critic_learning_rate),
            updates,
        )
        self._module, self._optimizer = self.run.accelerator.prepare(actor_critic, optimizer)
        self.run.accelerator.register_for_checkpointing(self._schedule)
        self.kl_coef = config.kl_coef
        if resume:
            state = checkpoint.restore(self.run)
            self.kl_coef = state["kl_coef"]
            check_correction(state.get("correction"), rollout.correction_fields())
            checkpoint.check_reference(state.get("reference"), self.ref)
            if (done := self.run.step) > (most := config.iterations):
                raise ConfigError(
                    f"the run has done {done} iterations, more than iterations = {most}; raise it"
                )
        # Last: the engine starts with the weights that were restored.
        given = (self.tokenizer, config, rollout, engine)
        self.rollouts = Rollouts(self.run, self.model, actor_critic.policy, *given)
        name_weights(self.model)

    @property
    def _minibatches(self) -> int:
        return self.config.rollout_batch_size // self.config.batch_size

    def train(self) -> PPOTrainer:
        """Runs the configured iterations; returns itself."""
        if not self.prompts:
            raise DataError("train() has no prompts; pass prompts=... to the trainer")
        run, config = self.run, self.config
        for iteration in run.steps(config.iterations, "PPO", "score"):
            started = time.perf_counter()
            rows = self._rows(iteration)
            rollout = self.generate([self._prompt_ids[i] for i in rows])
            self.rollouts.release()
            sampled = time.perf_counter()
            scores, extra = self.score(rollout, rows)
            scored = time.perf_counter()
            metrics = self.step(rollout, scores)
            times = {
                "seconds_generate": sampled - started,
                "seconds_score": scored - sampled,
                "seconds_update": time.perf_counter() - scored - metrics["seconds_sync"],
            }
            run.log({**metrics, **extra, **times})
            run.keep_samples(self._describe_samples(rollout, rows, scores))
            if config.save_every and run.step % config.save_every == 0:
                correction = self.rollouts.config.correction_fields()
                reference = checkpoint.describe_reference(self.ref)
                state = {"kl_coef": self.kl_coef, "correction": correction, "reference": reference}
                checkpoint.save(run, state, self.save)
        if run.folder is not None and run.accelerator.is_main_process:
            self.save(run.open_folder() / "model")
            name_weights(self.model, run.open_folder() / "model")
        run.finish()
        return self

    def _describe_samples(
        self, rollout: Rollout, rows: Sequence[int], scores: Tensor, most: int = 8
    ) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.prompts[row].text,
                "completion": self.tokenizer.decode(ids),
                "finish_reason": reason,
                "score": score,
            }
            for row, ids, reason, score in zip(
                rows[:most],
                rollout.completion_ids(),
                rollout.finish_reasons,
                scores.tolist(),
                strict=False,
            )
        ]

    def _rows(self, iteration: int) -> list[int]:
        """Which prompts this process samples in `iteration`, each `samples_per_prompt` times."""
        config = self.config
        count = config.rollout_batch_size // config.samples_per_prompt
        index = batch_indices(iteration, len(self.prompts), count, config.seed)
        return self.run.local(index).repeat_interleave(config.samples_per_prompt).tolist()

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> Rollout:
        """Samples one completion for each prompt (text or token ids), in order.

        For several of one prompt, repeat it.
        """
        return self.rollouts.generate(prompts)

    def score(self, rollout: Rollout, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The reward function's scores `[B]` of completions of the prompts numbered `rows`."""
        if self._reward is None:
            raise rewards.RewardError("there is no reward function; pass reward=... to the trainer")
        ids = rollout.completion_ids()
        names = self.prompts[rows[0]].columns
        return rewards.evaluate(
            self._reward,
            [self.prompts[i].text for i in rows],
            self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            completion_ids=ids,
            columns={name: [self.prompts[i].columns[name] for i in rows] for name in names},
        )

    def step(self, rollout: Rollout, scores: Tensor | Sequence[float]) -> dict[str, float]:
        """Learns from completions and their scores `[B]`; returns the metrics.

        For a loss over groups the `samples_per_prompt` completions of a prompt stand side by side.

        Raises:
            ValueError: There are not `rollout_batch_size` completions, `scores` is not one finite
                number for each, or the learning-rate schedule is at its end.
        """
        config, run = self.config, self.run
        if run.step >= config.iterations and config.lr_schedule != "constant":
            raise ValueError(
                f"step() was called more often than iterations = {config.iterations}, where the "
                f"{config.lr_schedule} schedule ends: nothing would be learnt; raise iterations, "
                "or set lr_schedule='constant'"
            )
        scores = check_rollout(rollout, scores, config, run)
        self.rollouts.release()
        rollout = rollout.to(run.device)
        pieces = [rows for batch in minibatches(run, config, rollout, 0) for rows in batch]
        with run.accelerator.autocast():  # the reference, too, in the policy's precision
            experience = make_experience(
                self._module, self.ref, rollout, scores, config, self.kl_coef, pieces
            )
            truncated = config.top_k > 0 or config.top_p < 1
            experience, mismatch = correct(experience, self.rollouts.config, truncated=truncated)
        described = describe(experience, self.kl_coef) | mismatch
        rate = self._schedule.get_last_lr()[0]
        metrics = update(
            run, self._module, self._optimizer, self._schedule, self.ref, experience, config
        )
        metrics |= run.reduce_means(described)
        metrics |= {"kl_coef": self.kl_coef, "learning_rate": rate}
        self._adapt_kl(metrics["kl"], len(rollout) * run.world)
        run.step += 1
        report = self.rollouts.sync()
        metrics["seconds_sync"] = report.seconds
        if report.probe_max_abs is not None:
            metrics["probe_max_abs"] = report.probe_max_abs
        return metrics

    def _adapt_kl(self, kl: float, sequences: int) -> None:
        """Moves `kl_coef` toward the KL target: Ziegler et al. (2019), section 2.2."""
        if self.config.kl_target is not None:
            error = min(max(kl / self.config.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * sequences / self.config.kl_horizon

    def close(self) -> None:
        """Ends the rollout engine and gives its memory back; the model stays.

        `with PPOTrainer(...) as trainer:` does so at the end.
        """
        self.rollouts.engine.close()

    def __enter__(self) -> PPOTrainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(self, folder: Path) -> None:
        """Writes policy and tokenizer as transformers reads them, an adapter as peft does."""
        save_model(self.model, folder)
        self.tokenizer.save_pretrained(folder)
