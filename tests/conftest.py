"""What every test runs under, and the account of skipped tests."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is decorated: without a GPU Triton kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_cuda  # noqa: E402
import emulated_selection  # noqa: E402
from emulated_selection import _approximations  # noqa: E402, F401

if emulated_cuda.BUILD is not None:
    # Before any test's parameters are read from the table of backends.
    emulated_cuda.install()

if find_spec("pydantic") is None:
    # A bare GPU machine: the ops need torch alone, and are tested without the trainers.
    collect_ignore_glob = ["rollout", "test_bad_input.py", "test_[c-z]*.py"]

# Reasons for which a test may be skipped; any other skip fails the run.
KNOWN_SKIPS = (
    r"needs an NVIDIA GPU",
    r"shared data folder",
    r"needs vLLM",
    r"needs the CUDA emulator",
)
# Accepted where a user runs the tests, not in CI, which has a compiler and Triton.
KNOWN_SKIPS_OUTSIDE_CI = (
    r"rlhf_fast\._C was not built",
    r"triton is not installed",
    r"nvcc is not here",
    r"not a git checkout",
)


def pytest_report_header() -> str | None:
    if find_spec("pydantic") is None:
        return "pydantic is not installed: only the ops and their backends are tested"
    return None


@pytest.fixture(autouse=True)
def _threads():
    """One thread: what tests compute is small, and a test that wants more says so."""
    torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def _seed():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """Deterministic mode fills `torch.empty` with NaN: an element nobody wrote shows up."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _memory_of_the_gpu():
    """Processes share it: none keeps what a large test took."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the trainers' little data."""
    from trainer_cases import PROMPTS, WORDS

    from rlhf_fast.scratch import train_tokenizer

    return train_tokenizer([" ".join(WORDS) + " no end", *PROMPTS], 300)


@pytest.fixture
def model(tokenizer):
    """A Llama of a few thousand weights that reads it."""
    from rlhf_fast.scratch import tiny_llama

    return tiny_llama(tokenizer, hidden_size=32, context=64)


@pytest.hookimpl(tryfirst=True)  # before markers are chosen from
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    emulated_selection.select(config, items)
    if find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: `make test-vllm`"))


def _unknown_skips(reporter: pytest.TerminalReporter) -> list[str]:
    known = KNOWN_SKIPS
    if not os.environ.get("RLHF_FAST_STRICT_SKIPS"):
        known += KNOWN_SKIPS_OUTSIDE_CI
    found = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(pattern, reason) for pattern in known):
            found.append(f"{report.nodeid}: {reason}")
    return found


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _unknown_skips(reporter) and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unknown = _unknown_skips(terminalreporter)
    if unknown:
        terminalreporter.section("skipped for a reason that tests/conftest.py does not know")
        for line in unknown:
            terminalreporter.line(line)
