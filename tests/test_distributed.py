"""Two processes that share the batch learn what one process learns from all of it."""

from __future__ import annotations

import os
import shutil
import socket

import pytest
import torch
import torch.multiprocessing as mp

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlhf_fast.data import Rollout
from rlhf_fast.scratch import tiny_llama, train_tokenizer

TEXT = "the cat sat on a mat and the dog ran to the big red house by the sea"
ROWS = [
    {"prompt": a, "completion": f" {b}" * (i % 4 + 1)}
    for i, (a, b) in enumerate(zip(TEXT.split(), reversed(TEXT.split()), strict=True))
][:8]
PAIRS = [{**row, "chosen": row["completion"], "rejected": " no no"} for row in ROWS]
PAIRS = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in PAIRS]


def learn(stage, rank=0, world=1, run_dir=None):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT, "no no"], 300)
    model = tiny_llama(tokenizer, hidden_size=16)
    shared = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "max_length": 64}
    if stage == "sft":
        config = SFTConfig(**shared, epochs=2, save_every=1)
        settings = {"tokenizer": tokenizer, "config": config, "run_dir": run_dir}
        SFTTrainer(model, ROWS, **settings).train()
        # Once more from the checkpoint of the first step: nothing but the file carries over.
        shutil.rmtree(run_dir / "checkpoints" / "step-2", ignore_errors=True)
        if world > 1:
            torch.distributed.barrier()
        model = tiny_llama(tokenizer, hidden_size=16, seed=1)
        trainer = SFTTrainer(model, ROWS, **settings, resume=True)
        assert trainer.run.step == 1
        return trainer.train().model, trainer.run.history
    if stage == "reward":
        config = RewardConfig(**shared, epochs=2, normalize=False)
        trainer = RewardTrainer(model, PAIRS, tokenizer=tokenizer, config=config).train()
        return trainer.model, trainer.run.history
    with_groups = stage != "ppo"
    config = PPOConfig(
        **shared,
        loss=stage,
        samples_per_prompt=2 if with_groups else 1,
        rollout_batch_size=8,
        max_new_tokens=6,
        epochs=1 if stage == "rloo" else 2,
        iterations=1,
        entropy_coef=0.01,
        kl_coef=0.05,
        kl_target=1.0,
        kl_horizon=20,
        kl_loss_coef=0.1,
        kl_loss_kind="full",
    )
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=config)
    generator = torch.Generator().manual_seed(0)
    size = config.samples_per_prompt
    prompts = [tokenizer(ROWS[i // size * size]["prompt"])["input_ids"] for i in range(len(ROWS))]
    completions = [tokenizer(row["completion"])["input_ids"] for row in ROWS]
    # Prompts are dealt out in turn; the completions of one stay together.
    mine = torch.arange(8).view(-1, size)[rank::world].flatten()
    rollout = Rollout.from_lists(prompts, completions, pad_id=tokenizer.pad_token_id).select(mine)
    metrics = trainer.step(rollout, torch.randn(8, generator=generator)[mine])
    return trainer.model, [metrics]


def work(rank, world, port, stage, folder):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    model, history = learn(stage, rank, world, folder / "run")
    torch.save((model.state_dict(), history), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize(
    "stage", ["sft", "reward", "ppo", "reinforce++", "dr_grpo", "gspo", "rloo"]
)
def test_two_processes_learn_what_one_does(stage, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (2, port, stage, tmp_path), nprocs=2)
    model, history = learn(stage, run_dir=tmp_path / "alone")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(states[0][0][name], states[1][0][name], atol=0, rtol=0)
        torch.testing.assert_close(states[0][0][name], expected, atol=2e-4, rtol=2e-3)
    for ours, theirs in zip(history, states[0][1], strict=True):
        for name in (
            "loss",
            "entropy",
            "grad_norm",
            "accuracy",
            "kl",
            "score",
            "policy_loss",
            "kl_coef",
            "soft_return_std",
        ):
            if name in ours:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-5), name
        if stage == "rloo":  # one step: each process scored in the micro-batches it learnt from
            assert theirs["ratio_max"] == ours["ratio_max"] == 1.0
            assert theirs["approx_kl_k3"] == ours["approx_kl_k3"] == 0.0
