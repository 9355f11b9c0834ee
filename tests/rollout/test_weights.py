"""Weights for another engine: complete, rightly named, whatever the model is wrapped in."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_fast.actor_critic import ActorCritic
from rlhf_fast.policy import Policy
from rlhf_fast.rollout.weights import WeightsError, WeightSource

ROWS = 48
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLD_SIZES = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, n_positions=32, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(**OLD_SIZES, ffn_dim=40, word_embed_proj_dim=16),
    "gpt-neox": lambda: GPTNeoXConfig(**OLD_SIZES),
    "phi": lambda: PhiConfig(**SIZES),
}
TOKENS = torch.arange(2, 22).view(2, 10)


def make(architecture="llama"):
    """A model none of whose tensors is its initial value, so that each one matters."""
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def reloaded(source, folder):
    """The model that transformers itself loads from what `source` sends, and nothing else."""
    tensors = {name: tensor.clone() for name, tensor in source}
    assert list(tensors) == list(source.manifest)
    assert {name: tensor.shape for name, tensor in tensors.items()} == source.manifest
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source.config.save_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sends_what_save_pretrained_saves(architecture, tmp_path):
    model = make(architecture)
    source = WeightSource(model)
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as saved:
        assert set(source.manifest) == set(saved.keys())
        for name, tensor in source:
            assert torch.equal(tensor, saved.get_tensor(name)), name
    assert torch.equal(logits(reloaded(source, tmp_path)), logits(model))
    # Again, after an update.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(logits(reloaded(source, tmp_path)), logits(model))


class ValueHeadModel(nn.Module):
    """As TRL's AutoModelForCausalLMWithValueHead names its parts."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(32, 1)


def with_inner(wrap):
    def apply(model):
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return apply


def with_heads(model):
    model.v_head, model.score = nn.Linear(32, 1), nn.Linear(32, 1, bias=False)
    return model


def fully_sharded(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "data-parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled-ddp": lambda model: torch.compile(DistributedDataParallel(model)),
    "compiled-blocks": with_inner(torch.compile),
    "checkpointed-blocks": with_inner(checkpoint_wrapper),
    "compiled-checkpointed-blocks": with_inner(lambda b: torch.compile(checkpoint_wrapper(b))),
    "value-head": ValueHeadModel,
    "value-heads-inside": with_heads,
    "policy": Policy,
    "actor-critic": lambda model: ActorCritic(Policy(model)),
    "actor-and-critic": lambda model: ActorCritic(Policy(model), "model"),
    "ddp-actor-critic": lambda model: DistributedDataParallel(ActorCritic(Policy(model))),
    "fsdp2": fully_sharded,
    "fsdp1-unsharded": lambda model: FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_wrappers_change_nothing(architecture, wrapper, alone, tmp_path):
    model = make(architecture)
    plain, expected = WeightSource(model), logits(model)
    names = list(plain.manifest.items())
    wrapped = WRAPPERS[wrapper](model)
    source = WeightSource(wrapped)
    assert source.model is model
    assert list(source.manifest.items()) == names
    assert source.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(logits(reloaded(source, tmp_path)), expected)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gpt-neox", "phi", "gemma3"])
def test_cut_vocabulary(architecture, tmp_path):
    model = make(architecture)
    source = WeightSource(model, vocabulary=40)
    assert source.config.vocab_size == 40 and model.config.vocab_size == ROWS
    assert torch.equal(logits(reloaded(source, tmp_path)), logits(model)[..., :40])


def test_vocabulary_is_checked():
    model = make()
    assert WeightSource(model, vocabulary=ROWS).manifest == WeightSource(model).manifest
    for wrong in (0, ROWS + 1):
        with pytest.raises(ValueError, match=rf"vocabulary = {wrong}: must be in \[1, {ROWS}\]"):
            WeightSource(model, vocabulary=wrong)
    model.config.pad_token_id = ROWS - 1
    assert WeightSource(model, vocabulary=40).config.pad_token_id is None


def test_draws_nothing_and_changes_nothing():
    model = make("llama-tied")
    before, config = torch.get_rng_state(), model.config.to_dict()
    source = WeightSource(model)
    tensors = dict(source)
    source.config.vocab_size = 3
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.to_dict() == config and source.config.vocab_size == ROWS
    assert not any(tensor.requires_grad for tensor in tensors.values())
    # Receivers keep them until a layer is complete.
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(pointers)) == len(pointers)


def test_persistent_buffers_are_sent_and_others_are_not():
    class WithBuffers(type(make())):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("kept", torch.zeros(3))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

    model = WithBuffers(make().config)
    model.kept.fill_(7)
    source = WeightSource(model)
    assert "scratch" not in source.manifest and source.config.architectures == ["WithBuffers"]
    assert torch.equal(dict(source)["kept"], torch.full((3,), 7.0))


def test_one_tensor_under_two_names_is_sent_twice_if_the_config_unties_it(tmp_path):
    model = make()
    model.lm_head.weight = model.model.embed_tokens.weight
    source = WeightSource(model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= source.manifest.keys()
    assert torch.equal(logits(reloaded(source, tmp_path)), logits(model))


def test_one_tensor_under_two_names_of_the_class_itself_is_sent_twice():
    class Twice(type(make())):
        def __init__(self, config):
            super().__init__(config)
            self.again = self.lm_head

    source = WeightSource(Twice(make().config))
    assert {"lm_head.weight", "again.weight"} <= dict(source).keys()


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


def renamed(model):
    model.model.layers[0].mlp.up = model.model.layers[0].mlp.up_proj
    del model.model.layers[0].mlp.up_proj


def layer_removed(model):
    del model.model.layers[1]


def embeddings_resized(model):
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(ROWS + 1, 32))


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def offloaded(model):
    model.model.layers[0].to("meta")


def partitioned(model):
    model.model.norm.weight.ds_id = 3


def quantised(model):
    weight = model.model.norm.weight
    model.model.norm.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


SURGERY = {
    untied: r"lm_head\.weight and model\.embed_tokens\.weight are one tensor, but they are two",
    renamed: r"1 missing \(model\.layers\.0\.mlp\.up_proj\.weight\); 1 unexpected \(.*\.up\.weight",
    layer_removed: r"9 missing \(model\.layers\.1\.self_attn\.q_proj\.weight, .*, \.\.\.\); do not",
    embeddings_resized: r"1 wrongly shaped \(model\.embed_tokens\.weight \[49, 32\] instead of",
    parametrised: r"1 missing \(.*up_proj\.weight\); 2 unexpected \(.*parametrizations",
    offloaded: r"layers\.0\.\S+ is on the meta device, .* without offloading",
    partitioned: r"norm\.weight is partitioned by DeepSpeed ZeRO-3, .*; use ZeRO-2, or FSDP2",
    quantised: r"model\.norm\.weight is quantised \(torch\.int8\), .* without quantisation",
}


@pytest.mark.parametrize("change", SURGERY, ids=lambda change: change.__name__)
def test_surgery_is_refused_before_anything_is_sent(change):
    model = make("llama-tied")
    source = WeightSource(model)
    change(model)
    with pytest.raises(WeightsError, match=SURGERY[change]):
        iter(source)
    with pytest.raises(WeightsError, match=SURGERY[change]):
        WeightSource(model)


def test_change_while_sending_is_refused():
    for rows in (3, 50):
        model = make()
        stream = iter(WeightSource(model))
        next(stream)
        model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(rows, 32)
        with pytest.raises(WeightsError, match=rf"up_proj\.weight became \[{rows}, 32\] while"):
            list(stream)


def test_no_or_several_language_models():
    model = make()
    for wrong, found in ((nn.Linear(2, 2), 0), (model.base_model, 0)):
        with pytest.raises(WeightsError, match=f"holds {found} causal language models"):
            WeightSource(wrong)
    pair = nn.ModuleList([model, copy.deepcopy(model)])
    with pytest.raises(WeightsError, match=r"holds 2 .* \(LlamaForCausalLM, LlamaForCausalLM\)"):
        WeightSource(pair)
    assert WeightSource(nn.ModuleList([model, model])).model is model
    small = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(WeightsError, match="T5ForConditionalGeneration is an encoder-decoder"):
        WeightSource(T5ForConditionalGeneration(small))


def test_weights_that_a_checkpoint_holds_otherwise_are_refused():
    mixtral = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=2))
    with pytest.raises(WeightsError, match="type 'mixtral' store weights otherwise"):
        WeightSource(mixtral)


def test_flat_parameters_of_fsdp1_are_refused(alone):
    flat = FullyShardedDataParallel(make(), device_id=torch.device("cpu"))
    with pytest.raises(WeightsError, match=r"1 unexpected \(_flat_param\); FSDP1 .* use FSDP2"):
        WeightSource(flat)
