"""Reference and critic beside a LoRA policy, named or given."""

from __future__ import annotations

import pytest
import torch
from lora_cases import adapt, base, base_folder, tokenizer, trainer_of, weights
from trainer_cases import ppo_config

from rlhf_fast.models import load_causal_lm
from rlhf_fast.scalar_models import RewardModel

__all__ = ["base", "base_folder", "tokenizer"]  # fixtures


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_reference_that_is_the_policys_folder_begins_at_the_policy(
    precision, base_folder, tmp_path, tokenizer
):
    adapt(load_causal_lm(base_folder), drawn=True).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    config = ppo_config(mixed_precision=precision, iterations=1, kl_coef=0.1)
    for policy, lora in ((str(tmp_path / "adapter"), None), (base_folder, 4)):
        trainer = trainer_of(policy, None, ref=policy, lora=lora, config=config)
        assert trainer.ref.model.dtype == trainer.run.dtype
        assert trainer.train().run.history[0]["kl"] == 0.0


def test_a_reference_that_is_the_policy_itself_is_refused(base, tokenizer):
    adapted = adapt(base)
    for policy, ref in ((adapted, adapted), (adapted, base)):
        with pytest.raises(ValueError, match="ref shares weights.*leave ref out"):
            trainer_of(policy, tokenizer, ref=ref)
    assert any(p.requires_grad for p in adapted.parameters())
    plain = type(base)(base.config)
    with pytest.raises(ValueError, match="ref shares weights.*leave ref out"):
        trainer_of(plain, tokenizer, ref=plain)
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("modules", [None, ["norm"]])
def test_a_critic_from_a_reward_model_that_is_frozen_trains_its_adapter(
    modules, base, base_folder, tokenizer
):
    reward = RewardModel(adapt(base, drawn=True, modules_to_save=modules), tokenizer)
    reward.eval().requires_grad_(False)
    before = weights(reward)
    trainer = trainer_of(base_folder, None, critic=reward)
    critic = trainer._module.critic
    own = ("lora_", "modules_to_save", "head.")
    for name, parameter in critic.named_parameters():
        assert parameter.requires_grad == any(part in name for part in own), name
    start = weights(critic)
    trainer.train()
    moved = {n for n, p in critic.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n, p in critic.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, before[n]) for n, p in reward.named_parameters())
    assert not any(p.requires_grad for p in reward.parameters())
    frozen = {p.data_ptr() for n, p in reward.named_parameters() if not any(o in n for o in own)}
    assert frozen == {p.data_ptr() for p in critic.parameters() if not p.requires_grad}
