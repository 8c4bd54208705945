"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): local and global layers by turns, soft caps, norms on both sides."""

from __future__ import annotations

from typing import Any

from mm.decoder.families.llama import attention, attention_rules, stem
from mm.decoder.interchange.family import Family, Tree, decoder_tree, part, rms_block
from mm.decoder.interchange.rope import rotary
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, fused, layers, same

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
KINDS = {"sliding_attention": "local", "full_attention": "full"}


def decoder(s: Settings) -> Tree:
    if s.has("hidden_act"):  # early files have both, and hidden_activation is the one in force
        s.text("hidden_act")
    s.read.add("sliding_window_size")  # sliding_window's second name in the published files
    scores = score_options(s, cap(s, "attn_logit_softcapping", 50.0))
    positions = rotary(s)
    mixers = {kind: mixer(s, kind, positions, scores=scores) for kind in dict.fromkeys(window_kinds(s, every=2))}
    return gemma_tree(s, mixers, window_kinds(s, every=2), softcap=cap(s, "final_logit_softcapping", 30.0))


def weights(s: Settings) -> list[Rule]:
    return gemma_rules(s, [])


# --- what Gemma 2 and 3 share --------------------------------------------------------------------------------------


def window_kinds(s: Settings, every: int) -> list[str]:
    """ "local" or "full" for each layer: as layer_types says, else every `every`-th one full."""
    count = s.integer("num_hidden_layers")
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    types = s.items("layer_types", default)
    if len(types) != count or not set(types) <= set(KINDS):
        s.refuse("layer_types", f"must be {count} of {', '.join(KINDS)}")
    return [KINDS[kind] for kind in types]


def cap(s: Settings, key: str, default: float) -> float | None:
    """A soft cap: absent, it is the default; null, there is none."""
    return s.number(key, None if key in s.values else default)


def score_options(s: Settings, softcap: float | None) -> Tree:
    scale = s.number("query_pre_attn_scalar", 256.0) ** -0.5
    return part("mm.decoder.attention.grouped.Scores", scale=scale, softcap=softcap)


def mixer(s: Settings, kind: str, positions: Tree, **more: Any) -> Tree:
    window = s.integer("sliding_window", 4096)
    bias = s.flag("attention_bias", False)
    return attention(s, positions=positions, window=window if kind == "local" else None, bias=bias, **more)


def gemma_tree(s: Settings, mixers: dict[str, Tree], kinds: list[str], softcap: float | None) -> Tree:
    width = s.integer("hidden_size")
    s.only("use_bidirectional_attention", False)
    activation = s.choice("hidden_activation", ACTIVATIONS, default="gelu_pytorch_tanh")
    ffn = part("mm.decoder.ffn.dense.GatedFFN", hidden=s.integer("intermediate_size"), activation=activation)
    return decoder_tree(
        width=width,
        mixers=mixers,
        ffns={"dense": ffn},
        layers=[f"{kind}/dense" for kind in kinds],
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", True),
        block=rms_block(s.number("rms_norm_eps", 1e-6), offset=1.0, arrangement="sandwich"),
        embedding={"scale": width**0.5},
        head={"softcap": softcap},
    )


def gemma_rules(s: Settings, more: list[Rule]) -> list[Rule]:
    bias, hidden = s.flag("attention_bias", False), s.integer("intermediate_size")
    theirs = "model.layers.{i}."
    norms = {
        "mixer_norm": "input_layernorm",
        "mixer_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
    }
    each = [
        *(same(f"layers.{{i}}.{a}.weight", f"{theirs}{b}.weight") for a, b in norms.items()),
        *attention_rules(s, bias=bias, out_bias=bias),
        *more,
        fused(
            "layers.{i}.ffn.gate_up.weight",
            [f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"],
            rows=[hidden, hidden],
        ),
        same("layers.{i}.ffn.down.weight", f"{theirs}mlp.down_proj.weight"),
    ]
    return [*stem(), *layers(range(s.integer("num_hidden_layers")), each)]


FAMILY = Family("gemma2", "Gemma2ForCausalLM", decoder, weights)
