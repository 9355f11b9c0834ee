"""Checkpoints that all trainers share: written whole or not at all, read back to the bit."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_fast._adapters import adapter_parameters, lora_layers
from rlhf_fast.config import ConfigError
from rlhf_fast.lora import has_adapters
from rlhf_fast.models import sum_fp64
from rlhf_fast.trainers.run import Run

BELOW = "below_adapters.json"
_known_sums: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()

# A tied head is one tensor under two names; accelerate warns at each save that it keeps one.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    found = (folder / "checkpoints").glob("step-*")
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in found)
    return sorted((int(match[1]), path) for match, path in named if match)


def _saved(module: nn.Module) -> set[str]:
    """Names of the trained parameters and the buffers of `module`, one a tensor."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return trained | (module.state_dict().keys() - parameters)


def _leave_out_frozen(
    run: Run, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str
) -> None:
    for module, state in zip(models, weights, strict=False):  # FSDP gives no weights
        if has_adapters(module):
            for name in state.keys() - _saved(module):
                del state[name]
            if run.accelerator.is_main_process:
                (Path(folder) / BELOW).write_text(json.dumps(_below(module)) + "\n")


def _load_trained(models: list[nn.Module], folder: str) -> None:
    """Loads models with adapters, and takes them from those that accelerate is to load."""
    begun = (Path(folder) / BELOW).exists()
    if begun and not any(map(has_adapters, models)):
        raise ValueError("the run was begun with lora (or a PeftModel), and here is no adapter")
    for module in [module for module in models if has_adapters(module)]:
        if not begun:
            raise ValueError("the run trained no LoRA adapter; it was begun without lora")
        state, expected = load_file(Path(folder) / SAFE_WEIGHTS_NAME), _saved(module)
        if differ := sorted(state.keys() ^ expected):
            where = "model" if differ[0] in expected else "checkpoint"
            raise ValueError(f"{differ[0]} is only in the {where}")
        _check_below(json.loads((Path(folder) / BELOW).read_text()), _below(module))
        module.load_state_dict(state, strict=False)
        models.remove(module)


def _sums(module: nn.Module) -> dict[str, float]:
    """Of the frozen weights in force in `module`: computed once, since they stay."""
    if module not in _known_sums:
        idle = (layer for layer in lora_layers(module) if layer.disable_adapters)
        unused = {id(p) for layer in idle for p in adapter_parameters(layer)}
        frozen = [p for p in module.parameters() if not p.requires_grad and id(p) not in unused]
        sums = [sum_fp64(p.detach()) for p in frozen]
        _known_sums[module] = {
            "sum": math.fsum(sums),
            "magnitude": math.fsum(sum_fp64(p.detach(), absolute=True) for p in frozen),
            # Sees layers that changed places.
            "ordered": math.fsum(x * (i + 1) / len(sums) for i, x in enumerate(sums)),
        }
    return _known_sums[module]


def describe_reference(reference: nn.Module) -> dict[str, float]:
    """What a checkpoint keeps of the reference: its frozen adapters are part of it."""
    layers = [layer for layer in lora_layers(reference) if not layer.disable_adapters]
    return {**_sums(reference), "scales": _scales(layers)}


def check_reference(before: dict[str, float] | None, reference: nn.Module) -> None:
    """Raises `ConfigError` unless `reference` is that of the run, as far as that is known."""
    now = describe_reference(reference)
    if before is not None and not (_same_sums(before, now) and _same_scales(before, now)):
        raise ConfigError(
            "the reference is not that of the run, so the KL would be another; pass the ref that "
            "the run was begun with, and where there was none the policy, as it was then"
        )


def _scales(layers: Iterable[Any]) -> float:
    return math.fsum(s for layer in layers for s in layer.scaling.values())


def _same_sums(before: dict[str, Any], now: dict[str, Any]) -> bool:
    tolerance = 1e-11 * before["magnitude"]  # another device rounds otherwise
    sums = (name for name in ("sum", "magnitude", "ordered") if name in before)
    return all(abs(before[name] - now[name]) <= tolerance for name in sums)


def _same_scales(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return math.isclose(before["scales"], now["scales"], rel_tol=1e-9)


def _below(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint of adapters does not hold: the frozen weights, how updates are made."""
    layers = list(lora_layers(module))
    rates = (getattr(x, "p", 0.0) for layer in layers for x in layer.lora_dropout.values())
    return {
        **_sums(module),
        "scales": _scales(layers),
        "r": sorted({r for layer in layers for r in layer.r.values()}),
        "alpha": sorted({a for layer in layers for a in layer.lora_alpha.values()}),
        "dropout": sorted(set(rates)),  # in force: only SFT has any
    }


def _check_below(before: dict[str, Any], now: dict[str, Any]) -> None:
    if not _same_sums(before, now):
        raise ValueError("the frozen weights below the adapter are not those of the run")
    for name in ("r", "alpha", "dropout"):
        if name in before and before[name] != now[name]:
            was, has = (", ".join(map(str, x[name])) for x in (before, now))
            raise ValueError(f"the adapter had {name} = {was} in the run, and now has {has}")
    if not _same_scales(before, now):
        raise ValueError("the adapter is scaled otherwise (alpha, use_rslora) than in the run")


def save(run: Run, state: dict[str, Any], export: Callable[[Path], None]) -> Path | None:
    """Writes `checkpoints/step-<n>` in the run's folder.

    It holds accelerate's state (weights, optimiser, random generators), `state` as JSON, and in
    `model/` what `export` writes there: a folder that `from_pretrained` loads. Of a model with
    adapters the weights are those that are trained: the others come with the model again.

    Returns:
        The folder, or None for a run that writes nothing.
    """
    if run.folder is None:
        return None
    final = run.open_folder() / "checkpoints" / f"step-{run.step}"
    # Renamed when complete: a run that dies while writing leaves no half checkpoint to resume.
    unnamed = final.with_name(final.name + ".partial")
    with run.accelerator.register_save_state_pre_hook(partial(_leave_out_frozen, run)):
        run.accelerator.save_state(str(unnamed))
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        export(unnamed / "model")
        (unnamed / "trainer.json").write_text(json.dumps({"step": run.step, **state}) + "\n")
        if final.exists():
            shutil.rmtree(final)
        unnamed.rename(final)
    run.accelerator.wait_for_everyone()
    return final


def restore(run: Run) -> dict[str, Any]:
    """Loads the newest checkpoint into what the run's accelerator prepared.

    Rows of metrics.jsonl after the checkpoint's step are cut off: those steps run again.

    Returns:
        The `state` that was saved with it.

    Raises:
        ConfigError: There is no checkpoint.
    """
    found = [] if run.folder is None else _steps(run.folder)
    if run.folder is None or not found:
        raise ConfigError(
            f"nothing to resume in {str(run.folder)!r}: it holds no checkpoint; set save_every "
            "in the first run, or start without resume"
        )
    step, folder = found[-1]
    try:
        with run.accelerator.register_load_state_pre_hook(_load_trained):
            run.accelerator.load_state(str(folder))
        state = json.loads((folder / "trainer.json").read_text())
    except Exception as error:
        raise ConfigError(
            f"{folder} cannot be resumed: {type(error).__name__}: {str(error)[:300]}. Either "
            "model or critic are not those of the run, or the checkpoint is damaged: then delete "
            "its folder, and the one before it is taken"
        ) from error
    run.step = step
    run.cut_history(step)
    return state
