"""KL(policy || reference) estimated from the log-probs of sampled tokens."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.backends import resolve
from rlhf_fast.ops._checks import floating, one_of, require, same_shape, stats_dtype
from rlhf_fast.ops._softmax import exp_excess

KINDS = ("k1", "k2", "k3", "abs")
MAX_LOG_RATIO = 20.0
"""Bound on every log-ratio before it is exponentiated: exp(20) = 4.9e8."""
HUGE = 1e18
"""Stands in for an infinite log-prob: sums of it and its square stay finite in fp32."""


def kl_estimate_reference(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: str = "k1",
    old_logprobs: Tensor | None = None,
    unbiased_gradient: bool = False,
) -> Tensor:
    """`kl_estimate` in PyTorch, arguments unchecked: what every backend must compute."""
    dtype = stats_dtype(logprobs.dtype)
    logprobs, ref_logprobs = logprobs.to(dtype), ref_logprobs.to(dtype)
    u = logprobs - ref_logprobs
    if kind == "k1":
        value = u
    elif kind == "k2":
        value = 0.5 * u * u
    elif kind == "k3":
        value = exp_excess(u.clamp(min=-MAX_LOG_RATIO))
    else:
        value = u.abs()
    if not unbiased_gradient:
        return value
    # An infinite one would make NaN of the 0 that is added.
    score = u.detach().clamp(-2 * HUGE, 2 * HUGE)
    if old_logprobs is not None:
        log_weight = logprobs.detach() - old_logprobs.detach().to(dtype)
        score = score * log_weight.nan_to_num(0.0).clamp(max=MAX_LOG_RATIO).exp()
    # Adds exactly 0 to the value, and d logprobs to its derivative where they are finite.
    nothing = (logprobs - logprobs.detach()).nan_to_num(0.0)
    return value.detach() + score * nothing


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: str = "k1",
    old_logprobs: Tensor | None = None,
    unbiased_gradient: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Estimates KL(policy || reference) at each sampled token, in nats.

    With `u = logprobs - ref_logprobs` (Schulman 2020, "Approximating KL divergence"):

    - `k1`: `u`. Unbiased; may be negative. As a loss its gradient has expectation 0.
    - `k2`: `u^2 / 2`. Biased, but on-policy its gradient is that of the KL.
    - `k3`: `exp(-u) - 1 + u`. Unbiased, >= 0; its gradient is that of the *forward* KL. Where the
      reference's log-prob exceeds the policy's by more than `MAX_LOG_RATIO` = 20 nats it stays at
      `exp(20) - 21` and has no gradient.
    - `abs`: `|u|`.

    `unbiased_gradient=True` keeps the value and replaces the gradient by

        exp(logprobs - old_logprobs) * u * d logprobs

    with both factors constant. Derivation: `grad KL = E_pi[(u + 1) grad log pi]`, the 1 drops out
    as `E_pi[grad log pi] = 0`, and sampling from `old` puts the weight `pi / old` in front (see
    Tang and Munos 2025, arXiv:2506.09477, for what goes wrong otherwise). It is unbiased for the KL
    of the token's own distribution, its prefix given, as long as `pi / old < exp(20)`, where the
    weight is capped. No gradient reaches `ref_logprobs` or `old_logprobs` then.

    Args:
        logprobs: `[...]` log-probs of the sampled tokens under the policy; floating.
        ref_logprobs: the same under the reference; same shape.
        kind: one of k1, k2, k3, abs.
        old_logprobs: the same under the policy that sampled; only with `unbiased_gradient`.
            None means that the policy itself sampled: `logprobs.detach()`.
        unbiased_gradient: replace the gradient as above.
        backend: the implementation to use; None takes the first that fits.

    Returns:
        `[...]` in fp32 (fp64 for fp64 `logprobs`), differentiable in `logprobs` and, without
        `unbiased_gradient`, in `ref_logprobs`.

    Raises:
        TypeError: an input is not floating.
        ValueError: shapes differ, `kind` is unknown, or `old_logprobs` comes without
            `unbiased_gradient`.
    """
    op = "kl_estimate"
    floating(op, logprobs=logprobs, ref_logprobs=ref_logprobs, old_logprobs=old_logprobs)
    same_shape(op, logprobs=logprobs, ref_logprobs=ref_logprobs, old_logprobs=old_logprobs)
    one_of(op, "kind", kind, KINDS)
    require(
        old_logprobs is None or unbiased_gradient,
        f"{op}: old_logprobs is given, but only unbiased_gradient=True uses it; "
        "set that, or leave old_logprobs out",
    )
    resolve(op, logprobs.device, backend, logprobs.dtype)
    return kl_estimate_reference(
        logprobs,
        ref_logprobs,
        kind=kind,
        old_logprobs=old_logprobs,
        unbiased_gradient=unbiased_gradient,
    )
