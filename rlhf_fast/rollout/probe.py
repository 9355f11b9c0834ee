"""Does the engine sample from the policy being trained? A few fresh rollouts tell."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data import Rollout
from rlhf_fast.rollout.engine import RolloutEngine, Sampling

TOLERANCES = {"exact": 2e-4, "single": 5e-3, "half": 0.2}
"""Nats by which log-probs may differ on average.

exact: Both sides multiply in fp32: sound engines are at 1e-7 to 1e-5. single: fp32 on a GPU, where
attention kernels multiply in TF32. half: bf16 or fp16, where sound ones are at up to 0.04. Foreign
or garbled weights are at 1 to 14; old ones at as much as an update changes, which in half
precision may be less than rounding does: what vLLM holds is therefore also checked by its sum.
"""
NOTICEABLE = 0.05
"""Nats on average from which half precision is worth a warning."""


class RolloutMismatch(RuntimeError):
    """The engine samples from another distribution than the trainer's policy."""


class Probe(NamedTuple):
    """How far the engine's log-probs are from the trainer's, in nats, over `tokens` tokens."""

    tokens: int
    max_abs: float
    mean_abs: float


@torch.no_grad()
def probe(
    engine: RolloutEngine,
    score: Callable[[Rollout], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Samples from the whole distribution and compares log-probs with the trainer's.

    Prompts that the engine has seen before its last update show whether it still reads them with
    old weights.

    Args:
        engine: The engine.
        score: The trainer's log-probs `[B, T]` of a rollout's sampled tokens, at `temperature`.
        prompts: Token ids of each.
        max_new_tokens: Tokens a completion.
        temperature: Of sampling.
        seed: Of sampling.
    """
    sampling = Sampling(max_new_tokens, temperature, seed=seed, ignore_eos=True)
    rollout = engine.generate(prompts, sampling)
    assert rollout.logprobs is not None
    difference = (rollout.logprobs - score(rollout))[rollout.completion_mask].abs()
    return Probe(difference.numel(), float(difference.amax()), float(difference.mean()))


def precision(dtypes: Iterable[torch.dtype], device: torch.device) -> str:
    """Which of `TOLERANCES` is to be asked of computations in `dtypes` on `device`."""
    if any(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes):
        return "half"
    return "exact" if device.type == "cpu" else "single"


def check_probe(found: Probe, precision: str, tolerance: float | None, version: int) -> None:
    """Raises `RolloutMismatch` if `found` is beyond `tolerance`.

    Args:
        found: What a probe found.
        precision: Of `TOLERANCES`.
        tolerance: Of the mean, in nats; None for that precision's.
        version: Of the weights, for the message.
    """
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    if not found.mean_abs <= limit:  # NaN is a mismatch, too
        raise RolloutMismatch(
            f"after update {version} the rollout engine's log-probs differ from the trainer's by "
            f"{found.mean_abs:.3g} nats on average and {found.max_abs:.3g} at most, over "
            f"{found.tokens} tokens; {limit:g} on average is allowed (probe_tolerance). The engine "
            "does not sample from the policy being trained: its weights are old or incomplete, or "
            "model and engine compute differently; docs/rollouts.md tells how to find out"
        )
    if precision == "half" and found.mean_abs > NOTICEABLE:
        warnings.warn(
            f"the rollout engine's log-probs differ from the trainer's by {found.mean_abs:.3g} "
            "nats on average, which importance weights must make up for; float32, or the same "
            "precision on both sides, brings them together",
            stacklevel=3,
        )
