"""DeepSeek-V2 (arXiv 2405.04434): latent attention, shared experts, softmax routing, in groups for the large model."""

from __future__ import annotations

from typing import Any

from mm.decoder.families.llama import norms, stem
from mm.decoder.interchange.family import Family, Tree, decoder_tree, part, rms_block
from mm.decoder.interchange.rope import rotary
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, constant, fused, layers, same, stacked
from mm.decoder.rope_scaling import yarn_mscale

OURS, THEIRS = "layers.{i}.", "model.layers.{i}."


def decoder(s: Settings) -> Tree:
    s.only("mlp_bias", False)
    return stack(s, latent_attention(s), experts(s, router(s)))


def weights(s: Settings) -> list[Rule]:
    bias = constant(f"{OURS}ffn.router.bias", 0.0)
    return [*stem(), *layer_rules(s, [*expert_rules(s), bias])]


def router(s: Settings) -> Tree:
    # DeepSeek's own code normalises the chosen weights where this is set, transformers' does not; no release sets it.
    s.only("norm_topk_prob", False)
    s.only("scoring_func", "softmax")
    grouped = s.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, default="greedy")
    groups, groups_chosen = s.integer("n_group", 1), s.integer("topk_group", 1)
    return part(
        "mm.decoder.ffn.routers.topk.TopKRouter",
        gate="all",
        scale=s.number("routed_scaling_factor", 1.0),
        groups=groups if grouped else None,
        groups_chosen=groups_chosen if grouped else None,
    )


# --- what V2 and V3 share -----------------------------------------------------------------------------------------


def stack(s: Settings, mixer: Tree, moe: Tree, **more: Any) -> Tree:
    """Dense layers first, then mixtures of experts."""
    dense, total = dense_layers(s), s.integer("num_hidden_layers")
    hidden = s.integer("intermediate_size")
    s.only("hidden_act", "silu")
    ffns = {"dense": part("mm.decoder.ffn.dense.GatedFFN", hidden=hidden), "moe": moe}
    return decoder_tree(
        width=s.integer("hidden_size"),
        mixers={"latent": mixer},
        ffns={kind: ffns[kind] for kind, there in (("dense", dense > 0), ("moe", dense < total)) if there},
        layers=["latent/dense"] * dense + ["latent/moe"] * (total - dense),
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", False),
        block=rms_block(s.number("rms_norm_eps", 1e-6)),
        **more,
    )


def dense_layers(s: Settings) -> int:
    """How many layers have a dense feed-forward part."""
    s.only("moe_layer_freq", 1)
    return min(s.integer("first_k_dense_replace"), s.integer("num_hidden_layers"))


def latent_attention(s: Settings, pairs: str = "adjacent") -> Tree:
    heads = s.integer("num_attention_heads")
    s.only("num_key_value_heads", heads)
    nope, rope = s.integer("qk_nope_head_dim", 128), s.integer("qk_rope_head_dim", 64)
    s.only("head_dim", rope)  # as transformers writes the two
    s.only("qk_head_dim", nope + rope)
    positions = rotary(s, pairs=pairs)
    return part(
        "mm.decoder.attention.latent.LatentAttention",
        heads=heads,
        kv_rank=s.integer("kv_lora_rank", 512),
        q_rank=s.integer("q_lora_rank", None),
        nope_dim=nope,
        rope_dim=rope,
        v_dim=s.integer("v_head_dim", 128),
        positions=positions,
        scale=score_scale(positions, nope + rope),
        bias=s.flag("attention_bias", False) or None,
    )


def score_scale(positions: Tree, dim: int) -> float | None:
    """YaRN's temperature, which DeepSeek puts into the scores; None where there is none."""
    scaling = positions["init_args"].get("scaling")
    if scaling is None or not scaling.get("mscale_all_dim"):
        return None
    return dim**-0.5 * yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def experts(s: Settings, router: Tree) -> Tree:
    return part(
        "mm.decoder.ffn.moe.SparseMoE",
        hidden=s.integer("moe_intermediate_size"),
        num_experts=s.integer("n_routed_experts"),
        experts_per_token=s.integer("num_experts_per_tok"),
        shared=s.integer("n_shared_experts"),
        router=router,
    )


def layer_rules(s: Settings, moe: list[Rule]) -> list[Rule]:
    total = s.integer("num_hidden_layers")
    dense = dense_layers(s)
    every = [*norms(), *latent_rules(s)]
    gated = swiglu_rules("ffn", "mlp", s.integer("intermediate_size"))
    return [*layers(range(total), every), *layers(range(dense), gated), *layers(range(dense, total), moe)]


def latent_rules(s: Settings) -> list[Rule]:
    ours, theirs = f"{OURS}mixer.", f"{THEIRS}self_attn."
    bias = s.flag("attention_bias", False)
    pairs = [("kv_down", "kv_a_proj_with_mqa", bias), ("kv_up", "kv_b_proj", False), ("out", "o_proj", bias)]
    pairs.append(("kv_norm", "kv_a_layernorm", False))
    if s.integer("q_lora_rank", None) is None:
        pairs.append(("q", "q_proj", False))
    else:
        pairs += [("q_down", "q_a_proj", bias), ("q_norm", "q_a_layernorm", False), ("q", "q_b_proj", False)]
    return [
        same(f"{ours}{our}.{kind}", f"{theirs}{their}.{kind}")
        for our, their, biased in pairs
        for kind in (("weight", "bias") if biased else ("weight",))
    ]


def expert_rules(s: Settings) -> list[Rule]:
    """Router, routed experts and the shared ones, which are stored as one."""
    hidden, count = s.integer("moe_intermediate_size"), s.integer("n_routed_experts")
    ours, theirs = f"{OURS}ffn.", f"{THEIRS}mlp."
    each = f"{theirs}experts.{{e}}."
    gate_up = [f"{each}gate_proj.weight", f"{each}up_proj.weight"]
    rules = [
        same(f"{ours}router.weight", f"{theirs}gate.weight"),
        stacked(f"{ours}experts.gate_up", gate_up, count=count, rows=[hidden, hidden]),
        stacked(f"{ours}experts.down", [f"{each}down_proj.weight"], count=count),
    ]
    shared = s.integer("n_shared_experts")
    return rules + (swiglu_rules("ffn.shared", "mlp.shared_experts", shared * hidden) if shared else [])


def swiglu_rules(ours: str, theirs: str, hidden: int) -> list[Rule]:
    gate_up = [f"{THEIRS}{theirs}.{name}_proj.weight" for name in ("gate", "up")]
    return [
        fused(f"{OURS}{ours}.gate_up.weight", gate_up, rows=[hidden, hidden]),
        same(f"{OURS}{ours}.down.weight", f"{THEIRS}{theirs}.down_proj.weight"),
    ]


FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", decoder, weights)
