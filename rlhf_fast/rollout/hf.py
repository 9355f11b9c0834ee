"""Rollouts with `model.generate` of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rlhf_fast.data import Rollout, check_tokenizer, pad
from rlhf_fast.models import check_vocabulary, evaluating, vocabulary_size
from rlhf_fast.rollout.engine import Sampling


class _Sampler(LogitsProcessor):
    """Makes the sampling distribution, and keeps the log-prob of each token drawn from it.

    `generate` calls it with the tokens so far, the last one drawn from the distribution that the
    call before returned: one `[B, V]` tensor is alive at a time, never `[B, T, V]`.
    """

    def __init__(self, sampling: Sampling, vocabulary: int) -> None:
        self.sampling, self.vocabulary = sampling, vocabulary
        self.logprobs: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.record(input_ids[:, -1])
        scores = scores.float() / self.sampling.temperature
        scores[:, self.vocabulary :] = -torch.inf  # padded embedding rows stand for no token
        if 0 < self.sampling.top_k < scores.shape[-1]:
            least = scores.topk(self.sampling.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.sampling.top_p < 1:
            ranked, order = scores.softmax(-1).sort(descending=True)
            cut = ranked.cumsum(-1) - ranked >= self.sampling.top_p
            scores = scores.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
        self._last = scores.log_softmax(-1)
        return self._last

    def record(self, drawn: Tensor) -> None:
        if self._last is not None:
            self.logprobs.append(self._last.gather(1, drawn[:, None])[:, 0])


@contextmanager
def _generating(model: PreTrainedModel, generation: GenerationConfig) -> Iterator[None]:
    """Dropout off, and `generation` alone in force.

    `generate` fills whatever an explicit config leaves unset from the model's own, which would let
    a chat model's repetition penalty or EOS through; so the model's own is exchanged.
    """
    own = model.generation_config
    model.generation_config = generation
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws from `seed` and leaves the global generators as they were; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class HFEngine:
    """A rollout engine over the training model itself: its weights are always current.

    Args:
        model: A causal language model.
        tokenizer: Gives the EOS and padding ids and the number of real tokens.

    Raises:
        ValueError: The tokenizer has no EOS or no padding token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        self.model, self.tokenizer, self.weight_version = model, tokenizer, 0
        check_vocabulary(tokenizer, model, "the model")
        self._vocabulary = vocabulary_size(tokenizer)

    def update_weights(self, version: int) -> None:
        """Nothing to copy: the engine samples from the model being trained."""
        self.weight_version = version

    def _stops(self, sampling: Sampling) -> list[int]:
        # Chat models end their turns with tokens that only their generation config knows.
        own = self.model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [] if own is None else [own]
        return sorted({self.tokenizer.eos_token_id, *own, *sampling.stop_token_ids})

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Rollout:
        """See `RolloutEngine.generate`; the rollout lies on the model's device."""
        if not prompts:
            raise ValueError("no prompts to generate from; give at least one")
        for ids in prompts:
            if wrong := [i for i in ids if not 0 <= i < self._vocabulary]:
                raise ValueError(
                    f"a prompt holds the id {wrong[0]}, outside the tokenizer's "
                    f"[0, {self._vocabulary}); encode it with this tokenizer"
                )
        device, stops = self.model.device, [] if sampling.ignore_eos else self._stops(sampling)
        tokens, mask = (
            x.to(device) for x in pad(prompts, self.tokenizer.pad_token_id, side="left")
        )
        sampler = _Sampler(sampling, self._vocabulary)
        generation = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=stops or None,
        )
        with _generating(self.model, generation), _seeded(sampling.seed, device):
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=mask.long(),
                logits_processor=LogitsProcessorList([sampler]),
            )
        sampler.record(output[:, -1])
        completions = output[:, tokens.shape[1] :]
        ends = torch.isin(completions, torch.tensor(stops, dtype=torch.int64, device=device))
        # A token counts until the first EOS, that one included: the padding id plays no part.
        completion_mask = ends.cumsum(1) - ends.long() == 0
        logprobs = torch.stack(sampler.logprobs, dim=1)
        return Rollout(
            tokens=output,
            mask=torch.cat([mask, completion_mask], dim=1),
            completion_mask=completion_mask,
            logprobs=torch.where(completion_mask, logprobs, 0.0),
            finished=ends.any(1),
            weight_version=self.weight_version,
        )
