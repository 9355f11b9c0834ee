"""The folder of an adapter: what it says of its base, and whether that is the base at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast._adapters import is_peft, lora_layers

ADAPTER = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def read_fields(folder: str | Path) -> dict[str, Any]:
    """What the configuration of the adapter in `folder` says.

    Raises:
        ValueError: It is damaged.
    """
    file = Path(folder) / ADAPTER
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); save the adapter anew") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds {fields!r} and no configuration; save the adapter anew")
    return fields


def check_weights(folder: str | Path) -> None:
    """Raises `ValueError` unless there are weights in `folder`; peft would ask the Hub for them."""
    if not any((Path(folder) / name).exists() for name in _WEIGHTS):
        raise ValueError(
            f"{str(folder)!r} holds {ADAPTER}, but no weights ({' or '.join(_WEIGHTS)}); copy them "
            "too, or save the adapter anew"
        )


def layer_left_out(base: PreTrainedModel, config: Any) -> str | None:
    """A linear layer of `base` below which an adapter of all linear layers ends, if there is one.

    peft saves "all-linear" as the names of the layers, so over a deeper base it would load, and
    leave the layers that are too many as they are.
    """
    head, targets = base.get_output_embeddings(), config.target_modules
    linear = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if isinstance(targets, str) or not targets or not linear.issuperset(targets):
        return None  # patterns and parts of names, which mean every layer
    left = {name: _number(name) for name in sorted(linear.difference(targets))}
    last = max(map(_number, targets))
    return min(left, key=left.__getitem__) if left and min(left.values()) > last >= 0 else None


def _number(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def make_base_absolute(model: Any) -> None:
    """Lets a `PeftModel` name the folder of its base so that it is found from everywhere."""
    for config in model.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).absolute())


def name_weights(module: nn.Module, folder: str | Path = "") -> None:
    """Says in which folder the weights of a module are that is trained whole; "" for none.

    peft takes the name of a model for the base of the adapters that it puts on it, and models keep
    the name by which they were loaded. That of the configuration stays, since the tokenizer does.
    Below adapters the weights stay, and their name with them.
    """
    if any(True for _ in lora_layers(module)):
        return
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.name_or_path = str(Path(folder).absolute()) if folder else ""


def check_mergeable(model: Any) -> None:
    """Raises `ValueError` if one matrix cannot hold what the `PeftModel` computes with it."""
    assert is_peft(model)
    inner = model.get_base_model()
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    layers = set(lora_layers(model))
    stored = [end.base_layer if end in layers else end for end in ends if end is not None]
    if len({id(end.weight) for end in stored}) < len(stored) and layers.intersection(ends):
        raise ValueError(
            "embedding and head of this model are one tensor (tie_word_embeddings), and an adapter "
            "adds to one of them, or to each in its own way: merged, it would change both; train "
            "over a base that was saved untied, with tie_word_embeddings=False, or train them "
            "whole (peft's modules_to_save with ensure_weight_tying=True)"
        )
