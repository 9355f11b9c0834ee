"""LoRA adapters in what is sent, held against peft's own merge of a copy."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from rlhf_fast.rollout.weights import WeightsError, WeightSource

TOKENS = torch.arange(2, 22).view(2, 10)
ATTENTION = ["q_proj", "v_proj"]


def make(kind="qwen2", tied=False):
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=48,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=32,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = GPT2LMHeadModel(config)
    else:
        config = Qwen2Config(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        model = Qwen2ForCausalLM(config)
    return trained(model)


@torch.no_grad()
def trained(model):
    """All that can be trained moved away from its initial value."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.2)
    return model.eval()


def adapt(model, **options):
    return trained(get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **options)))


def two_adapters(model):
    model = adapt(model, target_modules=ATTENTION)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return trained(model)


def one_of_two(model):
    model = two_adapters(model)
    model.set_adapter("other")
    return model


ADAPTED = {
    "attention": lambda: adapt(make(), target_modules=ATTENTION),
    "all-linear": lambda: adapt(make(), target_modules="all-linear"),
    "head": lambda: adapt(make(), target_modules=["q_proj", "lm_head"]),
    "rslora": lambda: adapt(make(), target_modules=ATTENTION, use_rslora=True),
    "patterns": lambda: adapt(
        make(), target_modules=ATTENTION, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 9}
    ),
    "biases": lambda: adapt(make(), target_modules=ATTENTION, bias="all"),
    "biases-of-lora": lambda: adapt(make(), target_modules=ATTENTION, bias="lora_only"),
    "lora-bias": lambda: adapt(make(), target_modules=ATTENTION, lora_bias=True),
    "conv1d": lambda: adapt(make("gpt2"), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "embedding": lambda: adapt(make(), target_modules=["embed_tokens", "q_proj"]),
    "module-to-save": lambda: adapt(
        make(), target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"]
    ),
    "two-adapters": lambda: two_adapters(make()),
    "one-of-two": lambda: one_of_two(make()),
    "tied": lambda: adapt(make(tied=True), target_modules="all-linear"),
}


def same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", ADAPTED)
def test_sends_what_merging_gives(case):
    model = ADAPTED[case]()
    base = dict(WeightSource(model.base_model.model.__class__(model.base_model.model.config)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = WeightSource(model)
    sent = dict(source)
    assert sent.keys() == base.keys()
    same(sent, dict(WeightSource(copy.deepcopy(model).merge_and_unload())))
    same(model.state_dict(), before)
    with torch.no_grad():
        fresh = type(source.model)(source.config).eval()
        fresh.load_state_dict(sent, strict=False)
        fresh.tie_weights()
        torch.testing.assert_close(fresh(TOKENS).logits, model(TOKENS).logits, atol=1e-4, rtol=1e-4)
        # Adapters that are off, and then again when they are on.
        with model.disable_adapter():
            fresh.load_state_dict(dict(source), strict=False)
            fresh.tie_weights()
            assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
    same(dict(source), sent)


@pytest.mark.parametrize("case", ["attention", "lora-bias", "two-adapters", "embedding"])
def test_adapters_that_are_merged_already(case):
    model = ADAPTED[case]()
    source = WeightSource(model)
    sent = {name: tensor.clone() for name, tensor in source}
    with torch.no_grad(), model.disable_adapter():
        base = {name: tensor.clone() for name, tensor in source}
    model.merge_adapter()
    same(dict(source), sent)
    with model.disable_adapter():
        for name, tensor in source:
            torch.testing.assert_close(tensor, base[name], atol=1e-6, rtol=1e-5)
    model.unmerge_adapter()
    for name, tensor in source:
        torch.testing.assert_close(tensor, sent[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_sum_is_fp32_where_the_model_is_not(adapters):
    model = make().bfloat16()
    config = LoraConfig(r=4, target_modules=ATTENTION)
    upcast = adapters == torch.float32
    model = trained(get_peft_model(model, config, autocast_adapter_dtype=upcast))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_B["default"].weight.dtype == adapters
    name = "model.layers.0.self_attn.q_proj.weight"
    sent = dict(WeightSource(model))
    stored, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    assert sent[name].dtype == torch.float32
    assert torch.equal(sent[name], stored.float() + delta.float())
    assert sent["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_injected_adapters():
    plain = make()
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=ATTENTION), copy.deepcopy(plain))
    same(dict(WeightSource(model)), dict(WeightSource(plain)))  # B = 0
    trained(model)
    changed = dict(WeightSource(model))
    for name, tensor in WeightSource(plain):
        adapted = any(part in name for part in ATTENTION) and name.endswith("weight")
        assert torch.equal(changed[name], tensor) != adapted, name


def test_cut_vocabulary_with_adapters():
    model = adapt(make(), target_modules=["embed_tokens", "lm_head"])
    whole = dict(WeightSource(model))
    for name, tensor in WeightSource(model, vocabulary=40):
        rows = 40 if name in ("model.embed_tokens.weight", "lm_head.weight") else None
        assert torch.equal(tensor, whole[name][:rows]), name


def prompt_tuned():
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    return get_peft_model(make(), config)


REFUSED = {
    "dora": (
        lambda: adapt(make(), target_modules=ATTENTION, use_dora=True),
        r"variant of LoRA \(DoRA\)",
    ),
    "alora": (
        lambda: adapt(
            make(), target_modules=ATTENTION, task_type="CAUSAL_LM", alora_invocation_tokens=[3]
        ),
        r"variant of LoRA \(ALoraLinearVariant\)",
    ),
    "ia3": (
        lambda: get_peft_model(make(), IA3Config(target_modules=ATTENTION, feedforward_modules=[])),
        "of type .*IA3: only LoRA",
    ),
    "ia3-injected": (
        lambda: inject_adapter_in_model(
            IA3Config(target_modules=ATTENTION, feedforward_modules=[]), make()
        ),
        r"peft\.tuners\.ia3\.layer\.Linear is not supported",
    ),
    "prompts": (prompt_tuned, "of type .*PROMPT_TUNING: only LoRA"),
    "tokens": (
        lambda: adapt(make(), target_modules=ATTENTION, trainable_token_indices=[3]),
        "TrainableTokensWrapper is not supported",
    ),
    "parameters": (
        lambda: adapt(make(), target_modules=[], target_parameters=["q_proj.weight"]),
        "ParamWrapper is not supported",
    ),
    "tied-head": (
        lambda: adapt(make(tied=True), target_modules=["lm_head"]),
        "are one tensor, but an adapter changes one of them",
    ),
    "tied-embedding": (
        lambda: adapt(make("gpt2", tied=True), target_modules=["wte"]),
        "are one tensor, but an adapter changes one of them",
    ),
    "tied-module-to-save": (
        lambda: adapt(make(tied=True), target_modules=ATTENTION, modules_to_save=["lm_head"]),
        "are one tensor, but they are two tensors",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_in_is_refused(case):
    build, message = REFUSED[case]
    with pytest.raises(WeightsError, match=message):
        WeightSource(build())


def test_peft_is_not_imported():
    code = "import sys, rlhf_fast.rollout.weights; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
