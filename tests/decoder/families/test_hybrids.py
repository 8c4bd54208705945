"""Bamba and Granite 4: Mamba-2 and attention in one stack, experts and a shared expert, the multipliers."""

import json
from typing import Any

import pytest
import torch
from transformers import BambaConfig, GraniteMoeHybridConfig

from mm.decoder.decoder import Decoder
from mm.decoder.families import bamba, granite_hybrid
from mm.fusion.splice import splice
from mm.parts import build
from mm.testing import element_batch

from .parity import Case, FamilyChecks

MAMBA: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_state": 7,
    "mamba_n_groups": 3,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
}


def bamba_config(**changes: Any) -> BambaConfig:
    sizes: dict[str, Any] = {
        "intermediate_size": 50,
        "attn_layer_indices": [1],
        "pad_token_id": None,
        "max_position_embeddings": 64,
    }
    # heads of 8: transformers turns half of a head in pairs, so a width of 6 has no whole number of them
    every: dict[str, Any] = {**SIZES, **MAMBA, **sizes, "hidden_size": 48, **changes}
    return BambaConfig(**every)


def granite_config(**changes: Any) -> GraniteMoeHybridConfig:
    # 28: transformers' grouped product wants rows of a multiple of 16 bytes
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    sizes: dict[str, Any] = {
        "intermediate_size": 28,
        "shared_intermediate_size": 38,
        "num_local_experts": 5,
        "layer_types": kinds,
    }
    scales: dict[str, Any] = {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    }
    every: dict[str, Any] = {**SIZES, **MAMBA, **sizes, **scales, **changes}
    return GraniteMoeHybridConfig(**every)


def plain(config: Any) -> dict[str, Any]:
    """As config.json holds it."""
    return json.loads(config.to_json_string())


class TestBamba(FamilyChecks):
    cases = {
        "odd": Case(bamba_config(), length=80, gradients=True),
        "tied": Case(bamba_config(tie_word_embeddings=True, mamba_conv_bias=False, attn_layer_indices=[0, 2])),
    }


class TestGranite(FamilyChecks):
    cases = {
        "experts": Case(granite_config(), length=40, gradients=True),
        "dense": Case(
            granite_config(
                num_local_experts=0, num_experts_per_tok=0, position_embedding_type="rope", tie_word_embeddings=True
            )
        ),
    }


def test_published_spellings() -> None:
    """Files on the hub: other names for the kinds of layers, `nope`, a rotary fraction that goes without saying."""
    published = plain(granite_config()) | {
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
        "normalization_function": "rmsnorm",
        "init_method": "mup",
        "rope_parameters": None,
        "rope_theta": 10000,
    }
    tree, _ = granite_hybrid.FAMILY.read(published, "config.json")
    assert tree["init_args"]["layers"] == [
        {"pattern": ["ssm/moe", "attention/moe", "ssm/moe"], "repeat": 1},
    ]
    assert tree["init_args"]["mixers"]["attention"]["init_args"]["positions"] is None
    published = plain(bamba_config()) | {"attn_rotary_emb": 4, "rope_parameters": None, "rope_theta": 10000.0}
    tree, _ = bamba.FAMILY.read(published, "config.json")
    assert tree["init_args"]["mixers"]["attention"]["init_args"]["positions"]["init_args"]["fraction"] == 0.5


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (bamba, {"attn_rotary_emb": 6}, "attn_rotary_emb = 6: only half a head's width, 4"),
        (bamba, {"attn_layer_indices": [3]}, "attn_layer_indices .* 0 to 2"),
        (bamba, {"mamba_n_heads": 7, "mamba_d_head": 16}, "mamba_n_heads = 7"),
        (bamba, {"attention_bias": True}, "attention_bias"),
        (granite_hybrid, {"layer_types": ["mamba", "conv", "mamba"]}, "layer_types"),
        (granite_hybrid, {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
        (granite_hybrid, {"mamba_what": 1}, "mamba_what = 1: this setting is not supported"),
    ],
)
def test_what_is_refused(family: Any, change: dict[str, Any], message: str) -> None:
    config = bamba_config() if family is bamba else granite_config()
    with pytest.raises(ValueError, match=message):
        family.FAMILY.read(plain(config) | change, "config.json")


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    """The published layers read packed rows as one document; ours start each afresh."""
    torch.manual_seed(0)
    tree, _ = granite_hybrid.FAMILY.read(plain(granite_config()), "config.json")
    decoder = build(tree, Decoder).eval()
    slots = torch.nn.Embedding(3, decoder.width)
    words = [(1, 0, "5"), (1, 0, "6"), (2, 0, "7"), (2, 0, "8"), (2, 0, "9")]
    packed, alone = (
        decoder(splice(element_batch([row]), decoder.embed, {}, slots))[0]
        for row in (words, [(1, 0, i) for i in "789"])
    )
    torch.testing.assert_close(packed[:, 2:], alone, atol=1e-5, rtol=1e-4)
