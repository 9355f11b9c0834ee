"""Learning gates: training reaches a known optimum, or it is wrong. Never loosened to pass."""

from __future__ import annotations

import math
import random

import pytest
from backend_cases import HAS_GPU, cases, count_launches
from closed_form import LENGTH, Problem, random_model, sequence_logprobs, symbol_tokenizer

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, backends
from rlhf_fast.scratch import tiny_llama, train_tokenizer


def train_closed_form(
    seed, iterations, batch, *, length=LENGTH, critic="model", rollout="hf", heads=4, **config
):
    model = random_model(seed, width=64 if heads == 2 else 48, heads=heads)
    problem = Problem.make(model, seed, length=length)
    trainer = PPOTrainer(
        model,
        reward=problem.reward,
        prompts=["^"],
        tokenizer=symbol_tokenizer(),
        critic="auto" if "loss" in config else critic,
        rollout=rollout,
        config=PPOConfig(**{
            "seed": seed, "iterations": iterations, "rollout_batch_size": batch,
            "batch_size": batch, "epochs": 2, "max_new_tokens": length, "ignore_eos": True,
            "kl_coef": problem.beta, "learning_rate": 1e-3, "max_length": 8, **config,
        }),
    ).train()  # fmt: skip
    trainer.close()
    return problem, trainer.model, trainer.run.history


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gate_a_ppo_reaches_the_closed_form_optimum(seed):
    problem, model, history = train_closed_form(seed, iterations=80, batch=128)
    logprobs = sequence_logprobs(model, problem.completions)
    assert problem.gap_closed(logprobs) >= 0.99
    assert problem.total_variation(logprobs) <= 0.06
    # At the optimum every sampled score - beta * log(policy / ref) is beta * log Z.
    assert history[-1]["soft_return"] == pytest.approx(problem.best, abs=0.05)


@pytest.mark.vllm
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_gate_a_holds_with_rollouts_of_vllm(seed):
    """Two heads, of 32: the least that vLLM's attention takes on a CPU."""
    problem, model, history = train_closed_form(
        seed, iterations=80, batch=128, rollout="vllm", heads=2
    )
    logprobs = sequence_logprobs(model, problem.completions)
    assert problem.gap_closed(logprobs) >= 0.99
    assert problem.total_variation(logprobs) <= 0.06
    assert max(row["mismatch_max"] for row in history) < 1e-3
    assert max(row.get("probe_max_abs", 0.0) for row in history) < 1e-3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("loss", "steps"), [("rloo", 80), ("dr_grpo", 80), ("reinforce", 160)])
def test_gate_a_unbiased_losses_reach_it_without_a_critic(loss, steps, seed):
    problem, model, _ = train_closed_form(seed, iterations=steps, batch=128, loss=loss)
    logprobs = sequence_logprobs(model, problem.completions)
    assert problem.gap_closed(logprobs) >= 0.99
    assert problem.total_variation(logprobs) <= 0.06


@pytest.mark.parametrize("loss", ["reinforce++", "grpo", "dapo", "gspo", "cispo"])
def test_losses_without_a_kl_come_near_the_greatest_reward(loss):
    config = {"loss": loss, "kl_coef": 0.0, "kl_loss_coef": 0.0}
    problem, model, _ = train_closed_form(0, iterations=80, batch=128, **config)
    probabilities = sequence_logprobs(model, problem.completions).exp()
    start = (problem.ref_logprobs.exp() * problem.rewards).sum()
    end = (probabilities * problem.rewards).sum()
    assert (end - start) / (problem.rewards.max() - start) >= 0.97


# On the device that the trainers take.
FORCED = [c for c in cases("policy_loss") if (c.values[0].device == "cuda") == HAS_GPU]


@pytest.mark.parametrize("case", FORCED)
def test_gate_a_holds_on_every_backend(case, monkeypatch):
    """Completions of one token: in Triton's interpreter every launch takes its time."""
    monkeypatch.setattr(backends, "REQUESTED", case.backend)
    launches = {}
    for op in ("policy_loss", "value_loss", "ppo_advantages", "linear_logprobs"):
        if case.backend != "reference":
            launches[op] = count_launches(monkeypatch, op, case.backend)
    problem, model, _ = train_closed_form(
        0, iterations=20, batch=32, length=1, learning_rate=3e-3, critic="head"
    )
    assert problem.gap_closed(sequence_logprobs(model, problem.completions)) >= 0.99
    assert all(count["forward"] and count["backward"] for count in launches.values()), launches


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_gate_a_long_ppo_reaches_the_closed_form_optimum(seed):
    problem, model, history = train_closed_form(seed, iterations=150, batch=256)
    logprobs = sequence_logprobs(model, problem.completions)
    assert problem.gap_closed(logprobs) >= 0.995
    assert problem.total_variation(logprobs) <= 0.02
    assert history[-1]["soft_return"] == pytest.approx(problem.best, abs=0.02)


WORDS = "oak elm fir ash yew bay fig sky sea sun rye tea".split()


def judged_pairs(count, seed):
    """Pairs of word lists, ranked by a noisy judge of a known utility, and the Bayes accuracy.

    Utility: the sum of the words' values, and 1 for each word that repeats the one before it.
    Bradley-Terry: the better is preferred with probability `sigmoid(difference)`.
    """
    values = {word: 1.2 * (i - 5.5) / 5.5 for i, word in enumerate(WORDS)}
    rng = random.Random(seed)
    rows, agreement = [], 0.0
    for _ in range(count):
        answers = [rng.choices(WORDS, k=rng.randint(4, 8)) for _ in range(2)]
        utilities = [
            sum(values[word] for word in words) + sum(map(str.__eq__, words, words[1:]))
            for words in answers
        ]
        p = 1 / (1 + math.exp(utilities[1] - utilities[0]))
        agreement += max(p, 1 - p)
        texts = [" " + " ".join(words) for words in answers]
        if texts[0] == texts[1]:
            continue
        chosen, rejected = texts if rng.random() < p else texts[::-1]
        rows.append({"prompt": "rate this:", "chosen": chosen, "rejected": rejected})
    return rows, agreement / count


def test_gate_f_a_reward_model_comes_within_six_points_of_the_bayes_accuracy():
    train, _ = judged_pairs(4000, seed=1)
    test, bayes = judged_pairs(2000, seed=2)
    tokenizer = train_tokenizer(["rate this: " + " ".join(WORDS)], 320)
    trainer = RewardTrainer(
        tiny_llama(tokenizer, hidden_size=48, context=32),
        train,
        tokenizer=tokenizer,
        config=RewardConfig(
            batch_size=50, learning_rate=2e-3, epochs=2, center=0.01, max_length=32
        ),
        eval_data=test,
    ).train()
    assert 0.80 < bayes < 0.90
    assert trainer.run.history[-1]["eval_accuracy"] >= bayes - 0.06
    prompts = [row["prompt"] for row in test]
    scores = trainer.model.score(prompts, [row["chosen"] for row in test])
    assert abs(scores.mean()) < 0.5  # centred and normalised: chosen ones a little above 0
