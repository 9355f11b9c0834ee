"""What goes silently wrong between a trainer and vLLM, with vLLM itself."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from rollout_cases import PROMPTS, disturb, make_model, mismatch, start
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_fast.backends import BackendUnavailable
from rlhf_fast.rollout import (
    HFEngine,
    RolloutConfig,
    RolloutMismatch,
    Sampling,
    VLLMEngine,
    WeightsError,
    WeightSource,
    check_probe,
    make_engine,
)

pytestmark = pytest.mark.vllm
LONG = [[60 + i] * 300 for i in range(4)]  # more than two blocks of the KV cache each


def llama(tokenizer, tied):
    model = make_model(tokenizer)
    if tied:
        return model
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    return type(model)(config).eval()


def small(tokenizer):
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    return {"vocab_size": len(tokenizer), **ends}


def qwen2(tokenizer, tied):
    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=400, initializer_range=0.2,
        tie_word_embeddings=tied, **small(tokenizer),
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def gpt2(tokenizer, tied):
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=2, n_positions=400, initializer_range=0.2,
        tie_word_embeddings=tied, **small(tokenizer),
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def gemma2(tokenizer, tied):
    config = Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=400, sliding_window=128,
        initializer_range=0.2, tie_word_embeddings=tied, **small(tokenizer),
        attn_implementation="eager",  # transformers' default leaves the soft cap of attention out
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.fixture
def engine(tokenizer):
    """A fresh engine, whose weights a test may ruin."""
    engine = start("vllm", make_model(tokenizer), tokenizer)
    yield engine
    engine.close()


def source_of(engine):
    return WeightSource(engine.model, vocabulary=len(engine.tokenizer))


MODELS = [
    (llama, True), (llama, False), (qwen2, True), (qwen2, False), (gpt2, True), (gpt2, False),
    (gemma2, True),
]  # fmt: skip


@pytest.mark.parametrize(("make", "tied"), MODELS)
def test_fp32_logprobs_agree_before_and_after_three_updates(make, tied, tokenizer):
    model = make(tokenizer, tied)
    engine = start("vllm", model, tokenizer)
    source = source_of(engine)
    try:
        assert mismatch(engine).max_abs < 1e-3
        for version in (1, 2, 3):
            disturb(model, 0.05, seed=version)
            assert mismatch(engine).max_abs > 0.05
            report = engine.update_weights(source, version)
            assert (report.version, report.tensors) == (version, len(source.manifest))
            assert report.bytes == sum(4 * shape.numel() for shape in source.manifest.values())
            assert mismatch(engine).max_abs < 1e-3
            assert mismatch(engine, LONG).max_abs < 1e-3
    finally:
        engine.close()


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_logprobs_agree_within_rounding_before_and_after_updates(tied, tokenizer):
    model = qwen2(tokenizer, tied)
    engine = start("vllm", model, tokenizer, dtype="bfloat16")
    try:
        assert engine.dtype == torch.bfloat16
        assert mismatch(engine).mean_abs < 0.05
        for version in (1, 2, 3):
            disturb(model, 0.05, seed=version)
            assert mismatch(engine).mean_abs > 0.2
            engine.update_weights(source_of(engine), version)
            found = mismatch(engine)
            assert found.mean_abs < 0.05 and found.max_abs < 0.5
    finally:
        engine.close()


def test_a_stale_prefix_cache_would_be_noticed(engine, monkeypatch):
    """Without the reset the prompt's keys and values come from old weights, silently."""
    assert mismatch(engine, LONG).max_abs < 1e-3
    disturb(engine.model)
    monkeypatch.setattr(engine._vllm, "forget", lambda: None)
    engine.update_weights(source_of(engine), 1)
    found = mismatch(engine, LONG)
    assert found.mean_abs > 0.1
    with pytest.raises(RolloutMismatch, match="after update 1 .* nats on average"):
        check_probe(found, "exact", None, version=1)
    monkeypatch.undo()
    engine.update_weights(source_of(engine), 2)
    check_probe(mismatch(engine, LONG), "exact", None, version=2)


def test_a_prefix_cache_that_vllm_keeps_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(engine._vllm.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="could not reset its prefix cache"):
        engine.update_weights(source_of(engine), 1)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(PROMPTS, Sampling(2))
    monkeypatch.undo()
    engine.update_weights(source_of(engine), 2)
    assert mismatch(engine).max_abs < 1e-3


def test_each_update_is_one_reload(engine, monkeypatch):
    """Two, cut between q, k and v, would leave a fused layer half old: garbage, and no error."""
    worker = engine._vllm.llm.llm_engine.model_executor.driver_worker.worker
    reloads, reload = [], type(worker).reload_weights

    def counted(self, *args, **options):
        reloads.append(options)
        return reload(self, *args, **options)

    monkeypatch.setattr(type(worker), "reload_weights", counted)
    engine.update_weights(source_of(engine), 1)
    assert len(reloads) == 1


class _Broken(WeightSource):
    """Fails in the midst of a fused layer."""

    def __iter__(self):
        for name, tensor in super().__iter__():
            if "1.self_attn.k_proj" in name:
                raise OSError("the other rank went away")
            yield name, tensor


def test_an_update_that_fails_midway_stops_the_engine_until_a_whole_one(engine):
    disturb(engine.model)
    with pytest.raises(OSError, match="the other rank"):
        engine.update_weights(_Broken(engine.model), 1)
    assert engine.weight_version == 0
    with pytest.raises(RuntimeError, match="no complete weights: the last update failed"):
        engine.generate(PROMPTS, Sampling(2))
    engine.update_weights(source_of(engine), 2)
    assert mismatch(engine).max_abs < 1e-3


def test_weights_reach_a_worker_in_another_process_by_file(engine):
    """That process has no part in our memory, and tensors as arguments do not arrive."""
    engine._vllm.in_process = False
    disturb(engine.model)
    engine.update_weights(source_of(engine), 1)
    assert mismatch(engine).max_abs < 1e-3


def test_the_worker_replaces_a_tied_heads_packed_copy(tokenizer, monkeypatch):
    """The negative control: without that, a CPU's head keeps the old weights."""
    engine = start("vllm", qwen2(tokenizer, True), tokenizer)
    try:
        model = engine._vllm.llm.llm_engine.model_executor.driver_worker.model_runner.model
        packed = [module for module in model.modules() if hasattr(module, "cpu_linear")]
        heads = [module for module in packed if hasattr(module, "tie_weights")]
        assert heads
        for head in heads:
            monkeypatch.setattr(
                type(head.quant_method), "process_weights_after_loading", lambda *_: None
            )
        disturb(engine.model)
        engine.update_weights(source_of(engine), 1)
        assert mismatch(engine).mean_abs > 0.1
    finally:
        engine.close()


def test_sleep_brackets_the_update(engine, monkeypatch):
    """vLLM sleeps on a GPU only; the order of the calls is the same everywhere."""
    calls = []
    for name in ("sleep", "wake", "load", "forget"):
        call = getattr(engine._vllm, name)

        def recorded(*args, name=name, call=call):
            calls.append((name, *(a for a in args if isinstance(a, str | int))))
            return call(*args)

        monkeypatch.setattr(engine._vllm, name, recorded)
    engine._sleep_level = 2
    engine.release_memory()
    with pytest.raises(RuntimeError, match="sleep_level 2 dropped them"):
        engine.generate(PROMPTS, Sampling(2))
    engine.update_weights(source_of(engine), 1)
    order = [("sleep", 2), ("wake", "weights"), ("load",), ("forget",), ("wake", "kv_cache")]
    assert calls == order
    engine.generate(PROMPTS, Sampling(2))
    assert calls == order
    engine._sleep_level = 1
    engine.release_memory()
    engine.generate(PROMPTS, Sampling(2))
    assert calls[5:] == [("sleep", 1), ("wake", "weights"), ("wake", "kv_cache"), ("forget",)]


def test_what_vllm_cannot_run_is_said_at_the_start(tokenizer):
    narrow = make_model(tokenizer, hidden_size=48, heads=4)  # heads of 12
    with pytest.raises(BackendUnavailable, match="cannot run this LlamaForCausalLM.*head_dim=12"):
        start("vllm", narrow, tokenizer)
    assert isinstance(make_engine(narrow, tokenizer), HFEngine)


def test_classes_that_vllm_runs_by_patching_transformers_are_refused(tokenizer):
    config = PhiConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        **small(tokenizer),
    )  # fmt: skip
    model = PhiForCausalLM(config)
    with pytest.raises(BackendUnavailable, match="has no PhiForCausalLM"):
        start("vllm", model, tokenizer)
    assert isinstance(make_engine(model, tokenizer), HFEngine)


def test_unknown_options_are_refused_by_name(tokenizer):
    config = RolloutConfig(engine="vllm", options={"block_sizes": 3})
    with pytest.raises(ValueError, match="knows no argument 'block_sizes'"):
        VLLMEngine(make_model(tokenizer), tokenizer, config)


def test_auto_takes_vllm_where_it_is(tokenizer):
    engine = make_engine(make_model(tokenizer), tokenizer)
    assert isinstance(engine, VLLMEngine)
    engine.close()


@pytest.fixture
def unpacked(monkeypatch):
    """vLLM keeps plain weights on the CPU, too, as it does on a GPU."""
    import vllm._custom_ops

    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)


@pytest.mark.parametrize(("make", "tied"), [(llama, True), (qwen2, False), (gpt2, True)])
def test_a_small_update_that_gets_lost_is_noticed_in_half_precision(
    make, tied, tokenizer, unpacked, monkeypatch
):
    """Less than rounding does to a log-prob: a probe could not see it."""
    model = make(tokenizer, tied)
    model.resize_token_embeddings(len(tokenizer) + 7)  # vLLM pads the vocabulary besides
    engine = start("vllm", model, tokenizer, dtype="bfloat16")
    try:
        for version in (1, 2):
            disturb(model, 1e-3, seed=version)
            engine.update_weights(engine.source, version)
        monkeypatch.setattr(engine._vllm, "load", lambda weights: list(weights))
        disturb(model, 1e-5, seed=3)
        with pytest.raises(RolloutMismatch, match="sum over vLLM's weights .* did not arrive"):
            engine.update_weights(engine.source, 3)
        with pytest.raises(RuntimeError, match="no complete weights"):
            engine.generate(PROMPTS, Sampling(2))
    finally:
        engine.close()


def test_weights_that_vllm_did_not_take_are_noticed(engine, monkeypatch):
    load = engine._vllm.load
    monkeypatch.setattr(engine._vllm, "load", lambda weights: load(itertools.islice(weights, 9)))
    with pytest.raises(RolloutMismatch, match="took 9 of 20 tensors"):
        engine.update_weights(engine.source, 1)


class _Mangled(WeightSource):
    """Sends what `mangle` makes of the weights."""

    mangle = None

    def __iter__(self):
        return iter(self.mangle(list(super().__iter__())))


MANGLED = {
    "q of a fused layer": (lambda items: [x for x in items if "q_proj" in x[0]], "took 2 of 20"),
    "without a layer": (lambda items: [x for x in items if "s.1." not in x[0]], "took 11 of 20"),
    "one in another's place": (
        lambda items: [items[0] if "norm" in x[0] else x for x in items], r"took 15 .*norm\.weight",
    ),
    "one twice": (lambda items: [*items, items[0]], r"took 20 of 20 tensors, and 1 more"),
}  # fmt: skip


@pytest.mark.parametrize("how", MANGLED)
def test_a_source_that_does_not_send_each_tensor_once_is_noticed(how, engine):
    """vLLM itself says nothing, and goes on with garbage, or with a mixture of old and new."""
    source, (mangle, message) = (
        _Mangled(engine.model, vocabulary=len(engine.tokenizer)),
        MANGLED[how],
    )
    source.mangle = mangle
    with pytest.raises(RolloutMismatch, match=message):
        engine.update_weights(source, 1)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(PROMPTS, Sampling(2))
    engine.update_weights(source_of(engine), 2)
    assert mismatch(engine).max_abs < 1e-3


def test_what_the_source_finds_wrong_leaves_the_engine_as_it_was(tokenizer):
    model = qwen2(tokenizer, True)
    engine = start("vllm", model, tokenizer)
    try:
        before = engine.generate(PROMPTS, Sampling(4, seed=0)).tokens
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        with pytest.raises(WeightsError, match="they are two tensors"):
            engine.update_weights(engine.source, 1)
        assert torch.equal(engine.generate(PROMPTS, Sampling(4, seed=0)).tokens, before)
    finally:
        engine.close()


def test_temperatures_that_vllm_does_not_have_are_refused(engine):
    with pytest.raises(ValueError, match="temperature = 0.005: vLLM would take 0.01"):
        engine.generate(PROMPTS, Sampling(2, temperature=0.005))
