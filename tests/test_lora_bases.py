"""Which base an adapter names, which it fits, and which reference a run goes on with."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from lora_cases import TOKENS, adapt, base, base_folder, tokenizer, trainer_of
from trainer_cases import EXAMPLES, ppo_config, sft_config
from transformers import AutoModelForCausalLM, GPT2Config

from rlhf_fast import SFTTrainer, api
from rlhf_fast._adapters import check_peft_model
from rlhf_fast.lora import load_adapter
from rlhf_fast.trainers import checkpoint

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_an_adapter_of_a_model_trained_whole_names_its_folder(base_folder, tmp_path):
    first = SFTTrainer(base_folder, EXAMPLES, config=sft_config(), run_dir=tmp_path / "one").train()
    second = SFTTrainer(
        first.model, EXAMPLES, lora=4, config=sft_config(), run_dir=tmp_path / "two"
    ).train()
    fields = json.loads((tmp_path / "two/model/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "one/model")
    again = load_adapter(tmp_path / "two/model", torch.float32)
    assert torch.equal(logits(again), logits(second.model))


def test_an_adapter_whose_base_is_nowhere_is_saved_with_a_warning(base_folder, tmp_path):
    # The tokenizer is found by the folder that the model came from: it stays.
    first = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base_folder), EXAMPLES, config=sft_config()
    ).train()
    second = SFTTrainer(
        first.model, EXAMPLES, lora=4, config=sft_config(), run_dir=tmp_path / "run"
    )
    with pytest.warns(UserWarning, match="no loader can find its base.*base_model_name_or_path"):
        second.train()
    with pytest.raises(ValueError, match="does not name its base model"):
        load_adapter(tmp_path / "run/model", torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"exclude_modules": r".*layers\.1.*"},
    ],
)
def test_an_adapter_that_leaves_layers_out_on_purpose_is_loaded(options, base_folder, tmp_path):
    model = adapt(AutoModelForCausalLM.from_pretrained(base_folder), drawn=True, **options)
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_saves_may_be_trained(bias):
    config = GPT2Config(vocab_size=300, n_layer=1, n_head=2, n_embd=16)
    check_peft_model(adapt(AutoModelForCausalLM.from_config(config), bias=bias))


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
def test_a_whole_module_beside_a_tied_head_is_merged(side, base_folder, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model = adapt(model, target_modules=["q_proj"], modules_to_save=[side], drawn=True)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    api.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


def test_a_new_adapter_of_ones_own_is_no_other_reference(base_folder, tokenizer, tmp_path):
    """It adds nothing, whatever its first factor was drawn as."""
    options = {"run_dir": tmp_path / "run", "config": ppo_config(save_every=1)}
    for resume in (False, True):
        torch.manual_seed(int(resume))
        model = adapt(AutoModelForCausalLM.from_pretrained(base_folder))
        trainer = trainer_of(model, tokenizer, resume=resume, **options)
        assert trainer.run.step == (trainer.config.iterations if resume else 0)
        trainer.train()


def test_a_whole_policy_is_not_resumed_with_another_reference(base_folder, tokenizer, tmp_path):
    options = {"run_dir": tmp_path / "run", "config": ppo_config(save_every=1)}
    trained = trainer_of(base_folder, tokenizer, **options).train().model
    with pytest.raises(ValueError, match="the reference is not that of the run"):
        trainer_of(trained, tokenizer, resume=True, **options)


def test_layers_that_changed_places_are_seen(base):
    reference = adapt(base, drawn=True).requires_grad_(False)
    before = checkpoint.describe_reference(reference)
    layers = reference.get_base_model().model.layers
    layers[0].self_attn, layers[1].self_attn = layers[1].self_attn, layers[0].self_attn
    checkpoint._known_sums.clear()
    with pytest.raises(ValueError, match="the reference is not that of the run"):
        checkpoint.check_reference(before, reference)


def test_a_failed_start_leaves_what_requires_gradients(base, tokenizer):
    base.get_input_embeddings().weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(ValueError):
        trainer_of(base, tokenizer, lora=4, config=ppo_config(max_length=4))
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before
    adapted = adapt(base)
    with pytest.raises(ValueError):  # an adapter of one's own stays
        trainer_of(adapted, tokenizer, config=ppo_config(max_length=4))
    assert isinstance(adapted, peft.PeftModel) and "lora_A" in str(list(adapted.state_dict()))
