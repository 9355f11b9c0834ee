"""What PPO's models read of a ragged rollout: micro-batches of rows of like length."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from ragged_cases import COMPLETION, PROMPT, ragged, widened
from trainer_cases import PROMPTS, assert_same, length_reward, ppo_config, weights

from rlhf_fast import PPOTrainer, RewardModel
from rlhf_fast.data import FlushLeft, Rollout
from rlhf_fast.presets import PRESETS
from rlhf_fast.scratch import tiny_llama, train_tokenizer
from rlhf_fast.trainers.batches import minibatches
from rlhf_fast.trainers.experience import make_experience

sys.path.append(str(Path(__file__).parent / "rollout"))
from decode_cases import VOCABULARY, build  # noqa: E402

PADDED = 11 + 14  # columns; the rows have 8, 4, 20, 13, 20, 9, 10, 9
SORTED = [(20, 20), (13, 10), (9, 9), (8, 4)]  # in micro-batches of two


def reading_padded(monkeypatch):
    """Every column of the rollout is read, in micro-batches of rows as they were drawn."""

    def as_they_are(rollout):
        sampled = rollout.completion_mask
        columns = torch.arange(rollout.prompt_length, rollout.tokens.shape[1]).expand_as(sampled)
        return FlushLeft(rollout.tokens, rollout.mask, rollout.targets, columns, sampled)

    monkeypatch.setattr(Rollout, "flush_left", as_they_are)
    monkeypatch.setattr(Rollout, "lengths", property(lambda self: self.finished.long() * 0))


def config_of(loss="ppo", **changes):
    group = {"samples_per_prompt": 2} if PRESETS[loss].needs_groups else {}
    fields = {"epochs": 1, "micro_batch_size": 2, "max_new_tokens": 14, "iterations": 1}
    return ppo_config(**{"loss": loss, **fields, **group, **changes})


def trainer_of(model, tokenizer, config, **options):
    return PPOTrainer(copy.deepcopy(model), tokenizer=tokenizer, config=config, **options)


SCORES = [0.0, 3.0, 1.0, 1.5, -2.0, 4.0, 0.5, 2.0]


# Micro-batches.


def test_micro_batches_hold_rows_of_like_length_of_the_minibatch_that_was_drawn(model, tokenizer):
    config = config_of(seed=5)
    trainer = trainer_of(model, tokenizer, config)
    (pieces,) = minibatches(trainer.run, config, ragged(), epoch=0)
    lengths = ragged().lengths
    assert [tuple(lengths[rows].tolist()) for rows in pieces] == SORTED
    small = config.replace(batch_size=4)
    for epoch in (0, 1):
        seed = (5 * 1_000_003 + 0) * 101 + epoch
        drawn = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        found = list(minibatches(trainer.run, small, ragged(), epoch))
        for expected, pieces in zip(drawn.split(4), found, strict=True):
            assert sorted(torch.cat(pieces).tolist()) == sorted(expected.tolist())
            assert [len(rows) for rows in pieces] == [2, 2]
            assert lengths[pieces[0]].min() >= lengths[pieces[1]].max()


def test_rows_of_equal_length_keep_the_order_in_which_they_were_drawn(model, tokenizer):
    config = config_of(micro_batch_size=4)
    trainer = trainer_of(model, tokenizer, config)
    rollout = ragged().select(torch.zeros(8, dtype=torch.int64))
    (pieces,) = minibatches(trainer.run, config, rollout, epoch=0)
    drawn = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(pieces), drawn)


def tokens_read(models):
    """Counts the tokens that go through each trunk, from now on."""
    counts = dict.fromkeys(models, 0)

    def watch(name):
        def count(module, args, kwargs):
            counts[name] += kwargs["input_ids"].numel()

        return count

    for name, trunk in models.items():
        trunk.register_forward_pre_hook(watch(name), with_kwargs=True)
    return counts


@pytest.mark.parametrize("how", ["flush", "padded"])
def test_trunks_read_no_more_than_the_longest_row_of_a_micro_batch(
    model, tokenizer, monkeypatch, how
):
    if how == "padded":
        reading_padded(monkeypatch)
    config = config_of(epochs=3, kl_loss_coef=0.1, kl_loss_kind="full")
    trainer = trainer_of(model, tokenizer, config, critic="model", rollout={"probe_first": 0})
    trunks = {
        "policy": trainer.model.base_model,
        "ref": trainer.ref.model.base_model,
        "critic": trainer._module.critic.model,
    }
    counts = tokens_read(trunks)
    trainer.step(ragged(), SCORES)
    one_pass = 2 * (20 + 13 + 9 + 8) if how == "flush" else 8 * PADDED
    # The experience and three passes; the reference comes into the loss.
    assert counts == dict.fromkeys(trunks, 4 * one_pass)


# The same numbers.


def experience_of(trainer, rollout, pieces):
    scores = torch.tensor(SCORES)
    settings = (trainer.config, trainer.kl_coef, pieces)
    return make_experience(trainer._module, trainer.ref, rollout, scores, *settings)


@pytest.mark.parametrize("critic", ["head", "model", "reward"])
def test_an_experience_is_what_each_row_gives_alone(model, tokenizer, critic):
    if critic == "reward":
        critic = RewardModel(copy.deepcopy(model), tokenizer)
    ref = tiny_llama(tokenizer, hidden_size=32, context=64, seed=7)
    config = config_of(temperature=0.7, whiten_advantages=False)
    trainer = trainer_of(model, tokenizer, config, critic=critic, ref=ref)
    if trainer._module.head is not None:
        torch.nn.init.normal_(trainer._module.head.weight, std=0.1)
    rollout, module = ragged(), trainer._module
    # Not a multiple: the last of three micro-batches has two rows.
    found = experience_of(trainer, rollout, torch.randperm(8).split(3))
    assert found.rollout is rollout
    mask = rollout.completion_mask
    for name in ("old_logprobs", "ref_logprobs", "values", "returns", "advantages"):
        assert (getattr(found, name)[~mask] == 0).all(), name
    for i, (before, sampled) in enumerate(zip(PROMPT, COMPLETION, strict=True)):
        tokens = rollout.tokens[i, 11 - before : 11 + sampled][None]
        everywhere = torch.ones_like(tokens).bool()
        with torch.no_grad():
            policy = module.policy(tokens, everywhere, everywhere, 0.7)
            reference = trainer.ref(tokens, everywhere, everywhere, 0.7).logprobs
            head = module.head
            values = module.critic(tokens, everywhere) if head is None else head(policy.hidden)
        expected = {
            "old_logprobs": policy.logprobs[0, before:],
            "ref_logprobs": reference[0, before:],
            "values": values[0, before - 1 : -1],
        }
        for name, numbers in expected.items():
            torch.testing.assert_close(
                getattr(found, name)[i, :sampled], numbers, atol=2e-6, rtol=1e-5, msg=name
            )


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "bart", "mamba", "rwkv", "openai-gpt"])
def test_models_without_position_ids_or_masks_are_scored_as_without_padding(kind):
    model, tokenizer = build(kind), train_tokenizer(PROMPTS, VOCABULARY)
    trainer = trainer_of(model, tokenizer, config_of(max_length=40))
    rollout = ragged()
    found = experience_of(trainer, rollout, torch.arange(8).split(4))
    for i, (before, sampled) in enumerate(zip(PROMPT, COMPLETION, strict=True)):
        tokens = rollout.tokens[i, 11 - before : 11 + sampled][None]
        with torch.no_grad():
            logits = model(tokens).logits[0, before - 1 : -1, : trainer._module.policy.vocabulary]
        expected = logits.log_softmax(1).gather(1, tokens[0, before:, None])[:, 0]
        torch.testing.assert_close(found.old_logprobs[i, :sampled], expected, atol=2e-5, rtol=1e-5)
    # The engine reads prompts without padding: its log-probs are the trainer's.
    rows = [[70, 71, 72], [70, 9], [80, 81, 82, 83, 84], [9] * 7] * 2
    drawn = trainer.generate(rows)
    scored = trainer._module.policy.logprobs_of(drawn, 1.0)
    torch.testing.assert_close(scored, drawn.logprobs, atol=2e-5, rtol=1e-5)


CASES = {loss: {"loss": loss, "kl_loss_coef": 0.1, "entropy_coef": 0.02} for loss in PRESETS} | {
    "exact KL": {"kl_loss_coef": 0.1, "kl_loss_kind": "full"},
    "constant, weights by sequence": {"loss": "dr_grpo", "correction": "sequence"},
    "lora": {"lora": 4, "kl_loss_coef": 0.1, "kl_loss_kind": "full"},
    "critic of its own": {"critic": "model"},
    "critic from a reward model": {"critic": "reward", "value_clip": None},
    "whitened rewards": {"whiten_rewards": True, "missing_eos_penalty": 1.0},
    "minibatches": {"batch_size": 4},
}


def learn(model, tokenizer, case, rollout, **changes):
    """The gradients of each optimiser step, and the metrics, of two passes."""
    options = {"batch_size": 8, "epochs": 2, **CASES[case], **changes}
    correction = options.pop("correction", "token")
    extra = {name: options.pop(name) for name in ("lora", "critic") if name in options}
    if extra.get("critic") == "reward":
        torch.manual_seed(0)
        extra["critic"] = RewardModel(copy.deepcopy(model), tokenizer)
    torch.manual_seed(0)
    ref = tiny_llama(tokenizer, hidden_size=32, context=64, seed=7)
    trainer = trainer_of(
        model, tokenizer, config_of(**options), ref=ref, **extra,
        rollout={"correction": correction, "probe_first": 0},
    )  # fmt: skip
    gradients = []

    def keep(*args, **kwargs):
        trained = [p for p in trainer._module.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten().clone() for p in trained]))

    trainer._optimizer.optimizer.register_step_pre_hook(keep)
    metrics = trainer.step(rollout, SCORES)
    return gradients, {k: v for k, v in metrics.items() if not k.startswith("seconds")}


@pytest.mark.parametrize("case", CASES)
def test_an_update_learns_what_it_would_from_padded_rows(model, tokenizer, case, monkeypatch):
    gradients, metrics = learn(model, tokenizer, case, ragged())
    with monkeypatch.context() as patched:
        reading_padded(patched)
        expected = learn(model, tokenizer, case, ragged())
    wide = learn(model, tokenizer, case, widened(ragged()))
    assert all(map(torch.equal, gradients[:1], wide[0]))
    assert wide[1] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    assert len(gradients) == len(expected[0]) == (4 if case == "minibatches" else 2)
    for step, (ours, theirs) in enumerate(zip(gradients, expected[0], strict=True)):
        error = (ours - theirs).norm() / theirs.norm()
        # After a step of Adam: it divides gradients near 0 by their own size.
        assert theirs.norm() > 1e-2 and error < (1e-5 if step == 0 else 1e-3), (step, error)
    assert metrics.keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


# The bits.


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_the_first_ratio_is_one_to_the_bit(model, tokenizer, case, precision, monkeypatch):
    options = {**CASES[case]}
    options.pop("correction", None)
    extra = {name: options.pop(name) for name in ("lora", "critic") if name in options}
    if extra.get("critic") == "reward":
        extra["critic"] = RewardModel(copy.deepcopy(model), tokenizer)
    config = config_of(**options, mixed_precision=precision)
    trainer = trainer_of(model, tokenizer, config, **extra)
    steps, optimize = [], trainer.run.optimize
    monkeypatch.setattr(
        trainer.run, "optimize", lambda *args: steps.append(optimize(*args)) or steps[-1]
    )
    metrics = trainer.step(ragged(logprobs=False), SCORES)
    first = {name: float(x) for name, x in steps[0].items()}
    assert metrics["kl"] == 0.0  # the reference is the policy
    assert first["ratio_max"] == 1.0 and first["approx_kl_k3"] == 0.0
    assert first["clip_fraction_low"] == first["clip_fraction_high"] == 0.0


def test_a_step_on_ragged_rows_is_the_same_to_the_bit_each_time(model, tokenizer):
    first, second = (learn(model, tokenizer, "ppo", ragged(), epochs=3) for _ in range(2))
    assert all(map(torch.equal, first[0], second[0])) and first[1] == second[1]


def test_a_resumed_run_makes_the_same_micro_batches(model, tokenizer, tmp_path):
    def make(folder, iterations, resume=False):
        config = ppo_config(
            micro_batch_size=2, save_every=2, iterations=iterations, lr_schedule="constant",
            max_new_tokens=12, rollout_batch_size=16,
        )  # fmt: skip
        return trainer_of(
            model, tokenizer, config, prompts=PROMPTS, reward=length_reward, run_dir=folder,
            resume=resume,
        ).train()  # fmt: skip

    whole = make(tmp_path / "whole", 4)
    make(tmp_path / "cut", 2)
    resumed = make(tmp_path / "cut", 4, resume=True)
    assert_same(weights(resumed._module), weights(whole._module), atol=0, rtol=0)
    last = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("whole", "cut")
    ]
    assert last[0]["policy_loss"] == last[1]["policy_loss"]
