"""What the tests of the linear ops share: small tiles, ops that can be seen through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops import _kl_tiles, _logprob_tiles, _plan

BUDGETS = [0, 600, 10**12, None]


def small_tiles(monkeypatch: pytest.MonkeyPatch, rows: int = 3, columns: int = 4) -> None:
    """Tiles of at most so many rows and columns: small inputs go through several."""
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(_plan.TILE_ROWS, kind, rows)
        monkeypatch.setitem(_plan.TILE_ELEMENTS, kind, rows * columns)
    monkeypatch.setattr(_plan, "COLUMN_MULTIPLE", 2)


def transparent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the loops themselves, not the opaque ops around them, so that a mode sees inside."""
    for module in (_logprob_tiles, _kl_tiles):
        for name in ("forward", "backward"):
            implementation = torch.no_grad()(getattr(module, f"_{name}"))
            monkeypatch.setattr(module, name, implementation)


class Watch(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, and all products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.products += any(part in name for part in ("mm", "matmul", "linear", "einsum", "dot"))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
