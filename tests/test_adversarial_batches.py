"""Rollouts as no engine would hand them in, against plain forward passes of each row alone."""

from __future__ import annotations

import copy
import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.actor_critic import ActorCritic
from rlhf_fast.data import Rollout
from rlhf_fast.ops import kl_estimate
from rlhf_fast.policy import Policy
from rlhf_fast.scalar_models import ScalarHead
from rlhf_fast.scratch import train_tokenizer
from rlhf_fast.trainers import update

TOKENIZER = train_tokenizer(["the cat sat on a mat and the dog ran by the sea"], 280)
V = len(TOKENIZER)
# fmt: off
SHARED = {
    "vocab_size": V, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CAPPED = {"sliding_window": 6, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}
KINDS = {
    "llama": {},
    "gpt2": GPT,
    "gemma2": {"head_dim": 8, **CAPPED},
    "bloom": {"n_layer": 2, "n_head": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
}
# fmt: on


def make(kind):
    torch.manual_seed(0)
    fields = {"model_type": kind, **SHARED, **KINDS[kind]}
    eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    config = AutoConfig.for_model(**fields)
    return AutoModelForCausalLM.from_config(config, **eager).float().eval()


def ragged(rows, *, seed=0, holes=True, extra=2, empty=(), group=1, P=7, T=9):
    """Rows of all lengths, `extra` columns that none uses, tokens of a tool, rows without any."""
    draw = torch.Generator().manual_seed(seed)
    start = P + extra
    tokens = torch.randint(2, V, (rows, P + T + 2 * extra), generator=draw)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    sampled = mask[:, start:].clone()
    for row in range(rows):
        prompt, new = (int(torch.randint(1, n + 1, (), generator=draw)) for n in (P, T))
        prompt, new = {0: (1, 1), 1: (P, T)}.get(row, (prompt, new))
        mask[row, start - prompt : start + new] = True
        sampled[row, :new] = True
        if holes and new > 2:
            sampled[row, :new] &= torch.rand(new, generator=draw) > 0.4
    sampled[list(empty)] = False
    first = torch.arange(rows) // group * group
    tokens[:, :start], mask[:, :start] = tokens[first, :start], mask[first, :start]
    return Rollout(tokens, mask, sampled, torch.rand(rows, generator=draw) < 0.5)


def alone(model, rollout, temperature=1.0, trunk=None, head=None):
    """Log-probs, entropies, values `[B, T]` in fp64, of each row read alone without padding."""
    found = []
    for tokens, mask, sampled in zip(
        rollout.tokens, rollout.mask, rollout.completion_mask, strict=True
    ):
        row = torch.zeros(3, len(sampled), dtype=torch.float64)
        columns = mask.nonzero()[:, 0]
        at = columns - rollout.prompt_length
        at = torch.where((at >= 0) & sampled[at.clamp(min=0)] & (columns > columns.min()), at, -1)
        if len(at) and (at >= 0).any():
            ids = tokens[columns][None].long()
            after, where = (at >= 0).nonzero()[:, 0], at[at >= 0]
            logits = model(input_ids=ids, use_cache=False).logits[0, after - 1].double()
            logs = (logits / temperature).log_softmax(-1)
            what = [logs.gather(1, ids[0, after, None])[:, 0], -(logs.exp() * logs).sum(-1)]
            if head is not None:
                hidden = trunk(input_ids=ids, use_cache=False)[0][0, after - 1].double()
                what.append(hidden @ head.weight.double() + head.bias.double())
            for i, x in enumerate(what):
                row = row.index_put((torch.tensor(i), where), x)
        found.append(row)
    return torch.stack(found, 1)


def evaluate(model, rollout, critic=None):
    """What `ActorCritic` says, and the truth, both `[3, B, T]`."""
    actor = ActorCritic(Policy(model), critic).eval()
    head = next((m for m in actor.modules() if isinstance(m, ScalarHead)), None)
    with torch.no_grad():
        for weight in () if head is None else head.parameters():
            weight.normal_()
        found = actor(rollout, 0.7)
        values = torch.zeros_like(found.logprobs) if head is None else found.values
        expected = alone(model, rollout, 0.7, model.base_model, head)
        return torch.stack([found.logprobs, found.entropy, values]).double(), expected


def trainer_of(model, rows, critic="auto", lora=None, **changes):
    fields = {"rollout_batch_size": rows, "batch_size": rows, "epochs": 1, "max_length": 64}
    fields |= {"max_new_tokens": 16, "lr_schedule": "constant"}
    config = PPOConfig(**fields | changes)
    return PPOTrainer(model, tokenizer=TOKENIZER, config=config, critic=critic, lora=lora)


def scores_of(rows):
    return torch.randn(rows, generator=torch.Generator().manual_seed(5))


def metrics_of(rollout, model=None, **changes):
    rows = len(rollout)
    found = trainer_of(model or make("llama"), rows, **changes).step(rollout, scores_of(rows))
    return {name: x for name, x in found.items() if not name.startswith("seconds")}


@pytest.mark.parametrize("critic", ["head", "model"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom", "rwkv"])
def test_every_row_is_read_as_if_it_were_alone(kind, critic):
    model, rollout = make(kind), ragged(9, seed=3, empty=(2,))
    everything_empty = replace(rollout, completion_mask=torch.zeros_like(rollout.completion_mask))
    no_prompts = Rollout(
        rollout.tokens[:, 9:], rollout.mask[:, 9:], rollout.completion_mask, rollout.finished
    )
    for case in (rollout, everything_empty, no_prompts, rollout.select(torch.tensor([0]))):
        found, expected = evaluate(model, case, critic)
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


GROUPS = {"samples_per_prompt": 3}
EXACT = {"kl_loss_coef": 0.1, "kl_loss_kind": "full", "entropy_coef": 0.1}
STEPS = {
    "ppo": {},
    "one row a piece": {"micro_batch_size": 1},
    "minibatches": {"batch_size": 6, "micro_batch_size": 2, "epochs": 2},
    "critic": {"critic": "model", "mixed_precision": "bf16"},
    "exact KL": EXACT,
    "checkpointing": {"checkpointing": True, "mixed_precision": "bf16"},
    "lora": {"lora": {"r": 4, "dropout": 0.5}, "critic": "model", "batch_size": 6},
    "vapo": {"loss": "vapo"},
    "reinforce": {"loss": "reinforce", "mixed_precision": "bf16"},
    **{n: {"loss": n, **GROUPS} for n in ("rloo", "grpo", "dr_grpo", "gspo", "cispo")},
}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("case", STEPS)
def test_ratios_of_the_first_step_are_one_to_the_bit(case, kind, monkeypatch):
    seen, loss = [], update.policy_loss

    def spy(new, old, *others, **options):
        seen.append(torch.equal(new, old))
        return loss(new, old, *others, **options)

    monkeypatch.setattr(update, "policy_loss", spy)
    changes = {"micro_batch_size": 3, "temperature": 0.8, "learning_rate": 1e-3, **STEPS[case]}
    model = make(kind)
    if changes.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rollout = ragged(12, seed=11, empty=(5,), group=3)
    found = metrics_of(rollout, model, **changes)
    size = changes.get("batch_size", 12)
    assert all(seen[: size // changes["micro_batch_size"]])
    if size == 12:
        assert found["ratio_max"] == 1.0 and found["approx_kl_k3"] == found["approx_kl_k1"] == 0
        assert found["clip_fraction_low"] == found["clip_fraction_high"] == 0
    else:
        assert not all(seen)  # the policy has moved: the spy can tell


@pytest.mark.parametrize("micro", [1, 4, 12])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "rwkv"])
def test_a_step_has_the_gradient_of_rows_read_alone(kind, micro):
    rollout, scores = ragged(12, seed=21, empty=(4,), group=3), scores_of(12)
    model = make(kind)
    truth, mask = copy.deepcopy(model).double(), rollout.completion_mask
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    new = alone(truth, rollout, 0.8)[0]
    groups = scores.double().view(-1, 3)
    gains = (groups - groups.mean(1, keepdim=True)).flatten()
    # Dr. GRPO divides by a constant. With so large an epsilon AdamW is plain gradient descent.
    (-(gains[:, None] * (new - new.detach()).exp() * mask).sum() / (12 * 16)).backward()
    descent = {"learning_rate": 1e8, "adam_eps": 1e8, "max_grad_norm": None, "temperature": 0.8}
    metrics_of(rollout, model, loss="dr_grpo", micro_batch_size=micro, **GROUPS, **descent)
    size = max(x.grad.abs().max() for x in truth.parameters() if x.grad is not None)
    for name, x in truth.named_parameters():
        moved = before[name].double() - dict(model.named_parameters())[name].detach().double()
        expected = torch.zeros_like(x) if x.grad is None else x.grad
        torch.testing.assert_close(moved, expected, atol=2e-5 * size + 2e-7, rtol=1e-4, msg=name)


UNDER = ["token 7", "token -100", "token beyond the vocabulary", "NaN", "strides"]


@pytest.mark.parametrize("what", UNDER)
def test_what_lies_under_the_masks_touches_nothing(what):
    rollout = ragged(8, seed=4)
    sampled, tokens = rollout.completion_mask, rollout.tokens
    known = replace(rollout, logprobs=torch.where(sampled, -2.0, 0.0))
    if what == "NaN":
        other = replace(rollout, logprobs=torch.where(sampled, -2.0, torch.nan))
    elif what == "strides":
        other = replace(known, tokens=tokens.int().T.contiguous().T)
    else:
        token = {"token 7": 7, "token -100": -100}.get(what, V + 1000)
        other = replace(known, tokens=tokens.masked_fill(~rollout.mask, token))
    assert metrics_of(other, micro_batch_size=4) == metrics_of(known, micro_batch_size=4)


@pytest.mark.parametrize("name", ["mask", "completion_mask"])
def test_a_mask_of_integers_is_named(name):
    rollout = ragged(8, seed=4)
    whole = replace(rollout, **{name: getattr(rollout, name).long()})
    with pytest.raises(ValueError, match=f"{name} is torch.int64"):
        metrics_of(whole)


@pytest.mark.parametrize("case", ["no prompt", "gap", "sampled padding"])
def test_padding_inside_a_row_is_refused(case):
    rollout = ragged(6, seed=4, holes=False)
    mask = rollout.mask.clone()
    if case == "no prompt":
        mask[1, : rollout.prompt_length] = False
    elif case == "gap":  # prompts that somebody padded on the right
        mask[1, rollout.prompt_length - 1] = False
    else:
        mask[1, -3] = False
        rollout.completion_mask[1, -3] = True
    with pytest.raises(ValueError, match=r"row 1 of the rollout has padding \(mask False\)"):
        metrics_of(replace(rollout, mask=mask))


def test_a_soft_cap_is_not_overlooked_where_logits_are_small():
    model = make("recurrent_gemma")
    policy, rollout = Policy(model), ragged(4, seed=3)
    with torch.no_grad():
        model.base_model.final_norm.weight.add_(9)  # as training may: logits grow
        found = ActorCritic(policy, None)(rollout, 1.0).logprobs.double()
        torch.testing.assert_close(found, alone(model, rollout)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_the_unbiased_gradient_keeps_infinite_values(kind):
    logprobs, ref = torch.tensor([-torch.inf, -1.0]), torch.tensor([-1.0, -2.0])
    new = logprobs.clone().requires_grad_()
    for old in (None, logprobs):  # the same, by the docstring
        found = kl_estimate(new, ref, kind=kind, unbiased_gradient=True, old_logprobs=old)
        assert torch.equal(found.detach(), kl_estimate(logprobs, ref, kind=kind))


def learn(rank=0, world=1):
    """A step of which the second process, if there is one, has sampled nothing at all."""
    rollout, model = ragged(12, seed=31, empty=range(1, 12, 2)), make("llama")
    trainer = trainer_of(model, 12, **EXACT, micro_batch_size=4, learning_rate=1e8, adam_eps=1e8)
    mine = torch.arange(12)[rank::world]
    return trainer.step(rollout.select(mine), scores_of(12)[mine]), model.state_dict()


def in_a_group(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    torch.save(learn(rank, 2), folder / str(rank))
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_a_process_in_which_nothing_was_sampled(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mp.spawn(in_a_group, (port, tmp_path), nprocs=2)
    metrics, weights = learn()
    for rank in "01":
        found, state = torch.load(tmp_path / rank)
        assert found["ratio_max"] == metrics["ratio_max"] == 1.0
        for name in ("policy_loss", "value_loss", "entropy", "kl", "explained_variance"):
            assert found[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
        for name, x in weights.items():
            torch.testing.assert_close(state[name], x, atol=2e-6, rtol=1e-5, msg=name)
