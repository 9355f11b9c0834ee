"""LoRA as a hostile but legitimate user would drive it: only what the docs promise is asked."""

from __future__ import annotations

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from lora_cases import TOKENS, adapt, base, base_folder, redraw, tokenizer
from trainer_cases import EXAMPLES, PAIRS, PROMPTS, ppo_config, sft_config
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen2Config
from typer.testing import CliRunner

from rlhf_fast import PPOTrainer, RewardConfig, RewardTrainer, SFTTrainer, api, cli
from rlhf_fast.scalar_models import RewardModel
from rlhf_fast.scratch import tiny_llama

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures

SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}


MODELS = {
    "gpt2": GPT2Config(**SIZES, n_positions=128),
    "qwen2": Qwen2Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, attn_implementation="eager"),
}


def odd(prompts, completions):
    return [float(text.count("e")) - i / 10 for i, text in enumerate(completions)]


def ppo(policy, tokenizer=None, *, reward=odd, **options):
    config = options.pop("config", None) or ppo_config(epochs=1, learning_rate=1e-2)
    return PPOTrainer(
        policy, reward=reward, prompts=PROMPTS, tokenizer=tokenizer, rollout="hf", config=config,
        **options,
    )  # fmt: skip


@torch.no_grad()
def logprobs(model):
    return model.eval()(TOKENS).logits.float().log_softmax(-1)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def load(folder):
    return peft.AutoPeftModelForCausalLM.from_pretrained(folder)


# What is trained, and what stays.


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["fresh", "drawn", "head", "patterns", "half-base"])
def test_first_ratio_is_one_first_kl_is_zero_and_the_base_keeps_its_bits(family, kind, tokenizer):
    options = {
        "head": {"target_modules": ["lm_head", "c_attn" if family == "gpt2" else "q_proj"]},
        "patterns": {"rank_pattern": {"layers.0": 2}, "alpha_pattern": {"v_proj": 3}},
    }.get(kind, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[family]).eval()
    model = adapt(model.bfloat16() if kind == "half-base" else model, **options)
    if kind != "fresh":
        redraw(model)
    frozen = {n: p for n, p in state(model).items() if "lora_" not in n}
    trainer = ppo(model, tokenizer, critic="model", config=ppo_config(
        epochs=1, kl_loss_coef=0.1, kl_loss_kind="full",
        mixed_precision="bf16" if kind == "half-base" else "no",
    )).train()  # fmt: skip
    first, *_, last = trainer.run.history
    assert first["kl"] == first["kl_ref"] == first["approx_kl_k3"] == 0.0
    assert first["ratio_max"] == 1.0 and last["kl"] != 0.0
    now = state(model)
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


@pytest.mark.parametrize("idle", ["policy", "critic"])
def test_policy_and_critic_over_one_base_do_not_move_one_another(idle, base, tokenizer):
    model = adapt(base, drawn=True)
    rates = {"learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    rates["learning_rate" if idle == "policy" else "critic_learning_rate"] = 1e-12
    trainer = ppo(model, tokenizer, critic="model", config=ppo_config(epochs=1, **rates))
    critic = trainer._module.critic
    before = {"policy": state(model), "critic": state(critic)}
    trainer.train()
    now = {"policy": state(model), "critic": state(critic)}
    moved = {
        who: max(float((now[who][n] - p).abs().max()) for n, p in before[who].items())
        for who in now
    }
    assert moved.pop(idle) < 1e-9 and moved.popitem()[1] > 1e-3


def test_of_two_adapters_the_active_one_is_trained_and_saved(base_folder, tokenizer, tmp_path):
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), drawn=True)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    before = state(model)
    ppo(model, tokenizer, run_dir=tmp_path / "run").train()
    moved = {name for name, p in state(model).items() if not torch.equal(p, before[name])}
    assert moved and all("other" in name for name in moved)
    assert torch.equal(logprobs(load(tmp_path / "run/model")), logprobs(model))


@pytest.mark.parametrize("stage", ["sft", "grpo", "ppo"])
def test_micro_batches_add_up(stage, base, tokenizer):
    after = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = adapt(copy.deepcopy(base), drawn=True)
        if stage == "sft":
            config = sft_config(micro_batch_size=size)
            SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=config).train()
        else:
            group = {"samples_per_prompt": 4, "loss": "grpo"} if stage == "grpo" else {}
            ppo(model, tokenizer, config=ppo_config(micro_batch_size=size, **group)).train()
        after.append(state(model))
    for name in after[0]:
        torch.testing.assert_close(after[1][name], after[0][name], atol=1e-5, rtol=0)


def test_a_run_that_was_killed_goes_on_with_the_reference_it_had(base_folder, tmp_path):
    SFTTrainer(base_folder, EXAMPLES, lora=4, config=sft_config(), run_dir=tmp_path / "s").train()
    calls = []

    def killed(prompts, completions):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return odd(prompts, completions)

    start, config = str(tmp_path / "s/model"), ppo_config(iterations=4, save_every=1)
    options = {"critic": "model", "config": config}
    whole = ppo(start, run_dir=tmp_path / "whole", **options).train()
    with pytest.raises(KeyboardInterrupt):
        ppo(start, reward=killed, run_dir=tmp_path / "cut", **options).train()
    again = ppo(start, run_dir=tmp_path / "cut", resume=True, **options)
    assert again.run.step == 2
    again.train()
    for name, p in state(whole._module).items():
        assert torch.equal(state(again._module)[name], p), name
    assert again.run.history[-1]["kl"] == whole.run.history[-1]["kl"]


# What is saved is what was trained, or an error says why not.


@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_an_adapter_does_not_name_a_base_that_its_weights_are_not(stage, base_folder, tmp_path):
    """A model trained whole still calls itself by the folder it came from."""
    sft = SFTTrainer(base_folder, EXAMPLES, config=sft_config()).train()
    folder, texts = tmp_path / "run/model", (PROMPTS[:2], [" a", " no"])
    options = {"tokenizer": sft.tokenizer, "lora": 4, "run_dir": tmp_path / "run"}
    if stage == "reward":
        options["config"] = RewardConfig(batch_size=8, max_length=64)
    make = ppo if stage == "ppo" else partial(RewardTrainer, data=PAIRS)
    with pytest.warns(UserWarning, match="no loader can find its base"):
        trainer = make(sft.model, **options).train()
    if json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]:
        if stage == "ppo":
            got, expected = logprobs(load(folder)), logprobs(trainer.model)
        else:
            got = RewardModel.from_pretrained(folder).score(*texts)
            expected = trainer.model.score(*texts)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def saved_or_refused(model, tokenizer, folder):
    try:
        trainer = ppo(model, tokenizer, run_dir=folder).train()
    except ValueError as error:
        assert re.search("adapter|init_lora_weights|requires_grad", str(error))  # noqa: PT017
        return
    torch.manual_seed(1)  # another process
    torch.testing.assert_close(logprobs(load(folder / "model")), logprobs(trainer.model))


def test_what_is_trained_beside_the_adapter_is_saved_or_refused(base_folder, tokenizer, tmp_path):
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder))
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    saved_or_refused(model, tokenizer, tmp_path / "run")


@pytest.mark.parametrize("how", ["pissa", "olora", "pissa_niter_4"])
def test_an_adapter_that_edits_the_base_is_saved_or_refused(how, base_folder, tokenizer, tmp_path):
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), init_lora_weights=how)
    saved_or_refused(model, tokenizer, tmp_path / "run")


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_merge_that_a_tied_head_cannot_hold_is_refused_or_right(layer, base_folder, tmp_path):
    trainer = ppo(
        base_folder, lora={"r": 4, "target_modules": ["q_proj", layer]}, run_dir=tmp_path / "run"
    ).train()
    try:
        api.merge(tmp_path / "run/model", tmp_path / "merged")
    except ValueError:
        return
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logprobs(merged), logprobs(trainer.model), atol=1e-4, rtol=1e-4)


def test_a_merge_does_not_overwrite_the_base(base_folder, tmp_path):
    trainer = ppo(base_folder, lora=4, run_dir=tmp_path / "run").train()
    with pytest.raises(ValueError, match="base"):
        api.merge(tmp_path / "run/model", base_folder)
    assert torch.equal(logprobs(load(tmp_path / "run/model")), logprobs(trainer.model))


def test_an_adapter_finds_its_base_from_another_folder(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = ppo("base", lora=4, run_dir="run").train()
    config = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    monkeypatch.chdir("/")  # where "base" would be asked of the Hub
    assert Path(config["base_model_name_or_path"]).exists()
    assert torch.equal(logprobs(load(tmp_path / "run/model")), logprobs(trainer.model))


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_over_a_base_of_another_depth_is_refused(layers, base_folder, tokenizer):
    folder = base_folder + "-adapter"
    adapt(AutoModelForCausalLM.from_pretrained(base_folder), drawn=True).save_pretrained(folder)
    tiny_llama(tokenizer, hidden_size=32, layers=layers).save_pretrained(base_folder)
    with pytest.raises(ValueError, match=r"base|lora_A|layers"):
        ppo(folder, tokenizer)


def test_a_run_is_not_resumed_with_another_reference(base_folder, tmp_path):
    for name, rate in (("one", 1e-2), ("two", 2e-2)):
        config = sft_config(learning_rate=rate)
        SFTTrainer(base_folder, EXAMPLES, lora=4, config=config, run_dir=tmp_path / name).train()
    options = {"config": ppo_config(save_every=1), "run_dir": tmp_path / "run"}
    ppo(str(tmp_path / "one/model"), **options).train()
    with pytest.raises(ValueError):
        ppo(str(tmp_path / "two/model"), resume=True, **options)


# What is said of what is wrong.


@pytest.mark.parametrize("lora", [{"r": 2}, {"r": 4, "target_modules": ["q_proj"]}])
def test_a_resume_with_another_adapter_names_what_differs(lora, base_folder, tmp_path):
    options = {"config": sft_config(save_every=1), "run_dir": tmp_path / "run"}
    SFTTrainer(base_folder, EXAMPLES, lora=4, **options).train()
    with pytest.raises(ValueError, match=r"rank|\br\b|lora_A|target_modules"):
        SFTTrainer(base_folder, EXAMPLES, lora=lora, resume=True, **options)


def test_a_wrong_setting_leaves_the_model_as_it_was(base, tokenizer):
    """The next cell of the notebook, with the setting put right, has to work."""
    with pytest.raises(ValueError, match="tokens"):
        ppo(base, tokenizer, lora=4, config=ppo_config(max_length=4))
    assert ppo(base, tokenizer, lora=4).train().run.history[0]["kl"] == 0.0


@pytest.mark.parametrize("value", ["true", "all", "1.5", "[8]"])
def test_the_command_says_what_lora_takes_without_a_traceback(value, base_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in EXAMPLES))
    arguments = ["sft", f"model={base_folder}", f"data={data}", f"lora={value}"]
    arguments += [f"run_dir={tmp_path / 'run'}", "max_length=64"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "give a rank" in result.output


def test_without_peft_nothing_else_is_blamed(base, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="LoRA needs peft") as error:
        ppo(base, tokenizer, lora=4)
    assert "target_modules" not in str(error.value) and "q_proj" not in str(error.value)


@pytest.mark.parametrize("damage", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_named(damage, base_folder, tmp_path, tokenizer):
    folder = tmp_path / "adapter"
    adapt(AutoModelForCausalLM.from_pretrained(base_folder)).save_pretrained(folder)
    (folder / damage).unlink() if "model" in damage else (folder / damage).write_text("{")
    with pytest.raises(ValueError, match=damage):
        ppo(str(folder), tokenizer)


@pytest.mark.parametrize("whole", [True, False])
def test_the_policy_in_training_is_no_reference(whole, base, tokenizer):
    model = base if whole else adapt(base)
    with pytest.raises(ValueError, match="ref"):
        ppo(model, tokenizer, ref=model)
