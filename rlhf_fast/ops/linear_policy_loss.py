"""The policy loss of packed tokens, from hidden states and the head's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops._checks import require, same_shape
from rlhf_fast.ops._linear_checks import check_head, check_row_tokens
from rlhf_fast.ops.linear_logprobs import linear_logprobs
from rlhf_fast.ops.policy_loss import policy_loss


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k2",
    kl_unbiased_gradient: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_logprobs`: the loss of N packed tokens without their logits.

    The options before `clip_low` are those of `linear_logprobs`, the others those of `policy_loss`.
    The entropy in the bonus is the policy's own, exact over the vocabulary; `entropy_coef=0` leaves
    it out. Tokens that `mask` leaves out cost no product and get no gradient; whatever
    stands there (ids, log-probs, NaN) is never read. A token equal to `ignore_index` does not count
    either, whatever `mask` says.

    Args:
        hidden: `[N, D]`, one row per predicted token, the sequences one after the other.
        weight: `[V, D]`, the language-model head.
        tokens: `[N]` sampled ids.
        old_logprobs: `[N]` log-probs of `tokens` under the policy that the ratio starts from; with
            the same `mask` and rows in one call they reproduce bit by bit.
        advantages: `[N]`, or with `cu_seqlens` `[B]` for one per sequence.
        mask: `[N]`; True (or nonzero) means that this token counts.
        bias: see `linear_logprobs`, as for the options after it up to `memory_budget`.
        cu_seqlens: `[B + 1]` int32 offsets of the sequences, from 0 to N; None where nothing in the
            loss works by sequence.
        backend: the implementation of `linear_logprobs` and of `policy_loss` to use; None takes
            the first that fits each.

    Returns:
        `(loss, metrics)` of `policy_loss`; the loss is differentiable, once, in `hidden`, `weight`
        and `bias`.

    Raises:
        TypeError: an input has the wrong kind of dtype.
        ValueError: shapes, devices or options do not fit.
        IndexError: the id of a token that counts lies outside `[0, V)`, as in `token_logprobs`.
    """
    op = "linear_policy_loss"
    check_head(op, hidden, weight, bias)
    check_row_tokens(op, hidden, tokens)
    same_shape(op, tokens=tokens, old_logprobs=old_logprobs, mask=mask)
    if cu_seqlens is None:
        require(
            ratio != "sequence" and not aggregation.startswith("seq-"),
            f"{op}: ratio={ratio!r} with aggregation={aggregation!r} needs to know the sequences; "
            "pass cu_seqlens",
        )
        same_shape(op, tokens=tokens, advantages=advantages, importance_weights=importance_weights)
        cu_seqlens = torch.zeros(2, dtype=torch.int32, device=tokens.device)
        cu_seqlens[1:] = tokens.shape[0]
    counts = (mask != 0) & (tokens != ignore_index)
    logprobs, entropy = linear_logprobs(
        hidden,
        weight,
        torch.where(counts, tokens, ignore_index),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        entropy_grad=entropy_coef != 0.0,
        backend=backend,
    )
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        counts,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio=ratio,
        aggregation=aggregation,
        normalizer=normalizer,
        importance_weights=importance_weights,
        entropy=entropy if entropy_coef != 0.0 else None,
        entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs,
        kl=kl,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        kl_unbiased_gradient=kl_unbiased_gradient,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
