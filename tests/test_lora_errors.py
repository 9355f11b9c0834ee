"""Adapters that cannot be trained, and what to do instead."""

from __future__ import annotations

import copy
import json
import sys

import peft
import pytest
from lora_cases import (
    adapt,
    base,
    base_folder,
    tokenizer,
    trainer_of,
)
from trainer_cases import EXAMPLES, PAIRS, sft_config

from rlhf_fast import (
    RewardTrainer,
    SFTTrainer,
    api,
)
from rlhf_fast.config import ConfigError
from rlhf_fast.models import load_causal_lm
from rlhf_fast.scalar_models import RewardModel

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures


def test_what_cannot_be_trained_is_refused_with_what_to_do(base, tokenizer, base_folder):
    def refuse(model, message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            trainer_of(model, tokenizer, **options)

    def fresh():
        return copy.deepcopy(base)

    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    refuse(peft.get_peft_model(fresh(), ia3), "of type .*IA3: only LoRA")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refuse(peft.get_peft_model(fresh(), prompts), "of type .*PROMPT_TUNING: only LoRA")
    refuse(adapt(fresh(), use_dora=True), "variant of LoRA")
    two = adapt(fresh())
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])
    refuse(two, "2 adapters are active .*set_adapter")
    merged = adapt(fresh())
    merged.merge_adapter()
    refuse(merged, "merged into the weights.*unmerge_adapter")
    injected = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj"]), fresh()
    )
    refuse(injected, "no PeftModel is around.*get_peft_model")
    half = adapt(fresh().bfloat16(), modules_to_save=["lm_head"], target_modules=["q_proj"])
    refuse(half, "weights are torch.bfloat16.*a frozen base may stay so")
    refuse(adapt(fresh()), "lora asks for an adapter, but the model has one", lora=4)
    refuse(
        fresh(), "LoraConfig.target_modules = .*'query'.*q_proj", lora={"target_modules": ["query"]}
    )
    refuse(fresh(), "peft refuses LoraConfig.*target_modules=\\[\\]", lora={"target_modules": []})
    refuse(fresh(), "unknown key 'rank' in LoraConfig", lora={"rank": 4})
    refuse(fresh(), r"LoraConfig.r = 0", lora=0)
    refuse(fresh(), "lora is True; give a rank", error=TypeError, lora=True)
    lora = peft.LoraConfig(r=2)
    refuse(fresh(), "one of peft goes to peft.get_peft_model", error=TypeError, lora=lora)
    reward = RewardModel(fresh(), tokenizer)
    with pytest.raises(ValueError, match="RewardModel already; leave lora out"):
        RewardTrainer(reward, PAIRS, lora=4)


def test_an_adapter_that_was_loaded_for_use_only_is_refused(base_folder, tmp_path, tokenizer):
    adapt(load_causal_lm(base_folder)).save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(load_causal_lm(base_folder), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is frozen.*load it with is_trainable=True"):
        trainer_of(frozen, tokenizer)


def test_an_adapter_without_its_base_is_refused(base, base_folder, tmp_path, tokenizer):
    adapt(base).save_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not name its base model; put"):
        trainer_of(str(tmp_path / "nowhere"), tokenizer)
    config = tmp_path / "nowhere" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="gone.*cannot be loaded.*is_trainable=True"):
        trainer_of(str(tmp_path / "nowhere"), tokenizer)
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        api.merge(base_folder, tmp_path / "merged")


def test_without_peft_the_remedy_is_named(base, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"LoRA needs peft.*pip install 'rlhf-fast\[lora\]'"):
        SFTTrainer(base, EXAMPLES, tokenizer=tokenizer, config=sft_config(), lora=4)
