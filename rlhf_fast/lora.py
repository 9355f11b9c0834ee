"""LoRA: adapters of peft over a frozen model, made, loaded, copied and saved.

peft is imported where a program or its configuration asks for an adapter, and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import Field
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fast._adapters import (
    check_adapters,
    check_layers,
    is_idle,
    is_peft,
    lora_layers,
)
from rlhf_fast.config import ConfigError, Strict

ADAPTER = "adapter_config.json"
_Module = TypeVar("_Module", bound=nn.Module)


class LoraConfig(Strict):
    """Low-rank adapters (Hu et al. 2021): W x + scale * B A x, with W frozen.

    `peft.get_peft_model` makes them; for what is not here call it yourself, and pass its model.
    """

    r: int = Field(16, ge=1, description="rank of the update of each matrix (TRL)")
    alpha: int = Field(32, ge=1, description="scale = alpha / r (TRL: 32)")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of what goes into A, in SFT; elsewhere off (peft; TRL: .05)"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="names of the layers that are adapted; all-linear: every linear layer but the "
        "head (Dettmers et al. 2023; verl)",
    )
    use_rslora: bool = Field(
        False, description="scale = alpha / sqrt(r) (Kalajdzievski 2023; peft, TRL: no)"
    )

    @classmethod
    def of(cls, lora: int | dict[str, Any] | LoraConfig | None) -> Self | None:
        """From a configuration, its fields, or a rank; None stays None."""
        if lora is None or isinstance(lora, cls):
            return lora
        fields = {"r": lora} if isinstance(lora, int) and not isinstance(lora, bool) else lora
        if not isinstance(fields, dict):
            raise TypeError(
                f"lora is {lora!r}; give a rank, a mapping or an rlhf_fast.LoraConfig (one of peft "
                "goes to peft.get_peft_model, whose model the trainers take)"
            )
        return cls(**fields)


def language_model(model: Any) -> Any:
    """The language model in a `PeftModel`, whose layers are adapted in place; others as they are.

    With LoRA it computes what its wrapper does, and it alone has trunk, head and config where
    transformers puts them.
    """
    return model.get_base_model() if is_peft(model) else model


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"LoRA needs peft, which cannot be imported ({error}); "
            "`pip install 'rlhf-fast[lora]'` brings it"
        ) from error
    return peft


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> Any:
    """A `PeftModel` over `model`, which is frozen and adapted in place.

    Raises:
        ConfigError: peft is missing, or `model` has none of the target modules.
    """
    fields = config.model_dump()
    try:
        return _peft().get_peft_model(
            model,
            _peft().LoraConfig(
                r=fields["r"],
                lora_alpha=fields["alpha"],
                lora_dropout=fields["dropout"],
                target_modules=fields["target_modules"],
                use_rslora=fields["use_rslora"],
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        leaves = {name.rsplit(".")[-1] for name, m in model.named_modules() if hasattr(m, "weight")}
        raise ConfigError(
            f"LoraConfig.target_modules = {config.target_modules!r}: {error} This "
            f"{type(model).__name__} has {', '.join(sorted(leaves))}"
        ) from error


def load_adapter(folder: str | Path, dtype: torch.dtype | str) -> Any:
    """The `PeftModel` that was saved in `folder`, trainable, over its base in `dtype`.

    Raises:
        ConfigError: peft is missing.
        ValueError: The base is not known, or cannot be loaded.
    """
    peft = _peft()
    base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    remedy = (
        f"put the base model's name or folder under base_model_name_or_path of {ADAPTER}, or load "
        "it yourself and pass peft.PeftModel.from_pretrained(base, folder, is_trainable=True)"
    )
    if not base:
        raise ValueError(f"the adapter in {str(folder)!r} does not name its base model; {remedy}")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"the base model {base!r} of the adapter in {str(folder)!r} cannot be loaded "
            f"({error}); {remedy}"
        ) from error
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def check_peft_model(model: Any) -> None:
    """Raises `ValueError` unless the `PeftModel` can be trained, sent and saved here."""
    check_adapters(model)
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} adapters are active ({', '.join(active)}), and one is trained and "
            "saved; choose it with set_adapter, or merge the others first"
        )
    check_layers(model.get_base_model())
    if any(layer.merged for layer in lora_layers(model)):
        raise ValueError(
            "the adapter is merged into the weights, so it would not be trained; call "
            "unmerge_adapter first"
        )


def own_copy(module: _Module) -> _Module:
    """A trainable copy of `module`.

    A copy of an adapted one has adapters of its own over the same frozen tensors, which are not
    copied; anything else is copied and trained whole.
    """
    if not has_adapters(module):
        return copy.deepcopy(module).requires_grad_(True)
    return _over_the_same(module)


def frozen_copy(module: _Module) -> _Module:
    """A copy of `module` that stays as `module` is now, over the same frozen tensors if adapted.

    Adapters that add nothing yet are left out of its computation.
    """
    if not has_adapters(module):
        return copy.deepcopy(module).requires_grad_(False).eval()
    copied = _over_the_same(module).requires_grad_(False).eval()
    for layer in lora_layers(copied):
        if is_idle(layer):
            layer.enable_adapters(False)
    return copied


def has_adapters(module: nn.Module) -> bool:
    """Whether there are layers of peft in `module`."""
    return any(True for _ in lora_layers(module))


def _over_the_same(module: _Module) -> _Module:
    # What deepcopy finds in its memo it takes for copied.
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The `PeftModel` without its adapters; what was trained before is so afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def save_model(model: Any, folder: str | Path) -> None:
    """Writes `model` as transformers does; of a `PeftModel` its active adapter, as peft does."""
    if not is_peft(model):
        model.save_pretrained(folder)
        return
    (name,) = model.active_adapters
    model.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # peft puts it one folder deeper, where none of its loaders looks
        for file in (Path(folder) / name).iterdir():
            file.replace(Path(folder) / file.name)
        (Path(folder) / name).rmdir()
