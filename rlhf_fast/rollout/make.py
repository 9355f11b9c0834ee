"""Which engine samples from a model."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from torch import nn

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.rollout._modules import find_causal_lm
from rlhf_fast.rollout.config import RolloutConfig
from rlhf_fast.rollout.engine import RolloutEngine
from rlhf_fast.rollout.hf import HFEngine
from rlhf_fast.rollout.vllm import VLLMEngine
from rlhf_fast.rollout.weights import WeightsError

logger = logging.getLogger("rlhf_fast.rollout")


def make_engine(
    model: nn.Module,
    tokenizer: Any,
    rollout: str | dict[str, Any] | RolloutConfig = "auto",
    *,
    max_length: int | None = None,
) -> RolloutEngine:
    """The engine that `rollout` names, with the weights of `model`.

    "auto" is vLLM where it is installed, serves the model and its device, and all its weights can
    be handed over; else `HFEngine`. Why it is not vLLM is logged to "rlhf_fast.rollout".

    Args:
        model: The policy, a causal language model or what wraps it.
        tokenizer: Its tokenizer.
        rollout: "auto", "hf", "vllm", a `RolloutConfig` or its fields.
        max_length: Tokens of prompt and completion at most; None for the model's context.

    Raises:
        BackendUnavailable: vLLM is named and cannot run.
        ConfigError, ValueError: A field that is out of range, or that vLLM refuses.
    """
    config = RolloutConfig.of(rollout)
    if config.engine != "hf":
        try:
            return VLLMEngine(model, tokenizer, config, max_length=max_length)
        except (BackendUnavailable, WeightsError) as error:
            if config.engine == "vllm":
                raise
            # Nobody misses what is not installed.
            level = logging.WARNING if find_spec("vllm") else logging.INFO
            logger.log(level, "rollouts with transformers, not vLLM: %s", error)
    return HFEngine(find_causal_lm(model), tokenizer)
