"""Qwen2, Qwen3 and Qwen3-MoE: biases, head norms, windows in some layers, dense layers among sparse ones."""

from typing import Any

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from .parity import Case, FamilyChecks

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 26,
    "num_hidden_layers": 3,
    "vocab_size": 97,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 6}


class TestQwen2(FamilyChecks):
    cases = {
        "biased": Case(Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "window_above": Case(Qwen2Config(**SIZES, **WINDOW, max_window_layers=1), length=20),
    }


class TestQwen3(FamilyChecks):
    cases = {
        "odd": Case(Qwen3Config(**SIZES, head_dim=10, rope_parameters=YARN), length=40, gradients=True),
        "tied_window": Case(
            Qwen3Config(
                **SIZES, **WINDOW, head_dim=8, max_window_layers=2, tie_word_embeddings=True, attention_bias=True
            )
        ),
    }


# The class takes head_dim, though it does not declare it.
MOE: dict[str, Any] = {"num_experts_per_tok": 3, "moe_intermediate_size": 14, "head_dim": 10}


class TestQwen3Moe(FamilyChecks):
    cases = {
        "five_experts": Case(Qwen3MoeConfig(**SIZES, **MOE, num_experts=5, norm_topk_prob=True)),
        "dense_between": Case(Qwen3MoeConfig(**SIZES, **MOE, **WINDOW, num_experts=4, mlp_only_layers=[1])),
    }
