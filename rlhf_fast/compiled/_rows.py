"""How tensors reach the compiled extensions: addresses, rows, dtypes, where to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import compiled

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The extensions' codes; csrc/softmax.h has the other half."""

LIBRARY = torch.library.Library("rlhf_fast", "FRAGMENT")


def register(name: str, schema: str, launcher: Any, fake: Any) -> Any:
    """Makes `torch.ops.rlhf_fast.<name>` of a launcher for all extensions there are."""
    LIBRARY.define(name + schema)
    for key, extension in (("CPU", compiled.C), ("CUDA", compiled.CUDA)):
        if extension is not None:
            LIBRARY.impl(name, launcher, key)
    torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rlhf_fast, name).default


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is for `_cuda`, not for `_C`. Launchers that differ between them ask here."""
    return x.device.type != "cpu"


def module(x: Tensor) -> Any:
    """The extension for the device of `x`."""
    return compiled.CUDA if on_gpu(x) else compiled.C


def runner(x: Tensor) -> tuple[int, ...]:
    """Where to run: (threads,) on a CPU, (device, stream) on a GPU."""
    if not on_gpu(x):
        return (torch.get_num_threads(),)
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def contiguous(x: Any, dtype: torch.dtype | None = None) -> Any:
    """`x`, None or not, without gaps and in `dtype` where one is given."""
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def sequences(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences there are in tokens [B, T], or in packed ones [N]."""
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def unit_stride(x: Any) -> Any:
    """`x`, None or not, itself if its tokens lie side by side (rows may be anywhere), or a copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def token_rows(x: Tensor | None) -> tuple[int, int]:
    """Data pointer (0 for None) and the elements from one row of tokens to the next."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def unwritten(n: int, like: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """`n` contiguous outputs; zeroed where a malformed `cu_seqlens` could leave tokens out."""
    unread = cu_seqlens is not None and on_gpu(like)
    allocate = torch.zeros if unread else torch.empty
    return tuple(allocate(like.shape, dtype=like.dtype, device=like.device) for _ in range(n))


def stats_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any is, else fp32."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def readable(x: Tensor) -> Tensor:
    """`x [..., w]` itself where `layout` can tell its rows, else a copy."""
    return x if layout(x) is not None else x.contiguous()


def layout(x: Tensor) -> tuple[int, int, int] | None:
    """`(inner, outer_stride, inner_stride)` of `x [..., w]`, None where two levels don't do.

    Row `i`, counted over all leading dims, begins `i // inner * outer_stride + i % inner *
    inner_stride` elements after the first.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    levels: list[tuple[int, int]] = []  # (size, stride), innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = (*levels, (1, 0), (1, 0))[:2]
    return inner, outer_stride, inner_stride


def rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address and layout of `x`; an address of 0 for None."""
    if x is None:
        return 0, 1, 0, 0
    levels = layout(x)
    assert levels is not None, f"strides {x.stride()} of shape {x.shape} are not rows"
    return x.data_ptr(), *levels
