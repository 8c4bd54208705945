"""Command R (Cohere 2024) and Command A (cohere2, arXiv 2504.00698): attention and FFN side by side, one norm.

cohere2 has no q/k norm; its local layers are rotary, and every fourth layer sees everything and has no positions.
"""

from __future__ import annotations

from typing import Any

from mm.decoder.families.gemma2 import window_kinds
from mm.decoder.families.llama import attention_rules, head_dim, stem, swiglu, swiglu_rules
from mm.decoder.interchange.family import Family, Tree, decoder_tree, part
from mm.decoder.interchange.rope import rotary
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, same


def decoder(s: Settings) -> Tree:
    norm = None
    if s.flag("use_qk_norm", False):
        eps = s.number("layer_norm_eps", 1e-5)
        norm = part("mm.decoder.attention.grouped.QKNorm", kind="head_layer", eps=eps)
    mixer = _attention(s, qk_norm=norm or False, positions=rotary(s, 500_000.0, pairs="adjacent"))
    return _tree(s, {"full": mixer}, ["full"] * s.integer("num_hidden_layers"))


def decoder2(s: Settings) -> Tree:
    s.read.add("rotary_pct")  # 1 in the published files, which also say partial_rotary_factor nowhere
    kinds = window_kinds(s, every=s.integer("sliding_window_pattern", 4))
    mixers = {
        "local": _attention(
            s, window=s.integer("sliding_window", 4096), positions=rotary(s, 10_000.0, pairs="adjacent")
        ),
        "full": _attention(s, positions=None),
    }
    return _tree(s, {kind: mixers[kind] for kind in dict.fromkeys(kinds)}, kinds)


def _attention(s: Settings, **more: Any) -> Tree:
    arguments: dict[str, Any] = {
        "heads": s.integer("num_attention_heads"),
        "kv_heads": s.integer("num_key_value_heads", s.integer("num_attention_heads")),
        "head_dim": head_dim(s),
        "bias": s.flag("attention_bias", False),
    }
    # Not by `part`, which leaves None to the default: positions that are None are none.
    return {"class_path": "mm.decoder.attention.grouped.GroupedAttention", "init_args": {**arguments, **more}}


def _tree(s: Settings, mixers: dict[str, Tree], kinds: list[str]) -> Tree:
    norm = part("mm.decoder.norms.LayerNorm", eps=s.number("layer_norm_eps", 1e-5), bias=False)
    return decoder_tree(
        width=s.integer("hidden_size"),
        mixers=mixers,
        ffns={"dense": swiglu(s)},
        layers=[f"{kind}/dense" for kind in kinds],
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", True),
        block={"norm": norm, "arrangement": "parallel"},
        head={"scale": s.number("logit_scale", 0.0625)},
    )


def weights(s: Settings) -> list[Rule]:
    bias = s.flag("attention_bias", False)
    each = [
        same("layers.{i}.mixer_norm.weight", "model.layers.{i}.input_layernorm.weight"),
        *attention_rules(s, bias=bias, out_bias=bias),
        *swiglu_rules(s),
    ]
    if s.values.get("model_type") == "cohere" and s.flag("use_qk_norm", False):
        each += [
            same(f"layers.{{i}}.mixer.{name}.weight", f"model.layers.{{i}}.self_attn.{name}.weight")
            for name in ("q_norm", "k_norm")
        ]
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), each)]


FAMILIES = [
    Family("cohere", "CohereForCausalLM", decoder, weights),
    Family("cohere2", "Cohere2ForCausalLM", decoder2, weights),
]
