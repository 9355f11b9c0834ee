"""Tiny models of many architectures, and what their rollouts' log-probs must be."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.rollout import Sampling
from rlhf_fast.rollout._context import Route

PROMPTS = [[70, 71, 72], [70], [80, 81, 82, 83, 84, 85, 86], [90, 91, 92, 93, 94], [70, 71, 72]]
LENGTHS = [9, 4, 12, 2, 7]
VOCABULARY = 278
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    # Attention and positions then matter as much as they do in a trained model.
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=1,
)
GROUPED = COMMON | {"num_key_value_heads": 2}
GPT = dict(
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    initializer_range=0.3,
    eos_token_id=0,
    pad_token_id=1,
)
STATES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, eos_token_id=0, pad_token_id=1
)
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# The options of a tiny model, and the route that it should be found to have.
BOTH, CACHE_ONLY, PADDING_ONLY = Route(True, True), Route(True, False), Route(False, True)
NEITHER = Route(False, False)
MODELS = {
    "llama": (GROUPED, BOTH),
    "qwen2": (GROUPED, BOTH),
    "qwen3": (GROUPED, BOTH),
    "phi": (COMMON, BOTH),
    "mistral": (GROUPED | {"sliding_window": 4}, BOTH),
    "gemma2": (GROUPED | HALF_SLIDING | {"head_dim": 8}, BOTH),
    "gemma3_text": (GROUPED | HALF_SLIDING | {"head_dim": 8}, BOTH),
    "gpt_neox": (COMMON, BOTH),
    "gpt2": (GPT, BOTH),
    "gptj": (GPT | {"rotary_dim": 4}, BOTH),
    "opt": (COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}, BOTH),
    "bloom": (STATES | {"n_layer": 2, "n_head": 4, "initializer_range": 0.3}, BOTH),
    "falcon": (COMMON | {"alibi": False}, BOTH),
    "qwen2_moe": (GROUPED | {"num_experts": 4, "moe_intermediate_size": 16}, BOTH),
    "jamba": (
        GROUPED
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
        | {"mamba_dt_rank": 4, "num_experts": 2},
        BOTH,
    ),
    "mamba": (STATES | {"state_size": 4, "initializer_range": 0.3}, CACHE_ONLY),
    "bart": (
        dict(vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4)
        | {"decoder_ffn_dim": 48, "max_position_embeddings": 64, "is_decoder": True}
        | {"is_encoder_decoder": False, "init_std": 0.3, "eos_token_id": 0, "pad_token_id": 1},
        CACHE_ONLY,
    ),
    "openai-gpt": (GPT, PADDING_ONLY),
    "rwkv": (STATES | {"attention_hidden_size": 32, "context_length": 64}, NEITHER),
    "reformer": (
        dict(vocab_size=VOCABULARY, hidden_size=32, attention_head_size=8, num_attention_heads=4)
        | {"attn_layers": ["local", "local"], "local_attn_chunk_length": 8, "is_decoder": True}
        | {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "feed_forward_size": 48}
        | {"max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 1},
        NEITHER,
    ),
}


def build(kind):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind][0])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embed" not in name and weight.std() < 0.1:
                weight.normal_(std=0.2)
    return model


@torch.no_grad()
def expected_logprobs(model, prompt, ids, temperature=1.0):
    """Of `ids` after `prompt`: one forward pass of the one sequence, without padding or a cache."""
    logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, :, :VOCABULARY].float()
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]


def check_logprobs(engine, rollout, prompts, atol=2e-5):
    ids = rollout.completion_ids()
    for i, prompt in enumerate(prompts):
        expected = expected_logprobs(engine.model, prompt, ids[i])
        torch.testing.assert_close(rollout.logprobs[i, : len(ids[i])], expected, atol=atol, rtol=0)


def lengths(*counts, **options):
    return [Sampling(count, ignore_eos=True, **options) for count in counts]
