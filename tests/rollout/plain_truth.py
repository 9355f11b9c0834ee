"""What a rollout should be, from forward passes of whole sequences and textbook formulas alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import torch

from rlhf_fast.rollout import Sampling


def truncated(logits, sampling):
    """Log-probs fp64 `[V]` after temperature, then top-k, then top-p, of logits `[V]`."""
    logits = logits.double() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        least = logits.sort(descending=True).values[sampling.top_k - 1]
        logits = logits.where(logits >= least, -math.inf)
    if sampling.top_p < 1:
        probs = logits.softmax(-1)
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        dropped = order[before >= sampling.top_p]
        logits = logits.index_fill(0, dropped, -math.inf)
    return logits.log_softmax(-1)


@torch.no_grad()
def sequence_logprobs(model, prompt, completion, sampling, vocabulary):
    """Log-probs fp64 of the completion's tokens."""
    ids = torch.tensor([[*prompt, *completion]])
    rows = model(ids).logits[0, len(prompt) - 1 : -1, :vocabulary]
    pairs = zip(rows, completion, strict=True)
    return torch.stack([truncated(row, sampling)[token] for row, token in pairs])


def furthest(model, tokenizer, prompts, samplings, rollout):
    """The largest distance of a log-prob from the truth; asserts all else a rollout must be."""
    if isinstance(samplings, Sampling):
        samplings = [samplings] * len(prompts)
    wanted = [i for i, sampling in enumerate(samplings) for _ in range(sampling.n)]
    assert rollout.prompt_index.tolist() == wanted
    distance = 0.0
    for row, completion in enumerate(rollout.completion_ids()):
        prompt, sampling = list(prompts[wanted[row]]), samplings[wanted[row]]
        assert rollout.tokens[row][rollout.mask[row]].tolist() == prompt + completion
        assert max(completion) < len(tokenizer)
        stops = set() if sampling.ignore_eos else {tokenizer.eos_token_id}
        if not sampling.ignore_eos:
            stops |= set(sampling.stop_token_ids)
        assert not stops & set(completion[:-1])
        assert bool(rollout.finished[row]) == (completion[-1] in stops)
        assert rollout.finished[row] or len(completion) == sampling.max_new_tokens
        here = rollout.completion_mask[row]
        assert (rollout.logprobs[row][~here] == 0).all()
        truth = sequence_logprobs(model, prompt, completion, sampling, len(tokenizer))
        gap = (rollout.logprobs[row][here] - truth).abs().max()
        distance = max(distance, float(gap.nan_to_num(math.inf)))
    return distance


def random_prompts(tokenizer, lengths, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(2, len(tokenizer)) for _ in range(n)] for n in lengths]


def mixed_samplings(tokenizer, count, seed=0):
    """Every setting mixed with every other; temperatures that vLLM takes."""
    pick = random.Random(seed)
    return [
        Sampling(
            pick.choice([1, 2, 5, 17, 40]),
            temperature=pick.choice([0.05, 0.5, 1.0, 1.7, 2.0]),
            top_k=pick.choice([0, 0, 1, 2, 10, len(tokenizer)]),
            top_p=pick.choice([1.0, 1.0, 0.9, 0.5, 1e-3]),
            n=pick.choice([1, 1, 2, 3]),
            seed=pick.choice([None, 0, 5]),
            stop_token_ids=tuple(
                pick.sample(range(len(tokenizer)), pick.choice([0, 1, 30]))
            ),  # EOS among them at times
            ignore_eos=pick.random() < 0.2,
        )
        for _ in range(count)
    ]


@torch.no_grad()
def two_token_table(model, prompt, sampling, vocabulary):
    """Probabilities fp64 `[V, V]` of the first two tokens, EOS ignored."""
    first = truncated(model(torch.tensor([prompt])).logits[0, -1, :vocabulary], sampling)
    longer = torch.tensor([[*prompt, token] for token in range(vocabulary)])
    second = model(longer).logits[:, -1, :vocabulary]
    second = torch.stack([truncated(row, sampling) for row in second])
    return (first[:, None] + second).exp()


def chi_square(pairs, table):
    """Standard scores that counts of pairs `[N, 2]` have the probabilities `table`.

    Cells that expect fewer than five are one.
    """
    counts = torch.zeros_like(table)
    one = torch.ones(len(pairs), dtype=table.dtype)
    counts.index_put_((pairs[:, 0], pairs[:, 1]), one, accumulate=True)
    expected = table * len(pairs)
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def check_distribution(engine, model, prompt, vocabulary, draws):
    """Two tokens jointly, and neighbouring rows, under a shared and under own seeds."""
    sampling = Sampling(2, temperature=0.8, top_k=20, top_p=0.7, ignore_eos=True, seed=3)
    table = two_token_table(model, prompt, sampling, vocabulary)
    first = table.sum(1)
    own = [replace(sampling, seed=seed) for seed in range(draws)]
    for samplings in (sampling, own):
        rollout = engine.generate([prompt] * draws, samplings)
        drawn = torch.tensor(rollout.completion_ids())
        assert abs(chi_square(drawn, table)) < 4
        neighbours = torch.stack([drawn[:-1:2, 0], drawn[1::2, 0]], 1)
        assert abs(chi_square(neighbours, first[:, None] * first)) < 4
