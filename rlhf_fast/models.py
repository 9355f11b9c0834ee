"""Hugging Face causal language models as policies.

A causal language model is used in two parts, its trunk (hidden states) and its head (a matrix), so
that the fused linear ops make log-probabilities without a `[tokens, vocabulary]` tensor. Whether
the two parts make up the model is measured when it is wrapped; where they do not, the model's own
logits are used.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_fast.data import check_tokenizer
from rlhf_fast.ops import full_kl, linear_kl, linear_logprobs, token_logprobs

IGNORED = -100


def load_causal_lm(model: str | Path | PreTrainedModel) -> PreTrainedModel:
    """A causal language model in fp32, from a name, a folder, or itself."""
    if not isinstance(model, str | Path):
        _check_kind(model)
        return model
    if (Path(model) / "reward_model.json").exists():
        raise ValueError(
            f"{str(model)!r} holds a reward model, which has no language-model head; give the "
            "folder of a causal language model"
        )
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    _check_kind(model)
    return model


def _check_kind(model: Any) -> None:
    """Raises for what is no causal language model that can be trained and saved here."""
    what = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "; merge adapters of PEFT first (merge_and_unload)" if "Peft" in what else ""
        raise TypeError(
            f"the model is of type {what}; give a causal language model of transformers, its name "
            f"or its folder{hint}"
        )
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            f"the {what} holds LoRA adapters, which are not supported: they would not be saved; "
            "merge them first"
        )
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(
            f"{what} is not a causal language model with a head over the vocabulary; load it with "
            "AutoModelForCausalLM"
        )


def load_tokenizer(tokenizer: Any, model: Any = None, pad_token: str | None = None) -> Any:
    """A tokenizer from a name, a folder, or itself; by default the one saved with `model`.

    Raises:
        ValueError: There is none, or it has no EOS or no padding token (see `pad_token`).
    """
    if tokenizer is None:
        if not isinstance(model, str | Path):
            _check_kind(model)
            model = model.config.name_or_path
        tokenizer = model
        if not tokenizer:
            raise ValueError(
                "this model was not loaded from a folder or a name, so its tokenizer is unknown; "
                "pass tokenizer=..."
            )
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"the tokenizer is {tokenizer!r} of type {type(tokenizer).__name__}; give one of "
            "transformers, its name or its folder"
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token = {pad_token!r} is no token of this tokenizer; name one that is, for "
                f"example {tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = pad_token
    check_tokenizer(tokenizer)
    return tokenizer


def disable_dropout(module: nn.Module) -> None:
    """Sets every dropout rate in `module` to 0, attention's own among them.

    Rollout and update must see one and the same policy, else the first ratio is not 1.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode, and afterwards in the mode it was in."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def context_length(model: PreTrainedModel, max_length: int) -> int:
    """Tokens of a sequence at most: `max_length`, or as far as the model's positions reach."""
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, reach or max_length)


def require_trainable(module: nn.Module) -> None:
    """Raises `ValueError` for a module that is frozen whole, or trained in half precision."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "every parameter of the model is frozen (requires_grad=False), so nothing could be "
            "learnt; unfreeze those to train"
        )
    for parameter in trained:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"the model's weights are {parameter.dtype}, in which small optimiser steps round "
                "to nothing; load it in float32 and set mixed_precision='bf16'"
            )


def check_vocabulary(tokenizer: Any, model: PreTrainedModel, what: str) -> None:
    """Raises `ValueError` if `tokenizer` has ids that `model`, called `what`, has no rows for."""
    rows, ids = model.get_input_embeddings().weight.shape[0], vocabulary_size(tokenizer)
    if ids > rows:
        raise ValueError(
            f"the tokenizer's ids reach {ids - 1}, but {what} embeds {rows} tokens; use the "
            "tokenizer that belongs to it, or model.resize_token_embeddings"
        )


def vocabulary_size(tokenizer: Any) -> int:
    """The largest id of `tokenizer` plus one; a model's matrices may have rows beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def model_inputs(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> dict[str, Any]:
    """Keyword arguments of a transformer for int64 `tokens` and bool `mask`, both `[B, L]`.

    Position ids count real tokens, so left padding, right padding and none mean the same.
    """
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs


def hidden_states(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states `[B, L, D]` of a causal language model's trunk, or of a bare trunk."""
    trunk = model.base_model
    return trunk(**model_inputs(trunk, tokens, mask)).last_hidden_state


@torch.no_grad()
def hidden_size(model: PreTrainedModel) -> int:
    """`D`, the width of the model's hidden states; seen on a token, since configs differ."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    return hidden_states(model, token, token == 0).shape[-1]


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
        model: For example GPT-2, Llama, Qwen, Gemma (its soft cap is found).
        vocabulary: Tokens that can be drawn: the distribution is over the first so many rows of
            the head. By default all, also those that stand for no token.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.head_options = self._find_head()

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        drawn = slice(self.vocabulary)
        return head.weight[drawn], None if bias is None else bias[drawn]

    def _find_head(self) -> HeadOptions | None:
        """The head's options if trunk and head make up the model on a probe, else None."""
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        options = HeadOptions(getattr(config, "final_logit_softcapping", None), scale)
        head = self.model.get_output_embeddings()
        if head is None or self.model.base_model is self.model:
            return None
        tokens = torch.arange(8, device=self.model.device)[None]
        tokens = tokens % (self.vocabulary or head.weight.shape[0])
        mask, targets = torch.ones_like(tokens).bool(), torch.ones_like(tokens).bool()
        with torch.no_grad(), evaluating(self.model):
            hidden = hidden_states(self.model, tokens, mask)
            if hidden.shape[-1] != head.weight.shape[-1]:
                return None
            ours = self._from_hidden(hidden, tokens, targets, 1.0, options)[0]
            own = self._from_logits(tokens, mask, targets, 1.0)[0]
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
        return options if (ours - own).abs().max() <= tolerance else None

    def _from_hidden(
        self, hidden: Tensor, tokens: Tensor, targets: Tensor, temperature: float, head: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self._head()
        index = torch.where(targets, tokens, IGNORED)[:, 1:]
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs, entropy = linear_logprobs(
                hidden[:, :-1].flatten(0, 1),
                weight.to(hidden.dtype),
                index.flatten(),
                bias=None if bias is None else bias.to(hidden.dtype),
                temperature=temperature,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
        return _after_first(logprobs.view(index.shape)), _after_first(entropy.view(index.shape))

    def _logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(**model_inputs(self.model, tokens, mask)).logits
        return logits[..., : self.vocabulary]

    def _from_logits(
        self, tokens: Tensor, mask: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        index = torch.where(targets, tokens, IGNORED)[:, 1:]
        logits = self._logits(tokens, mask)[:, :-1]
        logprobs, entropy = token_logprobs(logits, index, temperature=temperature)
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
        else:
            with torch.no_grad():
                ref_hidden = hidden_states(ref.model, tokens, mask)[:, :-1][where]
            (weight, bias), (ref_weight, ref_bias) = self._head(), ref._head()
            with torch.autocast(hidden.device.type, enabled=False):
                kl = linear_kl(
                    hidden[:, :-1][where],
                    weight.to(hidden.dtype),
                    ref_hidden,
                    ref_weight.to(ref_hidden.dtype),
                    bias=None if bias is None else bias.to(hidden.dtype),
                    ref_bias=None if ref_bias is None else ref_bias.to(ref_hidden.dtype),
                    temperature=temperature,
                    softcap=self.head_options.softcap,
                    logit_scale=self.head_options.logit_scale,
                )
        return _after_first(kl.new_zeros(where.shape).masked_scatter(where, kl))

    def frozen_copy(self) -> Policy:
        """A copy without gradients: the reference."""
        return copy.deepcopy(self).requires_grad_(False).eval()


def _after_first(x: Tensor) -> Tensor:
    """`[B, L-1]` values of tokens 1.. as `[B, L]`, with 0 for the first token."""
    return nn.functional.pad(x, (1, 0))
