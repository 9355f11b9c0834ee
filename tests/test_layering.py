"""Imports point down only, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rlhf_fast"

# Low to high; a module imports from its own layer or from lower ones.
LAYERS = (
    {"kernels"},
    {"compiled", "_C", "_cuda"},
    {"backends"},
    {"ops"},
    {
        "config",
        "presets",
        "data",
        "loading",
        "_rows",
        "_reward_modules",
        "_adapter_files",
        "_adapters",
        "lora",
        "models",
        "policy",
        "scalar_models",
        "actor_critic",
        "scratch",
    },
    {"rollout", "rewards"},
    {"trainers"},
    {"api"},
    {"demo", "doctor", "_runfile", "cli"},
)
# Third-party packages that only these modules may import.
RESERVED = {
    "triton": {"kernels"},
    "vllm": {"rollout"},
}


def _layer(module: str) -> int:
    for i, modules in enumerate(LAYERS):
        if module in modules:
            return i
    raise AssertionError(f"rlhf_fast.{module} is in no layer; add it to LAYERS")


def _imports(source: Path) -> list[str]:
    """Full names of what `source` imports, function bodies included."""
    names = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _sources():
    """(module below rlhf_fast, file) of every source but the package's own door."""
    for file in sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "kernels").glob("*.py")):
        relative = file.relative_to(PACKAGE)
        if relative != Path("__init__.py"):
            yield relative.parts[0].removesuffix(".py"), file


def test_imports_point_down():
    for module, file in _sources():
        for name in _imports(file):
            if name.startswith("rlhf_fast."):
                imported = name.split(".")[1]
                if imported.startswith("__"):
                    continue
                assert _layer(imported) <= _layer(module), f"{file} imports {name}, which is above"


def test_ops_receive_numbers_and_know_no_model_library():
    for module, file in _sources():
        if _layer(module) <= _layer("ops"):
            outside = {name.split(".")[0] for name in _imports(file)}
            assert not outside & {"transformers", "accelerate", "pydantic", "vllm"}, file


def test_optional_packages_are_imported_in_one_place():
    for module, file in _sources():
        for name in _imports(file):
            home = RESERVED.get(name.split(".")[0])
            assert home is None or module in home, f"{file} imports {name}"
