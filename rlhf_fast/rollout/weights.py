"""A training model's weights under the names of its Hugging Face checkpoint.

An engine that is sent an incomplete or misnamed set of weights may generate from a mixture of old
and new ones without a word. So what is sent is held against a manifest that does not come from the
model in training but from a pristine one of its class and config, each time and before anything is
sent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_fast._adapters import WeightsError, changes, check_adapters, full, is_changed
from rlhf_fast.rollout._modules import Stored, find_causal_lm, stored_tensors

__all__ = ["WeightSource", "WeightsError"]

# Heads that libraries attach to a language model; no checkpoint of it has them.
VALUE_HEADS = {"v_head", "value_head", "score"}


def _pristine(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model without memory, as `kind` makes it from `config`."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # others may need a package, a dtype or a download
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:
        raise WeightsError(
            f"{kind.__name__} cannot be built from its config alone, so the weights that an engine "
            f"expects are unknown: {error}"
        ) from error


class _Layout:
    """What a checkpoint of a class and config holds.

    Attributes:
        shapes: Of every parameter and persistent buffer, by its name in the model.
        tied: Names that stand for the tensor of another name, and that other name.
        names: In module order, of what is saved: name in the model -> name in the checkpoint.
        vocabulary: Names in the model of what has a row a token.
    """

    def __init__(self, kind: type[PreTrainedModel], config: Any) -> None:
        model = _pristine(kind, config)
        tensors = {name: stored.tensor for name, stored in stored_tensors(model)}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.rows = model.get_input_embeddings().weight.shape[0]
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        of_tokens = {id(t) for end in ends for t in end.parameters(recurse=False)}
        self.vocabulary = {name for name, tensor in tensors.items() if id(tensor) in of_tokens}
        kept: dict[int, str] = {}
        duplicates = model.all_tied_weights_keys
        for name in sorted(tensors, key=lambda name: name in duplicates):
            kept.setdefault(id(tensors[name]), name)
        self.tied = {
            name: kept[id(tensor)]
            for name, tensor in tensors.items()
            if name in duplicates and kept[id(tensor)] != name
        }
        unsaved = self.tied.keys() | set(model._keys_to_ignore_on_save or ())
        # Copies: two names of one tensor that a checkpoint holds twice are then told apart.
        sent = {name: tensor.detach() for name, tensor in tensors.items() if name not in unsaved}
        # Of tensors that a checkpoint merely calls differently each is still there, itself.
        saved = revert_weight_conversion(model, dict(sent))
        checkpoint = {id(tensor): name for name, tensor in saved.items()}
        if len(saved) != len(sent) or checkpoint.keys() != {id(t) for t in sent.values()}:
            raise WeightsError(
                f"models of type {config.model_type!r} store weights otherwise than their "
                "checkpoints do (transformers fuses experts or projections when it loads them): "
                "sending those to another engine is not supported; generate with HFEngine"
            )
        self.names = {name: checkpoint[id(tensor)] for name, tensor in sent.items()}


class WeightSource:
    """The weights of a causal language model, as another engine would load them from a checkpoint.

    Iterating gives `(name, tensor)`, in the order of the modules, each name of `manifest` exactly
    once, as often as wanted, and the weights as they are then. All is checked before the first
    tensor. Tensors are detached, whole, and made one at a time; those of a model that is not
    sharded share its memory, and none is written to afterwards by this class. LoRA adapters are
    added, in fp32 at least, without merging them into the model.

    With sharded weights (FSDP2, tensor parallelism) each tensor is gathered by a collective: every
    rank must iterate, in step and to the end.

    Args:
        model: A causal language model of transformers, bare or in wrappers: DDP, FSDP2,
            `torch.compile`, checkpointing, peft (LoRA), value heads, `Policy`, `ActorCritic`.
        vocabulary: Send so many rows of the embeddings and the head: the engine then cannot
            sample ids that the tokenizer does not know. All by default.

    Attributes:
        model: The causal language model itself.
        manifest: Names in the checkpoint and shapes, in the order of the modules.

    Raises:
        WeightsError: Here or when iterating: weights are missing, unexpected, wrongly shaped, not
            in memory, quantised or no longer tied as the config says; or a checkpoint cannot
            express what an adapter does.
        ValueError: `vocabulary` is not in [1, rows of the embeddings].
    """

    def __init__(self, model: nn.Module, *, vocabulary: int | None = None) -> None:
        self._root = model
        self.model = find_causal_lm(model)
        # FSDP2 and its like give the model a class of their own, derived from the one wanted.
        mro = type(self.model).__mro__
        kind = next(kind for kind in mro if not kind.__module__.startswith("torch."))
        self._layout = layout = _Layout(kind, self.model.config)
        self._config = copy.deepcopy(self.model.config)
        self._config.architectures = [kind.__name__]
        shapes = layout.shapes
        if vocabulary is not None and vocabulary != layout.rows:
            shapes = self._cut(kind, vocabulary)
        self.manifest = {name: shapes[own] for own, name in layout.names.items()}
        self._checked()

    @property
    def config(self) -> Any:
        """A copy of the model's config, for an engine that is sent these weights."""
        return copy.deepcopy(self._config)

    def _cut(self, kind: type[PreTrainedModel], vocabulary: int) -> dict[str, torch.Size]:
        """Makes the config one of a smaller vocabulary; the shapes that belong to it."""
        if not 1 <= vocabulary < self._layout.rows:
            raise ValueError(
                f"vocabulary = {vocabulary}: must be in [1, {self._layout.rows}], the rows of the "
                "model's embeddings"
            )
        for config in (self._config, self._config.get_text_config()):
            config.vocab_size = vocabulary
            if (getattr(config, "pad_token_id", None) or 0) >= vocabulary:
                config.pad_token_id = None  # an embedding cannot have it any more
        shapes, whole = _Layout(kind, self._config).shapes, self._layout.shapes
        expected = {
            name: torch.Size([vocabulary, *shape[1:]])
            if name in self._layout.vocabulary and shape[0] == self._layout.rows
            else shape
            for name, shape in whole.items()
        }
        if shapes != expected:
            raise WeightsError(
                f"the vocabulary of {kind.__name__} cannot be cut to {vocabulary}: more of it than "
                "the embeddings and the head depends on it; resize the model or the tokenizer"
            )
        return shapes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._stream(self._checked())

    def _stream(self, stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
        for own, name in self._layout.names.items():
            yield name, self._value(own, name, stored.pop(own))

    @torch.no_grad()
    def _value(self, own: str, name: str, stored: Stored) -> Tensor:
        value = full(stored.tensor.detach())
        if stored.lora is not None:
            for change in changes(stored.lora, stored.leaf):
                if change.shape != value.shape:
                    raise WeightsError(
                        f"an adapter's change of {name} is {[*change.shape]}, the weight "
                        f"{[*value.shape]}; adapters that are sharded by hand are not supported"
                    )
                value = value.to(torch.promote_types(value.dtype, torch.float32)) + change
        if value.shape != self._layout.shapes[own]:
            raise WeightsError(
                f"{own} became {[*value.shape]} while the weights were sent, instead of "
                f"{[*self._layout.shapes[own]]}; do not change the model meanwhile, then send all "
                "again"
            )
        return value[: self.manifest[name][0]] if value.ndim else value

    def _checked(self) -> dict[str, Stored]:
        """What to send, by its name in the model; raises `WeightsError` if that is not all."""
        for module in self._root.modules():
            # After a forward pass without backward FSDP2 leaves gathered copies in place of the
            # parameters, in its compute dtype, and never updated.
            if isinstance(module, FSDPModule):
                module.reshard()
        check_adapters(self._root)
        dropped = VALUE_HEADS - {name.split(".")[0] for name in self._layout.shapes}
        stored: dict[str, Stored] = {}
        for name, one in stored_tensors(self.model):
            if name.split(".")[0] in dropped:
                continue
            if name in stored:
                raise WeightsError(f"two tensors are {name} without their wrappers' prefixes")
            _check_readable(name, one.tensor)
            stored[name] = one
        self._compare(stored)
        self._check_ties(stored)
        return stored

    def _compare(self, stored: dict[str, Stored]) -> None:
        expected = self._layout.shapes
        wrong = {
            "missing": [name for name in expected if name not in stored],
            "unexpected": [name for name in stored if name not in expected],
            "wrongly shaped": [
                f"{name} {[*stored[name].tensor.shape]} instead of {[*shape]}"
                for name, shape in expected.items()
                if name in stored and stored[name].tensor.shape != shape
            ],
        }
        if not any(wrong.values()):
            return
        found = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in wrong.items()
            if names
        )
        if any(isinstance(module, FullyShardedDataParallel) for module in self._root.modules()):
            advice = "FSDP1 flattens and shards parameters: use FSDP2 (fully_shard)"
        else:
            advice = (
                "do not add, remove or replace weights of the model, or change its config to "
                "match; wrap it rather than its parts"
            )
        raise WeightsError(
            f"the weights are not those of a {self._config.architectures[0]} with this config, of "
            f"{len(expected)} in all: {found}; {advice}"
        )

    def _check_ties(self, stored: dict[str, Stored]) -> None:
        for name, source in self._layout.tied.items():
            one, other = stored[name], stored[source]
            changed = any(s.lora is not None and is_changed(s.lora, s.leaf) for s in (one, other))
            if changed or not _is_same(one.tensor, other.tensor):
                what = "an adapter changes one of them" if changed else "they are two tensors"
                raise WeightsError(
                    f"by the config {name} and {source} are one tensor, but {what}: an engine "
                    "would use one in place of the other; keep them tied, or untie them with "
                    "tie_word_embeddings=False when the model is loaded"
                )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether both are one piece of memory; shards are compared as objects (they may be empty)."""
    if one is other or isinstance(one, DTensor) or isinstance(other, DTensor):
        return one is other
    return one.is_set_to(other)


def _check_readable(name: str, tensor: Tensor) -> None:
    """Raises `WeightsError` if the values of `tensor` are not in memory, or not numbers."""
    if hasattr(tensor, "ds_id"):
        problem = "partitioned by DeepSpeed ZeRO-3", "use ZeRO-2, or FSDP2"
    elif tensor.is_meta:
        problem = "on the meta device", "keep the model in memory, without offloading"
    elif isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        problem = f"quantised ({tensor.dtype})", "load the model without quantisation"
    elif is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
        problem = f"a {type(tensor).__name__}", "use plain tensors: no quantisation"
    else:
        return
    raise WeightsError(f"{name} is {problem[0]}, so it cannot be sent; {problem[1]}")
