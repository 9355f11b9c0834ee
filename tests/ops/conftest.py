"""The losses through each of their backends that computes in float64, and small tiles."""

from __future__ import annotations

import pytest
import torch
from backend_cases import calls, cases
from linear_cases import small_tiles

from rlhf_fast import ops


@pytest.fixture(params=cases("policy_loss", dtype=torch.float64))
def policy_loss(request, monkeypatch):
    yield from calls("policy_loss", ops.policy_loss, request.param, monkeypatch)


@pytest.fixture(params=cases("value_loss", dtype=torch.float64))
def value_loss(request, monkeypatch):
    yield from calls("value_loss", ops.value_loss, request.param, monkeypatch)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles: the linear ops go through several."""
    small_tiles(monkeypatch)
