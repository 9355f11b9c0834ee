"""A call of each kernel by its launchers, on tensors that may be anywhere."""

from __future__ import annotations

from collections.abc import Callable

import emulated_cuda
import torch
from guard import Guarded, guarded
from torch import Tensor

from rlhf_fast import backends
from rlhf_fast.compiled import full_kl, gae, policy_loss, ppo_advantages, token_logprobs, value_loss

# One block and many, fewer tokens than a warp has lanes, sequences that are cut into chunks.
SHAPES = [(1, 1), (3, 37), (40, 33), (2, 2600), (1, 9001)]
MORE_THAN_BLOCKS = (1030, 3)  # that a loss's grid has: each takes several in turn

Place = Callable[[Tensor], Tensor]
DTYPES = (torch.float32, torch.float64)


def _launch(op: str, launcher: str, *args):
    return getattr(backends.TABLE[op]["cuda"], launcher)(*args)


def _tokens(shape, dtype, place: Place, packed: bool, n: int):
    """`n` float tensors and a mask, [B, T] or packed, and cu_seqlens."""
    B, T = shape
    flat = (B * T,) if packed else shape
    tensors = [place(torch.randn(flat, dtype=dtype)) for _ in range(n)]
    mask = place((torch.rand(flat) < 0.8).to(torch.uint8)).view(torch.bool)
    cu_seqlens = place(torch.arange(B + 1, dtype=torch.int32) * T) if packed else None
    return tensors, mask, cu_seqlens


def _gae(shape, place):
    for dtype in DTYPES:
        for packed in (False, True):
            (a, b), mask, cu = _tokens(shape, dtype, place, packed, 2)
            bootstrap = place(torch.randn(shape[0], dtype=dtype))
            lam = place(torch.rand(shape[0], dtype=dtype))
            yield from _launch("gae", "forward", a, b, mask, None, lam, bootstrap, cu, 0.9, 0.0)
            yield from _launch("gae", "backward", a, b, mask, None, lam, cu, 0.9, 0.0)


def _ppo_advantages(shape, place):
    for dtype in DTYPES:
        for packed in (False, True):
            (a, b, c), mask, cu = _tokens(shape, dtype, place, packed, 3)
            scores = place(torch.randn(shape[0], dtype=dtype))
            for value_lam in (-1.0, 0.7):
                coefficients = (0.9, 0.8, value_lam, 0.0, 0.1, 0.0, True)
                advantages, returns, rewards, moments = _launch(
                    "ppo_advantages", "forward",
                    scores, a, b, c, mask, None, None, None, None, cu, *coefficients,
                )  # fmt: skip
                _launch("ppo_advantages", "backward", advantages, mask, moments)
                yield from (advantages, returns, rewards, moments)


def _policy_loss(shape, place):
    # Token-mean and sequence-mean-token-mean; ratios of tokens, sequences and CISPO.
    for dtype, packed, ratio, aggregation in (
        (torch.float32, False, 0, 0),
        (torch.float32, True, 1, 1),
        (torch.float64, True, 0, 2),
        (torch.float64, False, 3, 0),
    ):
        (new, old, advantages, entropy, ref), mask, cu = _tokens(shape, dtype, place, packed, 5)
        options = (None, 0.0, ratio, aggregation, 0.8, 1.2, 3.0, 2, False, 0.1, 0.2, True, True)
        loss, values, grad, shares = _launch(
            "policy_loss", "forward",
            new, old, advantages, mask, None, entropy, ref, None, cu, *options,
        )  # fmt: skip
        upstream = place(torch.full((), 0.7, dtype=dtype))
        needs = (True, True, False)
        grads = _launch("policy_loss", "backward", upstream, values, grad, shares, 0.1, 0.2, *needs)
        yield from (loss, values, grad, shares, *grads)


def _value_loss(shape, place):
    for dtype in DTYPES:
        (values, old, returns), mask, _ = _tokens(shape, dtype, place, False, 3)
        options = (None, 0.0, 0.2, True)
        loss, out, grad = _launch("value_loss", "forward", values, old, returns, mask, *options)
        upstream = place(torch.full((), 0.7, dtype=dtype))
        yield from (loss, out, grad, _launch("value_loss", "backward", upstream, out, grad))


def _logits(shape, place, dtype):
    # Columns of a wider tensor: rows do not lie as vector loads need.
    N, V = shape
    return place(torch.randn(N, V + 3).to(dtype))[:, 1 : V + 1] if V % 2 else place(
        torch.randn(N, V).to(dtype)
    )  # fmt: skip


def _token_logprobs(shape, place):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for softcap in (0.0, 15.0):
            logits = _logits(shape, place, dtype)
            ids = place(torch.randint(shape[1], shape[:1]))
            options = (None, 0.7, softcap, 1.0, -100, 0)
            logprobs, entropy, stats = _launch(
                "token_logprobs", "forward", logits, ids, *options, None
            )
            upstream = place(torch.randn(shape[0]))
            out = place(torch.zeros(shape, dtype=dtype))
            _launch(
                "token_logprobs", "backward",
                logits, ids, stats, upstream, upstream, *options, None, out,
            )  # fmt: skip
            yield from (logprobs, entropy, stats, out)


def _full_kl(shape, place):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for softcap in (0.0, 15.0):
            logits, ref = _logits(shape, place, dtype), _logits(shape, place, dtype)
            options = (None, 0.7, softcap, 1.0)
            kl, stats = _launch("full_kl", "forward", logits, ref, *options, None)
            upstream = place(torch.randn(shape[0]))
            outs = [place(torch.zeros(shape, dtype=dtype)) for _ in range(2)]
            backward = (logits, ref, stats, upstream, *options, None, *outs)
            _launch("full_kl", "backward", *backward)
            yield from (kl, stats, *outs)


CALLS = {
    "gae": _gae,
    "ppo_advantages": _ppo_advantages,
    "policy_loss": _policy_loss,
    "value_loss": _value_loss,
    "token_logprobs": _token_logprobs,
    "full_kl": _full_kl,
}
LAUNCHERS = {
    getattr(torch.ops.rlhf_fast, f"{module.__name__.rpartition('.')[2]}_{kind}"): launcher
    for module in (gae, ppo_advantages, policy_loss, value_loss, token_logprobs, full_kl)
    for kind, launcher in (
        ("forward", module._forward),
        ("backward", getattr(module, "_backward", None)),
        ("whiten", getattr(module, "_whiten", None)),
    )
    if launcher is not None
}


def results(name: str, shape, place: Place = lambda x: x) -> list[Tensor]:
    """Everything that the kernels of an op write, for inputs that depend on `shape` alone."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return [x.clone() for x in CALLS[name](shape, place)]


class Inside(Guarded):
    """Registered ops are entered, so that what their launchers allocate is guarded, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in LAUNCHERS:
            with self:
                return LAUNCHERS[function.overloadpacket](*args)
        return super().__torch_dispatch__(function, types, args, kwargs)


def within_guards(at_end: bool) -> None:
    """Runs all calls on guarded tensors, and prints how many kernels that were."""
    for name in CALLS:
        for shape in SHAPES[1:]:
            with Inside(at_end):
                written = results(name, shape, lambda x: guarded(x, at_end))
            assert not any(x.isnan().any() for x in written), (name, shape)
    print(emulated_cuda.launches())
