"""All that is known here of vLLM, from 0.20 upward; nothing but `_vllm*` imports it.

What it needs is in `_vllm_fit`, what runs in its worker in `_vllm_worker`, what it changes around
it in `_guards`. Only calls that have kept their meaning since 0.20 are used: `LLM(...)`, `generate`
on token ids, `collective_rpc`, `Worker.reload_weights`, `reset_prefix_cache`, `add_lora`,
`abort_request`, `sleep` and `wake_up`. What a version may lack is asked of it (`EngineArgs`'
fields), never inferred from its number.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.rollout._guards import (
    default_group_kept,
    free_cache,
    gpus,
    in_this_process,
    undisturbed,
)
from rlhf_fast.rollout._vllm_fit import version
from rlhf_fast.rollout._vllm_worker import WeightReceiver
from rlhf_fast.rollout.engine import Progress, Request


class _Bar(tqdm):
    """What vLLM takes for a progress bar; it shows nothing and tells `report`."""

    def __init__(self, *args: Any, report: Progress, **options: Any) -> None:
        self._report = report
        # Enabled, since vLLM divides by the time that it measures.
        super().__init__(*args, **{**options, "file": io.StringIO(), "mininterval": math.inf})

    def update(self, n: float | None = 1) -> bool | None:
        if n:
            self._report(int(n))
        return super().update(n)


_running: list[weakref.ref[Adapter]] = []
"""The adapter that runs, if one does: vLLM's process groups serve one engine a process."""


class Adapter:
    """One `vllm.LLM` in this process, without a tokenizer, with dummy weights at first.

    Args:
        folder: Holds the model's config.json.
        device: Where the model runs.
        arguments: Of `vllm.LLM`; those that this version of vLLM does not know raise.

    Raises:
        BackendUnavailable: vLLM refuses the model, the memory or an argument; or another adapter
            runs; or several processes were started, but torch.distributed is not initialised.
        ValueError: An unknown argument.
    """

    def __init__(self, folder: str, device: torch.device, arguments: dict[str, Any]) -> None:
        import vllm

        known = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
        if unknown := sorted(set(arguments) - known):
            raise ValueError(
                f"vLLM {version()} knows no argument {unknown[0]!r}; leave it out of "
                "rollout.options, or install a newer vLLM"
            )
        self._device, self._closed = device, True
        self._check_alone()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Each process has an engine of its own, on its own device.
            arguments = {"distributed_executor_backend": "external_launcher", **arguments}
        free_cache(device)
        before = torch.distributed.is_initialized()
        try:
            with undisturbed(), in_this_process(), self._eager():
                self.llm = vllm.LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    generation_config="vllm",  # a chat model's own penalties are not the policy
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    worker_extension_cls=f"{WeightReceiver.__module__}.{WeightReceiver.__name__}",
                    **arguments,
                )
        except Exception as error:
            self._end_groups(not before and torch.distributed.is_initialized())
            raise BackendUnavailable(f"vLLM {version()} does not start: {error}") from error
        # On a CPU vLLM 0.20 has a worker in another process, and the group is there.
        self._made_group = not before and torch.distributed.is_initialized()
        self._closed = False
        _running[:] = [weakref.ref(self)]
        self.in_process = self._call("rf_process") == os.getpid()

    def _check_alone(self) -> None:
        gc.collect()  # an engine that nobody holds any more may hang in a cycle
        if any(running() is not None for running in _running):
            raise BackendUnavailable(
                "another vLLM engine runs in this process, and its process groups serve only one; "
                "close() that engine, or the trainer that holds it, first"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
            raise BackendUnavailable(
                "WORLD_SIZE is above 1, but torch.distributed is not initialised; initialise it "
                "before the engine starts, or vLLM makes a group of one process for all"
            )

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """No autocast of the caller's; on a CPU nothing is compiled, which would take long."""
        with torch.autocast(self._device.type, enabled=False):
            if self._device.type == "cpu":
                with torch.compiler.set_stance("force_eager"):
                    yield
            else:
                yield

    def _call(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights and forgets what was computed with the old ones."""
        with self._eager():
            if self.in_process:
                self._call("rf_load", weights)
            else:
                self._load_by_file(weights)
        self.forget()

    def _load_by_file(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # Tensors as arguments of a call do not survive the way to another process.
        tensors = {name: tensor.contiguous().cpu() for name, tensor in weights}
        size = sum(tensor.nbytes for tensor in tensors.values())
        memory = Path("/dev/shm")  # small in many containers
        roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * size
        with tempfile.NamedTemporaryFile(
            suffix=".safetensors", dir=memory if roomy else None
        ) as file:
            save_file(tensors, file.name)
            self._call("rf_load", file.name)

    def sum(self) -> float | None:
        """The fp64 sum over all weights as they are now; None where vLLM holds them repacked."""
        return self._call("rf_sum")

    def forget(self) -> None:
        """Empties the prefix cache, which holds keys and values of old weights.

        Raises:
            RuntimeError: vLLM kept it.
        """
        if self.llm.reset_prefix_cache() is False:
            raise RuntimeError(
                "vLLM could not reset its prefix cache, so prompts would be read with old weights; "
                "are requests of yours still running in this engine?"
            )

    def load_adapter(self, number: int, folder: str) -> None:
        """Reads a LoRA adapter now: left to itself vLLM does so at the next request.

        Raises:
            RuntimeError: vLLM did not take it.
        """
        if not self.llm.llm_engine.add_lora(_lora_request(number, folder)):
            raise RuntimeError(f"vLLM did not load the adapter in {folder}; its log says why")

    def generate(
        self,
        requests: Sequence[Request],
        stops: Sequence[Sequence[int]],
        adapter: tuple[int, str] | None,
        on_progress: Progress | None,
    ) -> list[tuple[list[int], list[float], bool]]:
        """Ids and log-probs of each request's completion, and whether a stop id ended it.

        Args:
            requests: What to sample.
            stops: Ids that end each request's completion.
            adapter: Number and folder of a LoRA adapter that was loaded.
            on_progress: Told of completions as they end.
        """
        try:
            parameters = self._parameters(requests, stops)
        except Exception as error:
            raise ValueError(f"vLLM {version()} refuses this sampling: {error}") from error
        lora = None if adapter is None else _lora_request(*adapter)
        try:
            # Requests have generators of their own; vLLM draws from the global one all the same.
            with self._eager(), torch.random.fork_rng(gpus()):
                outputs = self.llm.generate(
                    [{"prompt_token_ids": list(request.prompt)} for request in requests],
                    parameters,
                    use_tqdm=False if on_progress is None else partial(_Bar, report=on_progress),
                    lora_request=lora,
                )
        except BaseException:
            self._abort()
            raise
        return [_completion(output.outputs[0]) for output in outputs]

    @staticmethod
    def _parameters(requests: Sequence[Request], stops: Sequence[Sequence[int]]) -> list[Any]:
        import vllm

        return [
            vllm.SamplingParams(
                max_tokens=request.sampling.max_new_tokens,
                temperature=request.sampling.temperature,
                top_k=request.sampling.top_k,
                top_p=request.sampling.top_p,
                seed=request.seed,
                stop_token_ids=list(stop),
                ignore_eos=True,  # all that ends a completion stands in stop_token_ids
                logprobs=0,
                detokenize=False,
            )
            for request, stop in zip(requests, stops, strict=True)
        ]

    def _abort(self) -> None:
        """Drops requests that an interrupt left behind: the next ones would be mixed with them."""
        engine = self.llm.llm_engine
        if left := list(engine.output_processor.request_states):
            engine.abort_request(left, internal=True)
        with self._eager():
            while engine.has_unfinished_requests():
                engine.step()
            engine.step()  # the core learns of what was dropped

    def sleep(self, level: int) -> None:
        """Gives the GPU's memory back: 1 keeps the weights on the host, 2 drops them."""
        self.llm.sleep(level=level)

    def wake(self, tag: str) -> None:
        """Takes memory again for "weights" or "kv_cache"."""
        free_cache(self._device)
        self.llm.wake_up(tags=[tag])

    def close(self) -> None:
        """Ends the engine, and its process groups; the default one only if vLLM made it."""
        if self._closed:
            return
        self._closed = True
        _running.clear()
        try:
            with nullcontext() if self._made_group else default_group_kept():
                self.llm.llm_engine.engine_core.shutdown()
        finally:
            self._end_groups(self._made_group)
            del self.llm
            free_cache(self._device)

    def _end_groups(self, made: bool) -> None:
        with nullcontext() if made else default_group_kept():
            from vllm.distributed import parallel_state

            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def _lora_request(number: int, folder: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"v{number}", number, folder)


def _completion(output: Any) -> tuple[list[int], list[float], bool]:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a completion with {output.finish_reason!r} after {len(output.token_ids)} "
            "tokens; its log (VLLM_LOGGING_LEVEL=INFO) says why"
        )
    ids = list(output.token_ids)
    logprobs = [row[token].logprob for token, row in zip(ids, output.logprobs, strict=True)]
    return ids, logprobs, output.finish_reason == "stop"
