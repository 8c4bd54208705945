"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): experts in all layers, queries and keys normalised as a whole."""

from __future__ import annotations

from mm.decoder.families.llama import attention, attention_rules, dense_tree, moe_rules, norms, stem
from mm.decoder.families.qwen3 import head_norm_rules
from mm.decoder.interchange.family import Family, Tree, part
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers


def decoder(s: Settings) -> Tree:
    s.only("hidden_act", "silu")
    moe = part(
        "mm.decoder.ffn.moe.SparseMoE",
        hidden=s.integer("intermediate_size"),
        num_experts=s.integer(s.one_of("num_experts", "num_local_experts"), 64),
        experts_per_token=s.integer("num_experts_per_tok", 8),
        gate="chosen" if s.flag("norm_topk_prob", False) else "all",
    )
    norm = part("mm.decoder.attention.grouped.QKNorm", kind="full", eps=s.number("rms_norm_eps", 1e-5))
    mixers = {"full": attention(s, qk_norm=norm, clip_qkv=s.number("clip_qkv", None))}
    return dense_tree(s, mixers, ["full/moe"] * s.integer("num_hidden_layers"), {"moe": moe}, eps=1e-5)


def weights(s: Settings) -> list[Rule]:
    count, hidden = s.integer(s.one_of("num_experts", "num_local_experts"), 64), s.integer("intermediate_size")
    moe = moe_rules("model.layers.{i}.mlp.", count, hidden, gate="gate_proj", up="up_proj", down="down_proj")
    rules = [*norms(), *attention_rules(s), *head_norm_rules(), *moe]
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), rules)]


FAMILY = Family("olmoe", "OlmoeForCausalLM", decoder, weights)
