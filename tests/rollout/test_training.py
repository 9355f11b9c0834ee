"""Training with rollouts of either engine: what is corrected, logged, probed, and stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from rollout_cases import VLLM, forward_logprobs, make_model
from typer.testing import CliRunner

import rlhf_fast
from rlhf_fast import PPOConfig, PPOTrainer, cli
from rlhf_fast.data import Experience, Rollout
from rlhf_fast.rewards import RewardError
from rlhf_fast.rollout import (
    HFEngine,
    RolloutConfig,
    RolloutMismatch,
    SyncReport,
    VLLMEngine,
    _vllm,
)
from rlhf_fast.trainers.experience import correct

TEXTS = ["the cat", "the dog sat", "on the mat", "a dog ran"]
LONG = [" ".join([word] * 150) for word in ("cat", "dog", "mat", "sat")]
KINDS = pytest.mark.parametrize("kind", ["hf", VLLM])


def short(prompts, completions, completion_ids):
    return [-float(sum(ids)) / 1000 for ids in completion_ids]


def make_trainer(tokenizer, rollout, prompts=TEXTS, reward=short, **changes):
    fields = {
        "iterations": 3, "rollout_batch_size": 8, "batch_size": 8, "epochs": 2, "max_new_tokens": 6,
        "learning_rate": 3e-3, "max_length": 320,
    }  # fmt: skip
    return PPOTrainer(
        make_model(tokenizer),
        reward=reward,
        prompts=prompts,
        tokenizer=tokenizer,
        config=PPOConfig(**{**fields, **changes}),
        rollout=rollout,
    )


@pytest.fixture
def train(tokenizer):
    """Trains and closes the engine, whatever happens."""
    trainers = []

    def run(rollout, **options):
        trainers.append(make_trainer(tokenizer, rollout, **options))
        return trainers[-1].train()

    yield run
    for trainer in trainers:
        trainer.close()


@KINDS
def test_engine_and_trainer_agree_at_every_step_and_the_run_says_so(kind, train):
    history = train(kind).run.history
    assert len(history) == 3
    for row in history:
        assert row["mismatch_mean"] <= row["mismatch_max"] < 1e-3
        assert row["mismatch_ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert row["mismatch_tokens"] == 0  # share outside [0.9, 1.1]
        assert row["importance_effective_samples"] == pytest.approx(1, abs=1e-3)
        assert row["probe_max_abs"] < 1e-3
        assert row["seconds_sync"] >= 0


@KINDS
def test_a_probe_comes_after_the_first_updates_and_each_kth(kind, train):
    config = RolloutConfig(engine=kind, probe_first=1, probe_every=3)
    history = train(config, iterations=6).run.history
    assert [row["step"] for row in history if "probe_max_abs" in row] == [1, 3, 6]


@pytest.mark.vllm
def test_without_a_sync_the_run_stops_with_numbers(train, monkeypatch):
    """The negative control: a reward that rises does not show that weights arrive."""

    sync = VLLMEngine.update_weights

    def forgets(engine, source, version):
        if version == 0:
            return sync(engine, source, version)
        engine.weight_version = version
        return SyncReport(version, tensors=0, bytes=0, seconds=0.0)

    monkeypatch.setattr(VLLMEngine, "update_weights", forgets)
    with pytest.raises(RolloutMismatch, match="after update 1 .*nats on average.*weights are old"):
        train("vllm")


@pytest.mark.vllm
def test_a_forgotten_prefix_cache_stops_the_run(train, monkeypatch):
    monkeypatch.setattr(_vllm.Adapter, "forget", lambda adapter: None)
    with pytest.raises(RolloutMismatch, match="after update 1"):
        train("vllm", prompts=LONG, learning_rate=1e-2)


def one_experience(old, sampled):
    old, sampled = torch.tensor(old), None if sampled is None else torch.tensor(sampled)
    mask = torch.ones_like(old, dtype=torch.bool)
    mask[-1, -1] = False
    rollout = Rollout(
        tokens=torch.zeros(2, 4, dtype=torch.int64),
        mask=torch.ones(2, 4, dtype=torch.bool),
        completion_mask=mask,
        finished=torch.ones(2, dtype=torch.bool),
        logprobs=sampled,
    )
    return Experience(rollout, torch.zeros(2), old, old, torch.zeros_like(old))


def test_log_probs_of_another_sampler_become_weights():
    """By hand: ratios e, 1/2, 1; the first is cut to 2."""
    experience = one_experience([[-1.0, -1.0], [-1.0, 7.0]], [[-2.0, -0.306852819], [-1.0, 0.0]])
    corrected, metrics = correct(experience, RolloutConfig())
    expected = torch.tensor([[2.0, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(corrected.importance_weights, expected)
    assert metrics["mismatch_max"] == pytest.approx(1.0)
    assert metrics["mismatch_tokens"] == pytest.approx(2 / 3)
    masked, _ = correct(experience, RolloutConfig(correction_mode="mask", weight_low=0.6))
    torch.testing.assert_close(masked.importance_weights, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    whole, _ = correct(experience, RolloutConfig(correction="sequence", weight_high=None))
    ratio = torch.tensor(1.0).exp() * 0.5
    torch.testing.assert_close(whole.importance_weights, torch.tensor([[ratio, ratio], [1.0, 0.0]]))
    plain, metrics = correct(experience, RolloutConfig(correction="none"))
    assert plain.importance_weights is None and metrics["mismatch_max"] == pytest.approx(1.0)
    assert metrics["importance_effective_samples"] < 1
    cut_off, metrics = correct(experience, RolloutConfig(), truncated=True)
    assert cut_off.importance_weights is None and metrics["mismatch_max"] == pytest.approx(1.0)


def test_a_rollout_whose_log_probs_nobody_knows_is_not_corrected():
    experience = one_experience([[-1.0, -1.0], [-1.0, 7.0]], None)
    assert correct(experience, RolloutConfig()) == (experience, {})


@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_tokens_of_no_weight_teach_nothing(tokenizer, shift):
    """Sampled where they were e^20 times as likely: the policy has nothing to learn from them."""
    trainer = make_trainer(tokenizer, "hf", iterations=1, kl_coef=0.0, value_coef=0.0, epochs=1)
    rollout = trainer.generate(TEXTS * 2)
    logprobs = rollout.logprobs + shift * rollout.completion_mask
    metrics = trainer.step(
        dataclasses.replace(rollout, logprobs=logprobs), [float(i) for i in range(8)]
    )
    assert metrics["importance_weight_mean"] == pytest.approx(math.exp(-shift), rel=1e-3)
    assert (metrics["grad_norm"] < 1e-6) == bool(shift)


@KINDS
def test_completions_that_were_cut_off_are_marked(kind, train, tmp_path, tokenizer):
    trainer = make_trainer(tokenizer, kind, iterations=1)
    try:
        rollout = trainer.generate(TEXTS * 2)
    finally:
        trainer.close()
    cut = [reason == "length" for reason in rollout.finish_reasons]
    assert any(cut)
    for ids, is_cut in zip(rollout.completion_ids(), cut, strict=True):
        assert is_cut == (ids[-1] != tokenizer.eos_token_id)


def test_an_engine_of_ones_own_is_used(tokenizer):
    model = make_model(tokenizer)

    class Mine(HFEngine):
        calls = 0

        def generate(self, *args, **options):
            Mine.calls += 1
            return super().generate(*args, **options)

    PPOTrainer(
        model,
        reward=short,
        prompts=TEXTS,
        tokenizer=tokenizer,
        config=PPOConfig(iterations=1, rollout_batch_size=4, batch_size=4, max_new_tokens=4),
        engine=Mine(model, tokenizer),
    ).train()
    assert Mine.calls == 2  # the rollout and the probe


@pytest.mark.parametrize("rollout", ["vlm", {"engin": "hf"}, {"probe_first": -1}, 3])
def test_a_wrong_rollout_is_refused_before_anything_is_loaded(tokenizer, rollout):
    with pytest.raises((ValueError, TypeError), match="rollout|RolloutConfig"):
        PPOTrainer("no-such-model", tokenizer=tokenizer, rollout=rollout)


@KINDS
def test_the_command_takes_an_engine_by_name(kind, tokenizer, tmp_path, monkeypatch):
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in TEXTS))
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions):\n    return [-len(c) / 10 for c in completions]\n"
    )
    run = {
        "model": str(tmp_path / "model"),
        "reward": f"{tmp_path}/mine.py:short",
        "prompts": str(tmp_path / "prompts.jsonl"),
        "run_dir": str(tmp_path / "run"),
        "iterations": 2, "rollout_batch_size": 4, "batch_size": 4, "max_new_tokens": 5,
        "rollout": {"engine": "auto", "probe_every": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    result = CliRunner().invoke(cli.app, ["ppo", f"{tmp_path}/run.yaml", f"rollout.engine={kind}"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["probe_max_abs"] < 1e-3 for row in rows)
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(row)["finish_reason"] for row in samples} <= {"stop", "length"}
    wrong = CliRunner().invoke(cli.app, ["ppo", f"{tmp_path}/run.yaml", "rollout=fast"])
    assert wrong.exit_code == 2 and "RolloutConfig.engine = 'fast'" in wrong.output


def work(rank, world, port, folder):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from rlhf_fast.scratch import train_tokenizer

    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog ran"], 280)
    trainer = make_trainer(tokenizer, "vllm").train()
    rollout = trainer.generate(TEXTS[:2])
    expected = forward_logprobs(trainer.model, rollout, vocabulary=len(tokenizer))
    worst = float((rollout.logprobs - expected).abs().max())
    trainer.close()
    weight = torch.ones(1)
    torch.distributed.all_reduce(weight)  # the trainer's group lives on
    torch.save((trainer.run.history, worst, float(weight)), folder / f"{rank}.pt")


@pytest.mark.processes
@pytest.mark.vllm
def test_two_processes_train_with_an_engine_each(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(2, port, tmp_path), nprocs=2)
    for rank in range(2):
        history, worst, weight = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert len(history) == 3 and worst < 1e-3 and weight == 2.0
        assert all(row["mismatch_max"] < 1e-3 and row["probe_max_abs"] < 1e-3 for row in history)


@KINDS
def test_memory_is_released_before_each_update_and_progress_is_shown(kind, tokenizer, monkeypatch):
    trainer = make_trainer(tokenizer, kind, iterations=2)
    calls, engine = [], trainer.rollouts.engine
    for name in ("generate", "release_memory", "update_weights"):
        call = getattr(engine, name)

        def noted(*args, name=name, call=call):
            calls.append(name)
            if name == "generate" and len(args) > 2:
                told = args[2]
                args = (*args[:2], lambda count: (progress.append(count), told(count)))
            return call(*args)

        monkeypatch.setattr(engine, name, noted)
    progress = []
    try:
        trainer.train()
    finally:
        trainer.close()
    iteration = ["generate", "release_memory", "release_memory", "update_weights", "generate"]
    assert calls == iteration * 2  # the last one is the probe
    assert sum(progress) == 16
    assert trainer.run._bar is None


def test_a_resumed_run_keeps_its_correction(tokenizer, tmp_path):
    def make(rollout, resume):
        return PPOTrainer(
            make_model(tokenizer), reward=short, prompts=TEXTS, tokenizer=tokenizer,
            rollout=rollout, run_dir=tmp_path, resume=resume,
            config=PPOConfig(
                iterations=2, rollout_batch_size=4, batch_size=4, max_new_tokens=4, save_every=1
            ),
        )  # fmt: skip

    make("hf", False).train()
    with pytest.raises(ValueError, match="begun with the correction .*'token'.*resume it with its"):
        make({"engine": "hf", "correction": "sequence"}, True)
    assert make({"engine": "hf", "probe_first": 0}, True).rollouts.engine.weight_version == 2


def test_a_rewards_error_closes_the_engine(tokenizer, monkeypatch):
    closed = []
    monkeypatch.setattr(HFEngine, "close", lambda engine: closed.append(engine))

    def broken(prompts, completions):
        raise ZeroDivisionError

    with pytest.raises(RewardError):
        rlhf_fast.ppo(
            make_model(tokenizer), reward=broken, prompts=TEXTS, tokenizer=tokenizer, rollout="hf",
            rollout_batch_size=4, batch_size=4, max_new_tokens=4,
        )  # fmt: skip
    assert len(closed) == 1
