"""From prompts to completions: a run's engine, the weights it is sent, the probe, the checks."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast._adapters import is_peft
from rlhf_fast.config import ConfigError, PPOConfig
from rlhf_fast.data import Rollout, check_length, encode_prompt
from rlhf_fast.lora import adapters_off, save_model
from rlhf_fast.models import context_length, evaluating
from rlhf_fast.policy import Policy
from rlhf_fast.presets import PRESETS
from rlhf_fast.rollout import (
    Probe,
    RolloutConfig,
    RolloutEngine,
    Sampling,
    SyncReport,
    VLLMEngine,
    check_probe,
    make_engine,
    precision,
    probe,
)
from rlhf_fast.trainers.experience import check_groups
from rlhf_fast.trainers.run import Run

PROBED = 8  # prompts of a probe


def prompt_ids(
    tokenizer: Any, model: PreTrainedModel, config: PPOConfig, prompt: str | Sequence[int]
) -> list[int]:
    """Token ids of a prompt, text or ids.

    Raises:
        ValueError: It has none, or with its completion would be longer than the context.
    """
    if isinstance(prompt, str):
        ids = encode_prompt(tokenizer, prompt)
    else:
        ids = [int(token) for token in prompt]
    what = f"prompt {prompt[:40]!r}"
    if not ids:
        raise ValueError(f"{what} has no tokens; give at least one")
    context, new = context_length(model, config.max_length), config.max_new_tokens
    remedy = (
        f"the context is {context} tokens, max_new_tokens = {new} of them for the completion; "
        "shorten the prompt, lower max_new_tokens, or raise max_length if the model reads more"
    )
    check_length(ids, context - new, what, remedy)
    return ids


def check_servable(model: Any, rollout: RolloutConfig) -> None:
    """Raises `ConfigError` unless vLLM can be sent the adapter of a `PeftModel` alone."""
    beside = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if beside:
        raise ConfigError(
            f"max_lora_rank = {rollout.max_lora_rank} sends vLLM the adapter alone, but "
            f"{beside[0]} is trained beside it (modules_to_save, or biases); leave max_lora_rank "
            "out, and merged weights are sent"
        )
    if rollout.sleep_level == 2:
        raise ConfigError(
            "sleep_level = 2 drops the weights below the adapter, which max_lora_rank sends only "
            "once; set sleep_level to 1 or 0, or leave max_lora_rank out"
        )


class Rollouts:
    """Samples completions for a run, and keeps the engine at the policy's weights.

    `engine` is the engine, `config` what `rollout` was. With an `engine` of one's own, correction
    and probe are still those of `rollout`.

    Args:
        run: The run; its step is the version of the weights.
        model: The model being trained, with its `PeftModel` if there is one.
        policy: The policy over it.
        tokenizer: Its tokenizer.
        config: Lengths and sampling.
        rollout: Which engine, and when to probe it.
        engine: An engine to use in place of the one that `rollout` names.
    """

    def __init__(
        self,
        run: Run,
        model: Any,
        policy: Policy,
        tokenizer: Any,
        config: PPOConfig,
        rollout: RolloutConfig,
        engine: RolloutEngine | None = None,
    ) -> None:
        self._run, self._policy, self._config, self.config = run, policy, config, rollout
        self._tokenizer, self._seen, self._updates = tokenizer, list[list[int]](), 0
        if rollout.dtype == "auto":
            half = {"bf16": "bfloat16", "fp16": "float16"}
            rollout = rollout.replace(dtype=half.get(config.mixed_precision, "auto"))
        context = context_length(policy.model, config.max_length)
        self._adapter: Any = None  # the PeftModel whose adapter alone is sent
        if engine is None and rollout.max_lora_rank is not None and is_peft(model):
            if rollout.engine == "vllm":
                check_servable(model, rollout)  # before it starts
            with adapters_off(model):
                self.engine = make_engine(policy.model, tokenizer, rollout, max_length=context)
            if isinstance(self.engine, VLLMEngine):
                try:
                    check_servable(model, rollout)
                except ConfigError:
                    self.engine.close()
                    raise
                self._adapter = model
            self._send()
        elif engine is None:
            self.engine = make_engine(policy.model, tokenizer, rollout, max_length=context)
            self.engine.weight_version = run.step
        else:
            self.engine = engine
            self._send()

    def _send(self) -> SyncReport:
        """Brings the engine to the policy's weights: all of them, or the adapter over its base."""
        engine, version = self.engine, self._run.step
        if self._adapter is None or not isinstance(engine, VLLMEngine):
            return engine.update_weights(engine.source, version)
        with tempfile.TemporaryDirectory() as folder:
            save_model(self._adapter, folder, embeddings=False)
            return engine.update_adapter(folder, version)

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> Rollout:
        """One completion for each prompt, in order."""
        config, run = self._config, self._run
        if isinstance(prompts, str):
            raise ValueError(f"prompts is one string, {prompts[:40]!r}; give a list of prompts")
        model = self._policy.model
        ids = [prompt_ids(self._tokenizer, model, config, prompt) for prompt in prompts]
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            ignore_eos=config.ignore_eos,
            # A function of the step, so that a resumed run draws what the first would have.
            seed=((config.seed * 1_000_003 + run.step) * 4_099 + run.rank) % 2**63,
        )
        self._seen = list(map(list, dict.fromkeys(map(tuple, ids))))[:PROBED]
        with run.accelerator.autocast(), run.progress("rollout", len(ids)) as advance:
            return self.engine.generate(ids, sampling, advance)

    def release(self) -> None:
        """Gives the engine's device memory to whoever comes next."""
        self.engine.release_memory()

    def sync(self) -> SyncReport:
        """Sends the engine the policy's weights, and probes it if it is time to.

        Raises:
            RolloutMismatch: The engine does not sample from the policy.
        """
        report = self._send()
        self._updates += 1
        every = self.config.probe_every
        due = self._updates <= self.config.probe_first or (
            every is not None and self._updates % every == 0
        )
        if not (due and self._seen):
            return report
        config, step = self._config, self._run.step
        with self._run.accelerator.autocast(), evaluating(self._policy):
            found = probe(
                self.engine,
                self._score,
                self._seen,
                max_new_tokens=min(config.max_new_tokens, 16),
                temperature=config.temperature,
                seed=(config.seed * 1_000_003 + step) % 2**63,
            )
        found = self._of_all_processes(found)
        kind = precision([self.engine.dtype, self._run.dtype], self._run.device)
        check_probe(found, kind, self.config.probe_tolerance, step)
        return dataclasses.replace(report, probe_max_abs=found.max_abs)

    def _of_all_processes(self, found: Probe) -> Probe:
        """One verdict for all: a process that stopped alone would leave the others waiting."""
        if self._run.world == 1:
            return found
        tokens, most, mean = self._run.accelerator.gather(
            torch.tensor([found], dtype=torch.float64, device=self._run.device)
        ).T
        count = tokens.sum()
        return Probe(int(count), float(most.amax()), float((tokens * mean).sum() / count))

    def _score(self, rollout: Rollout) -> Tensor:
        return self._policy.logprobs_of(rollout.to(self._run.device), self._config.temperature)


def check_rollout(
    rollout: Rollout, scores: Tensor | Sequence[float], config: PPOConfig, run: Run
) -> Tensor:
    """The scores fp32 `[B]` on the run's device, if they and `rollout` can be learnt from.

    Raises:
        ValueError: There are not `rollout_batch_size` completions, rows have gaps, a log-prob is
            not finite, the scores are not one finite number for each, or the groups are not of one
            prompt.
    """
    if len(rollout) * run.world != config.rollout_batch_size:
        raise ValueError(
            f"the rollout has {len(rollout) * run.world} completions, but rollout_batch_size "
            f"= {config.rollout_batch_size}; schedule and batches rest on it: make them equal"
        )
    try:
        numbers = torch.as_tensor(scores, dtype=torch.float32).to(run.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"scores are no numbers ({error}); give one a completion") from None
    if numbers.shape != (len(rollout),) or not numbers.isfinite().all():
        raise ValueError(
            f"scores has shape {list(numbers.shape)} and {int((~numbers.isfinite()).sum())} "
            f"non-finite values; give one finite number for each of {len(rollout)} completions"
        )
    rollout.check_layout()
    sampled = rollout.completion_mask
    if rollout.logprobs is not None and not (rollout.logprobs.isfinite() | ~sampled).all():
        raise ValueError(
            "the rollout's logprobs are not all finite: the engine's model overflows, or the "
            "policy has diverged; nothing was learnt from it"
        )
    if PRESETS[config.loss].needs_groups:
        check_groups(rollout, config.samples_per_prompt)
    return numbers


def check_correction(before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raises `ConfigError` if a resumed run would weigh its rollouts otherwise than before."""
    if before not in (None, now):
        raise ConfigError(
            f"the run was begun with the correction {before}, not {now}; resume it with its own"
        )
