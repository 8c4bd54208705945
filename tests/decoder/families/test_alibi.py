"""BLOOM and MPT: ALiBi over head counts that are powers of two and not, on rows padded on either side."""

from typing import Any

import pytest
from transformers import BloomConfig, MptConfig

from mm.decoder.families import family_of

from .parity import Case, FamilyChecks


def bloom(**changes: Any) -> BloomConfig:
    sizes: dict[str, Any] = {"hidden_size": 36, "n_head": 6, "n_layer": 2, "vocab_size": 97}
    return BloomConfig(**(sizes | changes))


def mpt(**changes: Any) -> MptConfig:
    sizes: dict[str, Any] = {"d_model": 36, "n_heads": 6, "n_layers": 2, "max_seq_len": 64, "vocab_size": 97}
    return MptConfig(**(sizes | changes))


class TestBloom(FamilyChecks):
    cases = {
        "six_heads": Case(bloom(), gradients=True),
        "four_heads_untied": Case(bloom(n_head=4, tie_word_embeddings=False)),
    }


class TestMPT(FamilyChecks):
    cases = {
        "six_heads": Case(mpt()),
        "clipped_scaled": Case(mpt(n_heads=4, attn_config={"clip_qkv": 0.5, "softmax_scale": 0.2})),
    }


def test_the_published_bloom_file_has_the_training_code_s_settings():
    left = {"n_embed": 36, "num_attention_heads": 6, "seq_length": 2048, "skip_bias_add": True, "offset_alibi": 100}
    settings = {k: v for k, v in bloom().to_diff_dict().items() if k not in ("hidden_size", "n_head")}
    assert (
        family_of("bloom", "").read(settings | left, "")[0]
        == family_of("bloom", "").read(bloom().to_diff_dict(), "")[0]
    )


@pytest.mark.parametrize(
    "model_type,key,value",
    [
        ("bloom", "apply_residual_connection_post_layernorm", True),
        ("mpt", "no_bias", False),
        ("mpt", "expansion_ratio", 2),
        ("mpt", "logit_scale", 0.5),
        ("mpt", "attn_config", {"alibi": False}),
        ("mpt", "attn_config", {"qk_ln": True}),
        ("mpt", "attn_config", {"alibi_bias_max": 16}),
    ],
)
def test_what_is_refused(model_type, key, value):
    settings = (bloom() if model_type == "bloom" else mpt()).to_diff_dict()
    name, word = next(iter(value.items())) if isinstance(value, dict) else (key, value)
    with pytest.raises(ValueError, match=f"{name} = {str(word).lower()}"):
        family_of(model_type, "").read(settings | {key: value}, "config.json")
