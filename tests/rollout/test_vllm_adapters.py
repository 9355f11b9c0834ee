"""LoRA with vLLM: merged on the way, or as adapters of its own."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from rollout_cases import PROMPTS, forward_logprobs, make_model, start

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.rollout import Sampling, WeightSource

pytestmark = pytest.mark.vllm
LONG = [[60 + i] * 300 for i in range(3)]


def lora(tokenizer, rank=4):
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
    )
    return peft.get_peft_model(make_model(tokenizer), config).eval()


def retrain(model, seed):
    """Another adapter, large enough to be noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def mismatch(engine, model, prompts=PROMPTS):
    rollout = engine.generate(prompts, Sampling(8, seed=0, ignore_eos=True))
    return float((rollout.logprobs - forward_logprobs(model, rollout)).abs().max()), rollout


def test_adapters_are_merged_on_the_way(tokenizer):
    model = lora(tokenizer)
    engine = start("vllm", model, tokenizer)
    try:
        source = WeightSource(model)
        for version in (1, 2, 3):
            retrain(model, version)
            assert mismatch(engine, model)[0] > 0.05
            engine.update_weights(source, version)
            assert mismatch(engine, model)[0] < 1e-3
    finally:
        engine.close()


def test_each_adapter_sent_is_the_one_sampled_with(tokenizer, tmp_path):
    """Version after version in one folder, under one name: vLLM by itself would keep the first."""
    model = lora(tokenizer)
    with model.disable_adapter():
        engine = start("vllm", model, tokenizer, max_lora_rank=8)
    try:
        with model.disable_adapter():
            assert mismatch(engine, model, LONG)[0] < 1e-3
        for version in (1, 2, 3):
            retrain(model, version)
            model.save_pretrained(tmp_path)
            report = engine.update_adapter(str(tmp_path), version)
            assert (report.version, report.tensors) == (version, 12)
            # The folder belongs to the trainer again: what was sent was read.
            shutil.rmtree(tmp_path)
            found, rollout = mismatch(engine, model, LONG)
            assert found < 1e-3
            assert rollout.weight_version.tolist() == [version] * 3
        with model.disable_adapter():  # all weights again: no adapter any more
            engine.update_weights(WeightSource(model), 4)
            assert mismatch(engine, model, LONG)[0] < 1e-3
    finally:
        engine.close()


def test_adapters_that_cannot_be_served_are_refused(tokenizer, tmp_path):
    model = lora(tokenizer, rank=16)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        engine = start("vllm", model, tokenizer, max_lora_rank=8)
    try:
        with pytest.raises(ValueError, match="has rank 16, but max_lora_rank = 8"):
            engine.update_adapter(str(tmp_path), 1)
        with pytest.raises(FileNotFoundError):
            engine.update_adapter(str(tmp_path / "nothing"), 1)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert settings["r"] == 16 and engine.weight_version == 0
    finally:
        engine.close()
    plain = start("vllm", make_model(tokenizer), tokenizer)
    try:
        with pytest.raises(BackendUnavailable, match="make it with max_lora_rank"):
            plain.update_adapter(str(tmp_path), 1)
    finally:
        plain.close()


def test_an_adapter_is_loaded_where_vllm_is_awake(tokenizer, tmp_path, monkeypatch):
    """vLLM sleeps on a GPU only, where weights asleep are no memory to write to."""
    model = lora(tokenizer)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        engine = start("vllm", model, tokenizer, max_lora_rank=8)
    try:
        calls = []
        for name in ("sleep", "wake", "load_adapter"):
            call = getattr(engine._vllm, name)

            def recorded(*args, name=name, call=call):
                calls.append((name, args[0]))
                return call(*args)

            monkeypatch.setattr(engine._vllm, name, recorded)
        engine._sleep_level = 1
        engine.release_memory()
        engine.update_adapter(str(tmp_path), 1)
        awake = [("wake", "weights"), ("load_adapter", 1), ("wake", "kv_cache")]
        assert calls == [("sleep", 1), *awake]
        assert mismatch(engine, model)[0] < 1e-3
        engine._sleep_level = 2
        engine.release_memory()
        with pytest.raises(RuntimeError, match="sleep_level 2 dropped them; call update_weights"):
            engine.update_adapter(str(tmp_path), 2)
        assert engine.weight_version == 1
    finally:
        engine.close()
