"""What adapters of peft are in a model, and what they do to the weights that they adapt.

peft is no dependency: a model can hold its modules only where the program has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights


class WeightsError(ValueError):
    """Another engine cannot be given these weights whole and unchanged."""


def full(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of a sharded one: then every rank of its mesh takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _imported() -> bool:
    return sys.modules.get("peft") is not None


def is_peft(model: Any) -> bool:
    """Whether `model` is a `peft.PeftModel`."""
    return _imported() and isinstance(model, sys.modules["peft"].PeftModel)


def lora_layers(root: nn.Module) -> Iterator[Any]:
    """peft's layers in `root`, of whatever kind."""
    if _imported():
        from peft.tuners.tuners_utils import BaseTunerLayer

        yield from (module for module in root.modules() if isinstance(module, BaseTunerLayer))


def adapter_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """What the active adapters in `root` train: their factors, and copies of whole modules."""
    if not _imported():
        return
    from peft.utils import ModulesToSaveWrapper

    for layer in lora_layers(root):
        for parts in (getattr(layer, name) for name in layer.adapter_layer_names):
            for name in set(layer.active_adapters) & set(parts.keys()):
                part = parts[name]
                yield from [part] if isinstance(part, nn.Parameter) else part.parameters()
    for module in root.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name in set(module.active_adapters) & set(module.modules_to_save.keys()):
                yield from module.modules_to_save[name].parameters()


def check_adapters(root: nn.Module) -> None:
    """Raises `WeightsError` if `root` holds an adapter that is not LoRA, active or not."""
    if not _imported():
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    for module in root.modules():
        # Those that learn prompts stand beside the language model and leave no trace in it.
        if isinstance(module, PeftModel | BaseTuner):
            for name, config in module.peft_config.items():
                if config.peft_type != "LORA":
                    raise WeightsError(
                        f"the adapter {name!r} is of type {config.peft_type}: only LoRA can be "
                        "folded into the weights that are sent; use LoRA, or merge it first"
                    )


def adapted(module: Any) -> tuple[nn.Module, Any]:
    """The module whose weights `module` computes with, and the LoRA layer that adds to them.

    Returns:
        `module` and None for what is not peft's; the copy that is in force for a module of
        `modules_to_save`; the layer below and `module` for a LoRA layer.

    Raises:
        WeightsError: The effect of `module` is not a sum with the weights below.
    """
    if not type(module).__module__.startswith("peft."):
        return module, None
    from peft.tuners import lora
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        active, copies = module.active_adapters, module.modules_to_save
        trained = bool(active) and all(name in copies for name in active)
        in_force = trained and not module.disable_adapters
        return copies[active[0]] if in_force else module.original_module, None
    # Exact types: layers of quantised models and further variants derive from them.
    if type(module) not in (lora.Linear, lora.Embedding):
        raise WeightsError(
            f"{type(module).__module__}.{type(module).__name__} is not supported: what it adds to "
            "the weights is not known; use plain LoRA on Linear and Embedding layers, or merge it "
            "first"
        )
    for name, _ in _in_force(module):
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None or module.use_dora.get(name):
            kind = "DoRA" if module.use_dora.get(name) else type(variant).__name__
            raise WeightsError(
                f"the adapter {name!r} is a variant of LoRA ({kind}) whose effect is not W + BA; "
                "use plain LoRA, or merge it first"
            )
        if getattr(module, "lora_bias", {}).get(name) and module.base_layer.bias is None:
            raise WeightsError(
                f"the adapter {name!r} has a bias (lora_bias) on a layer that has none, so no "
                "weight of the model can hold it; train it without lora_bias"
            )
    return module.base_layer, module


def check_layers(root: nn.Module) -> None:
    """Raises `WeightsError` unless all that peft did to `root` is plain LoRA (see `adapted`)."""
    inner, _ = adapted(root)
    for module in root.children() if inner is root else (inner,):
        check_layers(module)


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
    start = str(model.peft_config[active[0]].init_lora_weights)
    if start.startswith(_CHANGE_BASE):
        raise ValueError(
            f"init_lora_weights = {start!r} changes the weights below the adapter, so what is "
            "saved and sent would be another model over the base on disk; start from plain "
            "init_lora_weights=True, or convert it first (peft's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if any(layer.merged for layer in lora_layers(model)):
        raise ValueError(
            "the adapter is merged into the weights, so it would not be trained; call "
            "unmerge_adapter first"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_saved(name, model.peft_config[active[0]].bias):
            raise ValueError(
                f"{name} requires a gradient beside the adapter, so it would be trained, but not "
                "saved with it; freeze it (requires_grad_(False)), or use modules_to_save of "
                "peft.LoraConfig"
            )


def _is_saved(name: str, bias: str) -> bool:
    """Whether peft saves the parameter `name` with an adapter that has this `bias`."""
    if "lora_" in name or ".modules_to_save." in name:
        return True
    # Of "lora_only" the biases that it trains are those of adapted layers.
    return bias == "all" and "bias" in name or bias == "lora_only" and "base_layer.bias" in name


def is_idle(layer: Any) -> bool:
    """Whether a LoRA layer adds nothing to what the layer below gives: one of its factors is 0."""
    for name, _ in _in_force(layer):
        if name in layer.lora_A:
            factors = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        else:
            factors = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        bias = _change(layer, name, "bias")
        if all(bool(x.any()) for x in factors) or (bias is not None and bool(bias.any())):
            return False
    return True


def _in_force(layer: Any) -> Iterator[tuple[str, int]]:
    """Adapters that `layer` would still add (1) to the weight that it stores, or take off (-1)."""
    if layer.disable_adapters:
        # peft takes merged adapters off in its next forward pass.
        names, sign = layer.merged_adapters, -1
    else:
        # Once one is merged peft computes with the stored weight alone.
        names, sign = [] if layer.merged else layer.active_adapters, 1
    yield from ((n, sign) for n in names if n in layer.lora_A or n in layer.lora_embedding_A)


def _change(layer: Any, adapter: str, name: str) -> Tensor | None:
    if name == "weight":
        return layer.get_delta_weight(adapter)
    if name == "bias" and getattr(layer, "lora_bias", {}).get(adapter):
        return layer.lora_B[adapter].bias * layer.scaling[adapter]
    return None


def changes(layer: Any, name: str) -> Iterator[Tensor]:
    """What the adapters in force add to `name` of the layer below; whole tensors."""
    for adapter, sign in _in_force(layer):
        change = _change(layer, adapter, name)
        if change is not None:
            yield sign * full(change)


def is_changed(layer: Any, name: str) -> bool:
    """Whether an adapter in force adds to `name` of the layer below."""
    return any(
        name == "weight" or getattr(layer, "lora_bias", {}).get(adapter)
        for adapter, _ in _in_force(layer)
    )


def takes_adapter_off_on_error(start: Callable[..., None]) -> Callable[..., None]:
    """Decorates the `__init__` of a trainer that adapts a model in place: if it fails, undoes it.

    The model that it was given can then be given again.
    """

    @wraps(start)
    def guarded(self: Any, *args: Any, **options: Any) -> None:
        given = [x for x in (*args, *options.values()) if isinstance(x, nn.Module)]
        trained = [p for module in given for p in module.parameters() if p.requires_grad]
        try:
            start(self, *args, **options)
        except BaseException:
            model: Any = getattr(self, "model", None)
            if options.get("lora") is not None and is_peft(model):
                model.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
            raise

    return guarded
