"""What flows between the stages of training: frozen dataclasses of tensors, and how text gets in.

`B` sequences, `P` prompt tokens, `T` completion tokens, `L = P + T`. Masks say what True means.
Prompts are padded on the left and completions on the right, so that column `P` of a rollout is
every sequence's first sampled token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor


class _Rows:
    """Row selection and device moves for dataclasses whose tensors all begin with `B`."""

    def _map(self, change: Any) -> Self:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        moved = {
            name: change(value) if isinstance(value, Tensor | _Rows) else value
            for name, value in fields.items()
        }
        return type(self)(**moved)

    def select(self, index: Tensor) -> Self:
        """The rows of `index` [K] int64, in its order."""
        return self._map(lambda x: x.select(index) if isinstance(x, _Rows) else x[index])

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`."""
        return self._map(lambda x: x.to(device))


@dataclasses.dataclass(frozen=True)
class TokenBatch(_Rows):
    """Sequences to learn from.

    Attributes:
        tokens: int64 `[B, L]`, padded.
        mask: bool `[B, L]`, True where there is a token (not padding).
        targets: bool `[B, L]`, True where a token's log-probability counts.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor


@dataclasses.dataclass(frozen=True)
class FlushLeft(TokenBatch):
    """The rows of a rollout for a model to read, each from column 0 on.

    Attributes:
        columns: int64 `[B, T]`, where each sampled token stands; of no meaning for the others.
        sampled: bool `[B, T]`, the rollout's `completion_mask`.
    """

    columns: Tensor
    sampled: Tensor

    def completions(self, x: Tensor) -> Tensor:
        """`[B, T]`: what `x` `[B, L]` holds for the sampled tokens, 0 elsewhere."""
        return x.gather(1, self.columns).masked_fill(~self.sampled, 0.0)


@dataclasses.dataclass(frozen=True)
class Rollout(_Rows):
    """Sampled completions.

    Attributes:
        tokens: int64 `[B, P + T]`, prompts padded on the left, completions on the right.
        mask: bool `[B, P + T]`, True where there is a token (not padding).
        completion_mask: bool `[B, T]`, True for sampled tokens, the final EOS among them.
        finished: bool `[B]`, True where the completion ends in EOS or another stop token; False
            where it was cut off at its greatest length.
        logprobs: fp32 `[B, T]`, of the sampled tokens under the distribution that they were
            sampled from; 0 where `completion_mask` is False. None where that is not known.
        weight_version: int64 `[B]`, number of weight updates the sampling policy had seen. None
            where that is not known.
        prompt_index: int64 `[B]`, number of the prompt in the list that was sampled from. None for
            one completion a prompt, in order.
    """

    tokens: Tensor
    mask: Tensor
    completion_mask: Tensor
    finished: Tensor
    logprobs: Tensor | None = None
    weight_version: Tensor | None = None
    prompt_index: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def prompt_length(self) -> int:
        """`P`, the width of the padded prompts."""
        return self.tokens.shape[1] - self.completion_mask.shape[1]

    @property
    def targets(self) -> Tensor:
        """bool `[B, P + T]`: True for the sampled tokens."""
        padding = self.completion_mask.new_zeros(len(self), self.prompt_length)
        return torch.cat([padding, self.completion_mask], dim=1)

    @property
    def lengths(self) -> Tensor:
        """int64 `[B]`: columns from each row's first token to its last sampled one, at least 1."""
        return self._extents()[1]

    def _extents(self) -> tuple[Tensor, Tensor]:
        """int64 `[B]` each: the column of the row's first token, and its length."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        # What a first sampled token is predicted from stays, even where the prompt is empty.
        before = max(self.prompt_length - 1, 0)
        first = torch.where(self.mask, columns, before).amin(1)
        end = torch.where(self.targets, columns + 1, 0).amax(1)
        return first, (end - first).clamp(min=1)

    def check_layout(self) -> None:
        """Raises `ValueError` unless the masks are bool, and rows without gaps."""
        for name in ("mask", "completion_mask"):
            if (dtype := getattr(self, name).dtype) != torch.bool:
                raise ValueError(f"the rollout's {name} is {dtype}; make it bool: x.bool()")
        first, lengths = self._extents()
        within = torch.arange(self.tokens.shape[1], device=first.device) - first[:, None]
        padding = ~self.mask & (within >= 0) & (within < lengths[:, None])
        gaps = padding.any(1) & self.completion_mask.any(1)
        if gaps.any():
            raise ValueError(
                f"row {int(gaps.nonzero()[0])} of the rollout has padding (mask False) between its "
                "first token and its last sampled one, or no prompt; pad prompts on the left and "
                "completions on the right (Rollout.from_lists does)"
            )

    def flush_left(self) -> FlushLeft:
        """The rows for a model to read: `[B, max(lengths)]`, each from column 0 on.

        So they take no more columns than the longest row has tokens, however prompts and
        completions were padded, and padding stands where no token sees it.
        """
        first, lengths = self._extents()
        within = torch.arange(self.tokens.shape[1], device=first.device)
        width, start = int(lengths.max()), self.prompt_length
        # Beyond the row's end comes its beginning: what it was padded with on the left.
        columns = (first[:, None] + within[:width]) % len(within)
        return FlushLeft(
            # Whatever id stands under the mask: a model looks it up.
            tokens=self.tokens.masked_fill(~self.mask, 0).gather(1, columns),
            mask=self.mask.gather(1, columns),
            targets=self.targets.gather(1, columns),
            columns=(within[start:] - first[:, None]).clamp(max=width - 1),
            sampled=self.completion_mask,
        )

    @property
    def finish_reasons(self) -> list[str]:
        """Of each completion: "stop" (an EOS or stop token) or "length" (it was cut off)."""
        return ["stop" if finished else "length" for finished in self.finished.tolist()]

    def completion_ids(self) -> list[list[int]]:
        """The sampled token ids of each sequence, the final EOS among them."""
        completions = self.tokens[:, self.prompt_length :]
        return [
            row[keep].tolist() for row, keep in zip(completions, self.completion_mask, strict=True)
        ]

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        pad_id: int,
        eos_ids: Sequence[int] = (),
        finished: Sequence[bool] | None = None,
        logprobs: Sequence[Sequence[float]] | None = None,
        weight_version: int | None = None,
        prompt_index: Sequence[int] | None = None,
    ) -> Self:
        """Pads lists of ids; one prompt a completion.

        Unless `finished` says it, a completion that ends in one of `eos_ids` counts as finished.

        Raises:
            ValueError: The lists differ in length, a prompt or completion is empty, or its
                log-probs are not one a token.
        """
        if logprobs is not None and len(logprobs) != len(completions):
            raise ValueError(
                f"{len(completions)} completions but {len(logprobs)} lists of logprobs"
            )
        if len(prompts) != len(completions):
            raise ValueError(
                f"{len(prompts)} prompts but {len(completions)} completions; give one completion "
                "a prompt"
            )
        for name, rows in (("prompt", prompts), ("completion", completions)):
            if empty := [i for i, row in enumerate(rows) if not len(row)]:
                raise ValueError(
                    f"{name} {empty[0]} is empty; every {name} needs at least one token"
                )
        for i, (row, values) in enumerate(zip(completions, logprobs or (), strict=False)):
            if len(row) != len(values):
                raise ValueError(
                    f"completion {i} has {len(row)} tokens but {len(values)} log-probs; give one "
                    "a token"
                )
        left, left_mask = pad(prompts, pad_id, side="left")
        right, right_mask = pad(completions, pad_id, side="right")
        padded = None
        if logprobs is not None:
            padded = torch.zeros(right.shape, dtype=torch.float32)
            padded[right_mask] = torch.tensor(
                [p for row in logprobs for p in row], dtype=torch.float32
            )
        if finished is None:
            finished = [row[-1] in set(eos_ids) for row in completions]
        return cls(
            tokens=torch.cat([left, right], dim=1),
            mask=torch.cat([left_mask, right_mask], dim=1),
            completion_mask=right_mask,
            finished=torch.tensor(list(finished)),
            logprobs=padded,
            weight_version=(
                None if weight_version is None else torch.full((len(completions),), weight_version)
            ),
            prompt_index=None if prompt_index is None else torch.tensor(list(prompt_index)),
        )


@dataclasses.dataclass(frozen=True)
class Experience(_Rows):
    """A scored rollout: all that an update needs. fp32 unless said otherwise.

    Attributes:
        rollout: The completions.
        scores: `[B]`, the reward function's verdicts.
        old_logprobs: `[B, T]`, of the sampled tokens under the policy before the update.
        ref_logprobs: `[B, T]`, of the same tokens under the reference.
        advantages: `[B, T]`, or `[B]` for one per sequence.
        values: `[B, T]`, the critic's before the update; None without a critic.
        returns: `[B, T]`, what the critic learns; None without one.
        importance_weights: `[B, T]`, of the sampled tokens, policy before the update over where
            they were sampled; None for none.
    """

    rollout: Rollout
    scores: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    importance_weights: Tensor | None = None


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Pads `rows` to the longest: int64 `[B, L]` ids and bool `[B, L]`, True for real tokens."""
    length = max((len(row) for row in rows), default=0)
    tokens = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = True
    return tokens, mask


def check_tokenizer(tokenizer: Any) -> None:
    """Raises `ValueError` for a tokenizer without an EOS or a padding token."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no eos_token, so completions could never "
            "end; set tokenizer.eos_token to the token that ends a text"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no pad_token, so batches cannot be padded; "
            "set tokenizer.pad_token = tokenizer.eos_token (or pass pad_token=...): masks here "
            "never look at the padding id, so the two may be the same"
        )


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own BOS, and without an EOS, if it adds them."""
    ids = list(tokenizer(text)["input_ids"])
    ends = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends and not text.endswith(tokenizer.eos_token) else ids


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a completion that follows a prompt: no BOS, EOS at the end."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def check_length(ids: Sequence[int], limit: int, what: str, remedy: str) -> None:
    """Raises `ValueError` if `ids` are more than `limit` tokens; nothing is ever cut silently."""
    if len(ids) > limit:
        raise ValueError(f"{what} has {len(ids)} tokens, but {limit} fit: {remedy}")


def batch_indices(step: int, size: int, batch_size: int, seed: int) -> Tensor:
    """Which of `size` rows make the batch of `step`: int64 `[batch_size]`.

    Reshuffled permutations, one after the other, cut into full batches. A function of its
    arguments alone, so that a resumed run sees the same batches.
    """
    start = step * batch_size
    rows: list[int] = []
    while len(rows) < batch_size:
        epoch, offset = divmod(start + len(rows), size)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(size, generator=generator).tolist()
        rows += order[offset : offset + batch_size - len(rows)]
    return torch.tensor(rows)
