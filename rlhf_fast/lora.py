"""LoRA: adapters of peft over a frozen model, made, loaded, copied and saved.

peft is imported where a program or its configuration asks for an adapter, and nowhere else.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_fast._adapter_files import (
    ADAPTER,
    check_weights,
    layer_left_out,
    make_base_absolute,
    read_fields,
)
from rlhf_fast._adapters import (
    adapter_parameters,
    is_idle,
    is_peft,
    lora_layers,
)
from rlhf_fast.config import ConfigError, Strict

_NO_NAME = (
    "the model below the adapter has no name: it was not loaded, or a trainer without run_dir has "
    "trained it whole; the adapter is saved, but no loader can find its base: save the base, and "
    f"put its folder under base_model_name_or_path of {ADAPTER}"
)
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


def import_peft() -> Any:
    """The module peft, or a `ConfigError` that says how to get it."""
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
        ConfigError: peft is missing, or refuses: `model` has none of the target modules, say.
    """
    fields, peft = config.model_dump(), import_peft()
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=fields["r"],
                lora_alpha=fields["alpha"],
                lora_dropout=fields["dropout"],
                target_modules=fields["target_modules"],
                use_rslora=fields["use_rslora"],
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        if "arget modules" not in str(error):
            raise ConfigError(f"peft refuses {config!r}: {error}") from error
        leaves = {name.rsplit(".")[-1] for name, m in model.named_modules() if hasattr(m, "weight")}
        raise ConfigError(
            f"LoraConfig.target_modules = {config.target_modules!r}: {error} This "
            f"{type(model).__name__} has {', '.join(sorted(leaves))}"
        ) from error


def load_adapter(
    folder: str | Path, dtype: torch.dtype | str, kind: Any = AutoModelForCausalLM
) -> Any:
    """The `PeftModel` that was saved in `folder`, trainable, over its base in `dtype`.

    Args:
        folder: Of the adapter.
        dtype: Of the base, below adapters alone: with biases or whole modules that are trained it
            is fp32, as they are. "auto" for that in which it was saved.
        kind: Which class of transformers loads the base.

    Raises:
        ConfigError: peft is missing.
        ValueError: The base is not known, cannot be loaded, or is not the adapter's.
    """
    peft = import_peft()
    read_fields(folder)
    check_weights(folder)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"peft cannot read {Path(folder) / ADAPTER}: {error!r}") from error
    base, revision = config.base_model_name_or_path, config.revision
    whole = getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none"
    if whole and dtype != "auto":
        dtype = torch.float32  # layers in two precisions compute under autocast alone
    remedy = (
        f"put the base model's name or folder under base_model_name_or_path of {ADAPTER}, or load "
        "it yourself and pass peft.PeftModel.from_pretrained(base, folder, is_trainable=True)"
    )
    if not base:
        raise ValueError(f"the adapter in {str(folder)!r} does not name its base model; {remedy}")
    try:
        model = kind.from_pretrained(base, dtype=dtype, revision=revision or "main")
    except OSError as error:
        raise ValueError(
            f"the base model {base!r} of the adapter in {str(folder)!r} cannot be loaded "
            f"({error}); {remedy}"
        ) from error
    left = layer_left_out(model, config)
    # As PeftModel.from_pretrained, which only warns of what is missing, and not of what is left.
    config.inference_mode = False
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    model = peft.get_peft_model(model, config)
    try:
        found = model.load_adapter(folder, "default", is_trainable=True, key_mapping=renamed)
        differ = [f"{key} is not in its file" for key in found.missing_keys]
        differ += [f"there is no place for {key}" for key in found.unexpected_keys]
        differ += [f"it is of all linear layers, but not of {left}"] if left else []
    except (KeyError, RuntimeError) as error:  # a whole module is missing, or of another shape
        differ = [str(error)]
    except SafetensorError as error:
        raise ValueError(f"the weights of the adapter in {str(folder)!r}: {error}") from error
    if differ:
        raise ValueError(
            f"the adapter in {str(folder)!r} does not fit its base model {base!r}: {differ[0]}; "
            f"{remedy}"
        )
    return model


def own_copy(module: _Module) -> _Module:
    """A trainable copy of `module`.

    A copy of an adapted one has adapters of its own over the same frozen tensors, which are not
    copied; anything else is copied and trained whole.
    """
    if not has_adapters(module):
        return copy.deepcopy(module).requires_grad_(True)
    copied = _over_the_same(module)
    if not any(p.requires_grad for p in copied.parameters()):  # one for use only, as rewards are
        for parameter in adapter_parameters(copied):
            parameter.requires_grad_(True)
    return copied


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
    # What deepcopy finds in its memo it takes for copied. Adapters may be frozen, too.
    own = {id(p) for p in adapter_parameters(module)}
    below = (p for p in module.parameters() if not p.requires_grad and id(p) not in own)
    return copy.deepcopy(module, {id(p): p for p in below})


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


def _embeddings_differ(model: Any) -> bool:
    """Whether the base on disk cannot give the embeddings below the adapter, as far as known here.

    peft would ask the Hub at every call.
    """
    inner = model.get_base_model()
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    if any(end is not None and has_adapters(end) for end in ends):
        return True  # as peft does
    try:
        saved = AutoConfig.from_pretrained(inner.config.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    sizes = [getattr(c.get_text_config(), "vocab_size", None) for c in (saved, inner.config)]
    return sizes[0] != sizes[1]


def save_model(model: Any, folder: str | Path, *, embeddings: bool | None = None) -> None:
    """Writes `model` as transformers does; of a `PeftModel` its active adapter, as peft does.

    Args:
        model: The model.
        folder: For it.
        embeddings: Write those below the adapter too; None for where the base on disk has others.
    """
    if not is_peft(model):
        model.save_pretrained(folder)
        return
    (name,) = model.active_adapters
    make_base_absolute(model)
    if embeddings is None:
        named = model.peft_config[name].base_model_name_or_path
        if not (named or model.get_base_model().name_or_path):
            warnings.warn(_NO_NAME, stacklevel=3)
        embeddings = _embeddings_differ(model)
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=embeddings)
    if name != "default":  # peft puts it one folder deeper, where none of its loaders looks
        for file in (Path(folder) / name).iterdir():
            file.replace(Path(folder) / file.name)
        (Path(folder) / name).rmdir()
