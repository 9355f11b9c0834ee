"""Run files and overrides: YAML to the keyword arguments of a training stage, every key checked."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from rlhf_fast.config import REFUSED_KEYS, ConfigError
from rlhf_fast.lora import LoraConfig
from rlhf_fast.rollout import RolloutConfig

ARGUMENTS = {
    "model": "model to train: name on the Hugging Face hub, or a folder",
    "data": "training data: .jsonl[.gz], .csv or .parquet file, or rows",
    "eval_data": "held-out data in the same form; null: none",
    "reference_data": "completions of the reference, {prompt, completion} rows, to normalise the "
    "scores on; null: those of data",
    "reward": "file.py:function, module:function, folder of a reward model, or a list of "
    "them or of [reward, weight]",
    "prompts": "prompts to train on: .jsonl[.gz], .csv or .parquet file, or rows",
    "tokenizer": "name or folder of the tokenizer; null: the model's",
    "ref": "reference policy, name or folder; null: the model before training",
    "critic": "head: a value head on the policy; model: a model of its own; the folder of a reward "
    "model, to start from it; null: none; auto: head where the loss needs a critic, else none",
    "lora": "train a LoRA adapter (needs peft): its rank, or a mapping of r, alpha, dropout, "
    "target_modules, use_rslora (docs/lora.md), also as lora.KEY=value; null: all weights",
    "rollout": "who samples: auto, hf or vllm; or a mapping of engine and more "
    "(docs/rollouts.md), also as rollout.KEY=value",
    "run_dir": "folder for metrics, checkpoints and the trained model",
    "resume": "go on from the newest checkpoint in run_dir",
    "pad_token": "padding token for a tokenizer that has none",
    "bad_rows": "error: refuse data with a bad row; skip: leave such rows out with a warning",
}
"""What the arguments of the one-liners mean; configurations describe their own fields."""

_TEXT = ("model", "tokenizer", "ref", "critic", "run_dir", "pad_token", "bad_rows")
_REQUIRED = object()


class _Loader(yaml.SafeLoader):
    """YAML as in version 1.2, where 1e-5 is a number and `no` is text, without doubled keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Stage:
    """A training stage as a run file sees it: a one-liner, and the configuration of its trainer."""

    name: str
    function: Callable[..., Any]
    config: type[BaseModel]

    def keys(self) -> dict[str, tuple[Any, str]]:
        """Default and description of every key; `run_dir` must be given, or the run would be lost.

        Keys without a default come first, with `REQUIRED` for it.
        """
        keys: dict[str, tuple[Any, str]] = {}
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                required = parameter.default is parameter.empty or parameter.name == "run_dir"
                default = _REQUIRED if required else parameter.default
                keys[parameter.name] = (default, ARGUMENTS.get(parameter.name, ""))
        for name, field in self.config.model_fields.items():
            keys.setdefault(name, (field.get_default(), field.description or ""))
        return dict(sorted(keys.items(), key=lambda item: item[1][0] is not _REQUIRED))

    def template(self) -> str:
        """A run file with every key at its default, described.

        Required ones are commented out, and those whose default another `loss` may change.
        """
        by_loss = getattr(self.config, "by_loss", ())
        lines = [f"# rlhf-fast {self.name} RUN.yaml [key=value ...]"]
        for name, (default, description) in self.keys().items():
            lines.append(f"\n# {description}" if description else "")
            value = "   # required" if default is _REQUIRED else f" {_inline(default)}"
            comment = "# " if default is _REQUIRED or name in by_loss else ""
            lines.append(f"{comment}{name}:{value}")
        return "\n".join(lines)

    def resolve(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of the one-liner out of a command line.

        Args:
            arguments: At most one path of a run file, and overrides `key=value`. An override wins
                over the file, a later override over an earlier one; `a.b=1` sets b in a mapping a.

        Returns:
            A value for every key, in the order of `keys()`.

        Raises:
            ConfigError: For a file that is no YAML mapping, an unknown key, a missing key, a value
                of the wrong type or out of range.
        """
        keys = self.keys()
        given: dict[str, Any] = {}
        files = [argument for argument in arguments if "=" not in argument]
        if len(files) > 1:
            raise ConfigError(
                f"{files[1]!r} is a second run file after {files[0]!r}; give one, and the rest as "
                "key=value"
            )
        for path in files:
            given, places = _read(Path(path))
            for key, place in places.items():
                self._known(key, keys, place)
        for argument in arguments:
            if argument not in files:
                key, _, text = argument.partition("=")
                self._known(key.strip().partition(".")[0], keys, f"override {argument!r}")
                _set(given, key.strip(), text, argument)
        values = {key: given.get(key, default) for key, (default, _) in keys.items()}
        missing = [k for k, (d, _) in keys.items() if d is _REQUIRED and given.get(k) is None]
        if missing:
            means = "; ".join(f"{key!r} ({keys[key][1]})" for key in missing)
            where = f"in {files[0]}" if files else "in a run file"
            raise ConfigError(
                f"rlhf-fast {self.name}: missing {means}: give {missing[0]} {where}, or "
                f"{missing[0]}=VALUE on the command line"
            )
        for key in _TEXT:
            if not isinstance(values.get(key), str | None):
                raise ConfigError(f"{key} is {values[key]!r}; expected text, in quotes if need be")
        if not isinstance(values.get("resume", False), bool):
            raise ConfigError(f"resume is {values['resume']!r}; expected true or false")
        try:
            LoraConfig.of(values.get("lora"))
            RolloutConfig.of(values.get("rollout", "auto"))
        except TypeError as error:
            raise ConfigError(str(error)) from error
        fields = self.config.model_fields
        # Only what was named: other defaults are not the same for every loss.
        config = self.config(**{key: value for key, value in given.items() if key in fields})
        return {**values, **config.model_dump()}

    def _known(self, key: str, keys: Mapping[str, Any], place: str) -> None:
        if key in keys:
            return
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        hint = REFUSED_KEYS.get(key, f"{hint}`rlhf-fast {self.name} --keys` lists all keys")
        raise ConfigError(f"{place}: unknown key {key!r}; {hint}")


def dump(values: Mapping[str, Any]) -> str:
    """Values as YAML that `Stage.resolve` reads back."""
    return "".join(f"{key}: {_inline(value)}\n" for key, value in values.items())


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A run file's values, and the place of each key."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"the run file {str(path)!r} cannot be read ({error.strerror}); give the path of a "
            "YAML file, or overrides as key=value"
        ) from error
    node, values = _parse(text, f"{path}")
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected lines of key: value")
    places = {str(k.value): f"{path}:{k.start_mark.line + 1}" for k, _ in node.value}
    return values, places


def _parse(text: str, place: str) -> tuple[yaml.Node | None, Any]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark is not None and "=" not in place else ""
        raise ConfigError(
            f"{place}{line}: not YAML ({error.problem}); put text with ':', '#', quotes or "
            "brackets in quotes"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: not YAML ({error}); write plain text") from error


def _set(values: dict[str, Any], key: str, text: str, argument: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"override {argument!r}: {parent} is {values!r}, which holds no keys; set "
                f"{parent}=VALUE"
            )
    values[last] = _parse(text, f"override {argument!r}")[1]
