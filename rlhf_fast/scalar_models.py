"""Scalar heads on transformers: values of a critic, scores of a reward model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf_fast._adapter_files import ADAPTER, name_weights
from rlhf_fast._adapters import is_peft
from rlhf_fast.data import check_tokenizer, encode_completion, encode_prompt, pad
from rlhf_fast.lora import language_model, load_adapter, own_copy, save_model
from rlhf_fast.models import (
    check_vocabulary,
    context_length,
    evaluating,
    hidden_size,
    hidden_states,
)


class ScalarHead(nn.Module):
    """A linear map of hidden states to one number, computed in fp32 whatever the trunk's dtype.

    Args:
        size: `D`.
        std: Standard deviation of the initial weights; 0 starts every value at 0 (2019).
    """

    def __init__(self, size: int, std: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * std if std else torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """fp32 `[...]` of `hidden` `[..., D]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight.float() + self.bias.float()


class ScalarModel(nn.Module):
    """A transformer with a scalar head on every position: a critic that is its own model.

    Args:
        model: A causal language model (its head is not used) or a bare transformer, or a
            `peft.PeftModel` over one.
        std: See `ScalarHead`.
    """

    def __init__(self, model: Any, std: float = 0.0) -> None:
        super().__init__()
        inner = language_model(model)
        self.model: PreTrainedModel = inner.base_model
        # It saves the adapter. In a tuple, lest its language-model head become a part of this.
        self._peft = (model,) if is_peft(model) else ()
        self.head = ScalarHead(hidden_size(inner), std)

    @property
    def peft(self) -> Any:
        """The `PeftModel` around the transformer, if there is one."""
        return self._peft[0] if self._peft else None

    def as_critic(self) -> ScalarModel:
        """A trainable copy whose values begin as this model's scalars, after each token."""
        critic = ScalarModel(own_copy(self.model))
        critic.head = own_copy(self.head)
        return critic

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """fp32 `[B, L]`: the scalar after each token."""
        # Adapters are fp32: over a base in half precision they compute as they were trained to.
        half = self.model.dtype in (torch.bfloat16, torch.float16)
        cast = torch.autocast(tokens.device.type, self.model.dtype) if half else nullcontext()
        with cast:
            return self.head(hidden_states(self.model, tokens, mask))


class RewardModel(ScalarModel):
    """A scalar for a prompt and its completion, read at the last real token.

    The head starts from N(0, 1 / (D + 1)) (2019). `gain` and `bias` normalise the scores; see
    `RewardTrainer.normalize`.

    Over a base in half precision it computes under autocast. Weights in fp32 that were trained
    under autocast (`mixed_precision`) score in fp32 once they are loaded again, and differ by the
    rounding.

    Args:
        model: As `ScalarModel`.
        tokenizer: Encodes what `score` is given.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        inner = language_model(model)
        check_vocabulary(tokenizer, inner, "the reward model")
        super().__init__(model, std=(hidden_size(inner) + 1) ** -0.5)
        self.tokenizer = tokenizer
        self.gain: Tensor
        self.shift: Tensor
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def as_critic(self) -> ScalarModel:
        """As `ScalarModel.as_critic`, in units of the normalised score."""
        critic = super().as_critic()
        with torch.no_grad():
            critic.head.weight.mul_(self.gain)
            critic.head.bias.mul_(self.gain).add_(self.shift)
        return critic

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """fp32 `[B]`, the normalised score of right- or left-padded `tokens` `[B, L]`."""
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, positions, -1).amax(1)
        scores = super().forward(tokens, mask).gather(1, last[:, None])[:, 0]
        return scores * self.gain + self.shift

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], completions: Sequence[str], *, batch_size: int = 64
    ) -> Tensor:
        """fp32 `[B]` on the CPU: the score of each completion, taken as finished by EOS.

        Raises:
            ValueError: A text is longer than the model's positions reach.
        """
        if isinstance(prompts, str) or isinstance(completions, str):
            raise ValueError("prompts and completions must be lists of texts, not one text")
        if not prompts:
            return torch.zeros(0)
        limit = context_length(self.model, sys.maxsize)
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = encode_prompt(self.tokenizer, prompt)
            rows.append(ids + encode_completion(self.tokenizer, completion))
            if len(rows[-1]) > limit:
                raise ValueError(
                    f"prompt and completion have {len(rows[-1])} tokens, but the reward model "
                    f"reads {limit}: {prompt[:40]!r}; shorten the prompt or max_new_tokens"
                )
        device, scores = self.gain.device, torch.empty(len(rows))
        order = torch.tensor([len(row) for row in rows]).argsort(stable=True)  # for less padding
        with evaluating(self):
            for index in order.split(batch_size):
                piece = [rows[i] for i in index]
                tokens, mask = pad(piece, self.tokenizer.pad_token_id, side="right")
                scores[index] = self(tokens.to(device), mask.to(device)).cpu()
        return scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the trunk or its adapter, the head and the tokenizer, for `from_pretrained`."""
        folder = Path(folder)
        save_model(self.peft or self.model, folder)
        self.tokenizer.save_pretrained(folder)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.head.state_dict().items()},
            folder / "reward_head.safetensors",
        )
        # Adapters are saved without the weights below, so their precision is told.
        dtype = str(self.model.dtype).removeprefix("torch.")
        described = {"gain": self.gain.item(), "shift": self.shift.item(), "dtype": dtype}
        described["bare"] = self.peft is not None and language_model(self.peft) is self.model
        (folder / "reward_model.json").write_text(json.dumps(described) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save_pretrained` wrote; an adapter's base comes with it."""
        folder = Path(folder)
        described = json.loads((folder / "reward_model.json").read_text())
        if (folder / ADAPTER).exists():
            kind = AutoModel if described.get("bare") else AutoModelForCausalLM
            trunk = load_adapter(folder, described["dtype"], kind)
        else:
            trunk = AutoModel.from_pretrained(folder, dtype=torch.float32)
        model = cls(trunk, AutoTokenizer.from_pretrained(folder))
        model.head.load_state_dict(load_file(folder / "reward_head.safetensors"))
        model.gain.fill_(described["gain"])
        model.shift.fill_(described["shift"])
        return model.eval()

    def merge_adapter(self) -> Self:
        """Adds the adapter to the weights, for good; itself, a reward model without one."""
        if self._peft:
            self.model = self.peft.merge_and_unload().base_model
            self._peft = ()
            name_weights(self.model)
        return self
