"""vLLM on a GPU: what it samples from after it slept, and the memory that it gives back.

Each test in a process of its own: older vLLMs keep the memory of an engine that can sleep for the
life of the process, and then refuse another.
"""

from __future__ import annotations

import pytest
import torch
from rollout_cases import PROMPTS, make_model, start

from rlhf_fast.policy import Policy
from rlhf_fast.rollout import probe, vllm_unavailable_reason
from rlhf_fast.rollout.probe import TOLERANCES
from rlhf_fast.scratch import train_tokenizer

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SINGLE, HALF = TOLERANCES["single"], TOLERANCES["half"]
LONG = [[60 + i] * 300 for i in range(4)]


def test_vllm_runs_on_this_gpu():
    """Else the other tests would not say what they show."""
    assert vllm_unavailable_reason(GPU) is None


def alone(check, *args):
    """Runs `check(tokenizer, *args)` in a process of its own."""
    torch.multiprocessing.spawn(_in_a_child, (check, args))


def _in_a_child(rank, check, args):
    check(train_tokenizer(["the cat sat on the mat and the dog ran"], 280), *args)


@torch.no_grad()
def mean_mismatch(engine, prompts):
    policy = Policy(engine.model, len(engine.tokenizer))

    def score(rollout):
        return policy.logprobs_of(rollout, 1.0)

    return probe(engine, score, prompts).mean_abs


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", SINGLE), ("bfloat16", HALF)])
def test_logprobs_agree_before_and_after_three_updates_with_sleep_between(dtype, bound, level):
    alone(check_updates, dtype, bound, level)


def check_updates(tokenizer, dtype, bound, level):
    model = make_model(tokenizer).to(GPU, getattr(torch, dtype))
    engine = start("vllm", model, tokenizer, sleep_level=level, gpu_memory_utilization=0.2)
    try:
        assert mean_mismatch(engine, PROMPTS) < bound
        generator = torch.Generator(GPU).manual_seed(1)
        for version in (1, 2, 3):
            engine.release_memory()
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, device=GPU)
                    parameter += 0.05 * noise.to(parameter.dtype)
            engine.update_weights(engine.source, version)
            assert mean_mismatch(engine, PROMPTS) < bound
            assert mean_mismatch(engine, LONG) < bound
    finally:
        engine.close()


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_the_kv_cache_and_generation_takes_it_again(level):
    alone(check_memory, level)


def check_memory(tokenizer, level):
    engine = start(
        "vllm", make_model(tokenizer).to(GPU), tokenizer, sleep_level=level,
        gpu_memory_utilization=0.2,
    )  # fmt: skip
    try:
        whole, awake = torch.cuda.mem_get_info()[1], torch.cuda.mem_get_info()[0]
        engine.release_memory()
        assert torch.cuda.mem_get_info()[0] - awake > 0.1 * whole  # of the 0.2 that it had
        if level == 2:
            engine.update_weights(engine.source, 1)
        assert mean_mismatch(engine, PROMPTS) < SINGLE
    finally:
        engine.close()


def test_an_update_that_fails_asleep_is_made_up_for():
    alone(check_a_failed_update)


def check_a_failed_update(tokenizer):
    model = make_model(tokenizer).to(GPU)
    engine = start("vllm", model, tokenizer, sleep_level=1, gpu_memory_utilization=0.2)
    try:
        engine.release_memory()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._vllm, "forget", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.update_weights(engine.source, 1)
        engine.update_weights(engine.source, 2)
        assert mean_mismatch(engine, PROMPTS) < SINGLE
    finally:
        engine.close()
