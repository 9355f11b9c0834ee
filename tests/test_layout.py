"""The layout that every kind of install relies on."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_kernels_is_no_regular_package():
    # It would shadow Hugging Face's `kernels` for anything started in this folder.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_in_the_package_is_a_relative_link_to_the_folder():
    link = ROOT / "rlhf_fast" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
    assert link.resolve() == (ROOT / "kernels").resolve()


def test_every_package_is_declared():
    found = {"rlhf_fast", "rlhf_fast.kernels"}
    for init in (ROOT / "rlhf_fast").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_pins_are_those_of_declared_dependencies():
    project = PYPROJECT["project"]
    declared = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    names = {_name(line) for line in declared}
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all("==" in pin for pin in pins)
    pinned = {_name(pin) for pin in pins}
    assert names - {"vllm"} <= pinned, "a dependency without a pin"


def _name(requirement: str) -> str:
    name = requirement
    for mark in "<>=;[ ":
        name = name.split(mark)[0]
    return name.lower().replace("_", "-")


def test_no_built_file_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert not [name for name in tracked if name.endswith((".so", ".pyc", ".whl", ".egg-info"))]
