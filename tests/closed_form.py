"""A KL-regularised problem whose optimum is known: learning gate A.

Four symbols and a start symbol, completions of three tokens, so 125 completions. The reward sums
random bigram values. With reference policy `ref` and coefficient `beta` the best policy is
`ref * exp(reward / beta) / Z` and the best objective `E[reward] - beta * KL` is `beta * log Z`.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SYMBOLS = "^abcd"
LENGTH = 3


def symbol_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `^` starts a text, `d` doubles as EOS and padding, both unused."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(SYMBOLS)}, unk_token="d"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="d", pad_token="d")


def random_model(seed: int, std: float = 0.1, width: int = 48, heads: int = 4) -> GPT2LMHeadModel:
    """A tiny GPT-2 whose weights are large enough that its distributions are far from uniform.

    It has absolute positions for a reason: to rotary ones a text that repeats its first symbol
    looks the same at every step, so that such a model cannot represent the optimum.
    """
    config = GPT2Config(
        vocab_size=len(SYMBOLS),
        n_positions=8,
        n_embd=width,
        n_layer=2,
        n_head=heads,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Reward table and reference, enumerated: K completions, int64; the rest is fp64."""

    completions: Tensor  # [K, length]
    rewards: Tensor  # [K]
    ref_logprobs: Tensor  # [K]
    beta: float

    @classmethod
    def make(
        cls, model: GPT2LMHeadModel, seed: int, beta: float = 0.5, length: int = LENGTH
    ) -> Problem:
        completions = torch.tensor(list(itertools.product(range(len(SYMBOLS)), repeat=length)))
        generator = torch.Generator().manual_seed(seed)
        bigrams = torch.randn(len(SYMBOLS), len(SYMBOLS), generator=generator, dtype=torch.float64)
        start = torch.zeros(len(completions), 1, dtype=torch.int64)
        path = torch.cat([start, completions], dim=1)
        rewards = bigrams[path[:, :-1], path[:, 1:]].sum(1)
        return cls(completions, rewards, sequence_logprobs(model, completions), beta)

    @property
    def best(self) -> float:
        """`beta * log Z`."""
        return float(self.beta * (self.ref_logprobs + self.rewards / self.beta).logsumexp(0))

    @property
    def optimum(self) -> Tensor:
        """fp64 [125], the best policy's probabilities."""
        return (self.ref_logprobs + self.rewards / self.beta).softmax(0)

    def objective(self, logprobs: Tensor) -> float:
        """`E[reward] - beta * KL(policy || ref)` of a policy's `logprobs` [125]."""
        soft_rewards = self.rewards - self.beta * (logprobs - self.ref_logprobs)
        return float((logprobs.exp() * soft_rewards).sum())

    def gap_closed(self, logprobs: Tensor) -> float:
        """Share of the way from the reference's objective (0 KL) to the best one."""
        start = self.objective(self.ref_logprobs)
        return (self.objective(logprobs) - start) / (self.best - start)

    def total_variation(self, logprobs: Tensor) -> float:
        return float((logprobs.exp() - self.optimum).abs().sum() / 2)

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]]
    ) -> list[float]:
        """The reward as a user's function; ids, because decoding drops EOS, a symbol here."""
        length = self.completions.shape[1]
        places = torch.tensor([len(SYMBOLS) ** i for i in reversed(range(length))])
        return self.rewards[(torch.tensor(completion_ids) * places).sum(1)].tolist()


@torch.no_grad()
def sequence_logprobs(model: GPT2LMHeadModel, completions: Tensor) -> Tensor:
    """fp64 [K], log-probability of each completion [K, length] after `^`, dropout off; on a CPU."""
    model.eval()
    tokens = torch.cat([torch.zeros(len(completions), 1, dtype=torch.int64), completions], dim=1)
    logprobs = model(tokens.to(model.device)).logits[:, :-1].cpu().double().log_softmax(-1)
    return logprobs.gather(2, tokens[:, 1:, None]).sum((1, 2))
