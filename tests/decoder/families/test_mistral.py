"""Mistral and Mixtral: sliding windows shorter than the rows, experts whose number is odd."""

from typing import Any

from transformers import MistralConfig, MixtralConfig

from .parity import Case, FamilyChecks

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 26,
    "num_hidden_layers": 2,
    "vocab_size": 97,
}


class TestMistral(FamilyChecks):
    cases = {
        "window": Case(MistralConfig(**SIZES, sliding_window=7, head_dim=10), length=30),
        "no_window": Case(MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True)),
    }


class TestMixtral(FamilyChecks):
    cases = {
        "five_experts": Case(MixtralConfig(**SIZES, num_local_experts=5, head_dim=8), gradients=True),
        "window": Case(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=1, sliding_window=5), length=20),
    }
