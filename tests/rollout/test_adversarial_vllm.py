"""Attacks on `VLLMEngine`: real vLLM against plain forward passes."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from plain_truth import (
    check_distribution,
    furthest,
    mixed_samplings,
    random_prompts,
    sequence_logprobs,
)
from rollout_cases import make_model

from rlhf_fast.rollout import RolloutConfig, Sampling, VLLMEngine, WeightSource
from rlhf_fast.rollout.weights import WeightsError

pytestmark = pytest.mark.vllm
EXACT = 1e-3  # nats, fp32
SAMPLING = Sampling(12, seed=1)


@pytest.fixture(scope="module")
def pristine(tokenizer):
    model = make_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 50, mean_resizing=False)
    return model


@pytest.fixture
def model(pristine):
    return copy.deepcopy(pristine)


@pytest.fixture(scope="module")
def running(pristine, tokenizer):
    """The engine in use; a test that breaks it does not break the next."""
    config = RolloutConfig(engine="vllm", max_sequences=16, max_lora_rank=8)

    def start():
        return VLLMEngine(copy.deepcopy(pristine), tokenizer, config, max_length=400)

    held = [start()]

    def working():
        try:
            held[0].update_weights(WeightSource(pristine, vocabulary=len(tokenizer)), 0)
        except RuntimeError:
            held[0].close()
            held[0] = start()
        return held[0]

    yield working
    held[0].close()


@pytest.fixture
def engine(running):
    return running()


@pytest.fixture
def prompts(tokenizer):
    return random_prompts(tokenizer, (1, 2, 5, 17, 130, 140, 260, 3))


@pytest.fixture
def check(engine, tokenizer, prompts):
    """Twice, so that a prompt is read from the prefix cache too."""

    def distance(model, sampling=SAMPLING):
        rollouts = (engine.generate(prompts, sampling) for _ in range(2))
        found = (furthest(model, tokenizer, prompts, sampling, rollout) for rollout in rollouts)
        assert max(found) < EXACT

    return distance


def send(engine, model, version=1):
    return engine.update_weights(
        WeightSource(model, vocabulary=len(engine.tokenizer)), version=version
    )


def adapted(model, **changes):
    """A LoRA model with its adapter drawn at random."""
    fields = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**fields, **changes})
    return redraw(peft.get_peft_model(copy.deepcopy(model), config).eval())


@torch.no_grad()
def redraw(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.2)
        elif parameter.requires_grad:
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_every_mixture_of_settings(engine, model, tokenizer):
    prompts = random_prompts(tokenizer, [1, 2, 7, 15, 16, 17, 127, 128, 129, 200, 257] * 4)
    samplings = mixed_samplings(tokenizer, len(prompts))
    rollout = engine.generate(prompts, samplings)
    assert furthest(model, tokenizer, prompts, samplings, rollout) < EXACT


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 9e-3, 2.5, 1e3])
def test_temperatures_that_vllm_changes_or_refuses(temperature, engine, model, tokenizer, prompts):
    """vLLM raises low ones to 0.01 without an error: right, or a ValueError of ours."""
    sampling = Sampling(6, temperature=temperature, seed=0)
    try:
        rollout = engine.generate(prompts, sampling)
    except ValueError as error:
        assert "temperature" in str(error)
    else:
        assert furthest(model, tokenizer, prompts, sampling, rollout) < EXACT


def test_joint_distribution_of_two_tokens(engine, model, tokenizer):
    check_distribution(engine, model, [70, 71, 72], len(tokenizer), 2000)


def test_own_seeds_alone_in_a_batch_and_in_another_order(engine, prompts):
    samplings = [Sampling(12, seed=seed) for seed in range(len(prompts))]
    together = engine.generate(prompts, samplings).completion_ids()
    turned = engine.generate(prompts[::-1], samplings[::-1]).completion_ids()
    alone = [
        engine.generate([prompt], [sampling]).completion_ids()[0]
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    assert together == turned[::-1] == alone


def test_more_requests_than_sequences(engine, model, tokenizer):
    prompts = random_prompts(tokenizer, [1 + i % 50 for i in range(300)])
    rollout = engine.generate(prompts, Sampling(4, seed=0))
    assert furthest(model, tokenizer, prompts, Sampling(4), rollout) < EXACT


def test_a_small_change_of_any_parameter_alone_arrives(engine, model, tokenizer, prompts):
    sampling = Sampling(1, temperature=0.5, seed=3, ignore_eos=True)

    def look():
        rollout = engine.generate(prompts, sampling)
        return rollout.completion_ids(), rollout.logprobs[:, 0].double()

    def truth(ids):
        rows = zip(prompts, ids, strict=True)
        return torch.cat([sequence_logprobs(model, *r, sampling, len(tokenizer)) for r in rows])

    for name, parameter in model.named_parameters():
        ids, before = look()
        expected = -truth(ids)
        with torch.no_grad():
            parameter += 1e-3 * torch.randn_like(parameter)
        send(engine, model)
        expected += truth(ids)
        again, after = look()
        same = torch.tensor([one == other for one, other in zip(ids, again, strict=True)])
        moved = float(expected[same].abs().max())
        assert moved > 1e-4, name
        assert float((after - before - expected)[same].abs().max()) < 0.1 * moved, name


def test_replaced_parameters_arrive(engine, model, check):
    source = WeightSource(model, vocabulary=len(engine.tokenizer))
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach() * 1.5)
    model.model.norm.weight.data = model.model.norm.weight.data * 2
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)
    engine.update_weights(source, 1)
    check(model)


def test_modes_around_the_calls(engine, model, tokenizer, prompts):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            send(engine, model.train())
            rollout = engine.generate(prompts, SAMPLING)
    finally:
        torch.set_default_dtype(torch.float32)
    assert furthest(model.eval(), tokenizer, prompts, SAMPLING, rollout) < EXACT


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("then", ["generate", "update"])
def test_an_interrupted_call_leaves_nothing(error, then, engine, model, prompts, check):
    def interrupt(done):
        raise error

    with pytest.raises(error):
        engine.generate(prompts * 4, Sampling(60, seed=1), interrupt)
    if then == "update":
        with torch.no_grad():
            model.model.norm.weight *= 1.5
        send(engine, model)
    check(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_update(error, engine, model, prompts, check):
    class Cut(WeightSource):
        def __iter__(self):
            for place, item in enumerate(super().__iter__()):
                if place == 7:
                    raise error
                yield item

    with pytest.raises(error):
        engine.update_weights(Cut(model, vocabulary=len(engine.tokenizer)), 1)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(prompts, SAMPLING)
    send(engine, model)
    check(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_have_diverged(value, engine, model, prompts):
    """vLLM draws token 0 then, and says nothing."""
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)nan|infinite"):
        send(engine, model)
        engine.generate(prompts, SAMPLING)


def test_adapters_switched_joined_merged_and_off(engine, model, check):
    lora = adapted(model, lora_dropout=0.1)
    lora.add_adapter("two", peft.LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj"]))
    redraw(lora).eval()
    source = WeightSource(lora, vocabulary=len(engine.tokenizer))

    def arrives():
        engine.update_weights(source, 1)
        check(lora)

    for active in ("default", "two", ["default", "two"]):
        lora.base_model.set_adapter(active)
        arrives()
    lora.merge_adapter(["default"])
    arrives()
    lora.unmerge_adapter()
    with lora.disable_adapter():
        arrives()
    arrives()


def test_an_adapter_with_a_bias_of_its_own(engine, model, check):
    """`lora_bias` adds what a checkpoint without biases cannot express."""
    with pytest.raises(WeightsError, match="bias"):
        send(engine, adapted(model, lora_bias=True))
    check(model)


@pytest.mark.parametrize(
    "refused", [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["norm"]}]
)
def test_an_adapter_that_vllm_refuses(refused, engine, model, tmp_path, check):
    adapted(model, **refused).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        engine.update_adapter(str(tmp_path), 2)
        engine.generate([[70, 71]], SAMPLING)
    send(engine, model)
    check(model)


def test_after_close(engine, model, prompts):
    engine.close()
    engine.close()
    for call in (lambda: engine.generate(prompts, SAMPLING), lambda: send(engine, model)):
        with pytest.raises(RuntimeError, match="closed"):
            call()
