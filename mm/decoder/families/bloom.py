"""BLOOM (BigScience 2022, arXiv 2211.05100): ALiBi, LayerNorm behind the embedding, biases everywhere."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mm.decoder.interchange.family import Family, Tree, decoder_tree, part
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, mapped, same

# What the training code (Megatron-DeepSpeed) left in the published files: choices of kernel and of precision.
LEFT_BY_TRAINING = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "offset_alibi",
    "seq_length",
    "skip_bias_add",
    "skip_bias_add_qkv",
)


def decoder(s: Settings) -> Tree:
    width, heads, count = sizes(s)
    s.only("apply_residual_connection_post_layernorm", False)
    s.only("n_inner", None)
    s.read.update(LEFT_BY_TRAINING)
    norm = part("mm.decoder.norms.LayerNorm", eps=s.number("layer_norm_epsilon", 1e-5))
    return decoder_tree(
        width=width,
        mixers={
            "full": part(
                "mm.decoder.attention.grouped.GroupedAttention",
                heads=heads,
                bias=True,
                positions=part("mm.decoder.positions.Alibi"),
            )
        },
        ffns={"dense": part("mm.decoder.ffn.dense.PlainFFN", hidden=4 * width, activation="gelu_tanh")},
        layers=["full/dense"] * count,
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", True),
        block={"norm": norm},
        embedding={"norm": norm},
    )


def sizes(s: Settings) -> tuple[int, int, int]:
    """Width, heads and layers, under either of their names."""
    width = s.integer("hidden_size", None) or s.integer("n_embed")
    heads = s.integer("n_head", None) or s.integer("num_attention_heads")
    if width % heads:
        s.refuse("n_head", f"{heads} does not divide the width {width}", heads)
    s.read.update(("n_embed", "num_attention_heads", "num_hidden_layers"))
    return width, heads, s.integer("n_layer", None) or s.integer("num_hidden_layers")


def apart(x: Tensor, heads: int) -> Tensor:
    """(heads * 3 * d, ...), query, key and value of one head after another -> all queries, all keys, all values."""
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def together(x: Tensor, heads: int) -> Tensor:
    """The way back."""
    return x.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def weights(s: Settings) -> list[Rule]:
    _, heads, count = sizes(s)
    theirs = "transformer.h.{i}."
    names = {
        "mixer_norm": "input_layernorm",
        "mixer.out": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn.up": "mlp.dense_h_to_4h",
        "ffn.down": "mlp.dense_4h_to_h",
    }
    each = [
        rule
        for kind in ("weight", "bias")
        for rule in (
            mapped(
                f"layers.{{i}}.mixer.qkv.{kind}",
                f"{theirs}self_attention.query_key_value.{kind}",
                partial(apart, heads=heads),
                partial(together, heads=heads),
            ),
            *(same(f"layers.{{i}}.{a}.{kind}", f"{theirs}{b}.{kind}") for a, b in names.items()),
        )
    ]
    return [
        same("embed.weight", "transformer.word_embeddings.weight"),
        *(
            same(f"{a}.{kind}", f"transformer.{b}.{kind}")
            for a, b in {"embed_norm": "word_embeddings_layernorm", "norm": "ln_f"}.items()
            for kind in ("weight", "bias")
        ),
        *layers(range(count), each),
        same("head.weight", "lm_head.weight"),
    ]


FAMILY = Family("bloom", "BloomForCausalLM", decoder, weights, prefix="transformer.")
