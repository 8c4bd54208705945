"""Granite 4 (IBM 2025): Mamba-2 layers with a few layers of attention, each followed by experts and a shared expert.

The small models have no experts: the shared one is then a plain SwiGLU.
"""

from __future__ import annotations

from mm.decoder.families import llama, mamba2
from mm.decoder.interchange.family import Family, Tree, decoder_tree, part, rms_block
from mm.decoder.interchange.rope import rotary
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, constant, layers, same


def decoder(s: Settings) -> Tree:
    s.only("hidden_act", "silu")
    s.only("attention_bias", False)
    s.only("normalization_function", "rmsnorm")
    s.read.add("init_method")  # how weights began
    eps = s.number("rms_norm_eps", 1e-6)
    attention = part(
        "mm.decoder.attention.grouped.GroupedAttention",
        heads=s.integer("num_attention_heads"),
        kv_heads=s.integer("num_key_value_heads", s.integer("num_attention_heads")),
        head_dim=llama.head_dim(s),
        scores=part("mm.decoder.attention.grouped.Scores", scale=s.number("attention_multiplier", 1.0)),
    )
    positions = rotary(s)  # read in any case: files without rotary positions keep its settings
    attention["init_args"]["positions"] = positions if _is_rotary(s) else None
    ffn = "moe" if _experts(s) else "dense"
    return decoder_tree(
        width=s.integer("hidden_size"),
        mixers={"ssm": mamba2.hybrid_mixer(s, eps), "attention": attention},
        ffns={ffn: _feed_forward(s)},
        layers=[f"attention/{ffn}" if attend else f"ssm/{ffn}" for attend in _attends(s)],
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", False),
        block=rms_block(eps, residual_scale=s.number("residual_multiplier", 1.0)),
        embedding=part("mm.decoder.embedding.Embedding", scale=s.number("embedding_multiplier", 1.0)),
        head=part("mm.decoder.embedding.Head", scale=1 / s.number("logits_scaling", 1.0)),
    )


def weights(s: Settings) -> list[Rule]:
    ours, theirs, attends = "layers.{i}.", "model.layers.{i}.", _attends(s)
    every = [*llama.norms(), *_feed_forward_rules(f"{ours}ffn.", theirs, _experts(s) > 0)]
    ssm = mamba2.mixer_rules(f"{theirs}mamba.", s.flag("mamba_proj_bias", False), s.flag("mamba_conv_bias", True))
    return [
        *llama.stem(),
        *layers(range(len(attends)), every),
        *layers((i for i, attend in enumerate(attends) if attend), llama.attention_rules(s)),
        *layers((i for i, attend in enumerate(attends) if not attend), ssm),
    ]


def _feed_forward(s: Settings) -> Tree:
    shared = s.integer("shared_intermediate_size", 1024)
    hidden, chosen = s.integer("intermediate_size"), s.integer("num_experts_per_tok", 2)
    if not _experts(s):
        return part("mm.decoder.ffn.dense.GatedFFN", hidden=shared)
    return part(
        "mm.decoder.ffn.moe.SparseMoE",
        hidden=hidden,
        num_experts=_experts(s),
        experts_per_token=chosen,
        shared_hidden=shared,
    )


def _feed_forward_rules(ours: str, theirs: str, experts: bool) -> list[Rule]:
    """Gate and up stand one below the other on both sides, the gate first."""
    shared = f"{ours}shared." if experts else ours
    rules = [
        same(f"{shared}gate_up.weight", f"{theirs}shared_mlp.input_linear.weight"),
        same(f"{shared}down.weight", f"{theirs}shared_mlp.output_linear.weight"),
    ]
    if experts:
        rules += [
            same(f"{ours}router.weight", f"{theirs}block_sparse_moe.router.layer.weight"),
            constant(f"{ours}router.bias", 0.0),
            same(f"{ours}experts.gate_up", f"{theirs}block_sparse_moe.input_linear.weight"),
            same(f"{ours}experts.down", f"{theirs}block_sparse_moe.output_linear.weight"),
        ]
    return rules


def _experts(s: Settings) -> int:
    return s.integer("num_local_experts", 8)


def _is_rotary(s: Settings) -> bool:
    word = s.text("position_embedding_type", None)
    if word not in (None, "nope", "rope"):
        s.refuse("position_embedding_type", "must be rope, nope or null")
    return word == "rope"


def _attends(s: Settings) -> list[bool]:
    """Per layer: whether it is attention. Files call the kinds by two pairs of names."""
    count = s.integer("num_hidden_layers")
    kinds = s.items("layer_types", None) or s.items("layers_block_type", None) or ["mamba"] * count
    names = {"attention": True, "full_attention": True, "mamba": False, "linear_attention": False}
    if len(kinds) != count or any(kind not in names for kind in kinds):
        s.refuse("layer_types", f"must be {count} of {', '.join(names)}")
    return [names[kind] for kind in kinds]


FAMILY = Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", decoder, weights)
