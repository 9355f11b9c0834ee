"""Policies, critics and reward models over tiny random Hugging Face models."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
)

from rlhf_fast.actor_critic import ActorCritic
from rlhf_fast.data import Rollout
from rlhf_fast.models import disable_dropout
from rlhf_fast.policy import Policy
from rlhf_fast.scalar_models import RewardModel, ScalarModel
from rlhf_fast.scratch import tiny_llama, train_tokenizer

V = 61
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    with torch.no_grad():  # fresh weights give nearly uniform distributions: nothing to compare
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.eval()


def padded(rows, side):
    length = max(map(len, rows)) + 2
    tokens = torch.full((len(rows), length), 7)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = torch.tensor(row), True
    return tokens, mask


ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_policy_gives_the_models_own_logprobs_and_entropy_under_any_padding(model, side):
    policy = Policy(model)
    assert policy.head_options is not None, "hidden states and head must be used, not logits"
    tokens, mask = padded(ROWS, side)
    output = policy(tokens, mask, mask, temperature=0.7)
    for i, row in enumerate(ROWS):
        alone = torch.tensor([row])
        scores = (model(alone).logits[0, :-1].double() / 0.7).log_softmax(-1)
        expected = scores.gather(1, alone[0, 1:, None])[:, 0]
        got = output.logprobs[i][mask[i]][1:].double()
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        entropy = -(scores.exp() * scores).sum(-1)
        got = output.entropy[i][mask[i]][1:].double()
        torch.testing.assert_close(got, entropy, atol=2e-5, rtol=1e-5)
    assert (output.logprobs[~mask] == 0).all()


def test_a_model_that_is_not_trunk_and_matrix_is_scored_by_its_own_logits(model):
    class Doubled(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Doubled
    policy = Policy(model)
    assert policy.head_options is None
    tokens, mask = padded(ROWS, "left")
    with torch.no_grad():
        got = policy(tokens, mask, mask).logprobs[1][mask[1]][1:]
        alone = torch.tensor([ROWS[1]])
        expected = model(alone).logits[0, :-1].log_softmax(-1).gather(1, alone[0, 1:, None])[:, 0]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_policy_gradient_is_the_models_own(model):
    tokens, mask = padded(ROWS, "right")
    targets = mask.clone()
    targets[:, :3] = False
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    Policy(model)(tokens, mask, targets).logprobs.mul(upstream).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask.long(), position_ids=positions).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    (logprobs * upstream[:, 1:] * targets[:, 1:]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_exact_kl_is_the_sum_over_the_vocabulary(model):
    policy = Policy(model)
    ref = policy.frozen_copy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tokens, mask = padded(ROWS, "left")
    got = policy(tokens, mask, mask, 0.9, ref).kl
    for i, row in enumerate(ROWS):
        alone = torch.tensor([row])
        p = (model(alone).logits[0, :-1].double() / 0.9).log_softmax(-1)
        q = (ref.model(alone).logits[0, :-1].double() / 0.9).log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(got[i][mask[i]][1:].double(), expected, atol=1e-5, rtol=1e-4)
    got.sum().backward()
    assert all(p.grad is None for p in ref.parameters())
    assert all(p.grad is not None for p in model.parameters())


def rollout_of(rows, prompt_length):
    return Rollout.from_lists(
        [row[:prompt_length] for row in rows], [row[prompt_length:] for row in rows], pad_id=7
    )


def test_value_head_starts_at_zero_and_reads_the_state_before_each_token(model):
    actor_critic = ActorCritic(Policy(model), "head")
    rollout = rollout_of(ROWS, 2)
    assert (actor_critic(rollout, 1.0).values == 0).all()
    with torch.no_grad():
        actor_critic.head.weight.normal_()
        values = actor_critic(rollout, 1.0).values
        for i, row in enumerate(ROWS):
            hidden = model.base_model(torch.tensor([row])).last_hidden_state[0]
            expected = hidden[1:-1] @ actor_critic.head.weight
            torch.testing.assert_close(
                values[i][rollout.completion_mask[i]], expected, atol=2e-5, rtol=1e-4
            )
    assert (values[~rollout.completion_mask] == 0).all()


def test_a_critic_of_its_own_does_not_touch_the_policy(model):
    actor_critic = ActorCritic(Policy(model), "model")
    torch.nn.init.ones_(actor_critic.critic.head.weight)
    actor_critic(rollout_of(ROWS, 2), 1.0).values.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in actor_critic.critic.parameters())


def test_a_critic_from_a_reward_model_starts_from_its_scores(model):
    scorer = ScalarModel(model, std=0.5)
    actor_critic = ActorCritic(Policy(model), scorer)
    rollout = rollout_of(ROWS, 2)
    values = actor_critic(rollout, 1.0).values
    expected = scorer(rollout.tokens, rollout.mask)[:, 1:-1]
    torch.testing.assert_close(
        values[rollout.completion_mask], expected[rollout.completion_mask], atol=1e-6, rtol=1e-6
    )
    assert actor_critic.critic.head is not scorer.head


def test_unknown_critic_is_refused_with_the_choices(model):
    with pytest.raises(ValueError, match="critic = 'heads' is unknown; choose 'head'"):
        ActorCritic(Policy(model), "heads")


def test_dropout_is_off_everywhere_even_in_training_mode():
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"])
    disable_dropout(model)
    model.train()
    tokens = torch.tensor([ROWS[0]])
    assert torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.fixture
def reward_model():
    tokenizer = train_tokenizer(["a b c d e f g"], 270)
    return RewardModel(tiny_llama(tokenizer, hidden_size=32), tokenizer)


def test_reward_is_read_at_the_last_real_token_whatever_the_padding(reward_model):
    with torch.no_grad():
        expected = [
            reward_model.head(reward_model.model(torch.tensor([row])).last_hidden_state)[0, -1]
            for row in ROWS
        ]
        for side in ("left", "right"):
            tokens, mask = padded(ROWS, side)
            got = reward_model(tokens, mask)
            torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_an_end_token_that_is_also_the_padding_is_still_scored(reward_model):
    reward_model.tokenizer.pad_token = reward_model.tokenizer.eos_token
    together = reward_model.score(["a b", "a"], [" c", " c d e f g"])
    alone = torch.cat(
        [reward_model.score(["a b"], [" c"]), reward_model.score(["a"], [" c d e f g"])]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    end = reward_model.tokenizer.eos_token_id
    ids = reward_model.tokenizer("a b c")["input_ids"] + [end]
    with torch.no_grad():
        tokens = torch.tensor([ids])
        expected = reward_model(tokens, torch.ones_like(tokens).bool())
    torch.testing.assert_close(together[:1], expected, atol=1e-5, rtol=1e-5)


def test_a_saved_reward_model_scores_the_same(reward_model, tmp_path):
    reward_model.gain.fill_(2.0)
    reward_model.shift.fill_(-0.5)
    reward_model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    texts = ["a b", "c"], [" d", " e f"]
    torch.testing.assert_close(again.score(*texts), reward_model.score(*texts))


def test_a_text_longer_than_the_reward_model_reads_is_refused(reward_model):
    with pytest.raises(ValueError, match="the reward model reads 128"):
        reward_model.score(["a b"], [" c" * 200])


def test_the_head_is_computed_in_fp32_under_autocast(reward_model):
    tokens, mask = padded(ROWS, "right")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert reward_model(tokens, mask).dtype == torch.float32
