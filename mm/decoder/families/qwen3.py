"""Qwen3 (Qwen Team 2025, arXiv 2505.09388): no biases, but each head of the queries and keys normalised."""

from __future__ import annotations

from typing import Any

from mm.decoder.families.llama import attention, attention_rules, dense_tree, norms, stem, swiglu, swiglu_rules
from mm.decoder.families.qwen2 import windowed
from mm.decoder.interchange.family import Family, Tree, part
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, same


def decoder(s: Settings) -> Tree:
    s.only("mlp_bias", False)
    s.assume("head_dim", 128)  # whatever width and heads are
    kinds, window = windowed(s)
    mixers = {kind: attention(s, window=window.get(kind), **head_norms(s)) for kind in dict.fromkeys(kinds)}
    return dense_tree(s, mixers, [f"{kind}/dense" for kind in kinds], {"dense": swiglu(s)})


def weights(s: Settings) -> list[Rule]:
    rules = [*norms(), *attention_rules(s), *head_norm_rules(), *swiglu_rules(s)]
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), rules)]


def head_norms(s: Settings, eps: float = 1e-6) -> dict[str, Any]:
    norm = part("mm.decoder.attention.grouped.QKNorm", kind="head", eps=s.number("rms_norm_eps", eps))
    return {"qk_norm": norm}


def head_norm_rules() -> list[Rule]:
    return [same(f"layers.{{i}}.mixer.{x}_norm.weight", f"model.layers.{{i}}.self_attn.{x}_norm.weight") for x in "qk"]


FAMILY = Family("qwen3", "Qwen3ForCausalLM", decoder, weights)
