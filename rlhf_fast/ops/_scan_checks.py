"""What the scans over tokens ask of their arguments."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops._checks import floating, require, same_shape
from rlhf_fast.ops._sequences import check_layout
from rlhf_fast.ops._softmax import host_checks_run


def check_scan(
    op: str,
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> None:
    """Raises as the docstring of `gae` says."""
    floating(op, rewards=rewards, values=values, bootstrap=bootstrap)
    same_shape(op, rewards=rewards, values=values, mask=mask)
    batch = check_layout(op, "rewards", rewards, cu_seqlens)
    if cu_seqlens is not None and rewards.numel() >= 2**31:
        raise ValueError(
            f"{op}: {rewards.numel()} packed tokens overflow int32 offsets; pass fewer at a time"
        )
    check_per_sequence(op, batch, rewards, bootstrap=bootstrap)
    check_coefficients(op, batch, rewards, gamma=gamma, lam=lam)


def check_coefficients(
    op: str, batch: int, like: Tensor, **coefficients: float | Tensor | None
) -> None:
    """Raises unless each is in [0, 1]: a number, or a constant tensor [batch]; `None` passes."""
    for name, x in coefficients.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            if not 0.0 <= x <= 1.0:
                raise ValueError(f"{op}: {name}={x!r}; expected it in [0, 1]")
            continue
        floating(op, **{name: x})
        require(
            not x.requires_grad,
            f"{op}: {name} requires a gradient, but {op} gives it none; pass {name}.detach()",
        )
        check_per_sequence(op, batch, like, **{name: x})
        if host_checks_run(x.device):
            outside = x[~((x >= 0.0) & (x <= 1.0))]
            if outside.numel():
                raise ValueError(
                    f"{op}: {name} holds {outside[0].item()}; expected all of it in [0, 1]"
                )


def check_per_sequence(op: str, batch: int, like: Tensor, **vectors: Tensor | None) -> None:
    """Raises unless each is [batch], on the device of `like`; `None` passes."""
    for name, x in vectors.items():
        if x is not None and (x.shape != (batch,) or x.device != like.device):
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)} on {x.device}; expected one element per "
                f"sequence, [{batch}], on {like.device}"
            )
