"""Per-sequence sums and broadcasts, for padded `[B, T]` and packed `[N]` tokens alike.

`cu_seqlens` is None for padded tokens; for packed ones its `[B + 1]` offsets bound the sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops._checks import integral, require
from rlhf_fast.ops._softmax import host_checks_run


def check_layout(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """Raises unless `tokens`, an argument called `name`, is `[B, T]` or packed `[N]`; returns B."""
    shape = list(tokens.shape)
    if cu_seqlens is None:
        require(
            tokens.dim() == 2,
            f"{op}: {name} has shape {shape}; expected [B, T], or [N] together with cu_seqlens",
        )
        return tokens.shape[0]
    integral(op, cu_seqlens=cu_seqlens)
    require(
        tokens.dim() == 1 and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0,
        f"{op}: with cu_seqlens {list(cu_seqlens.shape)} {name} has shape {shape}; "
        "expected [B + 1] and [N]",
    )
    require(
        cu_seqlens.device == tokens.device,
        f"{op}: cu_seqlens is on {cu_seqlens.device}, but {name} is on {tokens.device}; "
        "move them to one device",
    )
    if host_checks_run(tokens.device):
        bounds = cu_seqlens.tolist()
        require(
            bounds[0] == 0 and bounds[-1] == tokens.numel() and bounds == sorted(bounds),
            f"{op}: cu_seqlens must rise from 0 to the {tokens.numel()} packed tokens, not fall, "
            f"and end there; it starts {bounds[:4]} and ends at {bounds[-1]}",
        )
    return cu_seqlens.numel() - 1


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[B]` sums over each sequence's tokens, 0 for one without any; in a fixed order."""
    if cu_seqlens is None:
        return x.sum(1)
    # In fp64: it adds one element after the other, where a sum over a dimension adds in pairs.
    sums = torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens, initial=0, unsafe=True)
    return sums.to(x.dtype)


def per_token(per_sequence: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Spreads `[B]` over the tokens: the shape of `like`, each sequence's value on its tokens."""
    if cu_seqlens is None:
        return per_sequence[:, None].expand_as(like)
    return per_sequence.repeat_interleave(cu_seqlens.diff(), output_size=like.numel())


def is_last_token(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """True at the last True of each sequence of the boolean `mask`, and nowhere else."""
    running = mask.cumsum(-1)
    if cu_seqlens is None:
        return mask & (running == running[:, -1:])
    at_end = F.pad(running, (1, 0))[cu_seqlens[1:].long()]
    return mask & (running == per_token(at_end, mask, cu_seqlens))
