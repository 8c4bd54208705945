"""GPT-2 (Radford et al. 2019): multi-head attention with biases, learned positions, LayerNorm before each part."""

from __future__ import annotations

from mm.decoder.interchange.family import Family, Tree, decoder_tree, part
from mm.decoder.interchange.settings import Settings
from mm.decoder.interchange.weights import Rule, layers, same, transposed

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")  # of a head that language models lack


def decoder(s: Settings) -> Tree:
    width, heads, count = s.integer("n_embd"), s.integer("n_head"), s.integer("n_layer")
    if width % heads:
        s.refuse("n_head", f"does not divide n_embd {width}")
    length = s.integer("n_positions", 1024)
    s.only("n_ctx", length)  # older files say it twice
    s.only("add_cross_attention", False)
    s.flag("reorder_and_upcast_attn", False)  # a matter of half precision: our softmax is float32 always
    s.read.update(f"summary_{name}" for name in SUMMARY)

    scale = (width // heads) ** -0.5 if s.flag("scale_attn_weights", True) else 1.0
    scales = [scale / (i + 1) if s.flag("scale_attn_by_inverse_layer_idx", False) else scale for i in range(count)]
    names = {scale: "full" if i == 0 else f"full{i}" for i, scale in enumerate(dict.fromkeys(scales))}
    return decoder_tree(
        width=width,
        mixers={name: attention(heads, scale) for scale, name in names.items()},
        ffns={
            "dense": part(
                "mm.decoder.ffn.dense.PlainFFN",
                hidden=s.integer("n_inner", 4 * width),
                activation=s.choice("activation_function", ACTIVATIONS, default="gelu_new"),
            )
        },
        layers=[f"{names[scale]}/dense" for scale in scales],
        vocab_size=s.integer("vocab_size"),
        tie_embeddings=s.flag("tie_word_embeddings", True),
        block={"norm": part("mm.decoder.norms.LayerNorm", eps=s.number("layer_norm_epsilon", 1e-5))},
        embedding={"positions": "learned", "length": length},
    )


def attention(heads: int, scale: float) -> Tree:
    """As `part`, which leaves None to the default; here None says that there are no positions."""
    tree = part("mm.decoder.attention.grouped.GroupedAttention", heads=heads, bias=True, scores={"scale": scale})
    return {**tree, "init_args": {**tree["init_args"], "positions": None}}


def weights(s: Settings) -> list[Rule]:
    ours, theirs = "layers.{i}.", "transformer.h.{i}."
    linear = {
        "mixer.qkv": "attn.c_attn",
        "mixer.out": "attn.c_proj",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    }
    norms = {"mixer_norm": "ln_1", "ffn_norm": "ln_2"}
    each = [
        *(transposed(f"{ours}{a}.weight", f"{theirs}{b}.weight") for a, b in linear.items()),
        *(same(f"{ours}{a}.bias", f"{theirs}{b}.bias") for a, b in linear.items()),
        *(same(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}") for a, b in norms.items() for kind in ("weight", "bias")),
    ]
    return [
        same("embed.weight", "transformer.wte.weight"),
        same("embed_positions.weight", "transformer.wpe.weight"),
        *layers(range(s.integer("n_layer")), each),
        same("norm.weight", "transformer.ln_f.weight"),
        same("norm.bias", "transformer.ln_f.bias"),
        same("head.weight", "lm_head.weight"),
    ]


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    decoder,
    weights,
    prefix="transformer.",
    ignored=(r".*\.attn\.(masked_)?bias",),  # causal masks, stored by early versions
)
