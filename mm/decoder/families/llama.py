"""Llama 1 to 3.x (Touvron et al. 2023, arXiv 2307.09288; Llama Team 2024, arXiv 2407.21783) and what is built alike."""

from __future__ import annotations

from typing import Any

from mm.decoder.interchange.family import Family, Tree, decoder_tree, part, rms_block
from mm.decoder.interchange.rope import rotary
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, constant, fused, layers, same, stacked


def decoder(s: Settings) -> Tree:
    return dense_tree(s, {"full": attention(s)}, ["full/dense"] * s.integer("num_hidden_layers"))


def weights(s: Settings) -> list[Rule]:
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), [*norms(), *attention_rules(s), *swiglu_rules(s)])]


# What the families built like Llama share.


def head_dim(s: Settings) -> int:
    width, heads = s.integer("hidden_size"), s.integer("num_attention_heads")
    given = s.integer("head_dim", None)
    if given is None and width % heads:
        s.refuse("num_attention_heads", f"does not divide hidden_size {width}, and head_dim is not given")
    return given or width // heads


def attention(s: Settings, theta: float = 10_000.0, **more: Any) -> Tree:
    """Grouped-query attention with rotary positions, biases in all four matrices or in none."""
    arguments = {"positions": rotary(s, theta), "bias": s.flag("attention_bias", False)}
    return part(
        "mm.decoder.attention.grouped.GroupedAttention",
        heads=s.integer("num_attention_heads"),
        kv_heads=s.integer("num_key_value_heads", s.integer("num_attention_heads")),
        head_dim=head_dim(s),
        **(arguments | more),
    )


def swiglu(s: Settings) -> Tree:
    s.only("hidden_act", "silu")
    hidden, bias = s.integer("intermediate_size"), s.flag("mlp_bias", False)
    return part("mm.decoder.ffn.dense.GatedFFN", hidden=hidden, bias=bias)


def dense_tree(
    s: Settings, mixers: dict[str, Tree], kinds: list[str], ffns: dict[str, Tree] | None = None, eps: float = 1e-6
) -> Tree:
    """A pre-norm decoder of these parts; `eps` is the family's default, for files that do not say."""
    return decoder_tree(
        width=s.integer("hidden_size"),
        mixers=mixers,
        ffns={"dense": swiglu(s)} if ffns is None else ffns,
        layers=kinds,
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", False),
        block=rms_block(s.number("rms_norm_eps", eps)),
    )


def stem() -> list[Rule]:
    return [
        same("embed.weight", "model.embed_tokens.weight"),
        same("norm.weight", "model.norm.weight"),
        same("head.weight", "lm_head.weight"),
    ]


def norms() -> list[Rule]:
    return [
        same("layers.{i}.mixer_norm.weight", "model.layers.{i}.input_layernorm.weight"),
        same("layers.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    ]


def attention_rules(s: Settings, bias: bool | None = None, out_bias: bool | None = None) -> list[Rule]:
    """q, k and v as one matrix, and biases: where the settings say so, or as given."""
    dim, heads = head_dim(s), s.integer("num_attention_heads")
    kv = s.integer("num_key_value_heads", heads) * dim
    bias = s.flag("attention_bias", False) if bias is None else bias
    theirs, rules = "model.layers.{i}.self_attn.", []
    for kind in ("weight", "bias") if bias else ("weight",):
        names = [f"{theirs}{name}_proj.{kind}" for name in "qkv"]
        rules.append(fused(f"layers.{{i}}.mixer.qkv.{kind}", names, rows=[heads * dim, kv, kv]))
    for kind in ("weight", "bias") if (bias if out_bias is None else out_bias) else ("weight",):
        rules.append(same(f"layers.{{i}}.mixer.out.{kind}", f"{theirs}o_proj.{kind}"))
    return rules


def swiglu_rules(s: Settings) -> list[Rule]:
    theirs, hidden = "model.layers.{i}.mlp.", s.integer("intermediate_size")
    rules = []
    for kind in ("weight", "bias") if s.flag("mlp_bias", False) else ("weight",):
        names = [f"{theirs}gate_proj.{kind}", f"{theirs}up_proj.{kind}"]
        rules.append(fused(f"layers.{{i}}.ffn.gate_up.{kind}", names, rows=[hidden, hidden]))
        rules.append(same(f"layers.{{i}}.ffn.down.{kind}", f"{theirs}down_proj.{kind}"))
    return rules


def moe_rules(theirs: str, count: int, hidden: int, gate: str, up: str, down: str) -> list[Rule]:
    """Experts stored one by one under `theirs`, and a softmax router, which has no selection bias."""
    each = theirs + "experts.{e}."
    gate_up = [f"{each}{gate}.weight", f"{each}{up}.weight"]
    return [
        same("layers.{i}.ffn.router.weight", f"{theirs}gate.weight"),
        constant("layers.{i}.ffn.router.bias", 0.0),
        stacked("layers.{i}.ffn.experts.gate_up", gate_up, count, rows=[hidden, hidden]),
        stacked("layers.{i}.ffn.experts.down", [f"{each}{down}.weight"], count),
    ]


FAMILY = Family("llama", "LlamaForCausalLM", decoder, weights)
