"""The tensors of a language model that is wrapped, outside and inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast._adapters import WeightsError, adapted

# Under these names torch.compile, FSDP and activation checkpointing hold what they wrap.
WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Stored(NamedTuple):
    """A parameter or persistent buffer, the LoRA layer that adds to it, its name in its module."""

    tensor: Tensor
    lora: Any
    leaf: str


def find_causal_lm(module: nn.Module) -> PreTrainedModel:
    """The one causal language model in `module`, whatever wraps it.

    Raises:
        WeightsError: There is none, or there are several.
    """
    found = list(dict.fromkeys(_causal_lms(module)))
    if len(found) == 1:
        return found[0]
    kinds = ", ".join(type(model).__name__ for model in found)
    raise WeightsError(
        f"{type(module).__name__} holds {len(found)} causal language models of transformers"
        + (f" ({kinds}); pass the one that is trained" if found else " with a head; pass one")
    )


def _causal_lms(module: nn.Module) -> Iterator[PreTrainedModel]:
    if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
        if module.config.is_encoder_decoder:
            raise WeightsError(
                f"{type(module).__name__} is an encoder-decoder; give a causal language model"
            )
        yield module
        return
    for child in module.children():
        yield from _causal_lms(child)


def stored_tensors(
    module: nn.Module, prefix: str = "", lora: Any = None
) -> Iterator[tuple[str, Stored]]:
    """(name, tensor) of all that the state dict of `module` without its wrappers would hold."""
    inner, layer = adapted(module)
    if inner is not module:
        if lora is not None:
            raise WeightsError(
                f"adapters of peft are stacked at {prefix.rstrip('.')}; merge the inner one first"
            )
        yield from stored_tensors(inner, prefix, layer)
        return
    buffers = module._buffers.keys() - module._non_persistent_buffers_set
    own = module._parameters | {k: v for k, v in module._buffers.items() if k in buffers}
    for name, tensor in own.items():
        if tensor is not None:
            yield prefix + name, Stored(tensor, lora, name)
    for name, child in module._modules.items():
        if name in WRAPPED and child is not None:
            yield from stored_tensors(child, prefix, lora)
        elif child is not None:
            yield from stored_tensors(child, f"{prefix}{name}.")
