"""linear_logprobs under torch.compile and autocast; and what is refused."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from backend_cases import calls, cases
from linear_logprobs_cases import problem
from torch import Tensor

from rlhf_fast.ops import _logprob_tiles, _plan, _softmax
from rlhf_fast.ops.linear_logprobs import linear_logprobs


@pytest.fixture(params=cases("linear_logprobs"))
def run(request, monkeypatch):
    """`linear_logprobs` through one backend."""
    yield from calls("linear_logprobs", linear_logprobs, request.param, monkeypatch)


@pytest.mark.parametrize("memory_budget", [0, None])
def test_autocast_rounds_the_inputs_once_and_nothing_else(run, memory_budget: int | None) -> None:
    hidden, weight, bias, tokens = problem(dtype=torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]

    def results(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = run(h, w, tokens, bias=bias, memory_budget=memory_budget)
        loss = (logprobs + entropy).sum()
        return logprobs, entropy, *torch.autograd.grad(loss, (h, w, bias))

    with torch.autocast(run.case.device, torch.bfloat16):
        cast = results(hidden, weight)
    assert [x.dtype for x in cast] == [torch.float32] * 5
    for one, other in zip(cast, results(*rounded), strict=True):
        assert torch.equal(one.to(other.dtype), other)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("case", cases("linear_logprobs", interpreter=False))
@pytest.mark.parametrize("memory_budget", [None, 10**9])
def test_compiles_as_one_graph(case, memory_budget: int | None) -> None:
    tensors = problem(dtype=torch.float32)
    hidden, weight, bias, tokens = (
        x.detach().to(case.device).requires_grad_(x.requires_grad) for x in tensors
    )

    def gradients(function: Any) -> tuple[Tensor, ...]:
        logprobs, entropy = function(hidden, weight, tokens, bias)
        loss = (logprobs - 0.3 * entropy).sum()
        return logprobs, *torch.autograd.grad(loss, (hidden, weight, bias))

    def op(h: Tensor, w: Tensor, t: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        options = {"memory_budget": memory_budget, "backend": case.backend}
        return linear_logprobs(h, w, t, bias=b, temperature=0.7, **options)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled), gradients(op), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "kept_tiles", [0, 2]
)  # full ones without gaps: all of the buffer is written
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(True, False, True), (True, False, False), (False, True, False)])
def test_registered_ops_pass_opcheck(
    kept_tiles: int, dtype: torch.dtype, needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "STRIDE_MULTIPLE", 1)
    *inputs, tokens = problem(dtype=dtype)
    hidden, weight, bias = (x.detach() for x in inputs)
    options = (None, 0.7, 0.0, 1.0, -100, dtype, kept_tiles)
    forward = (hidden, weight, bias, tokens, *options, False, "reference")
    torch.library.opcheck(_logprob_tiles.forward, forward)
    *outputs, stats, kept, _ = _logprob_tiles.forward(*forward)
    backward = (*outputs, hidden, weight, bias, tokens, stats, kept, *options)
    torch.library.opcheck(_logprob_tiles.backward, (*backward, True, list(needs), "reference"))


def test_id_outside_the_vocabulary_is_named() -> None:
    hidden, weight, _, tokens = problem()
    tokens[3] = 11
    with pytest.raises(IndexError, match=r"linear_logprobs: tokens holds the id 11, .*\[0, 11\)"):
        linear_logprobs(hidden, weight, tokens)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("memory_budget", [0, 5 * 4 * 4, 10**9])  # of a frozen head: direct, too
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bad", [11, -1, 2**40])
def test_without_the_host_check_such_a_row_is_nan_and_no_other(
    run, monkeypatch: pytest.MonkeyPatch, memory_budget: int, frozen: bool, bad: int
) -> None:
    for module in (_softmax, importlib.import_module(linear_logprobs.__module__)):
        monkeypatch.setattr(module, "host_checks_run", lambda device: False)
    hidden, weight, _, _ = problem(rows=5, dtype=torch.float32)
    tokens = torch.tensor([0, 3, bad, 10, 7])
    weight.requires_grad_(not frozen)
    logprobs, entropy = run(hidden, weight, tokens, memory_budget=memory_budget)
    for output in (logprobs, entropy):
        assert output.isnan().tolist() == [False, False, True, False, False]
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.5])  # what a mask makes of it
    grads = torch.autograd.grad(logprobs, [hidden] if frozen else [hidden, weight], upstream)
    assert all(g.isfinite().all() and g.any() for g in grads) and not grads[0][2].any()


def test_wrong_arguments_are_named() -> None:
    hidden, weight, bias, tokens = problem(rows=6, vocab=7)
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 3, 4\]; expected \[N, D\]"):
        linear_logprobs(hidden.view(2, 3, 4), weight, tokens.view(2, 3))
    with pytest.raises(ValueError, match=r"weight has shape \[4, 7\]; expected \[V, 4\]"):
        linear_logprobs(hidden, weight.T, tokens)
    with pytest.raises(ValueError, match=r"bias has shape \[3\]; expected \[7\]"):
        linear_logprobs(hidden, weight, tokens, bias=bias[:3])
    with pytest.raises(ValueError, match=r"tokens has shape \[5\]; expected \[6\]"):
        linear_logprobs(hidden, weight, tokens[:5])
    with pytest.raises(TypeError, match="hidden has dtype torch.int64"):
        linear_logprobs(hidden.long(), weight, tokens)
    with pytest.raises(TypeError, match="tokens has dtype torch.float32"):
        linear_logprobs(hidden, weight, tokens.float())
    with pytest.raises(ValueError, match="memory_budget=-1"):
        linear_logprobs(hidden, weight, tokens, memory_budget=-1)
    with pytest.raises(ValueError, match="logit_scale=inf"):
        linear_logprobs(hidden, weight, tokens, logit_scale=math.inf)
    with pytest.raises(ValueError, match=r"temperature has shape \[2\]"):
        linear_logprobs(hidden, weight, tokens, temperature=torch.ones(2))
    with pytest.raises(TypeError, match="live_rows has dtype torch.bool; expected int64"):
        linear_logprobs(hidden, weight, tokens, live_rows=tokens >= 0)
    for wrong in ([0, 6], [-1, 2], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match=r"live_rows must rise.*within \[0, 6\)"):
            linear_logprobs(hidden, weight, tokens, live_rows=torch.tensor(wrong))
