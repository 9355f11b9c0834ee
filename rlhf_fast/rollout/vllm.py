"""Rollouts with vLLM in this process, beside the trainer, on its device."""

from __future__ import annotations

import json
import math
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.data import Rollout, check_tokenizer
from rlhf_fast.models import check_vocabulary, context_length, sum_fp64, vocabulary_size
from rlhf_fast.rollout import _vllm
from rlhf_fast.rollout._modules import find_causal_lm
from rlhf_fast.rollout._vllm_fit import UNBOUNDED, kv_cache_bytes, why_not
from rlhf_fast.rollout.config import RolloutConfig
from rlhf_fast.rollout.engine import Progress, Sampling, SyncReport, requests, stop_ids
from rlhf_fast.rollout.probe import RolloutMismatch
from rlhf_fast.rollout.weights import WeightsError, WeightSource

COLDEST = 0.01
RESERVED = {
    "model", "skip_tokenizer_init", "load_format", "generation_config", "logprobs_mode",
    "worker_extension_cls", "enable_lora", "max_lora_rank", "distributed_executor_backend",
}  # fmt: skip


class VLLMEngine:
    """A rollout engine over vLLM, which holds its own copy of the policy's weights.

    It starts with the weights that `model` has now; `update_weights` brings later ones. Rows of the
    embedding beyond the tokenizer's ids do not exist in vLLM's model, so that they are never
    sampled. Generators, threads, precision and environment of this process stay as they were;
    torch.distributed gets a group of one process unless it is initialised before.

    Args:
        model: The policy, a causal language model or what wraps it; see `WeightSource`.
        tokenizer: Gives the EOS and padding ids and the number of real tokens.
        config: Precision, memory, sequences at a time; dtype "auto" is the model's own.
        max_length: Tokens of prompt and completion at most; None for the model's context.

    Attributes:
        source: The weights of `model`, for `update_weights`.

    Raises:
        BackendUnavailable: vLLM cannot run here, does not serve this class of models, or refuses
            to start.
        ValueError: An option that this vLLM does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: RolloutConfig | None = None,
        *,
        max_length: int | None = None,
    ) -> None:
        config = config or RolloutConfig(engine="vllm")
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = find_causal_lm(model), tokenizer
        check_vocabulary(tokenizer, self.model, "the model")
        if reason := why_not(self.model, max_length):
            raise BackendUnavailable(f"rollout engine 'vllm' cannot run: {reason}")
        self._vocabulary, self._device = vocabulary_size(tokenizer), self.model.device
        source = WeightSource(model, vocabulary=self._vocabulary)
        self._context = context_length(self.model, max_length or UNBOUNDED)
        self._sleep_level = config.sleep_level if self._device.type == "cuda" else 0
        arguments = self._arguments(config, source.config)
        with tempfile.TemporaryDirectory() as folder:
            source.config.save_pretrained(folder)
            self._vllm = _vllm.Adapter(folder, self._device, arguments)
        self._end = weakref.finalize(self, self._vllm.close)
        self.weight_version, self.dtype = 0, getattr(torch, arguments["dtype"])
        self.source, self._asleep, self._complete = source, False, False
        self._sums = config.check_sums and self._vllm.sum() is not None
        self._surplus: float | None = None
        self._max_lora_rank, self._adapters = config.max_lora_rank, 0
        self._adapter: tuple[int, str] | None = None
        try:
            self.update_weights(source, 0)
            self._try()
        except BaseException:
            self.close()
            raise

    def _try(self) -> None:
        """One token: what vLLM's kernels cannot run shows up now, not in the first iteration."""
        sampling = Sampling(1, seed=0, ignore_eos=True)
        try:
            self.generate([[self.tokenizer.eos_token_id]], sampling)
        except RuntimeError as error:
            raise BackendUnavailable(
                f"rollout engine 'vllm' starts, but cannot run this {type(self.model).__name__} "
                f"here: {error}; use engine 'hf'"
            ) from error

    def _arguments(self, config: RolloutConfig, model: PretrainedConfig) -> dict[str, Any]:
        dtype = config.dtype
        if dtype == "auto":
            dtype = str(self.model.dtype).removeprefix("torch.")  # type: ignore[assignment]
        arguments: dict[str, Any] = {
            "dtype": dtype,
            "max_model_len": self._context,
            "max_num_seqs": config.max_sequences,
        }
        kv_cache = config.kv_cache_bytes
        if self._device.type == "cuda":
            arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
            arguments["enable_sleep_mode"] = config.sleep_level > 0
        else:
            arguments["enforce_eager"] = True
            kv_cache = kv_cache or kv_cache_bytes(
                model.get_text_config(), dtype, config.max_sequences, self._context
            )
        if kv_cache is not None:
            arguments["kv_cache_memory_bytes"] = kv_cache
        if taken := sorted(config.options.keys() & (arguments.keys() | RESERVED)):
            raise ValueError(
                f"rollout.options sets {taken[0]!r}, which the engine sets itself; leave it out, "
                "or use the field of RolloutConfig for it"
            )
        if config.max_lora_rank is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": config.max_lora_rank}
        return arguments | config.options

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        on_progress: Progress | None = None,
    ) -> Rollout:
        """See `RolloutEngine.generate`; the rollout lies on the model's device.

        Raises:
            RuntimeError: The engine has no complete weights, or vLLM gave up a completion.
        """
        made = requests(prompts, sampling, vocabulary=self._vocabulary, context=self._context)
        for request in made:
            if request.sampling.temperature < COLDEST:
                raise ValueError(
                    f"Sampling.temperature = {request.sampling.temperature}: vLLM would take "
                    f"{COLDEST} for it, silently; give at least that, or top_k = 1"
                )
        self._check_open()
        self._check_complete()
        self.restore_memory()
        stops = [stop_ids(self.tokenizer, self.model, request.sampling) for request in made]
        outputs = self._vllm.generate(made, stops, self._adapter, on_progress)
        for request, (_, logprobs, _) in zip(made, outputs, strict=True):
            if not all(map(math.isfinite, logprobs)):
                raise RuntimeError(
                    f"vLLM's logits after prompt {request.prompt_index} are NaN or infinite: the "
                    f"model has diverged, or overflows in {self.dtype}"
                )
        return Rollout.from_lists(
            [request.prompt for request in made],
            [ids for ids, _, _ in outputs],
            pad_id=self.tokenizer.pad_token_id,
            finished=[finished for _, _, finished in outputs],
            logprobs=[logprobs for _, logprobs, _ in outputs],
            weight_version=self.weight_version,
            prompt_index=[request.prompt_index for request in made],
        ).to(self._device)

    def update_weights(self, source: WeightSource | None, version: int) -> SyncReport:
        """Replaces all weights in one reload, in which the engine's own dtype is taken on.

        Raises:
            WeightsError: `source` is of another model.
            RuntimeError: vLLM kept its prefix cache. The engine then refuses to generate.
        """
        self._check_open()
        if getattr(source, "manifest", None) != self.source.manifest:
            raise WeightsError(
                "these are no weights, or those of another model than the one that the engine was "
                "made for: names or shapes differ; give a WeightSource like `engine.source`"
            )
        # What the source finds wrong it says here, while the engine still has its old weights.
        assert source is not None
        started, sent = time.perf_counter(), _Counted(source, self.dtype if self._sums else None)
        if self._asleep:
            self._vllm.wake("weights")
        self._complete = False
        self._vllm.load(sent)
        self._check_arrived(sent)
        if self._asleep:
            self._vllm.wake("kv_cache")
        self._asleep, self._complete = False, True
        self._adapter, self.weight_version = None, version
        return SyncReport(version, sent.tensors, sent.bytes, time.perf_counter() - started)

    def _check_open(self) -> None:
        if not self._end.alive:
            raise RuntimeError("the engine was closed; make a new one")

    def _check_complete(self) -> None:
        if not self._complete:
            raise RuntimeError(
                "vLLM has no complete weights: the last update failed, or sleep_level 2 dropped "
                "them; call update_weights"
            )

    def _check_arrived(self, sent: _Counted) -> None:
        """Raises `RolloutMismatch` unless vLLM took every tensor and holds what was sent.

        A probe in half precision cannot see a small update that got lost; the sum over all weights
        can. What vLLM's own has beyond that of the tensors (padding) never changes.
        """
        expected = self.source.manifest
        missing = [name for name in expected if name not in sent.names]
        if missing or sent.tensors != len(expected):
            what = f"not {missing[0]}" if missing else f"and {sent.tensors - len(expected)} more"
            raise RolloutMismatch(
                f"vLLM took {len(expected) - len(missing)} of {len(expected)} tensors, {what}; its "
                "weights are incomplete, or a mixture"
            )
        held = self._vllm.sum() if self._sums else None
        if held is None:
            return
        surplus = held - sent.sum
        if self._surplus is None:
            self._surplus = surplus
        if not abs(surplus - self._surplus) <= 1e-11 * sent.magnitude:
            raise RolloutMismatch(
                f"the sum over vLLM's weights is {held!r} after an update, but "
                f"{sent.sum + self._surplus!r} was sent: some of them did not arrive"
            )

    def update_adapter(self, directory: str, version: int) -> SyncReport:
        """Samples with the LoRA adapter in `directory`, as PEFT saves it, over the weights held.

        vLLM is asked for it under a new id each time: under an old one it would go on with the old
        files, silently. A later `update_weights` ends it.

        Raises:
            BackendUnavailable: The engine was made without `max_lora_rank`.
            FileNotFoundError, ValueError: No adapter there, or one of a higher rank.
            RuntimeError: The engine has no complete weights below it.
        """
        if self._max_lora_rank is None:
            raise BackendUnavailable(
                "this engine serves no adapters; make it with max_lora_rank, at least the rank "
                "of yours"
            )
        started = time.perf_counter()
        rank = json.loads((Path(directory) / "adapter_config.json").read_text())["r"]
        if rank > self._max_lora_rank:
            raise ValueError(
                f"the adapter in {directory} has rank {rank}, but max_lora_rank = "
                f"{self._max_lora_rank}; raise it"
            )
        with safe_open(Path(directory) / "adapter_model.safetensors", "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]
        self._check_open()
        self._check_complete()
        if self._asleep:  # what vLLM copies the adapter into is asleep with the weights
            self._vllm.wake("weights")
        self._vllm.load_adapter(self._adapters + 1, directory)
        self._vllm.forget()
        if self._asleep:
            self._vllm.wake("kv_cache")
        self._asleep = False
        self._adapters += 1
        self._adapter, self.weight_version = (self._adapters, directory), version
        return SyncReport(version, len(sizes), sum(sizes), time.perf_counter() - started)

    def release_memory(self) -> None:
        """Sleeps, on a GPU, at the configured level."""
        if self._sleep_level and not self._asleep:
            self._vllm.sleep(self._sleep_level)
            self._asleep, self._complete = True, self._complete and self._sleep_level == 1

    def restore_memory(self) -> None:
        """Wakes up, if asleep."""
        if self._asleep:
            self._vllm.wake("weights")
            self._vllm.wake("kv_cache")
            self._vllm.forget()
            self._asleep = False

    def close(self) -> None:
        """Ends vLLM; a second call does nothing."""
        self._end()


class _Counted:
    """The weights of a source, to be taken once, and what was taken.

    Attributes:
        names: In the checkpoint.
        tensors, bytes: So many.
        sum, magnitude: Of all elements as `dtype` and of their absolute values, if there is one.
    """

    def __init__(self, source: WeightSource, dtype: torch.dtype | None) -> None:
        self._items, self._dtype, self.names = iter(source), dtype, set[str]()
        self.tensors, self.bytes, self.sum, self.magnitude = 0, 0, 0.0, 0.0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._items:
            self.names.add(name)
            self.tensors, self.bytes = self.tensors + 1, self.bytes + tensor.nbytes
            if self._dtype is not None:
                cast = tensor.to(self._dtype)
                self.sum += sum_fp64(cast)
                self.magnitude += sum_fp64(cast, absolute=True)
            yield name, tensor
