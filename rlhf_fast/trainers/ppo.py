"""Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019) and its kin."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast import rewards
from rlhf_fast.actor_critic import ActorCritic, choose_critic
from rlhf_fast.config import ConfigError, PPOConfig, checked
from rlhf_fast.data import Rollout, batch_indices, check_length, encode_prompt
from rlhf_fast.loading import DataError, Prompt, load_prompts
from rlhf_fast.models import (
    check_vocabulary,
    context_length,
    load_causal_lm,
    load_tokenizer,
    require_trainable,
    vocabulary_size,
)
from rlhf_fast.policy import Policy
from rlhf_fast.presets import PRESETS
from rlhf_fast.rollout import HFEngine, RolloutEngine, Sampling
from rlhf_fast.scalar_models import RewardModel, ScalarModel
from rlhf_fast.trainers import checkpoint
from rlhf_fast.trainers.experience import check_groups, describe, make_experience
from rlhf_fast.trainers.run import Run
from rlhf_fast.trainers.update import update


class PPOTrainer:
    """Trains a policy on rewards of its own completions.

    `train()` runs it all. For a loop of your own, `generate(prompts)` gives a `Rollout` and
    `step(rollout, scores)` learns from it.

    Args:
        policy: A causal language model, its name or folder. It is trained in place.
        reward: A function `reward(prompts, completions, **columns)`, a `RewardModel`, its folder,
            `"module:function"`, or a list of these or of `(reward, weight)` pairs; see `rewards`.
            None if only `generate` and `step` are used.
        prompts: What `loading.load_prompts` takes. None if only `step` is used.
        tokenizer: By default the one saved with the policy.
        ref: Reference policy, its name or folder, which is frozen; by default a frozen copy of
            `policy`.
        critic: `"head"`, `"model"`, a `ScalarModel` or `RewardModel`, or the folder of a saved
            reward model; see `ActorCritic`. None trains without one, by a loss that needs none
            (`config.loss`). `"auto"` is `"head"` for a loss that needs a critic, else None.
        config: See `PPOConfig`.
        engine: Samples completions; by default `HFEngine` on the policy itself.
        run_dir: Where metrics, samples, checkpoints and the policy go; None writes nothing.
        resume: Go on from the newest checkpoint in `run_dir`.
        pad_token: Padding token for a tokenizer without one.
        bad_rows: "error", or "skip" to leave bad and overlong prompts out with a warning.

    Raises:
        DataError, ConfigError, ValueError: Bad prompts, configuration or tokenizer, before
            training. `train` and `score` raise `RewardError` for a reward function that fails.
    """

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
        engine: RolloutEngine | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        pad_token: str | None = None,
        bad_rows: str = "error",
    ) -> None:
        self.config = config = checked(config, PPOConfig)
        critic = choose_critic(config.loss, critic)
        self.run = Run(config, run_dir, resume=resume)
        if (count := config.rollout_batch_size // config.samples_per_prompt) % self.run.world:
            raise ConfigError(
                f"{count} prompts an iteration do not divide among {self.run.world} processes, and "
                "the completions of a prompt stay together; change rollout_batch_size or "
                "samples_per_prompt"
            )
        self.tokenizer = load_tokenizer(tokenizer, policy, pad_token)
        self.model = load_causal_lm(policy)
        require_trainable(self.model)
        self.prompts: list[Prompt] = []
        self._prompt_ids: list[list[int]] = []
        if prompts is not None:
            self.prompts = load_prompts(
                prompts,
                bad_rows=bad_rows,
                check=lambda prompt: self._prompt_ids.append(self._encode(prompt.text)),
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
                "are biased; top_k=0, top_p=1 is exact",
                stacklevel=2,
            )
        vocabulary = vocabulary_size(self.tokenizer)
        wrapped = Policy(self.model, vocabulary)
        if ref is None:
            reference = wrapped.frozen_copy()
        else:
            reference = Policy(load_causal_lm(ref), vocabulary)
            self._check_other("the reference", reference.model)
        self.ref = reference.requires_grad_(False).eval().to(self.run.device)
        if isinstance(critic, str | Path) and (Path(critic) / "reward_model.json").exists():
            critic = RewardModel.from_pretrained(critic)
        if isinstance(critic, ScalarModel):
            self._check_other("the critic", critic.model)
        actor_critic = ActorCritic(wrapped, critic)
        updates = config.iterations * config.epochs * self._minibatches
        optimizer, self._schedule = self.run.optimizer(
            actor_critic.parameter_groups(config.learning_rate, config.critic_learning_rate),
            updates,
        )
        self._module, self._optimizer = self.run.accelerator.prepare(actor_critic, optimizer)
        self.run.accelerator.register_for_checkpointing(self._schedule)
        self.engine = engine or HFEngine(self.model, self.tokenizer)
        self.kl_coef = config.kl_coef
        if resume:
            self.kl_coef = checkpoint.restore(self.run)["kl_coef"]
            if self.run.step > config.iterations:
                raise ConfigError(
                    f"the run has done {self.run.step} iterations, more than iterations = "
                    f"{config.iterations}; raise it"
                )

    def _check_other(self, what: str, model: PreTrainedModel) -> None:
        """Raises unless `model` can read what the policy reads and writes."""
        check_vocabulary(self.tokenizer, model, what)
        ours = context_length(self.model, self.config.max_length)
        theirs = context_length(model, self.config.max_length)
        if theirs < ours:
            raise ValueError(
                f"{what} reads {theirs} tokens, but sequences may have {ours}; lower max_length "
                f"to {theirs}"
            )

    @property
    def _minibatches(self) -> int:
        return self.config.rollout_batch_size // self.config.batch_size

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = encode_prompt(self.tokenizer, prompt)
        else:
            ids = [int(token) for token in prompt]
        what = f"prompt {prompt[:40]!r}"
        if not ids:
            raise ValueError(f"{what} has no tokens; give at least one")
        context, new = (
            context_length(self.model, self.config.max_length),
            self.config.max_new_tokens,
        )
        remedy = (
            f"the context is {context} tokens, max_new_tokens = {new} of them for the completion; "
            "shorten the prompt, lower max_new_tokens, or raise max_length if the model reads more"
        )
        check_length(ids, context - new, what, remedy)
        return ids

    def train(self) -> PPOTrainer:
        """Runs the configured iterations; returns itself."""
        if not self.prompts:
            raise DataError("train() has no prompts; pass prompts=... to the trainer")
        run, config = self.run, self.config
        for iteration in run.steps(config.iterations, "PPO", "score"):
            started = time.perf_counter()
            rows = self._rows(iteration)
            rollout = self.generate([self._prompt_ids[i] for i in rows])
            sampled = time.perf_counter()
            scores, extra = self.score(rollout, rows)
            scored = time.perf_counter()
            metrics = self.step(rollout, scores)
            times = {
                "seconds_generate": sampled - started,
                "seconds_score": scored - sampled,
                "seconds_update": time.perf_counter() - scored,
            }
            run.log({**metrics, **extra, **times})
            run.keep_samples(self._describe_samples(rollout, rows, scores))
            if config.save_every and run.step % config.save_every == 0:
                checkpoint.save(run, {"kl_coef": self.kl_coef}, self.save)
        if run.folder is not None and run.accelerator.is_main_process:
            self.save(run.open_folder() / "model")
        run.finish()
        return self

    def _describe_samples(
        self, rollout: Rollout, rows: Sequence[int], scores: Tensor, most: int = 8
    ) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self.prompts[row].text,
                "completion": self.tokenizer.decode(ids),
                "score": score,
            }
            for row, ids, score in zip(
                rows[:most], rollout.completion_ids(), scores.tolist(), strict=False
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
        config = self.config
        if isinstance(prompts, str):
            raise ValueError(f"prompts is one string, {prompts[:40]!r}; give a list of prompts")
        ids = [self._encode(prompt) for prompt in prompts]
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            ignore_eos=config.ignore_eos,
            # A function of the step, so that a resumed run draws what the first would have.
            seed=((config.seed * 1_000_003 + self.run.step) * 4_099 + self.run.rank) % 2**63,
        )
        with self.run.accelerator.autocast():  # as in training: one policy, one precision
            return self.engine.generate(ids, sampling)

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
        if len(rollout) * run.world != config.rollout_batch_size:
            raise ValueError(
                f"the rollout has {len(rollout) * run.world} completions, but rollout_batch_size "
                f"= {config.rollout_batch_size}; schedule and batches rest on it: make them equal"
            )
        try:
            scores = torch.as_tensor(scores, dtype=torch.float32).to(run.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"scores are no numbers ({error}); give one a completion") from None
        if scores.shape != (len(rollout),) or not scores.isfinite().all():
            raise ValueError(
                f"scores has shape {list(scores.shape)} and {int((~scores.isfinite()).sum())} "
                f"non-finite values; give one finite number for each of {len(rollout)} completions"
            )
        if PRESETS[config.loss].needs_groups:
            check_groups(rollout, config.samples_per_prompt)
        micro_batch = config.micro_batch // run.world
        with run.accelerator.autocast():  # the reference, too, in the policy's precision
            experience = make_experience(
                self._module,
                self.ref,
                rollout.to(run.device),
                scores,
                config,
                self.kl_coef,
                micro_batch,
            )
        described = describe(experience, self.kl_coef)
        rate = self._schedule.get_last_lr()[0]
        metrics = update(
            run, self._module, self._optimizer, self._schedule, self.ref, experience, config
        )
        metrics |= run.reduce({name: value / run.world for name, value in described.items()})
        metrics |= {"kl_coef": self.kl_coef, "learning_rate": rate}
        self._adapt_kl(metrics["kl"], len(rollout) * run.world)
        run.step += 1
        self.engine.update_weights(run.step)
        return metrics

    def _adapt_kl(self, kl: float, sequences: int) -> None:
        """Moves `kl_coef` toward the KL target: Ziegler et al. (2019), section 2.2."""
        if self.config.kl_target is not None:
            error = min(max(kl / self.config.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * sequences / self.config.kl_horizon

    def save(self, folder: Path) -> None:
        """Writes policy and tokenizer; `AutoModelForCausalLM.from_pretrained` reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
