"""LoRA policies: what is trained, what reference and critic are, and that they learn."""

from __future__ import annotations

import copy

import pytest
import torch
from closed_form import LENGTH, Problem, random_model, sequence_logprobs, symbol_tokenizer
from lora_cases import (
    MASK,
    TOKENS,
    adapt,
    base,
    base_folder,
    optimized,
    redraw,
    tokenizer,
    trainer_of,
    weights,
)
from trainer_cases import EXAMPLES, PAIRS, PROMPTS, length_reward, ppo_config, sft_config

from rlhf_fast import (
    LoraConfig,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
)
from rlhf_fast.lora import own_copy
from rlhf_fast.models import load_causal_lm
from rlhf_fast.policy import Policy
from rlhf_fast.scratch import tiny_llama

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures


# What is trained.


def test_ppo_trains_the_adapter_and_no_bit_of_the_base(base, tokenizer):
    model = adapt(base)
    before = weights(model)
    trainer = trainer_of(model, tokenizer).train()
    assert trainer.model is model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    head = trainer._module.head
    trained = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert optimized(trainer) == trained | {id(head.weight), id(head.bias)}


def test_sft_and_reward_models_train_the_adapter_alone(base, tokenizer):
    model = adapt(base)
    before = weights(model)
    trainer = SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config()).train()
    assert trainer.run.history[-1]["loss"] < trainer.run.history[0]["loss"]
    after = weights(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if "lora_" in n
    }
    config = RewardConfig(batch_size=8, learning_rate=1e-2, max_length=64, epochs=4)
    reward = RewardTrainer(model, PAIRS, tokenizer=tokenizer, config=config).train()
    assert reward.run.history[-1]["accuracy"] > 0.9
    # The policy was copied, its base too: merging the one must not change the other.
    assert all(torch.equal(p, after[n]) for n, p in model.named_parameters())
    shared = {p.data_ptr() for p in model.parameters()}
    assert not shared & {p.data_ptr() for p in reward.model.parameters()}
    trained = {n for n, p in reward.model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"} | {
        n for n, _ in reward.model.named_parameters() if "lora_" in n
    }
    assert len(optimized(reward)) == len(trained)


def test_the_lora_argument_makes_the_adapter_that_peft_would(base, tokenizer):
    lora = {"r": 3, "alpha": 6, "dropout": 0.1, "target_modules": ["q_proj"], "use_rslora": True}
    trainer = SFTTrainer(base, EXAMPLES, tokenizer=tokenizer, config=sft_config(), lora=lora)
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.1)
    assert config.target_modules == {"q_proj"} and config.task_type == "CAUSAL_LM"
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(6 / 3**0.5)
    assert LoraConfig.of(7) == LoraConfig(r=7)
    # all-linear, the default, leaves embedding and head alone.
    plain = load_causal_lm(tiny_llama(tokenizer, hidden_size=16), lora=LoraConfig())
    adapted = {n.split(".")[-1] for n, m in plain.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_dropout_of_the_adapter_is_off_in_ppo_and_on_in_sft(base, tokenizer):
    model = adapt(base, drawn=True, lora_dropout=0.5)
    policy = Policy(model).train()
    assert not torch.equal(policy(TOKENS, MASK, MASK).logprobs, policy(TOKENS, MASK, MASK).logprobs)
    trainer = trainer_of(model, tokenizer)
    trainer._module.train()
    one, two = (trainer._module.policy(TOKENS, MASK, MASK).logprobs for _ in range(2))
    assert torch.equal(one, two)


def test_an_adapter_over_a_bf16_base_trains_in_fp32(base, tokenizer):
    model = adapt(base.bfloat16())
    before = weights(model)
    trainer = trainer_of(model, tokenizer, config=ppo_config(mixed_precision="bf16"))
    metrics = trainer.train().run.history[0]
    assert metrics["kl"] == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_a_base_that_is_loaded_for_an_adapter_has_the_precision_of_the_run(base_folder):
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        trainer = trainer_of(
            base_folder, None, lora=4, config=ppo_config(mixed_precision=precision)
        )
        dtypes = {p.dtype for n, p in trainer.model.named_parameters() if "lora_" not in n}
        assert dtypes == {dtype}
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_activations_gives_the_same_gradients(base, reentrant):
    model = adapt(base, drawn=True)
    policy = Policy(model).train()

    def gradients():
        policy.zero_grad()
        policy(TOKENS, MASK, MASK).logprobs.sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.requires_grad]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # else nothing that goes into a checkpointed layer requires a gradient
        model.enable_input_require_grads()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# The reference.


def first_step(trainer):
    """What policy and reference say of a rollout in the first step, and its metrics."""
    rollout = trainer.generate(PROMPTS[:8])
    with torch.no_grad():
        policy = trainer._module.policy(rollout.tokens, rollout.mask, rollout.targets)
        ref = trainer.ref(rollout.tokens, rollout.mask, rollout.targets)
    return policy, ref, trainer.step(rollout, length_reward(None, [""] * 8))


STARTS = {
    "fresh": {},
    "trained": {"drawn": True},
    "with-modules": {"drawn": True, "modules_to_save": ["norm"]},
    "with-biases": {"drawn": True, "lora_bias": False, "bias": "all"},
    "untied-head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("start", STARTS)
def test_the_reference_is_the_policy_at_the_start_to_the_bit(start, tokenizer, base):
    if start == "untied-head":
        base.config.tie_word_embeddings = False
        base = type(base)(base.config)
    model = adapt(base, **STARTS[start])
    frozen = copy.deepcopy(model).eval()
    # One minibatch an epoch, one epoch: the ratio in the metrics is that before any update.
    config = ppo_config(epochs=1, kl_loss_coef=0.1, kl_loss_kind="full", kl_coef=0.1)
    trainer = trainer_of(model, tokenizer, config=config)
    policy, ref, metrics = first_step(trainer)
    assert torch.equal(policy.logprobs, ref.logprobs) and torch.equal(policy.hidden, ref.hidden)
    assert metrics["kl"] == 0.0 and metrics["kl_ref"] == 0.0
    assert metrics["ratio_max"] == 1.0 and metrics["approx_kl_k3"] == 0.0
    for _ in range(2):
        trainer.step(trainer.generate(PROMPTS[:8]), [float(i) for i in range(8)])
    with torch.no_grad():
        after = trainer.ref(TOKENS, MASK, MASK).logprobs
        assert torch.equal(after, Policy(frozen)(TOKENS, MASK, MASK).logprobs)
        moved = trainer._module.policy(TOKENS, MASK, MASK).logprobs
    assert not torch.equal(after, moved)


def test_the_reference_holds_no_second_copy_of_the_weights(base, tokenizer):
    model = adapt(base, drawn=True)
    trainer = trainer_of(model, tokenizer, critic="model")
    frozen = {n: p.data_ptr() for n, p in model.named_parameters() if not p.requires_grad}
    for other in (trainer.ref, trainer._module.critic):
        own = {n: p for n, p in other.named_parameters() if p.data_ptr() not in frozen.values()}
        assert own and all("lora_" in name or name.startswith("head.") for name in own)
        assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in model.parameters()}
    assert not any(p.requires_grad for p in trainer.ref.parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_a_fresh_adapter_is_left_out_of_the_reference(base, tokenizer):
    trainer = trainer_of(adapt(base), tokenizer)
    layers = [m for m in trainer.ref.modules() if hasattr(m, "lora_A")]
    assert layers and all(layer.disable_adapters for layer in layers)
    assert not any(m.disable_adapters for m in base.modules() if hasattr(m, "lora_A"))


def test_a_reference_that_is_named_is_taken(base, tokenizer):
    other = tiny_llama(tokenizer, hidden_size=32, seed=5)
    trainer = trainer_of(adapt(base), tokenizer, ref=other)
    assert trainer.ref.model is other
    assert first_step(trainer)[2]["kl"] != 0.0


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_the_exact_kl_is_that_of_the_two_distributions(start, base):
    model = adapt(base, **STARTS[start])
    policy = Policy(model).eval()
    ref = policy.frozen_copy()
    plain = copy.deepcopy(model).eval()
    redraw(model, seed=3)
    got = policy(TOKENS, MASK, MASK, 0.7, ref).kl
    p = (model(TOKENS).logits[:, :-1].double() / 0.7).log_softmax(-1)
    q = (plain(TOKENS).logits[:, :-1].double() / 0.7).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(got[:, 1:].double(), expected, atol=1e-5, rtol=1e-4)
    got.sum().backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())


# The critic.


def test_a_critic_of_its_own_has_an_adapter_of_its_own(base, tokenizer):
    model = adapt(base)
    before = weights(model)
    trainer = trainer_of(model, tokenizer, critic="model")
    critic = trainer._module.critic
    start = weights(critic)
    trainer.train()
    for name, parameter in critic.named_parameters():
        assert torch.equal(parameter, start[name]) == (not parameter.requires_grad), name
        assert parameter.requires_grad == ("lora_" in name or name.startswith("head."))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora_" not in n)


def test_the_gradient_of_the_critic_is_its_own_with_activations_checkpointed(base):
    policy = Policy(adapt(base, drawn=True))
    copied = own_copy(policy.model).base_model.train()
    policy.model.base_model.train()

    def gradients():
        for module in (policy, copied):
            module.zero_grad()
        states = [m(TOKENS).last_hidden_state for m in (policy.model.base_model, copied)]
        (states[0].sum() + 2 * states[1].sin().sum()).backward()
        return [p.grad.clone() for m in (policy, copied) for p in m.parameters() if p.requires_grad]

    expected = gradients()
    for module in (policy.model, copied):
        module.gradient_checkpointing_enable()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# Does it learn?


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_gate_a_holds_for_adapters(start, seed):
    """Embedding, head, norms and biases stay those of the reference: rank 24 of 48 does it all."""
    base = random_model(seed)
    torch.manual_seed(seed)
    model = adapt(base, r=24, lora_alpha=24, fan_in_fan_out=True, drawn=start == "trained")
    problem = Problem.make(model, seed)
    before = weights(base)
    trainer = PPOTrainer(
        model, reward=problem.reward, prompts=["^"], tokenizer=symbol_tokenizer(), critic="model",
        rollout="hf", config=PPOConfig(
            seed=seed, iterations=80, rollout_batch_size=128, batch_size=128, epochs=2,
            max_new_tokens=LENGTH, ignore_eos=True, kl_coef=problem.beta, learning_rate=3e-3,
            max_length=8,
        ),
    ).train()  # fmt: skip
    logprobs = sequence_logprobs(model, problem.completions)
    assert trainer.run.history[0]["kl"] == 0.0
    assert problem.gap_closed(logprobs) >= 0.99
    assert problem.total_variation(logprobs) <= 0.06
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters() if "lora_" not in n)
