"""Adapters from folders: what fits, in which precision, over which base."""

from __future__ import annotations

import json

import pytest
import torch
from lora_cases import adapt, base, base_folder, tokenizer, trainer_of
from safetensors.torch import load_file, save_file
from trainer_cases import PAIRS, PROMPTS, ppo_config
from transformers import AutoModel, AutoModelForCausalLM

from rlhf_fast import PPOTrainer, RewardConfig, RewardTrainer
from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.lora import save_model
from rlhf_fast.models import load_causal_lm
from rlhf_fast.rollout import HFEngine, make
from rlhf_fast.scalar_models import RewardModel

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures
TEXTS = PROMPTS[:3], [" a", " the end", " no"]


def saved(base_folder, folder, tokenizer, **options):
    """The folder of an adapter that was trained, with its tokenizer."""
    adapt(load_causal_lm(base_folder), drawn=True, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("spoil", ["renamed", "missing", "module"])
def test_an_adapter_whose_weights_do_not_fit_is_refused(spoil, base_folder, tmp_path, tokenizer):
    folder = saved(base_folder, tmp_path / "adapter", tokenizer, modules_to_save=["norm"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    state = load_file(path)
    if spoil == "renamed":
        state = {k.replace("layers.0", "layers.9"): v for k, v in state.items()}
    else:
        gone = {"missing": "layers.0.self_attn.q_proj.lora_A", "module": ".norm.weight"}[spoil]
        state = {k: v for k, v in state.items() if gone not in k}
    save_file(state, path)
    named = {"renamed": "layers.0", "missing": "q_proj.lora_A", "module": "norm.weight"}[spoil]
    with pytest.raises(ValueError, match=f"does not fit its base model .*{named}"):
        load_causal_lm(folder)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForCausalLM])
def test_a_reward_model_is_read_over_the_class_of_its_base(kind, base_folder, tmp_path, tokenizer):
    options = {"task_type": None} if kind is AutoModel else {}
    model = adapt(kind.from_pretrained(base_folder), drawn=True, **options)
    reward = RewardModel(model, tokenizer).eval()
    reward.save_pretrained(tmp_path / "reward")
    again = RewardModel.from_pretrained(tmp_path / "reward")
    assert torch.equal(again.score(*TEXTS), reward.score(*TEXTS))


def test_the_revision_of_the_base_is_that_of_the_adapter(
    base_folder, tmp_path, tokenizer, monkeypatch
):
    folder = saved(base_folder, tmp_path / "adapter", tokenizer)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v2"}))
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **options):
        asked.append(options["revision"])
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_causal_lm(folder)
    assert asked == ["v2"]


@pytest.mark.parametrize("module", ["norm", "lm_head", "input_layernorm"])
def test_whole_modules_beside_an_adapter_are_trained_from_a_folder_in_bf16(
    module, base_folder, tmp_path, tokenizer
):
    options = {"modules_to_save": [module], "target_modules": ["q_proj", "up_proj"]}
    folder = saved(base_folder, tmp_path / "adapter", tokenizer, **options)
    config = ppo_config(mixed_precision="bf16", iterations=1)
    trainer = trainer_of(folder, None, critic="model", config=config)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert trainer.train().run.history[0]["kl"] == 0.0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
    assert any(
        "modules_to_save" in n and not torch.equal(p, before[n])
        for n, p in trainer.model.named_parameters()
    )


def test_a_reward_model_over_bf16_scores_as_it_did_in_training(base_folder, tmp_path):
    fields = {"batch_size": 8, "max_length": 64, "epochs": 3, "learning_rate": 1e-2}
    trainer = RewardTrainer(
        base_folder,
        PAIRS,
        lora=4,
        config=RewardConfig(**fields, mixed_precision="bf16"),
        run_dir=tmp_path / "run",
    ).train()
    again = RewardModel.from_pretrained(tmp_path / "run/model")
    assert torch.equal(again.score(*TEXTS), trainer.model.score(*TEXTS))


def test_saving_asks_no_hub(base, tmp_path, monkeypatch):
    from peft.utils import save_and_load

    def refuse(*args, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", refuse)
    base.config._name_or_path = base.name_or_path = "nobody/nothing"
    save_model(adapt(base), tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert names and all("lora_" in name for name in names)


def test_embeddings_that_the_base_on_disk_lacks_are_saved(base_folder, tmp_path):
    model = load_causal_lm(base_folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    save_model(adapt(model), tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any("embed_tokens" in name for name in names)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(kind, base_folder, tmp_path, tokenizer):
    message = "changes the weights below the adapter.*init_lora_weights=True.*path_initial"
    with pytest.raises(ValueError, match=message):
        trainer_of(adapt(load_causal_lm(base_folder), init_lora_weights=kind), tokenizer)
    folder = saved(base_folder, tmp_path / "adapter", tokenizer, init_lora_weights=kind)
    with pytest.raises(ValueError, match=message):
        trainer_of(folder, None)
    reward = RewardModel(adapt(load_causal_lm(base_folder), init_lora_weights=kind), tokenizer)
    with pytest.raises(ValueError, match=message):
        RewardTrainer(reward, PAIRS)


def test_what_is_for_vllm_does_not_stop_rollouts_without_it(base, tokenizer, monkeypatch):
    def refuse(*args, **options):
        raise BackendUnavailable("no vLLM")

    monkeypatch.setattr(make, "VLLMEngine", refuse)
    model = adapt(base, modules_to_save=["norm"])
    for engine in ("hf", "auto"):
        rollout = {"engine": engine, "max_lora_rank": 8}
        trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config(), rollout=rollout)
        assert isinstance(trainer.rollouts.engine, HFEngine)


def test_an_adapter_that_names_no_base_says_so(base_folder, tmp_path):
    adapt(load_causal_lm(base_folder)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    described = json.loads(path.read_text())
    del described["base_model_name_or_path"]
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="does not name its base model, so its tokenizer"):
        trainer_of(str(tmp_path / "adapter"), None)


def test_a_base_that_a_trainer_adapted_says_which_model_to_pass(base, tokenizer):
    trainer = trainer_of(base, tokenizer, lora=4)
    with pytest.raises(ValueError, match=r"pass its trainer\.model or load the base anew"):
        trainer_of(base, tokenizer)
    trainer_of(trainer.model, tokenizer)
