"""A second derivative is refused: torch's own guard would drop it without a word."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import (
    full_kl,
    gae,
    linear_kl,
    linear_logprobs,
    policy_loss,
    token_logprobs,
    value_loss,
)

X = torch.randn(4, 5, dtype=torch.float64)
TOKENS = torch.tensor([0, 1, 2, 3])
OPS = {
    "token_logprobs": lambda x: token_logprobs(x, TOKENS)[0],
    "linear_logprobs": lambda x: linear_logprobs(x, X, TOKENS)[0],
    "full_kl": lambda x: full_kl(x, X),
    "linear_kl": lambda x: linear_kl(x, X, X, X),
    "gae": lambda x: gae(x, X, backend="cpp")[0],
    "policy_loss": lambda x: policy_loss(x, X, X, X, backend="cpp")[0],
    "value_loss": lambda x: value_loss(x, X, X, X, backend="cpp")[0],
}


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_penalty_is_refused_and_a_plain_gradient_is_not(op):
    if op in ("gae", "policy_loss", "value_loss"):
        pytest.importorskip("rlhf_fast._C", reason="rlhf_fast._C was not built")
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(OPS[op](x).sum(), x)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiable once, so create_graph=True"):
        torch.autograd.grad(OPS[op](x).sum(), x, create_graph=True)
