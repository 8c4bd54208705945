"""OLMoE: norms over all heads, gates that are not normalised, clipped queries, keys and values."""

from typing import Any

from transformers import OlmoeConfig

from .parity import Case, FamilyChecks

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "num_attention_heads": 6,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "eos_token_id": None,
    "pad_token_id": None,  # or the reference gives that row of the embedding no gradient
}


class TestOlmoe(FamilyChecks):
    cases = {
        "clipped": Case(OlmoeConfig(**SIZES, num_key_value_heads=2, clip_qkv=0.8), gradients=True),
        "normalised": Case(OlmoeConfig(**SIZES, norm_topk_prob=True, tie_word_embeddings=True, attention_bias=True)),
    }
