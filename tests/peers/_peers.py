"""Other projects' own code, called from their wheels, and the inputs that it and ours are given.

`make test-peers` installs the wheels into an environment of their own, without the dependencies
that their called functions do not use. Where a project imports one of those all the same, a stub
stands in for the time of the import. Nothing of theirs is changed or copied: functions are called
as they are, methods with a stand-in for `self` that holds the attributes they read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

PINS = dict(
    line.split("==")
    for line in (Path(__file__).parent / "peers.txt").read_text().splitlines()
    if not line.startswith("#")
)

STUBBED = {
    "openrlhf": (
        "deepspeed",
        "flash_attn",
        "openrlhf.trainer.ray",  # imports vllm; wanted for one annotation
        "peft",
        "pylatexenc",
        "ray",
    ),
    "trl": (),
    "verl": ("ray",),
}
"""By project, the modules whose import is faked: the functions called here use none of them."""


class _Stub(ModuleType):
    """A module in which every public name is a class of that name, to annotate or derive with."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Stubs(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if any(name == stub or name.startswith(f"{stub}.") for stub in self.names):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stubbed(names: tuple[str, ...]) -> Iterator[None]:
    """Fakes imports of `names`; afterwards they fail again, so that no later use goes unseen."""
    finder = _Stubs(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Stub)]:
            del sys.modules[name]


def load(module: str) -> Any:
    """Imports a module of a peer, of the version that is pinned."""
    project = module.split(".")[0]
    found = importlib.metadata.version(project)
    assert found == PINS[project], f"{project} {found} is installed; peers.txt says {PINS[project]}"
    with _stubbed(STUBBED[project]):
        return importlib.import_module(module)


class Batch(NamedTuple):
    """Random tokens of completions, float64 `[rows, steps]` unless said otherwise."""

    mask: Tensor  # bool
    logprobs: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    entropy: Tensor
    advantages: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    rewards: Tensor  # 0 where a token does not count
    scores: Tensor  # [rows]

    @property
    def ones(self) -> Tensor:
        """The mask as the peers take it: a number in the dtype of the log-probs."""
        return self.mask.to(self.logprobs.dtype)

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.mask, *(x.to(dtype) for x in self[1:]))


def batch(seed: int = 0, *, rows: int = 6, steps: int = 9, gaps: bool = False) -> Batch:
    """Ragged, right-padded completions, the first one full, the second of one token.

    `gaps` takes two tokens out of the middle of the long ones, as a tool's output would be.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, *shape: int) -> Tensor:
        shape = shape or (rows, steps)
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    lengths[1:2], lengths[0] = 1, steps
    mask = torch.arange(steps) < lengths[:, None]
    if gaps:
        mask[:, 2:4] &= lengths[:, None] <= 4
    old = -normal(1.0).abs() - 0.1
    return Batch(
        mask=mask,
        logprobs=old + normal(0.4),
        old=old,
        ref=old + normal(0.5),
        rollout=old + normal(0.5),
        entropy=normal(1.0).abs(),
        advantages=normal(1.0),
        values=normal(1.0),
        old_values=normal(1.0),
        returns=normal(1.0),
        rewards=torch.where(mask, normal(1.0), 0.0),
        scores=normal(1.0, rows),
    )


Function = Callable[..., Tensor]


def value_and_gradients(function: Function, *inputs: Tensor) -> list[Tensor]:
    """`function(*inputs)`, and the gradient of its sum in each of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def assert_agree(
    ours: Function, theirs: Function, *inputs: Tensor, rtol: float = 1e-7, atol: float = 1e-8
) -> None:
    """Same value and same gradient in every input, none of them trivial.

    The tolerance is for peers that add 1e-8 to the count under a mean.
    """
    expected = value_and_gradients(theirs, *inputs)
    for result, reference in zip(value_and_gradients(ours, *inputs), expected, strict=True):
        assert result.isfinite().all() and result.abs().max() > 0
        torch.testing.assert_close(result, reference.to(result.dtype), rtol=rtol, atol=atol)


class Accelerator:
    """What TRL asks of accelerate, in one process that may claim to be one of several."""

    device = torch.device("cpu")
    process_index = 0
    sync_gradients = True

    def __init__(self, num_processes: int = 1) -> None:
        self.num_processes = num_processes

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x
