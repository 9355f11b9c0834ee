"""Code of other projects, run unmodified out of their wheels in .benchmarks/rivals.

`make rivals` fetches the wheels; `RLHF_FAST_RIVALS` names another folder. The projects themselves
are not installed: most of what they import is not needed by the functions that we compare with.
A comparison whose wheel is missing is skipped.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional, Union

import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(os.environ.get("RLHF_FAST_RIVALS", ".benchmarks/rivals"))


def wheel(project: str, version: str) -> zipfile.ZipFile:
    found = sorted(FOLDER.glob(f"{project}-{version}-*.whl"))
    if not found:
        pytest.skip(f"no wheel of {project} {version} in {FOLDER}; `make rivals` fetches it")
    return zipfile.ZipFile(found[0])


def execute(source: str, names: set[str], namespace: dict[str, Any]) -> None:
    """Runs the definitions of `names` in `source`, at any depth, and only those.

    The rest of the file, with its imports, is left alone.
    """
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt))
    found = [node for node in nodes if _defined(node) in names]
    assert sorted(filter(None, map(_defined, found))) == sorted(names)
    exec(compile(ast.Module(found, []), "<wheel>", "exec"), namespace)


def _defined(node: ast.stmt) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


@functools.cache
def openrlhf() -> SimpleNamespace:
    """Losses and advantages of OpenRLHF 0.11.2."""
    namespace: dict[str, Any] = {
        **{"torch": torch, "nn": torch.nn, "Optional": Optional, "Union": Union, "Tuple": tuple},
        "KL_IS_WEIGHT_CLIP": None,
    }
    with wheel("openrlhf", "0.11.2") as files:
        for module, names in (
            ("/models/utils.py", {"masked_mean", "compute_approx_kl", "compute_reward"}),
            ("/models/loss.py", {"aggregate_loss", "PolicyLoss", "ValueLoss"}),
            ("/ppo_utils/experience_maker.py", {"get_advantages_and_returns"}),
        ):
            (name,) = (n for n in files.namelist() if n.endswith(module))
            execute(files.read(name).decode(), names, namespace)
    return SimpleNamespace(**namespace)


def openrlhf_gae() -> Callable[..., Any]:
    """`RemoteExperienceMaker.get_advantages_and_returns` of OpenRLHF 0.11.2."""
    return functools.partial(openrlhf().get_advantages_and_returns, None)


@functools.cache
def verl() -> SimpleNamespace:
    """Losses and advantages of verl 0.9.1 (`verl.trainer.ppo.core_algos`)."""
    functional: dict[str, Any] = {"torch": torch}
    namespace: dict[str, Any] = {
        **{"torch": torch, "Optional": Optional, "Any": Any},
        **{"ActorConfig": Any, "AlgoConfig": type(None)},
        "register_policy_loss": lambda name: lambda function: function,
        "register_adv_est": lambda name: lambda function: function,
        "AdvantageEstimator": SimpleNamespace(GAE="gae"),
    }
    with wheel("verl", "0.9.1") as files:
        source = files.read("verl/utils/torch_functional.py").decode()
        names = {"masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"}
        execute(source, names, functional)
        namespace["verl_F"] = SimpleNamespace(**functional)
        names = {
            *("agg_loss", "compute_policy_loss_vanilla", "compute_value_loss"),
            *("compute_gae_advantage_return", "kl_penalty", "kl_penalty_forward"),
        }
        execute(files.read("verl/trainer/ppo/core_algos.py").decode(), names, namespace)
    return SimpleNamespace(**namespace)


@functools.cache
def trl() -> Any:
    """`trl.trainer.utils` of TRL 1.16.0, as far as we need it.

    `trl.kernels` is imported whole, from a copy on disk: Triton reads its kernels' source. The
    other module would import datasets and pandas, so of it only these are run: what `trl.kernels`
    imports, `selective_log_softmax`, and the width that it hands to `ChunkedLogProbFunction`.
    """
    transformers_utils = pytest.importorskip("transformers.utils")
    with wheel("trl", "1.16.0") as files:
        folder = Path(_scratch().name)
        kernels = [n for n in files.namelist() if n.startswith("trl/kernels/")]
        files.extractall(folder, kernels)
        source = files.read("trl/trainer/utils.py").decode()
    package = ModuleType("trl")
    package.__path__ = [str(folder / "trl")]
    utils: Any = ModuleType("trl.trainer.utils")
    sys.modules["trl"], sys.modules["trl.trainer.utils"] = package, utils
    utils.kernels = importlib.import_module("trl.kernels")
    has_triton = transformers_utils.is_triton_available
    vars(utils).update(torch=torch, F=F, nullcontext=nullcontext, is_triton_available=has_triton)
    if has_triton():
        utils._fused_logprob_entropy = utils.kernels.selective_log_softmax_and_entropy
    names = {
        "maybe_gather_lm_head_ctx",
        "_supports_trl_loss_kernel",
        "selective_log_softmax",
        "_CHUNKED_LOGPROB_CHUNK_SIZE",
    }
    execute(source, names, vars(utils))
    return utils


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="rlhf_fast_rivals_")
