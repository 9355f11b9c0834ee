"""Tests of the emulator itself, and of what it alone can show of the CUDA kernels."""

from __future__ import annotations

import emulated_cuda
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "emulator" in item.path.parts]
    for item in here:
        item.add_marker(pytest.mark.emulated)
        if emulated_cuda.BUILD is None:
            reason = "needs the CUDA emulator: `make test-emulated`"
            item.add_marker(pytest.mark.skip(reason=reason))
