"""Modules that hold users' reward functions: by name, and by file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


class RewardError(RuntimeError):
    """A reward that cannot be found or called, or that returned what is no reward."""


def public_functions(module: object) -> Iterator[str]:
    return (n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))


def module_of_name(spec: str, origin: str) -> ModuleType:
    try:
        return importlib.import_module(origin)
    except Exception as error:
        raise RewardError(
            f"the reward {spec!r}: importing {origin} raised {type(error).__name__}: {error}; "
            "install the module, or name its file: 'path/to/file.py:function'"
        ) from error


def module_of_file(spec: str, origin: str) -> ModuleType:
    path = Path(origin).resolve()
    if not path.is_file():
        raise RewardError(f"the reward {spec!r}: there is no file {path}")
    # Registered, since dataclasses and pickle look their module up; by path, for equal stems.
    name = f"rlhf_fast.rewards.{path}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(
            f"the reward {spec!r}: running {path} raised {type(error).__name__}: {error}"
        ) from error
    return module
