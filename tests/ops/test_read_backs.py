"""The linear ops ask at most once a pass how many rows are left, and never with `live_rows`.

On a CPU everything that would wait for a GPU is counted; on a GPU torch itself raises.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from backend_cases import Case, cases, done_on_gpu
from linear_cases import small_tiles, transparent
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops import _linear_checks, _softmax, linear_kl, linear_logprobs

ROWS, DIM, VOCAB = 20, 4, 11
BUDGETS = [0, ROWS * DIM * 4, 10**9]  # recompute; direct where the head is frozen; keep
WAIT = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2")


class ReadBacks(TorchDispatchMode):
    """Counts the operations whose result the host must see before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (i for i in args[1] if i is not None) if name in ("index", "index_put_") else ()
        self.count += name in WAIT or any(i.dtype == torch.bool for i in masks)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def read_backs(monkeypatch: pytest.MonkeyPatch) -> ReadBacks:
    """What a GPU would wait for, seen inside the ops; `tolist` asks no dispatcher."""
    transparent(monkeypatch)
    for module in (_softmax, _linear_checks, importlib.import_module(linear_logprobs.__module__)):
        monkeypatch.setattr(module, "host_checks_run", lambda device: False)
    counter, tolist = ReadBacks(), Tensor.tolist

    def counted(x: Tensor) -> Any:
        counter.count += 1
        return tolist(x)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return counter


def call(op: Any, device: str, frozen: bool, live: bool, **options: Any) -> tuple[Tensor, Any]:
    """A loss, half of whose rows have no gradient, and its leaves."""
    hidden, weight = (torch.randn(n, DIM, device=device) for n in (ROWS, VOCAB))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(not frozen)]
    rest = [torch.randint(VOCAB, (ROWS,), device=device)]
    if op is linear_kl:
        rest = [torch.randn(ROWS, DIM, device=device), weight.detach()]
    if live:
        options["live_rows"] = torch.arange(0, ROWS, 2, device=device)
    out = op(hidden, weight, *rest, **options)
    out = out if isinstance(out, Tensor) else out[0]
    upstream = (torch.arange(ROWS, device=device) % 4 == 0).float()
    return (upstream * out).sum(), leaves[: 1 if frozen else 2]


@pytest.mark.parametrize("op", [linear_logprobs, linear_kl], ids=lambda op: op.__name__)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize("live", [False, True])
def test_one_count_a_pass_and_none_with_live_rows(
    read_backs, monkeypatch, op, frozen: bool, memory_budget: int, live: bool
) -> None:
    small_tiles(monkeypatch)  # many chunks share one read-back
    options = {"memory_budget": memory_budget, "backend": "reference"}
    with read_backs:
        loss, leaves = call(op, "cpu", frozen, live, **options)
        of_forward = read_backs.count
        torch.autograd.grad(loss, leaves)
    most = 0 if live else 1
    assert of_forward <= most and read_backs.count - of_forward <= most


@pytest.mark.parametrize("op", [linear_logprobs, linear_kl], ids=lambda op: op.__name__)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize(
    "case", [c for c in cases("linear_logprobs") if c.values[0].device == "cuda"]
)
def test_nothing_waits_for_a_gpu_with_live_rows(
    case: Case, op, frozen: bool, memory_budget: int
) -> None:
    options = {"memory_budget": memory_budget, "backend": case.backend}

    def run() -> None:
        loss, leaves = call(op, "cuda", frozen, True, **options)
        torch.autograd.grad(loss, leaves)

    assert done_on_gpu(run)
