"""vLLM in the trainer's process: what it leaves alone, and how engines follow one another."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from rollout_cases import PROMPTS, forward_logprobs, make_model, mismatch, start

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.rollout import Sampling

pytestmark = pytest.mark.vllm


@pytest.fixture
def engine(tokenizer):
    engine = start("vllm", make_model(tokenizer), tokenizer)
    yield engine
    engine.close()


def test_generators_threads_and_dtype_of_this_process_survive_a_start(tokenizer):
    model, set_threads = make_model(tokenizer), torch.set_num_threads
    torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    torch.set_num_threads(2)
    engine = start("vllm", model, tokenizer)
    try:
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert numpy.random.get_state()[1].tolist() == before[2]
        assert torch.set_num_threads is set_threads and torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert torch.get_num_threads() == 1
        assert torch.get_default_dtype() == torch.float32
        assert mismatch(engine).max_abs < 1e-3
    finally:
        engine.close()


def test_autocast_of_the_caller_does_not_reach_the_engine(engine):
    with torch.autocast("cpu", torch.bfloat16):
        rollout = engine.generate(PROMPTS, Sampling(8, seed=0, ignore_eos=True))
    expected = forward_logprobs(engine.model, rollout)
    torch.testing.assert_close(rollout.logprobs, expected, atol=1e-4, rtol=1e-5)


def test_engines_follow_one_another_but_do_not_run_side_by_side(tokenizer):
    first = start("vllm", make_model(tokenizer), tokenizer)
    with pytest.raises(BackendUnavailable, match="another vLLM engine runs in this process"):
        start("vllm", make_model(tokenizer, seed=1), tokenizer)
    assert mismatch(first).max_abs < 1e-3
    first.close()
    first.close()
    assert not torch.distributed.is_initialized()
    with pytest.raises(RuntimeError, match="the engine was closed; make a new one"):
        first.generate(PROMPTS, Sampling(2))
    second = start("vllm", make_model(tokenizer, seed=1), tokenizer)
    assert mismatch(second).max_abs < 1e-3
    del second  # not closed: collecting it ends it
    third = start("vllm", make_model(tokenizer, seed=3), tokenizer)
    assert mismatch(third).max_abs < 1e-3
    third.close()


def test_several_processes_without_a_process_group_are_refused(tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendUnavailable, match="torch.distributed is not initialised"):
        start("vllm", make_model(tokenizer), tokenizer)


def test_a_process_group_of_the_trainer_outlives_the_engine(tokenizer, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for _ in range(2):
            engine = start("vllm", make_model(tokenizer), tokenizer)
            assert mismatch(engine).max_abs < 1e-3
            engine.close()
            assert torch.distributed.is_initialized()
            torch.distributed.all_reduce(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()


def test_an_interrupted_generate_leaves_nothing_behind(engine):
    def stop(count):
        raise KeyboardInterrupt

    expected = engine.generate(PROMPTS, Sampling(6, seed=0)).tokens
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS * 8, Sampling(6, seed=1, n=2), stop)
    engine.update_weights(engine.source, 1)
    assert torch.equal(engine.generate(PROMPTS, Sampling(6, seed=0)).tokens, expected)


def test_precision_and_environment_of_this_process_survive_a_start(tokenizer):
    import gc
    import os

    torch.set_float32_matmul_precision("high")
    before = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    engine = start("vllm", make_model(tokenizer), tokenizer)
    try:
        assert torch.get_float32_matmul_precision() == "high"
        assert {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} == before
        assert gc.get_freeze_count() == 0
    finally:
        engine.close()
        torch.set_float32_matmul_precision("highest")


def test_a_start_that_vllm_refuses_leaves_nothing_behind(tokenizer):
    with pytest.raises(BackendUnavailable, match="does not start"):
        start("vllm", make_model(tokenizer), tokenizer, kv_cache_bytes=1000)
    assert not torch.distributed.is_initialized()
    engine = start("vllm", make_model(tokenizer), tokenizer)
    assert mismatch(engine).max_abs < 1e-3
    engine.close()
    assert not torch.distributed.is_initialized()


def test_a_closed_engine_says_so(tokenizer):
    engine = start("vllm", make_model(tokenizer), tokenizer)
    engine.close()
    for call in (
        lambda: engine.generate(PROMPTS, Sampling(2)),
        lambda: engine.update_weights(engine.source, 1),
    ):
        with pytest.raises(RuntimeError, match="the engine was closed"):
            call()
