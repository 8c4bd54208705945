"""Qwen3-MoE (Qwen Team 2025, arXiv 2505.09388): Qwen3 with experts in all layers, or in all but some, none shared."""

from __future__ import annotations

from mm.decoder.families.llama import (
    attention,
    attention_rules,
    dense_tree,
    moe_rules,
    norms,
    stem,
    swiglu,
    swiglu_rules,
)
from mm.decoder.families.qwen3 import head_norm_rules, head_norms
from mm.decoder.interchange.family import Family, Tree, part
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers


def decoder(s: Settings) -> Tree:
    s.only("mlp_bias", False)
    window = s.integer("sliding_window", 4096) if s.flag("use_sliding_window", False) else None
    s.read.update(("sliding_window", "max_window_layers"))  # the first counts only where it is used; the other never
    moe = part(
        "mm.decoder.ffn.moe.SparseMoE",
        hidden=s.integer("moe_intermediate_size", 768),
        num_experts=s.integer(s.one_of("num_experts", "num_local_experts"), 128),
        experts_per_token=s.integer("num_experts_per_tok", 8),
        gate="chosen" if s.flag("norm_topk_prob", False) else "all",
    )
    ffns = {"dense": swiglu(s), "moe": moe}
    kinds = feed_forward(s)
    mixer = "full" if window is None else "window"
    mixers = {mixer: attention(s, window=window, **head_norms(s))}
    used = {kind: ffns[kind] for kind in dict.fromkeys(kinds)}
    return dense_tree(s, mixers, [f"{mixer}/{kind}" for kind in kinds], used)


def weights(s: Settings) -> list[Rule]:
    count, hidden = (
        s.integer(s.one_of("num_experts", "num_local_experts"), 128),
        s.integer("moe_intermediate_size", 768),
    )
    moe = moe_rules("model.layers.{i}.mlp.", count, hidden, gate="gate_proj", up="up_proj", down="down_proj")
    kinds = feed_forward(s)
    return [
        *stem(),
        *layers(range(len(kinds)), [*norms(), *attention_rules(s), *head_norm_rules()]),
        *layers([i for i, kind in enumerate(kinds) if kind == "dense"], swiglu_rules(s)),
        *layers([i for i, kind in enumerate(kinds) if kind == "moe"], moe),
    ]


def feed_forward(s: Settings) -> list[str]:
    """ "dense" or "moe" for every layer: every `decoder_sparse_step`-th has experts, but not those listed as dense."""
    step, dense = s.integer("decoder_sparse_step", 1), s.items("mlp_only_layers", [])
    count = s.integer("num_hidden_layers")
    return ["moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(count)]


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", decoder, weights)
