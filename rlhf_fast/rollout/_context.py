"""A batch of sequences in a causal language model, one token longer at each step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf_fast.data import pad
from rlhf_fast.models import model_inputs

CACHE_ARGUMENTS = ("past_key_values", "cache_params")


class Route(NamedTuple):
    """How a model is led through a completion.

    Attributes:
        cached: Keys, values and states are kept; else the whole sequence is computed at each step.
        padded: Prompts of any lengths share a batch; else those of one length do.
    """

    cached: bool
    padded: bool


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room ahead, so that a step copies its own keys and values alone.

    `keys` and `values` are views of the part in use.

    Args:
        limit: Tokens at most.
    """

    is_initialized: bool

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._rooms: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
            return key_states, value_states
        old, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._rooms or end > self._rooms[0].shape[-2]:
            self._move(slice(None), end)
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., old:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def _move(self, rows: Tensor | slice, length: int) -> None:
        """Takes new memory for `length` tokens and some more, and copies `rows` into it."""
        size, rooms = max(length, min(self._limit, length + max(64, length // 2))), []
        for kept in (self.keys, self.values):
            kept = kept[rows]
            room = kept.new_empty(*kept.shape[:-2], size, kept.shape[-1])
            room[..., : kept.shape[-2], :] = kept
            rooms.append(room)
        self._rooms = rooms
        self.keys, self.values = (r[..., : kept.shape[-2], :] for r in rooms)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._move(beam_idx.to(self.keys.device), self.keys.shape[-2])


def plain_inputs(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> dict[str, Any]:
    """Keyword arguments for `tokens`, on the model's device; `mask` lies on the CPU.

    Without padding there is no mask among them: attention then has faster kernels, and no mask is
    looked into, which would stall a GPU's stream.
    """
    tokens = tokens.to(model.device)
    if mask.all():
        return {"input_ids": tokens, "use_cache": False}
    return model_inputs(model, tokens, mask.to(model.device))


class Context(Protocol):
    """The sequences of a batch so far.

    Attributes:
        logits: `[B, V]`, of the tokens to come next.
    """

    logits: Tensor

    def append(self, tokens: Tensor) -> None:
        """A further token `[B]` int64 of each row."""
        ...

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows `[K]` int64, in their order; a row may come repeatedly."""
        ...


class _Cached:
    """A `Context` in the model's cache; `prompts` are padded on the left."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, room: int
    ) -> None:
        taken = inspect.signature(model.forward).parameters
        names = [name for name in CACHE_ARGUMENTS if name in taken]
        if not names:
            raise TypeError(f"the forward of {type(model).__name__} takes no cache")
        tokens, mask = pad(prompts, pad_id, side="left")
        limit = tokens.shape[1] + room
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        cache.layers = [
            GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
        self._model, self._cache, self._width = model, cache, tokens.shape[1]
        self._fixed = {names[0]: cache, "use_cache": True}
        if "logits_to_keep" in taken:
            self._fixed["logits_to_keep"] = 1
        inputs = plain_inputs(model, tokens, mask)
        # [B, P + room], or None where nothing is padded.
        self._mask = inputs.get("attention_mask")
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, room), value=1)
        # [B], of the tokens to come next. Not every model counts what its cache holds.
        self._positions = mask.sum(1).to(model.device) if "position_ids" in taken else None
        self._forward(inputs)

    def _forward(self, inputs: dict[str, Any]) -> None:
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[:, : self._width]
        self.logits = self._model(**inputs | self._fixed).logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        inputs = {"input_ids": tokens[:, None].to(self.logits.device)}
        self._width += 1
        if self._positions is not None:
            inputs["position_ids"] = self._positions[:, None]
            self._positions = self._positions + 1
        self._forward(inputs)

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.logits.device)
        # Of a cache's ways to pick rows this alone is there for every kind of layer.
        self._cache.reorder_cache(rows)
        self.logits = self.logits[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]
        if self._positions is not None:
            self._positions = self._positions[rows]


class _Recomputed:
    """A `Context` for models without a cache that we know: the whole sequence at each step."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, room: int
    ) -> None:
        tokens, mask = pad(prompts, pad_id, side="left")
        self._model, self._tokens, self._mask = model, tokens.to(model.device), mask
        self._forward()

    def _forward(self) -> None:
        self.logits = self._model(**plain_inputs(self._model, self._tokens, self._mask)).logits[
            :, -1
        ]

    def append(self, tokens: Tensor) -> None:
        self._tokens = torch.cat([self._tokens, tokens[:, None].to(self._tokens.device)], dim=1)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        self._forward()

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self._tokens.device)
        self._tokens, self._mask = self._tokens[rows], self._mask[rows.cpu()]
        self.logits = self.logits[rows]


def begin(
    model: PreTrainedModel,
    route: Route,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    room: int,
) -> Context:
    """A context of `prompts`, with room for so many more tokens; equal prompts are computed once.

    A route that is not padded takes prompts of one length only.
    """
    distinct = {tuple(prompt): None for prompt in prompts}
    places = {prompt: i for i, prompt in enumerate(distinct)}
    kind = _Cached if route.cached else _Recomputed
    context: Context = kind(model, list(distinct), pad_id, room)
    if len(places) < len(prompts):
        order = torch.tensor([places[tuple(prompt)] for prompt in prompts])
        context.select(order)
    return context
