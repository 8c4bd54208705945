"""MPT (MosaicML 2023): ALiBi, no biases at all, LayerNorm without one."""

from __future__ import annotations

from mm.decoder.interchange.family import Family, Tree, decoder_tree, part
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, same

TRAINING = ("embedding_fraction", "init_config", "init_device", "verbose", "fc_type")
NORMS = {"low_precision_layernorm": None, "layernorm": None}


def decoder(s: Settings) -> Tree:
    width = s.integer("d_model")
    s.only("no_bias", True)
    s.only("expansion_ratio", 4)  # the only one that transformers reads
    s.only("logit_scale", None)
    s.choice("norm_type", NORMS, default="low_precision_layernorm")
    s.flag("learned_pos_emb", True)  # without effect beside ALiBi
    s.integer("max_seq_len", 2048)  # ALiBi has no longest length
    s.read.update(TRAINING)
    return decoder_tree(
        width=width,
        mixers={"full": attention(s)},
        ffns={"dense": part("mm.decoder.ffn.dense.PlainFFN", hidden=4 * width, activation="gelu", bias=False)},
        layers=["full/dense"] * s.integer("n_layers"),
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", True),
        block={"norm": part("mm.decoder.norms.LayerNorm", eps=s.number("layer_norm_epsilon", 1e-5), bias=False)},
    )


def attention(s: Settings) -> Tree:
    options = s.section("attn_config") or Settings({}, f"{s.where}: attn_config")
    options.only("attn_type", "multihead_attention")
    options.only("alibi", True)
    options.only("alibi_bias_max", 8)  # transformers applies no other
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id", "is_encoder_decoder"):
        options.only(name, False)
    options.read.add("attn_impl")  # a choice of kernel
    return part(
        "mm.decoder.attention.grouped.GroupedAttention",
        heads=s.integer("n_heads"),
        positions=part("mm.decoder.positions.Alibi"),
        scores={"scale": options.number("softmax_scale", None)},
        clip_qkv=options.number("clip_qkv", None),
    )


def weights(s: Settings) -> list[Rule]:
    names = {
        "mixer_norm": "norm_1",
        "mixer.qkv": "attn.Wqkv",
        "mixer.out": "attn.out_proj",
        "ffn_norm": "norm_2",
        "ffn.up": "ffn.up_proj",
        "ffn.down": "ffn.down_proj",
    }
    each = [same(f"layers.{{i}}.{a}.weight", f"transformer.blocks.{{i}}.{b}.weight") for a, b in names.items()]
    return [
        same("embed.weight", "transformer.wte.weight"),
        *layers(range(s.integer("n_layers")), each),
        same("norm.weight", "transformer.norm_f.weight"),
        same("head.weight", "lm_head.weight"),
    ]


FAMILY = Family("mpt", "MptForCausalLM", decoder, weights, prefix="transformer.")
