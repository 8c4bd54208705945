"""Gemma 2 and 3: local and global layers past the window, soft caps, norms on both sides, a theta for each kind."""

from typing import Any

import pytest
from transformers import Gemma2Config, Gemma3TextConfig

from mm.decoder.families import gemma2, gemma3

from .parity import Case, FamilyChecks

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 50,
    "vocab_size": 97,
    "sliding_window": 7,
    "query_pre_attn_scalar": 20,
    "max_position_embeddings": 64,
}


def gemma_2(**changes: Any) -> Gemma2Config:
    return Gemma2Config(**{**SIZES, "num_hidden_layers": 3, **changes})


def gemma_3(**changes: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 4, **changes})


class TestGemma2(FamilyChecks):
    cases = {
        "caps_that_bite": Case(gemma_2(attn_logit_softcapping=2.0, final_logit_softcapping=3.0), gradients=True),
        "no_caps_biases_untied": Case(
            gemma_2(
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
                attention_bias=True,
                tie_word_embeddings=False,
            )
        ),
    }


class TestGemma3(FamilyChecks):
    cases = {
        "three_to_one": Case(
            gemma_3(layer_types=["sliding_attention"] * 3 + ["full_attention"], final_logit_softcapping=5.0)
        ),
        "scaled_global": Case(
            gemma_3(
                layer_types=["sliding_attention", "full_attention"] * 2,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            length=40,
        ),
    }


def test_the_older_spelling_of_gemma_3_means_the_same():
    new = gemma_3(
        num_hidden_layers=6,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ).to_diff_dict()
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types", "_sliding_window_pattern")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert gemma3.FAMILY.read(old, "")[0] == gemma3.FAMILY.read(new, "")[0]


def test_the_published_gemma_2_file_has_two_names_for_some_things():
    settings = gemma_2().to_diff_dict() | {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 7}
    assert gemma2.FAMILY.read(settings, "")[0] == gemma2.FAMILY.read(gemma_2().to_diff_dict(), "")[0]


@pytest.mark.parametrize(
    "key,value",
    [
        ("use_bidirectional_attention", True),
        ("hidden_activation", "relu6"),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["chunked_attention"] * 3),
        ("attention_sink", 4),
    ],
)
def test_what_is_refused(key, value):
    with pytest.raises(ValueError, match=f"config.json: {key}"):
        gemma2.FAMILY.read(gemma_2().to_diff_dict() | {key: value}, "config.json")


def test_gemma_3_refuses_the_cap_that_its_reference_does_not_apply():
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        gemma3.FAMILY.read(gemma_3().to_diff_dict() | {"attn_logit_softcapping": 50.0}, "config.json")
