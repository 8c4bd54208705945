"""Llama: grouped heads of odd width, biases, tied and untied, RoPE scalings past the original length."""

from typing import Any

from transformers import LlamaConfig

from .parity import Case, FamilyChecks

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


def config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 50,
    }
    rest: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 97, "max_position_embeddings": 32}
    return LlamaConfig(**(sizes | rest | changes))


class TestLlama(FamilyChecks):
    cases = {
        "odd": Case(config(), gradients=True),
        "tied_biased": Case(config(tie_word_embeddings=True, head_dim=None, attention_bias=True, mlp_bias=True)),
        "llama3": Case(config(rope_parameters=LLAMA3, num_key_value_heads=6), length=40),
        "linear": Case(config(rope_parameters=LINEAR, num_key_value_heads=1), length=40),
        "yarn": Case(config(rope_parameters=YARN, num_hidden_layers=3), length=40),
    }
