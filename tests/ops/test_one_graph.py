"""Under torch.compile one graph serves all numbers of rows and all temperatures, gradients too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from rlhf_fast.ops import full_kl, linear_kl, linear_logprobs, token_logprobs

DIM, VOCAB = 4, 9


def of_logits(rows: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, VOCAB), torch.randint(VOCAB, (rows,))


def of_two_logits(rows: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, VOCAB), torch.randn(rows, VOCAB)


def of_a_head(rows: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, DIM), torch.randn(VOCAB, DIM), torch.randint(VOCAB, (rows,))


def of_two_heads(rows: int) -> tuple[Tensor, ...]:
    hidden, weight = torch.randn(rows, DIM), torch.randn(VOCAB, DIM)
    return hidden, weight, torch.randn(rows, DIM), weight + 0.5


OPS: dict[Any, Callable[[int], tuple[Tensor, ...]]] = {
    token_logprobs: of_logits,
    full_kl: of_two_logits,
    linear_logprobs: of_a_head,
    linear_kl: of_two_heads,
}


COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler"
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=COMPILER)])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_one_graph_serves_all_lengths_and_temperatures(op: Any, backend: str) -> None:
    def loss(temperature: float, *inputs: Tensor) -> Tensor:
        out = op(*inputs, temperature=temperature)
        return out.sum() if isinstance(out, Tensor) else (out[0] - 0.3 * out[1]).sum()

    # Backends with AOTAutograd: Dynamo alone leaves a float open that they bind to its value.
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for rows in range(4, 16):
        inputs = OPS[op](rows)
        leaf = inputs[0].requires_grad_()
        results = []
        for function in (compiled, loss):
            value = function(0.53 + rows / 16, leaf, *inputs[1:])
            results.append((value, *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)
    assert graphs.frame_count <= 2  # one for the first shape, then one for all
