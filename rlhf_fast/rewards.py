"""Rewards as one kind of object: Python callables, saved reward models, and weighted sums.

A reward is called as `reward(prompts=..., completions=..., **columns)`. Offered are `prompts` and
`completions` (lists of B strings), `completion_ids` (B lists of token ids) and each column of the
data (lists of B values); a function gets those that its signature names, or all of them if it
takes `**kwargs`.
"""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast._reward_modules import (
    RewardError,
    module_of_file,
    module_of_name,
    public_functions,
)
from rlhf_fast._rows import names, short

__all__ = ["Reward", "RewardError", "RewardFunction", "as_reward", "check_columns", "evaluate"]

OFFERED = ("prompts", "completions", "completion_ids")
Reward = Callable[..., list[float] | Tensor | dict[str, Any]]


@dataclass(frozen=True)
class RewardPart:
    """One callable of a reward, with its weight in the sum and its name in metrics and errors."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


@dataclass(frozen=True)
class RewardFunction:
    """A weighted sum of callables, most often of one. Made by `as_reward`, run by `evaluate`."""

    parts: tuple[RewardPart, ...]

    def to(self, device: torch.device) -> RewardFunction:
        """Itself, its models (not those inside functions) moved to `device`."""
        for part in self.parts:
            owner = getattr(part.function, "__self__", None)
            if isinstance(owner, torch.nn.Module):
                owner.to(device)
        return self

    def refuse_shared(self, policy: torch.nn.Module) -> None:
        """Raises `RewardError` if a reward model shares weights that `policy` trains."""
        trained = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
        for part in self.parts:
            owner = getattr(part.function, "__self__", None)
            if isinstance(owner, torch.nn.Module) and any(
                id(parameter) in trained for parameter in owner.parameters()
            ):
                raise RewardError(
                    f"reward {part.name!r} shares weights with the policy and would change while "
                    "it trains; give it a copy of the model"
                )


def as_reward(spec: Any) -> RewardFunction:
    """Makes a reward of what users write.

    Args:
        spec: A callable; an object with a method `score`, called like one; "module:function";
            "file.py:function"; the folder of a saved reward model; a list of these, or of pairs
            (spec, weight), for the weighted sum; or a `RewardFunction`, returned as it is.

    Raises:
        RewardError: For anything else, and for a name or folder that cannot be loaded.
    """
    if isinstance(spec, RewardFunction):
        return spec
    if not isinstance(spec, list | tuple):
        return RewardFunction((_part(spec),))
    if not spec:
        raise RewardError("the list of rewards is empty; give at least one")
    parts: list[RewardPart] = []
    for item in spec:
        pair = isinstance(item, list | tuple) and len(item) == 2
        one, weight = item if pair else (item, 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RewardError(f"the weight of {one!r} is {weight!r}; give (reward, number)")
        if not math.isfinite(weight):
            raise RewardError(f"the weight of {one!r} is {weight}; give a finite number")
        part = _part(one)
        taken = {other.name for other in parts}
        free = (part.name if i == 1 else f"{part.name}_{i}" for i in range(1, len(spec) + 1))
        name = next(name for name in free if name not in taken)
        parts.append(replace(part, name=name, weight=float(weight)))
    return RewardFunction(tuple(parts))


def check_columns(reward: RewardFunction, columns: Iterable[str]) -> None:
    """Raises `RewardError` if a part of `reward` asks for what data with `columns` cannot give."""
    offered: dict[str, list[Any]] = {name: [] for name in (*OFFERED, *columns)}
    for part in reward.parts:
        _arguments(part, offered)


def evaluate(
    reward: RewardFunction,
    prompts: list[str],
    completions: list[str],
    *,
    completion_ids: list[list[int]],
    columns: dict[str, list[Any]],
) -> tuple[Tensor, dict[str, float]]:
    """Scores B completions.

    Args:
        reward: Made by `as_reward`.
        prompts, completions: B strings each.
        completion_ids: The completions' token ids, B lists.
        columns: The prompts' other columns, each a list of B values.

    Returns:
        scores: [B], fp32 on the CPU.
        metrics: The mean of each further column k that the reward returned as `reward/k`; of a
            sum, the unweighted mean of each part p as `reward/p`, and its columns as `reward/p/k`.

    Raises:
        RewardError: If the reward raises (the cause is chained), or returns something else than B
            finite numbers; the message names the function, the place and the value.
    """
    offered: dict[str, list[Any]] = dict(
        zip(OFFERED, (prompts, completions, completion_ids), strict=True)
    )
    if hidden := sorted(offered.keys() & columns.keys()):
        raise RewardError(f"the data has a column {hidden[0]!r}, a reserved name; rename it")
    offered |= columns
    for name, values in offered.items():
        if len(values) != len(prompts):
            raise RewardError(f"{name} has {len(values)} values for {len(prompts)} prompts")
    if not prompts:
        raise RewardError("there is nothing to score; give at least one completion")
    total = torch.zeros(len(prompts), dtype=torch.float32)
    metrics: dict[str, float] = {}
    for part in reward.parts:
        result = _call(part, offered)
        extras: dict[str, Any] = {}
        if isinstance(result, Mapping):
            if "score" not in result:
                raise RewardError(
                    f"reward {part.name!r} returned a dict with the keys {names(result)}; "
                    "the rewards belong under 'score'"
                )
            extras = {key: value for key, value in result.items() if key != "score"}
            result = result["score"]
        scores = _numbers(part.name, "", result, prompts, completions)
        total += part.weight * scores
        prefix = "reward"
        if len(reward.parts) > 1:
            prefix = f"reward/{part.name}"
            metrics[prefix] = scores.mean().item()
        for key, value in extras.items():
            column = _numbers(part.name, f" under {key!r}", value, prompts, completions)
            metrics[f"{prefix}/{key}"] = column.mean().item()
    return total, metrics


def _call(part: RewardPart, offered: dict[str, list[Any]]) -> Any:
    args, kwargs = _arguments(part, offered)
    try:
        with torch.no_grad():
            return part.function(*args, **kwargs)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[:2][-1]
        batch = offered["prompts"]
        raise RewardError(
            f"reward {part.name!r} raised {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}:{frame.lineno}) on a batch of {len(batch)}, whose first "
            f"prompt is {short(batch[0])}; correct the function"
        ) from error


def _arguments(
    part: RewardPart, offered: dict[str, list[Any]]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Copies of what the function asks for, so that no function can change another's input."""
    args: list[Any] = []
    kwargs: dict[str, list[Any]] = {}
    missing: list[str] = []
    try:
        parameters = inspect.signature(part.function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward {part.name!r} has no signature that Python can read; wrap it in a function"
        ) from error
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            kwargs |= {name: list(values) for name, values in offered.items()}
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.name in offered and parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(list(offered[parameter.name]))
        elif parameter.name in offered:
            kwargs[parameter.name] = list(offered[parameter.name])
        elif parameter.default is parameter.empty:
            missing.append(parameter.name)
    if missing:
        raise RewardError(
            f"reward {part.name!r} asks for {', '.join(missing)}; offered are "
            f"{', '.join(offered)}: rename the parameter, or add the column to the data"
        )
    return args, kwargs


def _numbers(
    name: str, under: str, result: Any, prompts: Sequence[str], completions: Sequence[str]
) -> Tensor:
    got = f"reward {name!r} returned{under}"
    size = len(prompts)
    expected = f"expected {size} numbers, one a completion"
    shape = getattr(result, "shape", None)
    if shape is not None and len(shape) != 1:
        raise RewardError(f"{got} an array of shape {list(shape)}; {expected} (shape [{size}])")
    if shape is not None and hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise RewardError(f"{got} {short(result)} of type {type(result).__name__}; {expected}")
    if len(result) != size:
        raise RewardError(f"{got} {len(result)} values for {size} completions; {expected}")
    values = []
    for i, item in enumerate(result):
        try:
            values.append(_number(item))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise RewardError(
                f"{got} {short(item)} of type {type(item).__name__} at index {i}; expected a "
                f"number (prompt {short(prompts[i])}, completion {short(completions[i])})"
            ) from None
    numbers = torch.tensor(values, dtype=torch.float64)
    bad = (~numbers.float().isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise RewardError(
            f"{got} {values[i]} at index {i} ({len(bad)} of {size} values are not finite in fp32); "
            f"prompt {short(prompts[i])}, completion {short(completions[i])}: return a finite "
            "number for every completion"
        )
    return numbers.float()


def _number(item: Any) -> float:
    if isinstance(item, str | bytes):
        raise TypeError
    return float(item)


def _part(spec: Any) -> RewardPart:
    if isinstance(spec, str | Path):
        return _load(str(spec))
    if inspect.isclass(spec):
        raise RewardError(f"the reward {spec.__name__} is a class; give an instance of it")
    if callable(getattr(spec, "score", None)):
        return RewardPart(type(spec).__name__, spec.score)
    if callable(spec):
        return RewardPart(_name(spec), spec)
    raise RewardError(
        f"{short(spec)} of type {type(spec).__name__} is no reward; give a function, an object "
        "with a method score, 'module:function', 'file.py:function', the folder of a reward "
        "model, or a list of (reward, weight)"
    )


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else name


def _load(spec: str) -> RewardPart:
    folder = Path(spec)
    if folder.is_dir():
        if not (folder / "reward_model.json").is_file():
            raise RewardError(
                f"the folder {spec} holds no reward_model.json, so it is no saved reward model; "
                "give the folder model in the run folder of `rlhf-fast reward`"
            )
        from rlhf_fast.scalar_models import RewardModel

        return RewardPart(folder.resolve().name, RewardModel.from_pretrained(folder).score)
    origin, colon, attribute = spec.rpartition(":")
    if not (origin and colon and attribute):
        raise RewardError(
            f"the reward {spec!r} is no folder and names no function; give 'module:function', "
            "'file.py:function' or the folder of a reward model"
        )
    load = module_of_file if origin.endswith(".py") else module_of_name
    found: Any = load(spec, origin)
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = ", ".join(public_functions(found)) or "none"
            raise RewardError(f"the reward {spec!r}: {origin} has no {name!r}; it has {public}")
        found = getattr(found, name)
    return _part(found)
