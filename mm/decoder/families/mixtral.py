"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with experts, top-2 by a softmax over the chosen."""

from __future__ import annotations

from mm.decoder.families.llama import attention, attention_rules, dense_tree, moe_rules, norms, stem
from mm.decoder.interchange.family import Family, Tree, part
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers


def decoder(s: Settings) -> Tree:
    s.only("attention_bias", False)
    s.only("hidden_act", "silu")
    window = s.integer("sliding_window", None)
    kind = "full" if window is None else "window"
    moe = part(
        "mm.decoder.ffn.moe.SparseMoE",
        hidden=s.integer("intermediate_size"),
        num_experts=s.integer("num_local_experts", 8),
        experts_per_token=s.integer("num_experts_per_tok", 2),
        gate="chosen",
    )
    mixers = {kind: attention(s, theta=1_000_000.0, window=window)}
    return dense_tree(s, mixers, [f"{kind}/moe"] * s.integer("num_hidden_layers"), {"moe": moe}, eps=1e-5)


def weights(s: Settings) -> list[Rule]:
    count, hidden = s.integer("num_local_experts", 8), s.integer("intermediate_size")
    moe = moe_rules("model.layers.{i}.block_sparse_moe.", count, hidden, gate="w1", up="w3", down="w2")
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), [*norms(), *attention_rules(s), *moe])]


FAMILY = Family("mixtral", "MixtralForCausalLM", decoder, weights)
