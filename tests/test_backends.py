"""backends: the table is true, a named backend runs or says why it cannot."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast import backends, compiled
from rlhf_fast.backends import TABLE, BackendUnavailable, Impl, resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def impl(*devices, **options):
    return Impl(print, print, devices, (torch.float32,), None)._replace(**options)


@pytest.fixture
def table(monkeypatch):
    """A table with one op of three working backends, and one with none."""
    monkeypatch.setattr(backends, "REQUESTED", None)
    monkeypatch.setattr(
        backends,
        "TABLE",
        {
            "op": {"cuda": impl("cuda"), "triton": impl("cuda"), "cpp": impl("cpu")},
            "bare": {},
        },
    )
    return backends.TABLE


def test_every_op_of_the_table_is_public_and_takes_a_backend():
    ops = importlib.import_module("rlhf_fast.ops")
    for name in TABLE:
        assert "backend" in inspect.signature(getattr(ops, name)).parameters, name


def test_the_first_that_fits_the_device_is_chosen(table):
    assert resolve("op", CPU) is table["op"]["cpp"]
    assert resolve("op", GPU) is table["op"]["cuda"]
    assert resolve("bare", CPU) is None


def test_a_verified_kernel_is_preferred_on_a_gpu(table):
    table["op"]["triton"] = impl("cuda", verified="NVIDIA H200, 2026-12-01")
    assert resolve("op", GPU) is table["op"]["triton"]


def test_what_cannot_run_is_passed_over(table):
    table["op"]["cuda"] = impl("cuda", missing="not built")
    assert resolve("op", GPU) is table["op"]["triton"]
    table["op"]["triton"] = impl("cuda", missing="not installed")
    assert resolve("op", GPU) is None
    assert resolve("op", CPU, dtype=torch.float64) is None


def test_the_interpreter_runs_only_when_named(table):
    table["op"] = {"triton": impl("cuda", on_request=("cpu",))}
    assert resolve("op", CPU) is None
    assert resolve("op", CPU, "triton") is table["op"]["triton"]


def test_reference_may_be_named(table):
    assert resolve("op", CPU, "reference") is None


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "message"),
    [
        (CPU, "cuda", None, "op: backend 'cuda' cannot run: it runs on cuda, not on cpu; move"),
        (CPU, "triton", None, "set TRITON_INTERPRET=1"),
        (GPU, "cpp", None, "it runs on cpu, not on cuda:0"),
        (CPU, "cpp", torch.float64, "computes in torch.float32, not in torch.float64; cast"),
    ],
)
def test_a_named_backend_that_cannot_run_says_why(table, device, backend, dtype, message):
    with pytest.raises(BackendUnavailable, match=message):
        resolve("op", device, backend, dtype)


def test_a_missing_backend_says_what_would_bring_it(table):
    table["op"]["cpp"] = impl("cpu", missing="no compiler; install g++")
    with pytest.raises(BackendUnavailable, match="no compiler; install g"):
        resolve("op", CPU, "cpp")


def test_a_backend_that_the_op_does_not_have_is_named_with_those_it_has(table):
    with pytest.raises(BackendUnavailable, match="bare: .*'cpp' has no.*it has: reference"):
        resolve("bare", CPU, "cpp")


def test_an_unknown_name_is_an_error(table):
    with pytest.raises(ValueError, match="op: backend='cpu' is unknown; choose one of cuda"):
        resolve("op", CPU, "cpu")


def test_the_environment_binds_the_ops_that_list_its_backend(table, monkeypatch):
    monkeypatch.setattr(backends, "REQUESTED", "triton")
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET"):
        resolve("op", CPU)
    assert resolve("bare", CPU) is None
    assert resolve("op", CPU, "cpp") is table["op"]["cpp"]
    monkeypatch.setattr(backends, "REQUESTED", "reference")
    assert resolve("op", CPU) is None


def _python(script, **environment):
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_the_environment_is_read_at_import():
    script = "from rlhf_fast.backends import REQUESTED; print(REQUESTED)"
    assert _python(script, RLHF_FAST_BACKEND="cpp").stdout == "cpp\n"
    wrong = _python(script, RLHF_FAST_BACKEND="gpu")
    assert "RLHF_FAST_BACKEND='gpu' is unknown; choose one of cuda, triton, cpp" in wrong.stderr


def test_the_reference_runs_where_neither_triton_nor_an_extension_is():
    script = """
import sys
import torch
import importlib.util
real = importlib.util.find_spec
hidden = ("triton", "rlhf_fast._C", "rlhf_fast._cuda")
importlib.util.find_spec = lambda name, *a: None if name in hidden else real(name, *a)
from rlhf_fast.ops.gae import gae
from rlhf_fast.backends import BackendUnavailable
print(gae(torch.ones(1, 2), torch.zeros(1, 2), lam=1.0)[0].tolist())
for name in ("cpp", "triton", "cuda"):
    try:
        gae(torch.ones(1, 2), torch.zeros(1, 2), backend=name)
    except BackendUnavailable as error:
        print(error)
"""
    done = _python(script)
    lines = done.stdout.splitlines()
    assert lines[0] == "[[2.0, 1.0]]", done.stderr
    assert "install a C++17 compiler" in lines[1]
    assert "pip install rlhf-fast[triton]" in lines[2]
    assert "install the CUDA toolkit" in lines[3]


def test_an_extension_that_does_not_load_is_a_reason_and_no_crash(monkeypatch):
    def broken(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(compiled, "find_spec", lambda name: object())
    monkeypatch.setattr(compiled, "import_module", broken)
    module, reason = compiled._load("_C", "a compiler")
    assert module is None and "does not load (libgomp.so.1" in reason


def test_a_verified_cell_has_its_results_file():
    for op, impls in TABLE.items():
        for name, entry in impls.items():
            if entry.verified is None:
                continue
            pattern = re.compile(rf"^verified: {op} {name} {re.escape(entry.verified)}$", re.M)
            assert any(pattern.search(file.read_text()) for file in RESULTS.glob("*.md")), (
                f"no file of benchmarks/results holds 'verified: {op} {name} {entry.verified}'"
            )


def test_the_support_table_has_a_row_an_op_and_claims_no_unverified_gpu():
    rows = backends.support_table().splitlines()
    assert len(rows) == len(TABLE) + 2
    assert all(row.count("|") == 6 for row in rows)
    (row,) = (row for row in rows if row.startswith("| `gae` |"))
    for name in ("cuda", "triton"):
        claim = TABLE["gae"][name].verified
        assert ("compiled, unverified" if claim is None else f"verified on {claim}") in row
