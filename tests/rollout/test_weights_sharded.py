"""Weights that two processes share are gathered whole, on both."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.rollout.weights import WeightsError, WeightSource

TOKENS = torch.arange(20).view(2, 10)


def make(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=21,  # no multiple of 2
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def shard(model, mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def same(source, expected):
    tensors = dict(source)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert type(tensor) is torch.Tensor and tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def fsdp2(mesh, tied):
    expected = dict(WeightSource(make(tied)))
    model = shard(make(tied), mesh)
    source = WeightSource(model)
    assert source.config.architectures == ["LlamaForCausalLM"]
    same(source, expected)
    # Without a backward pass this leaves bf16 copies in place of the parameters.
    with torch.no_grad():
        model(TOKENS)
    assert not isinstance(model.model.norm.weight, DTensor)
    same(source, expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    updated = {k: v.full_tensor() for k, v in model.state_dict().items() if k in expected}
    assert not any(torch.equal(updated[k], expected[k]) for k in expected)
    same(source, updated)
    cut = dict(WeightSource(model, vocabulary=19))
    assert torch.equal(cut["model.embed_tokens.weight"], updated["model.embed_tokens.weight"][:19])


def tensor_parallel(mesh, tied):
    expected = dict(WeightSource(make(tied)))
    model = make(tied)
    for name, parameter in list(model.named_parameters()):
        kind = Shard(1) if "o_proj" in name else Replicate() if "norm" in name else Shard(0)
        parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        sharded = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [kind]))
        setattr(parent, leaf, sharded)
    if tied:
        with pytest.raises(WeightsError, match="they are two tensors"):
            WeightSource(model)
        model.lm_head.weight = model.model.embed_tokens.weight
    same(WeightSource(model), expected)


def lora(mesh, tied):
    def adapted():
        model = get_peft_model(make(tied), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        return model

    expected = dict(WeightSource(adapted()))
    model = adapted()
    shard(model.base_model.model, mesh)
    for name, tensor in WeightSource(model):
        # The sum over the rank of the adapter is taken in two parts.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-5)


def fsdp1(mesh, tied):
    if mesh.size() == 1:
        return  # nothing is sharded then
    for original in (False, True):
        model = FullyShardedDataParallel(
            make(tied), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(WeightsError, match=r"FSDP1 flattens .* use FSDP2"):
            WeightSource(model)


CASES = (fsdp2, tensor_parallel, lora, fsdp1)


def check(rank, world, port, tied):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for case in CASES:
        case(mesh, tied)
    dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_shards_are_gathered(world, tied):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(check, (world, port, tied), nprocs=world)
