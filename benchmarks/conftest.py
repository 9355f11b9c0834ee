"""What every benchmark runs under: its tables when it is through, and a GPU's memory given back."""

from __future__ import annotations

import gc
import sys
from importlib.util import find_spec

import pytest
import torch

if find_spec("pydantic") is None:
    # A bare GPU machine: the ops need torch alone, and are measured without engines and trainers.
    collect_ignore = ["bench_lora.py", "bench_padding.py", "bench_ppo.py", "bench_rollout.py"]


def pytest_report_header() -> str | None:
    if find_spec("pydantic") is None:
        return f"pydantic is not installed: {', '.join(collect_ignore)} are left out"
    return None


@pytest.fixture(autouse=True)
def _memory():
    """A failed benchmark's traceback would hold its tensors until the next one fails."""
    sys.last_exc = sys.last_value = sys.last_traceback = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", autouse=True)
def _tables(request):
    """Prints each file's tables when it is through, and forgets its inputs: a later crash loses no
    figure, and a later file has all memory."""
    yield
    if request.module.report.tables:
        print(f"\n\n{request.module.report.markdown()}", flush=True)
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
