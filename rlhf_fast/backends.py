"""Which implementation of an op runs: one table, one function.

An op's name fixes its mathematics; a backend only computes it. `resolve` answers with the
implementation to call, or None for the op's own PyTorch reference. A backend that was asked for by
name runs or raises `BackendUnavailable`; it never falls back.

Everything is imported here, up front: a lazy import inside `resolve` would break
`torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from rlhf_fast import compiled
from rlhf_fast.compiled import full_kl as compiled_full_kl
from rlhf_fast.compiled import gae as compiled_gae
from rlhf_fast.compiled import policy_loss as compiled_policy_loss
from rlhf_fast.compiled import ppo_advantages as compiled_ppo_advantages
from rlhf_fast.compiled import token_logprobs as compiled_token_logprobs
from rlhf_fast.compiled import value_loss as compiled_value_loss

BACKENDS = ("cuda", "triton", "cpp")

TRITON_MISSING: str | None = None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton_full_kl: Any = None
triton_gae: Any = None
triton_policy_loss: Any = None
triton_ppo_advantages: Any = None
triton_token_logprobs: Any = None
triton_value_loss: Any = None
if find_spec("triton") is None:
    TRITON_MISSING = "triton is not installed; `pip install rlhf-fast[triton]` on Linux brings it"
else:
    from rlhf_fast.kernels import full_kl as triton_full_kl
    from rlhf_fast.kernels import gae as triton_gae
    from rlhf_fast.kernels import policy_loss as triton_policy_loss
    from rlhf_fast.kernels import ppo_advantages as triton_ppo_advantages
    from rlhf_fast.kernels import token_logprobs as triton_token_logprobs
    from rlhf_fast.kernels import value_loss as triton_value_loss

_FP32_64 = (torch.float32, torch.float64)
_UP_TO_FP32 = (torch.float32, torch.bfloat16, torch.float16)
_ANY = (*_UP_TO_FP32, torch.float64)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message says what would help.

    There is no silent fallback: leave `backend=None` to take whatever fits.
    """


class Impl(NamedTuple):
    """One backend's implementation of one op.

    Attributes:
        forward: Launcher of the forward pass; None where the backend is missing.
        backward: Launcher of the backward pass; None where there is none. Of `ppo_advantages`,
            which has no gradient, the second launch, which whitens.
        devices: Device types on which `backend=None` may choose it.
        dtypes: Dtypes in which it computes (what the op passes to `resolve`).
        missing: Why it cannot run in this installation and what would bring it; None if it can.
        on_request: Device types on which it runs only when named (the Triton interpreter on CPU).
        verified: GPU and date of the results file that holds its passing GPU tests, as
            "<gpu>, <date>"; None while it has only been compiled.
    """

    forward: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    missing: str | None
    on_request: tuple[str, ...] = ()
    verified: str | None = None


def _cpp(module: Any, dtypes: tuple[torch.dtype, ...]) -> Impl:
    return Impl(module.forward, module.backward, ("cpu",), dtypes, compiled.C_MISSING)


def _cuda(module: Any, dtypes: tuple[torch.dtype, ...], verified: str | None = None) -> Impl:
    missing = compiled.CUDA_MISSING
    return Impl(module.forward, module.backward, ("cuda",), dtypes, missing, verified=verified)


def _triton(module: Any, dtypes: tuple[torch.dtype, ...], verified: str | None = None) -> Impl:
    if module is None:
        return Impl(None, None, ("cuda",), dtypes, TRITON_MISSING)
    on_request = ("cpu",) if TRITON_INTERPRETED else ()
    return Impl(module.forward, module.backward, ("cuda",), dtypes, None, on_request, verified)


TABLE: dict[str, dict[str, Impl]] = {
    "token_logprobs": {
        "cuda": _cuda(compiled_token_logprobs, _UP_TO_FP32),
        "triton": _triton(triton_token_logprobs, _UP_TO_FP32),
        "cpp": _cpp(compiled_token_logprobs, _ANY),
    },
    # The linear ops multiply with torch and fold tiles of logits, in the dtype of the statistics,
    # with the kernels of the ops above.
    "linear_logprobs": {
        "cuda": _cuda(compiled_token_logprobs, (torch.float32,)),
        "triton": _triton(triton_token_logprobs, (torch.float32,)),
        "cpp": _cpp(compiled_token_logprobs, _FP32_64),
    },
    "full_kl": {
        "cuda": _cuda(compiled_full_kl, _UP_TO_FP32),
        "triton": _triton(triton_full_kl, _UP_TO_FP32),
        "cpp": _cpp(compiled_full_kl, _ANY),
    },
    "linear_kl": {
        "cuda": _cuda(compiled_full_kl, (torch.float32,)),
        "triton": _triton(triton_full_kl, (torch.float32,)),
        "cpp": _cpp(compiled_full_kl, _FP32_64),
    },
    "kl_estimate": {},
    "gae": {
        "cuda": _cuda(compiled_gae, _FP32_64),
        "triton": _triton(triton_gae, _FP32_64),
        "cpp": _cpp(compiled_gae, _FP32_64),
    },
    "discounted_returns": {
        "cuda": _cuda(compiled_gae, _FP32_64),
        "triton": _triton(triton_gae, _FP32_64),
        "cpp": _cpp(compiled_gae, _FP32_64),
    },
    "ppo_advantages": {
        "cuda": _cuda(compiled_ppo_advantages, _FP32_64),
        "triton": _triton(triton_ppo_advantages, _FP32_64),
        "cpp": _cpp(compiled_ppo_advantages, _FP32_64),
    },
    "policy_loss": {
        "cuda": _cuda(compiled_policy_loss, _FP32_64),
        "triton": _triton(triton_policy_loss, (torch.float32,)),
        "cpp": _cpp(compiled_policy_loss, _FP32_64),
    },
    "linear_policy_loss": {
        "cuda": _cuda(compiled_policy_loss, (torch.float32,)),
        "triton": _triton(triton_policy_loss, (torch.float32,)),
        "cpp": _cpp(compiled_policy_loss, _FP32_64),
    },
    "value_loss": {
        "cuda": _cuda(compiled_value_loss, _FP32_64),
        "triton": _triton(triton_value_loss, _FP32_64),
        "cpp": _cpp(compiled_value_loss, _FP32_64),
    },
    "pairwise_loss": {},
    "ranking_loss": {},
    "rating_loss": {},
    "masked_mean": {},
    "masked_var": {},
    "masked_whiten": {},
    "group_advantages": {},
    "importance_weights": {},
}


def _requested() -> str | None:
    """The backend that `RLHF_FAST_BACKEND` names, or None."""
    name = os.environ.get("RLHF_FAST_BACKEND") or None
    if name is not None and name not in (*BACKENDS, "reference"):
        raise ValueError(
            f"RLHF_FAST_BACKEND={name!r} is unknown; choose one of "
            f"{', '.join(BACKENDS)}, reference, or leave it unset"
        )
    return name


REQUESTED = _requested()


def _obstacle(impl: Impl, name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why `impl` cannot run on `device` in `dtype`, or None if it can."""
    if impl.missing is not None:
        return impl.missing
    if device.type not in impl.devices and device.type not in impl.on_request:
        hint = (
            " or set TRITON_INTERPRET=1 before the import to run it on the CPU, slowly"
            if name == "triton"
            else ""
        )
        return f"it runs on {' or '.join(impl.devices)}, not on {device}; move the tensors{hint}"
    if dtype is not None and dtype not in impl.dtypes:
        known = ", ".join(map(str, impl.dtypes))
        return f"it computes in {known}, not in {dtype}; cast the tensors"
    return None


def resolve(
    op: str,
    device: torch.device,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> Impl | None:
    """Chooses the implementation of `op` for tensors on `device`.

    Args:
        op: A name of `TABLE`.
        device: Where the tensors are.
        backend: "cuda", "triton", "cpp", "reference", or None for the first that fits (a GPU
            kernel that has been verified on a GPU comes before one that has only been compiled).
            None means what `RLHF_FAST_BACKEND` said at import, for the ops that list that backend.
        dtype: The dtype of the computation; None skips that check.

    Returns:
        The implementation, or None for the op's PyTorch reference.

    Raises:
        ValueError: `backend` is no backend's name.
        BackendUnavailable: The named backend cannot run; the message holds reason and remedy.
    """
    impls = TABLE[op]
    if backend is None and (REQUESTED == "reference" or REQUESTED in impls):
        backend = REQUESTED
    if backend == "reference":
        return None
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(
                f"{op}: backend={backend!r} is unknown; choose one of "
                f"{', '.join(BACKENDS)}, reference, or None"
            )
        if backend not in impls:
            listed = ", ".join((*impls, "reference"))
            raise BackendUnavailable(
                f"{op}: backend {backend!r} has no implementation of this op; it has: {listed}"
            )
        reason = _obstacle(impls[backend], backend, device, dtype)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend {backend!r} cannot run: {reason}")
        return impls[backend]
    compiled_only = None
    for name, impl in impls.items():
        if device.type in impl.devices and _obstacle(impl, name, device, dtype) is None:
            if impl.verified is not None or device.type == "cpu":
                return impl
            if compiled_only is None:
                compiled_only = impl
    return compiled_only


def chosen(op: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The name of what `resolve(op, device, None, dtype)` takes, "reference" included."""
    impl = resolve(op, device, None, dtype)
    names = (name for name, candidate in TABLE[op].items() if candidate is impl)
    return next(names, "reference")


def support_table() -> str:
    """The README's table of ops and backends, as Markdown.

    A GPU cell says "verified on <gpu>, <date>" where `Impl.verified` does, else "compiled,
    unverified". In CI, on a CPU, C++ is tested, Triton in its interpreter and CUDA in the emulator
    of tests/emulator.
    """
    head = ("op", "PyTorch", "C++ (CPU)", "Triton", "CUDA")
    rows = [head, tuple("---" for _ in head)]
    for op, impls in TABLE.items():
        cells = [f"`{op}`", "tested in CI", "tested in CI" if "cpp" in impls else "-"]
        for name, stand_in in (("triton", "interpreter"), ("cuda", "emulator")):
            impl = impls.get(name)
            if impl is None:
                cells.append("-")
                continue
            on_gpu = f"verified on {impl.verified}" if impl.verified else "compiled, unverified"
            cells.append(f"{on_gpu}; {stand_in} tested in CI")
        rows.append(tuple(cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
