"""LoRA adapters on disk and across stages and processes: saved, loaded, merged, resumed."""

from __future__ import annotations

import json
import os
import shutil
import socket

import peft
import pytest
import torch
import torch.multiprocessing as mp
from lora_cases import (
    TEXTS,
    TOKENS,
    adapt,
    base,
    base_folder,
    redraw,
    tokenizer,
    trainer_of,
)
from safetensors import safe_open
from trainer_cases import EXAMPLES, PAIRS, PROMPTS, ppo_config, sft_config
from typer.testing import CliRunner

import rlhf_fast
from rlhf_fast import (
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
    api,
    cli,
    models,
)
from rlhf_fast.config import ConfigError
from rlhf_fast.data import Rollout
from rlhf_fast.models import load_causal_lm
from rlhf_fast.scalar_models import RewardModel
from rlhf_fast.scratch import tiny_llama, train_tokenizer
from rlhf_fast.trainers import checkpoint

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures


def test_what_is_saved_is_what_peft_loads(base_folder, tmp_path, tokenizer):
    trainer = trainer_of(base_folder, None, lora={"r": 4}, run_dir=tmp_path / "run").train()
    folder = tmp_path / "run" / "model"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    with torch.no_grad():
        expected = trainer.model.eval()(TOKENS).logits
        again = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(again(TOKENS).logits, expected, atol=0, rtol=0)
        ours = load_causal_lm(folder)
        assert torch.equal(ours.eval()(TOKENS).logits, expected)
        assert any(p.requires_grad for p in ours.parameters())
        api.merge(folder, tmp_path / "merged")
        merged = load_causal_lm(tmp_path / "merged")
        assert not isinstance(merged, peft.PeftModel)
        torch.testing.assert_close(merged(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_by_another_name_is_saved_where_loaders_look(base_folder, tmp_path, tokenizer):
    model = load_causal_lm(base_folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, adapter_name="policy")
    redraw(model)
    trainer_of(model, tokenizer).save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "policy").exists()
    with torch.no_grad():
        again = load_causal_lm(tmp_path / "saved").eval()
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)


STAGES = ("sft", "reward", "ppo", "ppo-model")


def staged(stage, folder, *, run_dir=None, resume=False, **changes):
    settings = {"lora": 4, "run_dir": run_dir, "resume": resume}
    if stage == "sft":
        config = sft_config(save_every=1, **changes)
        return SFTTrainer(folder, EXAMPLES, config=config, **settings)
    if stage == "reward":
        fields = {"batch_size": 8, "learning_rate": 1e-2, "max_length": 64, "epochs": 2}
        config = RewardConfig(**fields, save_every=1, **changes)
        return RewardTrainer(folder, PAIRS, config=config, **settings)
    config = ppo_config(save_every=1, **changes)
    critic = "model" if stage == "ppo-model" else "head"
    return trainer_of(folder, None, config=config, critic=critic, **settings)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_bit_for_bit(stage, base_folder, tmp_path):
    whole = staged(stage, base_folder, run_dir=tmp_path / "whole").train()
    staged(stage, base_folder, run_dir=tmp_path / "cut").train()
    for path in (tmp_path / "cut/checkpoints").iterdir():
        if path.name != "step-1":
            shutil.rmtree(path)
    torch.manual_seed(99)
    resumed = staged(stage, base_folder, run_dir=tmp_path / "cut", resume=True)
    assert resumed.run.step == 1
    resumed.train()
    for (name, ours), theirs in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    pairs = zip(resumed.run.history, whole.run.history, strict=True)
    for ours, theirs in pairs:
        timeless = [name for name in ours if "seconds" not in name]
        assert {n: ours[n] for n in timeless} == {n: theirs[n] for n in timeless}


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_what_is_trained_and_nothing_below(stage, base_folder, tmp_path):
    trainer = staged(stage, base_folder, run_dir=tmp_path / "run").train()
    folder = next((tmp_path / "run/checkpoints").iterdir())
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    own = {"head.weight", "head.bias", "critic.head.weight", "critic.head.bias", "gain", "shift"}
    assert names and all("lora_" in name or name in own for name in names)
    state = torch.load(folder / "optimizer.bin", weights_only=True)
    trained = sum(p.numel() for p in trainer._module.parameters() if p.requires_grad)
    held = sum(s["exp_avg"].numel() for s in state["state"].values())
    assert held == trained
    assert (folder / "model" / "adapter_model.safetensors").exists()


def test_a_checkpoint_over_another_base_or_scale_is_refused(base_folder, tmp_path, tokenizer):
    staged("sft", base_folder, run_dir=tmp_path / "run").train()
    other = tiny_llama(tokenizer, hidden_size=32, seed=7)
    settings = {"run_dir": tmp_path / "run", "resume": True, "config": sft_config(save_every=1)}
    settings["tokenizer"] = tokenizer
    with pytest.raises(ConfigError, match="frozen weights below the adapter are not those"):
        SFTTrainer(other, EXAMPLES, lora=4, **settings)
    for lora, message in (
        ({"r": 4, "alpha": 5}, "had alpha = 32 in the run, and now has 5"),
        ({"r": 2, "alpha": 16}, "had r = 4 in the run, and now has 2"),
        ({"r": 4, "dropout": 0.1}, r"had dropout = 0\.0 in the run, and now has 0\.1"),
        ({"r": 4, "use_rslora": True}, "the adapter is scaled otherwise"),
        ({"r": 4, "target_modules": ["q_proj"]}, "lora_A.*is only in the checkpoint"),
        (None, "was begun with lora .*, and here is no adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            SFTTrainer(base_folder, EXAMPLES, lora=lora, **settings)


def test_frozen_weights_are_summed_in_slices_and_once(base, monkeypatch):
    model = adapt(base)
    expected = sum(p.double().sum() for p in model.parameters() if not p.requires_grad)
    monkeypatch.setattr(models, "SLICE", 100)
    summed, split = [], torch.Tensor.split
    monkeypatch.setattr(
        torch.Tensor, "split", lambda x, size: summed.append(size) or split(x, size)
    )
    for _ in range(2):
        assert checkpoint._below(model)["sum"] == pytest.approx(float(expected), rel=1e-12)
    # The sum and that of the absolute values, both at the first call alone.
    assert summed == [100] * 2 * sum(not p.requires_grad for p in model.parameters())


def test_merging_overwrites_nothing(base_folder, tmp_path):
    adapt(load_causal_lm(base_folder)).save_pretrained(tmp_path / "adapter")
    for into in (base_folder, tmp_path / "adapter", tmp_path / "adapter/adapter_config.json"):
        with pytest.raises(ValueError, match="is not empty, and would be overwritten"):
            api.merge(tmp_path / "adapter", into)


def test_sft_then_reward_then_ppo_with_adapters_all_the_way(base_folder, tmp_path):
    sft = rlhf_fast.sft(
        base_folder, EXAMPLES, lora={"r": 4, "dropout": 0.1}, run_dir=tmp_path / "sft",
        batch_size=8, learning_rate=1e-2, max_length=64, epochs=2,
    )  # fmt: skip
    policy = str(tmp_path / "sft/model")
    reward = rlhf_fast.reward(
        policy, PAIRS, run_dir=tmp_path / "reward", batch_size=8, learning_rate=1e-2, max_length=64,
        epochs=3,
    )  # fmt: skip
    scores = str(tmp_path / "reward/model")
    texts = PROMPTS[:3], [" a", " the end", " no"]
    again = RewardModel.from_pretrained(scores)
    torch.testing.assert_close(again.score(*texts), reward.model.score(*texts), atol=0, rtol=0)
    api.merge(scores, tmp_path / "merged-reward")
    merged = RewardModel.from_pretrained(tmp_path / "merged-reward")
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged.score(*texts), again.score(*texts), atol=1e-4, rtol=1e-4)
    further = RewardTrainer(scores, PAIRS, config=RewardConfig(batch_size=8, max_length=64))
    assert any("lora_" in n for n, p in further.model.named_parameters() if p.requires_grad)
    fields = ppo_config(kl_coef=0.1).model_dump() | {"iterations": 2}
    trainer = rlhf_fast.ppo(
        policy, reward=scores, prompts=PROMPTS, critic=scores, rollout="hf",
        run_dir=tmp_path / "ppo", **fields,
    )  # fmt: skip
    history = trainer.run.history
    # The reference is the SFT policy, adapter included, not the base.
    assert history[0]["kl"] == 0.0 and history[1]["kl"] != 0.0
    with torch.no_grad():
        expected = sft.model.eval()(TOKENS).logits
        assert torch.equal(trainer.ref.model(TOKENS).logits, expected)
    assert json.loads((tmp_path / "ppo/model/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tmp_path / "base")


def test_the_command_trains_and_merges_adapters(base_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    run, merged = tmp_path / "run", tmp_path / "merged"
    settings = [f"model={base_folder}", f"data={data}", f"run_dir={run}", "batch_size=8"]
    shell = CliRunner()
    result = shell.invoke(cli.app, ["sft", *settings, "lora.r=2", "lora.target_modules=[q_proj]"])
    assert result.exit_code == 0, result.output
    config = json.loads((run / "model/adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, ["q_proj"])
    result = shell.invoke(cli.app, ["merge", str(run / "model"), str(merged)])
    assert result.exit_code == 0 and (merged / "model.safetensors").exists()
    result = shell.invoke(cli.app, ["merge", str(merged), str(tmp_path / "again")])
    assert result.exit_code == 2 and "holds no adapter_config.json" in result.output


def step(rank=0, world=1):
    """One PPO step on this process's share of a rollout; the trained parameters afterwards."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(TEXTS, 300)
    config = ppo_config(micro_batch_size=4, kl_loss_coef=0.1, kl_loss_kind="full", kl_coef=0.05)
    model = tiny_llama(tokenizer, hidden_size=16)
    trainer = trainer_of(model, tokenizer, lora=4, critic="model", config=config)
    ids = [tokenizer(row[key])["input_ids"] for key in ("prompt", "completion") for row in EXAMPLES]
    rollout = Rollout.from_lists(ids[:8], ids[16:24], pad_id=tokenizer.pad_token_id)
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0))
    mine = torch.arange(8)[rank::world]
    metrics = trainer.step(rollout.select(mine), scores[mine])
    module = trainer.run.accelerator.unwrap_model(trainer._module)
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}, metrics


def work(rank, port, folder):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.save(step(rank, 2), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_two_processes_learn_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, tmp_path), nprocs=2)
    expected, alone = step()
    (first, metrics), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert expected.keys() == first.keys() and all("lora_" in n or "head" in n for n in expected)
    for name, parameter in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter, atol=2e-4, rtol=2e-3)
    assert metrics["kl"] == alone["kl"] == 0.0
    for name in ("policy_loss", "value_loss", "grad_norm"):
        assert metrics[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5)
