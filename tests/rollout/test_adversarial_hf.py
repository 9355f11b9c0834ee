"""Attacks on `HFEngine`, and on the trainer by way of its rollouts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from plain_truth import (
    check_distribution,
    furthest,
    mixed_samplings,
    random_prompts,
)
from rollout_cases import make_model
from trainer_cases import PROMPTS, length_reward, ppo_config

from rlhf_fast import PPOTrainer
from rlhf_fast.data import Rollout
from rlhf_fast.rewards import RewardError
from rlhf_fast.rollout import HFEngine, Sampling

EXACT = 1e-3  # nats, fp32


@pytest.fixture
def model(tokenizer):
    model = make_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 50, mean_resizing=False)
    return model


@pytest.fixture
def prompts(tokenizer):
    return random_prompts(tokenizer, (1, 2, 5, 17, 130, 60, 3, 3))


def trainer(tokenizer, run_dir=None, reward=length_reward, resume=False, **changes):
    return PPOTrainer(
        make_model(tokenizer, context=128),
        reward=reward,
        prompts=PROMPTS,
        tokenizer=tokenizer,
        config=ppo_config(**changes),
        rollout="hf",
        run_dir=run_dir,
        resume=resume,
    )


def test_every_mixture_of_settings(model, tokenizer):
    lengths = [1, 2, 7, 15, 16, 17, 127, 128, 129, 200, 257] * 4
    prompts = random_prompts(tokenizer, lengths)
    samplings = mixed_samplings(tokenizer, len(prompts))
    rollout = HFEngine(model, tokenizer).generate(prompts, samplings)
    assert furthest(model, tokenizer, prompts, samplings, rollout) < EXACT


def test_joint_distribution_of_two_tokens(model, tokenizer):
    check_distribution(HFEngine(model, tokenizer), model, [70, 71, 72], len(tokenizer), 4000)


def test_all_bits_of_a_seed_count(model, tokenizer):
    samplings = [Sampling(8, ignore_eos=True, seed=place << 32) for place in range(64)]
    rollout = HFEngine(model, tokenizer).generate([[70, 71]] * 64, samplings)
    assert len(set(map(tuple, rollout.completion_ids()))) == 64


def test_stop_on_the_last_allowed_token(model, tokenizer):
    engine, eos = HFEngine(model, tokenizer), tokenizer.eos_token_id
    sampling = [Sampling(6, seed=seed) for seed in range(8)]
    free = engine.generate([[70, 71]] * 8, sampling).completion_ids()
    row = next(row for row, ids in enumerate(free) if ids.index(ids[-1]) == 5 and eos not in ids)
    stop = (free[row][-1], eos, eos)
    stopped = engine.generate([[70, 71]], [replace(sampling[row], stop_token_ids=stop)])
    assert stopped.completion_ids() == [free[row]] and stopped.finish_reasons == ["stop"]


@pytest.mark.parametrize("how", ["training", "inference", "no cache", "greedy by its config"])
def test_modes_of_the_model(how, model, tokenizer, prompts):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    engine, sampling = HFEngine(model, tokenizer), Sampling(12, seed=1)
    model.train(how == "training")
    model.config.use_cache = how != "no cache"
    if how == "greedy by its config":
        model.generation_config.update(do_sample=False, top_k=1, repetition_penalty=2.0)
    with torch.inference_mode(how == "inference"):
        rollout = engine.generate(prompts, sampling)
    assert model.training == (how == "training") and not rollout.logprobs.requires_grad
    assert furthest(model.eval(), tokenizer, prompts, sampling, rollout) < EXACT


@pytest.mark.parametrize("how", ["parameter replaced", "data replaced", "resized"])
def test_the_model_as_it_is_now(how, model, tokenizer, prompts):
    engine, sampling = HFEngine(model, tokenizer), Sampling(12, seed=1)
    norm = model.model.norm
    if how == "parameter replaced":
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 3)
    elif how == "data replaced":
        norm.weight.data = norm.weight.data * 3
    else:
        model.resize_token_embeddings(len(tokenizer) + 128, mean_resizing=False)
    rollout = engine.generate(prompts, sampling)
    assert furthest(model, tokenizer, prompts, sampling, rollout) < EXACT


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_call_leaves_nothing(error, model, tokenizer, prompts):
    def interrupt(done):
        raise error

    engine, sampling = HFEngine(model, tokenizer), Sampling(12, seed=1)
    wanted = engine.generate(prompts, sampling)
    with pytest.raises(error):
        engine.generate(prompts * 3, Sampling(40), interrupt)
    rollout = engine.generate(prompts, sampling)
    assert rollout.completion_ids() == wanted.completion_ids()


def test_a_rollout_under_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        rollout = Rollout.from_lists([[3], [4, 5]], [[6], [7]], pad_id=0, logprobs=[[-1.0], [-2.0]])
    finally:
        torch.set_default_dtype(torch.float32)
    assert rollout.logprobs.dtype == torch.float32
    assert rollout.logprobs.tolist() == [[-1.0], [-2.0]]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_step_on_wrong_logprobs_spares_the_policy(wrong, tokenizer):
    """An engine in half precision overflows where the trainer does not."""
    run = trainer(tokenizer)
    rollout = run.generate(PROMPTS[:8])
    logprobs = rollout.logprobs.clone()
    logprobs[0, 0] = wrong
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=r"log-?prob"):
        run.step(replace(rollout, logprobs=logprobs), [float(i) for i in range(8)])
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("loss", [{}, {"loss": "grpo", "samples_per_prompt": 4}])
def test_a_run_that_breaks_off_and_resumes(loss, tokenizer, tmp_path):
    calls = []

    def breaks(prompts, completions):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise ValueError("the power is out")
        return length_reward(prompts, completions)

    config = {"iterations": 4, "save_every": 2, **loss}
    trainer(tokenizer, tmp_path / "whole", **config).train()
    with pytest.raises(RewardError, match="the power is out"):
        trainer(tokenizer, tmp_path / "parts", breaks, **config).train()
    trainer(tokenizer, tmp_path / "parts", resume=True, **config).train()
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    )
    assert [row["step"] for row in parts] == [1, 2, 3, 4]
    for one, other in zip(whole, parts, strict=True):
        for name in one.keys() - {name for name in one if name.startswith("seconds")}:
            assert other[name] == pytest.approx(one[name], abs=0, rel=0, nan_ok=True), name
