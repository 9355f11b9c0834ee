"""Hugging Face causal language models as policies.

A causal language model is used in two parts, its trunk (hidden states) and its head (a matrix), so
that the fused linear ops make log-probabilities without a `[tokens, vocabulary]` tensor. Whether
the two parts make up the model is measured when it is wrapped; where they do not, the model's own
logits are used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast._adapters import adapted
from rlhf_fast.data import Rollout
from rlhf_fast.lora import frozen_copy, language_model
from rlhf_fast.models import evaluating, hidden_states, model_inputs
from rlhf_fast.ops import full_kl, linear_kl, linear_logprobs, token_logprobs

IGNORED = -100
LARGE_LOGIT = 50.0


class HeadOptions(NamedTuple):
    """What a head does to `hidden @ weight.T + bias` (see `ops.linear_logprobs`)."""

    softcap: float | None
    logit_scale: float


class PolicyOutput(NamedTuple):
    """What a policy says of given tokens.

    Attributes:
        logprobs: fp32 `[B, L]`, of each target token given those before it; 0 elsewhere.
        entropy: fp32 `[B, L]`, of the distribution that it was drawn from; 0 elsewhere.
        hidden: `[B, L, D]`, the trunk's states.
        kl: fp32 `[B, L]`, exact KL from a reference, if one was given.
    """

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor
    kl: Tensor | None


class Policy(nn.Module):
    """A Hugging Face causal language model that gives log-probabilities of tokens.

    Args:
        model: For example GPT-2, Llama, Qwen, Gemma (its soft cap is found), or a `peft.PeftModel`
            over one: `model` is then what it wraps, with the adapted layers.
        vocabulary: Tokens that can be drawn: the distribution is over the first so many rows of
            the head. By default all, also those that stand for no token.
    """

    def __init__(self, model: Any, vocabulary: int | None = None) -> None:
        super().__init__()
        self.model: PreTrainedModel = language_model(model)
        self.vocabulary = vocabulary
        self.head_options = self._find_head()

    def _head(self) -> tuple[Tensor, Tensor | None]:
        # Of a head that is trained beside adapters there are two: that in force counts.
        head: Any = adapted(self.model.get_output_embeddings())[0]
        bias = getattr(head, "bias", None)
        drawn = slice(self.vocabulary)
        return head.weight[drawn], None if bias is None else bias[drawn]

    def _find_head(self) -> HeadOptions | None:
        """The head's options if trunk and head make up the model on a probe, else None."""
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        options = HeadOptions(cap or getattr(config, "logits_soft_cap", None), scale)
        head: Any = self.model.get_output_embeddings()
        if head is None or self.model.base_model is self.model:
            return None
        head, layer = adapted(head)
        if layer is not None:
            return None  # an adapter on the head: no one matrix is what it computes
        tokens = torch.arange(8, device=self.model.device)[None]
        tokens = tokens % (self.vocabulary or head.weight.shape[0])
        mask = torch.ones_like(tokens).bool()
        with torch.no_grad(), evaluating(self.model):
            hidden = hidden_states(self.model, tokens, mask)
            if hidden.shape[-1] != head.weight.shape[-1]:
                return None
            factors = [1.0]
            if self.model.dtype == torch.float32:
                # A cap that the config does not name shows in large logits alone.
                factors.append(LARGE_LOGIT / float(self._logits(tokens, mask).abs().amax()))
            agree = all(self._agrees(options, hidden, tokens, factor) for factor in factors)
        return options if agree else None

    def _agrees(self, options: HeadOptions, hidden: Tensor, tokens: Tensor, factor: float) -> bool:
        """Whether `options` give the model's own log-probs, with what its head puts out times
        `factor`."""
        calls = []

        def enlarge(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            calls.append(module)
            return out * factor

        targets = torch.ones_like(tokens).bool()
        with self.model.get_output_embeddings().register_forward_hook(enlarge):
            own = self._from_logits(tokens, targets, targets, 1.0, "reference")[0]
        if not calls and factor != 1.0:
            return True  # the model reads the matrix by itself
        larger = options._replace(logit_scale=options.logit_scale * factor)
        # A backend that was asked for need not run where the model lies before training.
        ours = self._from_hidden(hidden, tokens, targets, 1.0, larger, "reference")[0]
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
        return bool((ours - own).abs().max() <= tolerance)

    def _from_hidden(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        temperature: float,
        head: HeadOptions,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self._head()
        index = torch.where(targets, tokens, IGNORED)[:, 1:]
        logprobs, entropy = linear_logprobs(
            hidden[:, :-1].flatten(0, 1),
            weight,
            index.flatten(),
            bias=bias,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            backend=backend,
        )
        return _after_first(logprobs.view(index.shape)), _after_first(entropy.view(index.shape))

    def _logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(**model_inputs(self.model, tokens, mask)).logits
        return logits[..., : self.vocabulary]

    def _from_logits(
        self,
        tokens: Tensor,
        mask: Tensor,
        targets: Tensor,
        temperature: float,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        index = torch.where(targets, tokens, IGNORED)[:, 1:]
        logits = self._logits(tokens, mask)[:, :-1]
        logprobs, entropy = token_logprobs(logits, index, temperature=temperature, backend=backend)
        return _after_first(logprobs), _after_first(entropy)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        ref: Policy | None = None,
    ) -> PolicyOutput:
        """Scores `tokens`.

        Args:
            tokens: int64 `[B, L]`.
            mask: bool `[B, L]`, True for real tokens.
            targets: bool `[B, L]`, True for the tokens to score; a first token has nothing
                before it and is never scored.
            temperature: Divides the logits.
            ref: Also give the exact KL from this policy at each target.
        """
        hidden = hidden_states(self.model, tokens, mask)
        if self.head_options is None:
            logprobs, entropy = self._from_logits(tokens, mask, targets, temperature)
        else:
            logprobs, entropy = self._from_hidden(
                hidden, tokens, targets, temperature, self.head_options
            )
        kl = (
            None if ref is None else self._exact_kl(ref, hidden, tokens, mask, targets, temperature)
        )
        return PolicyOutput(logprobs, entropy, hidden, kl)

    def logprobs_of(self, rollout: Rollout, temperature: float) -> Tensor:
        """fp32 `[B, T]`, of the sampled tokens of `rollout`; 0 elsewhere."""
        batch = rollout.flush_left()
        output = self(batch.tokens, batch.mask, batch.targets, temperature)
        return batch.completions(output.logprobs)

    def _exact_kl(
        self,
        ref: Policy,
        hidden: Tensor,
        tokens: Tensor,
        mask: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> Tensor:
        where = targets[:, 1:]
        if self.head_options is None or self.head_options != ref.head_options:
            with torch.no_grad():
                ref_logits = ref._logits(tokens, mask)[:, :-1][where]
            logits = self._logits(tokens, mask)[:, :-1][where]
            kl = full_kl(logits, ref_logits, temperature=temperature)
            return _after_first(kl.new_zeros(where.shape).masked_scatter(where, kl))
        with torch.no_grad():
            ref_hidden = hidden_states(ref.model, tokens, mask)
        (weight, bias), (ref_weight, ref_bias) = self._head(), ref._head()
        kl = linear_kl(
            hidden[:, :-1].flatten(0, 1),
            weight,
            ref_hidden[:, :-1].flatten(0, 1),
            ref_weight,
            bias=bias,
            ref_bias=ref_bias,
            temperature=temperature,
            softcap=self.head_options.softcap,
            logit_scale=self.head_options.logit_scale,
            live_rows=where.flatten().nonzero().squeeze(1),
        )
        return _after_first(kl.view(where.shape))

    def frozen_copy(self) -> Policy:
        """A copy without gradients, which shares frozen weights below adapters: the reference."""
        return frozen_copy(self)


def _after_first(x: Tensor) -> Tensor:
    """`[B, L-1]` values of tokens 1.. as `[B, L]`, with 0 for the first token."""
    return nn.functional.pad(x, (1, 0))
