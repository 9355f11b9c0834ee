"""What the trainers refuse, and what they say then."""

from __future__ import annotations

import copy

import pytest
import torch
from trainer_cases import EXAMPLES, PAIRS, PROMPTS, length_reward, ppo_config, sft_config

import rlhf_fast
from rlhf_fast import (
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    SFTTrainer,
)
from rlhf_fast.config import ConfigError
from rlhf_fast.loading import DataError
from rlhf_fast.rewards import RewardError
from rlhf_fast.scalar_models import ScalarModel
from rlhf_fast.scratch import tiny_llama


def test_a_second_run_in_the_same_folder_is_refused(model, tokenizer, tmp_path):
    SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config(), run_dir=tmp_path).train()
    with pytest.raises(ConfigError, match="already holds a run; go on with resume=True"):
        SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config(), run_dir=tmp_path)


def test_resuming_without_a_checkpoint_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume in .*; set save_every"):
        SFTTrainer(
            model, EXAMPLES, tokenizer=tokenizer, config=sft_config(),
            run_dir=tmp_path / "none", resume=True,
        )  # fmt: skip


def test_no_prompts_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="no prompts"):
        PPOTrainer(model, reward=length_reward, prompts=[], tokenizer=tokenizer)
    with pytest.raises(DataError, match="train.. has no prompts"):
        PPOTrainer(model, tokenizer=tokenizer, config=ppo_config()).train()


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(model, tokenizer):
    with pytest.raises(ValueError, match=r"row 1: .* tokens, but 59 fit: the context is 64"):
        PPOTrainer(
            model, reward=length_reward, prompts=["the cat " * 60], tokenizer=tokenizer,
            config=ppo_config(max_length=512),
        )  # fmt: skip


def test_an_example_longer_than_the_context_is_refused_by_its_number(model, tokenizer):
    rows = [*EXAMPLES, {"prompt": "a", "completion": " the" * 100}]
    with pytest.raises(ValueError, match=r"row 17: prompt and .* tokens, but 64 fit"):
        SFTTrainer(model, rows, tokenizer=tokenizer, config=sft_config(max_length=512))


def test_an_empty_completion_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="row 2.*completion"):
        SFTTrainer(
            model, [EXAMPLES[0], {"prompt": "a", "completion": " "}], tokenizer=tokenizer,
            config=sft_config(batch_size=2),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, completions: [float("nan")] * len(prompts), "nan at index 0"),
        (lambda prompts, completions: [1.0], "1 values for 8 completions"),
        (lambda prompts, completions: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_reward_function_that_fails_stops_the_run_with_its_reason(
    model, tokenizer, reward, message
):
    trainer = PPOTrainer(
        model, reward=reward, prompts=PROMPTS, tokenizer=tokenizer, config=ppo_config()
    )
    with pytest.raises(RewardError, match=message):
        trainer.train()


@pytest.mark.parametrize("missing", ["eos_token", "pad_token"])
def test_a_tokenizer_without_end_or_padding_token_is_refused(model, tokenizer, missing):
    bare = copy.deepcopy(tokenizer)
    setattr(bare, missing, None)
    with pytest.raises(ValueError, match=f"has no {missing}.*set tokenizer.{missing}"):
        PPOTrainer(model, reward=length_reward, prompts=PROMPTS, tokenizer=bare)


def test_a_batch_larger_than_the_data_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="batch_size = 64 is more than the 16 rows"):
        SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config(batch_size=64))


@pytest.mark.parametrize(
    ("scores", "message"), [([1.0] * 3, r"shape \[3\]"), ([float("inf")] * 8, "8 non-finite")]
)
def test_scores_that_do_not_fit_are_refused(model, tokenizer, scores, message):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config())
    with pytest.raises(ValueError, match=message):
        trainer.step(trainer.generate(PROMPTS[:8]), scores)


def test_stepping_beyond_the_schedule_is_refused(model, tokenizer):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config(iterations=1))
    rollout = trainer.generate(PROMPTS[:8])
    trainer.step(rollout, [0.0] * 8)
    with pytest.raises(ValueError, match="more often than iterations = 1, where the linear"):
        trainer.step(rollout, [0.0] * 8)


def test_truncated_sampling_warns_of_the_bias(model, tokenizer):
    with pytest.warns(UserWarning, match="top_p=0.5: completions are drawn from a truncated"):
        PPOTrainer(model, tokenizer=tokenizer, config=ppo_config(top_p=0.5))


def test_a_start_that_fails_does_not_lock_the_folder(model, tokenizer, tmp_path):
    rows = [*EXAMPLES, {"prompt": "a", "completion": " the" * 100}]
    with pytest.raises(DataError):
        SFTTrainer(model, rows, tokenizer=tokenizer, config=sft_config(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config(), run_dir=tmp_path / "run")


def test_overlong_rows_are_skipped_on_request_and_said_to_be(model, tokenizer):
    rows = [EXAMPLES[0], {"prompt": "a", "completion": " the" * 100}, *EXAMPLES[1:]]
    with pytest.warns(UserWarning, match="skipped 1 of 17 rows: row 2: prompt and completion"):
        trainer = SFTTrainer(model, rows, tokenizer=tokenizer, config=sft_config(), bad_rows="skip")
    assert len(trainer._rows) == 16


def test_resuming_with_another_configuration_is_refused_by_name(model, tokenizer, tmp_path):
    config = sft_config(save_every=1, epochs=1)
    SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=config, run_dir=tmp_path).train()
    with pytest.raises(ConfigError, match="learning_rate: 0.01 -> 0.5"):
        SFTTrainer(
            model, EXAMPLES, tokenizer=tokenizer, config=config.replace(learning_rate=0.5),
            run_dir=tmp_path, resume=True,
        )  # fmt: skip
    longer = SFTTrainer(
        model, EXAMPLES, tokenizer=tokenizer, config=config.replace(epochs=2), run_dir=tmp_path,
        resume=True,
    ).train()  # fmt: skip
    assert [row["step"] for row in longer.run.history] == [1, 2, 3, 4]


def test_a_tracker_needs_a_folder(model, tokenizer):
    with pytest.raises(ConfigError, match="log_with = 'tensorboard' needs a run_dir"):
        SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config(log_with="tensorboard"))


def test_a_tracker_that_is_not_installed_is_named(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_fast.trainers.run.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="`pip install wandb` brings it"):
        SFTTrainer(
            model, EXAMPLES, tokenizer=tokenizer, config=sft_config(log_with="wandb"),
            run_dir=tmp_path,
        )  # fmt: skip


def test_a_model_that_is_frozen_whole_is_refused(model, tokenizer):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config())


def test_a_saved_reward_model_can_be_trained_further_but_is_no_policy(model, tokenizer, tmp_path):
    scorer = RewardModel(model, tokenizer)
    scorer.save_pretrained(tmp_path)
    config = RewardConfig(batch_size=8)
    trainer = RewardTrainer(tmp_path, PAIRS, config=config)
    torch.testing.assert_close(trainer.model.head.weight, scorer.head.weight)
    with pytest.raises(ValueError, match="holds a reward model, which has no language-model head"):
        SFTTrainer(tmp_path, EXAMPLES, config=sft_config())


def test_a_rollout_of_another_size_is_refused(model, tokenizer):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config())
    with pytest.raises(ValueError, match="has 4 completions, but rollout_batch_size = 8"):
        trainer.step(trainer.generate(PROMPTS[:4]), [0.0] * 4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("the cat", "prompts is one string, 'the cat'; give a list"),
        ([""], "prompt '' has no tokens"),
        ([[5] * 200], "has 200 tokens, but 59 fit"),
    ],
)
def test_prompts_that_cannot_be_generated_from_are_refused(model, tokenizer, prompts, message):
    trainer = PPOTrainer(model, tokenizer=tokenizer, config=ppo_config())
    with pytest.raises(ValueError, match=message):
        trainer.generate(prompts)


def test_a_column_that_the_reward_asks_for_must_be_in_the_data(model, tokenizer):
    def reward(prompts, completions, answer):
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="asks for answer; offered are"):
        PPOTrainer(model, reward=reward, prompts=PROMPTS, tokenizer=tokenizer, config=ppo_config())
    rows = [{"prompt": prompt, "answer": "x"} for prompt in PROMPTS]
    PPOTrainer(model, reward=reward, prompts=rows, tokenizer=tokenizer, config=ppo_config()).train()


def test_a_reward_model_on_the_policys_own_weights_is_refused(model, tokenizer):
    with pytest.raises(RewardError, match="shares weights with the policy"):
        PPOTrainer(model, reward=RewardModel(model, tokenizer), tokenizer=tokenizer)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_that_breaks_down_stops_and_saves_nothing(model, tokenizer, stage, tmp_path):
    with pytest.raises(FloatingPointError, match="training broke down at step"):
        if stage == "sft":
            rlhf_fast.sft(
                model, EXAMPLES, tokenizer=tokenizer, run_dir=tmp_path, batch_size=8, epochs=9,
                learning_rate=1e30,
            )  # fmt: skip
        else:
            fields = {**ppo_config().model_dump(), "iterations": 2, "max_grad_norm": None}
            rlhf_fast.ppo(
                model, reward=lambda prompts, completions: [1e30 * len(c) for c in completions],
                prompts=PROMPTS, tokenizer=tokenizer, run_dir=tmp_path, **fields,
            )  # fmt: skip
    assert not (tmp_path / "model").exists()


def test_half_precision_weights_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="weights are torch.bfloat16.*mixed_precision='bf16'"):
        SFTTrainer(model.bfloat16(), EXAMPLES, tokenizer=tokenizer, config=sft_config())


def test_adapters_of_peft_are_refused_with_what_to_do(model, tokenizer):
    model.add_module("lora_A", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="holds LoRA adapters.*merge them first"):
        SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, config=sft_config())


@pytest.mark.parametrize("who", ["model", "reference", "critic"])
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(model, tokenizer, who):
    small = copy.deepcopy(model)
    small.resize_token_embeddings(len(tokenizer) - 10)
    with pytest.raises(ValueError, match=f"ids reach 2.., but the {who} embeds"):
        PPOTrainer(
            small if who == "model" else model,
            ref=small if who == "reference" else None,
            critic=ScalarModel(small) if who == "critic" else "head",
            tokenizer=tokenizer,
        )


def test_a_critic_that_reads_less_than_the_policy_is_refused(model, tokenizer):
    short = tiny_llama(tokenizer, hidden_size=16, context=32)
    with pytest.raises(ValueError, match="the critic reads 32 tokens, but sequences may have 64"):
        PPOTrainer(model, critic=ScalarModel(short), tokenizer=tokenizer)


def test_a_checkpoint_of_another_critic_is_refused_in_words(model, tokenizer, tmp_path):
    settings = {"reward": length_reward, "prompts": PROMPTS, "tokenizer": tokenizer}
    config = ppo_config(save_every=1)
    PPOTrainer(model, **settings, config=config, run_dir=tmp_path).train()
    with pytest.raises(ConfigError, match="(?s)step-3 cannot be resumed: .*model or critic"):
        PPOTrainer(model, **settings, config=config, run_dir=tmp_path, resume=True, critic="model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"seed": 1}}, "config is of type dict; give a SFTConfig"),
        ({"config": PPOConfig()}, "config is of type PPOConfig; give a SFTConfig"),
        ({"model": 5}, "the model is of type int; give a causal language model"),
        ({"tokenizer": 5}, "the tokenizer is 5 of type int"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(model, tokenizer, change, message):
    with pytest.raises(TypeError, match=message):
        SFTTrainer(**{"model": model, "data": EXAMPLES, "tokenizer": tokenizer, **change})


def test_a_trunk_without_a_head_is_no_policy(model, tokenizer):
    with pytest.raises(ValueError, match="LlamaModel is not a causal language model"):
        SFTTrainer(model.model, EXAMPLES, tokenizer=tokenizer)


def test_a_run_dir_that_is_a_file_is_refused(model, tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        SFTTrainer(model, EXAMPLES, tokenizer=tokenizer, run_dir=tmp_path / "file")
