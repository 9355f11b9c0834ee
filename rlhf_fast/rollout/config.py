"""Which engine samples, with how much memory, and how its log-probs are checked and corrected."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rlhf_fast.config import Strict


class RolloutConfig(Strict):
    """Rollouts: the engine, its memory, the correction of its log-probs, the probe.

    `auto` takes vLLM where it is installed and can serve the model on its device, else `hf`.
    """

    engine: Literal["auto", "hf", "vllm"] = Field("auto", description="who samples")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="vLLM's weights and activations; auto: as mixed_precision"
    )
    # correction: `ops.importance_weights`
    correction: Literal["token", "sequence", "geometric", "none"] = Field(
        "token", description="level of the importance weights trainer / engine"
    )
    correction_mode: Literal["truncate", "mask"] = Field(
        "truncate", description="weights beyond the bounds: cut back to them, or 0"
    )
    weight_low: float | None = Field(None, ge=0, description="least weight; null: no bound")
    weight_high: float | None = Field(
        2.0, gt=0, description="greatest weight (Yao et al. 2025); null: no bound"
    )
    # probe
    probe_first: int = Field(3, ge=0, description="probe after each of the first updates")
    probe_every: int | None = Field(50, ge=1, description="and after each k-th; null: never")
    probe_tolerance: float | None = Field(
        None,
        gt=0,
        description="nats by which log-probs may differ from the trainer's, on average; null: 2e-4 "
        "in fp32 on a CPU, 5e-3 on a GPU, 0.2 in half precision",
    )
    check_sums: bool = Field(
        True, description="vLLM: compare sums over its weights with what was sent, at each update"
    )
    # vLLM
    max_sequences: int = Field(256, ge=1, description="vLLM: sequences at a time, at most")
    gpu_memory_utilization: float = Field(
        0.4, gt=0, lt=1, description="vLLM: share of the GPU for its weights and KV cache"
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="vLLM: KV cache; null: by that share, on a CPU as much as is needed"
    )
    sleep_level: Literal[0, 1, 2] = Field(
        1, description="vLLM during updates on a GPU: 0 stays, 1 weights to the host, 2 drops them"
    )
    max_lora_rank: int | None = Field(
        None, ge=1, description="vLLM: serve adapters up to this rank; null: none"
    )
    options: dict[str, Any] = Field({}, description="vLLM: further arguments of vllm.LLM")

    @classmethod
    def of(cls, rollout: str | dict[str, Any] | RolloutConfig) -> Self:
        """From a configuration, its fields, or the name of an engine."""
        if isinstance(rollout, cls):
            return rollout
        fields = {"engine": rollout} if isinstance(rollout, str) else rollout
        if not isinstance(fields, dict):
            raise TypeError(
                f"rollout is {rollout!r}; give 'auto', 'hf', 'vllm', a RolloutConfig or its fields"
            )
        return cls(**fields)

    def correction_fields(self) -> dict[str, Any]:
        """What decides how rollouts are weighed."""
        return self.model_dump(
            include={"correction", "correction_mode", "weight_low", "weight_high"}
        )

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        low, high = self.weight_low, self.weight_high
        if low is not None and high is not None and low > high:
            raise ValueError(f"weight_low {low} is above weight_high {high}; exchange them")
        return self
