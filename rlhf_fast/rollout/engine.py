"""What a rollout engine is: token ids in, token ids and log-probs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from rlhf_fast.data import Rollout


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_new_tokens: Tokens a completion at most.
        temperature: Divides the logits, before `top_k` and `top_p`.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this much mass; 1 keeps all.
        ignore_eos: Sample `max_new_tokens` tokens whatever they are.
        stop_token_ids: Tokens that end a completion, beside EOS.
        seed: Same seed, same prompts, same weights: same completions. None uses torch's
            global generator.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "greater than 0"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not good:
                raise ValueError(f"Sampling.{name} = {getattr(self, name)}: must be {expected}")


class RolloutEngine(Protocol):
    """Samples completions with the current weights of the policy being trained."""

    weight_version: int

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """One completion for each prompt (token ids), in order; repeat a prompt for more."""
        ...

    def update_weights(self, version: int) -> None:
        """Called after each update of the policy, before the next `generate`."""
        ...
