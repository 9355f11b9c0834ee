"""Rollouts with the training model itself: any causal language model of transformers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.data import Rollout, check_tokenizer, pad
from rlhf_fast.models import check_vocabulary, evaluating, vocabulary_size
from rlhf_fast.rollout._context import Context, Route, begin, plain_inputs
from rlhf_fast.rollout._decode import Completions, decode
from rlhf_fast.rollout.engine import (
    Progress,
    Request,
    Sampling,
    SyncReport,
    requests,
    stop_ids,
)

if TYPE_CHECKING:
    from rlhf_fast.rollout.weights import WeightSource

logger = logging.getLogger(__name__)
TRIAL_TOKENS = 16
TRIAL_STEPS = 4


@contextmanager
def _own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Models that draw in their forward (Reformer's hashes) draw from `seed`.

    The global generators are afterwards as they were.
    """
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):  # of all: the seed goes to all of them
        torch.manual_seed(seed)
        yield


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """How far log-probs may be off, as a share of their spread: rounding, but no wrong position.

    Half precision and fp32 products in TF32 alike lose this number's last bit.
    """
    number = 1 + 2**-12
    matrix = torch.full((64, 64), number, dtype=dtype, device=device)
    product = (matrix @ matrix)[0, 0].item()
    return 1e-4 if abs(product / (64 * number**2) - 1) < 1e-5 else 0.05


class _Trial(NamedTuple):
    """Token ids `rows` of which the first `starts` are prompts, and the log-probs [steps, V] of
    what comes after each start; `tolerance` is relative to their spread."""

    rows: list[list[int]]
    starts: list[int]
    truth: list[Tensor]
    tolerance: float


def _groups(sizes: Sequence[tuple[int, int]], route: Route, context: int | None) -> list[list[int]]:
    """Numbers of the requests that can share a batch.

    Their longest prompt and longest completion fit the context together: a row that has ended goes
    on growing until it is dropped, and a short prompt is padded to the longest.

    Args:
        sizes: Tokens of each prompt, and of its completion at most.
        route: What the model can do.
        context: Tokens at most; None for no limit.
    """
    groups: list[list[int]] = []
    prompt = new = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        fits = sizes[i][0] + max(new, sizes[i][1]) <= (context or sys.maxsize)
        if groups and fits and (route.padded or sizes[i][0] == prompt):
            groups[-1].append(i)
        else:
            groups.append([i])
            new = 0
        prompt, new = sizes[i][0], max(new, sizes[i][1])
    return [sorted(group) for group in groups]


class HFEngine:
    """A rollout engine over the training model itself: its weights are always current.

    Whether the model can go on from a cache, and in a batch of padded prompts, is measured when
    the engine is made: on a few tokens, against forward passes of whole sequences, one at a time.
    What it cannot do, it is not asked: prompts are then batched by length, or whole sequences
    computed at each step.

    Args:
        model: A causal language model.
        tokenizer: Gives the EOS and padding ids and the number of real tokens.

    Attributes:
        route: What the model was found able to do.

    Raises:
        ValueError: The tokenizer has no EOS or no padding token, or ids that the model lacks.
    """

    source = None

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        self.model, self.tokenizer, self.weight_version = model, tokenizer, 0
        check_vocabulary(tokenizer, model, "the model")
        self._vocabulary = vocabulary_size(tokenizer)
        reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._context = reach if reach and reach > 0 else None  # XLNet says -1
        off = torch.autocast(model.device.type, enabled=False)
        with torch.no_grad(), off, evaluating(model), _own_generators(0, model.device):
            self.route = self._find_route()
        if not self.route.cached:
            logger.warning(
                "%s cannot go on from a cache: rollouts compute the whole sequence at each step, "
                "which is slow",
                type(model).__name__,
            )

    @property
    def dtype(self) -> torch.dtype:
        """The model's own."""
        return self.model.dtype

    def _find_route(self) -> Route:
        total = min(TRIAL_TOKENS, self._context or TRIAL_TOKENS)
        steps = min(TRIAL_STEPS, total - 1)
        starts, ids = [total - steps, (total - steps + 1) // 2, total - steps], torch.arange(total)
        rows = [((7 * ids + 3) % self._vocabulary).tolist() for _ in starts]
        # The third continues the prompt of the first in another way.
        rows[2][starts[2] :] = [(id + 1) % self._vocabulary for id in rows[2][starts[2] :]]
        rows = [row[: start + steps] for row, start in zip(rows, starts, strict=True)]
        # The head knows the precision, whatever casts the model's inputs and outputs.
        dtypes = [self.model.dtype]
        head = self.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
        with hook:
            truth = [
                self._log_softmax(self._whole(row).logits[0, start - 1 : -1])
                for row, start in zip(rows, starts, strict=True)
            ]
        trial = _Trial(rows, starts, truth, _tolerance(dtypes[-1], self.model.device))
        cached = self._agrees(Route(True, False), trial)
        return Route(cached, self._agrees(Route(cached, True), trial))

    def _whole(self, row: list[int]) -> Any:
        tokens = torch.tensor([row])
        return self.model(**plain_inputs(self.model, tokens, torch.ones_like(tokens).bool()))

    def _agrees(self, route: Route, trial: _Trial) -> bool:
        """Whether log-probs come out as in `trial`, also of rows that stay when one is dropped."""
        rows, starts, truth, tolerance = trial
        prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
        steps = len(truth[0])
        for group in _groups([(len(prompt), steps) for prompt in prompts], route, None):
            try:
                context = self._begin(route, [prompts[i] for i in group], steps)
                for step in range(steps):
                    got = self._log_softmax(context.logits)
                    true = torch.stack([truth[i][step] for i in group])
                    spread = true.amax(-1) - true.amin(-1)
                    if not bool(((got - true).abs().amax(-1) <= tolerance * spread).all()):
                        return False
                    if step == steps // 2 and len(group) > 1:
                        context.select(self._tensor(range(1, len(group))))
                        group = group[1:]
                    if step + 1 < steps:
                        context.append(self._tensor([rows[i][starts[i] + step] for i in group]))
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception:  # whatever a model's own code may raise at inputs not meant for it
                logger.debug("%s does not take %s", type(self.model).__name__, route, exc_info=True)
                return False
        return True

    def _log_softmax(self, logits: Tensor) -> Tensor:
        return logits[..., : self._vocabulary].float().log_softmax(-1)

    def _tensor(self, ids: Any) -> Tensor:
        return torch.tensor(ids, device=self.model.device)

    def _begin(self, route: Route, prompts: Sequence[Sequence[int]], room: int) -> Context:
        return begin(self.model, route, prompts, pad_id=self.tokenizer.pad_token_id, room=room)

    def update_weights(self, source: WeightSource | None, version: int) -> SyncReport:
        """Nothing to copy: the engine samples from the model being trained.

        Raises:
            ValueError: `source` is another model's.
        """
        if source is not None and source.model is not self.model:
            raise ValueError(
                f"these are the weights of another model, a {type(source.model).__name__}, than "
                "the one that this engine samples from, and it copies none; make the engine with "
                "the model that is trained"
            )
        self.weight_version = version
        return SyncReport(version, tensors=0, bytes=0, seconds=0.0)

    def release_memory(self) -> None:
        """Nothing to give back: between two calls the engine holds none."""

    def restore_memory(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to end: the model is the trainer's."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        on_progress: Progress | None = None,
    ) -> Rollout:
        """See `RolloutEngine.generate`; the rollout lies on the model's device.

        Raises:
            ValueError: As `RolloutEngine.generate`.
            RuntimeError: The model's logits are NaN, or infinite.
        """
        asked = requests(prompts, sampling, vocabulary=self._vocabulary, context=self._context)
        longest = max(request.sampling.max_new_tokens for request in asked)
        device = self.model.device
        if device.type == "mps":
            device = torch.device("cpu")  # it has no fp64, in which tokens are drawn
        out = Completions.empty(len(asked), longest, device)
        with evaluating(self.model), _own_generators(asked[0].seed, self.model.device):
            sizes = [(len(request.prompt), request.sampling.max_new_tokens) for request in asked]
            for group in _groups(sizes, self.route, self._context):
                decode(
                    lambda some, room: self._begin(self.route, [r.prompt for r in some], room),
                    group,
                    [asked[i] for i in group],
                    [stop_ids(self.tokenizer, self.model, asked[i].sampling) for i in group],
                    self._vocabulary,
                    out,
                    on_progress or (lambda ended: None),
                )
        return self._rollout(asked, out).to(self.model.device)

    def _rollout(self, asked: list[Request], out: Completions) -> Rollout:
        device, pad_id = out.tokens.device, self.tokenizer.pad_token_id
        width = int(out.length.max())
        sampled = torch.arange(width, device=device) < out.length[:, None]
        logprobs = out.logprobs[:, :width].masked_fill(~sampled, 0.0)
        if bad := logprobs.isfinite().all(1).logical_not().nonzero()[:, 0].tolist():
            raise RuntimeError(
                f"the logits after prompt {asked[bad[0]].prompt_index} are NaN or infinite, so no "
                "token can be drawn: the model has diverged, or overflows in its precision"
            )
        tokens, mask = (
            x.to(device) for x in pad([request.prompt for request in asked], pad_id, side="left")
        )
        drawn = out.tokens[:, :width].masked_fill(~sampled, pad_id)
        return Rollout(
            tokens=torch.cat([tokens, drawn], dim=1),
            mask=torch.cat([mask, sampled], dim=1),
            completion_mask=sampled,
            finished=out.finished,
            logprobs=logprobs,
            weight_version=torch.full((len(asked),), self.weight_version, device=device),
            prompt_index=torch.tensor([r.prompt_index for r in asked], device=device),
        )
