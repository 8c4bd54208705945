"""Command R: parallel block, adjacent pairs, LayerNorm per head; its successor's layers without positions."""

from typing import Any

import pytest
from transformers import Cohere2Config, CohereConfig

from mm.decoder.families import family_of

from .parity import Case, FamilyChecks

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "logit_scale": 0.25,
    "max_position_embeddings": 64,
}

FOUR_LAYERS: dict[str, Any] = SIZES | {"num_hidden_layers": 4, "sliding_window": 7}


class TestCohere(FamilyChecks):
    cases = {
        "tied": Case(CohereConfig(**SIZES), gradients=True),
        "qk_norm_biases_untied": Case(
            CohereConfig(**SIZES, use_qk_norm=True, attention_bias=True, tie_word_embeddings=False)
        ),
    }


class TestCohere2(FamilyChecks):
    cases = {"nope_layers": Case(Cohere2Config(**FOUR_LAYERS))}


def test_what_is_refused():
    settings = CohereConfig(**SIZES).to_diff_dict()
    with pytest.raises(ValueError, match="hidden_act = 'gelu'"):
        family_of("cohere", "").read(settings | {"hidden_act": "gelu"}, "config.json")
    with pytest.raises(ValueError, match="sliding_window = 7"):  # cohere2's, unknown to cohere
        family_of("cohere", "").read(settings | {"sliding_window": 7}, "config.json")
