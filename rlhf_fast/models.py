"""Loading and checking models and tokenizers, and running a model's trunk."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_fast._adapter_files import ADAPTER, make_base_absolute, read_fields
from rlhf_fast._adapters import check_peft_model, is_peft
from rlhf_fast.config import ConfigError
from rlhf_fast.data import check_tokenizer
from rlhf_fast.lora import (
    LoraConfig,
    add_adapter,
    has_adapters,
    import_peft,
    language_model,
    load_adapter,
)

TOKENIZER = "tokenizer_config.json"
SLICE = 1 << 24


def load_causal_lm(
    model: Any,
    *,
    lora: LoraConfig | None = None,
    frozen_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A causal language model, from a name, a folder, or itself.

    Args:
        model: A model of transformers, or a `peft.PeftModel` over one; the folder of a saved
            adapter brings its base with it.
        lora: Train an adapter of it: the model becomes a `PeftModel`.
        frozen_dtype: Of the frozen weights below adapters that are loaded here.
        dtype: Of a model without adapters that is loaded here; fp32 to train it.

    Raises:
        TypeError, ValueError: It cannot be trained and saved here; ConfigError if that is for
            `lora`, or for want of peft.
    """
    if lora is not None:
        import_peft()  # what is missing is said before anything is loaded
    if isinstance(model, str | Path):
        if (Path(model) / "reward_model.json").exists():
            raise ValueError(
                f"{str(model)!r} holds a reward model, which has no language-model head; give the "
                "folder of a causal language model"
            )
        if (Path(model) / ADAPTER).exists():
            model = load_adapter(model, frozen_dtype)
        else:
            dtype = dtype if lora is None else frozen_dtype
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    _check_kind(model)
    if lora is None:
        if is_peft(model):
            make_base_absolute(model)
        return model
    if is_peft(model):
        raise ConfigError(
            "lora asks for an adapter, but the model has one already, which would be trained; "
            "leave lora out, or merge that one into its base first (rlhf-fast merge)"
        )
    model = add_adapter(model, lora)
    make_base_absolute(model)
    return model


def _check_kind(model: Any) -> None:
    """Raises for what is no causal language model that can be trained and saved here."""
    inner = language_model(model)
    what = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        hint = "; merge adapters of PEFT first (merge_and_unload)" if "Peft" in what else ""
        raise TypeError(
            f"the model is of type {what}; give a causal language model of transformers, its name "
            f"or its folder{hint}"
        )
    if is_peft(model):
        check_peft_model(model)
    elif any("lora_" in name for name, _ in inner.named_parameters()):
        raise ValueError(
            f"the {what} holds LoRA adapters that no PeftModel is around, so they would not be "
            "saved; if a trainer put them there (lora=...), pass its trainer.model or load the "
            "base anew, else make them with peft.get_peft_model and pass what it returns, or merge "
            "them first"
        )
    if inner.config.is_encoder_decoder or inner.get_output_embeddings() is None:
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
            model = language_model(model).config.name_or_path
        elif (Path(model) / ADAPTER).exists() and not (Path(model) / TOKENIZER).exists():
            folder, model = model, read_fields(model).get("base_model_name_or_path")
            if not model:
                raise ValueError(
                    f"the adapter in {str(folder)!r} does not name its base model, so its "
                    "tokenizer is unknown; put the base's name or folder under "
                    f"base_model_name_or_path of {ADAPTER}, or pass tokenizer=..."
                )
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
    """Raises `ValueError` for a module that is frozen whole, or trained in half precision.

    Frozen parameters may have any precision.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        hint = " (an adapter: load it with is_trainable=True)" if has_adapters(module) else ""
        raise ValueError(
            "every parameter of the model is frozen (requires_grad=False), so nothing could be "
            f"learnt; unfreeze those to train{hint}"
        )
    for parameter in trained:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            hint = (
                "; a frozen base may stay so below adapters alone" if has_adapters(module) else ""
            )
            raise ValueError(
                f"the model's weights are {parameter.dtype}, in which small optimiser steps round "
                f"to nothing; load it in float32 and set mixed_precision='bf16'{hint}"
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


def sum_fp64(x: Tensor, *, absolute: bool = False) -> float:
    """The fp64 sum over `x`, or over its absolute values, without a copy of all of it.

    torch may cast to fp64 all that it sums at once; slices bound that.
    """
    slices = (part.abs() if absolute else part for part in x.flatten().split(SLICE))
    return math.fsum(float(part.sum(dtype=torch.float64)) for part in slices)
