"""What a rollout engine is: token ids in, token ids and log-probs out."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from rlhf_fast.data import Rollout

if TYPE_CHECKING:
    from rlhf_fast.rollout.weights import WeightSource

Progress = Callable[[int], None]
"""Called with the number of completions that have ended since the last call."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_new_tokens: Tokens a completion at most.
        temperature: Divides the logits, before `top_k` and `top_p`.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this much mass, among the `top_k`; 1 keeps all.
        n: Completions of each prompt, side by side.
        seed: Same seed, same prompts, same weights: same completions. None uses torch's
            global generator.
        stop_token_ids: Tokens that end a completion, beside EOS.
        ignore_eos: Sample `max_new_tokens` tokens whatever they are.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stops = self.stop_token_ids
        for name, good, expected in (
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number, at least 1"),
            ("temperature", _within(self.temperature, math.inf), "greater than 0, and finite"),
            ("top_k", _whole(self.top_k, 0), "a whole number, 0 (all) or more"),
            ("top_p", _within(self.top_p, 1 + 1e-15), "in (0, 1]"),
            ("n", _whole(self.n, 1), "a whole number, at least 1"),
            (
                "seed",
                self.seed is None or (_whole(self.seed, 0) and self.seed < 2**63),
                "a whole number in [0, 2^63), or None",
            ),
            (
                "stop_token_ids",
                isinstance(stops, tuple | list) and all(_whole(id, None) for id in stops),
                "a tuple of ids",
            ),
        ):
            if not good:
                raise ValueError(f"Sampling.{name} = {getattr(self, name)}: must be {expected}")


def _whole(x: object, least: int | None) -> bool:
    """Whether `x` is an int, numpy's and others' too, of at least `least`."""
    if isinstance(x, bool) or not hasattr(x, "__index__"):
        return False
    return least is None or operator.index(x) >= least


def _within(x: object, end: float) -> bool:
    """Whether `x` is a number in `(0, end)`."""
    return isinstance(x, numbers.Real) and 0 < float(x) < end


class Request(NamedTuple):
    """One completion to sample.

    Attributes:
        prompt: Token ids.
        prompt_index: Number of the prompt in the caller's list.
        sampling: How to sample it.
        seed: Of this completion alone, in `[0, 2^63)`; drawn where `sampling` has none.
    """

    prompt: Sequence[int]
    prompt_index: int
    sampling: Sampling
    seed: int


@dataclasses.dataclass(frozen=True)
class SyncReport:
    """What a weight update moved.

    Attributes:
        version: Of the weights that the engine now samples with.
        tensors: Tensors sent; 0 for an engine that shares the trainer's weights.
        bytes: Of the tensors sent.
        seconds: Wall time.
        probe_max_abs: Nats by which log-probs of a fresh rollout differ from the trainer's at
            most; None where no probe followed.
    """

    version: int
    tensors: int
    bytes: int
    seconds: float
    probe_max_abs: float | None = None


class RolloutEngine(Protocol):
    """Samples completions with the weights of the policy being trained.

    Attributes:
        weight_version: Of the weights that `generate` uses; every rollout carries it.
        dtype: In which it computes.
        source: The weights of its model, for `update_weights`; None for an engine that samples
            from the trainer's own model, with nothing to send.
    """

    weight_version: int

    @property
    def source(self) -> WeightSource | None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        on_progress: Progress | None = None,
    ) -> Rollout:
        """`sampling.n` completions for each prompt (token ids), in order, side by side.

        Args:
            prompts: Token ids of each.
            sampling: For all prompts, or one a prompt. Under a shared `Sampling` each completion
                draws by its place in the batch. Under one of its own a prompt draws the same in any
                batch; give each another seed, or equal prompts get equal completions.
            on_progress: Told of completions as they end.

        Raises:
            ValueError: No prompts, an empty one, an id outside the tokenizer, or a prompt that
                with its `max_new_tokens` is longer than the context.
        """
        ...

    def update_weights(self, source: WeightSource | None, version: int) -> SyncReport:
        """Takes the policy's weights as they are now; called after each update of the policy.

        Args:
            source: The weights, for example `self.source`.
            version: Of these weights.
        """
        ...

    def release_memory(self) -> None:
        """Gives device memory back until `restore_memory` or `update_weights`, where it can."""
        ...

    def restore_memory(self) -> None:
        """Takes the memory again; `generate` and `update_weights` do so by themselves."""
        ...

    def close(self) -> None:
        """Ends the engine and gives all its memory back; twice is once."""
        ...


def requests(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    vocabulary: int,
    context: int | None,
) -> list[Request]:
    """One request a completion, checked; see `RolloutEngine.generate`.

    Args:
        prompts: Token ids of each.
        sampling: For all prompts, or one a prompt.
        vocabulary: Ids are in `[0, vocabulary)`.
        context: Tokens of prompt and completion at most; None for no limit.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts are {type(prompts).__name__}; give a list of lists of token ids")
    if not len(prompts):
        raise ValueError("no prompts to generate from; give at least one")
    shared = isinstance(sampling, Sampling)
    each: Any = [sampling] * len(prompts) if shared else sampling
    if not isinstance(each, list | tuple) or not all(isinstance(how, Sampling) for how in each):
        raise TypeError(f"sampling is {sampling!r}; give a Sampling, or a list of one a prompt")
    if len(each) != len(prompts):
        raise ValueError(
            f"{len(each)} samplings for {len(prompts)} prompts; give one a prompt, or one for all"
        )
    for i, (prompt, how) in enumerate(zip(prompts, each, strict=True)):
        _check(i, prompt, how, vocabulary, context)
    made: list[Request] = []
    seeds = [
        _draw_seed() if how.seed is None else how.seed for how in each[: 1 if shared else None]
    ]
    for i, (prompt, how) in enumerate(zip(prompts, each, strict=True)):
        seed, first = (seeds[0], len(made)) if shared else (seeds[i], 0)
        made += [Request(prompt, i, how, mix(seed, first + j)) for j in range(how.n)]
    return made


def _draw_seed() -> int:
    return int(torch.randint(2**62, ()))


def _check(
    i: int, prompt: Sequence[int], how: Sampling, vocabulary: int, context: int | None
) -> None:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        raise TypeError(f"prompt {i} is {prompt!r}; give a list of token ids")
    if not len(prompt):
        raise ValueError(f"prompt {i} is empty; every prompt needs at least one token")
    for what, ids in (
        ("prompt", prompt),
        ("Sampling.stop_token_ids of prompt", how.stop_token_ids),
    ):
        if wrong := [id for id in ids if not (_whole(id, 0) and id < vocabulary)]:
            raise ValueError(
                f"{what} {i} holds the id {wrong[0]!r}, outside the tokenizer's [0, {vocabulary}); "
                "encode it with this tokenizer"
            )
    if context is not None and len(prompt) + how.max_new_tokens > context:
        raise ValueError(
            f"prompt {i} has {len(prompt)} tokens and asks for {how.max_new_tokens} more, but the "
            f"context is {context}; shorten the prompt or lower max_new_tokens"
        )


def stop_ids(tokenizer: Any, model: PreTrainedModel, sampling: Sampling) -> list[int]:
    """Ids that end a completion, sorted; none where EOS is ignored."""
    if sampling.ignore_eos:
        return []
    # Chat models end their turns with tokens that only their generation config knows.
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *own, *sampling.stop_token_ids})


def mix(seed: int, place: int) -> int:
    """A seed of `[0, 2^63)` for each place: splitmix64 (Steele et al. 2014, OOPSLA)."""
    x = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1
